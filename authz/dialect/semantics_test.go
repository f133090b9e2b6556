package dialect_test

import (
	"strings"
	"testing"

	"portcullis/authz"
	"portcullis/bpf/abi"
	"portcullis/identity"
)

// smallWorld is a workload app=s in namespace default, whose peers and ports
// are below.
type smallWorld struct {
	*authz.Repository
	alloc   *identity.Allocator
	subject identity.Identity
	own     []identity.NamedPort
}

var smallPeers = []identity.Identity{
	identity.New("", "default", "one", map[string]string{"app": "a"}),
	identity.New("", "default", "two", map[string]string{"app": "b", "zone": "x"}),
	identity.New("", "other", "one", map[string]string{"app": "a", "zone": "y"}),
	{Reserved: "world"}, // its trust domain is empty, and no selector selects it all the same
}

var smallPorts = []struct {
	proto uint8
	port  uint16
}{{authz.ProtoTCP, 80}, {authz.ProtoTCP, 81}, {authz.ProtoUDP, 80}, {authz.ProtoSCTP, 80}, {authz.ProtoICMP, 8 << 8}}

func newSmallWorld(t *testing.T, policies []*authz.Policy) smallWorld {
	t.Helper()
	w := smallWorld{authz.NewRepository(authz.Options{}), identity.NewAllocator(), identity.New("", "default", "default", map[string]string{"app": "s"}),
		[]identity.NamedPort{{Name: "http", Port: 81, Protocol: "TCP"}, {Name: "http", Port: 80, Protocol: "UDP"}, {Name: "dns", Port: 80, Protocol: "SCTP"}}}
	if err := w.Put(policies...); err != nil {
		t.Fatal(err)
	}
	w.SetNamespaceLabels("other", map[string]string{"team": "red"})
	w.SetNamespaceLabels("default", map[string]string{})
	for i, p := range smallPeers {
		w.alloc.Acquire(p)
		// The second peer's http is TCP 80, the third's SCTP 80.
		w.AddPorts(uint64(i), p, [][]identity.NamedPort{0: nil, 1: {{Name: "http", Port: 80, Protocol: "TCP"}},
			2: {{Name: "http", Port: 80, Protocol: "SCTP"}}, 3: {{Name: "http", Port: 80, Protocol: "TCP"}}}[i])
	}
	return w
}

// verdicts has a word for each peer and in it a character for each port: +
// passes, - is dropped.
func (w smallWorld) verdicts(dir abi.Direction) (string, authz.Set) {
	set := w.Compile(w.subject, authz.Peers(w.alloc.All), w.own...)
	var words []string
	for _, p := range smallPeers {
		n, _ := w.alloc.Acquire(p)
		word := ""
		for _, port := range smallPorts {
			word += map[abi.Verdict]string{abi.VerdictPass: "+", abi.VerdictDrop: "-"}[set.Judge(dir, n, port.proto, port.port).Verdict]
		}
		words = append(words, word)
	}
	return strings.Join(words, " "), set
}

const (
	all, none = "+++++", "-----"
	open      = all + " " + all + " " + all + " " + all
	shut      = none + " " + none + " " + none + " " + none
)

