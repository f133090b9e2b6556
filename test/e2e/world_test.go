//go:build e2e

package e2e

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"portcullis/test/e2e/cluster"
)

// patience is how long a thing may take that must happen. On a busy machine
// all is slow; no test fails for that.
const patience = 3 * time.Minute

type object = map[string]any

// kubectl runs kubectl, which must succeed.
func kubectl(t *testing.T, args ...string) string {
	t.Helper()
	out, err := k8s.Kubectl(t.Context(), args...)
	if err != nil {
		t.Fatal(err)
	}
	return out
}

func apply(t *testing.T, objects ...any) {
	t.Helper()
	if err := k8s.Apply(t.Context(), objects...); err != nil {
		t.Fatal(err)
	}
}

// eventually repeats f until it returns nil, and returns the last error when
// that does not happen in time.
func eventually(ctx context.Context, f func() error) error {
	ctx, cancel := context.WithTimeout(ctx, patience)
	defer cancel()
	for {
		err := f()
		if err == nil {
			return nil
		}
		select {
		case <-ctx.Done():
			return err
		case <-time.After(200 * time.Millisecond):
		}
	}
}

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// pod is a pod as the API server has it.
type pod struct {
	Metadata struct{ Name, Namespace, UID, DeletionTimestamp string }
	Spec     struct {
		NodeName    string
		HostNetwork bool
	}
	Status struct {
		Phase             string
		PodIPs            []struct{ IP string }
		ContainerStatuses []struct {
			RestartCount int
			ContainerID  string
		}
	}
}

func (p pod) name() string { return p.Metadata.Namespace + "/" + p.Metadata.Name }
func (p pod) ip() string   { return p.Status.PodIPs[0].IP }
func (p pod) ip6() string  { return p.Status.PodIPs[1].IP }

// container is the id of its only container, as containerd has it.
func (p pod) container() string {
	return strings.TrimPrefix(p.Status.ContainerStatuses[0].ContainerID, "containerd://")
}

// nodeNamed is a node of the cluster, by its name.
func nodeNamed(name string) cluster.Node {
	nodes := k8s.Nodes()
	return nodes[slices.IndexFunc(nodes, func(n cluster.Node) bool { return n.Name == name })]
}

func pods(t *testing.T, args ...string) (list []pod) {
	t.Helper()
	var all struct{ Items []pod }
	must(t, json.Unmarshal([]byte(kubectl(t, append([]string{"get", "pods", "-o", "json"}, args...)...)), &all))
	return all.Items
}

func podNamed(t *testing.T, namespace, name string) pod {
	t.Helper()
	var p pod
	must(t, json.Unmarshal([]byte(kubectl(t, "-n", namespace, "get", "pod", name, "-o", "json")), &p))
	return p
}

// awaitReady waits for all pods of a namespace.
func awaitReady(t *testing.T, namespace string) {
	t.Helper()
	kubectl(t, "-n", namespace, "wait", "--for=condition=Ready", "pods", "--all", "--timeout="+patience.String())
}

// newPod is a pod that serves on TCP 80 and 81 and UDP 80 and 81, on a node (""
// is the scheduler's choice).
func newPod(namespace, name, node string, labels map[string]string) object {
	spec := object{
		"terminationGracePeriodSeconds": 1,
		"containers": []any{object{"name": "c", "image": cluster.ProbeImage, "imagePullPolicy": "Never",
			"args":           []string{"serve", "-tcp", "80,81", "-udp", "80,81"},
			"ports":          []any{object{"name": "serve-80-tcp", "containerPort": 80, "protocol": "TCP"}, object{"name": "serve-81-udp", "containerPort": 81, "protocol": "UDP"}},
			"readinessProbe": object{"tcpSocket": object{"port": 80}, "periodSeconds": 1}}},
	}
	if node != "" {
		spec["nodeSelector"] = object{"kubernetes.io/hostname": node}
	}
	return object{"apiVersion": "v1", "kind": "Pod", "metadata": object{"namespace": namespace, "name": name, "labels": labels}, "spec": spec}
}

// newNamespace makes a namespace that the test's end removes.
func newNamespace(t *testing.T, name string, labels map[string]string) {
	t.Helper()
	apply(t, object{"apiVersion": "v1", "kind": "Namespace", "metadata": object{"name": name, "labels": labels}})
	t.Cleanup(func() {
		ctx, cancel := context.WithTimeout(context.Background(), patience)
		defer cancel()
		if _, err := k8s.Kubectl(ctx, "delete", "namespace", name, "--wait=true"); err != nil {
			t.Error(err)
		}
	})
	must(t, eventually(t.Context(), func() error {
		_, err := k8s.Kubectl(t.Context(), "-n", name, "get", "serviceaccount", "default")
		return err
	}))
}

