//go:build e2e

package install

import (
	"context"
	"fmt"
	"maps"
	"net/http"
	"slices"
	"strings"
	"sync"
	"testing"

	"portcullis/agent/install"
	"portcullis/datapath/doctor"
)

// words are what a command said.
type words struct {
	mu    sync.Mutex
	lines []string // guarded by mu
	on    func(line string)
}

func (w *words) say(format string, args ...any) {
	line := fmt.Sprintf(format, args...)
	w.mu.Lock()
	w.lines = append(w.lines, line)
	w.mu.Unlock()
	if w.on != nil {
		w.on(line)
	}
}

func (w *words) text() string {
	w.mu.Lock()
	defer w.mu.Unlock()
	return strings.Join(w.lines, "\n")
}

func connect(t *testing.T, s *server, namespace string) *install.Cluster {
	t.Helper()
	c, err := install.Connect(install.Access{Kubeconfig: s.kubeconfig, UserAgent: "test"}, namespace)
	must(t, err)
	return c
}

func release(t *testing.T, namespace string, set ...string) install.Release {
	t.Helper()
	var layers []install.Layer
	for _, text := range set {
		l, err := install.SetLayer(text)
		must(t, err)
		layers = append(layers, l)
	}
	v, err := install.Merge(layers...)
	must(t, err)
	return install.Release{Namespace: namespace, Values: v}
}

const (
	crds       = "/apis/apiextensions.k8s.io/v1/customresourcedefinitions/"
	policyCRD  = crds + "ciliumnetworkpolicies.cilium.io"
	groupCRD   = crds + "ciliumcidrgroups.cilium.io"
	namespaced = "/apis/apps/v1/namespaces/portcullis/"
)

// TestLife is one installation, from the first command to nothing.
func TestLife(t *testing.T) {
	s := startServer(t)
	s.addNode(t, "n1", "10.244.1.0/24", "6.6.0-1-amd64")
	s.addNode(t, "n2", "10.244.2.0/24", "6.18.5")
	kubelets := s.kubelets(t)
	c := connect(t, s, "portcullis")
	// One definition is somebody else's.
	must(t, s.ask(http.MethodPost, strings.TrimSuffix(crds, "/"), object{"apiVersion": "apiextensions.k8s.io/v1", "kind": "CustomResourceDefinition",
		"metadata": object{"name": "ciliumcidrgroups.cilium.io", "labels": object{"io.cilium.k8s.crd.schema.version": "1.30"}},
		"spec": object{"group": "cilium.io", "scope": "Cluster", "names": object{"kind": "CiliumCIDRGroup", "plural": "ciliumcidrgroups", "singular": "ciliumcidrgroup"},
			"versions": []object{{"name": "v2", "served": true, "storage": true, "schema": object{"openAPIV3Schema": object{"type": "object", "x-kubernetes-preserve-unknown-fields": true}}}}}}, nil))
	checks, err := c.Checks(t.Context())
	must(t, err)
	if doctor.Failed(checks) || !strings.Contains(fmt.Sprint(checks), "somebody else's, which stay: ciliumcidrgroups.cilium.io") {
		t.Fatalf("checks: %+v", checks)
	}
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()

	t.Run("install", func(t *testing.T) { tryInstall(ctx, t, s, c, kubelets) })
	t.Run("upgrade", func(t *testing.T) { tryUpgrade(ctx, t, s, c) })
	t.Run("status", func(t *testing.T) { tryStatus(ctx, t, s, c, kubelets) })
	t.Run("uninstall", func(t *testing.T) { tryUninstall(ctx, t, s, c, kubelets) })
	t.Run("again", func(t *testing.T) { tryAgain(ctx, t, s, c) })
}

func do(ctx context.Context, t *testing.T, c *install.Cluster, r install.Release) *words {
	t.Helper()
	w := &words{}
	must(t, c.Install(ctx, install.Options{Release: r, Wait: true, Say: w.say}))
	return w
}

