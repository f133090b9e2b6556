package main

import (
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

// fromClone runs a command line as one types it in a clone of the repository.
func fromClone(t *testing.T, socket, args string) (got result) {
	t.Helper()
	t.Run(args, func(t *testing.T) {
		t.Chdir("../..")
		got = command(t.Context(), socket, "", strings.Fields(args)...)
	})
	return got
}

const deployment = "note: no pods are given of Deployment default/deathstar: one workload without an address stands for the pods of each\n"

// The manual's examples.
func TestPolicyTools(t *testing.T) {
	const app, l4 = "-f docs/examples/starwars-app.yaml", "-f docs/examples/networkpolicy-L4.yaml"
	for name, args := range map[string]string{
		"policy-matrix.table": "policy matrix " + app + " " + l4 + " --ports TCP/80",
		"policy-trace.table":  "policy trace --from default/xwing --to default/deathstar --port 80/TCP " + app + " " + l4,
		"policy-diff.table":   "policy diff " + l4 + " " + app + " --ports TCP/80",
		"policy-matrix.json":  "policy matrix -o json " + app + " " + l4 + " --ports TCP/80 --external reserved:host",
		"policy-trace.json":   "policy trace -o json --from default/xwing --to default/deathstar --port 80/TCP " + app + " " + l4,
		"policy-diff.json":    "policy diff -o json " + l4 + " " + app + " --ports TCP/80",
	} {
		got := fromClone(t, "/nonexistent", args)
		if got.code != exitOK || got.stderr != deployment {
			t.Errorf("%s: status %d, stderr %q", args, got.code, got.stderr)
		}
		if strings.HasSuffix(name, ".json") && !json.Valid([]byte(got.stdout)) {
			t.Errorf("%s: not JSON", name)
		}
		golden(t, name, got.stdout)
	}
	// What nothing names changes too.
	other := fromClone(t, "/nonexistent", "policy diff "+l4+" "+app)
	if other.code != exitOK || other.stderr != deployment+"note: of the ports that nothing names TCP/1 and UDP/1 stand for all\n" ||
		!strings.Contains(other.stdout, "TCP/1\n  default/deathstar -> default/deathstar: blocked, was allowed\n") || !strings.HasSuffix(other.stdout, "\n10 of 63 pairs change: 10 are blocked now, 0 are no more\n") {
		t.Errorf("%+v", other)
	}
	got := fromClone(t, "/nonexistent", "policy matrix -o html "+app+" "+l4)
	again := fromClone(t, "/nonexistent", "policy matrix -o html "+app+" "+l4)
	if got.code != exitOK || !strings.HasPrefix(got.stdout, "<!doctype html>") || got.stdout != again.stdout {
		t.Errorf("html: status %d, %q", got.code, got.stderr)
	}
}

// The examples that need no cluster, typed as they stand.
func TestExamplesWithoutCluster(t *testing.T) {
	text, err := os.ReadFile("../../docs/examples/README.md")
	if err != nil {
		t.Fatal(err)
	}
	typed := 0
	for line := range strings.Lines(string(text)) {
		args, ok := strings.CutPrefix(strings.TrimSpace(line), "portcullis policy ")
		if !ok {
			continue
		}
		typed++
		args, _, _ = strings.Cut(args, " > ")
		if got := fromClone(t, "/nonexistent", "policy "+args); got.code != exitOK || got.stdout == "" {
			t.Errorf("%s: %+v", args, got)
		}
	}
	if typed != 5 {
		t.Errorf("%d examples, want 5", typed)
	}
}

// What the running agent knows: its endpoint, whom it holds bindings of, its
// policy. The other nodes' policies are not known.
func TestPolicyToolsLive(t *testing.T) {
	socket := serveWire(t, &wire{})
	got := fromClone(t, socket, "policy matrix --live --ports TCP/80,TCP/http")
	if got.code != exitOK || !strings.Contains(got.stderr, "endpoint 25 has no identity yet") || !strings.Contains(got.stderr, "by what this agent knows") {
		t.Errorf("status %d, stderr %q", got.code, got.stderr)
	}
	golden(t, "policy-live.table", got.stdout)
	got = fromClone(t, socket, "policy trace --live --from 10.1.0.3 --to default/deathstar --port http/TCP")
	if got.code != exitOK || !strings.Contains(got.stdout, "under default deny by NetworkPolicy default/deny") || !strings.Contains(got.stdout, "on another node, whose policies are not known here") {
		t.Errorf("%+v", got)
	}
	got = fromClone(t, socket, "policy diff --live -f docs/examples/networkpolicy-L4.yaml --ports TCP/80")
	if got.code != exitOK || !strings.Contains(got.stdout, "default/deathstar -> default/deathstar: allowed, was blocked") {
		t.Errorf("%+v", got)
	}
	if got := fromClone(t, socket, "policy diff --live -f a -f b"); got.code != exitUsage && got.code != exitFailed {
		t.Errorf("%+v", got)
	}
	if got := fromClone(t, "/nonexistent", "policy matrix --live"); got.code != exitFailed || !strings.Contains(got.stderr, "the agent is not running") {
		t.Errorf("%+v", got)
	}
}

// Directories are read with all below them, and every problem of every file is
// told.
func TestManifestFiles(t *testing.T) {
	dir := t.TempDir()
	for name, text := range map[string]string{
		"b.yaml": "{apiVersion: v1, kind: Pod, metadata: {name: b}}", "deep/er/a.json": `{"apiVersion":"v1","kind":"Pod","metadata":{"name":"a"}}`,
		"deep/p.yml": netpol("p", "policyTypes: [Ingress]"), "readme.md": "not a manifest",
	} {
		path := filepath.Join(dir, name)
		if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(path, []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	got := command(t.Context(), "/nonexistent", "{apiVersion: v1, kind: Pod, metadata: {name: c}}", "policy", "matrix", "-f", dir, "-f", "-", "-o", "json")
	var m struct{ Workloads []string }
	if err := json.Unmarshal([]byte(got.stdout), &m); err != nil || fmt.Sprint(m.Workloads) != "[default/a default/b default/c]" {
		t.Errorf("%+v (%v)", got, err)
	}
	got = command(t.Context(), "/nonexistent", netpol("q", "shiny: 1")+"---\n{apiVersion: projectcalico.org/v3, kind: Tier, metadata: {name: a}}", "policy", "matrix", "-f", dir, "-f", "-")
	for _, want := range []string{"standard input:4: document 1: spec.shiny: unknown field", "standard input:6: document 2: projectcalico.org/v3 Tier may be policy", "2 problems"} {
		if got.code != exitFailed || got.stdout != "" || !strings.Contains(got.stderr, want) {
			t.Errorf("no %q in %+v", want, got)
		}
	}
}

// A group of addresses that is neither beside the policy nor in force is told,
// and changes nothing else.
func TestPolicyUnknownGroup(t *testing.T) {
	const policy = "apiVersion: cilium.io/v2\nkind: CiliumNetworkPolicy\nmetadata: {name: p}\nspec:\n  endpointSelector: {}\n  egressDeny: [{toCIDRSet: [{cidrGroupRef: g}]}]\n"
	const note = "note: CiliumNetworkPolicy default/p names CiliumCIDRGroup g, which is not there: until it is, the policy denies by it all of world\n"
	const group = "---\napiVersion: cilium.io/v2\nkind: CiliumCIDRGroup\nmetadata: {name: g}\nspec: {externalCIDRs: [192.0.2.0/24]}\n"
	for _, c := range []struct {
		verb, stdin, want string
		inForce           []string
	}{
		{"validate", policy, note, nil}, {"validate", policy + group, "", nil},
		{"import", policy, note, nil}, {"import", policy + group, "", nil},
		{"import", policy, "", []string{"g"}}, {"import", policy, note, []string{"h"}},
	} {
		got := command(t.Context(), serveWire(t, &wire{groups: c.inForce}), c.stdin, "policy", c.verb, "-f", "-")
		if got.code != exitOK || got.stderr != c.want || got.stdout == "" {
			t.Errorf("%+v: %+v", c, got)
		}
	}
}

// Services and their slices are taken, and one that is a name for another is told.
func TestPolicyServices(t *testing.T) {
	const external = "apiVersion: v1\nkind: Service\nmetadata: {name: db}\nspec: {type: ExternalName, externalName: db.example.com}\n"
	const slice = "apiVersion: discovery.k8s.io/v1\nkind: EndpointSlice\nmetadata: {name: db-1, labels: {kubernetes.io/service-name: db}}\naddressType: IPv4\nendpoints: [{addresses: [192.0.2.7]}]\n"
	got := command(t.Context(), "/nonexistent", external+"---\n"+slice, "policy", "validate", "-f", "-")
	if got.code != exitOK || got.stderr != "note: Service default/db is a name for \"db.example.com\" (ExternalName): toServices means nobody by it\n" ||
		got.stdout != "Service/default/db valid\nEndpointSlice/default/db-1 valid\n" {
		t.Errorf("%+v", got)
	}
}
