package demo

import (
	"bufio"
	"context"
	"encoding/binary"
	"errors"
	"io"
	"net"
	"net/http"
	"net/netip"
	"sync"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"

	"portcullis/chaos/lab"
	"portcullis/datapath"
)

// conversation is one TCP connection with a request every 100 ms on it,
// whether the earlier ones were answered or not. Times are CLOCK_BOOTTIME ns.
type conversation struct {
	conn net.Conn
	stop func() // and wait; may be repeated

	mu       sync.Mutex
	sent     []int64 // guarded by mu; read before the request was written
	answered []int64 // guarded by mu; of the same request, read after its answer
}

func converse(l *lab.Lab, from string, addr netip.AddrPort) (*conversation, error) {
	conn, err := dialIn(l, from, addr, 5*time.Second)
	if err != nil {
		return nil, err
	}
	c := &conversation{conn: conn}
	ctx, cancel := context.WithCancel(context.Background())
	var wg sync.WaitGroup
	wg.Go(func() { c.ask(ctx, addr) })
	wg.Go(c.listen)
	c.stop = sync.OnceFunc(func() { cancel(); conn.Close(); wg.Wait() })
	return c, nil
}

func (c *conversation) ask(ctx context.Context, addr netip.AddrPort) {
	tick := time.NewTicker(100 * time.Millisecond)
	defer tick.Stop()
	request := []byte("GET /hello HTTP/1.1\r\nHost: " + addr.String() + "\r\n\r\n")
	for ctx.Err() == nil {
		c.mu.Lock()
		c.sent = append(c.sent, datapath.Now())
		c.mu.Unlock()
		if _, err := c.conn.Write(request); err != nil {
			return // the connection is over: answers that do not come tell it
		}
		select {
		case <-ctx.Done():
		case <-tick.C:
		}
	}
}

func (c *conversation) listen() {
	r := bufio.NewReader(c.conn)
	for {
		resp, err := http.ReadResponse(r, nil)
		if err != nil {
			return
		}
		_, err = io.Copy(io.Discard, resp.Body)
		resp.Body.Close()
		if err != nil || resp.StatusCode != http.StatusOK {
			return
		}
		c.mu.Lock()
		c.answered = append(c.answered, datapath.Now())
		c.mu.Unlock()
	}
}

// count returns how many requests were sent from a to b, and how many of them
// have been answered.
func (c *conversation) count(a, b int64) (sent, answered int) {
	c.mu.Lock()
	defer c.mu.Unlock()
	for i, t := range c.sent {
		if t >= a && t < b {
			sent++
			answered += ones(i < len(c.answered))
		}
	}
	return sent, answered
}

// answersSince returns how many requests that were sent since then have been
// answered.
func (c *conversation) answersSince(t int64) int {
	_, n := c.count(t, datapath.Now())
	return n
}

// knocking is a client that connects every 100 ms.
type knocking struct {
	stop func() // and wait; may be repeated

	mu       sync.Mutex
	began    []int64 // guarded by mu; CLOCK_BOOTTIME of each try
	admitted int     // guarded by mu
}

func (f *faults) knock(from lab.Running) *knocking {
	k := &knocking{}
	ctx, cancel := context.WithCancel(context.Background())
	var wg sync.WaitGroup
	addr := netip.AddrPortFrom(f.ledger.IP4(), ledgerPort)
	wg.Go(func() {
		for ctx.Err() == nil {
			at := datapath.Now()
			c, err := dialIn(f.l, from.Spec.FullName(), addr, 100*time.Millisecond)
			k.mu.Lock()
			k.began = append(k.began, at)
			k.admitted += ones(err == nil)
			k.mu.Unlock()
			if err == nil {
				c.Close()
			}
		}
	})
	k.stop = sync.OnceFunc(func() { cancel(); wg.Wait() })
	return k
}

func (k *knocking) tries() (all, admitted int) {
	k.mu.Lock()
	defer k.mu.Unlock()
	return len(k.began), k.admitted
}

// since returns how many tries began then or later.
func (k *knocking) since(t int64) (n int) {
	k.mu.Lock()
	defer k.mu.Unlock()
	for _, b := range k.began {
		n += ones(b >= t)
	}
	return n
}

