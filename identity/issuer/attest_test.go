package issuer

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"crypto/x509"
	"crypto/x509/pkix"
	"errors"
	"net/url"
	"strings"
	"testing"
	"testing/synctest"
	"time"
)

var rules = Rules{Audience: DefaultAudience, Account: "system:serviceaccount:portcullis:portcullis-agent", Relay: "system:serviceaccount:portcullis:portcullis-relay"}

// good is the review of the token of node n1's agent.
func good() Review {
	return Review{
		Authenticated: true, Audiences: []string{DefaultAudience}, Username: rules.Account,
		Extra: map[string][]string{extraNode: {"n1"}, extraPod: {"agent-x"}, extraPodUID: {"u"}},
	}
}

func reason(err error) Refusal {
	var no *refused
	if errors.As(err, &no) {
		return no.reason
	}
	return ""
}

func TestAttest(t *testing.T) {
	for _, test := range []struct {
		name   string
		change func(*Review)
		want   Refusal // "": node n1
	}{
		{"good", func(*Review) {}, ""},
		{"several audiences", func(r *Review) { r.Audiences = []string{"x", DefaultAudience} }, ""},
		{"not authenticated", func(r *Review) { r.Authenticated = false }, RefusedToken},
		{"authenticated with an error", func(r *Review) { r.Error = "odd" }, RefusedToken},
		{"the API server's audience", func(r *Review) { r.Audiences = []string{"https://kubernetes.default.svc"} }, RefusedAudience},
		{"no audience", func(r *Review) { r.Audiences = nil }, RefusedAudience},
		{"another service account", func(r *Review) { r.Username = "system:serviceaccount:portcullis:default" }, RefusedAccount},
		{"another namespace", func(r *Review) { r.Username = "system:serviceaccount:default:portcullis-agent" }, RefusedAccount},
		{"a name that goes on", func(r *Review) { r.Username += "2" }, RefusedAccount},
		{"nobody", func(r *Review) { r.Username = "" }, RefusedAccount},
		{"a node", func(r *Review) { r.Username = "system:node:n1" }, RefusedAccount},
		{"no node", func(r *Review) { delete(r.Extra, extraNode) }, RefusedNoNode},
		{"no claims", func(r *Review) { r.Extra = nil }, RefusedNoPod},
		{"bound to a node alone", func(r *Review) { delete(r.Extra, extraPod); delete(r.Extra, extraPodUID) }, RefusedNoPod},
		{"a pod without a UID", func(r *Review) { delete(r.Extra, extraPodUID) }, RefusedNoPod},
		{"two nodes", func(r *Review) { r.Extra[extraNode] = []string{"n1", "n1"} }, RefusedNodes},
		{"an empty name", func(r *Review) { r.Extra[extraNode] = []string{""} }, RefusedNodeName},
		{"a path", func(r *Review) { r.Extra[extraNode] = []string{"n1/../n2"} }, RefusedNodeName},
		{"capitals", func(r *Review) { r.Extra[extraNode] = []string{"N1"} }, RefusedNodeName},
		{"a long name", func(r *Review) { r.Extra[extraNode] = []string{strings.Repeat("n", 254)} }, RefusedNodeName},
	} {
		t.Run(test.name, func(t *testing.T) {
			r := good()
			test.change(&r)
			// Of an agent and of a relay the same is asked, and neither passes for the other.
			for account, path := range map[string]string{rules.Account: "/portcullis/node/n1", rules.Relay: "/portcullis/relay"} {
				r := r
				if r.Username == rules.Account {
					r.Username = account
				}
				who, err := rules.Attest(r)
				if reason(err) != test.want || (who.Node == "n1") != (test.want == "") || (err == nil) != (test.want == "") || err == nil && who.Path() != path {
					t.Errorf("%s: %+v, %v; want %q", account, who, err, test.want)
				}
			}
		})
	}
	r := good()
	r.Username = rules.Relay
	if who, err := (Rules{Audience: rules.Audience, Account: rules.Account}).Attest(r); reason(err) != RefusedAccount {
		t.Errorf("a relay where none is to be: %+v, %v", who, err)
	}
}

func csr(t *testing.T, template x509.CertificateRequest, key crypto.Signer) []byte {
	t.Helper()
	der, err := x509.CreateCertificateRequest(rand.Reader, &template, key)
	if err != nil {
		t.Fatal(err)
	}
	return der
}

func TestRequestCarriesAKeyOnly(t *testing.T) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	big, err := ecdsa.GenerateKey(elliptic.P384(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	other, err := rsa.GenerateKey(rand.Reader, 2048)
	if err != nil {
		t.Fatal(err)
	}
	plain := csr(t, x509.CertificateRequest{}, key)
	if got, err := requestedKey(plain); err != nil || !key.PublicKey.Equal(got) {
		t.Errorf("a bare key: %v", err)
	}
	forged := append([]byte(nil), plain...)
	forged[len(forged)-1] ^= 1
	node2 := &url.URL{Scheme: "spiffe", Host: "cluster.example", Path: "/portcullis/node/n2"}
	for name, der := range map[string][]byte{
		"a SPIFFE ID":        csr(t, x509.CertificateRequest{URIs: []*url.URL{node2}}, key),
		"a DNS name":         csr(t, x509.CertificateRequest{DNSNames: []string{"x"}}, key),
		"a subject":          csr(t, x509.CertificateRequest{Subject: pkix.Name{CommonName: "n2"}}, key),
		"an extension":       csr(t, x509.CertificateRequest{ExtraExtensions: []pkix.Extension{{Id: []int{2, 5, 29, 19}, Value: []byte{0x30, 0}}}}, key),
		"another curve":      csr(t, x509.CertificateRequest{}, big),
		"RSA":                csr(t, x509.CertificateRequest{}, other),
		"another's key":      forged,
		"nothing":            nil,
		"something behind":   append(append([]byte(nil), plain...), 0),
		"no request at all":  []byte("hello"),
		"a cut-off request":  plain[:len(plain)-4],
		"a PEM, and not DER": []byte("-----BEGIN CERTIFICATE REQUEST-----"),
	} {
		if _, err := requestedKey(der); reason(err) != RefusedRequest {
			t.Errorf("%s: %v", name, err)
		}
	}
}

func TestEachNodeHasItsRate(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		l := newNodeLimiter()
		for i := range burst {
			if wait := l.take(Attested{Node: "n1"}, time.Now()); wait != 0 {
				t.Fatalf("number %d had to wait %s", i, wait)
			}
		}
		wait := l.take(Attested{Node: "n1"}, time.Now())
		if wait != refill {
			t.Fatalf("after the burst: wait %s, want %s", wait, refill)
		}
		if l.take(Attested{Node: "n2"}, time.Now()) != 0 {
			t.Error("one node's requests cost another's")
		}
		time.Sleep(wait)
		if l.take(Attested{Node: "n1"}, time.Now()) != 0 || l.take(Attested{Node: "n1"}, time.Now()) != refill {
			t.Error("a refill is worth one")
		}
		time.Sleep(burst * refill)
		for range burst {
			if l.take(Attested{Node: "n1"}, time.Now()) != 0 {
				t.Error("the burst did not come back")
			}
		}
	})
}
