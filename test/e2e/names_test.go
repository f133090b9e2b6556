//go:build e2e

package e2e

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"portcullis/test/e2e/cluster"
)

// The world of this chapter is the control plane's network, and CoreDNS knows its
// names (test/e2e/cluster, corefile).
const (
	namesNamespace = "names"
	apiName        = "api.example.com"
	otherName      = "other.example.com"
	manyName       = "many.example.com"
	nodeName       = "node.example.com" // n2
)

var apiAddresses = []string{"203.0.113.20", "2001:db8::20"}

// serveWorld lets servers answer at every address of the world until the test
// ends.
func serveWorld(t *testing.T) {
	t.Helper()
	probe := filepath.Join(t.TempDir(), "probe")
	build := exec.CommandContext(t.Context(), "go", "build", "-o", probe, "./test/e2e/probe")
	build.Dir = root
	build.Env = append(build.Environ(), "CGO_ENABLED=0")
	if out, err := build.CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	for _, args := range [][]string{{"serve", "-tcp", "8443,8444"}, {"deathstar", "-addr", ":8080"}} {
		cmd := k8s.WorldCommand(t.Context(), append([]string{probe}, args...)...)
		must(t, cmd.Start())
		t.Cleanup(func() { _ = cmd.Wait() }) // killed with the test's context
	}
}

// dnsRule lets a pod ask the cluster's DNS for names.
func dnsRule(names ...string) object {
	var list []any
	for _, n := range names {
		key := "matchName"
		if strings.Contains(n, "*") {
			key = "matchPattern"
		}
		list = append(list, object{key: n})
	}
	return object{"toEndpoints": []any{labels("k8s:io.kubernetes.pod.namespace", "kube-system", "k8s:k8s-app", "kube-dns")},
		"toPorts": []any{object{"ports": []any{object{"port": "53", "protocol": "ANY"}}, "rules": object{"dns": list}}}}
}

func fqdnRule(names []string, ports ...string) object {
	var list, at []any
	for _, n := range names {
		list = append(list, object{"matchName": n})
	}
	for _, p := range ports {
		at = append(at, object{"port": p, "protocol": "TCP"})
	}
	return object{"toFQDNs": list, "toPorts": []any{object{"ports": at}}}
}

func namesPolicy(name, pod string, egress ...any) object {
	p := ciliumPolicy(name, pod, egress...)
	p["metadata"].(object)["namespace"] = namesNamespace
	return p
}

// dnsServers are the addresses of the cluster's DNS: of its service, as every pod is
// given it, and of one of the servers themselves.
func dnsServers(t *testing.T) (out []string) {
	t.Helper()
	out = strings.Fields(kubectl(t, "-n", "kube-system", "get", "service", "kube-dns", "-o", "jsonpath={.spec.clusterIPs[*]}"))
	p := pods(t, "-n", "kube-system", "-l", "k8s-app=kube-dns")[0]
	return append(out, p.ip())[:min(len(out)+1, 3)] // more a resolver does not take
}

// newAsker is a ship that asks servers, and looks for names as pods do.
func newAsker(name, node string, servers ...string) object {
	p := newShip(namesNamespace, name, node, cluster.UserlandImage, map[string]string{"pod": name})
	spec := p["spec"].(object)
	spec["dnsPolicy"] = "None"
	spec["dnsConfig"] = object{"nameservers": servers, "searches": []string{namesNamespace + ".svc.cluster.local", "svc.cluster.local", "cluster.local"},
		"options": []any{object{"name": "ndots", "value": "5"}}}
	return p
}

// queried is a line of `probe query`.
type queried struct {
	Name, Code, Error string
	Addresses         []string
	Truncated         bool
}

func queryFrom(t *testing.T, pod, server string, names ...string) (out []queried) {
	t.Helper()
	text, err := k8s.Kubectl(t.Context(), append([]string{"-n", namesNamespace, "exec", pod, "--", "/probe", "query", "-timeout", "10s", "-server", server}, names...)...)
	must(t, err)
	for d := json.NewDecoder(strings.NewReader(text)); ; {
		var q queried
		if err := d.Decode(&q); errors.Is(err, io.EOF) {
			return out
		} else {
			must(t, err)
		}
		out = append(out, q)
	}
}

