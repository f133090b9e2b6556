package tools_test

import (
	"encoding/json"
	"errors"
	"flag"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"portcullis/authz"
	"portcullis/authz/dialect"
	"portcullis/authz/dialect/cilium"
	"portcullis/authz/dialect/k8s"
	"portcullis/authz/dialect/tree"
	"portcullis/authz/tools"
)

var update = flag.Bool("update", false, "rewrite the golden files")

func dialects() []dialect.Dialect { return append(cilium.Dialects(), k8s.Dialect, tree.Dialect) }

// read makes a world of texts: the first is named a.yaml, and so on.
func read(texts ...string) (*tools.World, error) {
	r := tools.NewReader(dialects()...)
	for i, text := range texts {
		r.File(string(rune('a'+i))+".yaml", []byte(text))
	}
	return r.World()
}

func world(t *testing.T, texts ...string) *tools.World {
	t.Helper()
	w, err := read(texts...)
	if err != nil {
		t.Fatal(err)
	}
	return w
}

func example(t *testing.T, name string) string {
	t.Helper()
	b, err := os.ReadFile(filepath.Join("../../docs/examples", name))
	if err != nil {
		t.Fatal(err)
	}
	return string(b)
}

func judge(t *testing.T, w *tools.World) *tools.Judge {
	t.Helper()
	j, err := tools.NewJudge(w, authz.Options{})
	if err != nil {
		t.Fatal(err)
	}
	return j
}

func options(t *testing.T, w *tools.World, ports string, externals ...string) (o tools.MatrixOptions) {
	t.Helper()
	var err error
	if o.Ports, err = tools.ParsePorts(ports); err != nil {
		t.Fatal(err)
	}
	for _, name := range externals {
		o.Externals = append(o.Externals, party(t, w, name))
	}
	return o
}

func party(t *testing.T, w *tools.World, name string) tools.Party {
	t.Helper()
	p, err := w.Party(name)
	if err != nil {
		t.Fatal(err)
	}
	return p
}

