//go:build e2e

package install

import (
	"context"
	"net/http"
	"sync"
	"testing"
	"time"
)

type object = map[string]any

// addNode makes a node that is ready, with a range of pods.
func (s *server) addNode(t *testing.T, name, cidr, kernel string) {
	t.Helper()
	must(t, s.ask(http.MethodPost, "/api/v1/nodes", object{"apiVersion": "v1", "kind": "Node", "metadata": object{"name": name},
		"spec": object{"podCIDR": cidr, "podCIDRs": []string{cidr}}}, nil))
	must(t, s.ask(http.MethodPatch, "/api/v1/nodes/"+name+"/status", object{"status": object{
		"conditions":  []object{{"type": "Ready", "status": "True"}},
		"allocatable": object{"cpu": "4", "memory": "8Gi", "pods": "110"}, "capacity": object{"cpu": "4", "memory": "8Gi", "pods": "110"},
		"nodeInfo": object{"kernelVersion": kernel, "operatingSystem": "linux"}}}, nil))
}

// kubelets play the nodes' kubelets until the test ends.
type kubelets struct {
	s *server

	mu      sync.Mutex
	failing map[string]string // guarded by mu; by pod's component and node: why it does not start
	started []string          // guarded by mu; components whose pods came up, in order
}

func (s *server) kubelets(t *testing.T) *kubelets {
	k := &kubelets{s: s, failing: map[string]string{}}
	ctx, cancel := context.WithCancel(context.Background())
	var wg sync.WaitGroup
	wg.Go(func() {
		for ctx.Err() == nil {
			k.round()
			select {
			case <-ctx.Done():
			case <-time.After(50 * time.Millisecond):
			}
		}
	})
	t.Cleanup(func() { cancel(); wg.Wait() })
	return k
}

type podObject struct {
	Metadata struct {
		Name, Namespace   string
		DeletionTimestamp string
		Labels            map[string]string
	}
	Spec struct {
		NodeName string
	}
	Status struct {
		Phase string
	}
}

// round does what kubelets do: pods start, or fail, or end.
func (k *kubelets) round() {
	var list struct{ Items []podObject }
	if k.s.ask(http.MethodGet, "/api/v1/pods", nil, &list) != nil {
		return // the server comes up or ends
	}
	for _, p := range list.Items {
		path := "/api/v1/namespaces/" + p.Metadata.Namespace + "/pods/" + p.Metadata.Name
		component := p.Metadata.Labels["app.kubernetes.io/name"]
		k.mu.Lock()
		why := k.failing[component+" "+p.Spec.NodeName]
		k.mu.Unlock()
		switch {
		case p.Spec.NodeName == "":
		case p.Metadata.DeletionTimestamp != "":
			_ = k.s.ask(http.MethodDelete, path, object{"gracePeriodSeconds": 0}, nil) // again in the next round
		case why != "":
			_ = k.s.ask(http.MethodPatch, path+"/status", object{"status": object{"phase": "Pending", "conditions": []object{{"type": "Ready", "status": "False"}},
				"containerStatuses": []object{{"name": "agent", "image": "x", "imageID": "x", "ready": false, "restartCount": 3,
					"state":     object{"waiting": object{"reason": "CrashLoopBackOff", "message": "back-off 40s"}},
					"lastState": object{"terminated": object{"exitCode": 1, "message": why}}}}}}, nil)
		case p.Status.Phase != "Running":
			if k.s.ask(http.MethodPatch, path+"/status", object{"status": object{"phase": "Running", "conditions": []object{{"type": "Ready", "status": "True"}}}}, nil) == nil {
				k.mu.Lock()
				k.started = append(k.started, component)
				k.mu.Unlock()
			}
		}
	}
}

// fail lets pods of a component on a node not start, or start again ("").
func (k *kubelets) fail(component, node, why string) {
	k.mu.Lock()
	defer k.mu.Unlock()
	k.failing[component+" "+node] = why
}

// came is the order in which components' pods came up.
func (k *kubelets) came() []string {
	k.mu.Lock()
	defer k.mu.Unlock()
	return append([]string(nil), k.started...)
}
