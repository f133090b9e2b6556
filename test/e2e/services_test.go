//go:build e2e

package e2e

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"
)

// Services listen on 8080, their backends on 80: a policy must name the latter.
const serviceNamespace = "services"

// newService is a service of both families for the pods that have a label.
func newService(name, key, value string, more object) object {
	p := func(protocol string) object {
		return object{"name": strings.ToLower(protocol), "protocol": protocol, "port": 8080, "targetPort": 80}
	}
	spec := object{"selector": object{key: value}, "ipFamilyPolicy": "RequireDualStack", "ports": []any{p("TCP"), p("UDP")}}
	for k, v := range more {
		spec[k] = v
	}
	return object{"apiVersion": "v1", "kind": "Service", "metadata": object{"namespace": serviceNamespace, "name": name}, "spec": spec}
}

// onHost puts a pod into its node's network.
func onHost(p object) object {
	p["spec"].(object)["hostNetwork"] = true
	return p
}

func ciliumPolicy(name, pod string, egress ...any) object {
	return object{"apiVersion": "cilium.io/v2", "kind": "CiliumNetworkPolicy", "metadata": object{"namespace": serviceNamespace, "name": name},
		"spec": object{"endpointSelector": labels("pod", pod), "egress": egress}}
}

// toPorts names a port of TCP and of UDP, as Cilium's policies do.
func toPorts(port string) []any {
	return []any{object{"ports": []any{object{"port": port, "protocol": "TCP"}, object{"port": port, "protocol": "UDP"}}}}
}

func egressTo(pod string, peers []any, ports ...any) object {
	return policy(serviceNamespace, pod, object{"podSelector": labels("pod", pod), "policyTypes": egressOnly, "egress": []any{object{"to": peers, "ports": ports}}})
}

// serviceClients are pods on n1, each with a policy of its own for what it may
// send, and the services that it may reach by that.
var serviceClients = map[string][]string{
	"to-pods":    {"near", "far"},
	"to-nodes":   {"own-node", "other-node"},
	"to-api":     {"api"},
	"to-service": {"far"},
	"wrong-port": nil, // the service's, not the backend's
	"wrong-pod":  nil,
	"by-address": nil, // the service's address
}

func block(cidr string) object { return object{"ipBlock": object{"cidr": cidr}} }

func serviceWorld() (objects []any) {
	const ns = serviceNamespace
	backends := []any{object{"podSelector": labels("role", "backend")}}
	dns := object{"toEndpoints": []any{labels("k8s:io.kubernetes.pod.namespace", "kube-system", "k8s:k8s-app", "kube-dns")}, "toPorts": toPorts("53")}
	objects = append(objects,
		newPod(ns, "near", "n1", map[string]string{"pod": "near", "role": "backend"}),
		newPod(ns, "far", "n2", map[string]string{"pod": "far", "role": "backend"}),
		newPod(ns, "other", "n3", map[string]string{"pod": "other"}),
		onHost(newPod(ns, "own-node", "n1", map[string]string{"pod": "own-node"})),
		onHost(newPod(ns, "other-node", "n2", map[string]string{"pod": "other-node"})),
		newService("near", "pod", "near", nil), newService("far", "pod", "far", nil),
		newService("own-node", "pod", "own-node", nil), newService("other-node", "pod", "other-node", nil),
		newService("moving", "pod", "near", nil),
		newService("sticky", "role", "backend", object{"sessionAffinity": "ClientIP"}),
		newService("headless", "role", "backend", object{"clusterIP": "None"}),
		egressTo("to-pods", backends, port("TCP", 80), port("UDP", 80)),
		egressTo("to-api", []any{block("10.77.0.1/32")}, port("TCP", 6443)),
		egressTo("wrong-port", backends, port("TCP", 8080), port("UDP", 8080), port("TCP", 443)),
		egressTo("wrong-pod", []any{object{"podSelector": labels("pod", "other")}}, port("TCP", 80), port("UDP", 80)),
		egressTo("by-address", []any{block("10.96.0.0/16"), block("fd96::/112")}),
		ciliumPolicy("to-nodes", "to-nodes", object{"toEntities": []string{"host", "remote-node"}, "toPorts": toPorts("80")}),
		ciliumPolicy("to-service", "to-service", object{"toServices": []any{object{"k8sService": object{"serviceName": "far", "namespace": ns}}}}),
		ciliumPolicy("by-name", "by-name", dns, object{"toEndpoints": []any{labels("role", "backend")}, "toPorts": toPorts("80")}))
	for _, name := range append(slices.Collect(keys(serviceClients)), "by-name") {
		objects = append(objects, newPod(ns, name, "n1", map[string]string{"pod": name}))
	}
	return objects
}

