package svid

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/bundle/spiffebundle"
	"github.com/spiffe/go-spiffe/v2/bundle/x509bundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/svid/x509svid"
	"github.com/spiffe/go-spiffe/v2/workloadapi"
)

var partner = spiffeid.RequireTrustDomainFromString("partner.example")

func partnerAccount(name string) spiffeid.ID {
	return spiffeid.RequireFromPath(partner, "/ns/default/sa/"+name)
}

// agentSource has bundles as a Workload API gives them.
func agentSource(t *testing.T, bundles ...*x509bundle.Bundle) *Source {
	t.Helper()
	s, err := New(Config{From: &workloadAPI{addr: "unix:///x"}, ID: self})
	if err != nil {
		t.Fatal(err)
	}
	s.update(&workloadapi.X509Context{Bundles: x509bundle.NewSet(bundles...)})
	return s
}

func (a *authority) bundle(td spiffeid.TrustDomain) *x509bundle.Bundle {
	b := x509bundle.New(td)
	b.AddX509Authority(a.cert)
	return b
}

func bundles(t *testing.T, cfg TrustConfig) *Bundles {
	t.Helper()
	b, err := NewBundles(cfg)
	if err != nil {
		t.Fatal(err)
	}
	b.poll = 5 * time.Millisecond
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- b.Run(ctx) }()
	t.Cleanup(func() {
		cancel()
		if err := <-done; err != nil {
			t.Errorf("Run: %v", err)
		}
	})
	return b
}

func verifies(b *Bundles, v *x509svid.SVID) func() bool {
	return func() bool { _, _, err := x509svid.Verify(v.Certificates, b); return err == nil }
}

func write(t *testing.T, path string, data []byte) {
	t.Helper()
	if err := os.WriteFile(path, data, 0o600); err != nil {
		t.Fatal(err)
	}
}

// A bundle vouches for its own trust domain's IDs, and for nobody else's.
func TestBundleCountsForItsOwnDomain(t *testing.T) {
	ours, theirs := newAuthority(t), newAuthority(t)
	file := filepath.Join(t.TempDir(), "partner.pem")
	write(t, file, theirs.pem())
	b := bundles(t, TrustConfig{Own: self.TrustDomain(), Agent: agentSource(t, ours.bundle(self.TrustDomain())), Files: map[spiffeid.TrustDomain]string{partner: file}})
	for _, test := range []struct {
		name string
		v    *x509svid.SVID
		want bool
	}{
		{"ours by us", ours.issue(t, account("red"), time.Hour), true},
		{"theirs by them", theirs.issue(t, partnerAccount("red"), time.Hour), true},
		{"ours by them", theirs.issue(t, account("red"), time.Hour), false},
		{"a node agent's by them", theirs.issue(t, self, time.Hour), false},
		{"theirs by us", ours.issue(t, partnerAccount("red"), time.Hour), false},
		{"a third's by them", theirs.issue(t, spiffeid.RequireFromString("spiffe://third.example/ns/default/sa/red"), time.Hour), false},
	} {
		if verifies(b, test.v)() != test.want {
			t.Errorf("%s: verified is %v", test.name, !test.want)
		}
	}
	if _, err := b.GetX509BundleForTrustDomain(spiffeid.RequireTrustDomainFromString("third.example")); !errors.Is(err, ErrNotFederated) {
		t.Errorf("a trust domain without a bundle: %v", err)
	}
	if f := b.Federated(); len(f) != 1 || f[0] != partner {
		t.Errorf("Federated: %v", f)
	}
}

