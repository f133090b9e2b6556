package main

import (
	"encoding/json"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/spf13/cobra"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/testing/protocmp"

	"portcullis/agent/api"
	"portcullis/bpf/abi"
)

// Every listing, in every form.
func TestListings(t *testing.T) {
	socket := serveWire(t, &wire{})
	for name, args := range map[string]string{
		"status":            "status",
		"endpoint-list":     "endpoint list",
		"endpoint-get":      "endpoint get default/deathstar",
		"endpoint-waiting":  "endpoint get 25",
		"identity-list":     "identity list",
		"identity-get":      "identity get 5163 default/deathstar",
		"identity-reserved": "identity list --reserved",
		"ipcache-list":      "ipcache list",
		"ipcache-get":       "ipcache get 10.2.0.2",
		"session-list":      "session list",
		"fqdn-list":         "fqdn list",
		"policy-get":        "policy get",
	} {
		for _, form := range []string{"table", "json", "yaml"} {
			t.Run(name+"/"+form, func(t *testing.T) {
				got := command(t.Context(), socket, "", append(strings.Fields(args), "-o", form)...)
				if got.code != exitOK || got.stderr != "" {
					t.Fatalf("status %d, stderr %q", got.code, got.stderr)
				}
				if form == "json" && !json.Valid([]byte(got.stdout)) {
					t.Error("not JSON")
				}
				golden(t, name+"."+form, got.stdout)
			})
		}
	}
}

// An endpoint and an identity are found by each of their names.
func TestGetByEveryName(t *testing.T) {
	socket := serveWire(t, &wire{})
	for want, refs := range map[string][]string{
		"endpoint-get.table":     {"24", "3f0f5d8e-93a4-4bb5-8d35-5a0b1c2d3e4f", "3F0F5D8E-93A4-4BB5-8D35-5A0B1C2D3E4F", "default/deathstar"},
		"endpoint-waiting.table": {"25", "a7c6d1b0-0000-4000-8000-000000000025"},
	} {
		for _, ref := range refs {
			got := command(t.Context(), socket, "", "endpoint", "get", ref)
			golden(t, want, got.stdout)
		}
	}
	byWorkload := command(t.Context(), socket, "", "identity", "get", "default/deathstar")
	byNumber := command(t.Context(), socket, "", "identity", "get", "19842", "default/deathstar")
	if byWorkload != byNumber || byNumber.code != exitOK {
		t.Errorf("by workload %+v, by number and workload %+v", byWorkload, byNumber)
	}
	// No workload of this node is default/xwing, but a service account is.
	if got := command(t.Context(), socket, "", "identity", "get", "default/xwing"); got.code != exitOK || !strings.Contains(got.stdout, "5163") {
		t.Errorf("by service account: %+v", got)
	}
}

// Names are asked for by endpoint and by pattern.
func TestNamesOfOne(t *testing.T) {
	w := &wire{}
	socket := serveWire(t, w)
	got := command(t.Context(), socket, "", "fqdn", "list", "default/deathstar", "--name", "*.example.com")
	r := w.requests[len(w.requests)-1].(*api.ListNamesRequest)
	if got.code != exitOK || strings.Contains(got.stdout, "example.org") || !strings.Contains(got.stdout, "192.0.2.10") ||
		r.Uid != "3f0f5d8e-93a4-4bb5-8d35-5a0b1c2d3e4f" || r.Name != "*.example.com" {
		t.Errorf("asked for %v, %+v", r, got)
	}
	if got := command(t.Context(), socket, "", "fqdn", "list", "default/nobody"); got.code != exitFailed || !strings.Contains(got.stderr, "endpoint list") {
		t.Errorf("of nobody: %+v", got)
	}
}

func TestEmptyListIsAList(t *testing.T) {
	socket := serveWire(t, &wire{empty: true})
	if got := command(t.Context(), socket, "", "endpoint", "list", "-o", "json"); got.stdout != "[]\n" || got.code != exitOK {
		t.Errorf("no endpoints: %+v", got)
	}
}

