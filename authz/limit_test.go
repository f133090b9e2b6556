package authz

import (
	"testing"

	"portcullis/authz/l7"
	"portcullis/bpf/abi"
	"portcullis/identity"
)

func limitPolicy(name string, subject Selector, rules ...Rule) *Policy {
	return &Policy{Ref: Ref{Kind: "Test", Name: name}, Specs: []Spec{{Subject: subject, Rules: rules}}}
}

// Limits form a union, touch nothing but TCP and UDP, and allow nothing.
func TestLimit(t *testing.T) {
	limit := func(ports ...PortRange) Rule {
		return Rule{Direction: abi.DirIngress, Action: Limit, AnyPeer: true, Ports: ports, Path: "l4"}
	}
	inside := limit(Port(ProtoTCP, 8080))
	inside.L7 = &l7.Rules{Parser: l7.ParserHTTP}
	a := Selector{Label("app", "a")}
	fromB := Rule{Direction: abi.DirIngress, Action: Allow, Peers: []PeerSelector{Selector{Label("app", "b")}}, AnyPort: true}
	underPolicy := limitPolicy("allow", a, fromB)
	underPolicy.Specs[0].DenyIngress = true
	const b, c = identity.Numeric(1 << 20), identity.Numeric(1<<20 + 1)
	type want struct {
		peer  identity.Numeric
		proto uint8
		port  uint16
		is    byte
	}
	for name, test := range map[string]struct {
		policies []*Policy
		want     []want
	}{
		"alone": {[]*Policy{limitPolicy("limit", a, limit(Port(ProtoTCP, 80)))}, []want{
			{b, ProtoTCP, 80, '.'}, {c, ProtoTCP, 80, '.'}, {b, ProtoTCP, 79, 'X'}, {b, ProtoTCP, 0, 'X'}, {b, ProtoTCP, 65535, 'X'}, {b, ProtoUDP, 80, 'X'},
			{b, ProtoICMP, 8 << 8, '.'}, {b, ProtoSCTP, 81, '.'}}},
		"union": {[]*Policy{limitPolicy("limit", a, limit(Port(ProtoTCP, 80), PortRange{Proto: ProtoUDP, Last: 99})), limitPolicy("other", nil, limit(PortRange{Proto: ProtoTCP, First: 80, Last: 90}, Port(ProtoUDP, 65535)))}, []want{
			{b, ProtoTCP, 80, '.'}, {b, ProtoTCP, 90, '.'}, {b, ProtoTCP, 91, 'X'}, {b, ProtoUDP, 0, '.'}, {b, ProtoUDP, 100, 'X'}, {b, ProtoUDP, 65535, '.'}, {b, ProtoUDP, 65534, 'X'}}},
		"with allow": {[]*Policy{underPolicy, limitPolicy("limit", a, limit(Port(ProtoTCP, 80)))}, []want{
			{b, ProtoTCP, 80, '.'}, {c, ProtoTCP, 80, 'X'}, {b, ProtoTCP, 81, 'X'}, {b, ProtoICMP, 8 << 8, '.'}, {c, ProtoICMP, 8 << 8, 'X'}, {b, ProtoSCTP, 1, '.'}}},
		"nothing":    {[]*Policy{limitPolicy("limit", a, limit())}, []want{{b, ProtoTCP, 80, 'X'}, {b, ProtoUDP, 53, 'X'}, {b, ProtoICMP, 8 << 8, '.'}}},
		"everything": {[]*Policy{limitPolicy("limit", a, limit(AllPorts(ProtoTCP), AllPorts(ProtoUDP)))}, []want{{b, ProtoTCP, 80, '.'}, {b, ProtoUDP, 53, '.'}}},
		"through L7": {[]*Policy{underPolicy, limitPolicy("limit", a, inside, limit(Port(ProtoTCP, 80)))}, []want{
			{b, ProtoTCP, 8080, '7'}, {c, ProtoTCP, 8080, 'X'}, {b, ProtoTCP, 80, '.'}, {b, ProtoTCP, 81, 'X'}}},
		"through L7 alone": {[]*Policy{limitPolicy("limit", a, inside)}, []want{{b, ProtoTCP, 8080, '7'}, {c, ProtoTCP, 8080, '7'}, {b, ProtoTCP, 80, 'X'}, {b, ProtoICMP, 8 << 8, '.'}}},
		"of others":        {[]*Policy{limitPolicy("limit", Selector{Label("app", "c")}, limit(Port(ProtoTCP, 80)))}, []want{{b, ProtoTCP, 81, '.'}}},
		"unsure": {[]*Policy{limitPolicy("limit", Selector{NamespaceHasLabel("team", "x")}, limit(Port(ProtoTCP, 80), Port(ProtoTCP, 81))), limitPolicy("other", Selector{NamespaceHasLabel("team", "y")}, limit(Port(ProtoTCP, 81)))}, []want{
			{b, ProtoTCP, 80, 'X'}, {b, ProtoTCP, 81, '.'}, {b, ProtoTCP, 82, 'X'}}},
		"sure beside unsure": {[]*Policy{limitPolicy("limit", a, limit(Port(ProtoTCP, 80))), limitPolicy("other", Selector{NamespaceHasLabel("team", "y")}, limit(Port(ProtoTCP, 81)))}, []want{
			{b, ProtoTCP, 80, '.'}, {b, ProtoTCP, 81, 'X'}}},
	} {
		repo := NewRepository(Options{TrustDomain: "td"})
		if err := repo.Put(test.policies...); err != nil {
			t.Fatal(err)
		}
		set := repo.Compile(identity.New("td", "ns", "sa", map[string]string{"app": "a"}), func(yield func(identity.Numeric, Peer) bool) {
			_ = yield(b, Peer{Identity: identity.New("td", "ns", "sa", map[string]string{"app": "b"})}) &&
				yield(c, Peer{Identity: identity.New("td", "ns", "sa", map[string]string{"app": "c"})})
		})
		for _, w := range test.want {
			d := set.Judge(abi.DirIngress, w.peer, w.proto, w.port)
			got := byte('X')
			if d.Verdict == abi.VerdictPass {
				if got = '.'; d.L7 {
					got = '7'
				}
			}
			if got != w.is {
				t.Errorf("%s: peer %d, %d/%d: %q, want %q (%+v)", name, w.peer-b, w.proto, w.port, got, w.is, d)
			}
			if got == 'X' && set.Rules[d.Rule].Action == Allow && d.Rule != 0 {
				t.Errorf("%s: peer %d, %d/%d: denied by %+v", name, w.peer-b, w.proto, w.port, set.Rules[d.Rule])
			}
		}
	}
}

