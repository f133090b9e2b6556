package dialect_test

import (
	"encoding/json"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"portcullis/authz"
	"portcullis/authz/dialect"
	"portcullis/authz/dialect/cilium"
	"portcullis/authz/dialect/k8s"
	"portcullis/authz/dialect/tree"
)

func seed(f *testing.F, more ...string) {
	files, err := filepath.Glob("testdata/*.yaml")
	if err != nil || len(files) == 0 {
		f.Fatal("no testdata", err)
	}
	for _, name := range files {
		b, err := os.ReadFile(name)
		if err != nil {
			f.Fatal(err)
		}
		f.Add(string(b))
	}
	for _, s := range more {
		f.Add(s)
	}
}

// checkParsed: what comes out is all or nothing, means what it can be compiled
// to, carries its source, and is the same when its source is read again.
func checkParsed(t *testing.T, data string, dialects ...dialect.Dialect) {
	parsed, err := dialect.ParseFile("f", []byte(data), dialects...)
	if err != nil {
		var problems authz.Problems
		if !errors.As(err, &problems) || len(problems) == 0 || len(parsed.Refs()) > 0 {
			t.Fatalf("%d objects with %v", len(parsed.Refs()), err)
		}
		return
	}
	for _, g := range parsed.Groups {
		for _, b := range g.Blocks {
			if b != b.Masked() || b.Addr().Is4In6() {
				t.Fatalf("%s: block %s", g.Ref, b)
			}
		}
	}
	for _, p := range parsed.Policies {
		if err := p.Validate(); err != nil {
			t.Fatal(err)
		}
		if !strings.Contains(data, p.Source) && !strings.Contains(data, "List") {
			t.Fatalf("source %q is not in the file", p.Source)
		}
		for _, s := range p.Specs {
			if p.Namespace != "" && (s.Nodes || len(s.Subject) == 0 || s.Subject[0].Attribute != authz.Namespace) {
				t.Fatalf("%s: the subject is not bound to a namespace: %v", p.Ref, s.Subject)
			}
			for _, r := range s.Rules {
				if r.L7 != nil && len(p.NeedsProxy) == 0 {
					t.Fatalf("%s: there is no datapath for %+v", p.Ref, r)
				}
			}
		}
		again, err := dialect.ParseFile("f", []byte(p.Source), dialects...)
		if err != nil || len(again.Policies) != 1 || again.Policies[0].Ref != p.Ref || len(again.Policies[0].Specs) != len(p.Specs) {
			t.Fatalf("source %q: %v, %v", p.Source, again, err)
		}
	}
}

// FuzzParseFile feeds any bytes to the whole way from file to policies.
func FuzzParseFile(f *testing.F) {
	seed(f, "---\n...\n", "a: &a [*a]", "{\"kind\": \"List\"}", "{apiVersion: v1, kind: List, items: [{apiVersion: networking.k8s.io/v1, kind: NetworkPolicy, metadata: {name: a}, spec: {podSelector: {}}}]}", "{apiVersion: cilium.io/v2, kind: CiliumNetworkPolicyList, items: [{metadata: {name: a}, spec: {endpointSelector: {}, ingress: [{}]}}]}", "\ufeff%YAML 1.1\n---\n", "? [a]\n: b", "a: !!binary x", `{"name": "root", "rules": [{"coverage": ["a"], "allow": ["b", "!c"]}]}`, "a\u2028---\u2028b")
	f.Fuzz(func(t *testing.T, data string) {
		checkParsed(t, data, append(cilium.Dialects(), k8s.Dialect, tree.Dialect)...)
	})
}