func TestUnhealthyStatusFails(t *testing.T) {
	socket := serveWire(t, &wire{unhealthy: true})
	got := command(t.Context(), socket, "", "status")
	if got.code != exitFailed || got.stderr != "" {
		t.Errorf("status %d, stderr %q", got.code, got.stderr)
	}
	golden(t, "status-unhealthy.table", got.stdout)
}

func TestSocketFromFlagBeatsEnvironment(t *testing.T) {
	socket := serveWire(t, &wire{})
	if got := command(t.Context(), "/nonexistent", "", "session", "list", "--socket", socket); got.code != exitOK {
		t.Errorf("--socket did not win: %+v", got)
	}
	if got := command(t.Context(), socket, "", "session", "list", "--socket", "/nonexistent/agent.sock"); got.code != exitFailed ||
		!strings.Contains(got.stderr, "/nonexistent/agent.sock") || !strings.Contains(got.stderr, "PORTCULLIS_SOCKET") {
		t.Errorf("no agent: %+v", got)
	}
}

func TestOutputFromEnvironment(t *testing.T) {
	var out strings.Builder
	env := &Env{Args: []string{"version"}, Stdout: &out, Stderr: &out, Now: time.Now, Getenv: func(k string) string {
		return map[string]string{"PORTCULLIS_OUTPUT": "json"}[k]
	}}
	if code := run(t.Context(), env); code != exitOK || !json.Valid([]byte(out.String())) {
		t.Errorf("status %d, %s", code, out.String())
	}
}

func TestHelp(t *testing.T) {
	for args, want := range map[string]string{
		"help": "Available Commands", "--help": "Available Commands", "help status": "portcullis status [flags]",
		"help policy import": "portcullis policy import", "endpoint get --help": "NAMESPACE/NAME | UID | ID", "help completion zsh": "fpath",
		"help help": "Explain a command",
	} {
		got := command(t.Context(), "/nonexistent", "", strings.Fields(args)...)
		if got.code != exitOK || got.stderr != "" || !strings.Contains(got.stdout, want) {
			t.Errorf("%q: status %d, stderr %q, no %q in %q", args, got.code, got.stderr, want, got.stdout)
		}
	}
}

// The scripts are such as their shells read, and what they call answers.
func TestCompletion(t *testing.T) {
	for _, shell := range []string{"bash", "zsh", "fish"} {
		got := command(t.Context(), "/nonexistent", "", "completion", shell)
		if got.code != exitOK || got.stderr != "" || !strings.Contains(got.stdout, "__complete") {
			t.Errorf("%s: status %d, stderr %q, %d bytes", shell, got.code, got.stderr, len(got.stdout))
		}
		path, err := exec.LookPath(shell)
		if err != nil {
			t.Logf("there is no %s here to read its script", shell)
			continue
		}
		check := exec.Command(path, "-n")
		check.Stdin = strings.NewReader(got.stdout)
		if out, err := check.CombinedOutput(); err != nil {
			t.Errorf("%s does not read its script: %v\n%s", shell, err, out)
		}
	}
	for args, want := range map[string][]string{
		"endpoint ":        {"get\t", "list\t"},
		"status -o ":       {"json", "table", "yaml"},
		"completion ":      {"bash\t", "fish\t", "zsh\t"},
		"help endpoint l":  {"list\t"},
		"agent --print-co": {"--print-config\t"},
	} {
		words := strings.Split(args, " ")
		got := command(t.Context(), "/nonexistent", "", append([]string{"__complete"}, words...)...)
		for _, w := range want {
			if !strings.Contains(got.stdout, w) {
				t.Errorf("%q completes to %q, not to %q", args, got.stdout, w)
			}
		}
	}
}

