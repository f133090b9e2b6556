package authz

import (
	"testing"

	"portcullis/bpf/abi"
	"portcullis/identity"
)

// What each operator says of a label that has the value, another, or is not
// there; of the labels of a namespace also when nobody has spoken of it.
func TestOperators(t *testing.T) {
	ns := &facts{namespaces: map[string]map[string]string{"yes": {"team": "red"}, "other": {"team": "blue"}, "none": {}}}
	for _, c := range []struct {
		operator Operator
		values   []string
		want     [3]bool // it is red, blue, not there
	}{
		{In, []string{"green", "red"}, [3]bool{true, false, false}},
		{NotIn, []string{"green", "red"}, [3]bool{false, true, true}},
		{Exists, nil, [3]bool{true, true, false}},
		{DoesNotExist, nil, [3]bool{false, false, true}},
	} {
		pod := Selector{{PodLabel, "team", c.operator, c.values}}
		space := Selector{{NamespaceLabel, "team", c.operator, c.values}}
		for i, labels := range []map[string]string{{"team": "red"}, {"team": "blue"}, {"x": "red"}} {
			id := identity.New("", []string{"yes", "other", "none"}[i], "", labels)
			if got := pod.selectsWorkload(id, ns, false); got != c.want[i] {
				t.Errorf("%+v, pod %v: %v", pod, labels, got)
			}
			for _, doubt := range []bool{false, true} {
				if got := space.selectsWorkload(id, ns, doubt); got != c.want[i] {
					t.Errorf("%+v, namespace %s: %v", space, id.Namespace, got)
				}
			}
		}
		for _, doubt := range []bool{false, true} {
			if got := space.selectsWorkload(identity.New("", "unheard-of", "", nil), ns, doubt); got != doubt {
				t.Errorf("%+v of an unknown namespace, in doubt %v: %v", space, doubt, got)
			}
		}
		if world := (identity.Identity{Reserved: "world"}); pod.selectsWorkload(world, ns, true) || space.selectsWorkload(world, ns, true) {
			t.Errorf("%+v selects world", pod)
		}
	}
	for _, s := range []string{"In", "NotIn", "Exists", "DoesNotExist"} {
		if op, ok := ParseOperator(s); !ok || op.TakesValues() != (s == "In" || s == "NotIn") {
			t.Errorf("%s: %d, %v", s, op, ok)
		}
	}
	if _, ok := ParseOperator("Equals"); ok {
		t.Error("Equals is an operator")
	}
}

// Labels of a namespace that nobody has spoken of never let a packet pass,
// whichever way a policy asks for them.
func TestUnknownNamespaceIsNotEmpty(t *testing.T) {
	not := Selector{{NamespaceLabel, "team", NotIn, []string{"red"}}}
	peer, star := identity.New("", "b", "", nil), identity.New("", "a", "", nil)
	for name, c := range map[string]struct {
		spec          Spec
		unknown, none bool // whether the peer passes, by what is known of a and b
	}{
		"allowed": {Spec{DenyIngress: true, Rules: []Rule{{Direction: abi.DirIngress, Action: Allow, AnyPort: true, Peers: []PeerSelector{not}}}}, false, true},
		"denied": {Spec{Rules: []Rule{{Direction: abi.DirIngress, Action: Deny, AnyPort: true,
			Peers: []PeerSelector{Selector{{NamespaceLabel, "team", In, []string{"red"}}}}}}}, false, true},
		"subject, denied":  {Spec{Subject: not, DenyIngress: true}, false, false},
		"subject, allowed": {Spec{Subject: not, DenyIngress: true, Rules: []Rule{{Direction: abi.DirIngress, Action: Allow, AnyPort: true, AnyPeer: true}}}, false, true},
	} {
		r := NewRepository(Options{})
		if err := r.Put(&Policy{Ref: Ref{"Test", "a", "p"}, Specs: []Spec{c.spec}}); err != nil {
			t.Fatal(err)
		}
		for _, known := range []bool{false, true} {
			want := c.unknown
			if known {
				want = c.none
				r.SetNamespaceLabels("a", map[string]string{})
				r.SetNamespaceLabels("b", map[string]string{})
			}
			set := r.Compile(star, only(300, peer))
			if d := set.Judge(abi.DirIngress, 300, ProtoTCP, 80); (d.Verdict == abi.VerdictPass) != want {
				t.Errorf("%s, labels known %v: %+v, want pass %v", name, known, d, want)
			}
		}
	}
}
