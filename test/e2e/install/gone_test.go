//go:build e2e

package install

import (
	"context"
	"net/http"
	"strings"
	"testing"

	"portcullis/agent/install"
)

// hold keeps an object from ending until it is let go.
func (s *server) hold(t *testing.T, path string, on bool) {
	t.Helper()
	var finalizers []string
	if on {
		finalizers = []string{"test.example.com/hold"}
	}
	must(t, s.ask(http.MethodPatch, path, object{"metadata": object{"finalizers": finalizers}}, nil))
}

// TestGone: what is being removed, or was by somebody else, is not taken for
// what is there.
func TestGone(t *testing.T) {
	s := startServer(t)
	s.addNode(t, "n1", "10.244.1.0/24", "6.18.5")
	s.kubelets(t)
	c := connect(t, s, "portcullis")
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	do(ctx, t, c, release(t, "portcullis"))
	t.Run("elsewhere", func(t *testing.T) {
		_, err := connect(t, s, "other").Uninstall(ctx, install.UninstallOptions{Release: release(t, "other"), RemovePolicies: true, CleanNodes: true, Say: t.Logf})
		if err == nil || !strings.Contains(err.Error(), "use --namespace portcullis") {
			t.Errorf("uninstall by another namespace: %v", err)
		}
		if !s.there(t, policyCRD) || !s.there(t, "/apis/rbac.authorization.k8s.io/v1/clusterrolebindings/portcullis-agent") {
			t.Error("it has removed what the agents need")
		}
	})
	t.Run("definition", func(t *testing.T) { tryEndingDefinition(ctx, t, s, c) })
	t.Run("namespace", func(t *testing.T) { tryEndingNamespace(ctx, t, s, c) })
}

// A definition that ends takes what is applied to it along: it is waited for.
func tryEndingDefinition(ctx context.Context, t *testing.T, s *server, c *install.Cluster) {
	policy := "/apis/cilium.io/v2/namespaces/default/ciliumnetworkpolicies/mine"
	must(t, s.ask(http.MethodPost, strings.TrimSuffix(policy, "/mine"), object{"apiVersion": "cilium.io/v2", "kind": "CiliumNetworkPolicy",
		"metadata": object{"name": "mine"}, "spec": object{}}, nil))
	s.hold(t, policy, true)
	must(t, s.ask(http.MethodDelete, policyCRD, nil, nil))
	w := &words{}
	w.on = func(line string) {
		if strings.Contains(line, "ciliumnetworkpolicies.cilium.io is being removed") {
			s.hold(t, policy, false)
		}
	}
	must(t, c.Install(ctx, install.Options{Release: release(t, "portcullis"), Say: w.say}))
	if !strings.Contains(w.text(), "CustomResourceDefinition ciliumnetworkpolicies.cilium.io created") || !s.there(t, policyCRD) {
		t.Errorf("said %s", w.text())
	}
}

// Who removes the namespace removes the agents, and leaves their plugin on the
// nodes, where no pod starts then.
func tryEndingNamespace(ctx context.Context, t *testing.T, s *server, c *install.Cluster) {
	const namespace, held = "/api/v1/namespaces/portcullis", "/api/v1/namespaces/portcullis/configmaps/portcullis-agent"
	s.hold(t, held, true)
	must(t, s.ask(http.MethodDelete, namespace, nil, nil))
	w := &words{}
	err := c.Install(ctx, install.Options{Release: release(t, "portcullis"), Say: w.say})
	if err == nil || !strings.Contains(err.Error(), "namespace portcullis is being removed") || w.text() != "" {
		t.Errorf("installed into a namespace that ends: %v; said %s", err, w.text())
	}
	s.hold(t, held, false)
	stay, err := c.Uninstall(ctx, install.UninstallOptions{Release: release(t, "portcullis"), Say: w.say})
	must(t, err)
	if !strings.Contains(w.text(), "node n1 is clean") || !strings.Contains(strings.Join(stay, "\n"), "/var/log/portcullis") || s.there(t, namespace) || s.there(t, policyCRD) {
		t.Errorf("stay %q; said %s", stay, w.text())
	}
	do(ctx, t, c, release(t, "portcullis"))
	if !s.there(t, policyCRD) || !s.there(t, namespace) {
		t.Error("it is not there again")
	}
}

// TestNoNodes: where no node has an agent there is none to clean.
func TestNoNodes(t *testing.T) {
	s := startServer(t)
	c := connect(t, s, "portcullis")
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	must(t, c.Install(ctx, install.Options{Release: release(t, "portcullis"), Say: t.Logf}))
	_, err := c.Uninstall(ctx, install.UninstallOptions{Release: release(t, "portcullis"), Say: t.Logf})
	must(t, err)
	if s.there(t, "/api/v1/namespaces/portcullis") || s.there(t, policyCRD) {
		t.Error("something is left")
	}
}

// TestOneNode: where there is room for one issuer only, an upgrade replaces it
// all the same.
func TestOneNode(t *testing.T) {
	s := startServer(t)
	s.addNode(t, "n1", "10.244.1.0/24", "6.18.5")
	s.kubelets(t)
	c := connect(t, s, "portcullis")
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	for _, tag := range []string{"v1", "v2"} {
		w := do(ctx, t, c, release(t, "portcullis", "image.tag="+tag))
		if !strings.Contains(w.text(), "issuer: 1 in the place of 2") || !strings.Contains(w.text(), "issuer: 1 of 1 ready\n") {
			t.Errorf("said %s", w.text())
		}
		var pods struct {
			Items []struct {
				Spec struct{ Containers []struct{ Image string } }
			}
		}
		must(t, s.ask(http.MethodGet, "/api/v1/namespaces/portcullis/pods?labelSelector=app.kubernetes.io%2Fname%3Dportcullis-issuer", nil, &pods))
		for _, p := range pods.Items {
			if p.Spec.Containers[0].Image != "portcullis:"+tag {
				t.Errorf("with %s there is an issuer of %s", tag, p.Spec.Containers[0].Image)
			}
		}
	}
}
