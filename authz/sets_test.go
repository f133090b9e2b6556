package authz

import (
	"fmt"
	"maps"
	"math/rand/v2"
	"net/netip"
	"slices"
	"testing"

	"portcullis/bpf/abi"
	"portcullis/identity"
)

// tracked is a subject with what it is checked against.
type tracked struct {
	*Subject
	id     identity.Identity
	own    []identity.NamedPort
	kernel map[abi.PolicyKey]abi.Policy // its entries, by deltas
	meant  Set                          // what the set in force means, compiled from nothing
}

// node is a generated world whose sets are kept by what changes.
type node struct {
	*testing.T
	*world
	sets     *Sets
	subjects []*tracked
	count    map[string]int
}

func (n *node) apply(deltas []Delta) {
	for _, d := range deltas {
		for _, s := range n.subjects {
			if s.Subject == d.Subject {
				maps.Copy(s.kernel, d.Add)
				for _, k := range d.Remove {
					if _, ok := s.kernel[k]; !ok {
						n.Fatalf("%+v is removed, and was not there", k)
					}
					delete(s.kernel, k)
				}
			}
		}
	}
}

func (n *node) addPeer(num identity.Numeric, p Peer) {
	_, known := n.peers[num]
	n.peers[num] = p
	n.apply(n.sets.AddPeer(num, p))
	for _, s := range n.subjects {
		if s.Stale() && !known {
			s.meant.AddPeer(num, p)
		}
	}
}

func (n *node) removePeer(num identity.Numeric) {
	delete(n.peers, num)
	n.apply(n.sets.RemovePeer(num))
	for _, s := range n.subjects {
		s.meant.RemovePeer(num)
	}
}

func (n *node) use(s *tracked) {
	set := n.sets.Compile(s.Subject)
	n.sets.Use(s.Subject, set)
	s.kernel = set.WithSet(0)
}

// step changes something.
func (n *node) step(r *rand.Rand) (what string) {
	num := identity.Numeric(300 + r.IntN(20))
	switch r.IntN(9) {
	case 0, 1:
		n.changePolicy(r)
		return "policy"
	case 2:
		n.changeFact(r)
		return "fact"
	case 3:
		n.changePorts(r)
		return "ports"
	case 4, 5:
		if old, known := n.peers[num]; known && r.IntN(2) == 0 {
			n.removePeer(num)
			return "peer gone"
		} else if known && r.IntN(2) == 0 {
			n.addPeer(num, old)
			return "peer again"
		} else if known && r.IntN(2) == 0 { // one thing of it is otherwise
			other := genPeer(r)
			switch r.IntN(4) {
			case 0:
				old.Block = other.Block
			case 1:
				old.Holes = genExcept(r, old.Block)
			case 2:
				old.Names = other.Names
			case 3:
				old.Node = other.Node
			}
			n.addPeer(num, old)
			return "peer known better"
		}
		n.addPeer(num, genPeer(r))
		return "peer"
	case 6:
		if i := r.IntN(len(n.subjects)); len(n.subjects) > 2 {
			n.sets.RemoveSubject(n.subjects[i].Subject)
			n.subjects = slices.Delete(n.subjects, i, i+1)
		}
		n.addSubject(genIdentity(r), genNamed(r))
		return "subject"
	}
	for _, s := range n.subjects {
		if s.Stale() && r.IntN(3) > 0 {
			n.use(s)
		}
	}
	return "apply"
}

func (n *node) addSubject(id identity.Identity, own []identity.NamedPort) {
	s := &tracked{Subject: n.sets.AddSubject(id, own...), id: id, own: own, kernel: map[abi.PolicyKey]abi.Policy{}}
	n.use(s)
	n.subjects = append(n.subjects, s)
}

