package dialect_test

import (
	"errors"
	"fmt"
	"strings"
	"testing"

	"portcullis/authz"
	"portcullis/authz/dialect"
)

const knp = "apiVersion: networking.k8s.io/v1\nkind: NetworkPolicy\nmetadata: {name: p}\nspec:\n"
const cnp = "apiVersion: cilium.io/v2\nkind: CiliumNetworkPolicy\nmetadata: {name: p}\nspec:\n"

// paths returns "line path" of each problem of a document.
func paths(t *testing.T, doc string) string {
	t.Helper()
	ps, err := parse("f", doc)
	if err == nil {
		return "accepted"
	}
	var problems authz.Problems
	if !errors.As(err, &problems) || ps != nil {
		t.Fatalf("%v with %d policies", err, len(ps))
	}
	var out []string
	for _, p := range problems {
		if p.Message == "" || p.File != "f" || p.Document == 0 {
			t.Errorf("%+v says too little", p)
		}
		out = append(out, strings.TrimSpace(fmt.Sprintf("%d %s", p.Line, p.Path)))
	}
	return strings.Join(out, ", ")
}

// Each feature that is not obeyed is refused where it stands.
func TestRefusedFields(t *testing.T) {
	for _, c := range []struct{ doc, want string }{
		// NetworkPolicy
		{knp + "  podSelector: {}\n  policyTypes: [ingress]", "6 spec.policyTypes[0]"},
		{knp + "  podSelector: {}\n  policyTypes: Ingress", "6 spec.policyTypes"},
		{knp + "  podSelector: {}\n  egress: [{from: []}, {to: [{}]}, {to: [{ipBlock: {cidr: 10.0.0.1/8}}]}]\n  ingress: [{to: []}]",
			"6 spec.egress[0].from, 6 spec.egress[1].to[0], 6 spec.egress[2].to[0].ipBlock.cidr, 7 spec.ingress[0].to"},
		{knp + "  podSelector: {}\n  policyTypes: [Ingress]\n  egress: [{to: [{ipBlock: {cidr: 10.0.0.1/8}}]}]", "7 spec.egress[0].to[0].ipBlock.cidr"},
		{knp + "  podSelector:\n    matchExpressions:\n    - {key: a, operator: In, values: []}\n    - {key: a, operator: In}\n    - {key: a, operator: NotIn}\n    - {key: a, operator: Exists, values: [x]}\n    - {key: a, operator: DoesNotExist, values: [x]}\n    - {key: a, operator: in, values: [x]}\n    - {operator: Exists}\n    - {key: a}\n    - {key: 'b b', operator: Exists}\n    - {key: a, operator: In, values: [1, 'x y']}\n    - {key: a, operator: Exists, more: 1}\n    - a",
			"7 spec.podSelector.matchExpressions[0].values, 8 spec.podSelector.matchExpressions[1], 9 spec.podSelector.matchExpressions[2], 10 spec.podSelector.matchExpressions[3].values, 11 spec.podSelector.matchExpressions[4].values, 12 spec.podSelector.matchExpressions[5].operator, 13 spec.podSelector.matchExpressions[6], 14 spec.podSelector.matchExpressions[7], " +
				"15 spec.podSelector.matchExpressions[8].key, 16 spec.podSelector.matchExpressions[9].values[0], 16 spec.podSelector.matchExpressions[9].values[1], 17 spec.podSelector.matchExpressions[10].more, 18 spec.podSelector.matchExpressions[11]"},
		{knp + "  podSelector: {matchExpressions: }", "5 spec.podSelector.matchExpressions"},
		{knp + "  podSelector: {matchLabel: {a: b}}", "5 spec.podSelector.matchLabel"},
		{knp + "  podSelector: {matchLabels: {a: 1, b: true, c: null, d: [x], e: yes}}",
			"5 spec.podSelector.matchLabels.a, 5 spec.podSelector.matchLabels.b, 5 spec.podSelector.matchLabels.c, 5 spec.podSelector.matchLabels.d, 5 spec.podSelector.matchLabels.e"},
		{knp + "  podSelector: {matchLabels: {a: 'x y', 'b b': c, k8s:app: d}}",
			`5 spec.podSelector.matchLabels.a, 5 spec.podSelector.matchLabels["b b"], 5 spec.podSelector.matchLabels["k8s:app"]`},
		{knp + "  podSelector: {}\n  ingress:\n  - from:\n    - ipBlock: {cidr: 10.0.0.0/8, prefix: 8}\n      podSelector: {}\n    - ipBlock: {}\n    - ipBlock: 10.0.0.0/8\n    - ipBlock:", "8 spec.ingress[0].from[0].ipBlock.prefix, 8 spec.ingress[0].from[0].ipBlock, 10 spec.ingress[0].from[1].ipBlock, 11 spec.ingress[0].from[2].ipBlock, 12 spec.ingress[0].from[3].ipBlock"},
		{knp + "  podSelector: {}\n  ingress:\n  - from:\n    - ipBlock:\n        cidr: 10.0.0.0/8\n        except:\n        - 10.0.0.0/8\n        - 11.0.0.0/16\n        - 0.0.0.0/0\n        - 2001:db8::/64\n        - 10.1.0.0\n        - 1",
			"11 spec.ingress[0].from[0].ipBlock.except[0], 12 spec.ingress[0].from[0].ipBlock.except[1], 13 spec.ingress[0].from[0].ipBlock.except[2], 14 spec.ingress[0].from[0].ipBlock.except[3], 15 spec.ingress[0].from[0].ipBlock.except[4], 16 spec.ingress[0].from[0].ipBlock.except[5]"},
		{knp + "  podSelector: {}\n  ingress:\n  - from:\n    - {}", "8 spec.ingress[0].from[0]"},
		{knp + "  podSelector: {}\n  ingress:\n  - from:", "7 spec.ingress[0].from"},
		{knp + "  podSelector: {}\n  ingress:\n  - from: {podSelector: {}}", "7 spec.ingress[0].from"},
		{knp + "  podSelector: {}\n  ingress: [{from: [{podSelector: }]}]", "6 spec.ingress[0].from[0].podSelector"},
		{knp + "  podSelector: {}\n  ingress:\n  - ports:\n    - {port: Http}\n    - {port: '80'}\n    - {port: 80, endPort: 79}\n    - {protocol: ICMP}\n    - {protocol: tcp}\n    - {port: 0}\n    - {port: 65536}\n    - {port: 0x50}\n    - {port: 080}\n    - {port: 80.0}\n    - {port: -1}",
			"8 spec.ingress[0].ports[0].port, 9 spec.ingress[0].ports[1].port, 10 spec.ingress[0].ports[2].endPort, 11 spec.ingress[0].ports[3].protocol, 12 spec.ingress[0].ports[4].protocol, 13 spec.ingress[0].ports[5].port, 14 spec.ingress[0].ports[6].port, 15 spec.ingress[0].ports[7].port, 16 spec.ingress[0].ports[8].port, 17 spec.ingress[0].ports[9].port, 18 spec.ingress[0].ports[10].port"},
		{knp + "  podSelector: {}\n  egress:\n  - ports:\n    - {endPort: 90}\n    - {port: http, endPort: 90}\n    - {port: 80, endPort: 0}\n    - {port: 80, endPort: 65536}\n    - {port: 80, endPort: '90'}\n    - {port: a--b}\n    - {port: sixteen-letters-}\n    - {port: sixteen-letters1}\n    - {port: ''}",
			"8 spec.egress[0].ports[0].endPort, 9 spec.egress[0].ports[1].endPort, 10 spec.egress[0].ports[2].endPort, 11 spec.egress[0].ports[3].endPort, 12 spec.egress[0].ports[4].endPort, 13 spec.egress[0].ports[5].port, 14 spec.egress[0].ports[6].port, 15 spec.egress[0].ports[7].port, 16 spec.egress[0].ports[8].port"},
		{knp + "  podSelector: {}\n  ingres: []", "6 spec.ingres"},
		{knp + "  endpointSelector: {}", "5 spec.endpointSelector"},
		{strings.TrimSuffix(knp, "spec:\n"), "1"},
		{knp, "4 spec"},
		{knp + "  - a", "4 spec"},
		{"kind: NetworkPolicy\napiVersion: networking.k8s.io/v1\nspec: {podSelector: {}}", "1"},
		{"kind: NetworkPolicy\napiVersion: networking.k8s.io/v1\nmetadata: {}\nspec: {podSelector: {}}", "3 metadata"},
		{"kind: NetworkPolicy\napiVersion: networking.k8s.io/v1\nmetadata: {name: A_b, namespace: a.b, uid: 1, foo: x}\nspec: {podSelector: {}}",
			"3 metadata.name, 3 metadata.namespace, 3 metadata.uid, 3 metadata.foo"},
		{"kind: NetworkPolicy\napiVersion: networking.k8s.io/v1\nmetadata: {name: a}\nspec: {}\nextra: 1", "5 extra"},

		// Documents
		{"apiVersion: v1\nkind: List", "1"},
		{"apiVersion: v1\nkind: List\nitems: {}", "3 items"},
		{"apiVersion: v2\nkind: List\nitems: []", "2 kind"},
		{"apiVersion: v1\nkind: List\nitems: [a]\nmore: 1\nmetadata: {continue: abc}", "3 items[0], 4 more, 5 metadata.continue"},
		{"apiVersion: v1\nkind: List\nitems:\n- {kind: List, apiVersion: v1, items: [{kind: X}]}\n- {apiVersion: networking.k8s.io/v1, kind: NetworkPolicy, metadata: {name: a}, spec: {podSelectors: {}}}",
			"4 items[0].items[0], 5 items[1].spec.podSelectors"},
		{"apiVersion: networking.k8s.io/v1\nkind: NetworkPolicyList\nitems:\n- {kind: CiliumNetworkPolicy, apiVersion: cilium.io/v2, metadata: {name: a}, spec: {podSelector: {}}}\n- {kind: NetworkPolicy, metadata: {name: 1}, spec: {podSelector: {}}}",
			"4 items[0].kind, 4 items[0].apiVersion, 5 items[1].metadata.name"},
		{"apiVersion: v1\nkind: List\nitems:\n- &a {apiVersion: networking.k8s.io/v1, kind: NetworkPolicy, metadata: {name: a}, spec: {podSelector: {}}}\n- *a", "4 items[1]"},
		{"apiVersion: networking.k8s.io/v1beta1\nkind: NetworkPolicy", "1 apiVersion"},
		{"kind: NetworkPolicy", "1"},
		{"hello", "1"},
		{"[]", "1"},
		{"a: [", "1"},
		{"# nothing\n---\n\tx: y", "3"},
		{knp + "  podSelector: {}\n---\n" + cnp + "  foo: bar\n---\nkind: X\napiVersion: v9\n", "11 spec.foo, 10 spec, 10 spec, 13 kind"},
		{knp + "  podSelector: {}\n---\n" + knp + "  podSelector: {}", "7"},
		{knp + "  podSelector: {}\n  podSelector: {matchLabels: {a: b}}", "6 spec.podSelector"},
		{knp + "  podSelector: &a {matchLabels: {x: y}}\n  ingress: [{from: [{podSelector: {<<: *a}}]}]", `6 spec.ingress[0].from[0].podSelector["<<"]`},
		{knp + "  podSelector: {matchLabels: {a: !!str 1, b: !x y}}", "5 spec.podSelector.matchLabels.a, 5 spec.podSelector.matchLabels.b"},
		{knp + "  podSelector: {matchLabels: {1: a, on: b, ~: c, [x]: d}}", `5 spec.podSelector.matchLabels.1, 5 spec.podSelector.matchLabels.on, 5 spec.podSelector.matchLabels["~"], 5 spec.podSelector.matchLabels[""]`},
		{"%YAML 1.1\n---\n" + knp + "  podSelector: {}", "1"},
		{"# a\n\n%TAG ! x\n---\n" + knp + "  podSelector: {}", "1"},
		// A line break that only YAML knows hides no document.
		{"a: b\u2028---\u2028c: d", "1"},
		{"a: b\u0085...\u0085c: d", "1"},
	} {
		if got := paths(t, c.doc); got != c.want {
			t.Errorf("%s\n got %s\nwant %s", c.doc, got, c.want)
		}
	}
}

