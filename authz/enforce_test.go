package authz

import (
	"encoding/json"
	"testing"

	"portcullis/bpf/abi"
	"portcullis/identity"
)

// What each kind of enforcement makes of a subject under a policy, under a
// policy of denials only, and under none.
func TestEnforcement(t *testing.T) {
	allowed := &Policy{Ref: Ref{"Test", "a", "allowed"}, Specs: []Spec{{Subject: Selector{Label("app", "allowed")}, DenyIngress: true, Rules: []Rule{
		{Direction: abi.DirIngress, Action: Allow, AnyPeer: true, Ports: []PortRange{Port(ProtoTCP, 80)}}}}}}
	denied := &Policy{Ref: Ref{"Test", "a", "denied"}, Specs: []Spec{{Subject: Selector{Label("app", "denied")}, Rules: []Rule{
		{Direction: abi.DirIngress, Action: Deny, AnyPeer: true, Ports: []PortRange{Port(ProtoTCP, 80)}}}}}}
	for _, c := range []struct {
		mode                string
		app                 string
		port80, port81, out bool // what the set says of ingress to TCP 80 and 81, and of egress
		audit               bool
	}{
		{"default", "allowed", true, false, true, false},
		{"default", "denied", false, true, true, false},
		{"default", "free", true, true, true, false},
		{"always", "allowed", true, false, false, false},
		{"always", "denied", false, false, false, false},
		{"always", "free", false, false, false, false},
		{"never", "allowed", true, true, true, false},
		{"never", "denied", true, true, true, false},
		{"never", "free", true, true, true, false},
		{"audit", "allowed", true, false, true, true},
		{"audit", "denied", false, true, true, true},
		{"audit", "free", true, true, true, true},
	} {
		mode, err := ParseEnforcement(c.mode)
		if err != nil || mode.String() != c.mode {
			t.Fatalf("%s: %v, %v", c.mode, mode, err)
		}
		// The same, said of everybody and of the namespace only.
		for _, opts := range []Options{{Enforce: mode}, {Enforce: (mode + 1) % 4, EnforceIn: map[string]Enforcement{"a": mode}}} {
			r := NewRepository(opts)
			if err := r.Put(allowed, denied); err != nil {
				t.Fatal(err)
			}
			s := r.Compile(identity.New("", "a", "", map[string]string{"app": c.app}), only(300, identity.New("", "a", "", nil)))
			pass := func(dir abi.Direction, port uint16) bool {
				return s.Judge(dir, 300, ProtoTCP, port).Verdict == abi.VerdictPass
			}
			if pass(abi.DirIngress, 80) != c.port80 || pass(abi.DirIngress, 81) != c.port81 || pass(abi.DirEgress, 80) != c.out || s.Audit != c.audit {
				t.Errorf("%+v, %s: ingress 80 %v, 81 %v, egress %v, audit %v", c, opts.Enforce, pass(abi.DirIngress, 80), pass(abi.DirIngress, 81), pass(abi.DirEgress, 80), s.Audit)
			}
			if mode == EnforceNever && (len(s.WithSet(0)) > 0 || len(s.AddPeer(301, Peer{Identity: identity.New("", "b", "", nil)})) > 0) {
				t.Errorf("never: %v", s.WithSet(0))
			}
			if audit := s; mode == EnforceAudit {
				audit.Audit = false
				if s.Equal(audit) {
					t.Error("audit makes no difference to Equal")
				}
			}
		}
	}
	var e Enforcement
	if err := json.Unmarshal([]byte(`"audit"`), &e); err != nil || e != EnforceAudit {
		t.Error(e, err)
	}
	if b, err := json.Marshal(EnforceAlways); err != nil || string(b) != `"always"` {
		t.Error(string(b), err)
	}
	if _, err := ParseEnforcement("Always"); err == nil {
		t.Error("Always is accepted")
	}
}
