package main

import (
	"errors"
	"fmt"
	"runtime"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"

	"portcullis/chaos/lab"
)

const (
	payload = 64 - 14 - 20 - 8 // of a frame of 64 bytes: Ethernet, IPv4, UDP
	chunk   = 128 << 10        // bytes of one write to a stream
	// wake is how long a receiver blocks before it looks whether it is to end.
	wake = 100 * time.Millisecond
	// giveUp ends a call that waits for a packet that was lost.
	giveUp = 5 * time.Second
	// buffer of a datagram socket: a receiver that loses its core for some
	// milliseconds to other work loses no packets.
	buffer = 16 << 20
)

// kind is one kind of traffic between two ends.
type kind struct {
	unit   string
	target float64
	open   func(l *lab.Lab, e ends, core int) (*flow, error)
}

var kinds = map[string]*kind{
	"connections": {unit: "connections", target: 0.90, open: openConnections},
	"udp":         {unit: "packets", target: 0.80, open: openUDP},
	"stream":      {unit: "bytes", target: 0.97, open: openStream},
}

// flow is traffic that is ready: a receiver that runs, and what the sender
// does. send runs on a thread in the client's namespace.
type flow struct {
	send     func() (n int, err error) // one operation; n is what it counts for
	batch    int                       // operations between two looks at the clock
	received atomic.Int64
	tid      int // thread of the receiver
	client   string
	stop     func() error // ends the receiver, closes the sockets
}

// receive starts the receiver, pinned to the core: step is called until it is
// told to end, and returns what it counts for.
func (f *flow) receive(core int, step func() (int, error), closeAll func()) error {
	started := make(chan error, 1)
	var ending atomic.Bool
	var failed error
	var wg sync.WaitGroup
	wg.Go(func() {
		runtime.LockOSThread() // and never unlocked: the thread ends pinned
		f.tid = unix.Gettid()
		err := pin(core)
		started <- err
		for err == nil && !ending.Load() {
			var n int
			n, err = step()
			f.received.Add(int64(n))
			if err == unix.EAGAIN || err == unix.EINTR {
				err = nil
			}
		}
		if !ending.Load() {
			failed = err
		}
	})
	f.stop = func() error {
		ending.Store(true)
		wg.Wait()
		closeAll()
		return failed
	}
	return <-started
}

func pin(core int) error {
	var set unix.CPUSet
	set.Set(core)
	if err := unix.SchedSetaffinity(0, &set); err != nil {
		return fmt.Errorf("pin a thread to core %d: %w", core, err)
	}
	return nil
}

// socket makes a socket that does not block for ever.
func socket(kind int) (int, error) {
	fd, err := unix.Socket(unix.AF_INET, kind|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return -1, err
	}
	w, g := unix.NsecToTimeval(int64(wake)), unix.NsecToTimeval(int64(giveUp))
	err = errors.Join(unix.SetsockoptTimeval(fd, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &w), unix.SetsockoptTimeval(fd, unix.SOL_SOCKET, unix.SO_SNDTIMEO, &g))
	if err != nil {
		unix.Close(fd)
		return -1, err
	}
	return fd, nil
}

// serve makes the server's socket, in its namespace.
func serve(l *lab.Lab, e ends, kind int) (fd int, err error) {
	err = l.InWorkload(e.server, func() error {
		if fd, err = socket(kind); err != nil {
			return err
		}
		if kind == unix.SOCK_STREAM {
			return errors.Join(unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_REUSEADDR, 1),
				unix.Bind(fd, &unix.SockaddrInet4{Addr: e.address.Addr().As4(), Port: port}), unix.Listen(fd, 1024))
		}
		return errors.Join(unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_RCVBUFFORCE, buffer),
			unix.Bind(fd, &unix.SockaddrInet4{Addr: e.address.Addr().As4(), Port: port}))
	})
	return fd, err
}

