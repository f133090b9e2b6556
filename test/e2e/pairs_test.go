//go:build e2e

package e2e

import (
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"
)

// The grid is three namespaces x, y, z of three pods a, b, c each, spread over
// the nodes so that there are neighbours and strangers of every kind.

// spot is one pod of the grid.
type spot struct {
	ns, pod string
	pod4    string
	pod6    string
	node    string
}

// probe is one attempt.
type attempt struct {
	from, to spot
	protocol string // tcp, udp
	port     int
	v6       bool
}

func (a attempt) target() string {
	ip := netip.MustParseAddr(a.to.pod4)
	if a.v6 {
		ip = netip.MustParseAddr(a.to.pod6)
	}
	return a.protocol + "/" + netip.AddrPortFrom(ip, uint16(a.port)).String()
}

func (a attempt) String() string {
	return fmt.Sprintf("%s/%s (%s) -> %s/%s (%s) %s", a.from.ns, a.from.pod, a.from.node, a.to.ns, a.to.pod, a.to.node, a.target())
}

// rules are policies and what they let through, said in another way.
type rules struct {
	name     string
	policies []object
	allow    func(a attempt) bool
}

func policy(namespace, name string, spec object) object {
	return object{"apiVersion": "networking.k8s.io/v1", "kind": "NetworkPolicy", "metadata": object{"namespace": namespace, "name": name}, "spec": spec}
}

func labels(pairs ...string) object {
	m := object{}
	for i := 0; i < len(pairs); i += 2 {
		m[pairs[i]] = pairs[i+1]
	}
	return object{"matchLabels": m}
}

var ingressOnly, egressOnly = []string{"Ingress"}, []string{"Egress"}

func port(protocol string, p any) object { return object{"protocol": protocol, "port": p} }

// suite are the rules that are tried, one after the other.
func suite(grid []spot) []rules {
	b := func(s spot) bool { return s.pod == "b" }
	x := func(s spot) bool { return s.ns == "x" }
	first := grid[0]
	return []rules{
		{"nothing", nil, func(attempt) bool { return true }},
		{"deny all ingress", []object{policy("x", "deny", object{"podSelector": object{}, "policyTypes": ingressOnly})},
			func(a attempt) bool { return !x(a.to) }},
		{"deny all egress", []object{policy("x", "deny", object{"podSelector": object{}, "policyTypes": egressOnly})},
			func(a attempt) bool { return !x(a.from) }},
		{"from pods of the namespace", []object{policy("x", "near", object{"podSelector": object{}, "ingress": []any{object{"from": []any{object{"podSelector": labels("pod", "b")}}}}})},
			func(a attempt) bool { return !x(a.to) || x(a.from) && b(a.from) }},
		{"from a namespace", []object{policy("x", "y", object{"podSelector": labels("pod", "a"), "ingress": []any{object{"from": []any{object{"namespaceSelector": labels("ns", "y")}}}}})},
			func(a attempt) bool { return !x(a.to) || a.to.pod != "a" || a.from.ns == "y" }},
		{"from pods of namespaces, to a port", []object{policy("x", "both", object{"podSelector": object{}, "ingress": []any{object{
			"from":  []any{object{"namespaceSelector": object{"matchExpressions": []any{object{"key": "ns", "operator": "NotIn", "values": []string{"x"}}}}, "podSelector": labels("pod", "c")}},
			"ports": []any{port("TCP", 80), port("UDP", 81)}}}})},
			func(a attempt) bool {
				return !x(a.to) || !x(a.from) && a.from.pod == "c" && (a.protocol == "tcp" && a.port == 80 || a.protocol == "udp" && a.port == 81)
			}},
		{"to a named port", []object{policy("x", "named", object{"podSelector": object{}, "ingress": []any{object{"ports": []any{port("TCP", "serve-80-tcp")}}}})},
			func(a attempt) bool { return !x(a.to) || a.protocol == "tcp" && a.port == 80 }},
		{"to a range of ports", []object{policy("x", "range", object{"podSelector": object{}, "ingress": []any{object{"ports": []any{object{"protocol": "TCP", "port": 81, "endPort": 90}}}}})},
			func(a attempt) bool { return !x(a.to) || a.protocol == "tcp" && a.port == 81 }},
		{"egress to pods of a namespace, to a port", []object{policy("x", "out", object{"podSelector": object{}, "policyTypes": egressOnly, "egress": []any{object{
			"to":    []any{object{"namespaceSelector": labels("ns", "y"), "podSelector": labels("pod", "a")}},
			"ports": []any{port("TCP", 80)}}}})},
			func(a attempt) bool {
				return !x(a.from) || a.to.ns == "y" && a.to.pod == "a" && a.protocol == "tcp" && a.port == 80
			}},
		{"both directions, in two namespaces", []object{
			policy("x", "out", object{"podSelector": object{}, "policyTypes": egressOnly, "egress": []any{object{"to": []any{object{"namespaceSelector": labels("ns", "z")}}}}}),
			policy("z", "in", object{"podSelector": object{}, "ingress": []any{object{"from": []any{object{"namespaceSelector": labels("ns", "x"), "podSelector": labels("pod", "a")}}}}})},
			func(a attempt) bool {
				out := !x(a.from) || a.to.ns == "z"
				in := a.to.ns != "z" || x(a.from) && a.from.pod == "a"
				return out && in
			}},
		{"from an address", []object{policy("y", "cidr", object{"podSelector": object{}, "ingress": []any{object{"from": []any{
			object{"ipBlock": object{"cidr": first.pod4 + "/32"}}, object{"ipBlock": object{"cidr": first.pod6 + "/128"}}}}}})},
			func(a attempt) bool { return a.to.ns != "y" || a.from == first }},
		{"policies add up", []object{
			policy("x", "deny", object{"podSelector": object{}}),
			policy("x", "one", object{"podSelector": labels("pod", "a"), "ingress": []any{object{"from": []any{object{"podSelector": labels("pod", "b")}}}}}),
			policy("x", "two", object{"podSelector": labels("pod", "a"), "ingress": []any{object{"ports": []any{port("UDP", 80)}}}})},
			func(a attempt) bool {
				return !x(a.to) || a.to.pod == "a" && (x(a.from) && b(a.from) || a.protocol == "udp" && a.port == 80)
			}},
	}
}

