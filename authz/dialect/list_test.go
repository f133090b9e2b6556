package dialect_test

import (
	"fmt"
	"net/netip"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"

	"portcullis/authz"
	"portcullis/authz/dialect"
)

// Lists, as kubectl and the API server write them, say what their items say;
// each has a source that says the same on its own.
func TestLists(t *testing.T) {
	const (
		a = "{apiVersion: networking.k8s.io/v1, kind: NetworkPolicy, metadata: {name: a, creationTimestamp: 2026-11-01T00:00:00Z, annotations: {x: 0x10, w: null, z: .inf}}, spec: {podSelector: {matchLabels: {v: '1'}}, ingress: [{ports: [{port: 80}, {port: http}]}]}}"
		b = `{apiVersion: cilium.io/v2, kind: CiliumNetworkPolicy, metadata: {name: b, namespace: m}, spec: {description: "<\\u2028\\n---\\n'#", endpointSelector: {}, ingress: [{}]}}`
		c = "{apiVersion: networking.k8s.io/v1, kind: NetworkPolicy, metadata: {name: c}, spec: {podSelector: {}, egress: [{to: [{ipBlock: {cidr: 10.0.0.0/8, except: [10.1.0.0/16]}}]}]}}"
		l = "apiVersion: v1\nkind: List\nmetadata: {resourceVersion: '', selfLink: ''}\nitems:\n"
	)
	noKind := strings.NewReplacer("apiVersion: networking.k8s.io/v1, kind: NetworkPolicy, ", "")
	want, err := parse("f", a+"\n---\n"+b+"\n---\n"+c)
	if err != nil || len(want) != 3 {
		t.Fatal(err)
	}
	sameAs := cmp.Options{cmpopts.IgnoreFields(authz.Policy{}, "Source"), cmpopts.EquateComparable(netip.Prefix{})}
	for name, doc := range map[string]string{
		"list":          l + "- " + a + "\n- " + b + "\n- " + c,
		"nested":        l + "- " + a + "\n- {apiVersion: v1, kind: List, items: [" + b + ", " + c + "]}",
		"aliases":       l + "- metadata: &m {name: a}\n  apiVersion: networking.k8s.io/v1\n  kind: NetworkPolicy\n  spec: &s {podSelector: {matchLabels: {v: '1'}}, ingress: [{ports: [{port: 80}, {port: http}]}]}\n- " + b + "\n- " + c,
		"typed":         "apiVersion: networking.k8s.io/v1\nkind: NetworkPolicyList\nitems:\n- " + noKind.Replace(a) + "\n---\n" + b + "\n---\n{apiVersion: v1, kind: List, items: []}\n---\n{apiVersion: networking.k8s.io/v1, kind: NetworkPolicyList, items: [" + c + "]}",
		"several, JSON": l + "- " + a + "\n---\n{\"apiVersion\":\"cilium.io/v2\",\"kind\":\"CiliumNetworkPolicyList\",\"items\":[{\"metadata\":{\"name\":\"b\",\"namespace\":\"m\"},\"spec\":{\"endpointSelector\":{},\"ingress\":[{}]}}]}\n--- " + c,
	} {
		got, err := parse("f", doc)
		if err != nil {
			t.Errorf("%s: %v", name, err)
			continue
		}
		if d := cmp.Diff(want, got, sameAs); d != "" {
			t.Errorf("%s: %s", name, d)
		}
		for _, p := range got {
			again, err := parse("f", p.Source)
			if err != nil || len(again) != 1 {
				t.Errorf("%s: source %s: %v", name, p.Source, err)
			} else if d := cmp.Diff(p, again[0], sameAs); d != "" {
				t.Errorf("%s: source %s: %s", name, p.Source, d)
			}
		}
	}
}

// A problem in an item says where in the list, and in which file, it is; a
// rule's path begins at the item, as the source does.
func TestListPaths(t *testing.T) {
	_, err := parse("f.yaml", "---\napiVersion: v1\nkind: List\nitems:\n- apiVersion: networking.k8s.io/v1\n  kind: NetworkPolicy\n  metadata: {name: a}\n  spec:\n    podSelector: {}\n    ingress:\n    - from: [{ipBlock: {cidr: 10.0.0.1/8}}]\n")
	const want = "f.yaml:11: document 1: items[0].spec.ingress[0].from[0].ipBlock.cidr: want the one spelling that every program reads alike: write 10.0.0.0/8"
	if err == nil || err.Error() != want {
		t.Errorf("%v\nwant %s", err, want)
	}
	ps, err := parse("f.yaml", "{apiVersion: v1, kind: List, items: [{apiVersion: networking.k8s.io/v1, kind: NetworkPolicy, metadata: {name: a}, spec: {podSelector: {}, ingress: [{}]}}]}")
	if err != nil || ps[0].Specs[0].Rules[0].Path != "spec.ingress[0]" {
		t.Errorf("%+v, %v", ps, err)
	}
}

// An item that aliases make large is refused before it costs memory; one that
// is as large as a file may be is taken, and its source too.
func TestLargeLists(t *testing.T) {
	long := strings.Repeat("x", 400_000)
	for name, doc := range map[string]string{
		"one": "{apiVersion: v1, kind: List, items: [{apiVersion: v1, kind: A, a: &a " + long + ", b: *a, c: *a}]}",
		"all": "{apiVersion: v1, kind: List, items: [&a {apiVersion: v1, kind: A, a: " + long + "}" + strings.Repeat(", *a", 20) + "]}",
	} {
		if _, err := parse("f", doc); err == nil || !strings.Contains(err.Error(), "split it") {
			t.Errorf("%s: %.300v", name, err)
		}
	}
	labels := ""
	for i := range 30_000 {
		labels += fmt.Sprintf(`"k%d":"",`, i)
	}
	doc := `{"apiVersion":"v1","kind":"List","items":[{"apiVersion":"networking.k8s.io/v1","kind":"NetworkPolicy","metadata":{"name":"a"},"spec":{"podSelector":{"matchLabels":{` + strings.TrimSuffix(labels, ",") + `}}}}]}`
	ps, err := parse("f", doc)
	if err != nil || len(ps[0].Specs[0].Subject) != 30_001 {
		t.Fatalf("%.300v", err)
	}
	if again, err := parse("f", ps[0].Source); err != nil || len(ps[0].Source) > dialect.MaxFile || len(again[0].Specs[0].Subject) != 30_001 {
		t.Errorf("%d bytes: %.300v", len(ps[0].Source), err)
	}
}
