//go:build e2e

package e2e

import (
	"errors"
	"fmt"
	"strings"
	"testing"
	"time"
)

// shield is a deathstar on n1 whose ships, on its own node and on another, may ask
// to land, and for nothing else.
type shield struct {
	namespace         string
	server, near, far pod
}

func newShield(t *testing.T, namespace string) shield {
	t.Helper()
	newNamespace(t, namespace, nil)
	ship := map[string]string{"is": "ship"}
	apply(t, newDeathstar(namespace, "server", "n1", map[string]string{"is": "server"}),
		newPod(namespace, "near", "n1", ship), newPod(namespace, "far", "n2", ship),
		object{"apiVersion": "cilium.io/v2", "kind": "CiliumNetworkPolicy", "metadata": object{"namespace": namespace, "name": "shield"},
			"spec": object{"endpointSelector": labels("is", "server"), "ingress": []any{object{
				"fromEndpoints": []any{labels("is", "ship")},
				"toPorts": []any{object{"ports": []any{object{"port": "80", "protocol": "TCP"}},
					"rules": object{"http": []any{object{"method": "POST", "path": "/v1/request-landing"}}}}}}}}})
	awaitReady(t, namespace)
	s := shield{namespace, podNamed(t, namespace, "server"), podNamed(t, namespace, "near"), podNamed(t, namespace, "far")}
	must(t, eventually(t.Context(), func() error { return s.holds(t) }))
	return s
}

// holds: both ships may land, by both families, and nothing else.
func (s shield) holds(t *testing.T) (err error) {
	t.Helper()
	for _, ship := range []pod{s.near, s.far} {
		for _, ip := range []string{s.server.ip(), s.server.ip6()} {
			err = errors.Join(err, shielded(t.Context(), s.namespace, ship.Metadata.Name, hostPort(ip)))
		}
	}
	return err
}

// landings has ships ask to land, each time by a new connection, until the pods
// are halted.
func (s shield) landings(t *testing.T) map[string]func() hammered {
	t.Helper()
	out := map[string]func() hammered{}
	for _, ship := range []pod{s.near, s.far} {
		for _, ip := range []string{s.server.ip(), s.server.ip6()} {
			out[ship.Metadata.Name+" "+ip] = onNode[hammered](t, ship, "hammer", "-for", "30m", "-until", stop, "-interval", "50ms", "-timeout", "20s", "http/"+hostPort(ip))
		}
	}
	return out
}

// judge judges landings while proxies ended: whoever did not land was refused, and
// at once.
func (s shield) judge(t *testing.T, landings map[string]func() hammered) {
	t.Helper()
	stage{}.halt(t, s.near, s.far)
	for name, wait := range landings {
		h := wait()
		t.Logf("landings of %s: %d of %d, slowest %.0f ms, %s", name, h.OK, h.Tried, float64(h.SlowestUS)/1e3, strings.Join(h.Errors[:min(len(h.Errors), 3)], "; "))
		if h.OK == 0 || h.Timeouts != 0 {
			t.Errorf("landings of %s: %+v", name, h)
		}
		for _, e := range h.Errors {
			if !strings.Contains(e, "refused") && !strings.Contains(e, "reset") && !strings.Contains(e, "EOF") {
				t.Errorf("landings of %s: %s", name, e)
			}
		}
	}
	if n := restarts(t, "-n", s.namespace, "-l", "is=server"); n != 0 {
		t.Errorf("the deathstar was started again %d times", n)
	}
}

// proxies are the processes of a node's proxy, as the node numbers them.
func proxies(t *testing.T, node string) []string {
	t.Helper()
	const script = `for p in /proc/[0-9]*; do case "$(busybox tr '\0' ' ' <$p/cmdline 2>/dev/null)" in */exe\ proxy\ *|*portcullis\ proxy\ *) echo ${p#/proc/};; esac; done`
	out, err := k8s.Exec(t.Context(), node, "busybox", "sh", "-c", script)
	must(t, err)
	return strings.Fields(out)
}

// testProxyKilled kills the proxy of a node under traffic: its connections end, new
// ones are refused until it is back, and nobody else is hurt.
func testProxyKilled(t *testing.T) {
	s, others := newShield(t, "shielded"), newStage(t, "beside")
	flow, landings := others.traffic(t), s.landings(t)
	for range 3 {
		before := proxies(t, "n1")
		if len(before) != 1 {
			t.Fatalf("proxies of n1: %v", before)
		}
		_, err := k8s.Exec(t.Context(), "n1", "busybox", "kill", "-KILL", before[0])
		must(t, err)
		begin := time.Now()
		must(t, eventually(t.Context(), func() error {
			if now := proxies(t, "n1"); len(now) != 1 || now[0] == before[0] {
				return fmt.Errorf("proxies of n1: %v", now)
			}
			return s.holds(t)
		}))
		t.Logf("the proxy was killed, and ships landed again after %.1f s at the most", time.Since(begin).Seconds())
	}
	s.judge(t, landings)
	flow.end()
}
