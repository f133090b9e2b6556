//go:build e2e

package e2e

import (
	"archive/tar"
	"bytes"
	"compress/gzip"
	"encoding/json"
	"errors"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"portcullis/observe/archive"
)

// testSysdump: one archive of the whole cluster, with what every node's agent
// says and shows; what Secrets, tokens and environments hold is not in it.
func testSysdump(t *testing.T) {
	const planted = "planted-in-the-cluster"
	kubectl(t, "-n", "portcullis", "create", "secret", "generic", "planted", "--from-literal=password="+planted)
	defer kubectl(t, "-n", "portcullis", "delete", "secret", "planted")
	kubectl(t, "-n", "portcullis", "create", "configmap", "planted", "--from-literal=api-token="+planted)
	defer kubectl(t, "-n", "portcullis", "delete", "configmap", "planted")

	config := k8s.KubectlCommand(t.Context()).Args
	i := slices.IndexFunc(config, func(a string) bool { return strings.HasPrefix(a, "--kubeconfig=") })
	file := filepath.Join(t.TempDir(), "cluster.tar.gz")
	cmd := k8s.WorldCommand(t.Context(), program, "sysdump", "--cluster", config[i], "--output-file", file, "-o", "json")
	var stdout, stderr bytes.Buffer
	cmd.Stdout, cmd.Stderr = &stdout, &stderr
	if err := cmd.Run(); err != nil {
		t.Fatalf("%v\n%s", err, &stderr)
	}
	var m archive.Manifest
	must(t, json.Unmarshal(stdout.Bytes(), &m))
	t.Logf("%d files, %s, in %.1f s; %d secrets removed", m.Files, archive.Size(m.Bytes), m.Seconds, m.Removed)
	if len(m.Failed) > 0 {
		t.Errorf("could not be gathered: %v\n%s", m.Failed, &stderr)
	}
	files := unpacked(t, file)
	want := map[string]string{
		"cluster/version.json": "gitVersion", "cluster/nodes.json": `"n1"`, "cluster/daemonsets.json": "portcullis-agent", "cluster/status.json": `"healthy": true`,
		"cluster/clusterroles.json": "portcullis-agent", "cluster/configmaps.json": "agent.yaml", "cluster/definitions.json": "ciliumnetworkpolicies",
		"cluster/all-pods.jsonl": "deathstar", "errors.txt": "",
	}
	for _, node := range []string{"n1", "n2", "n3"} {
		for name, text := range map[string]string{"agent/status.json": `"node": "` + node + `"`, "agent/sessions.json": `"sessions"`, "bpf/pinned.json": "maps/bindings",
			"bpf/maps/endpoints.json": "Identity", "network/devices.json": "from_workload", "doctor.json": `"tcx"`, "cni/10-pods.conflist": "portcullis-cni",
			"journal.json": `"bound"`, "config/settings.yaml": "kubernetes: true", "manifest.json": `"format": 1`} {
			want["nodes/"+node+"/"+name] = text
		}
	}
	for name, text := range want {
		if got, is := files[name]; !is || !strings.Contains(got, text) {
			t.Errorf("%s (there: %v) holds no %s: %.600s", name, is, text, got)
		}
	}
	logs := 0
	for name, text := range files {
		if strings.HasPrefix(name, "logs/portcullis-agent-") && strings.HasSuffix(name, "agent-current.log") && strings.Contains(text, `"level"`) {
			logs++
		}
		for _, secret := range []string{planted, "PRIVATE KEY", "eyJhbGciOi"} {
			if strings.Contains(text, secret) {
				t.Errorf("%s holds %s", name, secret)
			}
		}
	}
	if logs != 3 {
		t.Errorf("logs of %d agents, want 3", logs)
	}
}

// unpacked reads an archive; names are below its top.
func unpacked(t *testing.T, file string) map[string]string {
	t.Helper()
	f, err := os.Open(file)
	must(t, err)
	defer f.Close()
	gz, err := gzip.NewReader(f)
	must(t, err)
	files := map[string]string{}
	for r := tar.NewReader(gz); ; {
		h, err := r.Next()
		if errors.Is(err, io.EOF) {
			return files
		}
		must(t, err)
		b, err := io.ReadAll(r)
		must(t, err)
		_, name, _ := strings.Cut(h.Name, "/")
		files[name] = string(b)
	}
}
