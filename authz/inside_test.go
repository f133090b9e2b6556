package authz

import (
	"encoding/json"
	"math/rand/v2"
	"slices"
	"strings"
	"testing"

	"portcullis/authz/l7"
	"portcullis/bpf/abi"
	"portcullis/identity"
)

// goes judges, from the rules alone, whether a method may be used where the
// packet passes.
func (o oracle) goes(subject identity.Identity, dir abi.Direction, peer Peer, called []identity.NamedPort, proto uint8, port uint16, method string) bool {
	if dir == abi.DirIngress {
		called = o.own
	}
	rules, enforced, byDefault := o.speak(subject, dir, peer, called, proto, port)
	if !enforced {
		return true
	}
	allows := func(r *l7.Rules) bool {
		return slices.ContainsFunc(r.HTTP, func(h l7.HTTP) bool { return h.Method == method || h.Expr != nil && h.Expr.Method == method })
	}
	let, looked, limited, within := false, false, false, false
	for _, r := range rules {
		switch {
		case r.Action == Deny:
		case r.limit != no:
			limited = limited || r.L7 != nil
			within = within || r.limit == yes && (r.L7 == nil || allows(r.L7))
		case r.L7 != nil:
			looked = looked || r.this != no
			let = let || r.this == yes && allows(r.L7)
		default:
			let = let || r.this == yes
		}
	}
	return (let || byDefault && !looked) && (!limited || within)
}

// What is said of the inside of protocols is what the rules say, also of peers
// that come later, and after a journey as JSON.
func TestInsideSaysWhatTheRulesSay(t *testing.T) {
	const seed, worlds = 11, 600
	r := rand.New(rand.NewPCG(seed, 0))
	n := map[string]int{}
	for range worlds {
		w := genWorld(r)
		subject, own := genIdentity(r), genNamed(r)
		o := w.oracle(subject, own)
		set := w.Compile(subject, w.all(), own...)
		data, err := json.Marshal(set.Inside())
		if err != nil {
			t.Fatal(err)
		}
		in, late := new(Inside), new(Inside)
		for _, x := range []*Inside{in, late} {
			if err := json.Unmarshal(data, x); err != nil {
				t.Fatal(err)
			}
		}
		late.Peers, late.Shapes, late.Hosts = nil, nil, nil
		for _, x := range []*Inside{in, late} {
			if err := x.Ready(); err != nil {
				t.Fatal(err)
			}
		}
		if set.LocalHost {
			late.Hosts = append(late.Hosts, identity.NumHost)
		}
		for num := range w.all() {
			of, host := set.InsideOf(num)
			if err := late.Put(num, of, host); err != nil {
				t.Fatal(err)
			}
		}
		for num, peer := range w.all() {
			named := w.namedPorts(peer.Identity)
			for range 8 {
				dir, proto, port := abi.Direction(r.IntN(2)), oneOf(r, genProtos), oneOf(r, genPorts)
				d := set.Judge(dir, num, proto, port)
				if d.Verdict != abi.VerdictPass {
					if got, _ := in.Judge(dir, num, proto, port); got.Everything || got.Rules != nil {
						t.Fatalf("%+v is let inside where no packet passes", got)
					}
					continue
				}
				n["passed"]++
				free := o.localHost && dir == abi.DirIngress && peer.Identity.Reserved == "host"
				for _, m := range genMethods {
					want := free || o.goes(subject, dir, peer, named, proto, port, m)
					for _, x := range []*Inside{in, late} {
						got, again := x.Judge(dir, num, proto, port)
						allowed := got.Everything || l7.JudgeHTTP(got.Rules, &l7.Request{Method: m, Target: "/", Host: "x"}).Allowed
						if allowed != want || !free && again != d {
							t.Fatalf("subject %s, %s, peer %+v, %d/%d: %s: %v, rules say %v (%+v, %+v, %+v)\n%+v", subject, dir, peer, proto, port, m, allowed, want, got, again, d, w.List())
						}
						n["let in"] += b2i(allowed)
						n["kept out"] += b2i(!allowed)
						n["as far as rules go"] += b2i(!got.Everything)
					}
				}
			}
		}
	}
	t.Log(n)
	for what, least := range map[string]int{"passed": 2000, "let in": 5000, "kept out": 200, "as far as rules go": 400} {
		if n[what] < least {
			t.Errorf("the generator is lopsided: %s %d, want %d", what, n[what], least)
		}
	}
}

