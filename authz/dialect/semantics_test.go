package dialect_test

import (
	"strings"
	"testing"

	"portcullis/authz"
	"portcullis/bpf/abi"
	"portcullis/identity"
)

// Small specs and what they mean for a workload app=s in namespace default.
// want has a word for each peer below and in it a character for each port: +
// passes, - is dropped.
func TestSemantics(t *testing.T) {
	peers := []identity.Identity{
		identity.New("", "default", "one", map[string]string{"app": "a"}),
		identity.New("", "default", "two", map[string]string{"app": "b"}),
		identity.New("", "other", "one", map[string]string{"app": "a"}),
		{Reserved: "world"}, // its trust domain is empty, and no selector selects it all the same
	}
	ports := []struct {
		proto uint8
		port  uint16
	}{{authz.ProtoTCP, 80}, {authz.ProtoTCP, 81}, {authz.ProtoUDP, 80}, {authz.ProtoSCTP, 80}, {authz.ProtoICMP, 8 << 8}}
	const all, none = "+++++", "-----"
	subject := identity.New("", "default", "default", map[string]string{"app": "s"})
	open := strings.Join([]string{all, all, all, all}, " ")
	shut := strings.Join([]string{none, none, none, none}, " ")
	for _, c := range []struct{ doc, want string }{
		// NetworkPolicy
		{knp + "  podSelector: {}", shut},
		{knp + "  {}", shut},
		{knp + "  podSelector: {}\n  ingress: []", shut},
		{knp + "  podSelector: {}\n  policyTypes: []", shut},
		{knp + "  podSelector: {matchLabels: {app: x}}", open},
		{strings.Replace(knp, "{name: p}", "{name: p, namespace: other}", 1) + "  podSelector: {}", open},
		{knp + "  podSelector: {}\n  ingress: [{}]", open},
		{knp + "  podSelector: {}\n  ingress: [{from: [], ports: []}]", open},
		{knp + "  podSelector: {}\n  ingress: [{ports: [{}]}]", "++--- ++--- ++--- ++---"},
		{knp + "  podSelector: {}\n  ingress: [{ports: [{port: 80}]}]", "+---- +---- +---- +----"},
		{knp + "  podSelector: {}\n  ingress: [{ports: [{port: 80, protocol: UDP}, {port: 81}]}]", "-++-- -++-- -++-- -++--"},
		{knp + "  podSelector: {}\n  ingress: [{from: [{podSelector: {}}]}]", "+++++ +++++ ----- -----"},
		{knp + "  podSelector: {}\n  ingress: [{from: [{podSelector: {matchLabels: {app: a}}}]}]", "+++++ ----- ----- -----"},
		{knp + "  podSelector: {}\n  ingress: [{from: [{namespaceSelector: {}}]}]", "+++++ +++++ +++++ -----"},
		{knp + "  podSelector: {}\n  ingress: [{from: [{namespaceSelector: {matchLabels: {team: red}}}]}]", "----- ----- +++++ -----"},
		{knp + "  podSelector: {}\n  ingress: [{from: [{namespaceSelector: {matchLabels: {kubernetes.io/metadata.name: other}}, podSelector: {matchLabels: {app: b}}}]}]", shut},
		{knp + "  podSelector: {}\n  ingress: [{from: [{namespaceSelector: {}, podSelector: {matchLabels: {app: a}}}]}]", "+++++ ----- +++++ -----"},
		{knp + "  podSelector: {}\n  ingress: [{from: [{podSelector: {matchLabels: {app: a}}}], ports: [{port: 80}]}, {from: [{podSelector: {matchLabels: {app: b}}}], ports: [{port: 81}]}]", "+---- -+--- ----- -----"},
		{knp + "  podSelector: {}\n  ingress: [{from: [{podSelector: {matchLabels: {io.kubernetes.pod.namespace: other}}}]}]", shut},

		// CiliumNetworkPolicy
		{cnp + "  endpointSelector: {}", open},
		{cnp + "  endpointSelector: {}\n  ingress: []", open},
		{cnp + "  endpointSelector: {matchLabels: {app: x}}\n  ingress: [{}]", open},
		{cnp + "  endpointSelector: {}\n  ingress: [{}]", shut},
		{cnp + "  endpointSelector: {}\n  ingress: [{fromEndpoints: []}]", shut},
		{cnp + "  endpointSelector: {}\n  ingress: [{fromEndpoints: [], toPorts: [{ports: [{port: '80'}]}]}]", shut},
		{cnp + "  endpointSelector: {}\n  ingress: [{toPorts: []}]", shut},
		{cnp + "  endpointSelector: {}\n  ingress: [{toPorts: [{ports: [{port: '80'}]}]}]", "+-++- +-++- +-++- +-++-"},
		{cnp + "  endpointSelector: {}\n  ingress: [{toPorts: [{ports: [{port: '80', protocol: ANY}]}, {ports: [{port: '81', protocol: TCP}]}]}]", "++++- ++++- ++++- ++++-"},
		{cnp + "  endpointSelector: {}\n  ingress: [{fromEndpoints: [{}]}]", "+++++ +++++ ----- -----"},
		{cnp + "  endpointSelector: {}\n  ingress: [{fromEndpoints: [{matchLabels: {'k8s:app': a}}], toPorts: []}]", "+++++ ----- ----- -----"},
		{cnp + "  endpointSelector: {matchLabels: {'any:app': s, 'k8s:io.kubernetes.pod.namespace': default}}\n  ingress: [{fromEndpoints: [{matchLabels: {'any:app': a}}, {matchLabels: {app: b}}]}]", "+++++ +++++ ----- -----"},
		{cnp + "  endpointSelector: {}\n  ingress: [{fromEndpoints: [{matchLabels: {io.kubernetes.pod.namespace: other}}]}]", "----- ----- +++++ -----"},
		{cnp + "  endpointSelector: {}\n  ingress: [{fromEndpoints: [{matchLabels: {'k8s:io.kubernetes.pod.namespace': other, app: b}}]}]", shut},
		{cnp + "  endpointSelector: {}\n  ingress: [{fromEndpoints: [{matchLabels: {'k8s:io.kubernetes.pod.namespace': other, 'any:io.kubernetes.pod.namespace': default}}]}]", shut},
		{cnp + "  endpointSelector: {}\n  ingress: [{fromEndpoints: [{matchLabels: {'k8s:io.cilium.k8s.policy.serviceaccount': one}}], toPorts: [{ports: [{port: '80', protocol: UDP}]}]}]", "--+-- ----- ----- -----"},

		// Both kinds add up.
		{knp + "  podSelector: {}\n---\n" + cnp + "  endpointSelector: {}\n  ingress: [{fromEndpoints: [{matchLabels: {app: b}}]}]", "----- +++++ ----- -----"},
	} {
		policies, err := parse("f", c.doc)
		if err != nil {
			t.Errorf("%s\n%v", c.doc, err)
			continue
		}
		r := authz.NewRepository(authz.Options{})
		if err := r.Put(policies...); err != nil {
			t.Fatal(err)
		}
		r.SetNamespaceLabels("other", map[string]string{"team": "red"})
		alloc := identity.NewAllocator()
		for _, p := range peers {
			alloc.Acquire(p)
		}
		set := r.Compile(subject, alloc.All)
		got := ""
		for i, p := range peers {
			if i > 0 {
				got += " "
			}
			n, _ := alloc.Acquire(p)
			for _, port := range ports {
				got += map[abi.Verdict]string{abi.VerdictPass: "+", abi.VerdictDrop: "-"}[set.Judge(abi.DirIngress, n, port.proto, port.port).Verdict]
			}
		}
		if got != c.want {
			t.Errorf("%s\n got %s\nwant %s", c.doc, got, c.want)
		}
		if d := set.Judge(abi.DirEgress, identity.NumWorld, authz.ProtoTCP, 80); d.Verdict != abi.VerdictPass {
			t.Errorf("%s\negress: %+v", c.doc, d)
		}
		if c.want == open && set.EnforceIngress {
			// "Everybody everywhere" is the same for all: no evidence.
			if d := set.Judge(abi.DirIngress, authz.NoPeer, authz.ProtoTCP, 80); d.NeedsEvidence {
				t.Errorf("%s\nneeds evidence: %+v", c.doc, d)
			}
		}
	}
}