// inPod runs a command in a pod of the chapter.
func inPod(t *testing.T, pod string, args ...string) (string, error) {
	t.Helper()
	return k8s.Kubectl(t.Context(), append([]string{"-n", namesNamespace, "exec", pod, "--"}, args...)...)
}

// judged waits until a pod's policy is in force: a name is refused.
func judged(t *testing.T, pod string) {
	t.Helper()
	server := "udp/" + net.JoinHostPort(dnsServers(t)[0], "53")
	must(t, eventually(t.Context(), func() error {
		if q := queryFrom(t, pod, server, otherName)[0]; q.Code != "REFUSED" {
			return fmt.Errorf("%s asks for %s: %+v", pod, otherName, q)
		}
		return nil
	}))
}

// testFQDNs: egress to names, which pods ask the cluster's DNS for, each as its C
// library or Go does.
func testFQDNs(t *testing.T) {
	newNamespace(t, namesNamespace, nil)
	serveWorld(t)
	egress := []any{dnsRule(apiName, manyName, nodeName), fqdnRule([]string{apiName, manyName, nodeName}, "8443", "8080", "80")}
	clients := []string{"go", "glibc", "cgo", "silent", "query"}
	objects := []any{onHost(newPod(namesNamespace, "node", "n2", nil))}
	for i, c := range clients {
		objects = append(objects, newAsker(c, []string{"n1", "n3"}[i%2], dnsServers(t)...), namesPolicy(c, c, egress...))
	}
	apply(t, objects...)
	awaitReady(t, namesNamespace)
	for _, c := range clients {
		judged(t, c)
	}
	t.Run("Go", func(t *testing.T) { testResolver(t, "go", "/probe") })
	t.Run("Go with cgo", func(t *testing.T) {
		if _, err := inPod(t, "cgo", "busybox", "ls", "/probe-cgo"); err != nil {
			t.Skip("there was no C compiler when the images were made")
		}
		testResolver(t, "cgo", "busybox", "env", "GODEBUG=netdns=cgo", "/probe-cgo")
	})
	t.Run("glibc", testGlibc)
	t.Run("queries", testQueries)
	t.Run("what is not learnt", testNotLearnt)
}

// testResolver: the first connection to a name passes. It is the first that this
// pod asks for, so nothing was known of it.
func testResolver(t *testing.T, pod string, probe ...string) {
	run := func(args ...string) string {
		t.Helper()
		out, err := inPod(t, pod, slices.Concat(probe, args)...)
		must(t, err)
		return out
	}
	node := podNamed(t, namesNamespace, pod).Spec.NodeName
	var first []outcome
	flows := monitored(t, node, namesNamespace+"/"+pod, func() {
		var err error
		first, err = outcomes(run("check", "-timeout", "20s", "tcp/"+apiName+":8443"), 1)
		must(t, err)
	})
	if !first[0].OK {
		t.Errorf("the first connection: %+v", first[0])
	}
	for _, f := range flows {
		if slices.Contains(apiAddresses, f.Destination.IP) {
			t.Errorf("dropped on the way of the first connection: %+v", f)
		}
	}
	out, err := outcomes(run("check", "-timeout", "10s", "tcp/203.0.113.20:8443", "tcp/[2001:db8::20]:8443", "tcp/"+manyName+":8443"), 3)
	must(t, err)
	for _, o := range out {
		if !o.OK {
			t.Errorf("%+v", o)
		}
	}
	// Not that port; not that name, nor its address; and a name that leads to a node
	// gives nobody the node.
	out, err = outcomes(run("check", "-timeout", "3s", "tcp/"+apiName+":8444", "tcp/"+otherName+":8443", "tcp/203.0.113.21:8443", "tcp/"+nodeName+":80"), 4)
	must(t, err)
	for _, o := range out {
		if o.OK {
			t.Errorf("%+v", o)
		}
	}
	var r resolved
	must(t, json.Unmarshal([]byte(run("lookup", "-timeout", "20s", manyName)), &r))
	if r.Error != "" || len(r.Addresses) != 96 { // by TCP: UDP has no room for them
		t.Errorf("%s: %d addresses, %s", manyName, len(r.Addresses), r.Error)
	}
}