func keys(m map[string][]string) func(func(string) bool) {
	return func(yield func(string) bool) {
		for k := range m {
			if !yield(k) {
				return
			}
		}
	}
}

// serviceAddresses returns HOST:PORT of a service by each family that it has.
func serviceAddresses(t *testing.T, namespace, name string, port string) (out []string) {
	t.Helper()
	var s struct{ Spec struct{ ClusterIPs []string } }
	must(t, json.Unmarshal([]byte(kubectl(t, "-n", namespace, "get", "service", name, "-o", "json")), &s))
	for _, ip := range s.Spec.ClusterIPs {
		out = append(out, net.JoinHostPort(ip, port))
	}
	return out
}

// testServices: what is sent to services is judged on the backend that the
// node's kube-proxy chooses.
func testServices(t *testing.T) {
	newNamespace(t, serviceNamespace, nil)
	apply(t, serviceWorld()...)
	awaitReady(t, serviceNamespace)
	t.Run("backends of every kind", testBackends)
	t.Run("refusals are told", testServiceRefusals)
	t.Run("session affinity", testAffinity)
	t.Run("names", testNames)
	t.Run("a backend that changes under live sockets", testMovingBackend)
}

func testBackends(t *testing.T) {
	type target struct{ service, text string }
	var targets []target
	for _, service := range []string{"near", "far", "own-node", "other-node"} {
		for _, addr := range serviceAddresses(t, serviceNamespace, service, "8080") {
			for _, protocol := range []string{"tcp", "udp", "sendto"} {
				targets = append(targets, target{service, protocol + "/" + addr})
			}
		}
	}
	targets = append(targets, target{"api", "connect/" + serviceAddresses(t, "default", "kubernetes", "443")[0]})
	var texts []string
	for _, g := range targets {
		texts = append(texts, g.text)
	}
	try := func(client string) (err error) {
		out, err := check(t.Context(), serviceNamespace, client, texts...)
		if err != nil {
			return err
		}
		for i, o := range out {
			service := targets[i].service
			want := slices.Contains(serviceClients[client], service)
			name := map[string]string{"own-node": "n1", "other-node": "n2", "api": ""}
			by, known := name[service]
			if !known {
				by = service
			}
			switch {
			case o.OK != want:
				err = errors.Join(err, fmt.Errorf("%s -> %s %s: passed %v, want %v (%s)", client, service, o.Target, o.OK, want, o.Error))
			case o.OK && o.Name != by:
				err = errors.Join(err, fmt.Errorf("%s -> %s %s: %s answered", client, service, o.Target, o.Name))
			}
		}
		return err
	}
	for client := range serviceClients {
		must(t, eventually(t.Context(), func() error { return try(client) }))
	}
	for client := range serviceClients { // and it stays so
		must(t, try(client))
	}
	t.Logf("%d targets from each of %d clients", len(targets), len(serviceClients))
}

// flow is one event of `portcullis monitor -o json`.
type flow struct {
	Verdict, Reason, Direction, Protocol, Evidence string
	NoEvidenceNeeded                               bool
	Source, Destination                            flowEnd
	L7                                             *struct{ Protocol, Method, Path, Verdict, Name string }
}

type flowEnd struct {
	IP       string
	Port     int
	Workload string
	Labels   []string
}

// monitored runs do, and returns the drops that the node told of meanwhile,
// of what a workload sends.
func monitored(t *testing.T, node, workload string, do func()) (flows []flow) {
	t.Helper()
	return watched(t, node, []string{"--workload", workload, "--verdict", "drop", "--direction", "egress"}, do)
}

