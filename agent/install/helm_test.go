//go:build helm

package install

import (
	"encoding/json"
	"flag"
	"net/http"
	"net/http/httptest"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
)

// The real Helm and this package make the same of the chart: `make helm`.
var helmFlag = flag.String("helm", "", "the helm command")

const chartPath = "../../deploy/helm/portcullis"

func runHelm(t *testing.T, args ...string) (string, error) {
	t.Helper()
	if *helmFlag == "" {
		t.Fatal("name the command by -helm, as `make helm` does")
	}
	cmd := exec.Command(*helmFlag, args...)
	home := t.TempDir()
	cmd.Env = append(os.Environ(), "HELM_CONFIG_HOME="+home, "HELM_CACHE_HOME="+home, "HELM_DATA_HOME="+home, "KUBECONFIG=/nonexistent")
	var stderr strings.Builder
	cmd.Stderr = &stderr
	out, err := cmd.Output()
	if err != nil {
		return stderr.String(), err
	}
	return string(out), nil
}

func valuesFile(t *testing.T, text string) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "values.yaml")
	if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	return path
}

var helmCases = map[string]string{
	"defaults":   "{}",
	"spire":      "issuer: {enabled: false}\nspire: {socketPath: /run/spire/agent-sockets/spire-agent.sock}\n",
	"delegated":  "issuer: {enabled: false}\nspire: {socketPath: /run/spire/agent-sockets/spire-agent.sock, adminSocketPath: /run/spire/agent/sockets/csi.spiffe.io/admin/admin.sock}\n",
	"everywhere": "metrics: {enabled: true, port: 9000}\nhubble: {listen: {enabled: true}}\n",
	"registry":   "image: {repository: 'registry.example.com:5000/a/b', tag: '1.10', pullPolicy: Always, pullSecrets: [{name: one}, {name: two}]}\ntrustDomain: example.org\n",
	"settings":   "config: {ttl: 1m, log-level: debug, enforce-in: [kube-system=never, 'a=always'], migration: true, held-bytes: 4194304, identity-template: 'spiffe://{trust_domain}/x: y # z'}\n",
	"removed":    "config: {ttl: null, heartbeat: null, reuse-margin: null}\nagent: {tolerations: []}\n",
	"placed":     "agent: {nodeSelector: {a/b: 'yes', c: 'true'}, tolerations: [{key: x, operator: Equal, value: '1', effect: NoSchedule}], maxUnavailable: 10%, resources: {limits: {memory: 1Gi, cpu: 2}}, priorityClassName: mine}\nissuer: {replicas: 1, nodeSelector: {n: m}}\ncni: {binDir: /var/lib/a b, confDir: /etc/c}\n",
	"relay":      "hubble: {listen: {enabled: true, port: 5244}}\nrelay: {enabled: true}\nimage: {pullSecrets: [{name: one}]}\n",
	"spirerelay": "issuer: {enabled: false}\nspire: {socketPath: /run/spire/a.sock}\nhubble: {listen: {enabled: true}}\nrelay: {enabled: true}\n",
	"namespace":  "namespace: {create: false}\n",
	"digest":     "image: {repository: r.example.com/p, tag: v1, digest: 'sha256:0123456789abcdef0123456789abcdef0123456789abcdef0123456789abcdef'}\nagent: {priorityClassName: ''}\nissuer: {priorityClassName: ''}\n",
	"noevents":   "events: {enabled: false}\n",
}

func TestHelmRendersTheSame(t *testing.T) {
	cases := map[string]string{}
	for name, text := range helmCases {
		cases[name] = text
	}
	for _, name := range Presets() {
		b, err := os.ReadFile(filepath.Join(chartPath, "presets", name+".yaml"))
		if err != nil {
			t.Fatal(err)
		}
		cases["preset "+name] = string(b)
	}
	for name, text := range cases {
		t.Run(name, func(t *testing.T) {
			path := valuesFile(t, text)
			if out, err := runHelm(t, "lint", "--strict", chartPath, "-f", path); err != nil {
				t.Errorf("lint: %v\n%s", err, out)
			}
			out, err := runHelm(t, "template", "release", chartPath, "--namespace", "net", "--include-crds", "-f", path)
			if err != nil {
				t.Fatalf("%v\n%s", err, out)
			}
			theirs, err := Objects(File{Name: "helm", Text: out})
			if err != nil {
				t.Fatal(err)
			}
			v, err := Merge(layer(t, text))
			if err != nil {
				t.Fatal(err)
			}
			files, err := Release{Namespace: "net", Values: v}.Render()
			if err != nil {
				t.Fatal(err)
			}
			ours, err := Objects(files...)
			if err != nil {
				t.Fatal(err)
			}
			if d := cmp.Diff(byName(theirs), byName(ours)); d != "" {
				t.Errorf("helm (-) and install (+) differ:\n%s", d)
			}
			t.Logf("%d objects are equal", len(ours))
		})
	}
}

func byName(objects []*unstructured.Unstructured) map[string]any {
	out := map[string]any{}
	for _, o := range objects {
		out[o.GetKind()+" "+o.GetNamespace()+"/"+o.GetName()] = o.Object
	}
	return out
}