func TestLimitsAreChecked(t *testing.T) {
	for _, r := range []Rule{
		{Action: Limit}, {Action: Limit, AnyPeer: true, AnyPort: true}, {Action: Limit, AnyPeer: true, Evidence: identity.EvidenceLease},
		{Action: Limit, AnyPeer: true, Ports: []PortRange{AllPorts(ProtoSCTP)}}, {Action: Limit, AnyPeer: true, Ports: []PortRange{PortNamed(ProtoTCP, "http")}},
		{Action: Limit, Peers: []PeerSelector{Selector{}}}, {Action: Limit + 1, AnyPeer: true}, {Action: Deny, Peers: []PeerSelector{AllBut{}}},
	} {
		if err := limitPolicy("x", nil, r).Validate(); err == nil {
			t.Errorf("%+v is taken", r)
		}
	}
}

// All but those of whom it is known: who may be meant is not left out of a
// denial, nor let in.
func TestAllBut(t *testing.T) {
	f := &facts{trustDomain: "td", namespaces: map[string]map[string]string{"known": {"team": "x"}, "other": {"team": "y"}}}
	s := AllBut{Selector{NamespaceHasLabel("team", "x")}}
	for _, c := range []struct {
		id          identity.Identity
		sure, maybe bool
	}{
		{identity.New("td", "known", "sa", nil), false, false},
		{identity.New("td", "other", "sa", nil), true, true},
		{identity.New("td", "unknown", "sa", nil), false, true},
		{identity.New("elsewhere", "known", "sa", nil), true, true},
		{identity.Identity{Reserved: "world"}, true, true},
	} {
		p := Peer{Identity: c.id}
		if sure, maybe := s.selects(p, f, false), s.selects(p, f, true); sure != c.sure || maybe != c.maybe {
			t.Errorf("%s: %v, %v", c.id, sure, maybe)
		}
	}
}