// outcome is a line of `probe check`.
type outcome struct {
	Target string
	OK     bool
	Name   string
	Error  string
}

// check tries targets from within a pod.
func check(ctx context.Context, namespace, name string, targets ...string) (out []outcome, err error) {
	args := append([]string{"-n", namespace, "exec", name, "--", "/probe", "check", "-timeout", "3s"}, targets...)
	text, err := k8s.Kubectl(ctx, args...)
	if err != nil {
		return nil, err
	}
	return outcomes(text, len(targets))
}

func outcomes(text string, want int) (out []outcome, err error) {
	for d := json.NewDecoder(strings.NewReader(text)); d.More(); {
		var o outcome
		if err := d.Decode(&o); err != nil {
			return nil, err
		}
		out = append(out, o)
	}
	if len(out) != want {
		return nil, fmt.Errorf("%d outcomes of %d targets: %s", len(out), want, text)
	}
	return out, nil
}

// background runs a probe in a pod that tells at its end what happened. wait
// returns that.
func background[T any](t *testing.T, namespace, name string, args ...string) (wait func() T) {
	t.Helper()
	cmd := k8s.KubectlCommand(t.Context(), append([]string{"-n", namespace, "exec", name, "--", "/probe"}, args...)...)
	return start[T](t, cmd)
}

// onNode does so by the node's runtime, which needs no API server.
func onNode[T any](t *testing.T, p pod, args ...string) (wait func() T) {
	t.Helper()
	said := probing(t, p, args...)
	return func() (out T) {
		t.Helper()
		text, err := said()
		if err == nil {
			err = json.Unmarshal([]byte(text), &out)
		}
		if err != nil {
			t.Fatalf("in %s: probe %s: %v: %s", p.name(), strings.Join(args, " "), err, text)
		}
		return out
	}
}

// probing runs the probe in a pod by the node's runtime; wait returns what it said.
// The runtime's shim writes that to a file on the node. It does not come by ctr's
// pipes: ctr opens each in a thread of its own, and one that it has not opened when
// the command has ended, as happens on a busy machine, it closes unread, and ends
// with the command's status.
func probing(t *testing.T, p pod, args ...string) (wait func() (string, error)) {
	t.Helper()
	id := fmt.Sprintf("e2e-%d", time.Now().UnixNano())
	file := "/run/e2e/" + id
	cmd, err := nodeCommand(t.Context(), p.Spec.NodeName, append([]string{"ctr", "-n", "k8s.io", "tasks", "exec", "--exec-id", id, "--log-uri", "file://" + file, p.container(), "/probe"}, args...)...)
	must(t, err)
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	must(t, cmd.Start())
	return func() (text string, err error) {
		if err := cmd.Wait(); err != nil {
			text, _ := k8s.Exec(t.Context(), p.Spec.NodeName, "cat", file)
			return text, fmt.Errorf("%w: %s", err, strings.TrimSpace(stderr.String()))
		}
		err = eventually(t.Context(), func() (err error) { // on a busy machine the shim writes after ctr has ended
			if text, err = k8s.Exec(t.Context(), p.Spec.NodeName, "cat", file); err == nil && !strings.HasSuffix(text, "\n") {
				err = errors.New("it ended with status 0, and what it said has no end")
			}
			return err
		})
		return text, err
	}
}

// nodeCommand is a command on a node that ends with ctx, and all that it
// started: nsenter leaves its child behind otherwise.
func nodeCommand(ctx context.Context, node string, args ...string) (*exec.Cmd, error) {
	cmd, err := k8s.NodeCommand(ctx, node, args...)
	if err != nil {
		return nil, err
	}
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	cmd.Cancel = func() error { return syscall.Kill(-cmd.Process.Pid, syscall.SIGKILL) }
	return cmd, nil
}

func start[T any](t *testing.T, cmd *exec.Cmd) func() T {
	t.Helper()
	var stdout, stderr bytes.Buffer
	cmd.Stdout, cmd.Stderr = &stdout, &stderr
	must(t, cmd.Start())
	return func() (out T) {
		t.Helper()
		if err := cmd.Wait(); err != nil {
			t.Fatalf("%v: %v: %s", cmd.Args, err, stderr.String())
		}
		if err := json.Unmarshal(stdout.Bytes(), &out); err != nil {
			t.Fatalf("%v: %v: %s", cmd.Args, err, stdout.String())
		}
		return out
	}
}

