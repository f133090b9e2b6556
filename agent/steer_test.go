package agent

import (
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"testing"
	"time"

	"portcullis/authz"
	"portcullis/identity"
)

const insideB = `
apiVersion: cilium.io/v2
kind: CiliumNetworkPolicy
metadata: {name: inside-b}
spec:
  endpointSelector: {matchLabels: {app: a0}}
  egress:
  - toEndpoints: [{matchLabels: {app: b0}}]
    toPorts: [{ports: [{port: "8080", protocol: TCP}], rules: {http: [{method: GET}]}}]
`

// Those addresses of services are steered at which somebody can be reached whom a
// set looks into, and the kernel follows when sets, services or workloads change.
func TestServicesUnderL7(t *testing.T) {
	n := newNode(t)
	n.cfg.ServiceRanges = []netip.Prefix{netip.MustParsePrefix("10.96.0.0/16")}
	n.veth("a0")
	n.veth("b0")
	l := n.mustStart()
	defer func() { n.crash(l) }()
	a := n.run(l, app("a0", "10.1.1.2"))
	// verify waits for what only the loop's ticks bring.
	verify := func(when string, want ...string) {
		t.Helper()
		var got []string
		for deadline := time.Now().Add(time.Minute); ; time.Sleep(10 * time.Millisecond) {
			l.dropNumbers()
			l.followSteered()
			all, err := l.dp.L7Services()
			if err != nil {
				t.Fatal(err)
			}
			got = nil
			for _, s := range all {
				if s.Set == a.policy.id {
					got = append(got, fmt.Sprintf("%s/%d", s.Address, s.Protocol))
				} else {
					got = append(got, fmt.Sprintf("%+v, which is no set of an endpoint", s))
				}
			}
			if slices.Sort(got); slices.Equal(got, want) {
				return
			}
			if time.Now().After(deadline) {
				t.Fatalf("%s: %v, want %v", when, got, want)
			}
		}
	}
	service := func(spec string) string {
		return "apiVersion: v1\nkind: Service\nmetadata: {name: b, namespace: default}\nspec: {clusterIP: 10.96.0.5, " + spec + "}\n"
	}
	n.importPolicy(l, service("selector: {app: b0}, ports: [{port: 80, targetPort: 8080}, {port: 81}]"))
	n.importPolicy(l, insideB)
	verify("nobody stands behind the service")
	b := n.run(l, app("b0", "10.1.1.3"))
	verify("somebody does", "10.96.0.5:80/6")
	a = n.restartWith(&l, a, func() {})
	verify("after a restart", "10.96.0.5:80/6")
	n.importPolicy(l, service("selector: {app: b0}, externalIPs: [192.0.2.9], ports: [{port: 82, targetPort: 8080}]"))
	verify("at another port and address", "10.96.0.5:82/6", "192.0.2.9:82/6")
	n.importPolicy(l, service("selector: {app: c0}, ports: [{port: 82, targetPort: 8080}]"))
	verify("another selector")
	n.importPolicy(l, service("selector: {app: b0}, ports: [{port: 80, targetPort: 8080}]"))
	n.importPolicy(l, strings.Replace(insideB, "8080", "9090", 1))
	verify("another port of the policy")
	n.importPolicy(l, insideB)
	verify("as before", "10.96.0.5:80/6")
	if _, err := l.deregister(b.uid); err != nil {
		t.Fatal(err)
	}
	verify("the workload is gone")
	n.veth("c0")
	again := app("b0", "10.1.1.4")
	again.ifname = "c0"
	n.run(l, again)
	verify("another one has come", "10.96.0.5:80/6")
	if err := l.deletePolicies([]authz.Ref{{Kind: "CiliumNetworkPolicy", Namespace: "default", Name: "inside-b"}}); err != nil {
		t.Fatal(err)
	}
	verify("without the policy")
}

const servicesInside = `
apiVersion: cilium.io/v2
kind: CiliumNetworkPolicy
metadata: {name: inside-b}
spec:
  endpointSelector: {matchExpressions: [{key: app, operator: In, values: [a0, c0]}]}
  egress:
  - toEndpoints: [{matchLabels: {app: b0}}]
    toPorts: [{ports: [{port: "8080", protocol: TCP}], rules: {http: [{method: GET}]}}]
---
apiVersion: v1
kind: Service
metadata: {name: b, namespace: default}
spec: {clusterIP: 10.96.0.5, selector: {app: b0}, ports: [{port: 80, targetPort: 8080}]}
`