func golden(t *testing.T, name, got string) {
	t.Helper()
	file := filepath.Join("testdata", name)
	if *update {
		if err := os.WriteFile(file, []byte(got), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	want, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(strings.Split(string(want), "\n"), strings.Split(got, "\n")); diff != "" {
		t.Errorf("%s (-want +got):\n%s", file, diff)
	}
}

// The Star Wars story, in each form.
func TestForms(t *testing.T) {
	w := world(t, example(t, "starwars-app.yaml"), example(t, "networkpolicy-L4.yaml"), example(t, "egress-policies.yaml"))
	o := options(t, w, "TCP/80,TCP/http,UDP/53", "reserved:world", "192.0.2.1")
	o.Reasons = true
	j := judge(t, w)
	m := j.Matrix(o)
	golden(t, "matrix.txt", m.Text())
	b, err := json.MarshalIndent(m, "", "  ")
	if err != nil {
		t.Fatal(err)
	}
	golden(t, "matrix.json", string(b)+"\n")
	var page strings.Builder
	if err := m.HTML(&page, tools.Page{Judge: j, Externals: o.Externals}); err != nil {
		t.Fatal(err)
	}
	golden(t, "matrix.html", page.String())

	var traces strings.Builder
	for _, x := range [][3]string{
		{"default/xwing", "default/deathstar", "80/TCP"}, {"default/tiefighter", "default/deathstar", "TCP/80"},
		{"192.0.2.1", "default/deathstar", "TCP/80"}, {"default/tiefighter", "reserved:world", "TCP/443"},
	} {
		p, err := tools.ParsePort(x[2])
		if err != nil {
			t.Fatal(err)
		}
		traces.WriteString(j.Trace(party(t, w, x[0]), party(t, w, x[1]), p, tools.Request{}).Text() + "\n")
	}
	golden(t, "trace.txt", traces.String())

	before := judge(t, w).Matrix(o)
	after := w.With(world(t, strings.Replace(example(t, "networkpolicy-L4.yaml"), "org: empire\n    toPorts", "org: alliance\n    toPorts", 1)))
	golden(t, "diff.txt", tools.Compare(before, judge(t, after).Matrix(o)).Text())
}

const netpol = `
apiVersion: networking.k8s.io/v1
kind: NetworkPolicy
`

// cells returns the combined table of a world at a port.
func cells(t *testing.T, w *tools.World, port string, externals ...string) (titles []string, table *tools.Table) {
	t.Helper()
	m := judge(t, w).Matrix(options(t, w, port, externals...))
	for _, table = range m.Ports {
		return m.Workloads, table
	}
	t.Fatal("no table")
	return nil, nil
}

func wantNote(t *testing.T, w *tools.World, words string) {
	t.Helper()
	if !slices.ContainsFunc(w.Notes, func(n string) bool { return strings.Contains(n, words) }) {
		t.Errorf("no note of %q in %q", words, w.Notes)
	}
}

// Which workloads there are.
func TestWorkloads(t *testing.T) {
	w := world(t, `
apiVersion: v1
kind: List
items:
- {apiVersion: v1, kind: Pod, metadata: {name: bare}}
- {apiVersion: v1, kind: Pod, metadata: {name: done}, status: {phase: Succeeded, podIP: 10.0.0.9}}
- {apiVersion: v1, kind: Pod, metadata: {name: dead}, status: {phase: Failed}}
- {apiVersion: v1, kind: Pod, metadata: {name: agent, namespace: kube-system}, spec: {hostNetwork: true, nodeName: n1}, status: {podIP: 192.168.0.1}}
- apiVersion: v1
  kind: Pod
  metadata: {name: web-5d9-x, labels: {app: web, pod-template-hash: 5d9}, ownerReferences: [{apiVersion: apps/v1, kind: ReplicaSet, name: web-5d9, uid: u, controller: true}]}
- {apiVersion: apps/v1, kind: Deployment, metadata: {name: web}, spec: {template: {metadata: {labels: {app: web}}}}}
- apiVersion: apps/v1
  kind: ReplicaSet
  metadata: {name: other-1, ownerReferences: [{apiVersion: apps/v1, kind: Deployment, name: other, uid: u, controller: true}]}
  spec: {replicas: 3, template: {metadata: {labels: {app: other}}}}
- {apiVersion: apps/v1, kind: Deployment, metadata: {name: other}, spec: {template: {metadata: {labels: {app: other}}, spec: {serviceAccountName: special}}}}
- {apiVersion: apps/v1, kind: StatefulSet, metadata: {name: idle}, spec: {replicas: 0, template: {metadata: {labels: {app: idle}}}}}
- {apiVersion: batch/v1, kind: CronJob, metadata: {name: bare}, spec: {jobTemplate: {spec: {template: {metadata: {labels: {app: cron}}}}}}}
- {apiVersion: batch/v1, kind: Job, metadata: {name: migrated}, spec: {template: {metadata: {labels: {app: m}}}}, status: {conditions: [{type: Complete, status: "True"}]}}
- {apiVersion: batch/v1, kind: Job, metadata: {generateName: once-}, spec: {template: {metadata: {labels: {app: o}}}}}
- {apiVersion: v1, kind: ConfigMap, metadata: {name: settings}}
`)
	var got []string
	for _, x := range w.Workloads {
		got = append(got, x.Title+" "+x.Kind+" "+x.Identity.ServiceAccount)
	}
	want := []string{"default/bare Pod default", "default/cronjob/bare CronJob default", "default/once Job default", "default/other Deployment special", "default/web-5d9-x Pod default"}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Error(diff)
	}
	wantNote(t, w, "2 finished pods")
	wantNote(t, w, "pod kube-system/agent uses its node's network")
	wantNote(t, w, "StatefulSet default/idle has no replicas")
	wantNote(t, w, "of CronJob default/bare, Job default/once, Deployment default/other: one workload without an address")
	wantNote(t, w, "v1 ConfigMap (1)")
	if _, err := w.Party("default/done"); err == nil || !strings.Contains(err.Error(), "finished") {
		t.Error(err)
	}
	for _, name := range []string{"kube-system/agent", "192.168.0.1"} {
		if p := party(t, w, name); p.Workload >= 0 || !strings.Contains(p.Is, "n1") {
			t.Error(p)
		}
	}
}

// What may be policy is never left out, and every problem is reported.
func TestRefused(t *testing.T) {
	for text, want := range map[string]string{
		"{apiVersion: policy.networking.k8s.io/v1alpha2, kind: ClusterNetworkPolicy, metadata: {name: a}}":          "a.yaml:1: document 1: policy.networking.k8s.io/v1alpha2 ClusterNetworkPolicy may be policy",
		"{apiVersion: projectcalico.org/v3, kind: NetworkPolicy, metadata: {name: a}}":                              "may be policy",
		"{apiVersion: crd.projectcalico.org/v1, kind: GlobalNetworkPolicy, metadata: {name: a}}":                    "may be policy",
		"{apiVersion: cilium.io/v2, kind: CiliumLocalRedirectPolicy, metadata: {name: a}}":                          "may be policy",
		"{apiVersion: networking.k8s.io/v2, kind: NetworkPolicy, metadata: {name: a}}":                              "may be policy",
		"{apiVersion: security.istio.io/v1, kind: AuthorizationPolicy, metadata: {name: a}}":                        "may be policy",
		"{apiVersion: extensions/v1beta1, kind: NetworkPolicy, metadata: {name: a}}":                                "may be policy",
		"{apiVersion: apps/v1beta1, kind: Deployment, metadata: {name: a}}":                                         "is read as apps/v1",
		"{apiVersion: v1, kind: Pod, metadata: {namespace: a}}":                                                     "name is missing",
		"{apiVersion: v1, kind: Pod, metadata: {name: A B}}":                                                        "is not a name",
		"{apiVersion: v1, kind: Pod, metadata: {name: a, labels: {b: 1}}}":                                          "metadata.labels.b: want a string",
		"{apiVersion: v1, kind: Pod, metadata: {name: a, labels: {'b c': d}}}":                                      "is not a label's key",
		"{apiVersion: v1, kind: Pod, metadata: {name: a}, status: {podIP: 10.0.0}}":                                 "want an IP address",
		"{apiVersion: v1, kind: Pod, metadata: {name: a}, spec: [a]}":                                               "want an object",
		"{apiVersion: v1, kind: Pod, metadata: {name: a}, spec: {containers: [{ports: [{containerPort: 70000}]}]}}": "want a port",
		"{apiVersion: apps/v1, kind: Deployment, metadata: {name: a}}":                                              "spec.template is missing",
		"{apiVersion: v1, kind: Node, metadata: {name: a}, spec: {podCIDR: x}}":                                     "want a block",
		"nodes: []":   "not a Kubernetes object",
		"{kind: Pod}": "not a Kubernetes object",
		netpol + "metadata: {name: a}\nspec: {podSelector: {}, shiny: 1}": "unknown field",
	} {
		_, err := read(text)
		var problems authz.Problems
		if !errors.As(err, &problems) || !strings.Contains(err.Error(), want) {
			t.Errorf("%s: %v, want %q", text, err, want)
		}
	}
	pod := "{apiVersion: v1, kind: Pod, metadata: {name: a}}"
	policy := netpol + "metadata: {name: a}\nspec: {podSelector: {}}"
	_, err := read(pod, policy, pod, policy, "{kind: x}")
	for _, want := range []string{"c.yaml:1: document 1: Pod default/a is in a.yaml already", "d.yaml: NetworkPolicy default/a is in b.yaml already", "e.yaml:1"} {
		if err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("no %q in %v", want, err)
		}
	}
	for _, harmless := range []string{
		"{apiVersion: networking.k8s.io/v1, kind: Ingress, metadata: {name: a}}", "{apiVersion: cilium.io/v2, kind: CiliumEndpoint, metadata: {name: a}}",
		"{apiVersion: admissionregistration.k8s.io/v1, kind: ValidatingAdmissionPolicy, metadata: {name: a}}", "", "# nothing\n---\n", "{apiVersion: v1, kind: List, items: []}",
	} {
		if w, err := read(harmless); err != nil || len(w.Policies) > 0 {
			t.Errorf("%s: %v", harmless, err)
		}
	}
}

