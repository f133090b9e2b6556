package main

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
)

// A run in a cluster says what is wrong with its command line before it does
// anything, and what it lacks.
func TestChaosKubernetes(t *testing.T) {
	nowhere := filepath.Join(t.TempDir(), "kubectl")
	for _, c := range []struct {
		args string
		code int
		says string
	}{
		{"chaos run ip-reuse --target moon", exitUsage, "want lab or kubernetes"},
		{"chaos run storm --target kubernetes", exitUsage, "in a cluster there is ip-reuse alone"},
		{"chaos run ip-reuse --target kubernetes --fault loss", exitUsage, "there are agent-kill, agent-restart, agent-stop, api-cut, partition"},
		{"chaos run ip-reuse --target kubernetes --fault partition,partition", exitUsage, "named twice"},
		{"chaos run ip-reuse --target kubernetes --ttl 2s", exitUsage, "--ttl means nothing with --target kubernetes"},
		{"chaos run ip-reuse --namespace x", exitUsage, "--namespace means nothing with --target lab"},
		{"chaos run ip-reuse --target kubernetes --nodes n1", exitUsage, "others that judge"},
		{"chaos run ip-reuse --target kubernetes --events 0", exitUsage, "want 1 to 100000"},
		{"chaos run ip-reuse --target kubernetes --kubectl " + nowhere, exitFailed, "install it, or name it with --kubectl"},
		{"chaos talk", exitFailed, "no UID of the pod"},
		{"chaos talk --call here", exitUsage, "--call"},
		{"chaos break --signal 15", exitUsage, "want 9 or 19"},
		{"chaos break", exitFailed, "want something to break"},
	} {
		got := command(t.Context(), "", "", strings.Fields(c.args)...)
		if got.code != c.code || !strings.Contains(got.stderr, c.says) {
			t.Errorf("%s: status %d, %s", c.args, got.code, got.stderr)
		}
	}
}

// What kubectl says goes to who runs it; nothing is made where there is no
// installation.
func TestChaosKubernetesWithoutInstallation(t *testing.T) {
	dir := t.TempDir()
	kubectl, calls := filepath.Join(dir, "kubectl"), filepath.Join(dir, "calls")
	script := "#!/bin/sh\necho \"$@\" >>" + calls + "\necho 'no such thing' >&2\nexit 1\n"
	if err := os.WriteFile(kubectl, []byte(script), 0o755); err != nil {
		t.Fatal(err)
	}
	got := command(t.Context(), "", "", "chaos", "run", "ip-reuse", "--target", "kubernetes", "--kubectl", kubectl, "--context", "c1")
	if got.code != exitFailed || !strings.Contains(got.stderr, "is Portcullis installed") || !strings.Contains(got.stderr, "no such thing") {
		t.Errorf("status %d, %s", got.code, got.stderr)
	}
	asked, err := os.ReadFile(calls)
	if err != nil || string(asked) != "--context=c1 --namespace=portcullis get daemonset portcullis-agent -o json\n" {
		t.Errorf("it called %q, %v", asked, err)
	}
}
