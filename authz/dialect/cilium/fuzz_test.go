package cilium_test

import (
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"portcullis/authz"
	"portcullis/authz/dialect/cilium"
)

// FuzzCilium feeds any file to the parsers of this package: it is refused with
// problems that say where, or it is a model that can be compiled, that says
// again what it said, and that tells what has no datapath.
func FuzzCilium(f *testing.F) {
	files, err := filepath.Glob("../testdata/*.yaml")
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
	for _, s := range []string{
		in + "{fromEntities: [all, cluster], toPorts: [{ports: [{port: http, protocol: TCP}], rules: {http: [{path: /a, headers: [X]}]}}]}",
		out + "{toFQDNs: [{matchPattern: '**.a'}], icmps: [{fields: [{type: Echo}, {type: 128, family: IPv6}]}]}",
		deny + "toCIDRSet: [{cidr: '2001:db8::/32', except: ['2001:db8:1::/48']}, {cidrGroupRef: g}, {cidrGroupSelector: {}}]",
		ccnp + "  nodeSelector: {matchLabels: {a: b}}\n  ingress: [{fromNodes: [{}]}]\n  enableDefaultDeny: {egress: true}",
		ccnp + all + "  egress: [{toEndpoints: [{matchExpressions: [{key: 'reserved:host', operator: NotIn, values: [x]}]}], authentication: {mode: required}}, {toServices: [{k8sService: {serviceName: a, namespace: b}}]}]",
		ccg + "  externalCIDRs: [10.0.0.0/8]\n---\n" + out + "toPorts: [{ports: [{protocol: VRRP}, {port: '1', endPort: 2}]}]",
	} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, data string) {
		parsed, err := parse(data)
		if err != nil {
			var problems authz.Problems
			if !errors.As(err, &problems) || len(problems) == 0 || len(parsed.Refs()) > 0 {
				t.Fatalf("%d objects with %v", len(parsed.Refs()), err)
			}
			for _, p := range problems {
				if p.Message == "" {
					t.Fatalf("%+v says nothing", p)
				}
			}
			return
		}
		for _, g := range parsed.Groups {
			for _, b := range g.Blocks {
				if !b.IsValid() || b != b.Masked() || b.Addr().Is4In6() {
					t.Fatalf("%s: block %s", g.Ref, b)
				}
			}
		}
		for _, p := range parsed.Policies {
			checkPolicy(t, p)
			again, err := parse(p.Source)
			if err != nil || len(again.Policies) != 1 || len(again.Policies[0].Specs) != len(p.Specs) || len(again.Policies[0].NotEnforced) != len(p.NotEnforced) {
				t.Fatalf("source %q: %v", p.Source, err)
			}
		}
	})
}

func checkPolicy(t *testing.T, p *authz.Policy) {
	t.Helper()
	if err := p.Validate(); err != nil {
		t.Fatal(err)
	}
	if (p.Kind == cilium.Kind) != (p.Namespace != "") {
		t.Fatalf("namespace of %s", p.Ref)
	}
	for _, s := range p.Specs {
		if p.Kind == cilium.Kind && (len(s.Subject) == 0 || s.Subject[0].Attribute != authz.Namespace || s.Nodes) {
			t.Fatalf("%s: the subject is not bound to a namespace: %v", p.Ref, s.Subject)
		}
		for _, r := range s.Rules {
			if r.L7 != nil && len(p.NeedsProxy) == 0 || s.Nodes && p.Enforceable() == nil {
				t.Fatalf("%s: there is no datapath for %+v", p.Ref, r)
			}
			for _, x := range r.Peers {
				switch x := x.(type) {
				case authz.DNSName:
					if len(p.NeedsProxy) == 0 || strings.HasSuffix(x.Name+x.Pattern, ".") || strings.ToLower(x.Name+x.Pattern) != x.Name+x.Pattern {
						t.Fatalf("%s: %+v", p.Ref, x)
					}
				case authz.Service:
					if r.Action == authz.Deny && p.Enforceable() == nil {
						t.Fatalf("%s: who is behind %+v may not be known", p.Ref, x)
					}
				case authz.Block:
					if x.Bound {
						t.Fatalf("%s: %+v selects workloads", p.Ref, x)
					}
				}
			}
		}
	}
}
