package dialect_test

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"portcullis/authz"
	"portcullis/authz/dialect"
	"portcullis/authz/dialect/cilium"
	"portcullis/authz/dialect/k8s"
	"portcullis/bpf/abi"
	"portcullis/identity"
)

func parse(name string, data string) ([]*authz.Policy, error) {
	r, err := dialect.ParseFile(name, []byte(data), append(cilium.Dialects(), k8s.Dialect)...)
	return r.Policies, err
}

func example(t *testing.T, name string) string {
	t.Helper()
	b, err := os.ReadFile(filepath.Join("testdata", name))
	if err != nil {
		t.Fatal(err)
	}
	return string(b)
}

// The files that people have: taken verbatim, compiled, and obeyed.
func TestExamples(t *testing.T) {
	const td = "td"
	who := map[string]identity.Identity{
		"deathstar":     identity.New(td, "default", "default", map[string]string{"org": "empire", "class": "deathstar"}),
		"tiefighter":    identity.New(td, "default", "default", map[string]string{"org": "empire", "class": "tiefighter"}),
		"xwing":         identity.New(td, "default", "default", map[string]string{"org": "alliance", "class": "xwing"}),
		"other-ns":      identity.New(td, "elsewhere", "default", map[string]string{"org": "empire", "class": "tiefighter"}),
		"sleep-v1":      identity.New(td, "default", "sleep-v1", map[string]string{"app": "sleep"}),
		"sleep-v2":      identity.New(td, "default", "sleep-v2", map[string]string{"app": "sleep"}),
		"helloworld-v1": identity.New(td, "default", "helloworld-v1", map[string]string{"app": "helloworld"}),
		"helloworld-v2": identity.New(td, "default", "helloworld-v2", map[string]string{"app": "helloworld"}),
		"world":         {Reserved: "world"},
	}
	type flow struct {
		from, to string
		proto    uint8
		port     uint16
		pass     bool
	}
	const tcp, udp = authz.ProtoTCP, authz.ProtoUDP
	starwars := []flow{
		{"tiefighter", "deathstar", tcp, 80, true},
		{"xwing", "deathstar", tcp, 80, false},
		{"other-ns", "deathstar", tcp, 80, false},
		{"world", "deathstar", tcp, 80, false},
		{"tiefighter", "deathstar", tcp, 81, false},
		{"tiefighter", "deathstar", udp, 80, false},
		{"tiefighter", "deathstar", authz.ProtoICMP, 8 << 8, false},
		{"xwing", "tiefighter", tcp, 80, true}, // no policy selects tiefighter
	}
	stale := []flow{
		{"sleep-v1", "helloworld-v1", tcp, 5000, true},
		{"sleep-v2", "helloworld-v1", tcp, 5000, false},
		{"sleep-v1", "helloworld-v2", tcp, 5000, false},
		{"sleep-v2", "helloworld-v2", tcp, 5000, true},
		{"helloworld-v1", "sleep-v1", tcp, 5000, true},
	}
	for file, flows := range map[string][]flow{
		"networkpolicy-L4.yaml":        starwars,
		"networkpolicy-k8s.yaml":       starwars,
		"stale-identity-policies.yaml": append([]flow{{"sleep-v1", "helloworld-v1", udp, 5000, false}}, stale...),
		"stale-identity-udp.yaml":      append([]flow{{"sleep-v1", "helloworld-v1", udp, 5000, true}, {"sleep-v2", "helloworld-v1", udp, 5000, false}}, stale...),
	} {
		policies, err := parse(file, example(t, file))
		if err != nil {
			t.Errorf("%s: %v", file, err)
			continue
		}
		r := authz.NewRepository(authz.Options{TrustDomain: td})
		if err := r.Put(policies...); err != nil {
			t.Errorf("%s: %v", file, err)
		}
		alloc := identity.NewAllocator()
		for _, id := range who {
			alloc.Acquire(id)
		}
		for _, f := range flows {
			set := r.Compile(who[f.to], authz.Peers(alloc.All))
			n, _ := alloc.Acquire(who[f.from])
			if d := set.Judge(abi.DirIngress, n, f.proto, f.port); (d.Verdict == abi.VerdictPass) != f.pass {
				t.Errorf("%s: %+v: %+v", file, f, d)
			}
		}
	}
}

