package cilium_test

import (
	"errors"
	"fmt"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"portcullis/authz"
	"portcullis/authz/dialect"
	"portcullis/authz/dialect/cilium"
)

const (
	cnp  = "apiVersion: cilium.io/v2\nkind: CiliumNetworkPolicy\nmetadata: {name: p}\nspec:\n"
	ccnp = "apiVersion: cilium.io/v2\nkind: CiliumClusterwideNetworkPolicy\nmetadata: {name: p}\nspec:\n"
	ccg  = "apiVersion: cilium.io/v2\nkind: CiliumCIDRGroup\nmetadata: {name: g, labels: {a: b}}\nspec:\n"
	all  = "  endpointSelector: {}\n"
	in   = cnp + all + "  ingress:\n  - "
	out  = cnp + all + "  egress:\n  - "
	deny = cnp + all + "  egressDeny:\n  - "
)

func parse(doc string) (dialect.Result, error) {
	return dialect.ParseFile("f", []byte(doc), cilium.Dialects()...)
}

// places returns "line path" of each problem.
func places(t *testing.T, problems []authz.Problem) string {
	t.Helper()
	var out []string
	for _, p := range problems {
		if p.Message == "" || p.File != "f" || p.Document == 0 {
			t.Errorf("%+v says too little", p)
		}
		out = append(out, strings.TrimSpace(fmt.Sprintf("%d %s", p.Line, p.Path)))
	}
	return strings.Join(out, ", ")
}