// watched runs do, and returns what a node's monitor told of meanwhile.
func watched(t *testing.T, node string, filters []string, do func()) (flows []flow) {
	t.Helper()
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	cmd, err := nodeCommand(ctx, node, append([]string{program, "monitor", "-o", "json"}, filters...)...)
	must(t, err)
	stdout, err := cmd.StdoutPipe()
	must(t, err)
	stderr, err := cmd.StderrPipe()
	must(t, err)
	must(t, cmd.Start())
	var wg sync.WaitGroup
	ready := make(chan struct{})
	var said strings.Builder
	wg.Go(func() {
		buf := make([]byte, 4096)
		for told := false; ; {
			n, err := stderr.Read(buf)
			said.Write(buf[:n])
			if !told && (err != nil || strings.Contains(said.String(), "Listening")) {
				told = true
				close(ready)
			}
			if err != nil {
				return
			}
		}
	})
	wg.Go(func() {
		for d := json.NewDecoder(stdout); ; {
			var f flow
			if d.Decode(&f) != nil {
				return
			}
			flows = append(flows, f)
		}
	})
	<-ready
	do()
	time.Sleep(time.Second) // events come in batches; a later one would be missed, and the test repeated
	cancel()
	wg.Wait()
	_ = cmd.Wait() // it was killed
	if len(flows) == 0 {
		t.Logf("monitor says nothing: %s", said.String())
	}
	return flows
}

// dropped is the counter of status for what workloads of a node sent.
func dropped(t *testing.T, node, reason string) (packets int) {
	t.Helper()
	var status struct {
		Counters []struct {
			Verdict, Reason, Direction string
			Packets                    json.Number
		}
	}
	out, err := portcullis(t.Context(), node, "status", "-o", "json")
	must(t, err)
	must(t, json.Unmarshal([]byte(out), &status))
	for _, c := range status.Counters {
		if c.Verdict == "drop" && c.Reason == reason && c.Direction == "egress" {
			n, err := c.Packets.Int64()
			must(t, err)
			packets += int(n)
		}
	}
	return packets
}

// testServiceRefusals: events and counters name the reason, and the backend
// that the packet would have gone to.
func testServiceRefusals(t *testing.T) {
	far := podNamed(t, serviceNamespace, "far")
	for i, addr := range serviceAddresses(t, serviceNamespace, "far", "8080") {
		backend := []string{far.ip(), far.ip6()}[i]
		for _, client := range []string{"wrong-port", "wrong-pod", "by-address"} {
			before := dropped(t, "n1", "policy-denied")
			must(t, eventually(t.Context(), func() error {
				flows := monitored(t, "n1", serviceNamespace+"/"+client, func() {
					out, err := check(t.Context(), serviceNamespace, client, "tcp/"+addr, "udp/"+addr)
					must(t, err)
					if out[0].OK || out[1].OK {
						t.Errorf("%s reaches %s: %+v", client, addr, out)
					}
				})
				for _, f := range flows {
					if f.Reason == "policy-denied" && f.Destination.IP == backend && f.Destination.Port == 80 {
						return nil
					}
				}
				return fmt.Errorf("%s -> %s: no event of the refusal on %s:80, but %+v", client, addr, backend, flows)
			}))
			must(t, eventually(t.Context(), func() error {
				if after := dropped(t, "n1", "policy-denied"); after <= before {
					return fmt.Errorf("%s -> %s: counter of policy-denied was %d and is %d", client, addr, before, after)
				}
				return nil
			}))
		}
	}
}

// testAffinity: a client comes to the same backend each time.
func testAffinity(t *testing.T) {
	for _, addr := range serviceAddresses(t, serviceNamespace, "sticky", "8080") {
		for _, protocol := range []string{"tcp", "udp", "sendto"} {
			target := protocol + "/" + addr
			first, err := check(t.Context(), serviceNamespace, "to-pods", target)
			must(t, err)
			all, err := check(t.Context(), serviceNamespace, "to-pods", slices.Repeat([]string{target}, 12)...)
			must(t, err)
			for _, o := range append(first, all...) {
				if !o.OK || o.Name != first[0].Name {
					t.Errorf("%s: after %q: %+v", target, first[0].Name, o)
				}
			}
		}
	}
}

// resolved is a line of `probe lookup`.
type resolved struct {
	Name      string
	Addresses []string
	Error     string
}

