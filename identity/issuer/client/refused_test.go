package client_test

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"encoding/json"
	"encoding/pem"
	"math/big"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/bundle/spiffebundle"

	"portcullis/identity/issuer"
)

// oldSVID returns what an agent of n1 would have kept of an SVID that is past the
// half of its life, of the authority in a Secret.
func oldSVID(t *testing.T, secret []byte) []byte {
	t.Helper()
	var ring struct {
		Authorities []struct{ Certificate, Key string }
	}
	if err := json.Unmarshal(secret, &ring); err != nil {
		t.Fatal(err)
	}
	der := func(text string) []byte { b, _ := pem.Decode([]byte(text)); return b.Bytes }
	parent, err := x509.ParseCertificate(der(ring.Authorities[0].Certificate))
	if err != nil {
		t.Fatal(err)
	}
	signer, err := x509.ParsePKCS8PrivateKey(der(ring.Authorities[0].Key))
	if err != nil {
		t.Fatal(err)
	}
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	id := nodeID(t, "n1")
	cert, err := x509.CreateCertificate(rand.Reader, &x509.Certificate{SerialNumber: big.NewInt(8), NotBefore: time.Now().Add(-3 * time.Hour), NotAfter: time.Now().Add(time.Hour),
		KeyUsage: x509.KeyUsageDigitalSignature, BasicConstraintsValid: true, URIs: []*url.URL{id.URL()}}, parent, key.Public(), signer)
	if err != nil {
		t.Fatal(err)
	}
	private, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		t.Fatal(err)
	}
	b := spiffebundle.FromX509Authorities(td, []*x509.Certificate{parent})
	b.SetSequenceNumber(1)
	bundle, err := b.Marshal()
	if err != nil {
		t.Fatal(err)
	}
	data, err := json.Marshal(map[string]any{"key": private, "certificate": cert, "bundle": json.RawMessage(bundle)})
	if err != nil {
		t.Fatal(err)
	}
	return data
}

// An agent that is refused a new SVID goes on with the old one, and hears from
// the issuer whom to trust all the same.
func TestRefusedAgentHearsOfTheBundle(t *testing.T) {
	c := newCluster(t)
	secret := aged(t)
	c.keys.edit(t, func([]byte) []byte { return secret })
	c.knows("another", "n3") // n1's token is rejected
	cfg := c.config(t, "n1")
	if err := os.MkdirAll(filepath.Dir(cfg.CacheFile), 0o700); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(cfg.CacheFile, oldSVID(t, secret), 0o600); err != nil {
		t.Fatal(err)
	}
	c.bundle.path = "" // no kubelet: nothing comes by the file
	c.issue(t)
	s, _ := c.source(t, cfg)
	wait(t, s)
	until(t, "the refusal is told", func() bool {
		return s.Problem() != nil && strings.Contains(s.Problem().Error(), string(issuer.RefusedToken))
	})
	until(t, "the next authority is trusted", func() bool { return authorities(s) == 2 })
	if _, err := s.GetX509SVID(); err != nil {
		t.Errorf("the SVID that is good still: %v", err)
	}
}