// Addresses: of workloads, of nodes, of nobody, of services, of world.
func TestAddresses(t *testing.T) {
	w := world(t, `
apiVersion: v1
kind: List
items:
- {apiVersion: v1, kind: Node, metadata: {name: n1, labels: {zone: a}}, spec: {podCIDR: 10.0.0.0/24, podCIDRs: [10.0.0.0/24, "fd00::/64"]}, status: {addresses: [{type: InternalIP, address: 192.168.0.1}]}}
- {apiVersion: v1, kind: Pod, metadata: {name: a, labels: {app: a}}, spec: {nodeName: n1}, status: {podIP: 10.0.0.1, podIPs: [{ip: 10.0.0.1}, {ip: "fd00::1"}]}}
- {apiVersion: v1, kind: Pod, metadata: {name: b}, spec: {nodeName: n2}, status: {podIP: 10.0.0.2}}
- {apiVersion: v1, kind: Service, metadata: {name: s}, spec: {clusterIP: 10.96.0.1, selector: {app: a}}}
- {apiVersion: v1, kind: Service, metadata: {name: none}, spec: {clusterIP: None}}
- {apiVersion: v1, kind: Service, metadata: {name: db}, spec: {clusterIP: 10.96.0.2}}
- {apiVersion: discovery.k8s.io/v1, kind: EndpointSlice, metadata: {name: db-1, labels: {kubernetes.io/service-name: db}}, endpoints: [{addresses: [192.0.2.7]}]}
---`+netpol+`
metadata: {name: p}
spec:
  podSelector: {}
  policyTypes: [Ingress, Egress]
  ingress:
  - from: [{ipBlock: {cidr: 10.0.0.2/32}}]
  egress:
  - to: [{ipBlock: {cidr: "fd00::/16"}}]
---
apiVersion: cilium.io/v2
kind: CiliumNetworkPolicy
metadata: {name: c}
spec:
  endpointSelector: {}
  egress: [{toServices: [{k8sService: {serviceName: db, namespace: default}}]}, {toEntities: [remote-node]}]
`)
	if _, err := w.Party("10.96.0.1"); err == nil || !strings.Contains(err.Error(), "service default/s") {
		t.Error(err)
	}
	externals := []string{"10.0.0.77", "192.168.0.1", "192.0.2.7", "192.0.2.8", "10.0.0.1"}
	_, table := cells(t, w, "TCP/80", externals...)
	want := &tools.Table{
		Ingress: []string{"XX", ".."}, // a, b -> a, b: only 10.0.0.2 may
		Egress:  []string{"XX", "XX"}, // by IPv4, their main family
		// nobody, a node, behind the service, world, workload a
		Combined:     []string{"XX", "XX"},
		FromExternal: []string{"XX", "XX", "XX", "XX", "XX"},
		ToExternal:   []string{"XX.XX", "X..XX"}, // of its own node a is "host", which is no remote-node
	}
	if diff := cmp.Diff(want, table, cmp.AllowUnexported(tools.Table{})); diff != "" {
		t.Error(diff)
	}
	_, table = cells(t, w, "TCP/80", "fd00::1")
	if table.ToExternal[1] != "." {
		t.Error("b may call a by IPv6:", table.ToExternal)
	}
	for name, is := range map[string]string{"10.0.0.77": "nobody", "192.168.0.1": "node n1", "10.0.0.0/24": "all of 10.0.0.0/24", "reserved:host": "entity host",
		"fqdn:Example.com.": "learnt as", "::ffff:192.0.2.1": "world, at 192.0.2.1"} {
		if p := party(t, w, name); !strings.Contains(p.Is, is) || p.Title != name {
			t.Errorf("%s: %+v", name, p)
		}
	}
	for _, name := range []string{"default/zz", "reserved:nobody", "reserved:unknown", "fe80::1%eth0", "fqdn:", ""} {
		if p, err := w.Party(name); err == nil {
			t.Errorf("%q: %+v", name, p)
		}
	}
}