// post is a stream of UDP datagrams, each from a port of its own, so each a
// flow that is judged anew, and a receiver that has the kernel stamp their
// arrival behind the gate.
type post struct {
	stop func() // and wait; may be repeated

	mu       sync.Mutex
	arrivals []int64 // guarded by mu; CLOCK_BOOTTIME
}

// Source ports of the letters; not the ephemeral ones.
const firstPost, lastPost = 10000, 30000

func startPost(l *lab.Lab, from, to lab.Running) (*post, error) {
	p := &post{}
	var in *net.UDPConn
	err := l.InWorkload(to.Spec.FullName(), func() (err error) {
		in, err = net.ListenUDP("udp4", net.UDPAddrFromAddrPort(netip.AddrPortFrom(to.IP4(), postPort)))
		return err
	})
	if err != nil {
		return nil, err
	}
	raw, err := in.SyscallConn()
	if err == nil {
		err = raw.Control(func(fd uintptr) {
			err = unix.SetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_TIMESTAMPNS, 1)
		})
	}
	if err != nil {
		return nil, errors.Join(err, in.Close())
	}
	ctx, cancel := context.WithCancel(context.Background())
	var wg sync.WaitGroup
	wg.Go(func() { p.receive(in) })
	wg.Go(func() {
		// An error ends it; letters that do not come tell it.
		_ = l.InWorkload(from.Spec.FullName(), func() error { return sendPost(ctx, netip.AddrPortFrom(to.IP4(), postPort)) })
	})
	p.stop = sync.OnceFunc(func() { cancel(); in.Close(); wg.Wait() })
	return p, nil
}

func sendPost(ctx context.Context, to netip.AddrPort) error {
	tick := time.NewTicker(2 * time.Millisecond)
	defer tick.Stop()
	sa := &unix.SockaddrInet4{Port: int(to.Port()), Addr: to.Addr().As4()}
	for port := firstPost; port < lastPost; port++ {
		fd, err := unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
		if err != nil {
			return err
		}
		if err = unix.Bind(fd, &unix.SockaddrInet4{Port: port}); err == nil {
			err = unix.Sendto(fd, []byte("letter"), 0, sa)
		}
		if err = errors.Join(err, unix.Close(fd)); err != nil {
			return err
		}
		select {
		case <-ctx.Done():
			return nil
		case <-tick.C:
		}
	}
	return nil
}

func (p *post) receive(in *net.UDPConn) {
	offset := realMinusBoot()
	b, oob := make([]byte, 64), make([]byte, 256)
	for {
		_, n, _, _, err := in.ReadMsgUDPAddrPort(b, oob)
		if err != nil {
			return
		}
		messages, err := unix.ParseSocketControlMessage(oob[:n])
		if err != nil {
			continue
		}
		for _, m := range messages {
			if m.Header.Level != unix.SOL_SOCKET || m.Header.Type != unix.SO_TIMESTAMPNS || len(m.Data) < int(unsafe.Sizeof(unix.Timespec{})) {
				continue
			}
			at := int64(binary.NativeEndian.Uint64(m.Data))*int64(time.Second) + int64(binary.NativeEndian.Uint64(m.Data[8:])) - offset
			p.mu.Lock()
			p.arrivals = append(p.arrivals, at)
			p.mu.Unlock()
		}
	}
}

// last returns the last arrival before t; 0: the last of all.
func (p *post) last(t int64) (last int64) {
	p.mu.Lock()
	defer p.mu.Unlock()
	for _, a := range p.arrivals {
		if (t == 0 || a < t) && a > last {
			last = a
		}
	}
	return last
}

// realMinusBoot is what the wall clock, in which the kernel stamps arrivals, is
// ahead of CLOCK_BOOTTIME; the least disturbed of some readings.
func realMinusBoot() (offset int64) {
	best := int64(1) << 62
	for range 20 {
		a := datapath.Now()
		wall := time.Now().UnixNano()
		b := datapath.Now()
		if b-a < best {
			best, offset = b-a, wall-a
		}
	}
	return offset
}
