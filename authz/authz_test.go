package authz

import (
	"maps"
	"testing"

	"portcullis/bpf/abi"
	"portcullis/identity"
)

func only(n identity.Numeric, id identity.Identity) func(func(identity.Numeric, Peer) bool) {
	return func(yield func(identity.Numeric, Peer) bool) { yield(n, Peer{Identity: id}) }
}

func key(n int, id uint32, proto uint8, port uint16) abi.PolicyKey {
	return abi.PolicyKey{Prefixlen: uint32(n), Identity: id, Direction: uint8(abi.DirIngress), Proto: proto,
		Port: [2]uint8{uint8(port >> 8), uint8(port)}}
}

// The entries that a small policy comes to, and the folding of flags.
func TestCompileGolden(t *testing.T) {
	ship := identity.New("td", "default", "default", map[string]string{"org": "empire"})
	star := identity.New("td", "default", "default", map[string]string{"class": "deathstar"})
	r := NewRepository(Options{TrustDomain: "td"})
	p := &Policy{
		Ref: Ref{"CiliumNetworkPolicy", "default", "rule1"}, Specs: []Spec{{Subject: Selector{Label("class", "deathstar")}, DenyIngress: true,
			Rules: []Rule{
				{Direction: abi.DirIngress, Action: Allow, Peers: []PeerSelector{Selector{Label("org", "empire")}}, Ports: []PortRange{AllPorts(ProtoTCP)}, Path: "spec.ingress[0]"},
				{Direction: abi.DirIngress, Action: Deny, AnyPeer: true, Ports: []PortRange{{Proto: ProtoTCP, First: 22, Last: 23}}, Path: "spec.ingressDeny[0]"},
				{Direction: abi.DirIngress, Action: Allow, AnyPeer: true, AnyPort: true, Path: "spec.ingress[1]"},
			},
		}}}
	if err := r.Put(p); err != nil {
		t.Fatal(err)
	}
	const allow, deny, some = uint8(abi.PolicyAllow), uint8(abi.PolicyDeny), uint8(abi.PolicyPeerAllow)
	anyone := uint32(abi.IDAny)
	got := r.Compile(star, only(300, ship))
	want := map[abi.PolicyKey]abi.Policy{
		key(72, anyone, 0, 0):         {Flags: allow, Rule: 3},
		key(80, anyone, ProtoTCP, 0):  {Flags: allow | some, Rule: 3},
		key(95, anyone, ProtoTCP, 22): {Flags: allow | some | deny, Rule: 2},
		key(80, 300, ProtoTCP, 0):     {Flags: allow, Rule: 1},
	}
	if !maps.Equal(got.WithSet(0), want) {
		t.Errorf("entries %+v\nwant %+v", got.WithSet(0), want)
	}
	if !got.EnforceIngress || got.EnforceEgress {
		t.Errorf("enforced: ingress %v, egress %v", got.EnforceIngress, got.EnforceEgress)
	}
	if len(got.Rules) != 4 || got.Rules[0] != (RuleRef{}) || got.Rules[2] != (RuleRef{p.Ref, "spec.ingressDeny[0]", abi.DirIngress, Deny}) {
		t.Errorf("rules %+v", got.Rules)
	}
	for k := range got.WithSet(7) {
		if k.Set != 7 {
			t.Errorf("WithSet: %+v", k)
		}
	}
	if s := r.Compile(ship, only(300, ship)); s.EnforceIngress || len(s.WithSet(0)) != 0 {
		t.Errorf("a subject that no policy selects: %+v", s)
	}
}