// What nobody has said of a namespace is not taken for a no or a yes.
func TestNamespaces(t *testing.T) {
	pods := "{apiVersion: v1, kind: Pod, metadata: {name: a, namespace: x}}\n---\n{apiVersion: v1, kind: Pod, metadata: {name: b, namespace: z}}\n"
	policy := netpol + "metadata: {name: p, namespace: x}\nspec: {podSelector: {}, ingress: [{from: [{namespaceSelector: {matchLabels: {team: t}}}]}]}"
	w := world(t, pods, policy)
	wantNote(t, w, "no Namespace object is given of x, z")
	if _, table := cells(t, w, "TCP/80"); table.Combined[1] != "X." {
		t.Error(table.Combined)
	}
	w = w.With(world(t, "{apiVersion: v1, kind: Namespace, metadata: {name: z, labels: {team: t}}}"))
	if _, table := cells(t, w, "TCP/80"); table.Combined[1] != ".." {
		t.Error(table.Combined)
	}
}

func TestPorts(t *testing.T) {
	for in, want := range map[string]string{"TCP/80": "TCP/80", "80/tcp": "TCP/80", "sctp/5": "SCTP/5", "ICMP/8": "ICMP/8", "ICMPv4/8": "ICMP/8", "ICMPv6/128": "ICMPv6/128",
		"TCP/http": "TCP/http", "http/TCP": "TCP/http", "GRE": "GRE", "udp/53,TCP/80,UDP/53": "UDP/53 TCP/80"} {
		ports, err := tools.ParsePorts(in)
		var got []string
		for _, p := range ports {
			got = append(got, p.String())
		}
		if err != nil || strings.Join(got, " ") != want {
			t.Errorf("%s: %v, %v", in, got, err)
		}
	}
	for in, want := range map[string]string{"TCP/80-90": "range", "TCP/0": "1 to 65535", "TCP/65536": "1 to 65535", "ICMP/256": "type", "ICMP/http": "neither",
		"GRE/1": "no ports", "TCP": "", "": "", "80": "", "TCP/": "", "TCP/-1": "", "XYZ/1": "is not a port", "TCP/99999999999999999999": ""} {
		if p, err := tools.ParsePort(in); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%q: %v, %v", in, p, err)
		}
	}
	w := world(t, "{apiVersion: v1, kind: Pod, metadata: {name: a}, spec: {containers: [{ports: [{name: http, containerPort: 8080}]}]}}\n---\n{apiVersion: v1, kind: Pod, metadata: {name: b}}\n---"+
		netpol+"metadata: {name: p}\nspec: {podSelector: {}, ingress: [{ports: [{port: http}, {port: 53, protocol: UDP}, {port: 80, endPort: 90}]}]}")
	ports, more := w.Ports(3)
	if len(ports) != 3 || more != 1 || ports[0].String() != "TCP/80" || ports[2].String() != "TCP/8080" {
		t.Error(ports, more)
	}
	if _, table := cells(t, w, "TCP/http"); table.Combined[0] != ".-" {
		t.Error("b has no port of that name:", table.Combined)
	}
	if _, table := cells(t, w, "TCP/8080"); table.Combined[0] != ".X" {
		t.Error(table.Combined)
	}
}