func (n *node) check(what string) {
	for _, s := range n.subjects {
		now := n.Compile(s.id, n.all(), s.own...)
		switch equal := s.set.Equal(now); {
		case s.Stale() && equal:
			n.count["stale for nothing"]++
		case s.Stale():
			n.count["stale"]++
		case !equal:
			n.Fatalf("after %s: subject %s has %+v, should have %+v", what, s.id, s.set.WithSet(0), now.WithSet(0))
		default:
			n.count["current"]++
		}
		if !s.Stale() {
			s.meant = now
		}
		if !maps.Equal(s.set.WithSet(0), s.meant.WithSet(0)) {
			n.Fatalf("after %s: subject %s, stale %v: in force %+v, means %+v", what, s.id, s.Stale(), s.set.WithSet(0), s.meant.WithSet(0))
		}
		if !maps.Equal(s.kernel, s.set.WithSet(0)) {
			n.Fatalf("after %s: subject %s: in the kernel %+v, in force %+v", what, s.id, s.kernel, s.set.WithSet(0))
		}
		entries := maps.Clone(s.set.any.all())
		for num := range n.peers {
			for _, d := range n.sets.Entries(num) {
				if d.Subject == s.Subject {
					maps.Copy(entries, d.Add)
				}
			}
		}
		if !maps.Equal(entries, s.kernel) {
			n.Fatalf("after %s: subject %s: entries %+v, in the kernel %+v", what, s.id, entries, s.kernel)
		}
		if next := n.sets.Compile(s.Subject); !next.Equal(now) {
			n.Fatalf("after %s: subject %s would have %+v, should have %+v", what, s.id, next.WithSet(0), now.WithSet(0))
		}
	}
}

// Whatever the order of changes, the sets are those that compiling from nothing
// makes; a set that is not is stale, and means what it meant; and the entries
// that were said to change are those that did.
func TestSetsAreCompiled(t *testing.T) {
	r := rand.New(rand.NewPCG(21, 0))
	count := map[string]int{}
	worlds := 100
	if testing.Short() {
		worlds = 50
	}
	for range worlds {
		w := genWorld(r)
		n := &node{T: t, world: w, sets: NewSets(w.Repository), count: count}
		for num, p := range w.all() {
			n.sets.AddPeer(num, p)
		}
		for range 3 {
			n.addSubject(genIdentity(r), genNamed(r))
		}
		n.check("the beginning")
		for range 60 {
			what := n.step(r)
			count[what]++
			n.check(what)
		}
		for _, s := range n.subjects {
			n.sets.RemoveSubject(s.Subject)
		}
		for num := range n.all() {
			n.sets.RemovePeer(num)
		}
		for ref := range maps.Clone(n.policies) {
			n.Delete(ref)
		}
		if x := n.sets; len(x.selections)+len(x.selectionsAt)+len(x.peersAt)+len(x.peers)+len(x.subjects)+len(x.keys) > 0 {
			t.Fatalf("what nobody uses is kept: %+v", x)
		}
	}
	t.Log(count)
	for _, what := range []string{"stale", "current", "policy", "fact", "ports", "peer", "peer again", "peer known better", "peer gone", "subject"} {
		if count[what] < 20 {
			t.Errorf("the generator is lopsided: %s %d", what, count[what])
		}
	}
}