// Every place that is refused, all at once.
func TestRefused(t *testing.T) {
	for _, c := range []struct{ doc, want string }{
		// The object.
		{cnp + "  ingress: [{}]", "4 spec"},
		{cnp + all, "4 spec"},
		{cnp + all + "  ingress: []\n  egress: []", "4 spec"},
		{cnp + all + "  egress: {}\n  ingress: [{}]", "6 spec.egress"},
		{cnp + all + "  enableDefaultDeny: {ingress: true}", "4 spec"},
		{cnp + all + "  ingress: [{}]\n  enableDefaultDeny: {ingress: yes, egress: 'true', x: 1}",
			"7 spec.enableDefaultDeny.x, 7 spec.enableDefaultDeny.ingress, 7 spec.enableDefaultDeny.egress"},
		{cnp + all + "  ingress: [{}]\n  description: [1]\n  labels: {}\n  log: {level: x}\n  extra: 1",
			"7 spec.description, 8 spec.labels, 9 spec.log.level, 10 spec.extra"},
		{cnp + all + "  ingress: [{}]\n  labels: [{value: x}]", "7 spec.labels[0]"},
		{cnp + "  nodeSelector: {}\n  ingress: [{}]", "5 spec.nodeSelector"},
		{ccnp + "  ingress: [{}]", "4 spec"},
		{ccnp + all + "  nodeSelector: {}\n  ingress: [{}]", "6 spec.nodeSelector"},
		{ccnp + "  nodeSelector: {matchLabels: {'reserved:host': '', 'node:a': b}}\n  ingress: [{}]",
			`5 spec.nodeSelector.matchLabels["reserved:host"], 5 spec.nodeSelector.matchLabels["node:a"]`},
		{ccnp + "  nodeSelector: {}\n  egress: [{toPorts: [{ports: [{port: '80', protocol: TCP}], rules: {http: [{}]}}]}]", "6 spec.egress[0].toPorts[0].rules.http"},
		{strings.Replace(ccnp, "name: p", "name: p, namespace: default", 1) + all + "  ingress: [{}]", "3 metadata.namespace"},
		{strings.Replace(cnp, "spec:\n", "specs: [{endpointSelector: {}}]", 1), "4 specs[0]"},
		{strings.Replace(cnp, "spec:\n", "specs: []", 1), "4 specs"},
		{strings.Replace(cnp, "spec:\n", "spec: null", 1), "1"},
		{strings.TrimSuffix(cnp, "spec:\n"), "1"},

		// Selectors.
		{cnp + "  endpointSelector: {matchLabels: {'k8s:io.kubernetes.pod.namespace': other}}\n  ingress: [{}]", `5 spec.endpointSelector.matchLabels["k8s:io.kubernetes.pod.namespace"]`},
		{cnp + "  ingress: [{}]\n  endpointSelector:\n    matchExpressions:\n    - {key: io.kubernetes.pod.namespace, operator: In, values: [other]}\n    - {key: 'k8s:io.kubernetes.pod.namespace', operator: NotIn, values: [default]}\n    - {key: io.kubernetes.pod.namespace, operator: DoesNotExist}\n    - {key: io.kubernetes.pod.namespace, operator: In, values: [other, default]}",
			"8 spec.endpointSelector.matchExpressions[0].key, 9 spec.endpointSelector.matchExpressions[1].key, 10 spec.endpointSelector.matchExpressions[2].key"},
		{in + "fromEndpoints:\n    - matchLabels: {'reserved:hosts': ''}\n    - matchLabels: {'container:a': b}\n    - matchLabels: {'io.cilium.k8s.policy.x': c1}\n    - matchLabels: {'any:io.cilium.k8s.namespace.labels.': x}\n    - matchExpressions: [{key: 'x:a', operator: Exists}, {key: io.kubernetes.pod.namespace, operator: In, values: [A]}]\n    - app: x\n    - matchLabels: {io.kubernetes.pod.uid: x}",
			`8 spec.ingress[0].fromEndpoints[0].matchLabels["reserved:hosts"], 9 spec.ingress[0].fromEndpoints[1].matchLabels["container:a"], 10 spec.ingress[0].fromEndpoints[2].matchLabels["io.cilium.k8s.policy.x"], 11 spec.ingress[0].fromEndpoints[3].matchLabels["any:io.cilium.k8s.namespace.labels."], 12 spec.ingress[0].fromEndpoints[4].matchExpressions[0].key, 12 spec.ingress[0].fromEndpoints[4].matchExpressions[1].key, 13 spec.ingress[0].fromEndpoints[5].app, 14 spec.ingress[0].fromEndpoints[6].matchLabels["io.kubernetes.pod.uid"]`},
		{in + "fromEndpoints:\n    - matchExpressions: [{key: k8s.io.kubernetes.pod.namespace, operator: In, values: [a]}]\n    - matchLabels: {k8s.io.cilium.k8s.namespace.labels.a: b}\n    - matchLabels: {k8s.io/x: b, io.cilium/app: operator}",
			`8 spec.ingress[0].fromEndpoints[0].matchExpressions[0].key, 9 spec.ingress[0].fromEndpoints[1].matchLabels["k8s.io.cilium.k8s.namespace.labels.a"]`},
		{ccnp + "  endpointSelector: {matchExpressions: [{key: io.kubernetes.pod.namespace, operator: DoesNotExist}]}\n  egress: [{toEndpoints: [{matchExpressions: [{key: 'k8s:io.kubernetes.pod.namespace', operator: DoesNotExist}]}]}]",
			"5 spec.endpointSelector.matchExpressions[0].key, 6 spec.egress[0].toEndpoints[0].matchExpressions[0].key"},
		{in + "fromEndpoints:\n    toPorts: [{ports: [{port: '80'}]}]", "7 spec.ingress[0].fromEndpoints"},

		// Peers.
		{in + "{from: [], toEndpoints: [], fromFQDNs: [], toServices: []}", "7 spec.ingress[0].from, 7 spec.ingress[0].toEndpoints, 7 spec.ingress[0].fromFQDNs, 7 spec.ingress[0].toServices"},
		{out + "{fromEndpoints: [], fromEntities: []}", "7 spec.egress[0].fromEndpoints, 7 spec.egress[0].fromEntities"},
		{in + "{fromEntities: [world, World, cluster-mesh, 1]}", "7 spec.ingress[0].fromEntities[1], 7 spec.ingress[0].fromEntities[2], 7 spec.ingress[0].fromEntities[3]"},
		{in + "{fromRequires: [{}]}", "7 spec.ingress[0].fromRequires"},
		{out + "{toRequires: [{}], toGroups: [{aws: {}}]}", "7 spec.egress[0].toRequires, 7 spec.egress[0].toGroups[0]"},
		{in + "{fromEndpoints: [{}], fromCIDR: [10.0.0.0/8], fromEntities: [all]}", "7 spec.ingress[0].fromCIDR, 7 spec.ingress[0].fromEntities"},
		{in + "{fromEndpoints: [], fromEntities: [all]}", "7 spec.ingress[0].fromEndpoints"},
		{out + "{toServices: [{k8sService: {serviceName: a}}], toFQDNs: [{matchName: a}]}", "7 spec.egress[0].toFQDNs"},
		{out + "{toCIDR: [10.0.0.0/33, '::ffff:10.0.0.0/104', a, 10.0.0.1, 10.1, 'fe80::1%eth0']}", "7 spec.egress[0].toCIDR[0], 7 spec.egress[0].toCIDR[1], 7 spec.egress[0].toCIDR[2], 7 spec.egress[0].toCIDR[4], 7 spec.egress[0].toCIDR[5]"},
		{out + "toCIDRSet:\n    - {}\n    - {cidr: 10.0.0.1}\n    - {cidr: 10.0.0.0/8, cidrGroupRef: g}\n    - {cidr: 10.0.0.0/8, except: [11.0.0.0/16, 10.0.0.0/7, '2001:db8::/32', x, 10.1.0.0/16]}\n    - {cidrGroupRef: G}\n    - {cidrGroupSelector: {matchLabels: {'a b': c}}}\n    - {cidrGroupRef: g, except: [x]}",
			"8 spec.egress[0].toCIDRSet[0], 9 spec.egress[0].toCIDRSet[1].cidr, 10 spec.egress[0].toCIDRSet[2], 11 spec.egress[0].toCIDRSet[3].except[0], 11 spec.egress[0].toCIDRSet[3].except[1], 11 spec.egress[0].toCIDRSet[3].except[2], 11 spec.egress[0].toCIDRSet[3].except[3], 12 spec.egress[0].toCIDRSet[4].cidrGroupRef, " +
				`13 spec.egress[0].toCIDRSet[5].cidrGroupSelector.matchLabels["a b"], 14 spec.egress[0].toCIDRSet[6].except[0]`},
		{out + "toNodes: [{matchLabels: {'k8s:a': b, 'reserved:host': ''}}]", `7 spec.egress[0].toNodes[0].matchLabels["k8s:a"], 7 spec.egress[0].toNodes[0].matchLabels["reserved:host"]`},
		{out + "toServices: [{}, {k8sService: {}}, {k8sService: {serviceName: a}, k8sServiceSelector: {selector: {}}}, {k8sServiceSelector: {}}]",
			"7 spec.egress[0].toServices[0], 7 spec.egress[0].toServices[1].k8sService, 7 spec.egress[0].toServices[2], 7 spec.egress[0].toServices[3].k8sServiceSelector"},
		{ccnp + all + "  egress: [{toServices: [{k8sService: {serviceName: a}}]}]", "6 spec.egress[0].toServices[0].k8sService"},
		{out + "toFQDNs: [{}, {matchName: a, matchPattern: b}, {matchName: '*.a'}, {matchPattern: 'a..b'}, {matchName: ''}, {matchName: a b}, {matchName: " + strings.Repeat("a", 256) + "}]",
			"7 spec.egress[0].toFQDNs[0], 7 spec.egress[0].toFQDNs[1], 7 spec.egress[0].toFQDNs[2].matchName, 7 spec.egress[0].toFQDNs[3].matchPattern, 7 spec.egress[0].toFQDNs[4].matchName, 7 spec.egress[0].toFQDNs[5].matchName, 7 spec.egress[0].toFQDNs[6].matchName"},

		// Ports.
		{in + "toPorts:\n    - {}\n    - ports: []\n    - ports: [{port: 80}]\n    - ports: [{port: a_b}]\n    - ports: [{port: '99999'}]\n    - ports: [{port: '080'}]\n    - ports: [{port: '80', endPort: 79}]\n    - ports: [{port: '80', protocol: tcp}]\n    - ports: [{port: '80', protocol: ICMP}]\n    - {ports: [{port: '80'}], listener: {}, terminatingTLS: {}, originatingTLS: {}}",
			"8 spec.ingress[0].toPorts[0], 9 spec.ingress[0].toPorts[1].ports, 10 spec.ingress[0].toPorts[2].ports[0].port, 11 spec.ingress[0].toPorts[3].ports[0].port, 12 spec.ingress[0].toPorts[4].ports[0].port, 13 spec.ingress[0].toPorts[5].ports[0].port, 14 spec.ingress[0].toPorts[6].ports[0].endPort, 15 spec.ingress[0].toPorts[7].ports[0].protocol, 16 spec.ingress[0].toPorts[8].ports[0].protocol, " +
				"17 spec.ingress[0].toPorts[9].listener, 17 spec.ingress[0].toPorts[9].terminatingTLS, 17 spec.ingress[0].toPorts[9].originatingTLS"},
		{out + "toPorts:\n    - ports: [{port: http, endPort: 90}]\n    - ports: [{port: '80', endPort: '90'}]\n    - ports: [{port: '80', endPort: 65536}]\n    - ports: [{port: '80', endPort: 90, protocol: SCTP, name: x}]\n    - ports: [{port: '0', endPort: 90}]\n    - ports: [{endPort: 90}]",
			"8 spec.egress[0].toPorts[0].ports[0].endPort, 9 spec.egress[0].toPorts[1].ports[0].endPort, 10 spec.egress[0].toPorts[2].ports[0].endPort, 11 spec.egress[0].toPorts[3].ports[0].name, 12 spec.egress[0].toPorts[4].ports[0].endPort, 13 spec.egress[0].toPorts[5].ports[0].endPort"},
		{out + "toPorts: [{ports: [{port: '80', protocol: GRE}, {protocol: VRRP, endPort: 5}, {port: http, protocol: ESP}]}]",
			"7 spec.egress[0].toPorts[0].ports[0].port, 7 spec.egress[0].toPorts[0].ports[1].endPort, 7 spec.egress[0].toPorts[0].ports[2].port"},
		{out + "toPorts: [{ports: [" + strings.Repeat("{port: '80'},", 41) + "]}]", "7 spec.egress[0].toPorts[0].ports"},
		{out + "{toPorts: [{ports: [{port: '80'}]}], icmps: [{fields: [{type: 8}]}]}", "7 spec.egress[0].icmps"},
		{out + "icmps: [{}, {fields: []}, {fields: [{}, {type: 256}, {type: Echo, family: IPv6}, {type: 8, family: IPV4}, {type: '08'}, {type: echo}, {type: PacketTooBig}, {type: '256'}, {type: '-1'}]}, {fields: [" + strings.Repeat("{type: 8},", 41) + "]}]",
			"7 spec.egress[0].icmps[0], 7 spec.egress[0].icmps[1].fields, 7 spec.egress[0].icmps[2].fields[0], 7 spec.egress[0].icmps[2].fields[1].type, 7 spec.egress[0].icmps[2].fields[2].type, 7 spec.egress[0].icmps[2].fields[3].family, 7 spec.egress[0].icmps[2].fields[4].type, 7 spec.egress[0].icmps[2].fields[5].type, 7 spec.egress[0].icmps[2].fields[6].type, 7 spec.egress[0].icmps[2].fields[7].type, 7 spec.egress[0].icmps[2].fields[8].type, 7 spec.egress[0].icmps[3].fields"},
		{in + "authentication: {}\n  - authentication: {mode: always}\n  - authentication: required", "7 spec.ingress[0].authentication, 8 spec.ingress[1].authentication.mode, 9 spec.ingress[2].authentication"},

		// Rules that deny.
		{deny + "{authentication: {mode: required}, toFQDNs: [{matchName: a}]}", "7 spec.egressDeny[0].authentication, 7 spec.egressDeny[0].toFQDNs"},
		{deny + "toPorts: [{ports: [{port: '80'}], rules: {}, serverNames: [a], listener: {}, terminatingTLS: {}, originatingTLS: {}}]",
			"7 spec.egressDeny[0].toPorts[0].rules, 7 spec.egressDeny[0].toPorts[0].serverNames, 7 spec.egressDeny[0].toPorts[0].listener, 7 spec.egressDeny[0].toPorts[0].terminatingTLS, 7 spec.egressDeny[0].toPorts[0].originatingTLS"},

		// Rules inside a protocol.
		{in + "toPorts: [{ports: [{port: '80'}, {port: '0', protocol: TCP}], rules: {http: [{method: '(', path: 'a{2,1}', host: '[', headers: ['', ': x', 'a:b:c d'], headerMatches: [{}, {name: 'a b', mismatch: DROP, secret: {}}], x: 1}]}}]",
			"7 spec.ingress[0].toPorts[0].rules.http[0].x, 7 spec.ingress[0].toPorts[0].rules.http[0].method, 7 spec.ingress[0].toPorts[0].rules.http[0].path, 7 spec.ingress[0].toPorts[0].rules.http[0].host, 7 spec.ingress[0].toPorts[0].rules.http[0].headers[0], 7 spec.ingress[0].toPorts[0].rules.http[0].headers[1], 7 spec.ingress[0].toPorts[0].rules.http[0].headers[2], 7 spec.ingress[0].toPorts[0].rules.http[0].headerMatches[0], 7 spec.ingress[0].toPorts[0].rules.http[0].headerMatches[1].name, 7 spec.ingress[0].toPorts[0].rules.http[0].headerMatches[1].mismatch, 7 spec.ingress[0].toPorts[0].rules.http[0].headerMatches[1].secret, 7 spec.ingress[0].toPorts[0].ports[0], 7 spec.ingress[0].toPorts[0].ports[1]"},
		{in + "toPorts: [{ports: [{port: '80', protocol: TCP}], rules: {http: [{headers: ['Name:'], headerMatches: [{name: B, secret: {name: s, namespace: ns}}, {name: C, value: ' x'}]}, {headerMatches: [{name: Host, value: x, mismatch: REPLACE}]}]}}]",
			"7 spec.ingress[0].toPorts[0].rules.http[0].headers[0], 7 spec.ingress[0].toPorts[0].rules.http[0].headerMatches[0].secret, 7 spec.ingress[0].toPorts[0].rules.http[0].headerMatches[1].value"},
		{in + "toPorts: [{ports: [{port: '80', protocol: TCP}], rules: {http: [{headerMatches: [{name: Host, value: x, mismatch: REPLACE}]}]}}]", "7 spec.ingress[0].toPorts[0].rules"},
		{in + "toPorts: [{ports: [{port: '53'}], rules: {dns: [{matchPattern: '*'}]}}]", "7 spec.ingress[0].toPorts[0].rules.dns"},
		{out + "toPorts: [{ports: [{port: '53', endPort: 54}, {port: '0'}, {protocol: GRE}], rules: {dns: [{matchPattern: '?'}, {}]}}]",
			"7 spec.egress[0].toPorts[0].rules.dns[0].matchPattern, 7 spec.egress[0].toPorts[0].rules.dns[1], 7 spec.egress[0].toPorts[0].ports[0], 7 spec.egress[0].toPorts[0].ports[2], 7 spec.egress[0].toPorts[0].ports[1]"},
		{out + "toPorts: [{ports: [{port: '53', protocol: TCP}], rules: {dns: [{matchPattern: '*'}], http: [{}]}}]", "7 spec.egress[0].toPorts[0].rules"},
		// An empty list is no rule to Cilium.
		{in + "toPorts: [{ports: [{port: '80', protocol: TCP}], rules: {http: []}}]", "7 spec.ingress[0].toPorts[0].rules.http"},
		{out + "toPorts: [{ports: [{port: '53'}], rules: {dns: []}}]", "7 spec.egress[0].toPorts[0].rules.dns"},
		{out + "toPorts: [{ports: [{port: '53', protocol: TCP}], rules: {dns: [{}]}}]", "7 spec.egress[0].toPorts[0].rules.dns[0]"},
		{out + "toPorts: [{ports: [{port: '53'}], rules: {kafka: [], l7proto: x, l7: []}}]", "7 spec.egress[0].toPorts[0].rules.kafka, 7 spec.egress[0].toPorts[0].rules.l7proto, 7 spec.egress[0].toPorts[0].rules.l7"},
		{out + "toPorts: [{ports: [{port: '443'}], serverNames: ['', a/b, x, x]}]\n  - toPorts: [{ports: [{port: '443', protocol: TCP}], serverNames: [a], rules: {http: [{}]}}]\n  - toPorts: [{ports: [{port: '443', protocol: TCP}], serverNames: []}]",
			"7 spec.egress[0].toPorts[0].serverNames[0], 7 spec.egress[0].toPorts[0].serverNames[1], 7 spec.egress[0].toPorts[0].serverNames[3], 7 spec.egress[0].toPorts[0].ports[0], 8 spec.egress[1].toPorts[0].serverNames, 9 spec.egress[2].toPorts[0].serverNames"},

		{in + "toPorts: [{ports: [{port: '80', protocol: TCP}], rules: {http: [{path: " + strings.Repeat("a", 60000) + "}, {path: " + strings.Repeat("b", 6000) + "}, {path: '('}]}}]", "7 spec.ingress[0].toPorts[0].rules.http[1].path"},

		// Groups.
		{ccg + "  {}", "4 spec"},
		{ccg + "  externalCIDRs: [10.0.0.0/33, 10.0.0.1]\n  x: 1", "6 spec.x, 5 spec.externalCIDRs[0], 5 spec.externalCIDRs[1]"},
		{strings.Replace(ccg, "{a: b}", "{a: 'b c'}, namespace: x", 1) + "  externalCIDRs: []", "3 metadata.labels.a, 3 metadata.namespace"},
		{strings.TrimSuffix(ccg, "spec:\n"), "1"},
		{ccg + "  externalCIDRs: []\n---\n" + ccg + "  externalCIDRs: []", "7"},
	} {
		_, err := parse(c.doc)
		var problems authz.Problems
		if err != nil && !errors.As(err, &problems) {
			t.Fatal(err)
		}
		if got := places(t, problems); sorted(got) != sorted(c.want) {
			t.Errorf("%s\n got %s\nwant %s\n%v", c.doc, got, c.want, err)
		}
	}
}