// The ports that nothing names are none of those that something does.
func TestOtherPorts(t *testing.T) {
	for policy, want := range map[string]string{
		"spec: {podSelector: {}}": "TCP/1 UDP/1",
		"spec: {podSelector: {}, ingress: [{ports: [{port: 1, endPort: 79}, {port: 80}, {protocol: UDP}]}]}":             "TCP/82 UDP/1",
		"spec: {podSelector: {}, ingress: [{ports: [{port: 1, endPort: 65535}, {protocol: UDP, port: 1, endPort: 7}]}]}": "UDP/8",
	} {
		w := world(t, "{apiVersion: v1, kind: Pod, metadata: {name: a}, spec: {containers: [{ports: [{containerPort: 81}]}]}}\n---"+netpol+"metadata: {name: p}\n"+policy)
		var got []string
		for _, p := range w.OtherPorts() {
			got = append(got, p.String())
		}
		if s := strings.Join(got, " "); s != want {
			t.Errorf("%s: %s, want %s", policy, s, want)
		}
	}
}

// The policy trees of 2017 are judged beside the others.
func TestTrees(t *testing.T) {
	w := world(t, `
apiVersion: v1
kind: List
items:
- {apiVersion: v1, kind: Pod, metadata: {name: deathstar, labels: {id.empire.deathstar: ""}}}
- {apiVersion: v1, kind: Pod, metadata: {name: xwing, labels: {id.spaceship: ""}}}
- {apiVersion: v1, kind: Pod, metadata: {name: rock}}
`, `{"name": "root", "rules": [{"coverage": ["id.empire.deathstar"], "allow": ["id.spaceship"]}, {"coverage": ["id.empire.deathstar"], "l4": [{"in-ports": [{"port": 80, "protocol": "tcp"}]}]}]}`)
	if len(w.Policies) != 1 {
		t.Fatal(w.Policies)
	}
	for port, want := range map[string]string{"TCP/80": "X.", "TCP/81": "XX", "UDP/80": "XX"} { // rock, xwing -> deathstar
		_, table := cells(t, w, port)
		if got := table.Combined[1][:1] + table.Combined[2][:1]; got != want {
			t.Errorf("%s: %s, want %s", port, got, want)
		}
	}
}