// Only what a change can touch is stale, or gets entries.
func TestSetsTouchLittle(t *testing.T) {
	repo := NewRepository(Options{})
	sets := NewSets(repo)
	policy := func(ns string, peers ...PeerSelector) *Policy {
		return &Policy{Ref: Ref{"Test", ns, "p"}, Specs: []Spec{{Subject: Selector{InNamespace(ns)}, DenyIngress: true,
			Rules: []Rule{{Direction: abi.DirIngress, Action: Allow, AnyPort: true, Peers: peers}}}}}
	}
	subjects := map[string]*Subject{}
	for _, ns := range []string{"a", "b", "c", "d"} {
		subjects[ns] = sets.AddSubject(identity.New("", ns, "", nil))
	}
	use := func() (stale string) {
		for _, ns := range []string{"a", "b", "c", "d"} {
			if s := subjects[ns]; s.Stale() {
				stale += ns
				sets.Use(s, sets.Compile(s))
			}
		}
		return stale
	}
	use()
	check := func(what, want string) {
		t.Helper()
		if got := use(); got != want {
			t.Errorf("%s: %q are stale, want %q", what, got, want)
		}
	}
	repo.Put(policy("a", Selector{InNamespace("b")}))
	check("a policy", "a")
	repo.Put(policy("b", Selector{NamespaceHasLabel("team", "x")}), policy("c", BlockGroup{Name: "g"}))
	check("policies", "bc")
	added := func(n identity.Numeric, p Peer, want string) {
		t.Helper()
		got := ""
		for _, d := range sets.AddPeer(n, p) {
			for _, ns := range []string{"a", "b", "c", "d"} {
				if subjects[ns] == d.Subject {
					got += ns
				}
			}
		}
		if got != want {
			t.Errorf("peer %d is added to %q, want %q", n, got, want)
		}
		check("a peer", "")
	}
	added(300, Peer{Identity: identity.New("", "b", "", nil)}, "a")
	added(301, Peer{Identity: identity.New("", "z", "", nil)}, "")
	added(302, Peer{Identity: identity.Identity{Reserved: "world"}, Block: netip.MustParsePrefix("10.0.0.0/8")}, "")
	repo.SetNamespaceLabels("z", map[string]string{"team": "y"})
	check("a label that nobody asks for", "")
	repo.SetNamespaceLabels("z", map[string]string{"team": "x"})
	check("a label of a peer's namespace", "b")
	repo.SetBlockGroup("other", nil, []netip.Prefix{netip.MustParsePrefix("10.0.0.0/8")})
	check("another group", "")
	repo.SetBlockGroup("g", nil, []netip.Prefix{netip.MustParsePrefix("10.0.0.0/8")})
	check("a group", "c")
	repo.SetBlockGroup("g", nil, []netip.Prefix{netip.MustParsePrefix("10.0.0.0/8"), netip.MustParsePrefix("192.0.2.0/24")})
	check("a group's block in which nobody is seen", "")
	repo.Delete(Ref{"Test", "a", "p"})
	check("a policy less", "a")
}

// Use says that a set is stale that something has overtaken.
func TestUseOfTheOvertaken(t *testing.T) {
	repo := NewRepository(Options{})
	sets := NewSets(repo)
	s := sets.AddSubject(identity.New("", "a", "", nil))
	set := sets.Compile(s)
	sets.AddPeer(300, Peer{Identity: identity.New("", "b", "", nil)})
	if sets.Use(s, set); !s.Stale() {
		t.Error("the set that does not know the peer is current")
	}
	if sets.Use(s, sets.Compile(s)); s.Stale() {
		t.Error("the new one is not")
	}
}

// Peers whom the same rules pick share their entries.
func TestShapesAreShared(t *testing.T) {
	repo := NewRepository(Options{})
	if err := repo.Put(&Policy{Ref: Ref{"Test", "a", "p"}, Specs: []Spec{{DenyIngress: true, Rules: []Rule{
		{Direction: abi.DirIngress, Action: Allow, Peers: []PeerSelector{Selector{}}, Ports: []PortRange{{Proto: ProtoTCP, First: 1, Last: 65534}}}}}}}); err != nil {
		t.Fatal(err)
	}
	set := repo.Compile(identity.New("", "a", "", nil), func(yield func(identity.Numeric, Peer) bool) {
		for i := range 100 {
			yield(identity.Numeric(300+i), Peer{Identity: identity.New("", "b", fmt.Sprint(i), nil)})
		}
	})
	if len(set.shapes) != 1 || set.Len() != 101*30 {
		t.Errorf("%d shapes, %d entries", len(set.shapes), set.Len())
	}
}
