//go:build e2e

package e2e

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"
)

// smallDisks are directories of the product on n1 that are small file systems of
// their own, so that they can be filled without anything else of the node.
var smallDisks = []string{"/run/portcullis", "/var/lib/portcullis", "/var/log/portcullis"}

// TestChange is what happens to an installation: pods that come and go in a row,
// agents that are evicted, that cannot start, that are of another version, disks
// that are full, nodes that get another address or another range. All of it under
// traffic. It is no part of `make e2e`: `make e2e-change`.
func TestChange(t *testing.T) {
	for _, dir := range smallDisks {
		_, err := k8s.Exec(t.Context(), "n1", "busybox", "sh", "-c", `mkdir -p "$0" && mount -t tmpfs -o size=16m,mode=755 tmpfs "$0"`, dir)
		must(t, err)
	}
	if !t.Run("install", func(t *testing.T) { installWith(t, "metrics.enabled=true") }) {
		t.Fatal("without an installation there is nothing to try")
	}
	t.Run("pods in a row", testChurn)
	t.Run("an agent is evicted", testEvicted)
	t.Run("an agent cannot start", testCannotStart)
	t.Run("another version and back", testVersions)
	t.Run("full disks", testFullDisks)
	t.Run("a node has another address", testOtherAddress)
	t.Run("a node has another range", testOtherRange)
}

// installWith installs with values, which may be another installation's.
func installWith(t *testing.T, set ...string) {
	t.Helper()
	args := []string{"install", "--timeout=" + patience.String()}
	for _, s := range set {
		args = append(args, "--set", s)
	}
	out, err := operator(t.Context(), args...).CombinedOutput()
	if err != nil {
		t.Fatalf("portcullis install: %v\n%s", err, out)
	}
	must(t, eventually(t.Context(), func() error { return enforced(t) }))
}

// within is eventually, for what takes longer.
func within(ctx context.Context, limit time.Duration, f func() error) error {
	err := errors.New("nothing was tried")
	for ends := time.Now().Add(limit); time.Now().Before(ends) && ctx.Err() == nil; time.Sleep(time.Second) {
		if err = f(); err == nil {
			return nil
		}
	}
	return err
}

// agentPod is the agent's pod of a node that is not ending.
func agentPod(t *testing.T, node string) (pod, error) {
	t.Helper()
	out, err := k8s.Kubectl(t.Context(), "-n", "portcullis", "get", "pods", "-l", "app.kubernetes.io/name=portcullis-agent", "--field-selector", "spec.nodeName="+node, "-o", "json")
	if err != nil {
		return pod{}, err
	}
	var all struct{ Items []pod }
	if err := json.Unmarshal([]byte(out), &all); err != nil {
		return pod{}, err
	}
	list := slices.DeleteFunc(all.Items, func(p pod) bool { return p.Metadata.DeletionTimestamp != "" })
	if len(list) != 1 {
		return pod{}, fmt.Errorf("%d agents on %s", len(list), node)
	}
	return list[0], nil
}

// agentStatus is what a node's agent says of itself.
type agentStatus struct {
	Healthy  bool
	Version  string
	Problems []string
	Alarms   []struct{ Name, Text string }
	Maps     []struct{ Name, Entries, Capacity string }
}

func statusOf(t *testing.T, node string) (s agentStatus, err error) {
	t.Helper()
	out, err := portcullis(t.Context(), node, "status", "-o", "json")
	if parsed := json.Unmarshal([]byte(out), &s); parsed != nil {
		return s, errors.Join(err, parsed)
	}
	return s, nil // one that is not healthy ends with 1, and says so
}

// alarm is the text of a node's alarm; "" for none.
func alarm(t *testing.T, node, name string) (string, error) {
	t.Helper()
	s, err := statusOf(t, node)
	for _, a := range s.Alarms {
		if a.Name == name {
			return a.Text, err
		}
	}
	return "", err
}

// eventSays waits for an Event in a namespace of an object, and returns what it says.
func eventSays(t *testing.T, namespace, object string, says ...string) string {
	t.Helper()
	var said string
	must(t, eventually(t.Context(), func() error {
		out, err := k8s.Kubectl(t.Context(), "-n", namespace, "get", "events", "-o", "json", "--field-selector", "involvedObject.name="+object)
		if err != nil {
			return err
		}
		var events struct {
			Items []struct{ Reason, Message string }
		}
		if err := json.Unmarshal([]byte(out), &events); err != nil {
			return err
		}
		for _, e := range events.Items {
			all := true
			for _, s := range says {
				all = all && strings.Contains(e.Reason+": "+e.Message, s)
			}
			if all {
				said = e.Reason + ": " + e.Message
				return nil
			}
		}
		return fmt.Errorf("no event of %s/%s says %q: %+v", namespace, object, says, events.Items)
	}))
	return said
}

// testEvicted evicts an agent by the API, as a drain or an administrator does.
func testEvicted(t *testing.T) {
	s := newStage(t, "evicted")
	flow := s.traffic(t)
	before, err := agentPod(t, "n1")
	must(t, err)
	eviction, err := json.Marshal(object{"apiVersion": "policy/v1", "kind": "Eviction", "metadata": object{"namespace": "portcullis", "name": before.Metadata.Name}})
	must(t, err)
	cmd := k8s.KubectlCommand(t.Context(), "create", "--raw", "/api/v1/namespaces/portcullis/pods/"+before.Metadata.Name+"/eviction", "-f", "-")
	cmd.Stdin = strings.NewReader(string(eviction))
	begin := time.Now()
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("evict: %v: %s", err, out)
	}
	must(t, eventually(t.Context(), func() error {
		if now, err := agentPod(t, "n1"); err != nil || now.Metadata.UID == before.Metadata.UID {
			return fmt.Errorf("no other agent: %v, %w", now.Metadata.Name, err)
		}
		s, err := statusOf(t, "n1")
		if err == nil && !s.Healthy {
			err = fmt.Errorf("%v", s.Problems)
		}
		return err
	}))
	t.Logf("another agent serves %.1f s after the eviction", time.Since(begin).Seconds())
	must(t, s.judge(t, s.server.ip(), s.server.ip6()))
	flow.end()
	must(t, eventually(t.Context(), func() error { return enforced(t) }))
}