// A set goes on meaning what it meant, whatever the repository learns later.
func TestSetIsASnapshot(t *testing.T) {
	star := identity.New("", "b", "", nil)
	peer := identity.New("", "a", "", nil)
	policy := func(team string) *Policy {
		return &Policy{Ref: Ref{"Test", "b", "p"}, Specs: []Spec{{DenyIngress: true, Rules: []Rule{{
			Direction: abi.DirIngress, Action: Allow, AnyPort: true, Peers: []PeerSelector{Selector{NamespaceHasLabel("team", team)}}}}}}}
	}
	r := NewRepository(Options{})
	r.Put(policy("red"))
	r.SetNamespaceLabels("a", map[string]string{"team": "red"})
	old := r.Compile(star, only(300, star))
	r.Put(policy("blue"))
	r.SetNamespaceLabels("a", map[string]string{"team": "green"})
	if got := old.AddPeer(301, Peer{Identity: peer}); len(got) != 1 {
		t.Errorf("the old set no longer knows the peer: %v", got)
	}
	again := r.Compile(star, only(300, star))
	if got := again.AddPeer(301, Peer{Identity: peer}); len(got) != 0 {
		t.Errorf("the new one does: %v", got)
	}
	if again.Equal(old) {
		t.Error("sets with different entries are equal")
	}
}

func TestRepository(t *testing.T) {
	r := NewRepository(Options{})
	a := &Policy{Ref: Ref{"K", "ns", "a"}}
	b := &Policy{Ref: Ref{"K", "ns", "b"}, Specs: []Spec{{Rules: []Rule{{Direction: abi.DirIngress, Ports: []PortRange{{Proto: ProtoTCP, First: 2, Last: 1}}}}}}}
	if err := r.Put(a, b); err == nil || len(r.List()) != 0 {
		t.Errorf("an invalid policy: %v, %d put", err, len(r.List()))
	}
	b.Specs = nil
	if err := r.Put(b, a); err != nil {
		t.Error(err)
	}
	if l := r.List(); len(l) != 2 || l[0] != a || l[1] != b || r.Get(a.Ref) != a {
		t.Errorf("List() = %v", l)
	}
	newer := &Policy{Ref: a.Ref, UID: "2"}
	r.Put(newer)
	if r.Get(a.Ref) != newer || len(r.List()) != 2 {
		t.Error("a newer version does not replace the old")
	}
	if !r.Delete(a.Ref) || r.Delete(a.Ref) || r.Get(a.Ref) != nil {
		t.Error("Delete")
	}
	team := map[string]string{"team": "red"}
	if !r.SetNamespaceLabels("x", team) || r.SetNamespaceLabels("x", team) {
		t.Error("SetNamespaceLabels reports no change, or one where there is none")
	}
	if r.SetNamespaceLabels("x", map[string]string{"team": "red", nameLabel: "x"}) {
		t.Error("the name label counts as a change")
	}
	if !r.SetNamespaceLabels("x", nil) || r.SetNamespaceLabels("y", nil) {
		t.Error("SetNamespaceLabels(nil)")
	}
	if !r.SetNamespaceLabels("y", map[string]string{}) || r.SetNamespaceLabels("y", map[string]string{}) {
		t.Error("that there are no labels is news once")
	}
}

func TestValidate(t *testing.T) {
	ref := Ref{"K", "ns", "n"}
	for name, p := range map[string]*Policy{
		"no name":          {Ref: Ref{Kind: "K"}},
		"operator":         {Ref: ref, Specs: []Spec{{Subject: Selector{{Attribute: PodLabel, Key: "a"}}}}},
		"operator 5":       {Ref: ref, Specs: []Spec{{Subject: Selector{{Attribute: PodLabel, Key: "a", Operator: 5}}}}},
		"In nothing":       {Ref: ref, Specs: []Spec{{Subject: Selector{{Attribute: PodLabel, Key: "a", Operator: In}}}}},
		"NotIn nothing":    {Ref: ref, Specs: []Spec{{Subject: Selector{{Attribute: PodLabel, Key: "a", Operator: NotIn}}}}},
		"values unsorted":  {Ref: ref, Specs: []Spec{{Subject: Selector{{Attribute: PodLabel, Key: "a", Operator: In, Values: []string{"c", "b"}}}}}},
		"a value twice":    {Ref: ref, Specs: []Spec{{Subject: Selector{{Attribute: PodLabel, Key: "a", Operator: In, Values: []string{"b", "b"}}}}}},
		"Exists a value":   {Ref: ref, Specs: []Spec{{Subject: Selector{{Attribute: PodLabel, Key: "a", Operator: Exists, Values: []string{"b"}}}}}},
		"name and number":  {Ref: ref, Specs: []Spec{{Rules: []Rule{{Ports: []PortRange{{Proto: ProtoTCP, Last: 80, Name: "http"}}}}}}},
		"named ICMP":       {Ref: ref, Specs: []Spec{{Rules: []Rule{{Ports: []PortRange{PortNamed(ProtoICMP, "echo")}}}}}},
		"attribute":        {Ref: ref, Specs: []Spec{{Subject: Selector{{Operator: Exists}}}}},
		"direction":        {Ref: ref, Specs: []Spec{{Rules: []Rule{{Direction: abi.DirMax}}}}},
		"action":           {Ref: ref, Specs: []Spec{{Rules: []Rule{{Action: 2}}}}},
		"every and some":   {Ref: ref, Specs: []Spec{{Rules: []Rule{{AnyPeer: true, Peers: []PeerSelector{Selector{}}}}}}},
		"every port, some": {Ref: ref, Specs: []Spec{{Rules: []Rule{{AnyPort: true, Ports: []PortRange{}}}}}},
		"peer":             {Ref: ref, Specs: []Spec{{Rules: []Rule{{Peers: []PeerSelector{Selector{{Operator: Exists}}}}}}}},
	} {
		if p.Validate() == nil {
			t.Errorf("%s: accepted", name)
		}
	}
}

