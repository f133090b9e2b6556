//go:build e2e

package install

import (
	"context"
	"fmt"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"portcullis/agent/install"
	"portcullis/agent/kube"
	"portcullis/test/e2e/cluster"
)

// asAgent returns a kubeconfig with an agent's rights.
func (s *server) asAgent(t *testing.T) string {
	t.Helper()
	var got struct{ Status struct{ Token string } }
	s.eventually(t, func() error {
		return s.ask(http.MethodPost, "/api/v1/namespaces/portcullis/serviceaccounts/portcullis-agent/token", object{"apiVersion": "authentication.k8s.io/v1", "kind": "TokenRequest", "spec": object{"expirationSeconds": 3600}}, &got)
	})
	b, err := os.ReadFile(s.kubeconfig)
	must(t, err)
	path := filepath.Join(t.TempDir(), "kubeconfig")
	must(t, os.WriteFile(path, []byte(strings.ReplaceAll(string(b), adminToken, got.Status.Token)), 0o600))
	return path
}

const maxPodName = 253

func (s *server) addPod(t *testing.T, name, node string) (uid string) {
	t.Helper()
	var made struct{ Metadata struct{ UID string } }
	s.eventually(t, func() error { // once its service account is there
		return s.ask(http.MethodPost, "/api/v1/namespaces/default/pods", object{"apiVersion": "v1", "kind": "Pod", "metadata": object{"name": name},
			"spec": object{"nodeName": node, "containers": []object{{"name": "c", "image": "none"}}}}, &made)
	})
	return made.Metadata.UID
}

func (s *server) kubectl(t *testing.T, args ...string) string {
	t.Helper()
	root, err := cluster.ModuleRoot(t.Context())
	must(t, err)
	parts, err := cluster.Build(t.Context(), root, os.Stderr)
	must(t, err)
	out, err := exec.CommandContext(t.Context(), filepath.Join(parts.Kubernetes, "kubectl"), append([]string{"--kubeconfig", s.kubeconfig}, args...)...).CombinedOutput()
	if err != nil {
		t.Fatalf("kubectl %v: %v\n%s", args, err, out)
	}
	t.Logf("%s", out)
	return string(out)
}

// events are what `kubectl describe` would show of an object.
type events struct {
	Items []struct {
		Reason, Message, Type string
		Metadata              struct{ Name string }
		Series                *struct{ Count int }
		InvolvedObject        struct{ Kind, Name string }
	}
}

func (s *server) eventsOf(namespace, uid string) (e events, err error) {
	return e, s.ask(http.MethodGet, "/api/v1/namespaces/"+namespace+"/events?fieldSelector=involvedObject.uid%3D"+uid, nil, &e)
}

// TestEvents: with an agent's rights and no more, a real API server takes what is
// told of a pod, a policy and a node, and counts it.
func TestEvents(t *testing.T) {
	s := startServer(t)
	s.addNode(t, "n1", "10.244.1.0/24", "6.18.5")
	ctx, cancel := context.WithTimeout(t.Context(), 2*patience)
	defer cancel()
	c := connect(t, s, "portcullis")
	w := &words{}
	must(t, c.Install(ctx, install.Options{Release: release(t, "portcullis"), Say: w.say}))
	s.eventually(t, func() error {
		return s.ask(http.MethodPost, "/apis/cilium.io/v2/namespaces/default/ciliumnetworkpolicies", object{"apiVersion": "cilium.io/v2", "kind": "CiliumNetworkPolicy",
			"metadata": object{"name": "novel"}, "spec": object{"endpointSelector": object{}, "novel": 1}}, nil)
	})
	src, err := kube.New(kube.Config{Node: "n1", Kubeconfig: s.asAgent(t), StateDir: t.TempDir(), UserAgent: "test", Events: true})
	must(t, err)
	running, stop := context.WithCancel(ctx)
	done := make(chan error, 1)
	go func() { done <- src.Run(running) }()
	defer func() {
		stop()
		must(t, <-done)
	}()
	s.eventually(t, func() error {
		if p := src.Picture(); !p.Listed || len(p.Refused) != 1 {
			return fmt.Errorf("refused: %+v, %+v", p.Refused, src.Health())
		}
		return nil
	})
	told := src.Picture().Refused[0]
	policy := kube.About{APIVersion: told.APIVersion, Kind: told.Kind, Namespace: told.Namespace, Name: told.Name, UID: told.UID}
	node := kube.About{APIVersion: "v1", Kind: "Node", Name: "n1", UID: src.Picture().Nodes[0].UID}
	pod := kube.About{APIVersion: "v1", Kind: "Pod", Namespace: "default", Name: "web", UID: s.addPod(t, "web", "n1")}
	if policy.UID == "" || node.UID == "" {
		t.Fatalf("no UID: %+v, %+v", policy, node)
	}
	drop := kube.Event{About: pod, Warning: true, Reason: "PacketsDropped", Action: "Drop", Key: "a", Note: "policy-denied: packets to shop/db (10.244.2.7), TCP port 5432"}
	src.Events().Put(drop)
	for range 2 {
		src.Events().Put(kube.Event{About: policy, Warning: true, Reason: "PolicyRefused", Action: "Read", Note: told.Why, Shared: true})
	}
	must(t, src.Events().Now(ctx, kube.Event{About: policy, Warning: true, Reason: "PolicyRefused", Action: "Read", Note: told.Why, Shared: true}))
	must(t, src.Events().Now(ctx, kube.Event{About: node, Warning: true, Reason: "AgentFailed", Action: "End", Note: "it ended"}))
	expect := func(about kube.About, namespace, reason string, count int) {
		t.Helper()
		s.eventually(t, func() error {
			got, err := s.eventsOf(namespace, about.UID)
			if err == nil && len(got.Items) == 1 && got.Items[0].Reason == reason && got.Items[0].Type == "Warning" && got.Items[0].InvolvedObject.Kind == about.Kind &&
				(count == 1 || got.Items[0].Series != nil && got.Items[0].Series.Count == count) {
				return nil
			}
			return fmt.Errorf("%+v, %v; %+v", got, err, src.Events().Counts())
		})
	}
	expect(policy, "default", "PolicyRefused", 1)
	expect(node, "default", "AgentFailed", 1)
	expect(pod, "default", "PacketsDropped", 1)
	src.Events().Put(drop)
	src.Events().Put(drop)
	expect(pod, "default", "PacketsDropped", 3) // by a patch
	if text := s.kubectl(t, "describe", "pod", "web"); !strings.Contains(text, "PacketsDropped") || !strings.Contains(text, "(x3 over ") {
		t.Errorf("kubectl describe does not show it:\n%s", text)
	}
	long := kube.About{APIVersion: "v1", Kind: "Pod", Namespace: "default", Name: strings.Repeat("a", maxPodName), UID: "long"}
	must(t, src.Events().Now(ctx, kube.Event{About: long, Reason: "PacketsDropped", Action: "Drop", Note: strings.Repeat("é", 1000)}))
	src.Events().Put(kube.Event{About: kube.About{APIVersion: "v1", Kind: "Pod", Namespace: "nowhere", Name: "web", UID: "u"}, Reason: "PacketsDropped", Action: "Drop"})
	for end := time.Now().Add(patience); src.Events().Counts().Lost["refused"] != 1; time.Sleep(100 * time.Millisecond) {
		if time.Now().After(end) {
			t.Fatalf("an event in no namespace: %+v", src.Events().Counts())
		}
	}
}
