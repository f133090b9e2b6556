package agent

import (
	"net/netip"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"portcullis/authz"
	"portcullis/bpf/abi"
	"portcullis/identity"
)

const toBService = `
apiVersion: cilium.io/v2
kind: CiliumNetworkPolicy
metadata: {name: to-b}
spec:
  endpointSelector: {matchLabels: {app: a0}}
  egress: [{toServices: [{k8sService: {serviceName: b}}]}]
`

// What is imported of a service is whom toServices means, and which addresses
// the kernel takes for services: not before, over a restart, and not after it was
// deleted.
func TestImportedService(t *testing.T) {
	n := newNode(t)
	n.cfg.ServiceRanges = []netip.Prefix{netip.MustParsePrefix("10.96.0.0/16")}
	n.veth("a0")
	n.veth("b0")
	l := n.mustStart()
	defer func() { n.crash(l) }()
	a := n.run(l, app("a0", "10.1.1.2"))
	n.run(l, app("b0", "10.1.1.3"))
	n.importPolicy(l, toBService)
	verify := func(when string, want bool, addresses ...string) {
		t.Helper()
		number := identity.Numeric(n.slotOf(l, "10.1.1.3").Identity)
		if d := a.policy.set.Judge(abi.DirEgress, number, authz.ProtoTCP, 80); (d.Verdict == abi.VerdictPass) != want {
			t.Errorf("%s: %+v, want it to pass: %v", when, d, want)
		}
		got, err := l.dp.Services()
		if err != nil {
			t.Fatal(err)
		}
		texts := []string{}
		for _, p := range got {
			texts = append(texts, p.String())
		}
		if d := cmp.Diff(append([]string{"10.96.0.0/16"}, addresses...), texts); d != "" {
			t.Errorf("%s: the kernel's services (-want +got):\n%s", when, d)
		}
	}
	service := func(selector string) string {
		return "apiVersion: v1\nkind: Service\nmetadata: {name: b, namespace: default}\n" +
			"spec: {clusterIP: 10.96.0.5, externalIPs: [192.0.2.9, 10.1.1.99], selector: {" + selector + "}, ports: [{port: 80, targetPort: 8080}]}\n"
	}
	verify("of a service that nobody spoke of", false)
	n.importPolicy(l, service("app: b0"))
	verify("imported", true, "10.96.0.5/32", "192.0.2.9/32")
	named := func(at string, protocol uint8, want string) {
		t.Helper()
		if got := l.names.Service(netip.MustParseAddrPort(at), protocol); got != want {
			t.Errorf("flow records name %s, protocol %d, %q, want %q", at, protocol, got, want)
		}
	}
	named("10.96.0.5:80", authz.ProtoTCP, "default/b")
	named("192.0.2.9:80", authz.ProtoTCP, "default/b")
	named("10.96.0.5:81", authz.ProtoTCP, "")
	named("10.96.0.5:80", authz.ProtoUDP, "")
	named("10.96.0.5:0", 1, "default/b") // of ICMP the address is enough
	named("10.1.1.3:8080", authz.ProtoTCP, "")
	for _, ref := range l.objects() {
		o, ok := l.object(ref)
		if m := l.policyMessage(o, true); !ok || (m.Endpoints == 1) != (ref.Kind == "CiliumNetworkPolicy") || !strings.Contains(m.Source, "kind: "+ref.Kind) {
			t.Errorf("%s is told as %v", ref, m)
		}
	}
	a = n.restartWith(&l, a, func() {})
	verify("after a restart", true, "10.96.0.5/32", "192.0.2.9/32")
	n.importPolicy(l, service("app: c0"))
	verify("with another selector", false, "10.96.0.5/32", "192.0.2.9/32")
	n.importPolicy(l, service("app: b0"))
	verify("as before", true, "10.96.0.5/32", "192.0.2.9/32")
	if err := l.deletePolicies([]authz.Ref{{Kind: "Service", Namespace: "default", Name: "b"}}); err != nil {
		t.Fatal(err)
	}
	verify("deleted", false)
	named("10.96.0.5:80", authz.ProtoTCP, "")
}
