package scenario

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"portcullis/chaos/lab"
)

const (
	tcpPort = 80
	udpPort = 90
)

// echo is the server's sockets; it remembers who got through to it.
type echo struct {
	w     *world
	mu    sync.Mutex
	heard map[netip.Addr]int  // guarded by mu; connections and datagrams by source
	conns map[string]net.Conn // guarded by mu; by their far end, until they end
}

func serve(w *world) *echo {
	w.t.Helper()
	e := &echo{w: w, heard: map[netip.Addr]int{}, conns: map[string]net.Conn{}}
	e.listen(tcpPort)
	var pc *net.UDPConn
	w.must(w.InWorkload("server", func() (err error) {
		pc, err = net.ListenUDP("udp4", &net.UDPAddr{Port: udpPort})
		return err
	}))
	var wg sync.WaitGroup
	wg.Go(func() {
		b := make([]byte, 64)
		for {
			n, from, err := pc.ReadFromUDPAddrPort(b)
			if err != nil {
				return
			}
			e.hear(from.Addr())
			pc.WriteToUDPAddrPort(b[:n], from)
		}
	})
	w.t.Cleanup(func() { pc.Close(); wg.Wait() })
	return e
}

// listen has the server echo on a TCP port.
func (e *echo) listen(port uint16) {
	e.w.t.Helper()
	var ln net.Listener
	e.w.must(e.w.InWorkload("server", func() (err error) {
		ln, err = net.Listen("tcp4", fmt.Sprintf(":%d", port))
		return err
	}))
	var wg sync.WaitGroup
	wg.Go(func() {
		for {
			c, err := ln.Accept()
			if err != nil {
				return
			}
			e.hear(c.RemoteAddr().(*net.TCPAddr).AddrPort().Addr())
			far := c.RemoteAddr().String()
			e.mu.Lock()
			e.conns[far] = c
			e.mu.Unlock()
			wg.Go(func() {
				io.Copy(c, c)
				e.mu.Lock()
				delete(e.conns, far)
				e.mu.Unlock()
				c.Close()
			})
		}
	})
	e.w.t.Cleanup(func() {
		ln.Close()
		e.mu.Lock()
		for _, c := range e.conns {
			c.Close()
		}
		e.mu.Unlock()
		wg.Wait()
	})
}

func (e *echo) hear(ip netip.Addr) {
	e.mu.Lock()
	defer e.mu.Unlock()
	e.heard[ip.Unmap()]++
}

// from returns how often somebody with this IP got through.
func (e *echo) from(r lab.Running) int {
	e.mu.Lock()
	defer e.mu.Unlock()
	return e.heard[r.IP4()]
}

// dial connects to the server from a workload.
func (w *world) dial(from lab.Running, timeout time.Duration) (c net.Conn, err error) {
	return w.dialTo(from, netip.AddrPortFrom(w.server.IP4(), tcpPort), timeout)
}

// dialTo is dial to somebody else.
func (w *world) dialTo(from lab.Running, to netip.AddrPort, timeout time.Duration) (c net.Conn, err error) {
	addr := to.String()
	err = w.InWorkload(from.Spec.FullName(), func() (err error) { c, err = net.DialTimeout("tcp", addr, timeout); return err })
	return c, err
}

// reach makes one connection.
func (w *world) reach(from lab.Running) error {
	c, err := w.dial(from, time.Second)
	if err == nil {
		c.Close()
	}
	return err
}

// reachAt makes one connection to another of the server's ports.
func (w *world) reachAt(from lab.Running, port uint16) error {
	return w.reachTo(from, netip.AddrPortFrom(w.server.IP4(), port))
}

// reachTo makes one connection to anybody.
func (w *world) reachTo(from lab.Running, to netip.AddrPort) error {
	c, err := w.dialTo(from, to, time.Second)
	if err == nil {
		c.Close()
	}
	return err
}

// spoof sends a datagram to the server under another workload's address.
func (w *world) spoof(from, as lab.Running) {
	w.t.Helper()
	b := make([]byte, 28)
	b[0], b[8], b[9] = 0x45, 64, unix.IPPROTO_UDP // the kernel fills in length and checksum
	copy(b[12:], as.IP4().AsSlice())
	copy(b[16:], w.server.IP4().AsSlice())
	binary.BigEndian.PutUint16(b[22:], udpPort)
	binary.BigEndian.PutUint16(b[24:], 8)
	w.must(w.InWorkload(from.Spec.FullName(), func() error {
		fd, err := unix.Socket(unix.AF_INET, unix.SOCK_RAW|unix.SOCK_CLOEXEC, unix.IPPROTO_RAW)
		if err != nil {
			return err
		}
		defer unix.Close(fd)
		return unix.Sendto(fd, b, 0, &unix.SockaddrInet4{Addr: w.server.IP4().As4()})
	}))
}

