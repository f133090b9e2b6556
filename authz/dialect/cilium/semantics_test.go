package cilium_test

import (
	"net/netip"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"

	"portcullis/authz"
	"portcullis/authz/l7"
	"portcullis/bpf/abi"
	"portcullis/identity"
)

// peers, in the order of the columns below: two workloads (app=a in default,
// app=b in other), then those that are none.
var peers = []authz.Peer{
	{Identity: identity.New("", "default", "one", map[string]string{"app": "a"})},
	{Identity: identity.New("", "other", "two", map[string]string{"app": "b"})},
	{Identity: identity.Identity{Reserved: "host"}, Node: map[string]string{"zone": "x"}},
	{Identity: identity.Identity{Reserved: "remote-node"}, Node: map[string]string{"zone": "y"}},
	{Identity: identity.Identity{Reserved: "kube-apiserver"}}, // its labels are not known
	{Identity: identity.Identity{Reserved: "health"}},
	{Identity: identity.Identity{Reserved: "world"}, Block: netip.MustParsePrefix("10.1.2.3/32")},
	{Identity: identity.Identity{Reserved: "world"}, Block: netip.MustParsePrefix("8.8.8.0/24"), Names: []string{"www.example.com"}},
	{Identity: identity.Identity{Reserved: "world"}, Block: netip.MustParsePrefix("2001:db8::1/128"), Names: []string{"a.b.example.com"}},
	{Identity: identity.Identity{Reserved: "world"}}, // its address is not known
}

const (
	nobody    = "XX XXXX XXXX"
	everybody = ".. .... ...."
)

// say returns what a policy says to the workload default/app=s, for each peer.
func say(t *testing.T, doc string, dir abi.Direction, proto uint8, port uint16) string {
	t.Helper()
	parsed, err := parse(doc)
	if err != nil {
		t.Errorf("%s\n%v", doc, err)
		return ""
	}
	r := authz.NewRepository(authz.Options{})
	if err := r.Put(parsed.Policies...); err != nil {
		t.Fatal(err)
	}
	for _, g := range parsed.Groups {
		r.SetBlockGroup(g.Name, g.Labels, g.Blocks)
	}
	r.SetNamespaceLabels("other", map[string]string{"team": "red"})
	r.SetNamespaceLabels("default", map[string]string{})
	r.SetService(authz.ServiceName{Namespace: "other", Name: "db"}, &authz.Backends{Labels: map[string]string{"tier": "data"}, Selector: map[string]string{"app": "b"}})
	r.SetService(authz.ServiceName{Namespace: "default", Name: "out"}, &authz.Backends{Blocks: []netip.Prefix{netip.MustParsePrefix("10.0.0.0/8")}})
	set := r.Compile(identity.New("", "default", "s", map[string]string{"app": "s"}), func(yield func(identity.Numeric, authz.Peer) bool) {
		for i, p := range peers {
			if !yield(identity.Numeric(1000+i), p) {
				return
			}
		}
	})
	var b strings.Builder
	for i := range peers {
		if i == 2 || i == 6 {
			b.WriteByte(' ')
		}
		switch d := set.Judge(dir, identity.Numeric(1000+i), proto, port); {
		case d.Verdict != abi.VerdictPass:
			b.WriteByte('X')
		case d.L7:
			b.WriteByte('7')
		case d.LeastEvidence != identity.EvidenceNone:
			b.WriteByte('E')
		default:
			b.WriteByte('.')
		}
	}
	return b.String()
}