// A trace says of each limit whether it denies the port.
func TestTraceOfLimits(t *testing.T) {
	w := world(t, "{apiVersion: v1, kind: Pod, metadata: {name: a, labels: {id.a: ''}}}\n---\n{apiVersion: v1, kind: Pod, metadata: {name: b}}",
		`{"name": "root", "rules": [{"coverage": ["id.a"], "l4": [{"in-ports": [{"port": 80, "protocol": "tcp"}]}]}, {"coverage": ["id.a"], "l4": [{"in-ports": [{"port": 81, "protocol": "tcp"}]}]}]}`)
	for port, want := range map[string][]string{
		"TCP/80": {"ALLOWED", "rules[0].l4[0].in-ports (limit) does not match", "port: no: it is within the limit, TCP/80", "port: no: it is outside of TCP/81, and within another limit"},
		"TCP/82": {"BLOCKED", "* rules[0].l4[0].in-ports (limit) matches", "port: yes: it is outside of TCP/80, and a limit denies what is outside", "  rules[1].l4[0].in-ports (limit) matches"},
		"ICMP/8": {"ALLOWED", "(limit) does not match", "no: it limits TCP and UDP only"},
	} {
		o := options(t, w, port)
		got := judge(t, w).Trace(w.WorkloadParty(1), w.WorkloadParty(0), o.Ports[0], tools.Request{}).Text()
		for _, s := range want {
			if !strings.Contains(got, s) {
				t.Errorf("%s: there is no %q in\n%s", port, s, got)
			}
		}
	}
}

// A group of addresses that is named and not there is told, and what follows.
func TestUnknownGroups(t *testing.T) {
	const policy = "apiVersion: cilium.io/v2\nkind: CiliumNetworkPolicy\nmetadata: {name: p}\nspec:\n  endpointSelector: {}\n  egress: [{toCIDRSet: [{cidrGroupRef: g}]}]\n  egressDeny: [{toCIDRSet: [{cidrGroupRef: h}]}]\n"
	const is = "CiliumNetworkPolicy default/p names CiliumCIDRGroup "
	w := world(t, policy)
	if want := []string{is + "g, which is not there: until it is, the policy allows nobody by it", is + "h, which is not there: until it is, the policy denies by it all of world"}; !slices.Equal(w.Notes, want) {
		t.Errorf("%q, want %q", w.Notes, want)
	}
	w = world(t, policy, "apiVersion: cilium.io/v2\nkind: CiliumCIDRGroup\nmetadata: {name: h}\nspec: {externalCIDRs: [192.0.2.0/24]}")
	if len(w.Notes) != 1 || !strings.HasPrefix(w.Notes[0], is+"g") {
		t.Errorf("%q", w.Notes)
	}
}

// Policies that select nobody are told.
func TestIdle(t *testing.T) {
	w := world(t, "{apiVersion: v1, kind: Pod, metadata: {name: a}}\n---"+netpol+"metadata: {name: p}\nspec: {podSelector: {matchLabels: {app: typo}}}\n---"+netpol+"metadata: {name: q}\nspec: {podSelector: {}}")
	if idle := judge(t, w).Idle(); !slices.Equal(idle, []string{"NetworkPolicy default/p"}) {
		t.Error(idle)
	}
}

// Whatever names say, the page has one script and no other markup, and a
// terminal gets no control characters.
func TestHostileNames(t *testing.T) {
	text, err := os.ReadFile("testdata/hostile.yaml")
	if err != nil {
		t.Fatal(err)
	}
	w := world(t, string(text))
	evil := "</script><img src=x onerror=alert(1)>\x1b[2J\u202e\"'"
	w.Files = []string{evil}
	w.Notes = append(w.Notes, evil)
	w.Policies[0].File = evil
	for i := range w.Workloads {
		w.Workloads[i].Title = evil
	}
	o := options(t, w, "TCP/80", "fqdn:"+evil)
	o.Reasons = true
	j := judge(t, w)
	m := j.Matrix(o)
	var page strings.Builder
	if err := m.HTML(&page, tools.Page{Judge: j, Externals: o.Externals}); err != nil {
		t.Fatal(err)
	}
	s := page.String()
	if strings.Count(s, "<script") != 2 || strings.Count(s, "</script") != 2 || strings.Contains(s, "<img") {
		t.Error("a name is markup")
	}
	trace := judge(t, w).Trace(w.WorkloadParty(0), o.Externals[0], o.Ports[0], tools.Request{}).Text()
	for what, text := range map[string]string{"page": s, "table": m.Text(), "trace": trace} {
		if strings.ContainsAny(text, "\x1b\u202e") {
			t.Errorf("%s: control characters", what)
		}
	}
	if strings.Contains(s, "http://") || strings.Contains(s, "https://") || strings.Contains(s, "url(") || strings.Contains(s, "src=\"") {
		t.Error("the page asks for something from elsewhere")
	}
}
