package main

import (
	"context"
	"encoding/json"
	"io"
	"net/netip"
	"os"
	"path/filepath"
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
	"portcullis/identity"
	"portcullis/observe/flow"
)

// Every listing, in every form.
func TestListings(t *testing.T) {
	socket := serveWire(t, &wire{})
	for name, args := range map[string]string{
		"status":            "status",
		"endpoint-list":     "endpoint list",
		"identity-list":     "identity list",
		"identity-reserved": "identity list --reserved",
		"ipcache-list":      "ipcache list",
		"ipcache-get":       "ipcache get 10.2.0.2",
		"session-list":      "session list",
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

// Wrong command lines end with status 2 and name the mistake; none of them
// needs an agent.
func TestUsage(t *testing.T) {
	for args, want := range map[string]string{
		"":                                  "Available Commands",
		"endpoint":                          "Available Commands",
		"sttus":                             "did you mean status?",
		"endpoint lst":                      "did you mean list?",
		"status now":                        "takes no arguments",
		"status --colour":                   "unknown flag: --colour",
		"status -o xml":                     "want table, json or yaml",
		"monitor -o yaml":                   "not yaml",
		"monitor --verdict allowed":         "want one of drop, pass, hold",
		"monitor --reason bad --port 99999": "there is no port 99999",
		"monitor --port 4294967376":         "there is no port",
		"monitor --label =":                 "has no key",
		"ipcache get":                       "accepts 1 arg(s)",
		"ipcache get default/xwing":         "is not an IP address",
		"session reset":                     "accepts 1 arg(s)",
		"policy import":                     "-f FILE",
		"policy import deny.yaml":           "takes no arguments",
		"policy validate":                   "-f FILE",
		"policy get deny":                   "KIND/NAMESPACE/NAME",
		"policy delete":                     "--all",
		"policy delete --all netpol/a/b":    "--all",
		"policy delete a b/c":               `"a" does not name a policy`,
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
		"ipcache get 10.9.9.9":                        "no binding of 10.9.9.9 is known here",
		"session reset n9":                            `no peer "n9"`,
		"policy get netpol/default/x":                 "there is no policy NetworkPolicy/default/x",
		"policy delete netpol/default/x":              "nothing was deleted",
		"policy import -f /nonexistent/a.yaml":        "/nonexistent/a.yaml",
		"policy validate -f " + t.TempDir():           "holds no",
		"policy validate -f /nonexistent -f /nothere": "/nothere",
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

// ---- monitor --------------------------------------------------------------

func flowEvent(verdict abi.Verdict, reason abi.Reason) *api.MonitorResponse {
	r := flow.Record{
		Time: now, BootTime: 100e9, Node: "n2", Verdict: verdict, Reason: reason, Direction: abi.DirIngress, State: abi.FlowNew,
		Protocol: 6, TCPFlags: 2, Length: 74, Endpoint: 24, Ifindex: 7,
		Source: flow.End{IP: netip.MustParseAddr("10.1.0.3"), Port: 43210, Identity: 5163, Text: "default/xwing[org=alliance]",
			Labels: []string{"k8s:org=alliance"}, Workload: "default/xwing"},
		Dest: flow.End{IP: netip.MustParseAddr("10.2.0.2"), Port: 80, Identity: 19842, Text: "default/deathstar[org=empire]",
			Labels: []string{"k8s:org=empire"}, Workload: "default/deathstar", Endpoint: 24},
		Evidence: identity.EvidenceLease, Generation: 42e9, Stamp: 7, BindingAge: 3 * time.Second, Policy: "CiliumNetworkPolicy/default/rule1", Rule: 9,
	}
	return &api.MonitorResponse{Event: &api.MonitorResponse_Flow{Flow: api.FromRecord(&r)}}
}

func events() []*api.MonitorResponse {
	return []*api.MonitorResponse{
		flowEvent(abi.VerdictPass, abi.ReasonNone),
		{Event: &api.MonitorResponse_Lost{Lost: &api.LostEvents{Count: 3, Where: "kernel"}}},
		{}, // of a later version
		flowEvent(abi.VerdictDrop, abi.ReasonPolicyDenied),
	}
}

func TestMonitor(t *testing.T) {
	w := &wire{events: events()}
	socket := serveWire(t, w)
	for _, form := range []string{"table", "json"} {
		got := command(t.Context(), socket, "", "monitor", "-n", "2", "-o", form)
		wantErr := "Listening for events. Press Ctrl-C to quit.\n3 events lost: the kernel's ring was full\n"
		if got.code != exitOK || got.stderr != wantErr {
			t.Errorf("status %d, stderr %q", got.code, got.stderr)
		}
		golden(t, "monitor."+form, got.stdout)
	}
	if got := command(t.Context(), socket, "", "monitor", "-n", "1", "-v", "-t"); !strings.Contains(got.stdout, "(default/xwing [k8s:org=alliance])") ||
		!strings.HasPrefix(got.stdout, "Nov 2") {
		t.Errorf("verbose, with time: %s", got.stdout)
	}
}

func TestMonitorSendsItsFilters(t *testing.T) {
	w := &wire{events: events()}
	got := command(t.Context(), serveWire(t, w), "", "monitor", "-n", "1", "--verdict", "drop,pass", "--reason", "none", "--direction", "ingress",
		"--ip", "10.1.0.0/16", "--label", "org=alliance", "--label", "k8s:class", "--port", "80", "--port", "443", "--protocol", "TCP",
		"--endpoint", "24", "--workload", "default/xwing")
	if got.code != exitOK {
		t.Fatalf("%+v", got)
	}
	want := &api.MonitorRequest{
		Verdicts: []string{"drop", "pass"}, Reasons: []string{"none"}, Directions: []string{"ingress"}, Prefixes: []string{"10.1.0.0/16"},
		Labels: []string{"org=alliance", "k8s:class"}, Ports: []uint32{80, 443}, Protocols: []string{"TCP"}, Endpoints: []uint32{24},
		Workloads: []string{"default/xwing"},
	}
	if diff := cmp.Diff(want, w.requests[0], protocmp.Transform()); diff != "" {
		t.Errorf("the agent was asked (-want +got):\n%s", diff)
	}
}

// Ctrl-C is the way to end it: no error.
func TestMonitorInterrupted(t *testing.T) {
	socket := serveWire(t, &wire{events: events()})
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	stop := &onWrite{after: 2, do: cancel} // both events are there
	var stderr strings.Builder
	code := run(ctx, &Env{Args: []string{"monitor", "--socket", socket}, Stdout: stop, Stderr: &stderr, Now: time.Now,
		Getenv: func(string) string { return "" }})
	if code != exitOK || strings.Contains(stderr.String(), "portcullis:") {
		t.Errorf("status %d, stderr %q", code, stderr.String())
	}
}

func TestMonitorLosesItsAgent(t *testing.T) {
	socket := serveWire(t, &wire{events: events()[:1], end: status.Error(codes.Unavailable, "the agent is stopping")})
	got := command(t.Context(), socket, "", "monitor")
	if got.code != exitFailed || !strings.Contains(got.stderr, "lost the agent") || !strings.HasPrefix(got.stdout, "-> endpoint 24") {
		t.Errorf("%+v", got)
	}
}

type onWrite struct {
	after int
	do    func()
}

func (w *onWrite) Write(b []byte) (int, error) {
	if w.after--; w.after == 0 {
		w.do()
	}
	return len(b), nil
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
