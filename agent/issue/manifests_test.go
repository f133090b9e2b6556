package issue

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"go.yaml.in/yaml/v3"

	"portcullis/agent/kube"
	"portcullis/identity/issuer"
)

// manifest is what the tests read of an object in deploy/.
type manifest struct {
	Kind     string
	Metadata struct{ Name, Namespace string }
	Rules    []struct {
		APIGroups     []string `yaml:"apiGroups"`
		Resources     []string
		ResourceNames []string `yaml:"resourceNames"`
		Verbs         []string
	}
}

// rights returns what roles of the name allow, one line for each resource.
func rights(t *testing.T, role string) (out []string) {
	t.Helper()
	files, err := filepath.Glob("../../deploy/*.yaml")
	if err != nil || len(files) == 0 {
		t.Fatalf("no manifests: %v", err)
	}
	for _, file := range files {
		data, err := os.ReadFile(file)
		if err != nil {
			t.Fatal(err)
		}
		for d := yaml.NewDecoder(bytes.NewReader(data)); ; {
			var m manifest
			if err := d.Decode(&m); errors.Is(err, io.EOF) {
				break
			} else if err != nil {
				t.Fatalf("%s: %v", file, err)
			}
			if m.Metadata.Name != role || m.Kind != "Role" && m.Kind != "ClusterRole" {
				continue
			}
			for _, r := range m.Rules {
				for _, group := range r.APIGroups {
					for _, resource := range r.Resources {
						out = append(out, right(m.Kind == "ClusterRole", group, resource, r.ResourceNames, r.Verbs))
					}
				}
			}
		}
	}
	slices.Sort(out)
	return out
}

func right(everywhere bool, group, resource string, names, verbs []string) string {
	return fmt.Sprintf("everywhere=%v %s/%s %v %s", everywhere, group, resource, names, strings.Join(slices.Sorted(slices.Values(verbs)), ","))
}

// TestManifestsGrantWhatIsUsed: with less an agent waits for ever for what it
// may not list; with more, who steals its token has more.
func TestManifestsGrantWhatIsUsed(t *testing.T) {
	var agents, issuers []string
	for _, p := range kube.Permissions() {
		agents = append(agents, right(true, p.Group, p.Resource, nil, p.Verbs))
	}
	cfg := Default()
	for _, r := range issuer.Access(cfg.Secret, cfg.ConfigMap) {
		issuers = append(issuers, right(r.Cluster, r.APIGroup, r.Resource, r.Names, r.Verbs))
	}
	for role, want := range map[string][]string{"portcullis-agent": agents, "portcullis-issuer": issuers} {
		slices.Sort(want)
		if d := cmp.Diff(want, rights(t, role)); d != "" {
			t.Errorf("%s: the manifests do not grant what is used:\n%s", role, d)
		}
	}
}