// What the Workload API federates with counts; a file goes before it, also if it
// is gone.
func TestBundleOfTheWorkloadAPI(t *testing.T) {
	ours, theirs, other := newAuthority(t), newAuthority(t), newAuthority(t)
	agent := agentSource(t, ours.bundle(self.TrustDomain()), theirs.bundle(partner))
	v := theirs.issue(t, partnerAccount("red"), time.Hour)
	plain := bundles(t, TrustConfig{Own: self.TrustDomain(), Agent: agent})
	if !verifies(plain, v)() {
		t.Error("the Workload API's bundle does not count")
	}
	file := filepath.Join(t.TempDir(), "partner.pem")
	write(t, file, other.pem())
	b := bundles(t, TrustConfig{Own: self.TrustDomain(), Agent: agent, Files: map[spiffeid.TrustDomain]string{partner: file}})
	if verifies(b, v)() {
		t.Error("the file does not go before the Workload API")
	}
	if err := os.Remove(file); err != nil {
		t.Fatal(err)
	}
	until(t, "a bundle that is gone is told of", func() bool { return b.Problem() != nil })
	if verifies(b, v)() || verifies(b, other.issue(t, partnerAccount("red"), time.Hour))() {
		t.Error("something still vouches for the partner")
	}

	changed := plain.Changed()
	agent.update(&workloadapi.X509Context{Bundles: x509bundle.NewSet(ours.bundle(self.TrustDomain()))})
	<-changed
	until(t, "the federation ended", func() bool { return !verifies(plain, v)() })
}

// Workloads' certificates may have an authority that agents' may not.
func TestBundleOfWorkloadsAlone(t *testing.T) {
	ours, certManager := newAuthority(t), newAuthority(t)
	agent := agentSource(t, ours.bundle(self.TrustDomain()))
	file := filepath.Join(t.TempDir(), "ca.crt")
	write(t, file, certManager.pem())
	b := bundles(t, TrustConfig{Own: self.TrustDomain(), Agent: agent, OwnFile: file})
	v := certManager.issue(t, account("red"), time.Hour)
	if !verifies(b, v)() || !verifies(b, ours.issue(t, account("red"), time.Hour))() {
		t.Error("both should vouch for workloads")
	}
	if _, _, err := x509svid.Verify(certManager.issue(t, self, time.Hour).Certificates, agent); err == nil {
		t.Error("the workloads' authority makes agents")
	}
	write(t, file, newAuthority(t).pem())
	until(t, "it is replaced", func() bool { return !verifies(b, v)() })
	if !verifies(b, ours.issue(t, account("red"), time.Hour))() {
		t.Error("the agents' authority went with it")
	}
}

func TestBundleFiles(t *testing.T) {
	ours, theirs := newAuthority(t), newAuthority(t)
	format := spiffebundle.New(partner)
	format.AddX509Authority(theirs.cert)
	document, err := format.Marshal()
	if err != nil {
		t.Fatal(err)
	}
	leaf := theirs.issue(t, partnerAccount("x"), time.Hour)
	leafPEM, key, err := leaf.Marshal()
	if err != nil {
		t.Fatal(err)
	}
	file := filepath.Join(t.TempDir(), "partner")
	write(t, file, document)
	cfg := TrustConfig{Own: self.TrustDomain(), Agent: agentSource(t, ours.bundle(self.TrustDomain())), Files: map[spiffeid.TrustDomain]string{partner: file}}
	b := bundles(t, cfg)
	v := theirs.issue(t, partnerAccount("red"), time.Hour)
	if !verifies(b, v)() {
		t.Error("a bundle in the SPIFFE format does not count")
	}
	for _, test := range []struct {
		name, want string
		data       []byte
	}{
		{"nothing", "no certificate", nil},
		{"half a file", "JWKS", document[:len(document)/2]},
		{"a key", "PRIVATE KEY", key},
		{"a leaf", "no authority", leafPEM},
		{"JSON without authorities", "no X.509 authority", []byte(`{"keys":[]}`)},
	} {
		t.Run(test.name, func(t *testing.T) {
			write(t, file, test.data)
			until(t, "it is told of", func() bool { err := b.Problem(); return err != nil && strings.Contains(err.Error(), test.want) })
			if !verifies(b, v)() {
				t.Error("what was read before does not stand")
			}
			fresh, err := NewBundles(cfg)
			if err != nil {
				t.Fatal(err)
			}
			if err := fresh.Problem(); err == nil || !strings.Contains(err.Error(), test.want) || verifies(fresh, v)() {
				t.Errorf("at the start: %v", err)
			}
		})
	}
	write(t, file, theirs.pem())
	until(t, "mended", func() bool { return b.Problem() == nil })
	cfg.Files = map[spiffeid.TrustDomain]string{self.TrustDomain(): file}
	if _, err := NewBundles(cfg); err == nil || !strings.Contains(err.Error(), "own trust domain") {
		t.Errorf("a foreign bundle for our own domain: %v", err)
	}
}
