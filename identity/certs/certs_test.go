package certs

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/bundle/x509bundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/svid/x509svid"
)

// An SVID verifies by its authority for as long as both live, and not as an authority.
func TestSign(t *testing.T) {
	td := spiffeid.RequireTrustDomainFromString("example.org")
	id := spiffeid.RequireFromPath(td, "/ns/a/sa/b")
	now := time.Now().Truncate(time.Second)
	a := Authority{Organization: "somebody", Backdate: time.Minute}
	cert, key, err := a.New(td, "the authority", time.Hour, now)
	if err != nil {
		t.Fatal(err)
	}
	leaf, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	for name, x := range map[string]struct{ life, want time.Duration }{"shorter": {time.Minute, time.Minute}, "with its authority": {2 * time.Hour, time.Hour}} {
		der, end, err := a.Sign(cert, key, leaf.Public(), id, x.life, now)
		if err != nil || !end.Equal(now.Add(x.want)) {
			t.Fatalf("%s: ends %v, want %v; %v", name, end, now.Add(x.want), err)
		}
		svid, err := x509.ParseCertificate(der)
		if err != nil {
			t.Fatal(err)
		}
		if !svid.NotAfter.Equal(end) || !svid.NotBefore.Equal(now.Add(-time.Minute)) || svid.IsCA || svid.SerialNumber.Sign() <= 0 || svid.SerialNumber.Cmp(cert.SerialNumber) == 0 {
			t.Errorf("%s: %v to %v, CA %v, serial %v", name, svid.NotBefore, svid.NotAfter, svid.IsCA, svid.SerialNumber)
		}
		got, _, err := x509svid.Verify([]*x509.Certificate{svid}, x509bundle.FromX509Authorities(td, []*x509.Certificate{cert}), x509svid.WithTime(now.Add(30*time.Second)))
		if err != nil || got != id {
			t.Errorf("%s: %v, want %v; %v", name, got, id, err)
		}
		if _, _, err := x509svid.Verify([]*x509.Certificate{svid}, x509bundle.FromX509Authorities(td, []*x509.Certificate{cert}), x509svid.WithTime(end.Add(time.Second))); err == nil {
			t.Errorf("%s: verifies after its end", name)
		}
		// What an SVID signs is nobody's.
		below, _, err := a.Sign(svid, leaf, leaf.Public(), id, time.Minute, now)
		if err != nil {
			t.Fatal(err)
		}
		forged, err := x509.ParseCertificate(below)
		if err != nil {
			t.Fatal(err)
		}
		if _, _, err := x509svid.Verify([]*x509.Certificate{forged, svid}, x509bundle.FromX509Authorities(td, []*x509.Certificate{cert}), x509svid.WithTime(now)); err == nil {
			t.Errorf("%s: an SVID signs another", name)
		}
	}
}