// What the command refuses Helm refuses, but settings that only an agent knows.
func TestHelmRefusesTheSame(t *testing.T) {
	for _, text := range []string{
		"agent: {resurces: {}}", "trust_domain: x", "issuer: {replicas: many}", "issuer: {replicas: 10}", "image: {tag: 1.10}", "image: {pullPolicy: Sometimes}",
		"image: portcullis", "cni: {binDir: opt/cni/bin}", "metrics: {enabled: 'yes'}", "metrics: {port: 70000}", "agent: {tolerations: {}}", "agent: {maxUnavailable: some}",
		"config: [ttl]", "config: {trust-domain: x}", "trustDomain: spiffe://x", "spire: {socketPath: run/agent.sock}",
		"issuer: {enabled: false}", "spire: {socketPath: /run/spire/a.sock}", "relay: {enabled: true}",
		"spire: {adminSocketPath: admin.sock}", "config: {delegated-socket: 'unix:///run/spire/admin/admin.sock'}",
		"issuer: {enabled: false}\nspire: {socketPath: /run/spire/a.sock, adminSocketPath: /run/spire/admin.sock}",
		"image: {digest: 'sha256:12'}", "agent: {maxUnavailable: 200%}", "agent: {priorityClassName: 'a: b'}", "metrics: {enabled: true, port: 4260}",
		"hubble: {listen: {enabled: true, port: 4261}}", "metrics: {enabled: true, port: 4244}\nhubble: {listen: {enabled: true}}",
	} {
		v, err := Merge(layer(t, text))
		if err == nil {
			_, err = Release{Namespace: "net", Values: v}.Render()
		}
		if err == nil {
			t.Errorf("install takes %s", text)
		}
		if out, err := runHelm(t, "template", "release", chartPath, "-f", valuesFile(t, text)); err == nil {
			t.Errorf("helm takes %s", text)
		} else if strings.Contains(out, "nil pointer") || out == "" {
			t.Errorf("%s: helm says %s", text, out)
		}
	}
}

// What Helm asks the cluster for is found there: an upgrade that changes what an
// installation keeps is refused, as `portcullis install` refuses it.
func TestHelmKeepsWhatItIsKnownBy(t *testing.T) {
	s, c := newStore(t)
	s.after = lives
	installed(t, c, layer(t, "trustDomain: mine.example"))
	for _, o := range s.objects { // as Helm itself has installed them
		labels := o.GetLabels()
		labels["app.kubernetes.io/managed-by"] = "Helm"
		o.SetLabels(labels)
		o.SetAnnotations(map[string]string{"meta.helm.sh/release-name": "release", "meta.helm.sh/release-namespace": "net"})
	}
	server := httptest.NewServer(discovered(s))
	defer server.Close()
	for text, want := range map[string]string{
		"{trustDomain: mine.example, image: {tag: v2}}":                     "",
		"{trustDomain: other.example}":                                      `trustDomain: is "mine.example"`,
		"{trustDomain: mine.example, cni: {binDir: /b}}":                    "has --cni-bin-dir=/opt/cni/bin,",
		"{trustDomain: mine.example, cni: {confDir: /b}}":                   "has --cni-conf-dir=/etc/cni/net.d,",
		"{trustDomain: mine.example, cni: {confDir: /b, move: true}}":       "",
		"{trustDomain: other.example, cni: {confDir: /b, move: true}}":      `trustDomain: is "mine.example"`,
		"{trustDomain: mine.example, cni: {binDir: /opt/cni/bin/./../bin}}": "",
	} {
		out, err := runHelm(t, "template", "release", chartPath, "--namespace", "net", "--dry-run=server", "--disable-openapi-validation", "--kube-apiserver", server.URL, "-f", valuesFile(t, text))
		if want == "" && err != nil || want != "" && (err == nil || !strings.Contains(out, want)) {
			t.Errorf("%s: %v\n%s", text, err, out)
		}
	}
}

// discovered answers what kinds there are, too.
func discovered(s *store) http.Handler {
	kindsOf := func(group string) (out []map[string]any) {
		for _, k := range kinds {
			if k.resource.Group == group {
				out = append(out, map[string]any{"name": k.resource.Resource, "kind": k.name, "namespaced": k.namespaced, "verbs": []string{"get"}})
			}
		}
		return out
	}
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		var answer any
		switch group := strings.TrimSuffix(strings.TrimPrefix(r.URL.Path, "/apis/"), "/v1"); {
		case r.URL.Path == "/version":
			answer = map[string]any{"major": "1", "minor": "36", "gitVersion": "v1.36.0"}
		case r.URL.Path == "/api":
			answer = map[string]any{"kind": "APIVersions", "versions": []string{"v1"}}
		case r.URL.Path == "/apis":
			groups, seen := []any{}, map[string]bool{"": true}
			for _, k := range kinds {
				if g := k.resource.Group; !seen[g] {
					v := map[string]any{"groupVersion": g + "/v1", "version": "v1"}
					groups, seen[g] = append(groups, map[string]any{"name": g, "versions": []any{v}, "preferredVersion": v}), true
				}
			}
			answer = map[string]any{"kind": "APIGroupList", "apiVersion": "v1", "groups": groups}
		case r.URL.Path == "/api/v1":
			answer = map[string]any{"kind": "APIResourceList", "groupVersion": "v1", "resources": kindsOf("")}
		case strings.HasPrefix(r.URL.Path, "/apis/") && strings.Count(r.URL.Path, "/") == 3:
			answer = map[string]any{"kind": "APIResourceList", "groupVersion": group + "/v1", "resources": kindsOf(group)}
		default:
			s.ServeHTTP(w, r)
			return
		}
		w.Header().Set("Content-Type", "application/json")
		if err := json.NewEncoder(w).Encode(answer); err != nil {
			s.t.Error(err)
		}
	})
}
