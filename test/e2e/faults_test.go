//go:build e2e

package e2e

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"strings"
	"testing"
	"time"
)

// stage is a server that only its friends may reach: friend and foe on its own
// node, and on another.
type stage struct {
	server, friend, stranger, near, foe pod
}

const stop = "/tmp/stop"

func newStage(t *testing.T, namespace string) stage {
	t.Helper()
	newNamespace(t, namespace, nil)
	good, bad := map[string]string{"is": "friend"}, map[string]string{"is": "foe"}
	apply(t,
		newPod(namespace, "server", "n1", map[string]string{"is": "server"}),
		newPod(namespace, "friend", "n2", good), newPod(namespace, "near", "n1", good),
		newPod(namespace, "stranger", "n2", bad), newPod(namespace, "foe", "n1", bad),
		policy(namespace, "friends", object{"podSelector": labels("is", "server"), "ingress": []any{object{"from": []any{object{"podSelector": labels("is", "friend")}}}}}))
	awaitReady(t, namespace)
	of := func(name string) pod { return podNamed(t, namespace, name) }
	s := stage{of("server"), of("friend"), of("stranger"), of("near"), of("foe")}
	must(t, eventually(t.Context(), func() error { return s.judge(t, s.server.ip(), s.server.ip6()) }))
	return s
}

// judge tries all four clients on addresses of the server, by their nodes'
// runtimes: no API server is asked.
func (s stage) judge(t *testing.T, ips ...string) (err error) {
	t.Helper()
	for _, c := range []struct {
		from pod
		want bool
	}{{s.friend, true}, {s.near, true}, {s.stranger, false}, {s.foe, false}} {
		for _, ip := range ips {
			o := s.ask(t, c.from, "tcp/"+hostPort(ip))
			if o.OK != c.want {
				err = errors.Join(err, fmt.Errorf("%s -> %s: passed %v, want %v (%s)", c.from.name(), o.Target, o.OK, c.want, o.Error))
			}
		}
	}
	return err
}

// ask tries a target from a pod.
func (s stage) ask(t *testing.T, from pod, target string) outcome {
	t.Helper()
	return onNode[outcome](t, from, "check", "-timeout", "3s", target)()
}

func hostPort(ip string) string {
	if strings.Contains(ip, ":") {
		return "[" + ip + "]:80"
	}
	return ip + ":80"
}

// traffic is a connection that lasts and ever new ones of friends, and attempts
// of the others, all at a time.
type traffic struct {
	t     *testing.T
	stage stage
	held  map[string]func() held
	tries map[string]func() hammered
	foes  map[string]func() hammered
}

func (s stage) traffic(t *testing.T) *traffic {
	t.Helper()
	f := &traffic{t: t, stage: s, held: map[string]func() held{}, tries: map[string]func() hammered{}, foes: map[string]func() hammered{}}
	for _, p := range []pod{s.friend, s.near} {
		for _, ip := range []string{s.server.ip(), s.server.ip6()} {
			key := p.Metadata.Name + " " + ip
			f.held[key] = onNode[held](t, p, "hold", "-for", "30m", "-until", stop, hostPort(ip))
			f.tries[key] = onNode[hammered](t, p, "hammer", "-for", "30m", "-until", stop, "-interval", "200ms", "-timeout", "20s", hostPort(ip))
		}
	}
	for _, p := range []pod{s.stranger, s.foe} {
		f.foes[p.Metadata.Name] = onNode[hammered](t, p, "hammer", "-for", "30m", "-until", stop, "-interval", "200ms", "-timeout", "1s", hostPort(s.server.ip()))
	}
	return f
}

// halt ends what goes on in pods until there is the file stop.
func (s stage) halt(t *testing.T, pods ...pod) {
	t.Helper()
	for _, p := range pods {
		_, err := k8s.Exec(t.Context(), p.Spec.NodeName, "ctr", "-n", "k8s.io", "tasks", "exec", "--exec-id", "stop-"+p.Metadata.Name, p.container(), "touch", stop)
		must(t, err)
	}
}

// end stops the traffic and judges it: no connection was lost, none that may
// not be was made.
func (f *traffic) end() {
	f.t.Helper()
	f.stage.halt(f.t, f.stage.friend, f.stage.near, f.stage.stranger, f.stage.foe)
	for name, wait := range f.held {
		h := wait()
		if h.Error != "" || h.Messages == 0 {
			f.t.Errorf("connection of %s: %+v", name, h)
		}
		f.t.Logf("connection of %s: %d messages, longest wait %.0f ms", name, h.Messages, float64(h.GapUS)/1e3)
	}
	for name, wait := range f.tries {
		h := wait()
		if h.OK != h.Tried || h.Tried == 0 {
			f.t.Errorf("new connections of %s: %d of %d: %s", name, h.OK, h.Tried, strings.Join(h.Errors, "; "))
		}
		f.t.Logf("new connections of %s: %d of %d, slowest %.0f ms", name, h.OK, h.Tried, float64(h.SlowestUS)/1e3)
	}
	for name, wait := range f.foes {
		h := wait()
		if h.OK != 0 || h.Tried == 0 {
			f.t.Errorf("forbidden connections of %s: %d of %d were made", name, h.OK, h.Tried)
		}
		f.t.Logf("forbidden connections of %s: %d of %d", name, h.OK, h.Tried)
	}
}