// Whom the peers of a rule mean, at TCP 80.
func TestPeers(t *testing.T) {
	for _, c := range []struct{ doc, want string }{
		// Entities.
		{out + "toEntities: [all]", everybody},
		{out + "toEntities: [none]", nobody},
		{out + "toEntities: []", nobody},
		{out + "toEntities: [world]", "XX XXXX ...."},
		{out + "toEntities: [world-ipv4]", "XX XXXX ..XX"},
		{out + "toEntities: [world-ipv6]", "XX XXXX XX.X"},
		{out + "toEntities: [host]", "XX .XXX XXXX"},
		{out + "toEntities: [remote-node]", "XX X..X XXXX"},
		{out + "toEntities: [kube-apiserver]", "XX XX.X XXXX"},
		{out + "toEntities: [health]", "XX XXX. XXXX"},
		{out + "toEntities: [cluster]", ".. .... XXXX"},
		{out + "toEntities: [host, world]", "XX .XXX ...."},
		{deny + "toEntities: [host]\n  egress: [{toEntities: [all]}]", ".. X... ...."},
		{deny + "toEntities: [cluster]\n  egress: [{toEntities: [all]}]", "XX XXXX ...."},
		{deny + "toEntities: [world-ipv4]\n  egress: [{toEntities: [all]}]", ".. .... XX.X"},

		// Selectors.
		{out + "toEndpoints: [{}]", ".X XXXX XXXX"},
		{out + "toEndpoints: []", nobody},
		{out + "toEndpoints: [{matchLabels: {'k8s:app': b}}]", nobody},
		{out + "toEndpoints: [{matchLabels: {app: b, io.kubernetes.pod.namespace: other}}]", "X. XXXX XXXX"},
		{out + "toEndpoints: [{matchExpressions: [{key: io.kubernetes.pod.namespace, operator: Exists}]}]", ".. XXXX XXXX"},
		{out + "toEndpoints: [{matchLabels: {'k8s:io.cilium.k8s.namespace.labels.team': red}}]", "X. XXXX XXXX"},
		{out + "toEndpoints: [{matchLabels: {io.cilium.k8s.policy.serviceaccount: one}}]", ".X XXXX XXXX"},
		{out + "toEndpoints: [{matchLabels: {io.cilium.k8s.policy.cluster: default}}]", ".X XXXX XXXX"},
		{out + "toEndpoints: [{matchLabels: {io.cilium.k8s.policy.cluster: another}}]", nobody},
		{out + "toEndpoints: [{matchExpressions: [{key: io.cilium.k8s.policy.cluster, operator: NotIn, values: [another]}]}]", ".X XXXX XXXX"},
		{out + "toEndpoints: [{matchLabels: {'reserved:host': ''}}]", "XX .XXX XXXX"},
		{out + "toEndpoints: [{matchLabels: {'reserved:host': x}}]", nobody},
		{out + "toEndpoints: [{matchLabels: {'reserved:remote-node': ''}}]", "XX X..X XXXX"},
		{out + "toEndpoints: [{matchLabels: {'reserved:world': ''}}]", "XX XXXX ...."},
		{out + "toEndpoints: [{matchLabels: {'reserved:world-ipv6': ''}}]", "XX XXXX XX.X"},
		{out + "toEndpoints: [{matchLabels: {'reserved:host': '', app: a}}]", nobody},
		{out + "toEndpoints: [{matchExpressions: [{key: 'reserved:world', operator: DoesNotExist}]}]", ".. .... XXXX"},
		{out + "toEndpoints: [{matchExpressions: [{key: 'reserved:host', operator: NotIn, values: ['']}, {key: app, operator: NotIn, values: [a]}]}]", "X. X... ...."},
		// What is no workload lacks these labels too, and is not meant.
		{out + "toEndpoints: [{matchExpressions: [{key: io.kubernetes.pod.namespace, operator: NotIn, values: [other]}]}]", ".X XXXX XXXX"},
		{deny + "toEndpoints: [{matchExpressions: [{key: io.kubernetes.pod.namespace, operator: NotIn, values: [other]}]}]\n  egress: [{toEntities: [all]}]", "X. .... ...."},
		{out + "toEndpoints: [{matchExpressions: [{key: io.cilium.k8s.namespace.labels.team, operator: DoesNotExist}]}]", ".X XXXX XXXX"},

		// Clusterwide.
		{ccnp + all + "  egress: [{toEndpoints: [{}]}]", ".. XXXX XXXX"},
		{ccnp + all + "  egress: [{toEndpoints: [{matchLabels: {app: b}}]}]", "X. XXXX XXXX"},
		{ccnp + all + "  egress: [{toEndpoints: [{matchExpressions: [{key: app, operator: NotIn, values: [b]}]}]}]", ".X XXXX XXXX"},
		{ccnp + all + "  egress: [{toEndpoints: [{matchExpressions: [{key: io.kubernetes.pod.namespace, operator: NotIn, values: [other]}]}]}]", ".X XXXX XXXX"},
		{ccnp + all + "  egress: [{toEndpoints: [{matchLabels: {io.cilium.k8s.namespace.labels.team: red}}]}]", "X. XXXX XXXX"},
		{ccnp + all + "  egress: [{toEndpoints: [{matchExpressions: [{key: io.cilium.k8s.namespace.labels.team, operator: NotIn, values: [red]}]}]}]", ".X XXXX XXXX"},
		{ccnp + all + "  egress: [{toEndpoints: [{matchExpressions: [{key: 'k8s:io.cilium.k8s.namespace.labels.team', operator: DoesNotExist}]}]}]", ".X XXXX XXXX"},
		{ccnp + "  endpointSelector: {matchLabels: {io.kubernetes.pod.namespace: other}}\n  egress: [{}]", everybody},
		{ccnp + "  endpointSelector: {matchLabels: {'reserved:health': ''}}\n  egress: [{}]", everybody},
		{ccnp + "  nodeSelector: {}\n  egress: [{}]", everybody},

		// Addresses.
		{out + "toCIDR: [10.0.0.0/8]", "XX XXXX .XXX"},
		{out + "toCIDR: [10.1.2.3]", "XX XXXX .XXX"},
		{out + "toCIDR: [10.99.99.99/8]", "XX XXXX .XXX"},
		{out + "toCIDR: [0.0.0.0/0]", "XX XXXX ..XX"},
		{out + "toCIDR: ['::/0']", "XX XXXX XX.X"},
		{out + "toCIDR: [8.8.8.8/32]", nobody}, // a part of its block
		{out + "toCIDR: []", nobody},
		{out + "toCIDRSet: [{cidr: 0.0.0.0/0, except: [10.0.0.0/8]}]", "XX XXXX X.XX"},
		{deny + "toCIDR: [8.8.8.8/32]\n  egress: [{toEntities: [all]}]", ".. .... .X.X"},
		{deny + "toCIDRSet: [{cidr: 0.0.0.0/0, except: [8.0.0.0/8]}]\n  egress: [{toEntities: [all]}]", ".. .... X..X"},
		// A wide denial holds within it, whatever narrower block is allowed.
		{deny + "toCIDR: [10.0.0.0/8]\n  egress: [{toCIDR: [10.1.2.3/32]}, {toEntities: [all]}]", ".. .... X..X"},
		{deny + "toCIDRSet: [{cidr: 10.0.0.0/8, except: [10.1.2.3/32]}]\n  egress: [{toEntities: [all]}]", ".. .... ...X"},
		{out + "toCIDRSet: [{cidr: 10.0.0.0/8, except: [10.1.2.3/32]}, {cidr: 10.1.2.0/24}]", "XX XXXX .XXX"},
		{ccg + "  externalCIDRs: [10.9.9.9/8]\n---\n" + out + "toCIDRSet: [{cidrGroupRef: g}]", "XX XXXX .XXX"},
		{ccg + "  externalCIDRs: [0.0.0.0/0]\n---\n" + out + "toCIDRSet: [{cidrGroupRef: g, except: [10.0.0.0/8]}]", "XX XXXX X.XX"},
		{ccg + "  externalCIDRs: [10.0.0.0/8]\n---\n" + out + "toCIDRSet: [{cidrGroupSelector: {matchLabels: {a: b}}}]", "XX XXXX .XXX"},
		{ccg + "  externalCIDRs: [10.0.0.0/8]\n---\n" + out + "toCIDRSet: [{cidrGroupSelector: {matchLabels: {a: c}}}]", nobody},
		{out + "toCIDRSet: [{cidrGroupRef: unknown}]", nobody},
		{deny + "toCIDRSet: [{cidrGroupRef: unknown}]\n  egress: [{toEntities: [all]}]", ".. .... XXXX"},
		{out + "toCIDRSet: [{cidrGroupSelector: {}}]", nobody},
		{deny + "toCIDRSet: [{cidrGroupSelector: {matchLabels: {a: b}}}]\n  egress: [{toEntities: [all]}]", ".. .... XXXX"},
		{ccg + "  externalCIDRs: [10.0.0.0/8]\n---\n" + deny + "toCIDRSet: [{cidrGroupSelector: {matchLabels: {a: b}}}]\n  egress: [{toEntities: [all]}]", ".. .... X..X"},
		{ccg + "  externalCIDRs: [10.0.0.0/8]\n---\n" + deny + "toCIDRSet: [{cidrGroupSelector: {matchLabels: {a: c}}}]\n  egress: [{toEntities: [all]}]", everybody},

		// Nodes, services, names.
		{out + "toNodes: [{}]", "XX X..X XXXX"}, // not its own node
		{out + "toNodes: [{matchLabels: {'node:zone': x}}]", nobody},
		{out + "toNodes: [{matchExpressions: [{key: io.cilium.k8s.policy.cluster, operator: Exists}]}]", "XX X..X XXXX"},
		{out + "toNodes: [{matchLabels: {'node:zone': 'y'}}]", "XX X.XX XXXX"},
		{out + "toNodes: [{matchExpressions: [{key: zone, operator: NotIn, values: [x]}]}]", "XX X.XX XXXX"},
		{out + "toServices: [{k8sService: {serviceName: db, namespace: other}}]", "X. XXXX XXXX"},
		{out + "toServices: [{k8sService: {serviceName: db}}]", nobody},
		{out + "toServices: [{k8sService: {serviceName: out}}]", "XX XXXX .XXX"},
		{out + "toServices: [{k8sServiceSelector: {selector: {matchLabels: {tier: data}}}}]", "X. XXXX XXXX"},
		{out + "toFQDNs: [{matchName: WWW.Example.com.}]", "XX XXXX X.XX"},
		{out + "toFQDNs: [{matchPattern: '*.example.com'}]", "XX XXXX X.XX"},
		{out + "toFQDNs: [{matchPattern: '**.example.com'}]", "XX XXXX X..X"},
		{out + "toFQDNs: [{matchPattern: '*'}]", "XX XXXX X..X"},

		// None.
		{out + "{}", nobody},
		{out + "toPorts: []", nobody},
		{out + "icmps: []", nobody},
		{deny + "{}\n  egress: [{toEntities: [all]}]", everybody},
		{out + "toPorts: [{ports: [{port: '80'}]}]", everybody},
	} {
		if got := say(t, c.doc, abi.DirEgress, authz.ProtoTCP, 80); got != c.want {
			t.Errorf("%s\n got %s\nwant %s", c.doc, got, c.want)
		}
	}
}

