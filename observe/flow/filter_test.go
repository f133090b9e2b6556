package flow

import (
	"net/netip"
	"slices"
	"testing"

	"portcullis/bpf/abi"
)

func prefixes(t *testing.T, ss ...string) (out []netip.Prefix) {
	t.Helper()
	for _, s := range ss {
		p, err := ParsePrefix(s)
		if err != nil {
			t.Fatal(err)
		}
		out = append(out, p)
	}
	return out
}

func labels(t *testing.T, ss ...string) (out []Label) {
	t.Helper()
	for _, s := range ss {
		l, err := ParseLabel(s)
		if err != nil {
			t.Fatal(err)
		}
		if l.String() != s {
			t.Errorf("label %q is written as %q", s, l)
		}
		out = append(out, l)
	}
	return out
}

func related(t *testing.T, ss ...string) (out []Related) {
	t.Helper()
	for _, s := range ss {
		x, err := ParseRelated(s)
		if err != nil {
			t.Fatal(err)
		}
		out = append(out, x)
	}
	return out
}

// Each record is of one of the types drop, trace and l7, and beside that a verdict
// where policy decided.
func TestTypes(t *testing.T) {
	for name, tt := range map[string]struct {
		edit func(*Record)
		want []Type
	}{
		"passed, new":         {func(*Record) {}, []Type{TypeTrace, TypeVerdict, TypePacket}},
		"passed, reply":       {func(r *Record) { r.State = abi.FlowReply }, []Type{TypeTrace, TypePacket}},
		"held":                {func(r *Record) { r.Verdict = abi.VerdictHold }, []Type{TypeTrace, TypePacket}},
		"denied":              {func(r *Record) { r.Verdict, r.Reason, r.Rule = abi.VerdictDrop, abi.ReasonPolicyDenied, 0 }, []Type{TypeDrop, TypeVerdict, TypePacket}},
		"dropped":             {func(r *Record) { r.Verdict, r.Reason, r.Rule = abi.VerdictDrop, abi.ReasonUnbound, 0 }, []Type{TypeDrop, TypePacket}},
		"audit":               {func(r *Record) { r.Verdict, r.Reason = abi.VerdictAudit, abi.ReasonUnbound }, []Type{TypeTrace, TypeVerdict, TypePacket}},
		"of a later version":  {func(r *Record) { r.Verdict, r.Rule = 77, 0 }, []Type{TypeDrop, TypePacket}},
		"a request":           {func(r *Record) { r.L7 = &L7{} }, []Type{TypeL7}},
		"a refused request":   {func(r *Record) { r.L7, r.Verdict, r.Reason = &L7{}, abi.VerdictDrop, abi.ReasonPolicyDenied }, []Type{TypeL7}},
		"what nobody can see": {func(r *Record) { *r = Record{Lost: &Lost{Count: 1}} }, nil},
	} {
		r := FromEvent(syn(), resolver())
		tt.edit(&r)
		for _, typ := range Types() {
			if got := r.Is(typ); got != slices.Contains(tt.want, typ) {
				t.Errorf("%s: it is a %s: %v", name, typ, got)
			}
		}
	}
}

