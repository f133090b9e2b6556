//go:build e2e

package e2e

import (
	"encoding/json"
	"fmt"
	"slices"
	"strings"
	"testing"
)

// task returns the id and the pid, on the node, of the container of the runtime
// that runs and that a filter selects.
func task(t *testing.T, node, filter string) (id, pid string, err error) {
	t.Helper()
	known, err := k8s.Exec(t.Context(), node, "ctr", "-n", "k8s.io", "containers", "list", "-q", filter)
	if err != nil {
		return "", "", err
	}
	running, err := k8s.Exec(t.Context(), node, "ctr", "-n", "k8s.io", "tasks", "list")
	if err != nil {
		return "", "", err
	}
	for line := range strings.Lines(running) {
		if f := strings.Fields(line); len(f) == 3 && f[2] == "RUNNING" && slices.Contains(strings.Fields(known), f[0]) {
			return f[0], f[1], nil
		}
	}
	return "", "", fmt.Errorf("on %s no container runs with %s", node, filter)
}

// agentTask is the agent's container.
func agentTask(t *testing.T, node string) (id, pid string, err error) {
	t.Helper()
	return task(t, node, `labels."io.kubernetes.pod.namespace"==portcullis,labels."io.kubernetes.container.name"==agent`)
}

// testStart: a pod that starts is under policy before it runs, and probes come
// through.
func testStart(t *testing.T) {
	t.Run("probes and hosts", testHosts)
	t.Run("without an agent", testNoAgent)
}

// testHosts: the kubelet reaches its pods whatever policy says; the host of
// another node is remote-node, and judged as that.
func testHosts(t *testing.T) {
	const ns = "hosts"
	newNamespace(t, ns, nil)
	probed := newPod(ns, "probed", "n1", map[string]string{"pod": "probed"})
	c := probed["spec"].(object)["containers"].([]any)[0].(object)
	c["args"] = []string{"deathstar"}
	c["readinessProbe"] = object{"httpGet": object{"path": "/v1", "port": 80}, "periodSeconds": 1}
	cilium := func(name, entity string) object {
		return object{"apiVersion": "cilium.io/v2", "kind": "CiliumNetworkPolicy", "metadata": object{"namespace": ns, "name": name},
			"spec": object{"endpointSelector": labels("pod", name), "ingress": []any{object{"fromEntities": []string{entity}}}}}
	}
	servers := []string{"nobody", "from-nodes", "from-world"}
	apply(t, policy(ns, "nobody", object{"podSelector": object{"matchExpressions": []any{object{"key": "pod", "operator": "In", "values": []string{"probed", "nobody"}}}}, "policyTypes": ingressOnly}),
		cilium("from-nodes", "remote-node"), cilium("from-world", "world"),
		probed, onHost(newPod(ns, "host1", "n1", nil)), onHost(newPod(ns, "host2", "n2", nil)), newPod(ns, "pod2", "n2", nil))
	for _, s := range servers {
		apply(t, newPod(ns, s, "n1", map[string]string{"pod": s}))
	}
	// Ready is who answers the kubelet, by TCP or by HTTP.
	awaitReady(t, ns)
	var targets []string
	for _, s := range servers {
		p := podNamed(t, ns, s)
		targets = append(targets, "tcp/"+hostPort(p.ip()), "tcp/"+hostPort(p.ip6()))
	}
	for client, may := range map[string][]string{"host1": servers, "host2": {"from-nodes"}, "pod2": nil} {
		must(t, eventually(t.Context(), func() error {
			out, err := check(t.Context(), ns, client, targets...)
			if err != nil {
				return err
			}
			for i, o := range out {
				if want := slices.Contains(may, servers[i/2]); o.OK != want {
					return fmt.Errorf("%s -> %s %s: passed %v, want %v (%s)", client, servers[i/2], o.Target, o.OK, want, o.Error)
				}
			}
			return nil
		}))
	}
}

// testNoAgent: while a node's agent does not answer, no pod starts there; when
// it does again they start, and are under policy.
func testNoAgent(t *testing.T) {
	const ns, node = "unmanned", "n3"
	newNamespace(t, ns, nil)
	_, pid, err := agentTask(t, node)
	must(t, err)
	signal := func(name string) error {
		_, err := k8s.Exec(t.Context(), node, "busybox", "kill", "-"+name, pid)
		return err
	}
	must(t, signal("STOP"))
	running := false
	defer func() {
		if !running {
			_ = signal("CONT") // the failure is told already
		}
	}()
	apply(t, policy(ns, "nobody", object{"podSelector": object{}, "policyTypes": ingressOnly}),
		newPod(ns, "late", node, nil), newPod(ns, "elsewhere", "n2", nil))
	var said string
	must(t, eventually(t.Context(), func() error {
		out, err := k8s.Kubectl(t.Context(), "-n", ns, "get", "events", "-o", "json", "--field-selector", "involvedObject.name=late,reason=FailedCreatePodSandBox")
		if err != nil {
			return err
		}
		var events struct{ Items []struct{ Message string } }
		if err := json.Unmarshal([]byte(out), &events); err != nil {
			return err
		}
		for _, e := range events.Items {
			if strings.Contains(e.Message, "portcullis") {
				said = e.Message
				return nil
			}
		}
		return fmt.Errorf("no event tells why the pod does not start: %+v", events.Items)
	}))
	t.Logf("the pod does not start: %s", said)
	if p := podNamed(t, ns, "late"); p.Status.Phase != "Pending" || len(p.Status.PodIPs) != 0 {
		t.Errorf("a pod started without an agent: %+v", p.Status)
	}
	must(t, signal("CONT"))
	running = true
	awaitReady(t, ns)
	late := podNamed(t, ns, "late")
	out, err := check(t.Context(), ns, "elsewhere", "tcp/"+hostPort(late.ip()), "tcp/"+hostPort(late.ip6()))
	must(t, err)
	if out[0].OK || out[1].OK {
		t.Errorf("a pod that started late is not under policy: %+v", out)
	}
	must(t, eventually(t.Context(), func() error { return enforced(t) }))
}
