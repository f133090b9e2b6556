package lab

import (
	"slices"
	"strings"
	"testing"
	"time"

	"portcullis/identity"
)

func TestParseConfig(t *testing.T) {
	c, err := ParseConfig([]byte(`
nodes:
  - {name: one, ranges: [10.1.0.0/24, "fd00:1::/64"]}
  - {name: two, ranges: [10.2.0.0/24]}
workloads:
  - name: deathstar
    node: one
    labels: {org: empire, class: deathstar}
    restart: always
    ports: [http=80, dns=53/UDP]
    command: [portcullis, probe, deathstar]
  - {name: xwing, namespace: rebels, node: two, serviceAccount: x, ip: 10.2.0.7}
ttl: 5s
agentFlags: [--enforce=audit]
`))
	if err != nil {
		t.Fatal(err)
	}
	if c.TTL != 5*time.Second || c.Heartbeat != DefaultHeartbeat || c.ReuseMargin != DefaultReuseMargin || c.Evidence != "lease" {
		t.Errorf("times and evidence: %+v", c)
	}
	if len(c.Nodes) != 2 || c.Nodes[0].Ranges[1].String() != "fd00:1::/64" {
		t.Errorf("nodes: %+v", c.Nodes)
	}
	d, x := c.Workloads[0], c.Workloads[1]
	if d.FullName() != "default/deathstar" || d.ServiceAccount != "default" || d.Restart != "always" || d.Labels["class"] != "deathstar" || len(d.Command) != 3 {
		t.Errorf("deathstar: %+v", d)
	}
	if want := []identity.NamedPort{{Name: "http", Port: 80, Protocol: "TCP"}, {Name: "dns", Port: 53, Protocol: "UDP"}}; !slices.Equal(d.Ports, want) {
		t.Errorf("ports: %+v", d.Ports)
	}
	if !slices.Equal(c.AgentFlags, []string{"--enforce=audit"}) {
		t.Errorf("flags: %q", c.AgentFlags)
	}
	if x.FullName() != "rebels/xwing" || x.ServiceAccount != "x" || x.IPs[0].String() != "10.2.0.7" {
		t.Errorf("xwing: %+v", x)
	}
}

// Every problem is in the one answer, each with its path.
func TestParseConfigProblems(t *testing.T) {
	for name, tc := range map[string]struct {
		in   string
		want []string
	}{
		"fields": {`
nodes: [{name: one, range: [10.1.0.0/24]}]
workload: []
ttl: 3
workloads:
  - {name: a, node: one, labels: [x], ip: 10.1.0.1/24, ports: [http, a=0, b=65536, =80, A=80, 80=80, a=1/ICMP, [x]]}
  - {name: b, node: {x: y}, name: c}
`, []string{"nodes[0].range: unknown field", "workload: unknown field", "ttl: \"3\" is not a positive duration",
			"workloads[0].labels: want a mapping", "workloads[0].ip:",
			"workloads[0].ports[0]: \"http\" is not NAME=NUMBER", "ports[1]: \"a=0\" is not", "ports[2]: \"b=65536\" is not",
			"ports[3]: \"=80\": the name", "ports[4]: \"A=80\": the name", "ports[5]: \"80=80\": the name", "ports[6]: \"a=1/ICMP\": the protocol",
			"ports[7]: want a single value",
			"workloads[1].node: want a single value", "workloads[1].name: given twice"}},
		"meaning": {`
nodes:
  - {name: one, ranges: [10.1.0.0/16, 10.1.2.0/24]}
  - {name: one, ranges: [10.1.3.1/24, 172.30.0.0/25]}
  - {name: UP}
workloads:
  - {name: a, node: four}
  - {name: b, node: one, ip: 10.9.0.1, restart: sometimes}
  - {name: b, node: one, restart: always, ports: [a=1, a=2]}
evidence: hope
ttl: 1s
heartbeat: 2s
`, []string{"ranges[1]: 10.1.2.0/24 overlaps nodes[0].ranges[0]", "nodes[1].name: \"one\" is given twice", "10.1.3.1/24 has host bits",
			"the lab's own node addresses", "nodes[2].name", "nodes[2].ranges: a node needs", `workloads[0].node: there is no node "four"`,
			"workloads[1].ip: 10.9.0.1 is in none", `workloads[1].restart: "sometimes"`, "workloads[2].name: default/b is workloads[1]",
			"workloads[2].restart: always, but there is no command", `workloads[2].ports: "a" is given twice`, `evidence: "hope"`, "heartbeat: 2s must be shorter"}},
		"empty": {"", []string{"needs at least"}},
		"list":  {"- a", []string{"(top): want a mapping"}},
	} {
		_, err := ParseConfig([]byte(tc.in))
		if err == nil {
			t.Errorf("%s: accepted", name)
			continue
		}
		for _, w := range tc.want {
			if !strings.Contains(err.Error(), w) {
				t.Errorf("%s: no %q in:\n%v", name, w, err)
			}
		}
	}
}

func FuzzParseConfig(f *testing.F) {
	f.Add([]byte("nodes: [{name: one, ranges: [10.1.0.0/24]}]\nworkloads: [{name: a, node: one, ip: 10.1.0.2}]"))
	f.Add([]byte("? [a]\n: b"))
	f.Fuzz(func(t *testing.T, b []byte) {
		c, err := ParseConfig(b)
		if err != nil {
			return
		}
		if err := c.Validate(); err != nil {
			t.Errorf("accepted, but invalid: %v", err)
		}
	})
}

func TestParseWords(t *testing.T) {
	if l, err := ParseLabels("org=empire, class=deathstar,bare,empty="); err != nil || len(l) != 4 || l["org"] != "empire" || l["bare"] != "" {
		t.Errorf("labels: %v %v", l, err)
	}
	for _, bad := range []string{"=x", "a=1,a=2"} {
		if _, err := ParseLabels(bad); err == nil {
			t.Errorf("labels %q accepted", bad)
		}
	}
	if ns, n, err := ParseName("a/b"); ns != "a" || n != "b" || err != nil {
		t.Error(ns, n, err)
	}
	if ns, n, err := ParseName("b"); ns != "default" || n != "b" || err != nil {
		t.Error(ns, n, err)
	}
	for _, bad := range []string{"", "/", "a/b/c", "A", "a.b", "../x"} {
		if _, _, err := ParseName(bad); err == nil {
			t.Errorf("name %q accepted", bad)
		}
	}
	for _, bad := range []string{"", "1.2.3", "::ffff:1.2.3.4", "10.0.0.1,10.0.0.2", "fe80::1%eth0"} {
		if _, err := ParseIPs(bad); err == nil {
			t.Errorf("IPs %q accepted", bad)
		}
	}
}