type held struct {
	Messages int
	GapUS    int64 `json:"gap_us"`
	Error    string
}

type hammered struct {
	Tried, OK, Timeouts int
	SlowestUS           int64 `json:"slowest_us"`
	Errors              []string
}

// endpoint is one of `portcullis endpoint list`.
type endpoint struct {
	Workload struct{ Namespace, Name, UID string }
	IPs      []string
	State    string
}

// portcullis runs the command on a node, beside its agent.
func portcullis(ctx context.Context, node string, args ...string) (string, error) {
	return k8s.Exec(ctx, node, append([]string{program}, args...)...)
}

func endpoints(ctx context.Context, node string) (list []endpoint, err error) {
	text, err := portcullis(ctx, node, "endpoint", "list", "-o", "json")
	if err != nil {
		return nil, err
	}
	return list, json.Unmarshal([]byte(text), &list)
}

// enforced reports whether every pod that has an address of its own is an
// active endpoint of its node with all its addresses.
func enforced(t *testing.T) error {
	t.Helper()
	have := map[string]endpoint{}
	for _, n := range k8s.Nodes() {
		list, err := endpoints(t.Context(), n.Name)
		if err != nil {
			return err
		}
		for _, e := range list {
			have[n.Name+" "+e.Workload.UID] = e
		}
	}
	for _, p := range pods(t, "-A") {
		if p.Spec.HostNetwork || p.Status.Phase != "Running" {
			continue
		}
		e, ok := have[p.Spec.NodeName+" "+p.Metadata.UID]
		switch {
		case !ok:
			return fmt.Errorf("pod %s on %s is no endpoint", p.name(), p.Spec.NodeName)
		case e.State != "active":
			return fmt.Errorf("pod %s is %s", p.name(), e.State)
		case len(e.IPs) != len(p.Status.PodIPs):
			return fmt.Errorf("pod %s has the addresses %v, its endpoint %v", p.name(), p.Status.PodIPs, e.IPs)
		}
	}
	return nil
}

// operator is the product's command as the cluster's administrator runs it.
func operator(ctx context.Context, args ...string) *exec.Cmd {
	return k8s.WorldCommand(ctx, append([]string{program}, append(args, "--kubeconfig="+filepath.Join(k8s.Dir(), "pki", "admin.kubeconfig"))...)...)
}

// install installs as docs/kubernetes.md says, a second time without changing
// anything, and waits until every pod is enforced.
func install(t *testing.T) {
	t.Helper()
	for _, already := range []bool{false, true} {
		cmd := operator(t.Context(), "install", "--timeout="+patience.String())
		out, err := cmd.CombinedOutput()
		t.Logf("portcullis install:\n%s", out)
		if err != nil || already && strings.Contains(string(out), " configured\n") {
			t.Fatalf("install, done already: %v: %v", already, err)
		}
	}
	must(t, eventually(t.Context(), func() error { return enforced(t) }))
	clusterStatus(t)
}

// clusterStatus asks what the operator asks, and every agent must answer.
func clusterStatus(t *testing.T) {
	t.Helper()
	out, err := operator(t.Context(), "status", "--cluster", "-o", "json", "--wait", "--timeout="+patience.String()).Output()
	var got struct {
		Healthy bool
		Nodes   []struct {
			Node, State, Version string
			Endpoints            int
		}
	}
	if perr := json.Unmarshal(out, &got); err != nil || perr != nil || !got.Healthy || len(got.Nodes) != len(k8s.Nodes()) {
		t.Fatalf("status --cluster: %v, %v: %s", err, perr, out)
	}
	for _, n := range got.Nodes {
		if n.State != "ok" || n.Version == "" {
			t.Errorf("status --cluster: %+v", n)
		}
	}
}

// atEnd removes what a test applied.
func atEnd(t *testing.T, args ...string) {
	t.Helper()
	t.Cleanup(func() {
		ctx, cancel := context.WithTimeout(context.Background(), patience)
		defer cancel()
		if _, err := k8s.Kubectl(ctx, append([]string{"delete", "--ignore-not-found", "--wait=true"}, args...)...); err != nil {
			t.Error(err)
		}
	})
}
