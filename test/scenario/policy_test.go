package scenario

import (
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"portcullis/agent/api"
)

// Files are imported all or none; what was in force stays in force.
func TestImportIsAllOrNone(t *testing.T) {
	w := newWorld(t)
	traffic := w.live()
	before := w.policies()
	good := strings.ReplaceAll(strings.ReplaceAll(onlyClients, "{name: server}", "{name: strangers-too}"), "{app: client}", "{app: other}")
	bad := strings.ReplaceAll(onlyClients, "ingress:", "ingres:")
	r, err := w.api(verifier).ImportPolicies(t.Context(), &api.ImportPoliciesRequest{Files: []*api.PolicyFile{
		{Name: "good.yaml", Content: []byte(good)}, {Name: "bad.yaml", Content: []byte(bad)}}})
	w.must(err)
	if len(r.GetImported()) != 0 || len(r.GetProblems()) == 0 || r.GetProblems()[0].GetFile() != "bad.yaml" || !strings.Contains(r.GetProblems()[0].GetField(), "ingres") {
		t.Errorf("imported %v, problems %v", r.GetImported(), r.GetProblems())
	}
	if p := w.policies(); !slices.Equal(p, before) {
		t.Errorf("policies were %v, are %v", before, p)
	}
	drop := w.watchDrops(w.stranger)
	if w.reach(w.stranger) == nil {
		t.Error("the good file of a bad import is in force")
	}
	// And the monitor tells of it, by name.
	e := drop("policy-denied")
	if e.GetSource().GetText() != w.endpoint(w.stranger).GetIdentity().GetText() || e.GetDestination().GetWorkload() != "default/server" ||
		e.GetDestination().GetPort() != tcpPort || e.GetEvidence() != "lease" || e.GetDirection() != "ingress" {
		t.Errorf("the drop is told as %v", e)
	}
	w.must(w.ImportPoliciesAt(t.Context(), verifier, &api.PolicyFile{Name: "good.yaml", Content: []byte(good)}))
	w.must(w.reach(w.stranger))
	traffic.lossless()
}

// Policies outlive a restart. One that cannot be read keeps the agent from
// starting; where all are gone everything is denied until somebody says what
// is meant. Nothing is ever opened by a loss.
func TestStoredPolicies(t *testing.T) {
	w := newWorld(t)
	traffic := w.live()
	files, err := filepath.Glob(filepath.Join(filepath.Dir(w.Socket(verifier)), "state", "policies", "*.json"))
	if err != nil || len(files) != 1 {
		t.Fatalf("stored policies: %v, %v", files, err)
	}
	whole, err := os.ReadFile(files[0])
	w.must(err)

	w.kill(verifier)
	w.must(os.WriteFile(files[0], whole[:len(whole)/2], 0o600))
	if err := w.StartAgent(t.Context(), verifier); err == nil || !strings.Contains(err.Error(), "stored policies cannot be used") {
		t.Errorf("started with half a policy: %v", err)
	}
	traffic.goesOn("traffic without an agent")
	w.must(os.WriteFile(files[0], whole, 0o600))
	w.start(verifier)
	traffic.goesOn("traffic with the policies mended")
	traffic.lossless()

	w.kill(verifier)
	w.must(os.Remove(files[0]))
	w.start(verifier)
	if p := w.policies(); len(p) != 0 {
		t.Fatalf("policies %v", p)
	}
	alarm := slices.ContainsFunc(w.status(verifier).GetAlarms(), func(a *api.Alarm) bool { return a.GetName() == "policies-lost" })
	heardClient, heardStranger := w.echo.from(w.client), w.echo.from(w.stranger)
	if w.reach(w.client) == nil || w.reach(w.stranger) == nil || w.echo.from(w.client) != heardClient || w.echo.from(w.stranger) != heardStranger || !alarm {
		t.Errorf("with its policies lost a workload is reached, or there is no alarm (%v)", alarm)
	}
	w.must(w.ImportPoliciesAt(t.Context(), verifier, &api.PolicyFile{Name: "server.yaml", Content: []byte(onlyClients)}))
	w.must(w.reach(w.client))
	if w.reach(w.stranger) == nil {
		t.Error("the stranger gets in")
	}
	if slices.ContainsFunc(w.status(verifier).GetAlarms(), func(a *api.Alarm) bool { return a.GetName() == "policies-lost" }) {
		t.Error("the alarm stays")
	}
}