// Sets differ where only what is inside a protocol does.
func TestSetsDifferInside(t *testing.T) {
	rule := func(methods ...string) *Policy {
		in := &l7.Rules{Parser: l7.ParserHTTP}
		for _, m := range methods {
			in.HTTP = append(in.HTTP, l7.HTTP{Method: m})
		}
		return &Policy{Ref: Ref{Kind: "Test", Name: "a"}, Specs: []Spec{{DenyIngress: true, Rules: []Rule{
			{Direction: abi.DirIngress, Action: Allow, AnyPeer: true, Ports: []PortRange{Port(ProtoTCP, 80)}, L7: in}}}}}
	}
	compile := func(p *Policy) Set {
		repo := NewRepository(Options{})
		if err := repo.Put(p); err != nil {
			t.Fatal(err)
		}
		return repo.Compile(identity.New("td", "ns", "sa", nil), func(func(identity.Numeric, Peer) bool) {})
	}
	get := compile(rule("GET"))
	if !get.Equal(compile(rule("GET"))) {
		t.Error("equal sets differ")
	}
	for _, o := range []*Policy{rule("PUT"), rule(), rule("GET", "PUT")} {
		if get.Equal(compile(o)) {
			t.Errorf("%+v is equal", o)
		}
	}
	if (Set{}).LooksInside() || !get.LooksInside() {
		t.Error("LooksInside")
	}
}

// A table that says what cannot be judged is refused.
func TestInsideIsChecked(t *testing.T) {
	allow := abi.Policy{Flags: uint8(abi.PolicyAllow | abi.PolicyL7)}
	for name, x := range map[string]*Inside{
		"nothing for a rule": {Rules: map[uint32]*l7.Rules{1: nil}},
		"a bad expression":   {Rules: map[uint32]*l7.Rules{1: {Parser: l7.ParserHTTP, HTTP: []l7.HTTP{{Method: "("}}}}},
		"no parser":          {Rules: map[uint32]*l7.Rules{1: {}}},
		"no such shape":      {Peers: map[identity.Numeric]int{5: 0}},
		"no such rule":       {Any: []Within{{Entry: allow, Rules: []uint32{7}}}},
		"no such limit":      {Shapes: [][]Within{{{Entry: allow, Whole: true, Limited: true, Limits: []uint32{7}}}}},
	} {
		if err := x.Ready(); err == nil {
			t.Errorf("%s is taken", name)
		}
	}
}

// What a rule lets in is let in as far as the limits go, too.
func TestInsideLimits(t *testing.T) {
	methods := func(tree bool, names ...string) *l7.Rules {
		out := &l7.Rules{Parser: l7.ParserHTTP}
		for _, m := range names {
			if tree {
				out.HTTP = append(out.HTTP, l7.HTTP{Expr: &l7.Expr{Method: m}})
			} else {
				out.HTTP = append(out.HTTP, l7.HTTP{Method: m})
			}
		}
		return out
	}
	rule := func(action Action, in *l7.Rules) Rule {
		return Rule{Direction: abi.DirIngress, Action: action, AnyPeer: true, Ports: []PortRange{Port(ProtoTCP, 80)}, L7: in}
	}
	some, limit := rule(Allow, methods(false, "GET", "PUT")), rule(Limit, methods(true, "PUT", "POST"))
	for want, rules := range map[string][]Rule{
		"GET PUT":           {some},
		"PUT":               {some, limit},
		"PUT POST":          {rule(Allow, nil), limit},
		"GET PUT POST HEAD": {rule(Allow, nil), some, limit, rule(Limit, nil)},
		"GET PUT POST":      {some, limit, rule(Allow, methods(false, "POST", "GET")), rule(Limit, methods(true, "GET"))},
		"":                  {some, rule(Limit, methods(true))},
	} {
		repo := NewRepository(Options{})
		if err := repo.Put(&Policy{Ref: Ref{Kind: "Test", Name: "a"}, Specs: []Spec{{DenyIngress: true, Rules: rules}}}); err != nil {
			t.Fatal(err)
		}
		in := repo.Compile(identity.New("td", "ns", "sa", nil), func(func(identity.Numeric, Peer) bool) {}).Inside()
		if err := in.Ready(); err != nil {
			t.Fatal(err)
		}
		allowed, _ := in.Judge(abi.DirIngress, identity.NumHost, ProtoTCP, 80)
		var got []string
		for _, m := range genMethods {
			if allowed.Everything || l7.JudgeHTTP(allowed.Rules, &l7.Request{Method: m, Target: "/", Host: "x"}).Allowed {
				got = append(got, m)
			}
		}
		if strings.Join(got, " ") != want {
			t.Errorf("%+v: %v, want %s", rules, got, want)
		}
	}
}
