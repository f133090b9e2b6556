package scenario

import (
	"archive/tar"
	"bytes"
	"compress/gzip"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"portcullis/agent/api"
	"portcullis/chaos/lab"
	"portcullis/observe/archive"
)

// sysdump runs the command, and returns what is in the archive, by names below
// its top, and what the command said of it.
func (w *world) sysdump(args ...string) (map[string]string, archive.Manifest) {
	w.t.Helper()
	dir := w.t.TempDir()
	file := filepath.Join(dir, "x.tar.gz")
	var progress bytes.Buffer
	cmd := exec.Command(program, append([]string{"sysdump", "--output-file", file, "-o", "json"}, args...)...)
	cmd.Stderr = &progress
	out, err := cmd.Output()
	if err != nil {
		w.t.Fatalf("sysdump: %v\n%s", err, &progress)
	}
	var m archive.Manifest
	w.must(json.Unmarshal(out, &m))
	if entries, err := os.ReadDir(dir); err != nil || len(entries) != 1 {
		w.t.Errorf("beside the archive: %v %v", entries, err)
	}
	f, err := os.Open(file)
	w.must(err)
	defer f.Close()
	if info, err := f.Stat(); err != nil || info.Mode() != 0o600 {
		w.t.Errorf("the archive: %v %v", info, err)
	}
	gz, err := gzip.NewReader(f)
	w.must(err)
	files := map[string]string{}
	for r := tar.NewReader(gz); ; {
		h, err := r.Next()
		if errors.Is(err, io.EOF) {
			return files, m
		}
		w.must(err)
		b, err := io.ReadAll(r)
		w.must(err)
		_, name, _ := strings.Cut(h.Name, "/")
		files[name] = string(b)
	}
}

// secrets are planted where people leave them; none of the words may be found.
const (
	inHeader = "planted-in-a-header"
	inQuery  = "planted-in-a-query"
	inPolicy = "planted-in-a-policy"
	inLog    = "planted-in-the-log"
	inCNI    = "planted-in-a-kubeconfig"
	inKey    = "cGxhbnRlZC1pbi1hLWtleS1wbGFudGVkLWluLWEta2V5"
	inToken  = "eyJhbGciOiJSUzI1NiJ9.cGxhbnRlZC1pbi1hLXRva2Vu.c2lnbmVk"
	inConf   = "planted-in-a-plugins-configuration"
	kubeconf = "apiVersion: v1\nkind: Config\nusers:\n- name: u\n  user:\n    token: " + inCNI + "\n    client-key-data: " + inKey + "\n"
	conflist = `{"cniVersion": "1.0.0", "name": "pods", "plugins": [{"type": "bridge", "password": "` + inConf + `", "kept": "of the plugin"}]}`
	logLines = "issuer said: Authorization: Bearer " + inLog + "\n-----BEGIN EC PRIVATE KEY-----\n" + inKey + "\n-----END EC PRIVATE KEY-----\n{\"level\":\"info\",\"msg\":\"kept of the log\",\"token\":\"" + inToken + "\"}\n"
)

// plantedPolicy looks at a header whose value is a secret.
func plantedPolicy() *api.PolicyFile {
	return &api.PolicyFile{Name: "server.yaml", Content: fmt.Appendf(nil, `
# %s
apiVersion: cilium.io/v2
kind: CiliumNetworkPolicy
metadata: {name: server}
spec:
  endpointSelector: {matchLabels: {app: server}}
  ingress:
  - fromEndpoints: [{matchLabels: {app: client}}]
    toPorts: [{ports: [{port: "%d", protocol: TCP}], rules: {http: [{method: GET, path: /open.*}, {method: GET, path: /shut, headers: ["X-Key: %s"]}]}}]
`, inPolicy, webPort, inPolicy)}
}