// What the ports of a rule mean: of these packets, those that pass.
func TestPorts(t *testing.T) {
	packets := []struct {
		name  string
		proto uint8
		port  uint16
	}{{"tcp80", 6, 80}, {"tcp90", 6, 90}, {"udp80", 17, 80}, {"sctp80", 132, 80}, {"ping", 1, 8 << 8}, {"gone", 1, 3<<8 | 1}, {"ping6", 58, 128 << 8}, {"vrrp", 112, 0}}
	for _, c := range []struct{ doc, want string }{
		{in + "toPorts: [{ports: [{port: '80'}]}]", "tcp80 udp80 sctp80"},
		{in + "toPorts: [{ports: [{port: '80', protocol: ANY}]}]", "tcp80 udp80 sctp80"},
		{in + "toPorts: [{ports: [{port: '80', endPort: 90, protocol: TCP}]}]", "tcp80 tcp90"},
		{in + "toPorts: [{ports: [{port: '80', endPort: 0, protocol: TCP}]}]", "tcp80"},
		{in + "toPorts: [{ports: [{port: '0', protocol: TCP}]}]", "tcp80 tcp90"},
		{in + "toPorts: [{ports: [{protocol: UDP}]}]", "udp80"},
		{in + "toPorts: [{ports: [{port: '0'}]}]", "tcp80 tcp90 udp80 sctp80"},
		{in + "toPorts: [{ports: [{protocol: VRRP}]}]", "vrrp"},
		{in + "toPorts: [{ports: [{port: '0', protocol: VRRP}, {port: '90', protocol: TCP}]}]", "tcp90 vrrp"},
		{in + "icmps: [{fields: [{type: 8}]}]", "ping"},
		{in + "icmps: [{fields: [{type: EchoRequest, family: IPv6}]}, {fields: [{type: '3', family: IPv4}]}]", "gone ping6"},
		{in + "{fromEntities: [all]}", "tcp80 tcp90 udp80 sctp80 ping gone ping6 vrrp"},
		{cnp + all + "  ingressDeny: [{icmps: [{fields: [{type: 8}]}]}]\n  ingress: [{fromEntities: [all]}]", "tcp80 tcp90 udp80 sctp80 gone ping6 vrrp"},
		{cnp + all + "  ingressDeny: [{toPorts: [{ports: [{port: '80'}]}]}]\n  ingress: [{fromEntities: [all], toPorts: [{ports: [{port: '0', protocol: TCP}]}]}]", "tcp90"},
	} {
		var pass []string
		for _, p := range packets {
			switch got := say(t, c.doc, abi.DirIngress, p.proto, p.port); got {
			case everybody:
				pass = append(pass, p.name)
			case nobody:
			default:
				t.Errorf("%s: %s: %s", c.doc, p.name, got)
			}
		}
		if got := strings.Join(pass, " "); got != c.want {
			t.Errorf("%s\n got %s\nwant %s", c.doc, got, c.want)
		}
	}
}

