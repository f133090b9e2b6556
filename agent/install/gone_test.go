package install

import (
	"slices"
	"strings"
	"testing"
)

// An uninstall that names another namespace than that of the installation
// changes nothing: what is of the whole cluster is the running agents'.
func TestUninstallElsewhere(t *testing.T) {
	o := UninstallOptions{Release: Release{Namespace: "net", Values: Default()}, RemovePolicies: true, CleanNodes: true, Say: t.Logf}
	for name, put := range map[string]func(s *store){
		"rights": func(s *store) {
			s.put("/apis/rbac.authorization.k8s.io/v1/clusterrolebindings/"+agentName, map[string]any{"kind": "ClusterRoleBinding",
				"metadata": map[string]any{"name": agentName, "labels": map[string]any{partOf: product}}, "subjects": []any{map[string]any{"namespace": "theirs"}}})
		},
		"agents": func(s *store) { // the path as a list over all namespaces has it
			s.put("/apis/apps/v1/daemonsets/"+agentName, map[string]any{"kind": "DaemonSet",
				"metadata": map[string]any{"name": agentName, "namespace": "theirs", "labels": map[string]any{partOf: product}}})
		},
	} {
		s, c := newStore(t)
		put(s)
		if _, err := c.Uninstall(t.Context(), o); err == nil || !strings.Contains(err.Error(), "use --namespace theirs") || len(s.written()) != 0 {
			t.Errorf("%s: %v", name, err)
		}
	}
}

// Whoever removed the namespace, or everything but what is on the nodes, has
// left the plugin there.
func TestUninstallAfterSomebodyElse(t *testing.T) {
	for name, left := range map[string]struct {
		keep       func(path string) bool
		cleanNodes bool
	}{
		"the namespace was removed": {keep: func(path string) bool { return !strings.Contains(path, "/namespaces/net") }},
		"everything was removed":    {keep: func(string) bool { return false }, cleanNodes: true},
	} {
		s, c := newStore(t)
		s.after = lives
		installed(t, c)
		for path := range s.objects {
			if !left.keep(path) {
				delete(s.objects, path)
			}
		}
		s.written()
		o := UninstallOptions{Release: Release{Namespace: "net", Values: Default()}, CleanNodes: left.cleanNodes, Say: t.Logf}
		stay, err := c.Uninstall(t.Context(), o)
		did := s.written()
		if err != nil || !strings.Contains(strings.Join(stay, "\n"), "/var/log/portcullis") || slices.Index(did, "+namespaces/net") != 0 || !slices.Contains(did, "+daemonsets/portcullis-cleanup") || len(s.objects) != 0 {
			t.Errorf("%s: %v; stay %q; did %q; left %v", name, err, stay, did, sortedKeys(s.objects))
		}
		// Once more there is nothing that says so; nobody is troubled.
		o.CleanNodes = false
		if stay, err := c.Uninstall(t.Context(), o); err != nil || len(stay) != 0 || len(s.written()) != 0 {
			t.Errorf("%s: again: %q, %v", name, stay, err)
		}
	}
}

// An issuer that is never replaced is told of.
func TestFormerIssuer(t *testing.T) {
	s, c := newStore(t)
	deployment := func(replicas, updated int64) {
		s.put("/apis/apps/v1/namespaces/net/deployments/"+issuerName, map[string]any{"kind": "Deployment", "metadata": map[string]any{"name": issuerName},
			"spec": map[string]any{"replicas": int64(2)}, "status": map[string]any{"replicas": replicas, "updatedReplicas": updated}})
	}
	deployment(2, 1)
	if got := c.unmade(t.Context()); len(got) != 1 || !strings.Contains(got[0], "1 of the issuer's pods are of a former release") {
		t.Errorf("%q", got)
	}
	deployment(2, 2)
	if got := c.unmade(t.Context()); len(got) != 0 {
		t.Errorf("%q", got)
	}
}
