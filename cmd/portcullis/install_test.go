package main

import (
	"encoding/json"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"portcullis/agent/install"
)

func TestInstallPrintsTheManifests(t *testing.T) {
	values := filepath.Join(t.TempDir(), "mine.yaml")
	if err := os.WriteFile(values, []byte("trustDomain: example.org\nconfig: {log-level: debug}\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	got := command(t.Context(), "/nonexistent", "", "install", "--dry-run", "--preset", "k3s", "-f", values, "--set", "image.tag=v9", "-n", "net")
	if got.code != exitOK || got.stderr != "" {
		t.Fatalf("%+v", got)
	}
	for _, want := range []string{"kind: CustomResourceDefinition", "    trust-domain: \"example.org\"\n", "    log-level: debug\n", "portcullis:v9", "/var/lib/rancher/k3s/data/cni", "namespace: net\n"} {
		if !strings.Contains(got.stdout, want) {
			t.Errorf("no %q", want)
		}
	}
	got = command(t.Context(), "/nonexistent", "trustDomain: example.net", "install", "--dry-run", "-o", "json", "--skip-crds", "-f", "-")
	var list struct{ Items []struct{ Kind string } }
	if err := json.Unmarshal([]byte(got.stdout), &list); err != nil || len(list.Items) < 12 || strings.Contains(got.stdout, "CustomResourceDefinition") || !strings.Contains(got.stdout, "example.net") {
		t.Errorf("%d objects, %v: %+v", len(list.Items), err, got)
	}
}

// What is wrong is found before a cluster is asked, all at once.
func TestInstallRefuses(t *testing.T) {
	for args, want := range map[string]string{
		"--set config.tttl=3s":                "config:8: tttl: unknown key",
		"--set config.ttl=soon":               `ttl: "soon"`,
		"--set x=1 --set image.pullPolicy=No": "image.pullPolicy: \"No\": want one of",
		"--preset kind":                       `there is no preset "kind": want k3s`,
		"--set issuer.enabled=false":          "nobody would give agents their SVIDs",
		"-f /nonexistent/values.yaml":         "/nonexistent/values.yaml",
		"extra":                               "takes no arguments",
		"--timeout 0s":                        "--timeout 0s: want more than 0",
		"--namespace=":                        `--namespace "": want small letters`,
		"--dry-run -n ../x":                   `--namespace "../x": want small letters`,
		"--set metrics.enabled=true --set metrics.port=4260": "metrics.port: 4260 is that of agents",
		"--set config.trust-domain=x -o json -n n":           "is not set here: trustDomain",
	} {
		got := command(t.Context(), "/nonexistent", "", append([]string{"install", "--kubeconfig", "/nonexistent"}, strings.Fields(args)...)...)
		if got.code != exitUsage || !strings.Contains(got.stderr, want) || got.stdout != "" {
			t.Errorf("%s: %+v", args, got)
		}
	}
	for _, args := range []string{"uninstall -n A", "uninstall --timeout -1s", "status --cluster --timeout 0s", "status --cluster -n .", "doctor --cluster -n A", "sysdump --cluster -n A"} {
		if got := command(t.Context(), "/nonexistent", "", append(strings.Fields(args), "--kubeconfig", "/nonexistent/config")...); got.code != exitUsage {
			t.Errorf("%s: %+v", args, got)
		}
	}
	for _, args := range []string{"install", "uninstall", "status --cluster", "doctor --cluster"} {
		got := command(t.Context(), "/nonexistent", "", append(strings.Fields(args), "--kubeconfig", "/nonexistent/config")...)
		if got.code != exitFailed || !strings.Contains(got.stderr, "/nonexistent/config") {
			t.Errorf("%s: %+v", args, got)
		}
	}
	if got := command(t.Context(), "/nonexistent", "", "status", "--wait"); got.code != exitUsage || !strings.Contains(got.stderr, "add --cluster") {
		t.Errorf("status --wait: %+v", got)
	}
}

func TestClusterStatusTable(t *testing.T) {
	var out strings.Builder
	status := install.Status{Server: "https://192.0.2.10:6443", Namespace: "portcullis", Nodes: []install.Node{
		{Name: "n1", State: install.StateOK, Version: "v1", Evidence: "lease", Endpoints: 14, Policies: 6, Sessions: 4, SessionsUp: 4, Image: "i"},
		{Name: "n2", State: install.StateOK, Version: "v1", Evidence: "lease", Endpoints: 9, Quarantined: 1, Policies: 6, Sessions: 4, SessionsUp: 3, Image: "i",
			Alarms: []install.Alarm{{Name: "policy-refused", Text: "1 policies of the cluster cannot be used: default/old (not in force): spec.egress[0]: unknown key", Count: 1}}},
		{Name: "n3", State: install.StateFailing, Restarts: 4, Problems: []string{"does not start (CrashLoopBackOff): back-off 1m20s; ended with status 1: the programs need tcx"}},
		{Name: "n4", State: install.StateUnmanaged},
	}}
	env := &Env{Stdout: &out, Now: time.Now}
	if err := printClusterStatus(env, status); err != nil {
		t.Fatal(err)
	}
	golden(t, "status-cluster.table", out.String())
}