// sorted makes the order of places not count.
func sorted(places string) string {
	list := strings.Split(places, ", ")
	slices.Sort(list)
	return strings.Join(list, "\n")
}

// What is judged, but refused by who enforces.
func TestNotEnforced(t *testing.T) {
	for _, c := range []struct{ doc, want string }{
		{ccnp + "  nodeSelector: {matchLabels: {a: b}}\n  ingress: [{}]", "5 spec.nodeSelector"},
		{ccnp + "  endpointSelector: {matchLabels: {'reserved:init': ''}}\n  ingress: [{fromEntities: [all]}]", "5 spec.endpointSelector"},
		{out + "toServices: [{k8sService: {serviceName: a}}, {k8sServiceSelector: {namespace: x, selector: {matchLabels: {a: b}}}}]", ""},
		{out + "{toServices: [{k8sService: {serviceName: a}}], toPorts: [{ports: [{port: '80'}]}]}", ""},
		{deny + "toServices: [{k8sService: {serviceName: a}}]", "7 spec.egressDeny[0].toServices"},
		{out + "toFQDNs: [{matchName: Example.COM.}, {matchPattern: '**.example.com'}, {matchPattern: '*'}]", "7 spec.egress[0].toFQDNs"},
		{in + "toPorts: [{ports: [{port: '80', protocol: TCP}], rules: {http: [{}]}}]", "7 spec.ingress[0].toPorts[0].rules.http"},
		{in + "toPorts: [{ports: [{port: '80', endPort: 90, protocol: TCP}], rules: {http: [{method: GET, path: '/a.*', host: '.*[.]x', headers: ['X-Y: 42', Z], headerMatches: [{name: A, value: b, mismatch: LOG}, {name: B}]}]}}]", "7 spec.ingress[0].toPorts[0].rules.http"},
		{out + "toPorts: [{ports: [{port: '53', protocol: ANY}], rules: {dns: [{matchPattern: '*'}]}}]", "7 spec.egress[0].toPorts[0].rules.dns"},
		{out + "toPorts: [{ports: [{port: '443', protocol: TCP}], serverNames: [a.example, '*.b.example']}]", "7 spec.egress[0].toPorts[0].serverNames"},
		{in + "authentication: {mode: test-always-fail}", "7 spec.ingress[0].authentication.mode"},
		{deny + "toEntities: [init, ingress, health, kube-apiserver]", "7 spec.egressDeny[0].toEntities[0], 7 spec.egressDeny[0].toEntities[1], 7 spec.egressDeny[0].toEntities[2], 7 spec.egressDeny[0].toEntities[3]"},
		{deny + "toEndpoints: [{matchLabels: {'reserved:health': ''}}]", "7 spec.egressDeny[0].toEndpoints[0]"},
		{deny + "toEntities: [cluster]", "7 spec.egressDeny[0].toEntities[0]"},
		{deny + "toNodes: [{}]", "7 spec.egressDeny[0].toNodes[0]"},
		// Enforced.
		{deny + "toEntities: [all, world, world-ipv4, world-ipv6, host, remote-node, unmanaged, none]", ""},
		{deny + "toEndpoints: [{matchExpressions: [{key: io.kubernetes.pod.namespace, operator: NotIn, values: [a]}]}]", ""},
		{out + "{toPorts: [{ports: [{port: '80'}]}], icmps: []}", ""},
		{out + "toEntities: [init, ingress, unmanaged, health, kube-apiserver]", ""},
		{in + "{fromNodes: [{matchLabels: {'node:a': b, c: d}}], authentication: {mode: required}}", ""},
		{in + "{authentication: {mode: disabled}, toPorts: [{ports: [{port: '80'}], rules: {}}]}", ""},
		{in + "{fromRequires: [], fromGroups: []}", ""},
		{strings.Replace(in, "metadata", "description: x\nmetadata", 1) + "{}", ""},
		{out + "toPorts: [{ports: [{protocol: VRRP}, {port: '0', protocol: IGMP}, {protocol: TCP}]}]", ""},
		{out + "icmps: [{fields: [{type: 8}, {type: '128', family: IPv6}, {type: EchoRequest, family: IPv6}]}]", ""},
		{deny + "toCIDRSet: [{cidrGroupRef: g, except: [10.0.0.0/8]}, {cidrGroupSelector: {}}]", ""},
		{cnp + all + "  ingress: [{}]\n  egress: null\n  description: x\n  labels: [{key: a, value: b, source: k8s}]\n  log: {value: here}\n  enableDefaultDeny: {ingress: false, egress: true}", ""},
	} {
		r, err := parse(c.doc)
		if err != nil {
			t.Errorf("%s\n%v", c.doc, err)
			continue
		}
		if got := places(t, slices.Concat(r.Policies[0].NeedsProxy, r.Policies[0].NotEnforced)); got != c.want {
			t.Errorf("%s\n got %s\nwant %s", c.doc, got, c.want)
		}
		if err := r.Policies[0].Validate(); err != nil {
			t.Errorf("%s\n%v", c.doc, err)
		}
		if (r.Policies[0].Enforceable() == nil) != (len(r.Policies[0].NotEnforced) == 0) {
			t.Errorf("%s\n%v", c.doc, r.Policies[0].Enforceable())
		}
	}
}