func dial(l *lab.Lab, e ends, kind int) (fd int, err error) {
	err = l.InWorkload(e.client, func() error {
		if fd, err = socket(kind); err != nil {
			return err
		}
		return unix.Connect(fd, &unix.SockaddrInet4{Addr: e.address.Addr().As4(), Port: port})
	})
	return fd, err
}

// openConnections: the server accepts and closes at once. It is the one who
// closes first, so the client's port is free again at once.
func openConnections(l *lab.Lab, e ends, core int) (*flow, error) {
	listener, err := serve(l, e, unix.SOCK_STREAM)
	if err != nil {
		return nil, err
	}
	f := &flow{client: e.client, batch: 8}
	to := &unix.SockaddrInet4{Addr: e.address.Addr().As4(), Port: port}
	w := unix.NsecToTimeval(int64(giveUp))
	var b [1]byte
	f.send = func() (int, error) {
		fd, err := unix.Socket(unix.AF_INET, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
		if err != nil {
			return 0, err
		}
		defer unix.Close(fd)
		if err := unix.SetsockoptTimeval(fd, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &w); err != nil {
			return 0, err
		}
		if err := retry(func() error { return unix.Connect(fd, to) }); err != nil {
			return 0, fmt.Errorf("connect to %v: %w", e.address, err)
		}
		if err := retry(func() error { _, err := unix.Read(fd, b[:]); return err }); err != nil {
			return 0, fmt.Errorf("wait for the end of a connection: %w", err)
		}
		return 1, nil
	}
	return f, f.receive(core, func() (int, error) {
		fd, _, err := unix.Accept4(listener, unix.SOCK_CLOEXEC)
		if err != nil {
			return 0, err
		}
		return 1, unix.Close(fd)
	}, func() { unix.Close(listener) })
}

// retry repeats a call that a signal interrupted: the Go runtime sends some.
func retry(call func() error) error {
	for {
		err := call()
		if err == unix.EISCONN || err == unix.EALREADY { // of a connect that went on
			return nil
		}
		if err != unix.EINTR {
			return err
		}
	}
}

func openUDP(l *lab.Lab, e ends, core int) (*flow, error) {
	in, err := serve(l, e, unix.SOCK_DGRAM)
	if err != nil {
		return nil, err
	}
	out, err := dial(l, e, unix.SOCK_DGRAM)
	if err != nil {
		unix.Close(in)
		return nil, err
	}
	data, space := make([]byte, payload), make([]byte, 2048)
	f := &flow{client: e.client, batch: 32}
	f.send = func() (int, error) {
		n, err := unix.Write(out, data)
		if err == unix.EINTR || n != payload && err == nil {
			return 0, nil
		}
		return 1, err
	}
	return f, f.receive(core, func() (int, error) {
		if _, err := unix.Read(in, space); err != nil {
			return 0, err
		}
		return 1, nil
	}, func() { unix.Close(in); unix.Close(out) })
}

func openStream(l *lab.Lab, e ends, core int) (*flow, error) {
	listener, err := serve(l, e, unix.SOCK_STREAM)
	if err != nil {
		return nil, err
	}
	defer unix.Close(listener)
	out, err := dial(l, e, unix.SOCK_STREAM)
	if err != nil {
		return nil, err
	}
	in, _, err := unix.Accept4(listener, unix.SOCK_CLOEXEC)
	if err != nil {
		unix.Close(out)
		return nil, err
	}
	w := unix.NsecToTimeval(int64(wake))
	if err := unix.SetsockoptTimeval(in, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &w); err != nil {
		return nil, err
	}
	data, space := make([]byte, chunk), make([]byte, 2*chunk)
	f := &flow{client: e.client, batch: 1}
	f.send = func() (int, error) {
		n, err := unix.Write(out, data)
		if err == unix.EINTR {
			return 0, nil
		}
		return max(n, 0), err
	}
	return f, f.receive(core, func() (int, error) {
		n, err := unix.Read(in, space)
		return max(n, 0), err
	}, func() { unix.Close(in); unix.Close(out) })
}
