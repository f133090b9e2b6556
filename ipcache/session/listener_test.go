package session

import (
	"errors"
	"net"
	"net/netip"
	"syscall"
	"testing"
	"time"

	"go.uber.org/zap"
)

// places is a listener on loopback with what it has accepted.
type places struct {
	t        *testing.T
	l        *listener
	accepted chan net.Conn
}

func newPlaces(t *testing.T, connections int, nodes ...string) *places {
	t.Helper()
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	isNode := map[netip.Addr]bool{}
	for _, n := range nodes {
		isNode[netip.MustParseAddr(n)] = true
	}
	p := &places{t: t, l: newListener(ln, connections, func(ip netip.Addr) bool { return isNode[ip] }, zap.NewNop()), accepted: make(chan net.Conn)}
	done := make(chan struct{})
	go func() {
		defer close(done)
		defer close(p.accepted)
		for {
			c, err := p.l.Accept()
			if err != nil {
				return
			}
			p.accepted <- c
		}
	}()
	t.Cleanup(func() {
		ln.Close()
		for c := range p.accepted {
			c.Close()
		}
		<-done
	})
	return p
}

// connect comes from an address of loopback; it returns the accepted end, or nil
// when the connection was closed at once.
func (p *places) connect(from string) net.Conn {
	p.t.Helper()
	d := net.Dialer{LocalAddr: &net.TCPAddr{IP: net.ParseIP(from)}, Timeout: time.Minute}
	c, err := d.Dial("tcp", p.l.Addr().String())
	if errors.Is(err, syscall.ECONNRESET) {
		return nil // closed so soon
	}
	if err != nil {
		p.t.Fatal(err) // the kernel's queue is never full: nobody waits in it
	}
	p.t.Cleanup(func() { c.Close() })
	closed := make(chan error, 1)
	go func() {
		_, err := c.Read(make([]byte, 1))
		closed <- err
	}()
	select {
	case a := <-p.accepted:
		p.t.Cleanup(func() { a.Close() })
		return a
	case err := <-closed:
		var timeout net.Error
		if errors.As(err, &timeout) && timeout.Timeout() || errors.Is(err, net.ErrClosed) || err == nil {
			p.t.Fatalf("from %s: %v", from, err)
		}
		return nil
	case <-time.After(time.Minute):
		p.t.Fatalf("from %s: neither accepted nor closed", from)
	}
	return nil
}

func (p *places) want(from string, ok bool) net.Conn {
	p.t.Helper()
	c := p.connect(from)
	if (c != nil) != ok {
		p.t.Fatalf("from %s: accepted %v, want %v", from, c != nil, ok)
	}
	return c
}

// Strangers have their share, each and in all, and a known node has its places
// whatever they do.
func TestPlaces(t *testing.T) {
	const node = "127.0.0.100"
	p := newPlaces(t, 128, node) // 16 for strangers, 4 of one address
	var first []net.Conn
	for _, from := range []string{"127.0.0.2", "127.0.0.3", "127.0.0.4", "127.0.0.5"} {
		for range leastStrangers {
			first = append(first, p.want(from, true))
		}
		p.want(from, false) // its share
	}
	p.want("127.0.0.6", false) // all of them
	var nodes []net.Conn
	for range maxPerNode {
		nodes = append(nodes, p.want(node, true))
	}
	p.want(node, false)

	// What is closed gives its place back, once, and to nobody else's share.
	first[0].Close()
	first[0].Close()
	p.want("127.0.0.3", false)
	again := p.want("127.0.0.6", true)
	p.want("127.0.0.6", false)
	nodes[0].Close()
	p.want(node, true)
	p.want(node, false)

	// A node that was not known by its address leaves the strangers' places when
	// it has shown who it is; its name has as many as an address has.
	for range 2 { // it may be said twice
		if !again.(*placed).authenticated("n7") {
			t.Error("no place for a node that has authenticated")
		}
	}
	moved := 1
	for {
		c := p.want("127.0.0.6", true)
		if !c.(*placed).authenticated("n7") {
			break
		}
		moved++
	}
	if moved != maxPerNode {
		t.Errorf("one name has %d places, want %d", moved, maxPerNode)
	}
	// Another name has none: all of the nodes' 128 are taken.
	if first[1].(*placed).authenticated("n8") {
		t.Error("a place beyond all")
	}
	again.Close()
	if !first[1].(*placed).authenticated("n8") {
		t.Error("a place that was given back is not given again")
	}
	first[1].Close()
	if first[1].(*placed).authenticated("n8") {
		t.Error("a connection that is closed has a place")
	}
	p.l.mu.Lock()
	defer p.l.mu.Unlock()
	if p.l.nodes.n != 2*maxPerNode-1 || p.l.nodes.of["node n8"] != 0 || p.l.strangers.n > 16 {
		t.Errorf("nodes %d, strangers %d", p.l.nodes.n, p.l.strangers.n)
	}
}

// One host has all of its /64.
func TestPlacesOfIPv6(t *testing.T) {
	l := newListener(nil, 128, nil, zap.NewNop())
	for i, tc := range []struct {
		from string
		ok   bool
	}{{"2001:db8::1", true}, {"2001:db8::2", true}, {"2001:db8::3", true}, {"2001:db8:0:0:f::", true}, {"2001:db8::5", false},
		{"2001:db8:0:1::1", true}, {"::ffff:192.0.2.1", true}, {"::ffff:192.0.2.2", true}} {
		c := l.place(from{Conn: nil, addr: net.TCPAddr{IP: net.ParseIP(tc.from), Zone: ""}})
		if (c != nil) != tc.ok {
			t.Errorf("%d, %s: place %v", i, tc.from, c != nil)
		}
	}
	if l.strangers.of["192.0.2.1"] != 1 || l.strangers.of["2001:db8::/64"] != 4 {
		t.Errorf("%v", l.strangers.of)
	}
}

type from struct {
	net.Conn
	addr net.TCPAddr
}

func (f from) RemoteAddr() net.Addr { return &f.addr }