func TestVersion(t *testing.T) {
	got := command(t.Context(), "/nonexistent", "", "version", "-o", "json")
	var v map[string]any
	if err := json.Unmarshal([]byte(got.stdout), &v); err != nil || got.code != exitOK {
		t.Fatalf("%+v: %v", got, err)
	}
	for _, key := range []string{"version", "revision", "modified", "go", "platform", "abi"} {
		if _, ok := v[key]; !ok {
			t.Errorf("version -o json has no %s: %s", key, got.stdout)
		}
	}
	if v["go"] != runtime.Version() || v["abi"] != float64(abi.ABIVersion) || v["version"] == "" {
		t.Errorf("version -o json: %s", got.stdout)
	}
	if got := command(t.Context(), "/nonexistent", "", "version"); !strings.HasPrefix(got.stdout, "portcullis ") || strings.Count(got.stdout, "\n") != 1 {
		t.Errorf("version: %+v", got)
	}
}

// Wrong command lines end with status 2 and name the mistake; none of them
// needs an agent.
func TestUsage(t *testing.T) {
	for args, want := range map[string]string{
		"":                                  "Available Commands",
		"endpoint":                          "Available Commands",
		"sttus":                             "did you mean status?",
		"endpoint lst":                      "did you mean list or get?",
		"status now":                        "takes no arguments",
		"status --colour":                   "unknown flag: --colour",
		"status -o xml":                     "want table, json or yaml",
		"monitor -o yaml":                   "not yaml",
		"monitor --verdict allowed":         "want one of drop, pass, hold",
		"monitor --reason bad --port 99999": "there is no port 99999",
		"monitor --port 4294967376":         "there is no port",
		"monitor --label =":                 "has no key",
		"endpoint get":                      "accepts 1 arg(s)",
		"endpoint get deathstar":            "names no endpoint",
		"endpoint get a/b/c":                "names no endpoint",
		"endpoint get -- -3":                "names no endpoint",
		"identity get":                      "requires at least 1 arg(s)",
		"identity get xwing":                "names no identity",
		"ipcache get":                       "accepts 1 arg(s)",
		"ipcache get default/xwing":         "is not an IP address",
		"session reset":                     "accepts 1 arg(s)",
		"endpoint relabel":                  "accepts 1 arg(s)",
		"endpoint relabel 24":               "name every label",
		"endpoint relabel deathstar -l a=b": "names no endpoint",
		"endpoint relabel 24 -l =b":         "each key once",
		"endpoint relabel 24 -l a=b,a":      "each key once",
		"lab run a --node n --port http":    "--port",
		"completion":                        "Available Commands",
		"completion csh":                    `there is no command "portcullis completion csh"`,
		"completion bash now":               "takes no arguments",
		"help no-such":                      `there is no command "portcullis no-such"`,
		"help sttus":                        "did you mean status?",
		"help endpoint lst":                 "did you mean list or get?",
		"help endpoint list x":              `there is no command "portcullis endpoint list x"`,
		"policy import":                     "-f FILE",
		"policy import deny.yaml":           "takes no arguments",
		"policy validate":                   "-f FILE",
		"policy matrix":                     "-f PATH",
		"policy matrix -f a --live":         "not both",
		"policy matrix -f a -o csv":         "want table, json, yaml or html",
		"policy trace":                      "--from, --to and --port",
		"policy diff --live":                "-f NEW",
		"policy trace --from a/b --to c/d --port 80-90/TCP -f a":     "is a range",
		"policy matrix -f ../../docs/examples --ports TCP/80,TCP":    "is neither a number",
		"policy trace -o html --from a/b --to c/d --port 1/TCP -f a": "want table, json or yaml",
		"policy get deny":                "KIND/NAMESPACE/NAME",
		"policy delete":                  "--all",
		"policy delete --all netpol/a/b": "--all",
		"policy delete a b/c":            `"a" does not name a policy`,
	} {
		got := command(t.Context(), "/nonexistent", "", strings.Fields(args)...)
		if got.code != exitUsage || got.stdout != "" || !strings.Contains(got.stderr, want) {
			t.Errorf("%q: status %d, stdout %q, stderr %q; want status 2 and %q", args, got.code, got.stdout, got.stderr, want)
		}
	}
}