// live is traffic of the client that goes on: an exchange every 10 ms on one
// TCP connection, and one on one UDP flow.
type live struct {
	w    *world
	tcp  net.Conn
	udp  net.Conn
	stop func() // no more is sent; and wait; may be repeated

	exchanges, sent, received atomic.Uint64
}

func (w *world) live() *live {
	w.t.Helper()
	l := &live{w: w}
	w.eventually("the client reaches the server", func() (err error) { l.tcp, err = w.dial(w.client, time.Second); return err })
	w.must(w.InWorkload("client", func() (err error) {
		l.udp, err = net.Dial("udp4", netip.AddrPortFrom(w.server.IP4(), udpPort).String())
		return err
	}))
	stopped := make(chan struct{})
	var sending, reading sync.WaitGroup
	sending.Go(func() { l.every(stopped, l.exchange) })
	sending.Go(func() {
		l.every(stopped, func() error {
			b := binary.BigEndian.AppendUint64(nil, l.sent.Add(1))
			l.udp.Write(b) // an ICMP error, perhaps of an earlier one: counted by what is missing
			return nil
		})
	})
	reading.Go(func() {
		b := make([]byte, 64)
		for {
			n, err := l.udp.Read(b)
			if errors.Is(err, net.ErrClosed) {
				return
			}
			if n == 8 {
				l.received.Add(1)
			}
		}
	})
	l.stop = sync.OnceFunc(func() {
		close(stopped)
		l.tcp.SetReadDeadline(time.Now().Add(patience))
		sending.Wait()
	})
	w.t.Cleanup(func() {
		l.tcp.Close()
		l.stop()
		l.udp.Close()
		reading.Wait()
	})
	l.goesOn("traffic")
	return l
}

func (l *live) every(stopped <-chan struct{}, do func() error) {
	tick := time.NewTicker(10 * time.Millisecond)
	defer tick.Stop()
	for {
		if do() != nil {
			return
		}
		select {
		case <-stopped:
			return
		case <-tick.C:
		}
	}
}

func (l *live) exchange() error {
	b := make([]byte, 8)
	if _, err := l.tcp.Write(b); err != nil {
		return err
	}
	if _, err := io.ReadFull(l.tcp, b); err != nil {
		return err
	}
	l.exchanges.Add(1)
	return nil
}

// goesOn waits for more exchanges, both ways and by both protocols.
func (l *live) goesOn(when string) {
	l.w.t.Helper()
	tcp, udp := l.exchanges.Load(), l.received.Load()
	l.w.eventually(when+" goes on", func() error {
		if t, u := l.exchanges.Load()-tcp, l.received.Load()-udp; t < 5 || u < 5 {
			return fmt.Errorf("%d more exchanges over TCP, %d over UDP", t, u)
		}
		return nil
	})
}

// missing is how many segments one end of a connection sent again of which no
// first copy arrived. A stack that gets no turn for 200 ms sends again what is
// not lost; the other end says so (DSACK), a moment later.
func missing(c net.Conn) (n uint32, err error) {
	if c == nil {
		return 0, errors.New("it has ended")
	}
	raw, err := c.(syscall.Conn).SyscallConn()
	if err != nil {
		return 0, err
	}
	err = errors.Join(raw.Control(func(fd uintptr) {
		var info *unix.TCPInfo
		if info, err = unix.GetsockoptTCPInfo(int(fd), unix.IPPROTO_TCP, unix.TCP_INFO); err == nil {
			n = info.Total_retrans - info.Dsack_dups
		}
	}), err)
	return n, err
}

// lossless ends the traffic and checks that nothing of it was lost: each segment
// arrived when it was first sent, and each datagram was answered.
func (l *live) lossless() {
	l.w.t.Helper()
	l.stop()
	l.w.eventually("every datagram is answered", func() error {
		if sent, received := l.sent.Load(), l.received.Load(); received != sent {
			return fmt.Errorf("%d of %d", received, sent)
		}
		return nil
	})
	ends := map[string]net.Conn{"client": l.tcp}
	l.w.echo.mu.Lock()
	ends["server"] = l.w.echo.conns[l.tcp.LocalAddr().String()]
	l.w.echo.mu.Unlock()
	for end, c := range ends {
		l.w.eventually("every segment arrives", func() error {
			n, err := missing(c)
			if n != 0 || err != nil {
				return fmt.Errorf("%d segments of the %s were lost: there was a gap (%v)", n, end, err)
			}
			return nil
		})
	}
}

// knock has a workload try to connect all the time until the returned function
// is called, which waits and returns how often it tried.
func (w *world) knock(from lab.Running) (stop func() int) {
	stopped, n := make(chan struct{}), 0
	var wg sync.WaitGroup
	wg.Go(func() {
		for {
			if c, err := w.dial(from, 50*time.Millisecond); err == nil {
				c.Close()
			}
			n++
			select {
			case <-stopped:
				return
			default:
			}
		}
	})
	end := sync.OnceFunc(func() { close(stopped); wg.Wait() })
	w.t.Cleanup(end)
	return func() int { end(); return n }
}