func tryInstall(ctx context.Context, t *testing.T, s *server, c *install.Cluster, k *kubelets) {
	w := do(ctx, t, c, release(t, "portcullis"))
	if !strings.Contains(w.text(), "DaemonSet portcullis-agent created") || !strings.HasSuffix(w.text(), "agents: 2 of 2 ready") {
		t.Errorf("said %s", w.text())
	}
	if !strings.Contains(w.text(), "ciliumcidrgroups.cilium.io kept") {
		t.Errorf("the other's definition was not kept: %s", w.text())
	}
	var crd struct {
		Metadata struct{ Labels map[string]string }
	}
	must(t, s.ask(http.MethodGet, groupCRD, nil, &crd))
	if crd.Metadata.Labels["app.kubernetes.io/part-of"] != "" {
		t.Errorf("the other's definition was changed: %+v", crd)
	}
	if !slices.Contains(k.came(), "portcullis-issuer") {
		t.Errorf("no issuer: %v", k.came())
	}
	again := do(ctx, t, c, release(t, "portcullis"))
	for _, bad := range []string{"created", "configured", "removed"} {
		if strings.Contains(again.text(), " "+bad) {
			t.Errorf("the second time changes something: %s", again.text())
		}
	}
	// A second installation would give nodes two agents.
	err := connect(t, s, "other").Install(ctx, install.Options{Release: release(t, "other"), Say: w.say})
	if err == nil || !strings.Contains(err.Error(), "installation in namespace portcullis") {
		t.Errorf("a second installation: %v", err)
	}
}

func tryUpgrade(ctx context.Context, t *testing.T, s *server, c *install.Cluster) {
	// What the server refuses in part changes nothing.
	settings := func() (o struct{ Data map[string]string }) {
		must(t, s.ask(http.MethodGet, "/api/v1/namespaces/portcullis/configmaps/portcullis-agent", nil, &o))
		return o
	}
	before := settings()
	bad := install.Options{Release: release(t, "portcullis", "config.ttl=50s", `agent.tolerations=[{operator: Perhaps}]`), Say: t.Logf}
	if err := c.Install(ctx, bad); err == nil || !strings.Contains(err.Error(), "nothing was changed") || !strings.Contains(err.Error(), "Perhaps") {
		t.Errorf("an upgrade that the server refuses: %v", err)
	}
	if after := settings(); len(before.Data) == 0 || !maps.Equal(before.Data, after.Data) {
		t.Errorf("it has changed %v to %v", before.Data, after.Data)
	}
	// What others have written into our objects stays.
	secret := "/api/v1/namespaces/portcullis/secrets/portcullis-issuer"
	must(t, s.ask(http.MethodPatch, secret, object{"data": object{"keyring.json": "a2V5"}}, nil))
	w := do(ctx, t, c, release(t, "portcullis", "image.tag=v2", "config.ttl=40s"))
	if !strings.Contains(w.text(), "DaemonSet portcullis-agent configured") || strings.Contains(w.text(), "removed") {
		t.Errorf("said %s", w.text())
	}
	var got struct{ Data map[string]string }
	must(t, s.ask(http.MethodGet, secret, nil, &got))
	if got.Data["keyring.json"] != "a2V5" {
		t.Error("the issuer's key is gone")
	}
	tryOtherInstallation(ctx, t, s, c)
	// With SPIRE the issuer is not part of it any more.
	w = do(ctx, t, c, release(t, "portcullis", "issuer.enabled=false", "spire.socketPath=/run/spire/agent-sockets/a.sock"))
	if s.there(t, namespaced+"deployments/portcullis-issuer") && !strings.Contains(w.text(), "Deployment portcullis-issuer removed") {
		t.Errorf("the issuer is left: %s", w.text())
	}
	s.eventually(t, func() error {
		if s.there(t, secret) || s.there(t, namespaced+"deployments/portcullis-issuer") {
			return fmt.Errorf("the issuer's objects are left: %s", w.text())
		}
		return nil
	})
	must(t, s.ask(http.MethodPost, "/apis/cilium.io/v2/namespaces/default/ciliumnetworkpolicies", object{"apiVersion": "cilium.io/v2", "kind": "CiliumNetworkPolicy",
		"metadata": object{"name": "mine"}, "spec": object{}}, nil))
	do(ctx, t, c, release(t, "portcullis"))
}

