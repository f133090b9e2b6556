package agent

import (
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"testing"
	"time"

	"portcullis/authz"
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
