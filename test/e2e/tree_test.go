//go:build e2e

package e2e

import (
	"context"
	"fmt"
	"strings"
	"testing"

	"portcullis/test/e2e/cluster"
)

// testTree: the trees of 2017, which know no objects of Kubernetes, and so are
// imported on every node. What they say of a ship's requests is judged where the
// ship is; curl is the distribution's.
func testTree(t *testing.T) {
	const ns = "empire"
	newNamespace(t, ns, nil)
	apply(t, newDeathstar(ns, "deathstar", "n1", map[string]string{"id.empire.deathstar": ""}),
		object{"apiVersion": "v1", "kind": "Service", "metadata": object{"namespace": ns, "name": "deathstar"}, "spec": object{
			"selector": object{"id.empire.deathstar": ""}, "ports": []any{object{"port": 80}}}})
	// The tree limits ships to port 80, DNS too: who the deathstar is stands in a
	// file, as it did then.
	service := strings.TrimSuffix(serviceAddresses(t, ns, "deathstar", "80")[0], ":80")
	awaitReady(t, ns)
	itself := podNamed(t, ns, "deathstar").ip()
	ship := func(name, node, address, label string) object {
		p := newShip(ns, name, node, cluster.UserlandImage, map[string]string{label: ""})
		p["spec"].(object)["hostAliases"] = []any{object{"ip": address, "hostnames": []string{"deathstar"}}}
		return p
	}
	// The tree names no peer, so luke's node never asks who stands behind a service on
	// another node, and drops what is sent there (docs/l7.md): he calls the pod.
	apply(t, ship("xwing", "n1", service, "id.spaceship"), ship("luke", "n2", itself, "id.spaceship"), ship("asteroid", "n2", itself, "id.asteroid"))
	awaitReady(t, ns)
	curl := func(ship string, args ...string) (string, error) {
		out, err := k8s.Kubectl(t.Context(), append([]string{"-n", ns, "exec", ship, "--", "curl", "-si", "--max-time", "10"}, args...)...)
		return strings.ReplaceAll(out, "\r", ""), err
	}
	land := []string{"-XPOST", "http://deathstar/v1/request-landing"}
	force := []string{"-H", "X-Has-Force: true", "-XPUT", "http://deathstar/v1/exhaust-port"}
	exhaust := force[2:]
	use := func(t *testing.T, file string) {
		t.Helper()
		for _, n := range k8s.Nodes() {
			out, err := portcullis(t.Context(), n.Name, "policy", "import", "-f", example(file))
			if err != nil {
				t.Fatal(err, out)
			}
		}
	}
	t.Cleanup(func() {
		ctx, cancel := context.WithTimeout(context.Background(), patience)
		defer cancel()
		for _, n := range k8s.Nodes() {
			if _, err := portcullis(ctx, n.Name, "policy", "delete", "tree/root"); err != nil {
				t.Error(err)
			}
		}
	})
	begins := func(t *testing.T, want string, ship string, args ...string) {
		t.Helper()
		if out, err := curl(ship, args...); err != nil || !strings.HasPrefix(out, want) {
			t.Errorf("%s %v: %q, %v", ship, args, out, err)
		}
	}
	denied := func(t *testing.T, ship string, args ...string) {
		t.Helper()
		out, err := curl(ship, args...)
		if err != nil || !strings.HasPrefix(out, "HTTP/1.1 403 Forbidden\n") || !strings.Contains(out, "\nContent-Type: text/plain; charset=utf-8\n") ||
			!strings.Contains(out, "\nX-Content-Type-Options: nosniff\n") || !strings.HasSuffix(out, "\n\nAccess denied\n") {
			t.Errorf("%s %v: %q, %v", ship, args, out, err)
		}
	}
	ok := "HTTP/1.1 200 OK\n"
	t.Run("policy-tree-2017-http.json", func(t *testing.T) {
		use(t, "policy-tree-2017-http.json")
		for _, ship := range []string{"xwing", "luke"} {
			begins(t, ok, ship, land...)
			begins(t, ok, ship, "http://deathstar/v1/")
			denied(t, ship, exhaust...)
			denied(t, ship, force...)
		}
		if out, err := curl("asteroid", land...); err == nil {
			t.Errorf("an asteroid lands: %q", out)
		}
	})
	t.Run("policy-tree-2017-jedi.json", func(t *testing.T) {
		use(t, "policy-tree-2017-jedi.json")
		begins(t, ok, "luke", land...)
		denied(t, "luke", exhaust...)
		denied(t, "xwing", append([]string{"-H", "X-Has-Force: false"}, exhaust...)...)
		if n := restarts(t, "-n", ns, "-l", "id.empire.deathstar"); n != 0 {
			t.Errorf("the deathstar was started again %d times", n)
		}
		out, err := curl("luke", force...)
		if err != nil || !strings.HasPrefix(out, "HTTP/1.1 503 Service Unavailable\n") || !strings.Contains(out, "Panic: deathstar exploded") {
			t.Errorf("luke, who has the force: %q, %v", out, err)
		}
		must(t, eventually(t.Context(), func() error {
			if n := restarts(t, "-n", ns, "-l", "id.empire.deathstar"); n != 1 {
				return fmt.Errorf("the deathstar was started again %d times", n)
			}
			return nil
		}))
		awaitReady(t, ns)
	})
}