func TestFilter(t *testing.T) {
	r := FromEvent(syn(), resolver()) // default/xwing 10.1.0.3:43210 -> default/deathstar 10.2.0.2:80, endpoint 24
	tests := []struct {
		name string
		f    Filter
		want bool
	}{
		{"nothing asked", Filter{}, true},
		{"type", Filter{Types: []Type{TypePacket}}, true},
		{"other type", Filter{Types: []Type{TypeL7}}, false},
		{"one of two types", Filter{Types: []Type{TypeL7, TypeTrace}}, true},
		{"policy decided about a new flow", Filter{Types: []Type{TypeVerdict}}, true},
		{"it is no drop", Filter{Types: []Type{TypeDrop}}, false},
		{"related to the judge", Filter{Related: related(t, "24")}, true},
		{"related to the peer's workload, or another", Filter{Related: related(t, "25", "default/xwing")}, true},
		{"related to others", Filter{Related: related(t, "25", "default/x")}, false},
		{"verdict", Filter{Verdicts: []abi.Verdict{abi.VerdictDrop, abi.VerdictPass}}, true},
		{"other verdict", Filter{Verdicts: []abi.Verdict{abi.VerdictDrop}}, false},
		{"reason", Filter{Reasons: []abi.Reason{abi.ReasonNone}}, true},
		{"other reason", Filter{Reasons: []abi.Reason{abi.ReasonRefused}}, false},
		{"direction", Filter{Directions: []abi.Direction{abi.DirIngress}}, true},
		{"other direction", Filter{Directions: []abi.Direction{abi.DirEgress}}, false},
		{"source address", Filter{Prefixes: prefixes(t, "10.1.0.3")}, true},
		{"mapped source address", Filter{Prefixes: prefixes(t, "::ffff:10.1.0.3")}, true},
		{"mapped prefix", Filter{Prefixes: prefixes(t, "::ffff:10.1.0.0/112")}, true},
		{"destination prefix", Filter{Prefixes: prefixes(t, "192.0.2.0/24", "10.2.0.9/16")}, true},
		{"other prefix", Filter{Prefixes: prefixes(t, "10.3.0.0/16", "::/0")}, false},
		{"label of the source", Filter{Labels: labels(t, "org=alliance")}, true},
		{"key of the destination", Filter{Labels: labels(t, "k8s:org")}, true},
		{"one of two labels", Filter{Labels: labels(t, "org=rebels", "class=xwing")}, true},
		{"other value", Filter{Labels: labels(t, "org=rebels")}, false},
		{"other source", Filter{Labels: labels(t, "reserved:org")}, false},
		{"empty value", Filter{Labels: labels(t, "org=")}, false},
		{"client's port", Filter{Ports: []uint16{43210}}, true},
		{"server's port", Filter{Ports: []uint16{443, 80}}, true},
		{"other port", Filter{Ports: []uint16{443}}, false},
		{"protocol", Filter{Protocols: []uint8{17, 6}}, true},
		{"other protocol", Filter{Protocols: []uint8{17}}, false},
		{"endpoint", Filter{Endpoints: []uint32{24}}, true},
		{"other endpoint", Filter{Endpoints: []uint32{25}}, false},
		{"no endpoint is not endpoint 0", Filter{Endpoints: []uint32{0}}, false},
		{"workload", Filter{Workloads: []string{"default/xwing"}}, true},
		{"other workload", Filter{Workloads: []string{"default/tiefighter", ""}}, false},
		{"all fields", Filter{Verdicts: []abi.Verdict{abi.VerdictPass}, Ports: []uint16{80}, Labels: labels(t, "org=empire")}, true},
		{"one field of two", Filter{Verdicts: []abi.Verdict{abi.VerdictPass}, Ports: []uint16{81}}, false},
	}
	for _, tt := range tests {
		if got := tt.f.Match(&r); got != tt.want {
			t.Errorf("%s: matched %v, want %v", tt.name, got, tt.want)
		}
	}
}

func TestFilterDoesNotTakeAnIdentifierForAPort(t *testing.T) {
	ping := FromEvent(edit(func(e *abi.Event) { e.Proto = 1; e.Sport, e.Dport = 80, 80 }), resolver())
	if (&Filter{Ports: []uint16{80}}).Match(&ping) {
		t.Error("an ICMP echo with identifier 80 passes for port 80")
	}
}

func TestParseErrors(t *testing.T) {
	for _, s := range []string{"", "=x", "k8s:", "k8s:=x", "::x"} {
		if l, err := ParseLabel(s); err == nil {
			t.Errorf("label %q was taken for %+v", s, l)
		}
	}
	for _, s := range []string{"", "10.1.0", "10.1.0.0/33", "host"} {
		if p, err := ParsePrefix(s); err == nil {
			t.Errorf("prefix %q was taken for %v", s, p)
		}
	}
	for _, s := range []string{"", "256", "-1", "TPC"} {
		if p, err := ParseProtocol(s); err == nil {
			t.Errorf("protocol %q was taken for %v", s, p)
		}
	}
	for _, s := range []string{"", "0", "-1", "default", "/x", "x/", "a/b/c", "4294967296"} {
		if x, err := ParseRelated(s); err == nil {
			t.Errorf("endpoint %q was taken for %+v", s, x)
		}
	}
	if x, err := ParseType("policy"); err == nil {
		t.Errorf("type policy was taken for %v", x)
	}
	if _, err := ParseReason("policy_denied"); err == nil {
		t.Error("reason policy_denied was taken")
	}
}

func FuzzParseLabel(f *testing.F) {
	for _, s := range []string{"org=empire", "k8s:org", "reserved:world", "=", ":", "a:b=c:d=e", "k8s:=x"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		l, err := ParseLabel(s)
		if err != nil {
			return
		}
		again, err := ParseLabel(l.String())
		if err != nil || again != l {
			t.Errorf("%q: %+v, then %+v (%v)", s, l, again, err)
		}
	})
}