// Small specs of ingress and what they mean.
func TestSemantics(t *testing.T) {
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

		// Expressions. The label app is a, b, a; zone is not there, x, y.
		{knp + "  podSelector: {matchExpressions: [{key: app, operator: NotIn, values: [s]}]}", open},
		{knp + "  podSelector: {matchExpressions: [{key: app, operator: In, values: [x, s]}, {key: app, operator: Exists}, {key: zone, operator: DoesNotExist}, {key: zone, operator: NotIn, values: [x]}]}", shut},
		{knp + "  podSelector: {}\n  ingress: [{from: [{namespaceSelector: {}, podSelector: {matchExpressions: [{key: app, operator: In, values: [b, c]}]}}]}]", "----- +++++ ----- -----"},
		{knp + "  podSelector: {}\n  ingress: [{from: [{namespaceSelector: {}, podSelector: {matchExpressions: [{key: zone, operator: NotIn, values: [x]}]}}]}]", "+++++ ----- +++++ -----"},
		{knp + "  podSelector: {}\n  ingress: [{from: [{namespaceSelector: {}, podSelector: {matchExpressions: [{key: zone, operator: Exists}]}}]}]", "----- +++++ +++++ -----"},
		{knp + "  podSelector: {}\n  ingress: [{from: [{namespaceSelector: {}, podSelector: {matchExpressions: [{key: zone, operator: DoesNotExist}]}}]}]", "+++++ ----- ----- -----"},
		{knp + "  podSelector: {}\n  ingress: [{from: [{namespaceSelector: {}, podSelector: {matchLabels: {app: a}, matchExpressions: [{key: zone, operator: Exists}]}}]}]", "----- ----- +++++ -----"},
		{knp + "  podSelector: {}\n  ingress: [{from: [{namespaceSelector: {matchExpressions: [{key: team, operator: NotIn, values: [red]}]}}]}]", "+++++ +++++ ----- -----"},
		{knp + "  podSelector: {}\n  ingress: [{from: [{namespaceSelector: {matchExpressions: [{key: team, operator: Exists}]}}]}]", "----- ----- +++++ -----"},
		{knp + "  podSelector: {}\n  ingress: [{from: [{namespaceSelector: {matchExpressions: [{key: team, operator: DoesNotExist}]}}]}]", "+++++ +++++ ----- -----"},
		{knp + "  podSelector: {}\n  ingress: [{from: [{namespaceSelector: {matchExpressions: [{key: kubernetes.io/metadata.name, operator: NotIn, values: [default]}]}}]}]", "----- ----- +++++ -----"},
		{cnp + "  endpointSelector: {matchExpressions: [{key: 'k8s:app', operator: In, values: [s]}, {key: io.kubernetes.pod.namespace, operator: Exists}]}\n  ingress: [{}]", shut},
		{cnp + "  endpointSelector: {matchExpressions: [{key: app, operator: DoesNotExist}]}\n  ingress: [{}]", open},
		{cnp + "  endpointSelector: {}\n  ingress: [{fromEndpoints: [{matchExpressions: [{key: 'any:zone', operator: DoesNotExist}]}]}]", "+++++ ----- ----- -----"},
		{cnp + "  endpointSelector: {}\n  ingress: [{fromEndpoints: [{matchExpressions: [{key: 'k8s:io.kubernetes.pod.namespace', operator: Exists}]}]}]", "+++++ +++++ +++++ -----"},
		{cnp + "  endpointSelector: {}\n  ingress: [{fromEndpoints: [{matchExpressions: [{key: io.kubernetes.pod.namespace, operator: NotIn, values: [default]}]}]}]", "----- ----- +++++ -----"},
		{cnp + "  endpointSelector: {}\n  ingress: [{fromEndpoints: [{matchExpressions: [{key: io.kubernetes.pod.namespace, operator: In, values: [other, default]}, {key: zone, operator: NotIn, values: [x]}]}]}]", "+++++ ----- +++++ -----"},
		{cnp + "  endpointSelector: {}\n  ingress: [{fromEndpoints: [{matchExpressions: [{key: io.cilium.k8s.policy.cluster, operator: Exists}]}]}]", "+++++ +++++ ----- -----"},
		{cnp + "  endpointSelector: {}\n  ingress: [{fromEndpoints: [{matchExpressions: [{key: io.cilium.k8s.policy.serviceaccount, operator: NotIn, values: [one]}]}]}]", "----- +++++ ----- -----"},
		{cnp + "  endpointSelector: {}\n  ingress: [{fromEndpoints: [{matchLabels: {'k8s:io.cilium.k8s.namespace.labels.team': red}}]}]", "----- ----- +++++ -----"},
		{cnp + "  endpointSelector: {}\n  ingress: [{fromEndpoints: [{matchExpressions: [{key: io.cilium.k8s.namespace.labels.team, operator: DoesNotExist}]}]}]", "+++++ +++++ ----- -----"},
		{cnp + "  endpointSelector: {}\n  ingress: [{fromEndpoints: [{matchLabels: {'io.cilium.k8s.namespace.labels.kubernetes.io/metadata.name': other}}]}]", "----- ----- +++++ -----"},

		// Protocols, ranges, and the subject's own named ports: http is TCP 81
		// and UDP 80.
		{knp + "  podSelector: {}\n  ingress: [{ports: [{port: 80, protocol: SCTP}]}]", "---+- ---+- ---+- ---+-"},
		{knp + "  podSelector: {}\n  ingress: [{ports: [{protocol: SCTP}, {port: 81, endPort: 90}]}]", "-+-+- -+-+- -+-+- -+-+-"},
		{knp + "  podSelector: {}\n  ingress: [{ports: [{port: 1, endPort: 80}, {port: 81, endPort: 81}]}]", "++--- ++--- ++--- ++---"},
		{knp + "  podSelector: {}\n  ingress: [{ports: [{port: http}]}]", "-+--- -+--- -+--- -+---"},
		{knp + "  podSelector: {}\n  ingress: [{from: [{podSelector: {}}], ports: [{port: http, protocol: UDP}]}]", "--+-- --+-- ----- -----"},
		{knp + "  podSelector: {}\n  ingress: [{ports: [{port: http, protocol: SCTP}, {port: nobodys}]}]", shut},
		{cnp + "  endpointSelector: {}\n  ingress: [{toPorts: [{ports: [{port: '80', protocol: SCTP}]}]}]", "---+- ---+- ---+- ---+-"},
		{cnp + "  endpointSelector: {}\n  ingress: [{toPorts: [{ports: [{port: '1', endPort: 80}]}]}]", "+-++- +-++- +-++- +-++-"},
		{cnp + "  endpointSelector: {}\n  ingress: [{toPorts: [{ports: [{port: '81', endPort: 0, protocol: TCP}]}]}]", "-+--- -+--- -+--- -+---"},
		{cnp + "  endpointSelector: {}\n  ingress: [{toPorts: [{ports: [{port: HTTP}]}]}]", "-++-- -++-- -++-- -++--"},
		{cnp + "  endpointSelector: {}\n  ingress: [{toPorts: [{ports: [{port: http, protocol: TCP}]}]}]", "-+--- -+--- -+--- -+---"},

		// Both kinds add up.
		{knp + "  podSelector: {}\n---\n" + cnp + "  endpointSelector: {}\n  ingress: [{fromEndpoints: [{matchLabels: {app: b}}]}]", "----- +++++ ----- -----"},
	} {
		policies, err := parse("f", c.doc)
		if err != nil {
			t.Errorf("%s\n%v", c.doc, err)
			continue
		}
		w := newSmallWorld(t, policies)
		got, set := w.verdicts(abi.DirIngress)
		if got != c.want {
			t.Errorf("%s\n got %s\nwant %s", c.doc, got, c.want)
		}
		if out, _ := w.verdicts(abi.DirEgress); out != open {
			t.Errorf("%s\negress: %s", c.doc, out)
		}
		if c.want == open && set.EnforceIngress {
			// "Everybody everywhere" is the same for all: no evidence.
			if d := set.Judge(abi.DirIngress, authz.NoPeer, authz.ProtoTCP, 80); d.NeedsEvidence {
				t.Errorf("%s\nneeds evidence: %+v", c.doc, d)
			}
		}
	}
}