// Default deny, both directions, specs, evidence and rules inside a protocol.
func TestPolicies(t *testing.T) {
	const http, dns = "rules: {http: [{}]}", "rules: {dns: [{matchPattern: '*'}]}"
	for _, c := range []struct{ doc, in, out string }{
		{cnp + all + "  ingress: [{}]", nobody, everybody},
		{cnp + all + "  ingressDeny: [{fromEntities: [host]}]", nobody, everybody},
		{cnp + all + "  ingressDeny: [{fromEntities: [host]}]\n  enableDefaultDeny: {ingress: false}", ".. X... ....", everybody},
		{cnp + all + "  ingress: [{fromEntities: [host]}]\n  enableDefaultDeny: {ingress: false}", everybody, everybody},
		{cnp + all + "  ingress: [{fromEntities: [host]}]\n  enableDefaultDeny: {egress: true}", "XX .XXX XXXX", nobody},
		{cnp + all + "  ingress: [{fromEntities: [host]}]\n  enableDefaultDeny: {ingress: false, egress: false}\n  egress: [{}]", everybody, everybody},
		{strings.Replace(cnp, "spec:\n", "specs:\n- endpointSelector: {}\n  ingress: [{fromEntities: [host]}]\n- endpointSelector: {}\n  ingress: [{fromEntities: [remote-node]}]\n  egress: [{}]", 1), "XX ...X XXXX", nobody},
		{strings.Replace(cnp, "spec:\n", "spec: {endpointSelector: {}, ingress: [{fromEntities: [host]}]}\nspecs:\n- endpointSelector: {}\n  ingress: [{fromEntities: [world]}]", 1), "XX .XXX ....", everybody},
		{in + "{fromEntities: [world], authentication: {mode: required}}", "XX XXXX EEEE", everybody},
		{in + "{fromEntities: [world], authentication: {mode: disabled}}", "XX XXXX ....", everybody},
		{in + "{fromEntities: [world], authentication: {mode: test-always-fail}}", "XX XXXX ....", everybody},
		{in + "{fromEntities: [world], toPorts: [{ports: [{port: '80', protocol: TCP}], " + http + "}]}", "XX XXXX 7777", everybody},
		{in + "{fromEntities: [world], toPorts: [{ports: [{port: '90', protocol: TCP}], " + http + "}, {ports: [{port: '80', protocol: TCP}]}]}", "XX XXXX ....", everybody},
		{out + "{toEntities: [world], toPorts: [{ports: [{port: '80'}], " + dns + "}]}", everybody, "XX XXXX 7777"},
		{out + "{toEntities: [world], toPorts: [{ports: [{port: '80', protocol: TCP}], serverNames: [a]}]}", everybody, "XX XXXX 7777"},
		{out + "{toEntities: [world], toPorts: [{ports: [{port: '80', protocol: TCP}], rules: {}}]}", everybody, "XX XXXX ...."},
		{in + "{fromEntities: [world], toPorts: [{ports: [{port: '80', protocol: TCP}], rules: {http: [{method: '', path: '', host: '', headers: [], headerMatches: []}]}}]}", "XX XXXX 7777", everybody},
		{out + "{toEntities: [world], toPorts: [{ports: [{port: '80', protocol: TCP}], rules: {http: null}}]}", everybody, "XX XXXX ...."},
		{out + "{toFQDNs: []}", everybody, nobody},
		// What a broad rule requires holds where a narrow one is silent, and the other way round.
		{out + "{toEntities: [world], authentication: {mode: required}}\n  - toPorts: [{ports: [{port: '80'}]}]", everybody, ".. .... EEEE"},
		{out + "{toEntities: [all], authentication: {mode: required}}\n  - toEntities: [host]\n    toPorts: [{ports: [{port: '80'}]}]", everybody, "EE EEEE EEEE"},
		{out + "{toEntities: [all], toPorts: [{ports: [{port: '81'}]}], authentication: {mode: required}}\n  - toEntities: [host]", everybody, "XX .XXX XXXX"},
		{out + "{toEntities: [world], authentication: {mode: required}}\n  enableDefaultDeny: {egress: false}", everybody, ".. .... EEEE"},
		// Rules inside a protocol stay where a rule without any allows the port too, and where nothing is denied by default.
		{out + "{toEntities: [world], toPorts: [{ports: [{port: '80', protocol: TCP}], " + http + "}]}\n  - toEntities: [all]", everybody, ".. .... 7777"},
		{out + "{toPorts: [{ports: [{port: '80', protocol: TCP}], " + http + "}]}\n  - toEntities: [host]\n  egressDeny: [{toEntities: [remote-node]}]", everybody, "77 7XX7 7777"},
		{out + "{toEntities: [world], toPorts: [{ports: [{port: '80', protocol: TCP}], " + http + "}]}\n  enableDefaultDeny: {egress: false}", everybody, ".. .... 7777"},
		{deny + "{toEntities: [world]}\n  enableDefaultDeny: {egress: false, ingress: true}", nobody, ".. .... XXXX"},
	} {
		if got := say(t, c.doc, abi.DirIngress, authz.ProtoTCP, 80); got != c.in {
			t.Errorf("%s\n got in %s\nwant in %s", c.doc, got, c.in)
		}
		if got := say(t, c.doc, abi.DirEgress, authz.ProtoTCP, 80); got != c.out {
			t.Errorf("%s\n got out %s\nwant out %s", c.doc, got, c.out)
		}
	}
}