// FuzzParseNetworkPolicy feeds any spec to the parser of NetworkPolicy.
func FuzzParseNetworkPolicy(f *testing.F) {
	seed(f, "{podSelector: {}, ingress: [{from: [{podSelector: {matchLabels: {a: b}}, namespaceSelector: {}}, {ipBlock: {cidr: 10.0.0.0/8, except: [10.1.0.0/16]}}], ports: [{port: 80, protocol: UDP}, {}]}]}",
		"{podSelector: {matchExpressions: [{key: a, operator: In, values: [b, c]}]}, policyTypes: [Egress], egress: [{to: [{namespaceSelector: {matchExpressions: [{key: x, operator: DoesNotExist}]}}], ports: [{port: http}, {port: 80, endPort: 90, protocol: SCTP}]}]}")
	f.Fuzz(func(t *testing.T, spec string) {
		checkParsed(t, "apiVersion: networking.k8s.io/v1\nkind: NetworkPolicy\nmetadata: {name: p}\nspec:\n "+spec, k8s.Dialect)
	})
}

// FuzzParseCiliumNetworkPolicy feeds any spec to the parser of
// CiliumNetworkPolicy.
func FuzzParseCiliumNetworkPolicy(f *testing.F) {
	seed(f, "{endpointSelector: {}, ingress: [{}, {fromEndpoints: [{matchLabels: {'k8s:io.kubernetes.pod.namespace': a}}], toPorts: [{ports: [{port: '53', protocol: ANY}]}]}]}",
		"{endpointSelector: {matchExpressions: [{key: a, operator: NotIn, values: [b]}]}, egress: [{}, {toEndpoints: [{matchExpressions: [{key: 'k8s:io.cilium.k8s.namespace.labels.x', operator: Exists}]}], toPorts: [{ports: [{port: Dns}, {port: '80', endPort: 90}]}]}]}")
	f.Fuzz(func(t *testing.T, spec string) {
		checkParsed(t, "apiVersion: cilium.io/v2\nkind: CiliumNetworkPolicy\nmetadata: {name: p}\nspec:\n "+spec, cilium.Dialects()...)
	})
}

// FuzzParsePolicyTree feeds any rules to the parser of policy trees.
func FuzzParsePolicyTree(f *testing.F) {
	seed(f, `[{"coverage": ["id.a"], "allow": ["id.b", "reserved:host", "!k8s:x=y", {"action": "deny", "matchLabels": [{"key": "a", "source": "any", "value": "b"}]}]}]`,
		`[{"coverage": ["a"], "requires": ["b"]}, {"l4": [{"in-ports": [{"port": 80, "protocol": "tcp", "l7-parser": "http", "l7-rules": [{"expr": "Method(\"GET\") && !Path(\"/\")"}]}], "out-ports": [{"port": 53}]}]}]`,
		`[{"coverage": ["../a"], "always-allow": ["root.b"]}], "children": {"a": {"name": "a", "rules": []}}`)
	f.Fuzz(func(t *testing.T, rules string) {
		checkParsed(t, `{"name": "root.x", "rules": `+rules+"}", tree.Dialect)
	})
}

// FuzzExpression feeds any expression to the parser of the tree's l7-rules: it
// is refused, or it is one that Portcullis does not enforce.
func FuzzExpression(f *testing.F) {
	for _, s := range []string{`Method("GET") && Path("/v1/")`, `!(Host("<a>.b") || HeaderRegexp("X", "a.*")) && PathRegexp("/")`, "Header(`A`, \"b\")", `((((`, `!!!`, `Path("\x`} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		text, err := json.Marshal(s)
		if err != nil {
			t.Skip()
		}
		doc := `{"rules": [{"coverage": ["a"], "l4": [{"in-ports": [{"port": 80, "protocol": "tcp", "l7-parser": "http", "l7-rules": [{"expr": ` + string(text) + `}]}]}]}]}`
		r, err := dialect.ParseFile("f", []byte(doc), tree.Dialect)
		if err == nil && (len(r.Policies[0].NeedsProxy) == 0 || r.Policies[0].Specs[0].Rules[0].L7.HTTP[0].Expr == nil) {
			t.Fatal("nobody is asked for it")
		}
	})
}
