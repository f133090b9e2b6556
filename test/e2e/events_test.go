//go:build e2e

package e2e

import (
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"strings"
	"testing"
)

const toldNamespace = "told"

// event is what kubectl shows of one that an agent wrote.
type event struct {
	Type, Reason, Message, ReportingComponent string
	InvolvedObject                            struct{ Kind, Name string }
	Series                                    struct{ Count int }
}

// eventsOf are an object's events for a reason.
func eventsOf(t *testing.T, namespace, kind, name, reason string) ([]event, error) {
	t.Helper()
	var got struct{ Items []event }
	selector := "involvedObject.kind=" + kind + ",reason=" + reason
	if name != "" {
		selector += ",involvedObject.name=" + name
	}
	out, err := k8s.Kubectl(t.Context(), "-n", namespace, "get", "events", "-o", "json", "--field-selector", selector)
	if err == nil {
		err = json.Unmarshal([]byte(out), &got)
	}
	return slices.DeleteFunc(got.Items, func(e event) bool { return e.ReportingComponent != "portcullis.io/agent" }), err
}

// awaitEvent waits for an event whose message has these words, and returns all of
// its object and reason.
func awaitEvent(t *testing.T, namespace, kind, name, reason string, words ...string) (all []event) {
	t.Helper()
	must(t, eventually(t.Context(), func() (err error) {
		if all, err = eventsOf(t, namespace, kind, name, reason); err != nil {
			return err
		}
		for _, e := range all {
			if !slices.ContainsFunc(words, func(w string) bool { return !strings.Contains(e.Message, w) }) {
				return nil
			}
		}
		return fmt.Errorf("%s %s: no event %s with %q: %+v", kind, name, reason, words, all)
	}))
	for _, e := range all {
		t.Logf("%s %s %s: %s", kind, e.InvolvedObject.Name, e.Reason, e.Message)
	}
	return all
}

// testEvents: what happens to pods, policies and nodes is told where their people
// look first.
func testEvents(t *testing.T) {
	newNamespace(t, toldNamespace, nil)
	t.Run("dropped packets", testDropEvents)
	t.Run("a policy that is refused", testPolicyEvents)
	t.Run("a registration that is refused", testRegistrationEvents)
	t.Run("an agent that cannot start", testAgentFails)
}

func testDropEvents(t *testing.T) {
	const ns = toldNamespace
	friends := []any{object{"podSelector": labels("is", "friend")}}
	backends := object{"podSelector": labels("is", "friend")}
	service := newService("server", "is", "server", nil)
	service["metadata"].(object)["namespace"] = ns
	apply(t, newPod(ns, "server", "n1", map[string]string{"is": "server"}), newPod(ns, "friend", "n2", map[string]string{"is": "friend"}),
		newPod(ns, "stranger", "n2", map[string]string{"is": "stranger"}), newPod(ns, "bound", "n3", map[string]string{"is": "bound"}), service,
		policy(ns, "in", object{"podSelector": labels("is", "server"), "ingress": []any{object{"from": friends}}}),
		policy(ns, "out", object{"podSelector": labels("is", "bound"), "policyTypes": egressOnly, "egress": []any{object{"to": []any{backends}}}}))
	awaitReady(t, ns)
	server, stranger := podNamed(t, ns, "server"), podNamed(t, ns, "stranger")
	at := serviceAddresses(t, ns, "server", "8080")
	try := func() error {
		// Both from another node: the server's ingress drops, and the caller's egress.
		out, err := check(t.Context(), ns, "stranger", "tcp/"+hostPort(server.ip()), "udp/"+hostPort(server.ip6()))
		more, moreErr := check(t.Context(), ns, "bound", "tcp/"+at[0])
		for _, o := range append(out, more...) {
			if o.OK {
				err = errors.Join(err, fmt.Errorf("passed: %+v", o))
			}
		}
		return errors.Join(err, moreErr)
	}
	must(t, eventually(t.Context(), try))
	awaitEvent(t, ns, "Pod", "server", "PacketsDropped", "policy-denied: packets from told/default[is=stranger] ("+stranger.ip()+"), TCP port 80")
	awaitEvent(t, ns, "Pod", "server", "PacketsDropped", "policy-denied: packets from told/default[is=stranger] ("+stranger.ip6()+"), UDP port 80")
	// By the service's address it was called, and told is whom that led to.
	awaitEvent(t, ns, "Pod", "bound", "PacketsDropped", "policy-denied: packets to told/default[is=server] ("+server.ip()+"), TCP port 80")
	if text := kubectl(t, "-n", ns, "describe", "pod", "server"); !strings.Contains(text, "PacketsDropped") {
		t.Errorf("kubectl describe does not show it:\n%s", text)
	}
	for _, whole := range []string{"stranger", "friend"} { // it is nobody else's
		if all, err := eventsOf(t, ns, "Pod", whole, "PacketsDropped"); err != nil || len(all) != 0 {
			t.Errorf("%s: %+v, %v", whole, all, err)
		}
	}
	// The same again is a count.
	before, err := eventsOf(t, ns, "Pod", "server", "PacketsDropped")
	must(t, err)
	must(t, eventually(t.Context(), func() error {
		if err := try(); err != nil {
			return err
		}
		all, err := eventsOf(t, ns, "Pod", "server", "PacketsDropped")
		if err == nil && len(all) != len(before) {
			t.Fatalf("%d events of the same became %d: %+v", len(before), len(all), all)
		}
		for _, e := range all {
			if e.Series.Count < 2 {
				err = errors.Join(err, fmt.Errorf("not counted: %+v", e))
			}
		}
		return err
	}))
}