// testRollingRestart restarts every agent under traffic.
func testRollingRestart(t *testing.T) {
	s, shielded := newStage(t, "rolling"), newShield(t, "rolling-shield")
	flow, landings := s.traffic(t), shielded.landings(t)
	begin := time.Now()
	kubectl(t, "-n", "portcullis", "rollout", "restart", "daemonset/portcullis-agent")
	kubectl(t, "-n", "portcullis", "rollout", "status", "daemonset/portcullis-agent", "--timeout="+(2*patience).String())
	t.Logf("all agents restarted in %.1f s", time.Since(begin).Seconds())
	must(t, eventually(t.Context(), func() error { return shielded.holds(t) }))
	shielded.judge(t, landings)
	flow.end()
	must(t, eventually(t.Context(), func() error { return enforced(t) }))
}

// testOutage takes the API server away: everything goes on, and a pod's new
// sandbox is who its pod is.
func testOutage(t *testing.T) {
	steady, s := newStage(t, "steady"), newStage(t, "churn")
	if err := k8s.Kill("kube-apiserver"); err != nil {
		t.Fatal(err)
	}
	began := time.Now()
	back := func() {
		if err := k8s.Start("kube-apiserver"); err != nil && !strings.Contains(err.Error(), "already") {
			t.Error(err)
		}
		ctx, cancel := context.WithTimeout(context.Background(), patience)
		defer cancel()
		if err := eventually(ctx, func() error { _, err := k8s.Kubectl(ctx, "get", "--raw", "/readyz"); return err }); err != nil {
			t.Error(err)
		}
	}
	defer back()
	flow := steady.traffic(t)
	must(t, s.judge(t, s.server.ip(), s.server.ip6()))

	// The server's sandbox dies: its kubelet makes another, with other addresses.
	now := newSandbox(t, s.server)
	must(t, eventually(t.Context(), func() error { return s.judge(t, now.IPs...) }))
	// Its former addresses are nobody's.
	if o := s.ask(t, s.friend, "tcp/"+hostPort(s.server.ip())); o.OK {
		t.Errorf("the former address %s answers", s.server.ip())
	}
	// So it is under an agent that never heard the API server.
	restartAgent(t, s.server.Spec.NodeName)
	must(t, s.judge(t, now.IPs...))
	now = newSandbox(t, s.server, now.IPs...)
	must(t, eventually(t.Context(), func() error { return s.judge(t, now.IPs...) }))
	for left := time.Until(began.Add(*outageFlag)); left > 0; left = time.Until(began.Add(*outageFlag)) {
		must(t, s.judge(t, now.IPs...))
		time.Sleep(min(left, 5*time.Second))
	}
	flow.end()
	t.Logf("the API server was gone for %.0f s", time.Since(began).Seconds())
	back()
	must(t, eventually(t.Context(), func() error { return enforced(t) }))
	must(t, s.judge(t, now.IPs...))
}

// newSandbox kills a pod's sandbox and waits for the next, which has other
// addresses.
func newSandbox(t *testing.T, p pod, former ...string) (now endpoint) {
	t.Helper()
	if len(former) == 0 {
		former = []string{p.ip()}
	}
	begin := time.Now()
	must(t, killSandbox(t, p))
	must(t, eventually(t.Context(), func() error {
		list, err := endpoints(t.Context(), p.Spec.NodeName)
		if err != nil {
			return err
		}
		for _, e := range list {
			if e.Workload.UID == p.Metadata.UID && e.State == "active" && e.IPs[0] != former[0] {
				now = e
				return nil
			}
		}
		return fmt.Errorf("%s has no new sandbox", p.name())
	}))
	t.Logf("without an API server, %s has a new sandbox and is enforced after %.1f s", p.name(), time.Since(begin).Seconds())
	return now
}

// restartAgent ends a node's agent while there is no API server. Its kubelet
// starts it again, and it says that it knows the cluster by its snapshot.
func restartAgent(t *testing.T, node string) {
	t.Helper()
	id, _, err := agentTask(t, node)
	must(t, err)
	begin := time.Now()
	_, err = k8s.Exec(t.Context(), node, "ctr", "-n", "k8s.io", "tasks", "kill", "-s", "SIGTERM", id)
	must(t, err)
	var said string
	must(t, eventually(t.Context(), func() error {
		if now, _, err := agentTask(t, node); err != nil || now == id {
			return fmt.Errorf("the agent of %s has not been started again, %w", node, err)
		}
		var status struct {
			Sources []struct{ Name, State, Detail string }
		}
		out, err := portcullis(t.Context(), node, "status", "-o", "json")
		// It is not healthy, and says why not.
		if jsonErr := json.Unmarshal([]byte(out), &status); jsonErr != nil {
			return errors.Join(err, jsonErr)
		}
		for _, s := range status.Sources {
			if s.Name == "kubernetes" && strings.Contains(s.Detail, "of the snapshot of") {
				said = s.Detail
				return nil
			}
		}
		return fmt.Errorf("the agent of %s does not tell of a snapshot: %s", node, out)
	}))
	t.Logf("without an API server, the agent of %s was started again and serves after %.1f s: %s", node, time.Since(begin).Seconds(), said)
}

// killSandbox kills the process that holds a pod's namespaces.
func killSandbox(t *testing.T, p pod) error {
	t.Helper()
	filter := fmt.Sprintf(`labels."io.kubernetes.pod.uid"==%s,labels."io.cri-containerd.kind"==sandbox`, p.Metadata.UID)
	id, _, err := task(t, p.Spec.NodeName, filter)
	if err != nil {
		return err
	}
	_, err = k8s.Exec(t.Context(), p.Spec.NodeName, "ctr", "-n", "k8s.io", "tasks", "kill", "-s", "SIGKILL", id)
	return err
}
