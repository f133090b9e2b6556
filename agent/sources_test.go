package agent

import (
	"errors"
	"net/netip"
	"testing"

	"portcullis/agent/api"
	"portcullis/bpf/abi"
	"portcullis/identity"
)

// A forwarding workload has its further sources, also for the next agent; none
// may lie where a node says who holds the addresses.
func TestExtraSources(t *testing.T) {
	n := newNode(t)
	n.veth("a0")
	l := n.mustStart()
	w := app("a0", "10.1.1.2")
	for _, p := range []string{"10.1.1.7/32", "10.0.0.0/8", "10.1.2.0/25", "192.0.2.1/32", "192.0.2.2/32"} {
		w.sources = []netip.Prefix{netip.MustParsePrefix(p)}
		if _, err := n.register(l, w); !errors.Is(err, errNotMine) {
			t.Errorf("%s was taken: %v", p, err)
		}
	}
	w.sources = []netip.Prefix{netip.MustParsePrefix("203.0.113.0/24")}
	n.run(l, w)
	if ep := n.inKernel(l, "a0"); ep.Flags&uint32(abi.EPForwards) == 0 {
		t.Error("the endpoint may not forward")
	}
	n.crash(l)
	l = n.mustStart()
	defer n.crash(l)
	if e := l.endpoints[w.uid]; e == nil || len(e.sources) != 1 || n.inKernel(l, "a0").Flags&uint32(abi.EPForwards) == 0 {
		t.Errorf("after a restart: %+v", e)
	}
}

func TestParseSources(t *testing.T) {
	r := &api.RegisterWorkloadRequest{Uid: identity.NewUID().String(), Namespace: "default", Name: "router", Ips: []string{"10.1.1.2"}, HostIfname: "a0",
		ExtraSources: []string{"203.0.113.7", "2001:db8:7::/48"}}
	w, err := parseRegistration(r, "td")
	if err != nil || len(w.sources) != 2 || w.sources[0].Bits() != 32 {
		t.Fatalf("%v, %v", w.sources, err)
	}
	for _, bad := range []string{"", "203.0.113.7/24", "0.0.0.0/0", "::ffff:203.0.113.7", "fe80::1%eth0"} {
		r.ExtraSources = []string{bad}
		if _, err := parseRegistration(r, "td"); err == nil {
			t.Errorf("%q was accepted", bad)
		}
	}
}