// tryOtherInstallation wants what an installation is known by to be left alone,
// as the API server has it, and the directories to be moved when that is asked for.
func tryOtherInstallation(ctx context.Context, t *testing.T, s *server, c *install.Cluster) {
	generation := func() (n float64) {
		var got struct{ Metadata struct{ Generation float64 } }
		must(t, s.ask(http.MethodGet, namespaced+"daemonsets/portcullis-agent", nil, &got))
		return got.Metadata.Generation
	}
	before := generation()
	w := &words{}
	err := c.Install(ctx, install.Options{Release: release(t, "portcullis", "trustDomain=other.example", "cni.binDir=/other/bin", "image.tag=v3"), Say: w.say})
	for _, want := range []string{"nothing was changed", `trustDomain: is "cluster.local" by ConfigMap portcullis-agent, would become "other.example"`, `cni.binDir: is "/opt/cni/bin" by DaemonSet portcullis-agent`} {
		if err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("no %q in: %v", want, err)
		}
	}
	if generation() != before || w.text() != "" {
		t.Errorf("it was changed: %s", w.text())
	}
	settings := "/api/v1/namespaces/portcullis/configmaps/portcullis-agent"
	must(t, s.ask(http.MethodPatch, settings, object{"data": object{"agent.yaml": "trust-domain: other.example\n"}}, nil))
	err = c.Install(ctx, install.Options{Release: release(t, "portcullis", "trustDomain=other.example"), Say: w.say})
	if err == nil || !strings.Contains(err.Error(), `is "cluster.local" by Deployment portcullis-issuer`) {
		t.Errorf("with settings that somebody has edited: %v", err)
	}
	must(t, s.ask(http.MethodPatch, settings, object{"data": object{"agent.yaml": "trust-domain: cluster.local\n"}}, nil))
	if w := do(ctx, t, c, release(t, "portcullis", "cni.binDir=/other/bin", "cni.move=true")); !strings.Contains(w.text(), "portcullis-cni in /opt/cni/bin") {
		t.Errorf("a move says %s", w.text())
	}
	do(ctx, t, c, release(t, "portcullis", "cni.move=true"))
}

func tryStatus(ctx context.Context, t *testing.T, s *server, c *install.Cluster, k *kubelets) {
	k.fail("portcullis-agent", "n2", "the programs need tcx")
	must(t, s.ask(http.MethodDelete, "/api/v1/namespaces/portcullis/pods?labelSelector=app.kubernetes.io%2Fname%3Dportcullis-agent", object{}, nil))
	s.addNode(t, "n3", "10.244.3.0/24", "6.12.1")
	must(t, s.ask(http.MethodPatch, "/api/v1/nodes/n3", object{"spec": object{"unschedulable": true}}, nil))
	s.eventually(t, func() error {
		status, err := c.Status(ctx)
		if err != nil {
			return err
		}
		for _, n := range status.Nodes {
			if n.Name == "n2" && n.State == install.StateFailing && n.Restarts == 3 && strings.Contains(fmt.Sprint(n.Problems), "the programs need tcx") && !status.Healthy {
				return nil
			}
		}
		return fmt.Errorf("%+v", status)
	})
	k.fail("portcullis-agent", "n2", "")
	// A node that has none is one; the label takes that back.
	must(t, s.ask(http.MethodPatch, namespaced+"daemonsets/portcullis-agent", object{"spec": object{"template": object{"spec": object{"nodeSelector": object{"agent": "yes"}}}}}, nil))
	for _, n := range []string{"n1", "n2"} {
		must(t, s.ask(http.MethodPatch, "/api/v1/nodes/"+n, object{"metadata": object{"labels": object{"agent": "yes"}}}, nil))
	}
	state := func(want string) {
		s.eventually(t, func() error {
			status, err := c.Status(ctx)
			if err != nil {
				return err
			}
			for _, n := range status.Nodes {
				if n.Name == "n3" && n.State == want {
					return nil
				}
			}
			return fmt.Errorf("n3 is not %s: %+v", want, status)
		})
	}
	state(install.StateNoAgent)
	must(t, s.ask(http.MethodPatch, "/api/v1/nodes/n3", object{"metadata": object{"labels": object{"node-restriction.kubernetes.io/portcullis-unmanaged": "true"}}}, nil))
	state(install.StateUnmanaged)
}