// The example of egress, where a port's name means the called ship's.
func TestEgressExample(t *testing.T) {
	src, err := os.ReadFile("../../docs/examples/egress-policies.yaml")
	if err != nil {
		t.Fatal(err)
	}
	policies, err := parse("egress-policies.yaml", string(src))
	if err != nil {
		t.Fatal(err)
	}
	r := authz.NewRepository(authz.Options{})
	if err := r.Put(policies...); err != nil {
		t.Fatal(err)
	}
	ship := func(class string) identity.Identity {
		return identity.New("", "default", "default", map[string]string{"class": class})
	}
	alloc := identity.NewAllocator()
	for i, class := range []string{"deathstar", "tiefighter", "xwing"} {
		alloc.Acquire(ship(class))
		r.AddPorts(uint64(i), ship(class), []identity.NamedPort{{Name: "http", Port: 8080 + uint16(i), Protocol: "TCP"}})
	}
	for _, c := range []struct {
		from, to string
		port     uint16
		pass     bool
	}{
		{"xwing", "deathstar", 8080, true}, {"xwing", "deathstar", 80, false}, {"xwing", "tiefighter", 8081, false},
		{"tiefighter", "deathstar", 80, true}, {"tiefighter", "deathstar", 89, true}, {"tiefighter", "deathstar", 90, false},
		{"tiefighter", "deathstar", 8080, false}, {"tiefighter", "xwing", 80, false}, {"deathstar", "xwing", 1, true},
	} {
		set := r.Compile(ship(c.from), authz.Peers(alloc.All))
		n, _ := alloc.Acquire(ship(c.to))
		if d := set.Judge(abi.DirEgress, n, authz.ProtoTCP, c.port); (d.Verdict == abi.VerdictPass) != c.pass {
			t.Errorf("%+v: %+v", c, d)
		}
		if set.EnforceIngress {
			t.Errorf("%s: its ingress is under policy", c.from)
		}
	}
}

// The model of a document, in full: everything that a flow record, a trace or
// policy get shows comes from it.
func TestModelGolden(t *testing.T) {
	src := example(t, "networkpolicy-L4.yaml")
	got, err := parse("f", src)
	if err != nil {
		t.Fatal(err)
	}
	want := []*authz.Policy{{
		Ref: authz.Ref{Kind: "CiliumNetworkPolicy", Namespace: "default", Name: "rule1"}, Source: src,
		Specs: []authz.Spec{{
			Subject:     authz.Selector{authz.InNamespace("default"), authz.Label("org", "empire"), authz.Label("class", "deathstar")},
			DenyIngress: true,
			Rules: []authz.Rule{{
				Direction: abi.DirIngress, Action: authz.Allow, Path: "spec.ingress[0]",
				Peers: []authz.PeerSelector{authz.Selector{authz.Label("org", "empire"), authz.InNamespace("default")}},
				Ports: []authz.PortRange{authz.Port(authz.ProtoTCP, 80)},
			}},
		}},
	}}
	if d := cmp.Diff(want, got); d != "" {
		t.Error(d)
	}
}

// What is judged but cannot be imported, and the words: file, line, document,
// path, what to do.
func TestExamplesNotEnforced(t *testing.T) {
	for file, want := range map[string]string{
		"networkpolicy-L7.yaml": `networkpolicy-L7.yaml:21: document 1: spec.ingress[0].toPorts[0].rules.http: it needs a proxy, and there is none: remove rules to allow the whole port, or remove the port`,
		"talk-policies.yaml": `talk-policies.yaml:17: document 1: spec.ingress[0].toPorts[0].rules.http: it needs a proxy, and there is none: remove rules to allow the whole port, or remove the port
talk-policies.yaml:36: document 2: spec.egress[0].toPorts[0].rules.dns: it needs a proxy, and there is none: remove rules to allow the whole port, or remove the port
talk-policies.yaml:38: document 2: spec.egress[1].toFQDNs: it needs a proxy, and there is none: write the addresses into toCIDR, or leave the peers out and name toPorts for everybody
talk-policies.yaml:47: document 3: spec.nodeSelector: not enforced yet: policies for nodes have no datapath; protect the node by its own firewall, and workloads by endpointSelector`,
	} {
		policies, err := parse(file, example(t, file))
		if err != nil {
			t.Fatalf("%s: %v", file, err)
		}
		var not []string
		for _, p := range policies {
			if len(p.NeedsProxy) > 0 {
				not = append(not, authz.Problems(p.NeedsProxy).Error())
			}
			if err := p.Enforceable(); err != nil {
				not = append(not, err.Error())
			}
			if err := p.Validate(); err != nil {
				t.Errorf("%s: %v", file, err)
			}
		}
		if d := cmp.Diff(want, strings.Join(not, "\n")); d != "" {
			t.Errorf("%s: %s", file, d)
		}
	}
}
