package main

import "testing"

// After every kind of change the sets are those that compiling from nothing
// makes, and every kind that must touch one does.
func TestChanges(t *testing.T) {
	n, err := load{policies: 100, identities: 400, endpoints: 20, namespaces: 10}.build(&full{})
	if err != nil {
		t.Fatal(err)
	}
	for _, c := range n.changes(40) {
		touches := c.Entries > 0 || c.Compiled > 0
		switch c.What {
		case "a namespace's label: its version, which no policy asks for", "a local workload goes":
			if touches {
				t.Errorf("%+v", c)
			}
		default:
			if !touches {
				t.Errorf("nothing happened: %+v", c)
			}
		}
	}
	if err := n.check(); err != nil {
		t.Error(err)
	}
}

func BenchmarkClusterPolicy(b *testing.B) {
	n, err := load{policies: 1000, identities: 10000, endpoints: 100, namespaces: 100}.build(&full{})
	if err != nil {
		b.Fatal(err)
	}
	for i := 0; b.Loop(); i++ {
		n.put(n.policy(49, 1+i))
		n.settle()
	}
}

func BenchmarkNewIdentity(b *testing.B) {
	n, err := load{policies: 1000, identities: 10000, endpoints: 100, namespaces: 100}.build(&full{})
	if err != nil {
		b.Fatal(err)
	}
	p := n.peers[1000]
	n.sets.RemovePeer(1000)
	for b.Loop() {
		n.sets.AddPeer(1000, p)
		n.sets.RemovePeer(1000)
	}
}