// The model of a document, in full.
func TestModelGolden(t *testing.T) {
	src := strings.TrimSuffix(ccnp, "spec:\n") + `specs:
- endpointSelector: {matchLabels: {app: s}}
  ingress:
  - fromEndpoints: [{matchLabels: {app: a, 'reserved:host': ''}}, {matchLabels: {app: b}}]
    authentication: {mode: required}
    toPorts:
    - ports: [{port: Http, protocol: TCP}]
    - ports: [{port: '80', endPort: 81, protocol: TCP}]
      rules: {http: [{}]}
  egressDeny:
  - toCIDRSet: [{cidr: 10.0.0.1/8, except: [10.2.0.0/16]}, {cidrGroupSelector: {matchLabels: {g: h}}}]
- nodeSelector: {}
  ingress: [{}]
`
	r, err := parse(src)
	if err != nil {
		t.Fatal(err)
	}
	b := []authz.PeerSelector{authz.Selector{authz.Label("app", "b")}}
	want := &authz.Policy{
		Ref: authz.Ref{Kind: "CiliumClusterwideNetworkPolicy", Name: "p"}, Source: src,
		NeedsProxy: []authz.Problem{
			{File: "f", Document: 1, Line: 12, Path: "specs[0].ingress[0].toPorts[1].rules.http", Message: "it needs a proxy, and there is none: remove rules to allow the whole port, or remove the port"},
		},
		NotEnforced: []authz.Problem{
			{File: "f", Document: 1, Line: 15, Path: "specs[1].nodeSelector", Message: "not enforced yet: policies for nodes have no datapath; protect the node by its own firewall, and workloads by endpointSelector"},
		},
		Specs: []authz.Spec{
			{
				Subject: authz.Selector{authz.Label("app", "s")}, DenyIngress: true, DenyEgress: true,
				Rules: []authz.Rule{
					{Direction: abi.DirIngress, Action: authz.Allow, Peers: b, Ports: []authz.PortRange{authz.PortNamed(authz.ProtoTCP, "http")}, Evidence: identity.EvidenceSVID, Path: "specs[0].ingress[0]"},
					{Direction: abi.DirIngress, Action: authz.Allow, Peers: b, Ports: []authz.PortRange{{Proto: authz.ProtoTCP, First: 80, Last: 81}}, Evidence: identity.EvidenceSVID, L7: &l7.Rules{Parser: l7.ParserHTTP, HTTP: []l7.HTTP{{}}}, Path: "specs[0].ingress[0].toPorts[1]"},
					{Direction: abi.DirEgress, Action: authz.Deny, AnyPort: true, Path: "specs[0].egressDeny[0]", Peers: []authz.PeerSelector{
						authz.Block{Prefix: netip.MustParsePrefix("10.0.0.0/8"), Except: []netip.Prefix{netip.MustParsePrefix("10.2.0.0/16")}},
						authz.BlockGroup{Labels: authz.Selector{{Attribute: authz.GroupLabel, Key: "g", Operator: authz.In, Values: []string{"h"}}}},
					}},
				},
			},
			{
				Subject: authz.Selector{}, Nodes: true, DenyIngress: true,
				Rules: []authz.Rule{{Direction: abi.DirIngress, Action: authz.Allow, AnyPort: true, Path: "specs[1].ingress[0]"}},
			},
		},
	}
	if d := cmp.Diff(want, r.Policies[0], cmp.Comparer(func(a, b netip.Prefix) bool { return a == b }), cmpopts.IgnoreUnexported(l7.Rules{}, l7.HTTP{}, l7.Header{}, l7.Expr{})); d != "" {
		t.Error(d)
	}
}
