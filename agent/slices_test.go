package agent

import (
	"net/netip"
	"strings"
	"testing"

	"portcullis/authz"
	"portcullis/bpf/abi"
	"portcullis/identity"
)

// A service without a selector means what its slices say, whichever is told
// first: addresses of the world, and a node's; not a workload's, and none that the
// service range has. Over a restart, and until the slice goes.
func TestImportedSlices(t *testing.T) {
	n := newNode(t)
	n.cfg.ServiceRanges = []netip.Prefix{netip.MustParsePrefix("10.96.0.0/16")}
	n.veth("a0")
	n.veth("b0")
	l := n.mustStart()
	defer func() { n.crash(l) }()
	a := n.run(l, app("a0", "10.1.1.2"))
	n.run(l, app("b0", "10.1.1.3"))
	n.importPolicy(l, toBService)
	verify := func(when string, want ...string) {
		t.Helper()
		for _, ip := range []string{"192.0.2.1", "10.1.1.3"} { // the node's own, a workload's
			number := identity.Numeric(n.slotOf(l, ip).Identity)
			if d := a.policy.set.Judge(abi.DirEgress, number, authz.ProtoTCP, 80); (d.Verdict == abi.VerdictPass) != strings.Contains(strings.Join(want, " "), ip) {
				t.Errorf("%s: to %s: %+v", when, ip, d)
			}
		}
		for _, ip := range []string{"198.51.100.7", "198.51.100.8", "10.96.0.9"} {
			number, known := l.regions.numbers[netip.PrefixFrom(netip.MustParseAddr(ip), 32)]
			pass := known && a.policy.set.Judge(abi.DirEgress, number, authz.ProtoTCP, 80).Verdict == abi.VerdictPass
			if pass != strings.Contains(strings.Join(want, " "), ip) {
				t.Errorf("%s: to %s passes: %v", when, ip, pass)
			}
		}
	}
	slice := func(name, of, addresses string) string {
		return "apiVersion: discovery.k8s.io/v1\nkind: EndpointSlice\nmetadata: {name: " + name + ", namespace: default, labels: {kubernetes.io/service-name: " + of + "}}\n" +
			"addressType: IPv4\nendpoints: [{addresses: [" + addresses + "]}]\n"
	}
	const service = "apiVersion: v1\nkind: Service\nmetadata: {name: b, namespace: default}\nspec: {clusterIP: 10.96.0.5}\n"
	n.importPolicy(l, slice("s1", "b", "198.51.100.7, 10.1.1.3, 10.96.0.9"))
	verify("of a service that nobody spoke of")
	n.importPolicy(l, service)
	verify("the service is known", "198.51.100.7")
	n.importPolicy(l, slice("s2", "b", "192.0.2.1"))
	verify("another slice, with a node", "198.51.100.7", "192.0.2.1")
	a = n.restartWith(&l, a, func() {})
	verify("after a restart", "198.51.100.7", "192.0.2.1")
	n.importPolicy(l, slice("s1", "b", "198.51.100.8"))
	verify("changed", "198.51.100.8", "192.0.2.1")
	n.importPolicy(l, slice("s2", "c", "192.0.2.1"))
	verify("become another service's", "198.51.100.8")
	for _, ref := range l.objects() {
		if o, ok := l.object(ref); !ok || o.Source == "" {
			t.Errorf("%s is listed, and not there", ref)
		}
	}
	if err := l.deletePolicies([]authz.Ref{{Kind: "EndpointSlice", Namespace: "default", Name: "s1"}}); err != nil {
		t.Fatal(err)
	}
	verify("deleted")
	n.importPolicy(l, slice("s1", "b", "198.51.100.8"))
	n.importPolicy(l, service[:strings.Index(service, "spec")]+"spec: {type: ExternalName, externalName: b.example.com}\n")
	verify("a name for another")
}
