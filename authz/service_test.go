package authz

import (
	"net/netip"
	"slices"
	"testing"

	"portcullis/bpf/abi"
	"portcullis/identity"
)

// A service without a selector means who is world at its addresses, and the nodes
// that have them; never a workload, and nobody whose address is not known.
func TestServiceWithoutSelector(t *testing.T) {
	four, six := netip.MustParsePrefix("192.0.2.1/32"), netip.MustParsePrefix("2001:db8::1/128")
	r := NewRepository(Options{})
	rule := Rule{Direction: abi.DirEgress, Action: Allow, AnyPort: true, Path: "0", Peers: []PeerSelector{Service{Namespace: "default", Name: "kubernetes"}}}
	if err := r.Put(&Policy{Ref: Ref{"Test", "a", "p"}, Specs: []Spec{{DenyEgress: true, Rules: []Rule{rule}}}}); err != nil {
		t.Fatal(err)
	}
	r.SetService(ServiceName{"default", "kubernetes"}, &Backends{Blocks: []netip.Prefix{six, four}})
	r.SetService(ServiceName{"default", "other"}, &Backends{Blocks: []netip.Prefix{netip.MustParsePrefix("192.0.2.2/32")}})
	for _, bound := range []bool{false, true} {
		if got := r.Blocks(bound); !slices.Equal(got, []netip.Prefix{four, six}) {
			t.Errorf("bound %v: the blocks are %v", bound, got)
		}
	}
	set := r.Compile(identity.New("", "a", "", nil), func(func(identity.Numeric, Peer) bool) {})
	passes := func(id identity.Identity, in identity.Region) bool {
		set.AddPeer(300, PeerIn(id, in))
		defer set.RemovePeer(300)
		return set.Judge(abi.DirEgress, 300, ProtoTCP, 6443).Verdict == abi.VerdictPass
	}
	for name, want := range map[string]bool{"world": true, "remote-node": true, "host": true, "kube-apiserver": true,
		"init": false, "unmanaged": false, "ingress": false, "health": false, "a workload": false} {
		id, reserved := identity.Reserved(name)
		if !reserved {
			id = identity.New("", "a", "", nil)
		}
		regions := r.Regions(name != "world")
		for _, ip := range []string{"192.0.2.1", "2001:db8::1"} {
			if got := passes(id, regions.Of(netip.MustParseAddr(ip))); got != want {
				t.Errorf("%s at %s passes: %v", name, ip, got)
			}
		}
		for _, ip := range []string{"192.0.2.2", "192.0.2.3", "2001:db8::2"} {
			if passes(id, regions.Of(netip.MustParseAddr(ip))) {
				t.Errorf("%s at %s passes", name, ip)
			}
		}
		if passes(id, identity.Region{}) {
			t.Errorf("%s passes, wherever it is", name)
		}
	}
}
