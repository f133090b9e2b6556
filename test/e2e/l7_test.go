//go:build e2e

package e2e

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"slices"
	"strings"
	"testing"

	"portcullis/test/e2e/cluster"
)

const (
	requestLanding = "POST /v1/request-landing"
	exhaustPort    = "PUT /v1/exhaust-port"
	catalogue      = "GET /v1/"
)

// answer is a line of `probe requests`.
type answer struct {
	Request, Proto, Status, Body, Error string
	Header                              http.Header
}

// ask sends requests from a pod over one connection: the answers, up to the first
// that did not come.
func ask(ctx context.Context, namespace, name, target string, requests ...string) (out []answer, err error) {
	text, err := k8s.Kubectl(ctx, append([]string{"-n", namespace, "exec", name, "--", "/probe", "requests", "-timeout", "10s", target}, requests...)...)
	if err != nil {
		return nil, err
	}
	for d := json.NewDecoder(strings.NewReader(text)); ; {
		var a answer
		if err := d.Decode(&a); errors.Is(err, io.EOF) {
			return out, nil
		} else if err != nil {
			return nil, err
		}
		out = append(out, a)
	}
}

// landed, and accessDenied: the answer to a request that no rule allows, in each
// byte that a client can tell.
func (a answer) landed() bool {
	return a.Status == "200 OK" && a.Body == "Ship landed\n"
}

func (a answer) accessDenied() bool {
	return a.Proto == "HTTP/1.1" && a.Status == "403 Forbidden" && a.Body == "Access denied\n" &&
		a.Header.Get("Content-Type") == "text/plain; charset=utf-8" && a.Header.Get("X-Content-Type-Options") == "nosniff"
}

// shielded asks for what is allowed, for what is not, and again, all by one
// connection: whoever refuses keeps it.
func shielded(ctx context.Context, namespace, name, target string) error {
	out, err := ask(ctx, namespace, name, target, requestLanding, exhaustPort, requestLanding, catalogue, requestLanding)
	if err != nil {
		return err
	}
	for i, a := range out {
		if want := i%2 == 0; a.landed() != want || a.accessDenied() == want {
			return fmt.Errorf("%s/%s -> %s: %+v", namespace, name, target, a)
		}
	}
	if len(out) != 5 {
		return fmt.Errorf("%s/%s -> %s: the connection ended: %+v", namespace, name, target, out)
	}
	return nil
}

// shut reports whether a pod gets no connection.
func shut(ctx context.Context, namespace, name, target string) error {
	out, err := ask(ctx, namespace, name, target, requestLanding)
	if err != nil {
		return err
	}
	if len(out) != 1 || !strings.Contains(out[0].Error, "timeout") {
		return fmt.Errorf("%s/%s -> %s: %+v", namespace, name, target, out)
	}
	return nil
}

// newShip is a pod without a server.
func newShip(namespace, name, node, image string, labels map[string]string) object {
	p := newPod(namespace, name, node, labels)
	p["spec"].(object)["containers"] = []any{object{"name": "c", "image": image, "imagePullPolicy": "Never", "command": []string{"/probe", "sleep"}}}
	return p
}

// newDeathstar is a pod that serves its API on port 80.
func newDeathstar(namespace, name, node string, labels map[string]string) object {
	p := newShip(namespace, name, node, cluster.ProbeImage, labels)
	c := p["spec"].(object)["containers"].([]any)[0].(object)
	c["command"] = []string{"/probe", "deathstar"}
	c["readinessProbe"] = object{"tcpSocket": object{"port": 80}, "periodSeconds": 1}
	return p
}

// restarts are how often the containers of pods were started again.
func restarts(t *testing.T, args ...string) (n int) {
	t.Helper()
	for _, p := range pods(t, args...) {
		n += p.Status.ContainerStatuses[0].RestartCount
	}
	return n
}