func lookup(t *testing.T, client string, args ...string) (out resolved) {
	t.Helper()
	text, err := k8s.Kubectl(t.Context(), append([]string{"-n", serviceNamespace, "exec", client, "--", "/probe", "lookup", "-timeout", "20s"}, args...)...)
	must(t, err)
	must(t, json.Unmarshal([]byte(text), &out))
	return out
}

// testNames: DNS by kube-dns's address, where the policy allows its pods; and a
// headless service, whose names are those of its pods.
func testNames(t *testing.T) {
	near, far := podNamed(t, serviceNamespace, "near"), podNamed(t, serviceNamespace, "far")
	want := []string{near.ip(), near.ip6(), far.ip(), far.ip6()}
	slices.Sort(want)
	const headless = "headless." + serviceNamespace + ".svc.cluster.local"
	servers := []string{""} // as the pod is configured
	for _, addr := range serviceAddresses(t, "kube-system", "kube-dns", "53") {
		servers = append(servers, "-server=udp/"+addr, "-server=tcp/"+addr)
	}
	for _, server := range servers {
		args := slices.DeleteFunc([]string{server, headless}, func(s string) bool { return s == "" })
		must(t, eventually(t.Context(), func() error {
			got := lookup(t, "by-name", args...)
			slices.Sort(got.Addresses)
			if got.Error != "" || !slices.Equal(got.Addresses, want) {
				return fmt.Errorf("lookup %v: %+v, want %v", args, got, want)
			}
			return nil
		}))
		if got := lookup(t, "to-pods", slices.Concat([]string{"-timeout=3s"}, args)...); got.Error == "" {
			t.Errorf("lookup %v without a policy for it: %+v", args, got)
		}
	}
	out, err := check(t.Context(), serviceNamespace, "by-name", "tcp/"+headless+":80", "udp/"+headless+":80", "sendto/"+headless+":80", "tcp/"+headless+":81")
	must(t, err)
	for i, o := range out {
		if o.OK != (i < 3) {
			t.Errorf("headless: %+v", o)
		}
	}
}

// talker tells who answers a socket that lives.
type talker struct {
	target string
	mu     sync.Mutex
	name   string // guarded by mu; "-" until something is known
}

func (k *talker) says() string {
	k.mu.Lock()
	defer k.mu.Unlock()
	return k.name
}

func newTalker(t *testing.T, p pod, target string) *talker {
	t.Helper()
	cmd, err := nodeCommand(t.Context(), p.Spec.NodeName, "ctr", "-n", "k8s.io", "tasks", "exec", "--exec-id", fmt.Sprintf("e2e-%d", time.Now().UnixNano()),
		p.container(), "/probe", "talk", "-for", "30m", target)
	must(t, err)
	stdout, err := cmd.StdoutPipe()
	must(t, err)
	must(t, cmd.Start())
	k := &talker{target: target, name: "-"}
	done := make(chan struct{})
	go func() {
		defer close(done)
		for d := json.NewDecoder(stdout); ; {
			var o outcome
			if d.Decode(&o) != nil {
				_ = cmd.Wait() // killed with the test's context
				return
			}
			k.mu.Lock()
			k.name = o.Name
			k.mu.Unlock()
		}
	}()
	t.Cleanup(func() { <-done })
	return k
}

// testMovingBackend: live UDP sockets are led to another backend, which is
// judged anew.
func testMovingBackend(t *testing.T) {
	client := podNamed(t, serviceNamespace, "to-pods")
	var talkers []*talker
	for _, addr := range serviceAddresses(t, serviceNamespace, "moving", "8080") {
		talkers = append(talkers, newTalker(t, client, "udp/"+addr), newTalker(t, client, "sendto/"+addr))
	}
	for _, step := range []struct{ backend, want string }{
		{"near", "near"}, {"far", "far"}, {"other", ""}, {"near", "near"}, {"other", ""}, {"far", "far"},
	} {
		kubectl(t, "-n", serviceNamespace, "patch", "service", "moving", "-p", fmt.Sprintf(`{"spec":{"selector":{"pod":%q}}}`, step.backend))
		must(t, eventually(t.Context(), func() (err error) {
			for _, k := range talkers {
				if got := k.says(); got != step.want {
					err = errors.Join(err, fmt.Errorf("backend %s: %s is answered by %q, want %q", step.backend, k.target, got, step.want))
				}
			}
			return err
		}))
	}
}
