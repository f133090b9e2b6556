package datapath_test

import (
	"context"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"sync"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"

	"portcullis/bpf/abi"
	"portcullis/datapath"
	"portcullis/datapath/steer"
)

// forwarder is a proxy that looks into nothing: it takes every connection that
// is steered to it and makes one of its own, as the client, to the server.
type forwarder struct {
	t         *testing.T
	ns        *os.File
	sockets   *datapath.Sockets
	listeners []io.Closer
	running   sync.WaitGroup

	mu    sync.Mutex
	ended bool       // guarded by mu
	conns []net.Conn // guarded by mu; of both sides
	taken []taken    // guarded by mu
}

// taken is one connection that came to the forwarder.
type taken struct {
	dir            abi.Direction
	client, server netip.AddrPort
}

// steering makes the proxy's namespace and steers into it.
func (l *lab) steering(d *datapath.Datapath) (datapath.Steering, steer.Config) {
	l.t.Helper()
	c := steer.Config{Path: filepath.Join(l.t.TempDir(), "proxy")}
	s, err := steer.Ensure(c)
	l.must(err)
	l.t.Cleanup(func() {
		s.Namespace.Close()
		if err := steer.Remove(c); err != nil {
			l.t.Errorf("remove the proxy's namespace: %v", err)
		}
	})
	l.must(d.Steer(s))
	return s, c
}

// forwarder starts one, for both directions.
func (l *lab) forwarder(s datapath.Steering) *forwarder {
	l.t.Helper()
	sockets, err := datapath.OpenSockets(l.pins)
	l.must(err)
	f := &forwarder{t: l.t, ns: s.Namespace, sockets: sockets}
	l.t.Cleanup(f.stop)
	for dir, place := range map[abi.Direction]abi.L7SocketIndex{abi.DirEgress: abi.L7SocketTcpEgress, abi.DirIngress: abi.L7SocketTcpIngress} {
		l.must(datapath.InNamespace(s.Namespace, func() error { return f.listen(dir, place) }))
	}
	l.must(datapath.InNamespace(s.Namespace, f.listenUDP))
	return f
}

// listen opens the listener of a direction; the calling thread is in the proxy's
// namespace. The port is one that no client calls from: else its own could not be
// used towards the server. (On one address, it would be of one family only.)
func (f *forwarder) listen(dir abi.Direction, place abi.L7SocketIndex) error {
	lc := net.ListenConfig{Control: transparent(dir)}
	lc.SetMultipathTCP(false)
	ln, err := lc.Listen(context.Background(), "tcp", ":1")
	if err != nil {
		return err
	}
	f.listeners = append(f.listeners, ln)
	raw, err := ln.(*net.TCPListener).SyscallConn()
	if err != nil {
		return err
	}
	var put error
	if err := raw.Control(func(fd uintptr) { put = f.sockets.Put(place, fd) }); err != nil || put != nil {
		return fmt.Errorf("%v %v", err, put)
	}
	f.running.Go(func() {
		for {
			c, err := ln.Accept()
			if err != nil {
				return
			}
			f.running.Go(func() { f.serve(dir, c) })
		}
	})
	return nil
}

// transparent makes a socket that may have any address, and is bound to the
// device of a direction.
func transparent(dir abi.Direction) func(network, address string, c syscall.RawConn) error {
	return func(_, _ string, c syscall.RawConn) error {
		var err error
		if e := c.Control(func(fd uintptr) {
			family, _ := unix.GetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_DOMAIN)
			if err = unix.SetsockoptInt(int(fd), unix.SOL_IP, unix.IP_TRANSPARENT, 1); err == nil && family == unix.AF_INET6 {
				err = unix.SetsockoptInt(int(fd), unix.SOL_IPV6, unix.IPV6_TRANSPARENT, 1)
			}
			if err == nil {
				err = unix.SetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_REUSEADDR, 1)
			}
			if err == nil {
				err = unix.BindToDevice(int(fd), steer.InnerDevice(dir))
			}
		}); e != nil {
			return e
		}
		return err
	}
}

func (f *forwarder) serve(dir abi.Direction, client net.Conn) {
	defer client.Close()
	var server net.Conn
	d := net.Dialer{LocalAddr: client.RemoteAddr(), Control: transparent(dir), Timeout: patience}
	d.SetMultipathTCP(false)
	if err := datapath.InNamespace(f.ns, func() (err error) { server, err = d.Dial("tcp", client.LocalAddr().String()); return err }); err != nil {
		client.(*net.TCPConn).SetLinger(0) // a reset
		return
	}
	defer server.Close()
	f.mu.Lock()
	if f.ended {
		f.mu.Unlock()
		return
	}
	f.conns = append(f.conns, client, server)
	f.taken = append(f.taken, taken{dir, addrPort(client.RemoteAddr()), addrPort(client.LocalAddr())})
	f.mu.Unlock()
	var both sync.WaitGroup
	for _, way := range [][2]net.Conn{{client, server}, {server, client}} {
		both.Go(func() {
			io.Copy(way[1], way[0])
			way[1].(*net.TCPConn).CloseWrite()
		})
	}
	both.Wait()
}

func addrPort(a net.Addr) netip.AddrPort {
	ap := a.(*net.TCPAddr).AddrPort()
	return netip.AddrPortFrom(ap.Addr().Unmap().WithZone(""), ap.Port())
}

// saw returns what came to it so far.
func (f *forwarder) saw() []taken {
	f.mu.Lock()
	defer f.mu.Unlock()
	return append([]taken(nil), f.taken...)
}

// stop ends it as a crash would: its sockets are closed.
func (f *forwarder) stop() {
	for _, l := range f.listeners {
		l.Close()
	}
	f.mu.Lock()
	f.ended = true
	for _, c := range f.conns {
		c.Close()
	}
	f.mu.Unlock()
	f.running.Wait()
	f.sockets.Close()
}
