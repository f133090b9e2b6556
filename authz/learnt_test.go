package authz

import (
	"fmt"
	"iter"
	"maps"
	"math/rand/v2"
	"net/netip"
	"testing"

	"portcullis/bpf/abi"
	"portcullis/identity"
)

func named(path string, port uint16, names ...PeerSelector) Rule {
	return Rule{Direction: abi.DirEgress, Action: Allow, Peers: names, Ports: []PortRange{Port(ProtoTCP, port)}, Path: path}
}

// byNames is a policy for workloads with a label.
func byNames(name, label string, rules ...Rule) *Policy {
	return &Policy{Ref: Ref{Kind: "Test", Name: name}, Specs: []Spec{{Subject: Selector{Label("app", label)}, DenyEgress: true, Rules: rules}}}
}

func addressPeer(ip netip.Addr) Peer {
	world, _ := identity.Reserved("world")
	return PeerIn(world, identity.Region{Block: netip.PrefixFrom(ip, ip.BitLen())})
}

func app(label string) identity.Identity {
	return identity.Identity{Namespace: "default", Labels: map[string]string{"app": label}, ServiceAccount: "default"}
}

func TestLearntIsOneSubjectsOwn(t *testing.T) {
	r := NewRepository(Options{})
	if err := r.Put(byNames("p", "a", named("x", 443, DNSName{Pattern: "*.example.com"})), byNames("q", "b", named("x", 443, DNSName{Pattern: "*.example.com"}))); err != nil {
		t.Fatal(err)
	}
	x := NewSets(r)
	a, b := x.AddSubject(app("a")), x.AddSubject(app("b"))
	for _, s := range []*Subject{a, b} {
		x.Use(s, x.Compile(s))
	}
	ip, n := netip.MustParseAddr("192.0.2.1"), identity.Numeric(70000)
	if !a.Wants("www.example.com") || a.Wants("example.com") {
		t.Error("a subject does not know what names it is about")
	}
	if d := x.Learn(a, ip, []string{"www.example.com"}); len(d.Add) > 0 {
		t.Errorf("entries without a number: %v", d)
	}
	added := x.AddPeer(n, addressPeer(ip))
	if len(added) != 1 || added[0].Subject != a || len(added[0].Add) != 1 {
		t.Fatalf("the number brings %+v", added)
	}
	if d := x.Learn(b, ip, []string{"other.org"}); len(d.Add)+len(d.Remove) > 0 {
		t.Errorf("a name that no rule means brings %v", d)
	}
	if d := x.Learn(b, ip, []string{"other.org", "www.example.com"}); len(d.Add) != 1 {
		t.Errorf("the second subject gets %v", d)
	}
	if d := x.Learn(a, ip, nil); len(d.Remove) != 1 || a.Stale() || b.Stale() {
		t.Errorf("forgetting removes %v; stale %v %v", d, a.Stale(), b.Stale())
	}
	if len(b.set.peers) != 1 || len(a.set.peers) != 0 {
		t.Error("the first subject's forgetting is not its own")
	}
	// Others than single addresses of world have no names.
	remote, _ := identity.Reserved("remote-node")
	x.Learn(a, ip, []string{"www.example.com"})
	for i, p := range []Peer{{Identity: app("c"), Block: addressPeer(ip).Block}, {Identity: remote, Block: addressPeer(ip).Block},
		{Identity: addressPeer(ip).Identity}, {Identity: addressPeer(ip).Identity, Block: netip.MustParsePrefix("192.0.2.0/24")}} {
		if d := x.AddPeer(identity.Numeric(80000+i), p); len(d) > 0 {
			t.Errorf("%+v is let in by a name: %v", p, d)
		}
	}
}