// testShield is the story's last policy: what may be asked, not only who may call.
func testShield(t *testing.T) {
	empire := []string{"-n", "default", "-l", "org=empire,class=deathstar"}
	ships := map[string]string{} // by node
	var objects []any
	for _, n := range k8s.Nodes() {
		ships["tie-"+n.Name] = n.Name
		objects = append(objects, newShip("default", "tie-"+n.Name, n.Name, cluster.ProbeImage, map[string]string{"org": "empire", "class": "tiefighter"}))
		atEnd(t, "-n", "default", "pod", "tie-"+n.Name)
	}
	objects = append(objects, object{"apiVersion": "v1", "kind": "Service", "metadata": object{"namespace": "default", "name": "deathstar-dual"}, "spec": object{
		"selector": object{"org": "empire", "class": "deathstar"}, "ipFamilyPolicy": "RequireDualStack", "ports": []any{object{"port": 8080, "targetPort": 80}}}})
	atEnd(t, "-n", "default", "service", "deathstar-dual")
	apply(t, objects...)
	awaitReady(t, "default")

	kubectl(t, "apply", "-f", example("networkpolicy-L7.yaml"))
	atEnd(t, "-f", example("networkpolicy-L7.yaml"))
	// As the article has it.
	curl := func(ship, method, path string) (string, error) {
		return k8s.Kubectl(t.Context(), "exec", ship, "--", "curl", "-s", "--max-time", "10", "-X"+method, "deathstar.default.svc.cluster.local"+path)
	}
	must(t, eventually(t.Context(), func() error { return refused(t, "xwing") }))
	must(t, lands(t, "tiefighter"))
	before := restarts(t, empire...)
	for range 3 { // each backend
		if out, err := curl("tiefighter", "PUT", "/v1/exhaust-port"); err != nil || out != "Access denied\n" {
			t.Errorf("exhaust port: %q, %v", out, err)
		}
	}
	targets := append(serviceAddresses(t, "default", "deathstar", "80"), serviceAddresses(t, "default", "deathstar-dual", "8080")...)
	for _, p := range pods(t, empire...) {
		targets = append(targets, hostPort(p.ip()), hostPort(p.ip6()))
	}
	for ship := range ships {
		for _, target := range targets {
			must(t, shielded(t.Context(), "default", ship, target))
		}
	}
	t.Logf("%d requests by one connection each, of %d ships to %d targets", 5, len(ships), len(targets))
	for _, target := range targets[len(targets)-2:] {
		must(t, shut(t.Context(), "default", "xwing", target))
	}
	t.Run("records", func(t *testing.T) { testRecords(t, pods(t, empire...)[0]) })
	if n := restarts(t, empire...); n != before {
		t.Fatalf("deathstars were started again %d times", n-before)
	}
	kubectl(t, "delete", "-f", example("networkpolicy-L7.yaml"))
	must(t, eventually(t.Context(), func() error { return lands(t, "xwing") }))
	out, err := curl("tiefighter", "PUT", "/v1/exhaust-port")
	if err != nil || !strings.HasPrefix(out, "Panic: deathstar exploded") {
		t.Errorf("exhaust port without a policy: %q, %v", out, err)
	}
	must(t, eventually(t.Context(), func() error {
		if n := restarts(t, empire...); n != before+1 {
			return fmt.Errorf("deathstars were started again %d times", n-before)
		}
		return nil
	}))
	awaitReady(t, "default")
}

// testRecords: the node of a server tells of each request.
func testRecords(t *testing.T, server pod) {
	type record struct{ Method, Path, Verdict string }
	want := []record{{"POST", "/v1/request-landing", "forwarded"}, {"PUT", "/v1/exhaust-port", "denied"}}
	must(t, eventually(t.Context(), func() error {
		var seen []record
		for _, f := range watched(t, server.Spec.NodeName, []string{"--workload", server.name()}, func() {
			must(t, shielded(t.Context(), "default", "tie-n1", hostPort(server.ip())))
		}) {
			if f.L7 != nil {
				seen = append(seen, record{f.L7.Method, f.L7.Path, f.L7.Verdict})
			}
		}
		for _, w := range want {
			if !slices.Contains(seen, w) {
				return fmt.Errorf("no record %+v among %+v", w, seen)
			}
		}
		return nil
	}))
}
