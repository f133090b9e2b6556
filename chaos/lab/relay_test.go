package lab

import (
	"net/netip"
	"testing"
	"time"
)

// What a relay does is done to every packet of the two agents, on open
// connections too, and to nobody else's; a cut cuts what is relayed.
func TestRelay(t *testing.T) {
	l := bareLab(t)
	s, err := l.read()
	if err != nil {
		t.Fatal(err)
	}
	const delay = 60 * time.Millisecond
	for _, ip := range s.Nodes[0].IPs {
		addr := netip.AddrPortFrom(ip, agentPort).String()
		listen(t, inNode(l, "one"), addr)
		open, err := dial(inNode(l, "two"), addr, 5*time.Second)
		if err != nil {
			t.Fatal(err)
		}
		defer open.Close()
		if err := echo(open, 5*time.Second); err != nil {
			t.Fatal(err)
		}
		relay := func(d Disturbance) func() {
			t.Helper()
			stop, err := l.Relay("two", "one", d)
			if err != nil {
				t.Fatal(err)
			}
			return func() {
				t.Helper()
				if err := stop(); err != nil {
					t.Error(err)
				}
			}
		}

		stop := relay(Disturbance{Least: delay, Most: delay})
		if _, err := l.Relay("one", "two", Disturbance{}); err == nil {
			t.Error("two relays between two nodes")
		}
		began := time.Now()
		if err := echo(open, 20*time.Second); err != nil {
			t.Errorf("%s: an open connection by a relay: %v", addr, err)
		}
		c, err := dial(inNode(l, "two"), addr, 20*time.Second)
		if err != nil {
			t.Errorf("%s: connect by a relay: %v", addr, err)
		} else {
			c.Close()
		}
		if took := time.Since(began); took < 4*delay { // there and back, twice
			t.Errorf("%s: a round trip and a handshake took %v by a relay that delays by %v", addr, took, delay)
		}
		if err := l.Cut(t.Context(), "one", "two"); err != nil {
			t.Fatal(err)
		}
		if _, err := dial(inNode(l, "two"), addr, 500*time.Millisecond); !isTimeout(err) {
			t.Errorf("%s: connect across a cut: %v, want a timeout", addr, err)
		}
		if err := l.Heal(t.Context(), "one", "two"); err != nil {
			t.Fatal(err)
		}
		stop()

		stop = relay(Disturbance{Loss: 1})
		if _, err := dial(inNode(l, "two"), addr, 500*time.Millisecond); !isTimeout(err) {
			t.Errorf("%s: connect by a relay that loses everything: %v, want a timeout", addr, err)
		}
		if c, err := dial(inNode(l, "three"), addr, 20*time.Second); err != nil {
			t.Errorf("%s: a third node: %v", addr, err)
		} else {
			c.Close()
		}
		stop()

		stop = relay(Disturbance{Most: 20 * time.Millisecond, Twice: 1})
		for range 5 {
			if err := echo(open, 20*time.Second); err != nil {
				t.Errorf("%s: by a relay that repeats and reorders: %v", addr, err)
			}
		}
		stop()
		if err := echo(open, 20*time.Second); err != nil {
			t.Errorf("%s: after the relay: %v", addr, err)
		}
	}
	for _, d := range []Disturbance{{Least: 2, Most: 1}, {Loss: 2}, {Twice: -1}} {
		if _, err := l.Relay("one", "two", d); err == nil {
			t.Errorf("a relay that does %+v", d)
		}
	}
	if _, err := l.Relay("one", "four", Disturbance{}); err == nil {
		t.Error("a relay to a node that does not exist")
	}
}