// steered returns how many addresses of services are steered, by policy set.
func (n *node) steered(l *loop) map[uint32]int {
	n.t.Helper()
	all, err := l.dp.L7Services()
	if err != nil {
		n.t.Fatal(err)
	}
	out := map[uint32]int{}
	for _, s := range all {
		out[s.Set]++
	}
	return out
}

// While endpoints are taken over one by one, those that are not yet go on being
// judged by what an earlier agent told the kernel.
func TestServicesStaySteeredWhileEndpointsAreTakenOver(t *testing.T) {
	n := newNode(t)
	n.cfg.ServiceRanges = []netip.Prefix{netip.MustParsePrefix("10.96.0.0/16")}
	for _, name := range []string{"a0", "b0", "c0"} {
		n.veth(name)
	}
	l := n.mustStart()
	defer func() { n.crash(l) }()
	a, c := n.run(l, app("a0", "10.1.1.2")), n.run(l, app("c0", "10.1.1.4"))
	n.run(l, app("b0", "10.1.1.3"))
	n.importPolicy(l, servicesInside)
	l.steerServices(nil)
	if got := n.steered(l); len(got) != 2 || got[a.policy.id] != 1 || got[c.policy.id] != 1 {
		t.Fatalf("at first: %v", got)
	}

	// The next agent has come to a, and knows nothing of c yet.
	next := l.dp.State().NextPolicySet()
	delete(l.bySubject, c.subject)
	l.steered, l.stored = steered{}, map[identity.UID]workload{c.uid: c.workload}
	for _, when := range []struct {
		when  string
		steer func()
	}{
		{"a new set", func() { l.steerSet(next, a.policy.set) }},
		{"a look at all sets", func() { l.steerServices(map[*endpoint]policySet{a: {id: next, set: a.policy.set}}) }},
	} {
		when.steer()
		if got := n.steered(l); len(got) != 3 || got[a.policy.id] != 1 || got[c.policy.id] != 1 || got[next] != 1 {
			t.Errorf("%s: %v steered, want sets %d, %d and %d", when.when, got, a.policy.id, c.policy.id, next)
		}
	}
	if !l.steered.behind {
		t.Error("nobody will look what of it is over")
	}
	l.bySubject[c.subject], l.stored = c, nil
	l.followSteered()
	if got := n.steered(l); len(got) != 2 || got[next] != 0 {
		t.Errorf("when all are taken over: %v", got)
	}

	_ = n.restartWith(&l, a, func() {})
	l.followSteered()
	if got := n.steered(l); len(got) != 2 {
		t.Errorf("after a restart: %v", got)
	}
}

// What does not fit is told, with the flag to raise, and fits when there is room.
func TestServicesUnderL7ThatDoNotFit(t *testing.T) {
	n := newNode(t)
	n.cfg.ServiceRanges, n.cfg.L7ServiceEntries = []netip.Prefix{netip.MustParsePrefix("10.96.0.0/16")}, 2
	for _, name := range []string{"a0", "b0", "c0"} {
		n.veth(name)
	}
	l := n.mustStart()
	defer func() { n.crash(l) }()
	n.run(l, app("a0", "10.1.1.2"))
	n.run(l, app("c0", "10.1.1.4"))
	n.run(l, app("b0", "10.1.1.3"))
	n.importPolicy(l, servicesInside)
	l.steerServices(nil)
	l.alarmLimits()
	if got := n.steered(l); len(got) != 2 || l.alarmText("l7-services") != "" {
		t.Errorf("two fit: %v, %q", got, l.alarmText("l7-services"))
	}
	if text := l.alarmText("map-pressure"); !strings.Contains(text, "l7-services has 2 of 2 (--l7-service-entries)") {
		t.Errorf("alarm map-pressure: %q", text)
	}
	n.importPolicy(l, strings.Replace(servicesInside, "ports: [{port: 80", "ports: [{port: 81}, {port: 80", 1))
	if text := l.alarmText("l7-services"); text != "" {
		t.Errorf("a port behind which nobody is under L7: %q", text)
	}
	n.importPolicy(l, strings.Replace(servicesInside, "ports: [{port: 80", "externalIPs: [192.0.2.9], ports: [{port: 80", 1))
	l.steerServices(nil)
	if text := l.alarmText("l7-services"); !strings.Contains(text, "--l7-service-entries") {
		t.Errorf("four do not fit: %q", text)
	}
	n.importPolicy(l, servicesInside)
	l.followSteered()
	if text := l.alarmText("l7-services"); text != "" || len(n.steered(l)) != 2 {
		t.Errorf("two fit again: %q, %v", text, n.steered(l))
	}
}
