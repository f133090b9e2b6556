package agent

import (
	"testing"

	"portcullis/agent/api"
	"portcullis/authz"
	"portcullis/bpf/abi"
	"portcullis/identity"
)

const fromRedNamespaces = `
apiVersion: networking.k8s.io/v1
kind: NetworkPolicy
metadata: {name: red}
spec:
  podSelector: {matchLabels: {app: a0}}
  ingress: [{from: [{namespaceSelector: {matchLabels: {team: red}}}]}]
`

// What is imported of a namespace is what selectors see of it: not before, over
// a restart, and not after it was deleted.
func TestImportedNamespace(t *testing.T) {
	n := newNode(t)
	n.veth("a0")
	n.veth("b0")
	l := n.mustStart()
	defer func() { n.crash(l) }()
	a := n.run(l, app("a0", "10.1.1.2"))
	n.run(l, app("b0", "10.1.1.3"))
	n.importPolicy(l, fromRedNamespaces)
	verify := func(when string, want bool) {
		t.Helper()
		number := identity.Numeric(n.slotOf(l, "10.1.1.3").Identity)
		if d := a.policy.set.Judge(abi.DirIngress, number, authz.ProtoTCP, 80); (d.Verdict == abi.VerdictPass) != want {
			t.Errorf("%s: %+v, want it to pass: %v", when, d, want)
		}
	}
	namespace := func(team string) string {
		return "apiVersion: v1\nkind: Namespace\nmetadata: {name: default, labels: {team: " + team + "}}\n"
	}
	ref := authz.Ref{Kind: "Namespace", Name: "default"}
	verify("of a namespace that nobody spoke of", false)
	n.importPolicy(l, namespace("red"))
	verify("imported", true)
	if o, there := l.object(ref); !there || o.Source != namespace("red") || len(l.objects()) != 2 {
		t.Errorf("listed as %+v, %v", o, l.objects())
	}
	a = n.restartWith(&l, a, func() {})
	verify("after a restart", true)
	n.importPolicy(l, namespace("blue"))
	verify("with another label", false)
	n.importPolicy(l, namespace("red"))
	verify("as before", true)
	if err := l.deletePolicies([]authz.Ref{ref}); err != nil {
		t.Fatal(err)
	}
	verify("deleted", false)
}

const overRedNamespaces = `
apiVersion: cilium.io/v2
kind: CiliumClusterwideNetworkPolicy
metadata: {name: red}
spec:
  endpointSelector: {matchLabels: {io.cilium.k8s.namespace.labels.team: red}}
  ingress: [{fromEndpoints: [{matchLabels: {app: nobody}}]}]
`

// Namespaces in a list, as kubectl prints them, stand over a restart each by
// itself; the last import counts, and one import says one thing. What namespaces
// a policy is over follows their labels while workloads live, and where these are
// not known it is over all: that one is deleted opens nothing.
func TestNamespacesOfAPolicy(t *testing.T) {
	n := newNode(t)
	n.veth("a0")
	l := n.mustStart()
	defer func() { n.crash(l) }()
	a := n.run(l, app("a0", "10.1.1.2"))
	verify := func(when string, enforced bool) {
		t.Helper()
		if set := a.policy.set; set.EnforceIngress != enforced || (n.inKernel(l, "a0").Flags&uint32(abi.EPEnforceIngress) != 0) != enforced {
			t.Errorf("%s: under policy %v, want %v", when, set.EnforceIngress, enforced)
		}
	}
	list := func(team string) string {
		return `{"apiVersion": "v1", "kind": "NamespaceList", "items": [{"metadata": {"name": "default", "labels": {"team": "` + team + `"}}}, {"metadata": {"name": "other"}}]}`
	}
	n.importPolicy(l, overRedNamespaces)
	verify("of a namespace that nobody spoke of", true)
	n.importPolicy(l, list("blue"))
	verify("of another team", false)
	a = n.restartWith(&l, a, func() {})
	verify("after a restart", false)
	n.importPolicy(l, list("red"))
	verify("of the team", true)
	n.importPolicy(l, "apiVersion: v1\nkind: Namespace\nmetadata: {name: default}\n")
	verify("of none", false)
	if err := l.deletePolicies([]authz.Ref{{Kind: "Namespace", Name: "default"}}); err != nil {
		t.Fatal(err)
	}
	verify("deleted", true)
	if refs := l.objects(); len(refs) != 2 {
		t.Errorf("left: %v", refs)
	}
	twice := []*api.PolicyFile{{Name: "a.yaml", Content: []byte(list("red"))}, {Name: "b.yaml", Content: []byte(list("blue"))}}
	if _, problems := api.ParsePolicies(twice); len(problems) != 2 {
		t.Errorf("one import says two things of two namespaces: %v", problems)
	}
}
