package datapath_test

import (
	"fmt"
	"io"
	"net"
	"net/netip"
	"sync/atomic"
	"time"
)

// traffic goes through the gate one packet at a time, so that one that is lost,
// or one too many, is seen at once.
type traffic struct {
	l                                                 *lab
	server, friend, stranger, revoked, caller, called *net.UDPConn
	client, accepted                                  net.Conn
	n                                                 int
}

// traffic opens the flows: UDP and TCP of the confirmed peer, UDP that the
// workload itself opened to one who may not call it, and two who are dropped.
func (l *lab) traffic() *traffic {
	l.t.Helper()
	x := &traffic{l: l, server: l.udp(l.workload, workload4, 5000), friend: l.udp(l.remote, remote4, 6000),
		stranger: l.udp(l.remote, stranger, 6000), revoked: l.udp(l.remote, revoked, 6000),
		caller: l.udp(l.workload, workload4, 5001), called: l.udp(l.remote, stranger, 6001)}
	ln := l.listen(workload4)
	accepted := make(chan net.Conn, 1)
	go func() {
		c, err := ln.Accept()
		if err == nil {
			accepted <- c
		}
		close(accepted)
	}()
	l.in(l.remote, func() {
		d := net.Dialer{LocalAddr: &net.TCPAddr{IP: remote4.AsSlice()}, Timeout: patience}
		d.SetMultipathTCP(false)
		var err error
		x.client, err = d.Dial("tcp", netip.AddrPortFrom(workload4, 5000).String())
		l.must(err)
	})
	x.accepted = <-accepted
	l.t.Cleanup(func() { x.client.Close(); x.accepted.Close() })
	return x
}

// close ends the sockets, for a test that opens them again.
func (x *traffic) close() {
	for _, c := range []io.Closer{x.server, x.friend, x.stranger, x.revoked, x.caller, x.called, x.client, x.accepted} {
		c.Close()
	}
}

// round sends one packet of each flow.
func (x *traffic) round() error {
	x.n++
	word := fmt.Sprintf("packet %6d", x.n)
	for _, c := range []*net.UDPConn{x.stranger, x.revoked} {
		if err := sendTo(c, workload4, 5000, "bad "+word); err != nil {
			return err
		}
	}
	for _, way := range []struct {
		what     string
		from, to *net.UDPConn
		ip       netip.Addr
		port     uint16
	}{
		{"the peer's", x.friend, x.server, workload4, 5000}, {"the answer", x.server, x.friend, remote4, 6000},
		{"the workload's", x.caller, x.called, stranger, 6001}, {"the answer to the workload's", x.called, x.caller, workload4, 5001},
	} {
		if err := sendTo(way.from, way.ip, way.port, word); err != nil {
			return err
		}
		if err := receiveFrom(way.to, word); err != nil {
			return fmt.Errorf("%s: %w", way.what, err)
		}
	}
	for _, way := range []struct{ from, to net.Conn }{{x.client, x.accepted}, {x.accepted, x.client}} {
		if _, err := io.WriteString(way.from, word); err != nil {
			return err
		}
		b := make([]byte, len(word))
		if err := way.to.SetReadDeadline(time.Now().Add(patience)); err != nil {
			return err
		}
		if _, err := io.ReadFull(way.to, b); err != nil || string(b) != word {
			return fmt.Errorf("TCP: received %q, %v, want %q", b, err, word)
		}
	}
	return nil
}

// during runs f while packets go to and fro.
func (x *traffic) during(f func()) (rounds int) {
	x.l.t.Helper()
	var stop atomic.Bool
	done := make(chan error, 1)
	before := x.n
	go func() {
		for {
			// One more after the end.
			last := stop.Load()
			if err := x.round(); err != nil || last {
				done <- err
				return
			}
		}
	}()
	f()
	stop.Store(true)
	x.l.must(<-done)
	x.l.eventually("no TCP segment is missing", func() bool { return x.missing() == 0 })
	return x.n - before
}

// missing is how many TCP segments were sent again of which no first copy
// arrived. A stack that gets no turn for 200 ms sends again what is not lost,
// however well the gate works; the other end says so (DSACK), a moment later.
// What that cannot see is the loss of a bare acknowledgement; but no datagram
// may be lost either, and each waits for the one before.
func (x *traffic) missing() (n int) {
	x.l.t.Helper()
	for _, c := range []net.Conn{x.client, x.accepted} {
		info := tcpInfo(x.l.t, c.(*net.TCPConn))
		if info.Total_retrans != 0 {
			x.l.t.Logf("%d segments were sent again, %d of them had arrived", info.Total_retrans, info.Dsack_dups)
		}
		n += int(info.Total_retrans) - int(info.Dsack_dups)
	}
	return n
}

func sendTo(from *net.UDPConn, to netip.Addr, port uint16, payload string) error {
	_, err := from.WriteToUDPAddrPort([]byte(payload), netip.AddrPortFrom(to, port))
	return err
}

func receiveFrom(c *net.UDPConn, want string) error {
	b := make([]byte, 65536)
	if err := c.SetReadDeadline(time.Now().Add(patience)); err != nil {
		return err
	}
	if n, err := c.Read(b); err != nil || string(b[:n]) != want {
		return fmt.Errorf("received %q, %v, want %q", b[:n], err, want)
	}
	return nil
}
