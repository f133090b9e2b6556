package authz

import (
	"fmt"
	"math/rand/v2"
	"net/netip"
	"slices"
	"testing"

	"portcullis/bpf/abi"
	"portcullis/identity"
)

// somePrefix is one of few, so that they lie within each other.
func somePrefix(r *rand.Rand, within netip.Prefix) netip.Prefix {
	a := within.Addr().AsSlice()
	bits := within.Bits()
	for range r.IntN(4) {
		if bits < within.Addr().BitLen() {
			if r.IntN(2) == 0 {
				a[bits/8] |= 0x80 >> (bits % 8)
			}
			bits++
		}
	}
	ip, _ := netip.AddrFromSlice(a)
	return netip.PrefixFrom(ip, bits)
}

var roots = []netip.Prefix{netip.MustParsePrefix("10.0.0.0/8"), netip.MustParsePrefix("fd00::/16"), netip.MustParsePrefix("0.0.0.0/0")}

func blockPolicy(r *rand.Rand, n int) *Policy {
	rules := []Rule{}
	for i := range 1 + r.IntN(3) {
		rule := Rule{Direction: abi.DirEgress, Action: Action(r.IntN(2)), AnyPort: true, Path: fmt.Sprint(i)}
		b := Block{Prefix: somePrefix(r, roots[r.IntN(len(roots))]), Bound: r.IntN(2) == 0}
		for range r.IntN(3) {
			b.Except = append(b.Except, somePrefix(r, b.Prefix))
		}
		slices.SortFunc(b.Except, netip.Prefix.Compare)
		if rule.Peers = []PeerSelector{b}; r.IntN(4) == 0 {
			rule.Peers = []PeerSelector{BlockGroup{Name: "g", Except: b.Except}}
		}
		if r.IntN(4) == 0 {
			rule.Peers = []PeerSelector{AllBut{rule.Peers[0]}}
		}
		rules = append(rules, rule)
	}
	return &Policy{Ref: Ref{"Test", "a", fmt.Sprint(n)}, Specs: []Spec{{DenyEgress: true, Rules: rules}}}
}

// Within its region an address fares as it would alone; in a region of other
// policies it fares no better.
func TestRegions(t *testing.T) {
	r := rand.New(rand.NewPCG(3, 0))
	world, workload := identity.Identity{Reserved: "world"}, identity.New("", "b", "", nil)
	var passed, dropped, worse int
	for range 3000 {
		repo, other := NewRepository(Options{}), NewRepository(Options{})
		for i := range 1 + r.IntN(3) {
			if err := repo.Put(blockPolicy(r, i)); err != nil {
				t.Fatal(err)
			}
			if err := other.Put(blockPolicy(r, i)); err != nil {
				t.Fatal(err)
			}
		}
		groups := []netip.Prefix{somePrefix(r, roots[0]), somePrefix(r, roots[1])}
		repo.SetBlockGroup("g", nil, groups)
		set := repo.Compile(identity.New("", "a", "", nil), func(func(identity.Numeric, Peer) bool) {})
		for _, bound := range []bool{false, true} {
			now, then := repo.Regions(bound), other.Regions(bound)
			id := world
			if bound {
				id = workload
			}
			for range 8 {
				ip := somePrefix(r, somePrefix(r, roots[r.IntN(len(roots))])).Addr()
				in := now.Of(ip)
				if !in.Contains(ip) || !slices.IsSorted(bitsOf(in)) {
					t.Fatalf("%s is in %s", ip, in)
				}
				set.AddPeer(300, PeerIn(id, in))
				set.AddPeer(301, Peer{Identity: id, Block: netip.PrefixFrom(ip, ip.BitLen())})
				set.AddPeer(302, PeerIn(id, then.Of(ip)))
				set.AddPeer(303, PeerIn(id, identity.Region{}))
				var v [4]abi.Verdict
				for i := range v {
					v[i] = set.Judge(abi.DirEgress, identity.Numeric(300+i), ProtoTCP, 80).Verdict
				}
				if v[0] != v[1] {
					t.Fatalf("%s in %s: %s, alone %s: %+v, groups %v", ip, in, v[0], v[1], repo.List(), groups)
				}
				for _, i := range []int{2, 3} {
					if v[i] == abi.VerdictPass && v[1] != abi.VerdictPass {
						t.Fatalf("%s in %s: passes, alone %s: %+v", ip, then.Of(ip), v[1], repo.List())
					}
				}
				if v[2] != v[1] {
					worse++
				}
				if v[0] == abi.VerdictPass {
					passed++
				} else {
					dropped++
				}
				set.RemovePeer(300, 301, 302, 303)
			}
		}
	}
	t.Logf("%d passed, %d dropped, %d fared worse in another's region", passed, dropped, worse)
	if passed == 0 || dropped == 0 || worse == 0 {
		t.Error("a case never came")
	}
}

func bitsOf(r identity.Region) (out []string) {
	for _, h := range r.Holes {
		a := h.Addr().As16()
		out = append(out, string(a[:]))
	}
	return out
}

func TestRegionsOfNothing(t *testing.T) {
	repo := NewRepository(Options{})
	if err := repo.Put(&Policy{Ref: Ref{"Test", "a", "p"}, Specs: []Spec{{Rules: []Rule{
		{Direction: abi.DirEgress, Action: Allow, AnyPort: true, Peers: []PeerSelector{Block{Prefix: netip.MustParsePrefix("10.0.0.0/8"), Bound: true}}}}}}}); err != nil {
		t.Fatal(err)
	}
	for _, bound := range []bool{false, true} {
		// No denial: whoever is outside has the number that it always had.
		if got := repo.Regions(bound).Of(netip.MustParseAddr("192.0.2.1")); !got.IsZero() {
			t.Error(got)
		}
	}
}