// What YAML does not let through is refused in the line that it names.
func TestNotYAML(t *testing.T) {
	for doc, want := range map[string]string{
		"%YAML 1.1\n---\n" + knp + "  podSelector: {}":              "f:1: document 1: YAML directives, such as %YAML and %TAG, are not supported: remove the line",
		knp + "  podSelector: {}\n---\na: b\nc: d\ne: @\n":          "f:9: document 2: not YAML or JSON: found character that cannot start any token",
		knp + "  podSelector: {}\n  ingress:\n  - a: %\n  - b: c\n": "f:7: document 1: not YAML or JSON: found character that cannot start any token",
	} {
		if _, err := parse("f", doc); err == nil || err.Error() != want {
			t.Errorf("%s\n got %v\nwant %s", doc, err, want)
		}
	}
}

// Noise that kubectl adds, JSON, anchors, and odd but clear files are taken.
func TestAccepted(t *testing.T) {
	for name, c := range map[string]struct {
		doc  string
		want int
	}{
		"kubectl": {`apiVersion: networking.k8s.io/v1
kind: NetworkPolicy
metadata:
  annotations: {kubectl.kubernetes.io/last-applied-configuration: "{}"}
  creationTimestamp: "2026-11-01T00:00:00Z"
  finalizers: []
  generation: 1
  labels: {a: b}
  generateName: p-
  deletionTimestamp: "2026-01-01T00:00:00Z"
  deletionGracePeriodSeconds: 0
  managedFields: [{apiVersion: v1, fieldsType: FieldsV1, fieldsV1: {"f:spec": {".": {}}}}]
  name: p
  namespace: default
  ownerReferences: []
  resourceVersion: "1"
  selfLink: x
  uid: 0a0b0c0d-0000-4000-8000-000000000000
spec: {podSelector: {}, policyTypes: [Ingress], egress: [], ingress: [{from: [], ports: []}]}
status: {}
`, 1},
		"json":           {"{\n\t\"apiVersion\": \"networking.k8s.io/v1\",\n\t\"kind\": \"NetworkPolicy\",\n\t\"metadata\": {\"name\": \"p\", \"creationTimestamp\": null},\n\t\"spec\": {\"podSelector\": {\"matchLabels\": {\"a\": \"\\u0062\"}}}\n}", 1},
		"empty ones":     {"---\n---\n# x\n---\n" + knp + "  podSelector: {}\n---\n~\n...\n---\n", 1},
		"marker in text": {cnp + "  endpointSelector: {}\n  ingress: [{}]\n  description: |\n    a\n     ---\n    ---\n    b\n", 1},
		"crlf":           {strings.ReplaceAll(knp+"  podSelector: {}\n---\n"+cnp+"  endpointSelector: {}\n  egress: [{}]\n", "\n", "\r\n"), 2},
		"bom":            {"\ufeff" + knp + "  podSelector: {}", 1},
		"inline":         {"--- {apiVersion: cilium.io/v2, kind: CiliumNetworkPolicy, metadata: {name: a}, spec: {endpointSelector: {}, ingress: [{}]}}\n--- {apiVersion: cilium.io/v2, kind: CiliumNetworkPolicy, metadata: {name: b}, spec: {endpointSelector: {}, ingress: [{}]}}", 2},
		"alias":          {knp + "  podSelector: &s {matchLabels: {a: b}}\n  ingress: [{from: [{podSelector: *s}]}]", 1},
	} {
		ps, err := parse("f", c.doc)
		if err != nil || len(ps) != c.want {
			t.Errorf("%s: %d policies, %v", name, len(ps), err)
		}
	}
	ps, err := parse("f", "# head\n"+knp+"  podSelector: {} # why\n---\n# second\n"+cnp+"  endpointSelector: {}\n  ingress: [{}]\n")
	if err != nil || ps[0].Source != "# head\n"+knp+"  podSelector: {} # why\n" || ps[1].Source != "# second\n"+cnp+"  endpointSelector: {}\n  ingress: [{}]\n" {
		t.Errorf("the source is not verbatim: %v, %q", err, ps)
	}
}