// Small specs that speak of egress, and what they mean in both directions.
func TestEgressSemantics(t *testing.T) {
	for _, c := range []struct{ doc, in, out string }{
		// policyTypes: without it, Ingress, and Egress where there are rules.
		{knp + "  podSelector: {}\n  egress: []", shut, open},
		{knp + "  podSelector: {}\n  egress: [{}]", shut, open},
		{knp + "  podSelector: {}\n  policyTypes: []\n  egress: [{}]\n  ingress: [{}]", open, open},
		{knp + "  podSelector: {}\n  policyTypes: [Egress]", open, shut},
		{knp + "  podSelector: {}\n  policyTypes: [Ingress, Egress]", shut, shut},
		{knp + "  podSelector: {}\n  policyTypes: [Egress]\n  egress: []\n  ingress: [{}]", open, shut},
		{knp + "  podSelector: {}\n  egress: [{to: [{podSelector: {}}]}]", shut, "+++++ +++++ ----- -----"},
		{knp + "  podSelector: {}\n  policyTypes: [Ingress]\n  egress: [{to: [{podSelector: {}}]}]", shut, open},
		// Rules of a direction that is not among the types do not add up with
		// another policy's either.
		{knp + "  podSelector: {}\n  policyTypes: [Ingress]\n  egress: [{}]\n---\n" + strings.Replace(knp, "name: p", "name: q", 1) + "  podSelector: {}\n  policyTypes: [Egress]\n  ingress: [{}]", shut, shut},
		{knp + "  podSelector: {}\n  policyTypes: [Egress]\n  egress: [{to: [{namespaceSelector: {matchLabels: {team: red}}}], ports: [{port: 80}, {port: 80, protocol: SCTP}]}]", open, "----- ----- +--+- -----"},
		{knp + "  podSelector: {}\n  policyTypes: [Egress]\n  egress: [{to: [], ports: [{port: 81, endPort: 82}]}]", open, "-+--- -+--- -+--- -+---"},
		{knp + "  podSelector: {matchLabels: {app: x}}\n  policyTypes: [Egress]", open, open},
		// Ports by name are the peer's, not the subject's.
		{knp + "  podSelector: {}\n  policyTypes: [Egress]\n  egress: [{ports: [{port: http}]}]", open, "----- +---- ----- -----"},
		{knp + "  podSelector: {}\n  policyTypes: [Egress]\n  egress: [{to: [{podSelector: {}}, {namespaceSelector: {}}], ports: [{port: http, protocol: SCTP}]}]", open, "----- ----- ---+- -----"},
		{knp + "  podSelector: {}\n  policyTypes: [Egress]\n  egress: [{to: [{podSelector: {matchLabels: {app: a}}}], ports: [{port: http}]}]", open, shut},

		{cnp + "  endpointSelector: {}\n  ingress: []\n  egress: [{}]", open, shut},
		{cnp + "  endpointSelector: {}\n  egress: [{}]", open, shut},
		{cnp + "  endpointSelector: {}\n  ingress: [{}]\n  egress: [{}]", shut, shut},
		{cnp + "  endpointSelector: {matchLabels: {app: x}}\n  egress: [{}]", open, open},
		{cnp + "  endpointSelector: {}\n  egress: [{toEndpoints: []}]", open, shut},
		{cnp + "  endpointSelector: {}\n  egress: [{toEndpoints: [], toPorts: [{ports: [{port: '80'}]}]}]", open, shut},
		{cnp + "  endpointSelector: {}\n  egress: [{toEndpoints: [{}]}]", open, "+++++ +++++ ----- -----"},
		{cnp + "  endpointSelector: {}\n  egress: [{toEndpoints: [{matchLabels: {'k8s:io.kubernetes.pod.namespace': other}}], toPorts: [{ports: [{port: '80', protocol: UDP}]}]}]", open, "----- ----- --+-- -----"},
		{cnp + "  endpointSelector: {}\n  egress: [{toPorts: [{ports: [{port: '80', endPort: 81, protocol: TCP}]}]}]", open, "++--- ++--- ++--- ++---"},
		{cnp + "  endpointSelector: {}\n  ingress: [{fromEndpoints: [{}]}]\n  egress: [{toPorts: [{ports: [{port: '81'}]}]}]", "+++++ +++++ ----- -----", "-+--- -+--- -+--- -+---"},
		{cnp + "  endpointSelector: {}\n  egress: [{toPorts: [{ports: [{port: http}]}]}]", open, "----- +---- ---+- -----"},
		{cnp + "  endpointSelector: {}\n  egress: [{toEndpoints: [{}], toPorts: [{ports: [{port: http, protocol: ANY}]}]}]", open, "----- +---- ----- -----"},
		{cnp + "  endpointSelector: {}\n  egress: [{toEndpoints: [{matchExpressions: [{key: zone, operator: NotIn, values: [x]}]}]}]", open, "+++++ ----- ----- -----"},

		// Both kinds add up.
		{knp + "  podSelector: {}\n  policyTypes: [Egress]\n---\n" + cnp + "  endpointSelector: {}\n  egress: [{toEndpoints: [{matchLabels: {app: b}}]}]", open, "----- +++++ ----- -----"},
	} {
		policies, err := parse("f", c.doc)
		if err != nil {
			t.Errorf("%s\n%v", c.doc, err)
			continue
		}
		w := newSmallWorld(t, policies)
		in, _ := w.verdicts(abi.DirIngress)
		out, _ := w.verdicts(abi.DirEgress)
		if in != c.in || out != c.out {
			t.Errorf("%s\n got in %s, out %s\nwant in %s, out %s", c.doc, in, out, c.in, c.out)
		}
	}
}