func TestFailures(t *testing.T) {
	socket := serveWire(t, &wire{})
	for args, want := range map[string]string{
		"ipcache get 10.9.9.9":                                       "no binding of 10.9.9.9 is known here",
		"ipcache get 10.2.0.3":                                       "is quarantined: see `portcullis endpoint get 25`",
		"endpoint get 99":                                            "this node has no endpoint 99",
		"endpoint relabel 99 -l a=b":                                 "this node has no endpoint 99",
		"endpoint get default/xwing":                                 "this node has no endpoint default/xwing",
		"identity get 5163 77 default/nobody":                        "no identity 77, default/nobody is in use",
		"session reset n9":                                           `no peer "n9"`,
		"policy get netpol/default/x":                                "there is no policy NetworkPolicy/default/x",
		"policy delete netpol/default/x":                             "nothing was deleted",
		"policy import -f /nonexistent/a.yaml":                       "/nonexistent/a.yaml",
		"policy validate -f " + t.TempDir():                          "holds no",
		"policy validate -f /nonexistent -f /nothere":                "/nothere",
		"policy matrix -f /nonexistent -f /nothere":                  "/nothere",
		"policy matrix -f " + t.TempDir():                            "holds no",
		"policy diff -f /nonexistent":                                "/nonexistent",
		"policy matrix -f ../../docs/examples/networkpolicy-L4.yaml": "no workloads",
		"policy matrix -f ../../docs/examples/starwars-app.yaml --external reserved:nobody":                           "no reserved identity",
		"policy trace --from default/nobody --to default/xwing --port 1/TCP -f ../../docs/examples/starwars-app.yaml": `no workload "default/nobody"`,
	} {
		got := command(t.Context(), socket, "", strings.Fields(args)...)
		if got.code != exitFailed || got.stdout != "" || !strings.Contains(got.stderr, want) {
			t.Errorf("%q: status %d, stdout %q, stderr %q; want status 1 and %q", args, got.code, got.stdout, got.stderr, want)
		}
	}
}

func TestExplain(t *testing.T) {
	for code, want := range map[codes.Code]string{
		codes.Unavailable:      "lost the agent",
		codes.DeadlineExceeded: "did not answer",
		codes.Unimplemented:    "older than this binary",
		codes.Internal:         "the message",
	} {
		if got := explain(status.Error(code, "the message")).Error(); !strings.Contains(got, want) || strings.Contains(got, "rpc error") {
			t.Errorf("%s: %q, want %q", code, got, want)
		}
	}
}

func TestSessionReset(t *testing.T) {
	socket := serveWire(t, &wire{})
	for peer, want := range map[string]string{
		"n1": "Session to n1 closed, 2 bindings forgotten.\n",
		"n3": "There was no session to n3.\n",
	} {
		if got := command(t.Context(), socket, "", "session", "reset", peer); got.code != exitOK || got.stdout != want {
			t.Errorf("reset %s: %+v", peer, got)
		}
	}
}

// ---- policies -------------------------------------------------------------

func netpol(name, spec string) string {
	return "apiVersion: networking.k8s.io/v1\nkind: NetworkPolicy\nmetadata: {name: " + name + ", namespace: default}\nspec: {podSelector: {}, " + spec + "}\n"
}