func tryUninstall(ctx context.Context, t *testing.T, s *server, c *install.Cluster, k *kubelets) {
	k.fail("portcullis-cleanup", "n2", "is an agent running?")
	options := func(w *words) install.UninstallOptions {
		return install.UninstallOptions{Release: release(t, "portcullis"), Say: w.say}
	}
	// It is interrupted as soon as one node is clean.
	first, stop := context.WithCancel(ctx)
	defer stop()
	w := &words{on: func(line string) {
		if line == "node n1 is clean" {
			stop()
		}
	}}
	_, err := c.Uninstall(first, options(w))
	if err == nil || !strings.Contains(err.Error(), "1 of 2 nodes are clean; not yet: n2") || !strings.Contains(err.Error(), "is an agent running?") {
		t.Fatalf("interrupted: %v; said %s", err, w.text())
	}
	if s.there(t, namespaced+"daemonsets/portcullis-agent") || !s.there(t, "/api/v1/namespaces/portcullis/serviceaccounts/portcullis-agent") || !s.there(t, policyCRD) {
		t.Fatal("the agents go first, and nothing else before the nodes are clean")
	}
	if err := c.Install(ctx, install.Options{Release: release(t, "portcullis"), Say: w.say}); err == nil || !strings.Contains(err.Error(), "an uninstall was begun") {
		t.Errorf("installed amid an uninstall: %v", err)
	}
	k.fail("portcullis-cleanup", "n2", "")
	w = &words{}
	stay, err := c.Uninstall(ctx, options(w))
	must(t, err)
	for _, want := range []string{"/var/log/portcullis", "ciliumnetworkpolicies.cilium.io: there is default/mine; they would go with it", "ciliumcidrgroups.cilium.io: somebody else has made it", "portcullis-unmanaged- "} {
		if !strings.Contains(strings.Join(stay, "\n")+" ", want) {
			t.Errorf("does not say %q: %q", want, stay)
		}
	}
	for _, path := range []string{"/api/v1/namespaces/portcullis", "/apis/rbac.authorization.k8s.io/v1/clusterroles/portcullis-agent",
		"/apis/rbac.authorization.k8s.io/v1/clusterrolebindings/portcullis-issuer", crds + "ciliumclusterwidenetworkpolicies.cilium.io"} {
		if s.there(t, path) {
			t.Errorf("%s is left", path)
		}
	}
	for _, path := range []string{policyCRD, groupCRD, "/apis/cilium.io/v2/namespaces/default/ciliumnetworkpolicies/mine"} {
		if !s.there(t, path) {
			t.Errorf("%s is gone", path)
		}
	}
}

func tryAgain(ctx context.Context, t *testing.T, s *server, c *install.Cluster) {
	w := &words{}
	stay, err := c.Uninstall(ctx, install.UninstallOptions{Release: release(t, "portcullis"), RemovePolicies: true, Say: w.say})
	must(t, err)
	s.eventually(t, func() error {
		if s.there(t, policyCRD) {
			return fmt.Errorf("the definition is left; stay %q", stay)
		}
		return nil
	})
	if !s.there(t, groupCRD) || strings.Contains(w.text(), "node ") {
		t.Errorf("said %s", w.text())
	}
	stay, err = c.Uninstall(ctx, install.UninstallOptions{Release: release(t, "portcullis"), Say: w.say})
	if err != nil || strings.Contains(fmt.Sprint(stay), "/var/log") {
		t.Errorf("of nothing: %q, %v", stay, err)
	}
}
