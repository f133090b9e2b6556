package session_test

import (
	"errors"
	"io"
	"net"
	"net/netip"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"portcullis/ipcache/lease"
	"portcullis/ipcache/session"
)

// Strangers who connect from many addresses, say nothing and connect anew keep
// no node out: neither a new session nor the one that stands.
func TestStrangersKeepNobodyOut(t *testing.T) {
	l := newLab(t, "portcullis.lab", time.Hour, "n1", "n2", "n3")
	loopback := netip.MustParseAddr("127.0.0.1") // of the nodes; strangers come from others
	owner := l.node(t, "n1", func(c *session.Config) {
		c.Connections, c.NodeAddress = 256, func(ip netip.Addr) bool { return ip == loopback }
	})
	before := l.node(t, "n2").knows(owner)
	atVerifier, atOwner := open(t, before, owner)

	var wg sync.WaitGroup
	var stop atomic.Bool
	var dialled, thrownOut atomic.Int64
	for i := range 24 {
		wg.Go(func() {
			d := net.Dialer{LocalAddr: &net.TCPAddr{IP: net.IPv4(127, 0, 1, byte(1+i%12))}, Timeout: patience}
			var open []net.Conn
			for !stop.Load() {
				c, err := d.Dial("tcp", owner.Addr().String())
				if errors.Is(err, syscall.EADDRINUSE) || errors.Is(err, syscall.EADDRNOTAVAIL) || errors.Is(err, syscall.ECONNRESET) {
					continue
				}
				if err != nil {
					t.Error(err)
					break
				}
				dialled.Add(1)
				// Who is refused is closed at once; who has a place is left alone.
				c.SetReadDeadline(time.Now().Add(50 * time.Millisecond)) //nolint:errcheck // a TCP connection takes it
				if _, err := c.Read(make([]byte, 1)); errors.Is(err, syscall.ECONNRESET) || errors.Is(err, io.EOF) {
					thrownOut.Add(1)
					c.Close()
					continue
				}
				if open = append(open, c); len(open) > 8 {
					open[0].Close()
					open = open[1:]
				}
			}
			for _, c := range open {
				c.Close()
			}
		})
	}
	for end := time.Now().Add(patience); thrownOut.Load() < 100 && time.Now().Before(end); {
		time.Sleep(time.Millisecond) // until there are more of them than places
	}
	for i := range 5 {
		v := l.node(t, "n3").knows(owner)
		_, at := open(t, v, owner) // at the first attempt
		v.stop()
		for await[lease.VerifierGone](t, owner.sink).Stream != at {
		}
		before.SendToOwner(atVerifier, lease.Heartbeat{SentAt: lease.Time(i), Ask: time.Second})
		if m := await[lease.FromVerifier](t, owner.sink); m.Stream != atOwner || m.Message.(lease.Heartbeat).SentAt != lease.Time(i) {
			t.Errorf("%+v", m)
		}
	}
	stop.Store(true)
	wg.Wait()
	if thrownOut.Load() == 0 {
		t.Error("nobody was refused: the strangers were too few")
	}
	t.Logf("%d connections of strangers, %d closed at once", dialled.Load(), thrownOut.Load())
}