func TestPolicyImport(t *testing.T) {
	w := &wire{}
	socket := serveWire(t, w)
	dir := t.TempDir()
	for name, content := range map[string]string{
		"b.yaml": netpol("b", "policyTypes: [Ingress]"), "a.json": `{"apiVersion":"networking.k8s.io/v1","kind":"NetworkPolicy","metadata":{"name":"a"},"spec":{"podSelector":{}}}`,
		"notes.txt": "not a policy", "sub.yaml/x.yaml": netpol("x", ""),
	} {
		path := filepath.Join(dir, name)
		if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(path, []byte(content), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	stdin := netpol("old", "policyTypes: [Ingress]")
	got := command(t.Context(), socket, stdin, "policy", "import", "-f", dir, "-f", "-")
	want := "NetworkPolicy/default/a imported\nNetworkPolicy/default/b imported\nNetworkPolicy/default/old replaced\n"
	if got.code != exitOK || got.stdout != want || got.stderr != "" {
		t.Errorf("import: %+v", got)
	}
	files := w.requests[0].(*api.ImportPoliciesRequest).GetFiles()
	if len(files) != 3 || files[0].GetName() != filepath.Join(dir, "a.json") || files[2].GetName() != "standard input" || string(files[2].GetContent()) != stdin {
		t.Errorf("the agent was sent %v", files)
	}
}

const unsupported = `apiVersion: networking.k8s.io/v1
kind: NetworkPolicy
metadata: {name: broken}
spec:
  podSelector: {}
  ingress:
  - from:
    - shinyNewPeer: {}
`

// What import refuses validate refuses, with the same words.
func TestPolicyProblems(t *testing.T) {
	socket := serveWire(t, &wire{})
	for _, verb := range []string{"import", "validate"} {
		got := command(t.Context(), socket, unsupported, "policy", verb, "-f", "-")
		if got.code != exitFailed || got.stdout != "" {
			t.Errorf("%s: %+v", verb, got)
		}
		for _, want := range []string{"standard input:8: document 1: spec.ingress[0].from[0].shinyNewPeer: ", "1 problem\n"} {
			if !strings.Contains(got.stderr, want) {
				t.Errorf("%s does not say %q: %s", verb, want, got.stderr)
			}
		}
		got = command(t.Context(), socket, unsupported, "policy", verb, "-f", "-", "-o", "json")
		var res struct {
			Problems []struct{ File, Field string }
		}
		if err := json.Unmarshal([]byte(got.stdout), &res); err != nil || got.code != exitFailed || got.stderr != "" ||
			len(res.Problems) != 1 || res.Problems[0].Field != "spec.ingress[0].from[0].shinyNewPeer" {
			t.Errorf("%s -o json: %+v (%v)", verb, got, err)
		}
	}
}

func TestPolicyValidateNeedsNoAgent(t *testing.T) {
	got := command(t.Context(), "/nonexistent", netpol("fine", "policyTypes: [Ingress]"), "policy", "validate", "-f", "-")
	if got.code != exitOK || got.stdout != "NetworkPolicy/default/fine valid\n" || got.stderr != "" {
		t.Errorf("validate: %+v", got)
	}
}

// What has a meaning but no datapath is valid, and import refuses it; both say
// where.
func TestPolicyNotEnforced(t *testing.T) {
	const policy = `apiVersion: cilium.io/v2
kind: CiliumClusterwideNetworkPolicy
metadata: {name: names}
spec:
  endpointSelector: {}
  egress: [{authentication: {mode: test-always-fail}}]
---
apiVersion: cilium.io/v2
kind: CiliumCIDRGroup
metadata: {name: g}
spec: {externalCIDRs: [10.0.0.0/8]}
`
	const first = "standard input:6: document 1: spec.egress[0].authentication.mode: not enforced yet: "
	got := command(t.Context(), "/nonexistent", policy, "policy", "validate", "-f", "-")
	if got.code != exitOK || got.stdout != "CiliumClusterwideNetworkPolicy/names valid, but import refuses it\nCiliumCIDRGroup/g valid\n" ||
		!strings.Contains(got.stderr, first) {
		t.Errorf("validate: %+v", got)
	}
	got = command(t.Context(), serveWire(t, &wire{}), policy, "policy", "import", "-f", "-")
	if got.code != exitFailed || got.stdout != "" || !strings.Contains(got.stderr, first) || !strings.Contains(got.stderr, "1 problem") {
		t.Errorf("import: %+v", got)
	}
}

func TestPolicyGetAndDelete(t *testing.T) {
	w := &wire{}
	socket := serveWire(t, w)
	if got := command(t.Context(), socket, "", "policy", "get", "netpol/default/deny"); got.code != exitOK || got.stdout != policySource {
		t.Errorf("get: %+v", got)
	}
	if got := command(t.Context(), socket, "", "policy", "delete", "netpol/default/deny"); got.stdout != "NetworkPolicy/default/deny deleted\n" {
		t.Errorf("delete: %+v", got)
	}
	if got := command(t.Context(), socket, "", "policy", "delete", "--all"); got.stdout != "NetworkPolicy/default/deny deleted\n" {
		t.Errorf("delete --all: %+v", got)
	}
	want := &api.DeletePoliciesRequest{All: true}
	if diff := cmp.Diff(want, w.requests[1], protocmp.Transform()); diff != "" {
		t.Errorf("the agent was asked (-want +got):\n%s", diff)
	}
}

func TestImportIsBounded(t *testing.T) {
	endless := strings.NewReader(strings.Repeat("#", maxPolicyBytes+1))
	var stderr strings.Builder
	code := run(t.Context(), &Env{Args: []string{"policy", "validate", "-f", "-"}, Stdin: endless, Stdout: io.Discard, Stderr: &stderr,
		Getenv: func(string) string { return "" }, Now: time.Now})
	if code != exitFailed || !strings.Contains(stderr.String(), "exceed 16 MiB") {
		t.Errorf("status %d, %s", code, stderr.String())
	}
}

// The manual shows what the commands print: each table stands in it.
func TestManualShowsTheRealOutput(t *testing.T) {
	manual, err := os.ReadFile("../../docs/cli.md")
	if err != nil {
		t.Fatal(err)
	}
	tables, err := filepath.Glob("testdata/*.table")
	if err != nil || len(tables) < 8 {
		t.Fatalf("golden tables: %v, %v", tables, err)
	}
	for _, table := range tables {
		want, err := os.ReadFile(table)
		if err != nil {
			t.Fatal(err)
		}
		if name := filepath.Base(table); name != "identity-list.table" && !strings.Contains(string(manual), string(want)) {
			t.Errorf("docs/cli.md does not show %s as it is: copy it there", name)
		}
	}
	for _, newCmd := range commands {
		top := newCmd(&Env{})
		all := []*cobra.Command{top}
		if name := top.Name(); name != "lab" && name != "probe" { // no part of an installation; the manual only names them
			all = append(all, top.Commands()...)
		}
		for _, cmd := range all {
			name := strings.TrimPrefix(cmd.CommandPath(), "portcullis ")
			if !strings.Contains(string(manual), name) {
				t.Errorf("docs/cli.md does not mention %q", name)
			}
			if len(cmd.Commands()) == 0 && cmd.Short == "" {
				t.Errorf("%q has no short help", name)
			}
		}
	}
}

// A relabel names every label, and the workload by its UID.
func TestEndpointRelabel(t *testing.T) {
	w := &wire{}
	socket := serveWire(t, w)
	got := command(t.Context(), socket, "", "endpoint", "relabel", "default/deathstar", "-l", "org=alliance,class=museum", "--service-account", "guide", "--wait", "2s")
	want := "default/deathstar is default/deathstar[class=museum org=alliance] now: active, generation 91234567890.\n" +
		"Revoked at 2 nodes that had a lease on its former identity.\n"
	if got.code != exitOK || got.stdout != want || got.stderr != "" {
		t.Errorf("status %d, stdout %q, stderr %q", got.code, got.stdout, got.stderr)
	}
	r := w.requests[len(w.requests)-1].(*api.RelabelWorkloadRequest)
	if r.Uid != "3f0f5d8e-93a4-4bb5-8d35-5a0b1c2d3e4f" || len(r.Labels) != 2 || r.Labels["org"] != "alliance" || r.Labels["class"] != "museum" ||
		r.ServiceAccount == nil || *r.ServiceAccount != "guide" || r.Wait.AsDuration() != 2*time.Second || r.Ports != nil {
		t.Errorf("asked for %+v", r)
	}
	got = command(t.Context(), socket, "", "endpoint", "relabel", "25", "-l", "")
	r = w.requests[len(w.requests)-1].(*api.RelabelWorkloadRequest)
	if got.code != exitOK || got.stdout != "a7c6d1b0-0000-4000-8000-000000000025 is - now: quarantined: waits.\n" || len(r.Labels) != 0 || r.ServiceAccount != nil || r.Wait != nil {
		t.Errorf("status %d, stdout %q, stderr %q, asked for %+v", got.code, got.stdout, got.stderr, r)
	}
}