// TestLearntAsFromNothing holds sets that learn against sets that are compiled
// from nothing, with peers that each subject knows by what it learnt.
func TestLearntAsFromNothing(t *testing.T) {
	names := []string{"a.example.com", "b.example.com", "x.org", "deep.b.example.com"}
	for seed := range uint64(30) {
		rnd := rand.New(rand.NewPCG(seed, 7))
		r := NewRepository(Options{})
		selectors := []PeerSelector{DNSName{Name: names[0]}, DNSName{Pattern: "*.example.com"}, DNSName{Pattern: "**.example.com"}, DNSName{Pattern: "*"},
			Block{Prefix: netip.MustParsePrefix("192.0.2.0/29")}, Entities{"world"}}
		change := func() {
			i := rnd.IntN(3)
			var rules []Rule
			for j := range 1 + rnd.IntN(3) {
				rule := named(fmt.Sprint(j), uint16(80+rnd.IntN(3)), selectors[rnd.IntN(len(selectors))])
				if rnd.IntN(3) == 0 {
					rule.Ports, rule.AnyPort = nil, true
				}
				rules = append(rules, rule)
			}
			if err := r.Put(byNames(fmt.Sprint("p", i), []string{"a", "b"}[rnd.IntN(2)], rules...)); err != nil {
				t.Fatal(err)
			}
		}
		change()
		x := NewSets(r)
		subjects := []*Subject{x.AddSubject(app("a")), x.AddSubject(app("b"))}
		use := func() {
			for _, s := range subjects {
				if s.Stale() {
					x.Use(s, x.Compile(s))
				}
			}
		}
		peers := map[identity.Numeric]Peer{}
		for range 80 {
			ip := netip.AddrFrom4([4]byte{192, 0, 2, byte(4 + rnd.IntN(8))})
			n := identity.Numeric(70000 + uint32(ip.As4()[3]))
			switch rnd.IntN(6) {
			case 0:
				change()
			case 1:
				peers[n] = addressPeer(ip)
				x.AddPeer(n, peers[n])
			case 2:
				delete(peers, n)
				x.RemovePeer(n)
			case 3:
				use()
			default:
				var known []string
				for _, name := range names {
					if rnd.IntN(2) == 0 {
						known = append(known, name)
					}
				}
				s := subjects[rnd.IntN(2)]
				before, stale := maps.Clone(s.set.WithSet(7)), s.Stale()
				d := x.Learn(s, ip, known)
				maps.Copy(before, withSet(d.Add, 7))
				for _, k := range d.Remove {
					k.Set = 7
					delete(before, k)
				}
				if !stale && !maps.Equal(before, s.set.WithSet(7)) {
					t.Fatalf("seed %d: the delta does not lead to the set in force", seed)
				}
			}
			for i, s := range subjects {
				if s.Stale() {
					continue
				}
				known := func(yield func(identity.Numeric, Peer) bool) {
					for n, p := range peers {
						if !yield(n, p.asKnownTo(s)) {
							return
						}
					}
				}
				want := r.Compile(app([]string{"a", "b"}[i]), iter.Seq2[identity.Numeric, Peer](known))
				if !s.set.Equal(want) {
					t.Fatalf("seed %d: subject %d has\n%v\nfrom nothing it is\n%v", seed, i, s.set.WithSet(7), want.WithSet(7))
				}
			}
		}
	}
}

func withSet(entries map[abi.PolicyKey]abi.Policy, set uint32) map[abi.PolicyKey]abi.Policy {
	out := map[abi.PolicyKey]abi.Policy{}
	for k, v := range entries {
		k.Set = set
		out[k] = v
	}
	return out
}

func TestAllButANameIsRefused(t *testing.T) {
	if (AllBut{DNSName{Name: "a"}}).validate() == nil || (AllBut{AllBut{DNSName{Name: "a"}}}).validate() == nil {
		t.Error("all but a name is taken")
	}
}

// BenchmarkLearn is the cost of one address that one of 100 subjects learns, of
// which each has ten names and knows 100 addresses.
func BenchmarkLearn(b *testing.B) {
	r := NewRepository(Options{})
	var rules []Rule
	for i := range 10 {
		rules = append(rules, named(fmt.Sprint(i), 443, DNSName{Pattern: fmt.Sprintf("*.n%d.com", i)}))
	}
	x := NewSets(r)
	var subjects []*Subject
	for i := range 100 {
		if err := r.Put(byNames(fmt.Sprint("p", i), fmt.Sprint(i), rules...)); err != nil {
			b.Fatal(err)
		}
		s := x.AddSubject(app(fmt.Sprint(i)))
		x.Use(s, x.Compile(s))
		subjects = append(subjects, s)
		for j := range 100 {
			x.Learn(s, netip.AddrFrom4([4]byte{192, 0, byte(i), byte(j)}), []string{"a.n1.com"})
		}
	}
	for i := range 10000 {
		ip := netip.AddrFrom4([4]byte{192, 0, byte(i / 100), byte(i % 100)})
		x.AddPeer(identity.Numeric(70000+i), addressPeer(ip))
	}
	ip := netip.MustParseAddr("203.0.113.1")
	for b.Loop() {
		x.Learn(subjects[0], ip, []string{"a.n1.com"})
		if d := x.AddPeer(69999, addressPeer(ip)); len(d) != 1 {
			b.Fatal(len(d))
		}
		x.RemovePeer(69999)
		x.Learn(subjects[0], ip, nil)
	}
}