// Hostile input costs little and is refused.
func TestHostile(t *testing.T) {
	laughs := "a: &a0 [x,x,x,x,x,x,x,x,x,x]\n"
	for i := range 20 {
		laughs += fmt.Sprintf("a%d: &a%d [*a%d,*a%d,*a%d,*a%d,*a%d,*a%d,*a%d,*a%d]\n", i, i+1, i, i, i, i, i, i, i, i)
	}
	for name, doc := range map[string]string{
		"size":      strings.Repeat("#", dialect.MaxFile+1),
		"utf-8":     "a: \xff",
		"laughs":    laughs,
		"cycle":     "a: &a [*a]",
		"depth":     strings.Repeat("[", 100000),
		"depth ok":  strings.Repeat("[", 200) + strings.Repeat("]", 200),
		"nodes":     "[" + strings.Repeat("a,", 400000) + "]",
		"dashes":    strings.Repeat("- ", 500000),
		"long keys": strings.Repeat("{"+strings.Repeat("k", 1000)+": ", 60) + "[" + strings.Repeat("!x a,", 90000),
		"documents": strings.Repeat("---\na\n", 100000),
		"problems":  knp + "  podSelector: {matchLabels: {" + strings.Repeat("a: b, ", 70000) + "}}",
		"mappings":  strings.Repeat("? ", 400000),
		"anchors":   "[" + strings.Repeat("&a a,", 100000) + "]",
		"empty":     "",
		"comment":   "# nothing\n---\n",
	} {
		ps, err := parse("f", doc)
		var problems authz.Problems
		if !errors.As(err, &problems) || ps != nil {
			t.Errorf("%s: %d policies, %v", name, len(ps), err)
		} else if len(problems) > 1002 {
			t.Errorf("%s: %d problems", name, len(problems))
		}
	}
}