// prefixes covers exactly the range, without overlap, in few steps.
func TestPrefixes(t *testing.T) {
	for _, c := range [][3]int{{0, 65535, 1}, {0, 0, 1}, {65535, 65535, 1}, {80, 80, 1}, {1, 65534, 30}, {4096, 8191, 1}, {1, 2, 2}, {0, 65534, 16}} {
		covered, count := map[uint16]bool{}, 0
		for port, bits := range prefixes(uint16(c[0]), uint16(c[1])) {
			count++
			for p := int(port); p < int(port)+1<<(16-bits); p++ {
				if covered[uint16(p)] {
					t.Fatalf("%v: %d twice", c, p)
				}
				covered[uint16(p)] = true
			}
		}
		if len(covered) != c[1]-c[0]+1 || !covered[uint16(c[0])] || !covered[uint16(c[1])] || count != c[2] {
			t.Errorf("%v: %d ports in %d prefixes", c, len(covered), count)
		}
	}
}

// Nothing in force, nothing to say; a missing entry under policy drops.
func TestJudgeEdges(t *testing.T) {
	none := func(abi.PolicyKey) (abi.Policy, bool) { return abi.Policy{}, false }
	if d := Judge(none, false, abi.DirIngress, NoPeer, ProtoTCP, 80); d != (Decision{Verdict: abi.VerdictPass}) {
		t.Errorf("not enforced: %+v", d)
	}
	if d := Judge(none, true, abi.DirIngress, NoPeer, ProtoTCP, 80); d != (Decision{}) {
		t.Errorf("no entry: %+v", d)
	}
	some := func(k abi.PolicyKey) (abi.Policy, bool) {
		if k.Identity == uint32(abi.IDAny) {
			return abi.Policy{Flags: uint8(abi.PolicyPeerAllow)}, true
		}
		return abi.Policy{Flags: uint8(abi.PolicyAllow), Evidence: uint8(abi.EvidenceSvid), Rule: 4}, k.Identity == 300
	}
	if d := Judge(some, true, abi.DirIngress, 300, ProtoTCP, 80); d != (Decision{Verdict: abi.VerdictPass, NeedsEvidence: true, LeastEvidence: identity.EvidenceSVID, Rule: 4}) {
		t.Errorf("a peer with its own evidence: %+v", d)
	}
	svid := func(abi.PolicyKey) (abi.Policy, bool) {
		return abi.Policy{Flags: uint8(abi.PolicyAllow), Evidence: uint8(abi.EvidenceSvid), Rule: 5}, true
	}
	if d := Judge(svid, true, abi.DirIngress, NoPeer, ProtoTCP, 80); d != (Decision{Verdict: abi.VerdictHold, NeedsEvidence: true, Rule: 5}) {
		t.Errorf("everybody, but proved: %+v", d)
	}
}
