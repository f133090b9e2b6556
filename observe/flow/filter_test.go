package flow

import (
	"net/netip"
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