// testPolicyEvents: a policy that cannot be read has one event, though every agent
// refuses it, and it says what is in force.
func testPolicyEvents(t *testing.T) {
	novel := func(field string) object {
		return object{"apiVersion": "cilium.io/v2", "kind": "CiliumNetworkPolicy", "metadata": object{"namespace": toldNamespace, "name": "novel"},
			"spec": object{"endpointSelector": labels("is", "nobody"), field: []any{object{"fromEntities": []string{"world"}}}}}
	}
	expect := func(n int, words ...string) {
		t.Helper()
		if all := awaitEvent(t, toldNamespace, "CiliumNetworkPolicy", "novel", "PolicyRefused", words...); len(all) != n || all[0].Type != "Warning" {
			t.Errorf("%d events, want %d: %+v", len(all), n, all)
		}
	}
	apply(t, novel("ingres"))
	expect(1, "not in force: ", "ingres")
	apply(t, novel("ingress"))
	for _, n := range k8s.Nodes() {
		must(t, eventually(t.Context(), func() error {
			out, err := portcullis(t.Context(), n.Name, "policy", "get", "-o", "json")
			if err == nil && !strings.Contains(out, "novel") {
				err = fmt.Errorf("%s has no policy novel", n.Name)
			}
			return err
		}))
	}
	apply(t, novel("ingrres"))
	expect(2, "its former version is in force: ", "ingrres")
}

// testRegistrationEvents: the network's configuration gives pods addresses that
// are not the node's.
func testRegistrationEvents(t *testing.T) {
	const node, foreign = "n3", "10.250.0.0/24"
	good := plugins(t, node)
	write := func(text string) error {
		_, err := k8s.Exec(t.Context(), node, "busybox", "sh", "-c", `printf '%s' "$0" >`+networkConfig, text)
		return err
	}
	own := nodeNamed(node).Pods4.String()
	bad := strings.ReplaceAll(good, own, foreign)
	if bad == good {
		t.Fatalf("%s is not in %s", own, good)
	}
	must(t, write(bad))
	restored := false
	defer func() {
		if !restored {
			_ = write(good) // the failure is told already
		}
	}()
	apply(t, newPod(toldNamespace, "astray", node, nil))
	awaitEvent(t, toldNamespace, "Pod", "astray", "RegistrationRefused", "10.250.0.", "not an address of this node's ranges")
	must(t, write(good))
	restored = true
	awaitReady(t, toldNamespace)
	must(t, eventually(t.Context(), func() error { return enforced(t) }))
}

// testAgentFails: an agent that cannot start with new settings says so on its
// node, what its predecessor left goes on judging, and no further node is touched.
func testAgentFails(t *testing.T) {
	s := newStage(t, "failing")
	kubectl(t, "-n", "default", "delete", "events", "--field-selector", "reason=AgentFailed") // of an earlier run on this cluster
	failing := true
	reinstall := func(timeout string, args ...string) (string, error) {
		out, err := operator(t.Context(), append([]string{"install", "--timeout=" + timeout}, args...)...).CombinedOutput()
		return string(out), err
	}
	defer func() {
		if failing {
			_, _ = reinstall((2 * patience).String()) // the failure is told already
		}
	}()
	if out, err := reinstall("20s", "--set", "config.range-entries=1"); err == nil {
		t.Fatalf("installed with too small a map: %s", out)
	}
	all := awaitEvent(t, "default", "Node", "", "AgentFailed", "the agent ended", "range-entries")
	node := all[0].InvolvedObject.Name
	for _, e := range all {
		if e.InvolvedObject.Name != node {
			t.Errorf("agents of %s and %s fail: the replacement did not stop", node, e.InvolvedObject.Name)
		}
	}
	if text := kubectl(t, "describe", "node", node); !strings.Contains(text, "AgentFailed") {
		t.Errorf("kubectl describe does not show it:\n%s", text)
	}
	// Neighbours have no lease that could end meanwhile.
	if o := s.ask(t, s.near, "tcp/"+hostPort(s.server.ip())); !o.OK {
		t.Errorf("a friend on the same node: %+v", o)
	}
	for _, p := range []pod{s.stranger, s.foe} {
		if o := s.ask(t, p, "tcp/"+hostPort(s.server.ip())); o.OK {
			t.Errorf("let in under an agent that does not start: %s", p.name())
		}
	}
	out, err := reinstall((2 * patience).String())
	if err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	failing = false
	must(t, eventually(t.Context(), func() error { return enforced(t) }))
	must(t, eventually(t.Context(), func() error { return s.judge(t, s.server.ip(), s.server.ip6()) }))
}
