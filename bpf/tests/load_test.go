package tests

import "testing"

// TestUnforced: an endpoint without policy lets flows pass both ways, with no
// binding of anybody, and asks for no evidence.
func TestUnforced(t *testing.T) {
	for _, f := range families {
		t.Run(f.name, func(t *testing.T) {
			g := newGate(t)
			g.endpoint(g.pod, f, f.pod, 0)
			g.pass(g.from(g.pod, tcp(f.pod, 40000, f.peer, 80, syn)))
			g.pass(g.to(g.pod, g.uplink, tcp(f.peer, 80, f.pod, 40000, syn|ack)))
		})
	}
}