// testPairs tries every pair of the grid, by both protocols, two ports and both
// families, under every rules of the suite.
func testPairs(t *testing.T) {
	var grid []spot
	var all []any
	nodes := k8s.Nodes()
	for i, ns := range []string{"x", "y", "z"} {
		newNamespace(t, ns, map[string]string{"ns": ns})
		for j, name := range []string{"a", "b", "c"} {
			grid = append(grid, spot{ns: ns, pod: name, node: nodes[(i+j)%len(nodes)].Name})
			all = append(all, newPod(ns, name, grid[len(grid)-1].node, map[string]string{"pod": name}))
		}
	}
	apply(t, all...)
	for _, ns := range []string{"x", "y", "z"} {
		awaitReady(t, ns)
	}
	for i, s := range grid {
		p := podNamed(t, s.ns, s.pod)
		grid[i].pod4, grid[i].pod6 = p.ip(), p.ip6()
	}
	var attempts []attempt
	for _, from := range grid {
		for _, to := range grid {
			for _, protocol := range []string{"tcp", "udp"} {
				for _, p := range []int{80, 81} {
					for _, v6 := range []bool{false, true} {
						if from != to {
							attempts = append(attempts, attempt{from, to, protocol, p, v6})
						}
					}
				}
			}
		}
	}
	t.Logf("%d attempts for each of the rules", len(attempts))
	for _, r := range suite(grid) {
		t.Run(strings.ReplaceAll(r.name, " ", "-"), func(t *testing.T) {
			var objects []any
			for _, p := range r.policies {
				objects = append(objects, p)
				meta := p["metadata"].(object)
				atEnd(t, "-n", meta["namespace"].(string), "networkpolicy", meta["name"].(string))
			}
			if len(objects) > 0 {
				apply(t, objects...)
			}
			begin := time.Now()
			must(t, eventually(t.Context(), func() error { return try(t, grid, attempts, r) }))
			t.Logf("as it should be after %.1f s", time.Since(begin).Seconds())
			// And it stays so.
			if err := try(t, grid, attempts, r); err != nil {
				t.Error(err)
			}
		})
	}
}

// try makes all attempts at a time, and tells those that came out otherwise.
func try(t *testing.T, grid []spot, attempts []attempt, r rules) error {
	t.Helper()
	var mu sync.Mutex
	var wrong []string
	var failed error
	var wg sync.WaitGroup
	for _, from := range grid {
		wg.Go(func() {
			own := slices.DeleteFunc(slices.Clone(attempts), func(a attempt) bool { return a.from != from })
			var targets []string
			for _, a := range own {
				targets = append(targets, a.target())
			}
			out, err := check(t.Context(), from.ns, from.pod, targets...)
			mu.Lock()
			defer mu.Unlock()
			if err != nil {
				failed = errors.Join(failed, err)
				return
			}
			for i, a := range own {
				want, o := r.allow(a), out[i]
				switch {
				case o.OK != want:
					wrong = append(wrong, fmt.Sprintf("%v: passed %v, want %v (%s)", a, o.OK, want, o.Error))
				case o.OK && o.Name != a.to.pod:
					wrong = append(wrong, fmt.Sprintf("%v: %s answered", a, o.Name))
				}
			}
		})
	}
	wg.Wait()
	if failed == nil && len(wrong) > 0 {
		n := len(wrong)
		slices.Sort(wrong)
		failed = fmt.Errorf("%d of %d attempts came out otherwise:\n%s", n, len(attempts), strings.Join(wrong[:min(n, 12)], "\n"))
	}
	return failed
}
