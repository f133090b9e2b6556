package cilium_test

import (
	"strings"
	"testing"

	"portcullis/authz"
	"portcullis/identity"
)

// A policy means its own trust domain's workloads, unless it names another's.
func TestTrustDomain(t *testing.T) {
	for _, test := range []struct {
		selector     string
		own, partner bool
	}{
		{`{matchLabels: {app: a}}`, true, false},
		{`{}`, true, false},
		{`{matchLabels: {app: a, "spiffe:trust-domain": partner.example}}`, false, true},
		{`{matchLabels: {"spiffe:trust-domain": partner.example}}`, false, true},
		{`{matchLabels: {app: b, "spiffe:trust-domain": partner.example}}`, false, false},
		{`{matchLabels: {"spiffe:trust-domain": own.example}}`, true, false},
		{`{matchLabels: {"spiffe:trust-domain": third.example}}`, false, false},
		{`{matchExpressions: [{key: "spiffe:trust-domain", operator: In, values: [own.example, partner.example]}]}`, true, true},
	} {
		t.Run(test.selector, func(t *testing.T) {
			parsed, err := parse(cnp + "  endpointSelector: {}\n  ingress: [{fromEndpoints: [" + test.selector + "]}]")
			if err != nil {
				t.Fatal(err)
			}
			r := authz.NewRepository(authz.Options{TrustDomain: "own.example"})
			if err := r.Put(parsed.Policies...); err != nil {
				t.Fatal(err)
			}
			for td, want := range map[string]bool{"own.example": test.own, "partner.example": test.partner} {
				peer := authz.Peer{Identity: identity.New(td, "default", "s", map[string]string{"app": "a"})}
				if got, _ := r.Picks(parsed.Policies[0].Specs[0].Rules[0].Peers[0], peer); got != want {
					t.Errorf("a peer of %s: selected is %t, want %t", td, got, want)
				}
			}
			host, _ := r.Picks(parsed.Policies[0].Specs[0].Rules[0].Peers[0], authz.Peer{Identity: identity.Identity{Reserved: "host"}})
			if host {
				t.Error("the host is selected")
			}
		})
	}
}

func TestTrustDomainRefused(t *testing.T) {
	for selector, want := range map[string]string{
		`{matchLabels: {"spiffe:id": x}}`:                                                    "there is spiffe:trust-domain",
		`{matchLabels: {"spiffe:trust-domain": "A.b"}}`:                                      "no trust domain",
		`{matchLabels: {"spiffe:trust-domain": ""}}`:                                         "1 to 255",
		`{matchExpressions: [{key: "spiffe:trust-domain", operator: NotIn, values: [a.b]}]}`: "whoever is federated",
		`{matchExpressions: [{key: "spiffe:trust-domain", operator: Exists}]}`:               "whoever is federated",
		`{matchExpressions: [{key: "spiffe:trust-domain", operator: DoesNotExist}]}`:         "whoever is federated",
	} {
		_, err := parse(cnp + "  endpointSelector: {}\n  ingress: [{fromEndpoints: [" + selector + "]}]")
		if err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%s: %v, want an error with %q", selector, err, want)
		}
	}
}