// testGlibc: what the distribution's own programs do.
func testGlibc(t *testing.T) {
	out, err := inPod(t, "glibc", "curl", "-s", "--max-time", "20", "-XPOST", "http://"+apiName+":8080/v1/request-landing")
	if err != nil || out != "Ship landed\n" {
		t.Errorf("curl: %q, %v", out, err)
	}
	for name, want := range map[string]int{apiName: 2, manyName: 96, otherName: 0} {
		out, err := inPod(t, "glibc", "getent", "ahosts", name)
		have := map[netip.Addr]bool{}
		for line := range strings.Lines(out) {
			ip, err := netip.ParseAddr(strings.Fields(line)[0])
			must(t, err)
			have[ip] = true
		}
		if len(have) != want || (err == nil) != (want > 0) {
			t.Errorf("getent %s: %v, %v", name, have, err)
		}
	}
	if out, err := inPod(t, "glibc", "curl", "-s", "--max-time", "5", "-XPOST", "http://"+otherName+":8080/v1/request-landing"); err == nil {
		t.Errorf("curl to a name that no rule allows: %q", out)
	}
}

// testQueries: the answers themselves, by both protocols and families.
func testQueries(t *testing.T) {
	for _, ip := range dnsServers(t) {
		addr := net.JoinHostPort(ip, "53")
		for _, protocol := range []string{"udp", "tcp"} {
			server := protocol + "/" + addr
			got := queryFrom(t, "query", server, apiName, manyName, otherName, apiName+"."+namesNamespace+".svc.cluster.local")
			if len(got) != 4 {
				t.Fatalf("%s: %+v", server, got)
			}
			if q := got[0]; q.Code != "NOERROR" || !slices.Equal(q.Addresses, apiAddresses[:1]) {
				t.Errorf("%s: %+v", server, q)
			}
			if q := got[1]; protocol == "udp" && !q.Truncated || protocol == "tcp" && (q.Truncated || len(q.Addresses) != 96) {
				t.Errorf("%s: %d addresses of %s, truncated %v, %s", server, len(q.Addresses), q.Name, q.Truncated, q.Error)
			}
			for _, q := range got[2:] { // a name with a search domain behind is another name
				if q.Code != "REFUSED" || len(q.Addresses) != 0 {
					t.Errorf("%s: %+v", server, q)
				}
			}
		}
	}
}

// testNotLearnt: what others were told says nothing to who has not asked.
func testNotLearnt(t *testing.T) {
	targets := []string{"tcp/203.0.113.20:8443", "tcp/[2001:db8::20]:8443"}
	out, err := check(t.Context(), namesNamespace, "silent", targets...)
	must(t, err)
	for _, o := range out {
		if o.OK {
			t.Errorf("who never asked: %+v", o)
		}
	}
	// What was learnt outlives the agent, whose pod goes.
	agent := kubectl(t, "-n", "portcullis", "get", "pods", "-l", "app.kubernetes.io/name=portcullis-agent", "--field-selector", "spec.nodeName=n1", "-o", "name")
	kubectl(t, "-n", "portcullis", "delete", "--wait=true", strings.TrimSpace(agent))
	kubectl(t, "-n", "portcullis", "rollout", "status", "daemonset/portcullis-agent", "--timeout="+patience.String())
	must(t, eventually(t.Context(), func() error {
		out, err := check(t.Context(), namesNamespace, "go", targets...)
		if err != nil {
			return err
		}
		for _, o := range out {
			if !o.OK {
				return fmt.Errorf("after the agent's restart: %+v", o)
			}
		}
		return nil
	}))
	out, err = check(t.Context(), namesNamespace, "silent", targets...)
	must(t, err)
	for _, o := range out {
		if o.OK {
			t.Errorf("who never asked, after the agent's restart: %+v", o)
		}
	}
}