// A node whose agent runs: all is gathered, from outside of the agent's network
// namespace too, and no secret of those planted is in it. A node whose agent was
// killed: what the kernel and the files show.
func TestSysdump(t *testing.T) {
	conf := t.TempDir()
	for name, text := range map[string]string{"10-pods.conflist": conflist, "plugin.kubeconfig": kubeconf} {
		if err := os.WriteFile(filepath.Join(conf, name), []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	w := newWorld(t, func(c *lab.Config) {
		c.AgentFlags = append(c.AgentFlags, "--metrics-address="+metricsAddress, "--record-queries", "--record-header=X-Magic", "--processes")
	})
	x := w.serveWeb()
	w.must(w.ImportPoliciesAt(t.Context(), verifier, plantedPolicy()))
	w.eventually("the proxy serves", func() error {
		code, err := x.once("GET", "/open")
		if err == nil && code != http.StatusOK {
			err = fmt.Errorf("it answers %d", code)
		}
		return err
	})
	c, err := x.call()
	w.must(err)
	c.says("with secrets", "GET", "/open?pin="+inQuery, http.StatusOK, "X-Magic: "+inHeader, "Cookie: s="+inHeader)
	log, err := os.OpenFile(filepath.Join(filepath.Dir(w.Socket(verifier)), "agent.log"), os.O_WRONLY|os.O_APPEND, 0)
	w.must(err)
	_, err = log.WriteString(logLines)
	w.must(errors.Join(err, log.Close()))

	var files map[string]string
	var m archive.Manifest
	w.eventually("the request is recorded", func() error {
		if files, m = w.sysdump("--socket", w.Socket(verifier)); !strings.Contains(files["flows.jsonl"], "X-Magic") {
			return fmt.Errorf("not in the flows:\n%.2000s", files["flows.jsonl"])
		}
		return nil
	})
	whole(t, files, m)
	clean(t, files)
	if m.Removed < 6 || m.Name != verifier || m.Of != "node" {
		t.Errorf("%d secrets removed of %s %s", m.Removed, m.Of, m.Name)
	}

	// The agent's settings, as the archive has them, say where to look without it.
	settings := filepath.Join(t.TempDir(), "agent.yaml")
	w.must(os.WriteFile(settings, []byte(strings.Replace(files["config/settings.yaml"], "cni-conf-dir: \"\"", "cni-conf-dir: "+conf, 1)), 0o600))
	w.must(w.KillAgent(t.Context(), verifier))
	files, m = w.sysdump("--socket", w.Socket(verifier), "--config", settings)
	clean(t, files)
	for name, want := range map[string]string{"bpf/maps/endpoints.json": `"entries": 1`, "bpf/pinned.json": "from_workload", "journal.json": `"bound"`, "errors.txt": "agent/status: ",
		"cni/10-pods.conflist": "of the plugin", "cni/plugin.kubeconfig": "client-key-data: '[removed]'", "confirmations.jsonl": `"kind"`} {
		if !strings.Contains(files[name], want) {
			t.Errorf("without an agent %s holds no %s:\n%.2000s", name, want, files[name])
		}
	}
	if !slices.Contains(m.Failed, "agent/status") {
		t.Errorf("nobody answers, and what failed is %v", m.Failed)
	}
}

// whole checks that what the agent and the node show is there.
func whole(t *testing.T, files map[string]string, m archive.Manifest) {
	t.Helper()
	if len(m.Failed) > 0 {
		t.Errorf("could not be gathered: %v\n%s", m.Failed, files["errors.txt"])
	}
	for name, want := range map[string]string{
		"versions.json":         `"abi"`,
		"config/settings.yaml":  "record-queries: true",
		"config/agent.json":     "--record-queries",
		"doctor.json":           `"kernel"`,
		"agent/status.json":     `"node": "` + verifier + `"`,
		"agent/endpoints.json":  `"server"`,
		"agent/policies.json":   `"server"`,
		"agent/bindings.json":   `"lease"`,
		"agent/sessions.json":   `"` + owner + `"`,
		"agent/identities.json": "app=client",
		"agent/names.json":      `"names"`,
		"agent/policies/CiliumNetworkPolicy_default_server.yaml": "X-Key: [removed]",
		"flows.jsonl":             "/open?[removed]",
		"metrics.txt":             "portcullis_",
		"readyz.txt":              "",
		"confirmations.jsonl":     `"kind"`,
		"agent.log":               "kept of the log",
		"process/status.txt":      "VmRSS",
		"bpf/pinned.json":         `"maps/bindings"`,
		"bpf/programs.json":       "from_workload",
		"bpf/links.json":          "tcx",
		"bpf/maps/endpoints.json": `"entries": 1`,
		"bpf/maps/counters.json":  "Packets",
		"network/devices.json":    `"from_workload"`,
		"network/routes.txt":      "table",
		"network/rules.txt":       "",
		"network/sysctl.txt":      "ip_forward",
		"journal.json":            `"knownFormat": 1`,
		"mounts.txt":              "bpf",
		"cgroups.json":            "agent",
		"manifest.json":           `"format": 1`,
	} {
		if text, is := files[name]; !is || !strings.Contains(text, want) {
			t.Errorf("%s (there: %v) holds no %s:\n%.1500s", name, is, want, text)
		}
	}
}

// clean checks that nothing planted is in an archive, nor any private key.
func clean(t *testing.T, files map[string]string) {
	t.Helper()
	for name, text := range files {
		for _, secret := range []string{inHeader, inQuery, inPolicy, inLog, inCNI, inKey, inToken, inConf, "PRIVATE KEY"} {
			if at := strings.Index(text, secret); at >= 0 {
				t.Errorf("%s holds %s: %.200s", name, secret, text[max(0, at-100):])
			}
		}
	}
}
