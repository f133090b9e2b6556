package identity

import (
	"strings"
	"testing"
)

func TestTemplateGives(t *testing.T) {
	uid, err := ParseUID("00112233-4455-6677-8899-aabbccddeeff")
	if err != nil {
		t.Fatal(err)
	}
	shop := New("example.org", "shop", "cart.v1", map[string]string{"app": "cart"})
	for text, want := range map[string]string{
		DefaultTemplate: "spiffe://example.org/ns/shop/sa/cart.v1",
		"spiffe://{trust_domain}/{namespace}/{service_account}":                                  "spiffe://example.org/shop/cart.v1",
		"spiffe://{trust_domain}/prod/ns-{namespace}-x/sa/{service_account}":                     "spiffe://example.org/prod/ns-shop-x/sa/cart.v1",
		"spiffe://{trust_domain}/node/{node}/ns/{namespace}/sa/{service_account}/workload/{uid}": "spiffe://example.org/node/n1/ns/shop/sa/cart.v1/workload/00112233-4455-6677-8899-aabbccddeeff",
	} {
		tmpl, err := ParseTemplate(text)
		if err != nil {
			t.Errorf("%s: %v", text, err)
			continue
		}
		if got, err := tmpl.ID(shop, "n1", uid); err != nil || got != want {
			t.Errorf("%s: %q %v, want %q", text, got, err, want)
		}
		if tmpl.String() != text {
			t.Errorf("String: %q", tmpl)
		}
	}
}

// What the default template gives is what an identity says of itself.
func TestDefaultTemplate(t *testing.T) {
	id := New("example.org", "shop", "cart", nil)
	tmpl, err := ParseTemplate(DefaultTemplate)
	if err != nil {
		t.Fatal(err)
	}
	if got, err := tmpl.ID(id, "", UID{}); err != nil || got != id.SPIFFEID() {
		t.Errorf("%q %v, want %q", got, err, id.SPIFFEID())
	}
}

func TestTemplateRefused(t *testing.T) {
	for text, want := range map[string]string{
		"": "want it to begin",
		"spiffe://example.org/ns/{namespace}/sa/{service_account}":                    "want it to begin",
		"https://{trust_domain}/ns/{namespace}/sa/{service_account}":                  "want it to begin",
		"spiffe://{trust_domain}":                                                     "want it to begin",
		"spiffe://{trust_domain}/":                                                    "nothing between",
		"spiffe://{trust_domain}/ns/{namespace}":                                      "{service_account} is missing",
		"spiffe://{trust_domain}/sa/{service_account}":                                "{namespace} is missing",
		"spiffe://{trust_domain}/{namespace}-{service_account}":                       "two variables",
		"spiffe://{trust_domain}/{namespace}{service_account}":                        "two variables",
		"spiffe://{trust_domain}/{namespace}/{service_account}/{namespace}":           "twice",
		"spiffe://{trust_domain}/{namespace}/{service_account}/":                      "nothing between",
		"spiffe://{trust_domain}//{namespace}/{service_account}":                      "nothing between",
		"spiffe://{trust_domain}/../{namespace}/{service_account}":                    "no part",
		"spiffe://{trust_domain}/{namespace}/{service_account":                        "without its }",
		"spiffe://{trust_domain}/{namespace}/{service_account}?a=b":                   "cannot be in",
		"spiffe://{trust_domain}/{namespace}/}{service_account}":                      "cannot be in",
		"spiffe://{trust_domain}/ä/{namespace}/{service_account}":                     "cannot be in",
		"spiffe://{trust_domain}/{namespace}/{service_account}/{workload}":            "not part of its binding",
		"spiffe://{trust_domain}/{namespace}/{service_account}/{Node}":                "no variable {Node}",
		"spiffe://{trust_domain}/{namespace}/{service_account}/{}":                    "no variable {}",
		"spiffe://{trust_domain}/{trust_domain}/{namespace}/{service_account}":        "behind spiffe://",
		"spiffe://{trust_domain}/portcullis/{namespace}/{service_account}":            "own",
		templateScheme + strings.Repeat("a", 2048) + "/{namespace}/{service_account}": "at most",
	} {
		if got, err := ParseTemplate(text); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%q: %q %v, want an error with %q", text, got, err, want)
		}
	}
}

func TestTemplateOfWhatHasNoID(t *testing.T) {
	tmpl, err := ParseTemplate("spiffe://{trust_domain}/n/{node}/ns/x{namespace}/sa/{service_account}")
	if err != nil {
		t.Fatal(err)
	}
	bare, err := ParseTemplate("spiffe://{trust_domain}/{namespace}/{service_account}")
	if err != nil {
		t.Fatal(err)
	}
	withUID, err := ParseTemplate("spiffe://{trust_domain}/{namespace}/{service_account}/{uid}")
	if err != nil {
		t.Fatal(err)
	}
	for _, test := range []struct {
		name string
		id   Identity
		node NodeName
		tmpl Template
	}{
		{"an issuer's", New("td", "portcullis", "issuer", nil), "n1", bare},
		{"a reserved identity", Identity{Reserved: "host"}, "n1", tmpl},
		{"no trust domain", New("", "ns", "sa", nil), "n1", tmpl},
		{"a trust domain with a slash", New("a/b", "ns", "sa", nil), "n1", tmpl},
		{"no namespace", New("td", "", "sa", nil), "n1", tmpl},
		{"a namespace that adds segments", New("td", "ns/sa/root", "sa", nil), "n1", tmpl},
		{"a service account that goes up", New("td", "ns", "..", nil), "n1", tmpl},
		{"no service account", New("td", "ns", "", nil), "n1", tmpl},
		{"a space", New("td", "ns", "a b", nil), "n1", tmpl},
		{"no node", New("td", "ns", "sa", nil), "", tmpl},
		{"no UID", New("td", "ns", "sa", nil), "n1", withUID},
		{"no template", New("td", "ns", "sa", nil), "n1", Template{}},
		{"too long", New("td", strings.Repeat("n", 1100), strings.Repeat("s", 1100), nil), "n1", tmpl},
	} {
		if got, err := test.tmpl.ID(test.id, test.node, UID{}); err == nil {
			t.Errorf("%s: %q", test.name, got)
		}
	}
}

// Whatever the template: no two identities have one SPIFFE ID, and no workload
// is named as an agent is.
func FuzzTemplate(f *testing.F) {
	f.Add(DefaultTemplate, "a", "b", "c", "d")
	f.Add("spiffe://{trust_domain}/{namespace}/x/{service_account}", "x", "x/x", "x", "x")
	f.Add("spiffe://{trust_domain}/a{namespace}b/{service_account}/{node}/{uid}", "portcullis", "node", "n1", "a-b")
	f.Fuzz(func(t *testing.T, text, ns, sa, ns2, sa2 string) {
		tmpl, err := ParseTemplate(text)
		if err != nil {
			return
		}
		one, err := tmpl.ID(New("td", ns, sa, nil), "n1", UID{1})
		if err != nil {
			return
		}
		if !strings.HasPrefix(one, "spiffe://td/") || strings.Contains(one, "//portcullis/") || strings.HasPrefix(one, "spiffe://td/portcullis/") || strings.Contains(one, "/../") || strings.ContainsAny(one, "{}? #%") {
			t.Fatalf("%q gives %q", text, one)
		}
		if other, err := tmpl.ID(New("td", ns2, sa2, nil), "n1", UID{1}); err == nil && (other == one) != (ns == ns2 && sa == sa2) {
			t.Fatalf("%q: %s/%s and %s/%s are both %s", text, ns, sa, ns2, sa2, one)
		}
	})
}