// The words, of some.
func TestMessages(t *testing.T) {
	doc := out + `{toEndpoints: [{}], toCIDR: [10.0.0.0]}
  - toGroups: [{}]
    toPorts: [{ports: [{port: '80', protocol: ICMP}], rules: {kafka: []}}]
  - icmps: [{fields: [{type: Echo, family: IPv6}]}]
  egresDeny: []
`
	want := []string{
		`f:7: document 1: spec.egress[0].toCIDR: it cannot be combined with toEndpoints in one rule: write a rule for each`,
		`f:8: document 1: spec.egress[1].toGroups[0]: not supported: groups of other providers are not asked; write their blocks into toCIDRSet`,
		`f:9: document 1: spec.egress[1].toPorts[0].ports[0].protocol: not supported: write a rule with icmps`,
		`f:9: document 1: spec.egress[1].toPorts[0].rules.kafka: not supported: Cilium has dropped it; remove it, to allow the whole port`,
		`f:10: document 1: spec.egress[2].icmps[0].fields[0].type: there is no such type in this family: give the field another family, or the type as a number`,
		`f:11: document 1: spec.egresDeny: unknown field: check its name and place, or remove it`,
	}
	_, err := parse(doc)
	if err == nil {
		t.Fatal("accepted")
	}
	if d := cmp.Diff(want, strings.Split(err.Error(), "\n")); d != "" {
		t.Error(d)
	}
}
