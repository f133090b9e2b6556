package session_test

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/bundle/x509bundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/svid/x509svid"

	"portcullis/ipcache/lease"
	"portcullis/ipcache/session"
)

const (
	sleepID  = "spiffe://portcullis.lab/ns/default/sa/sleep"
	otherID  = "spiffe://portcullis.lab/ns/default/sa/other"
	friendID = "spiffe://friend.lab/ns/default/sa/sleep"
)

// provers are a verifier n2, an owner n1 and a third node n3, with real sessions,
// and bundles of two trust domains at the verifier.
type provers struct {
	lab, friend              *lab
	verifier, owner, mallory *node
}

func newProvers(t *testing.T, federated bool) *provers {
	p := &provers{lab: newLab(t, "portcullis.lab", time.Hour, "n1", "n2", "n3"), friend: newLab(t, "friend.lab", time.Hour, "x")}
	set := x509bundle.NewSet(bundleOf(t, p.lab, "n1"))
	if federated {
		set.Add(bundleOf(t, p.friend, "x"))
	}
	p.owner, p.mallory = p.lab.node(t, "n1"), p.lab.node(t, "n3")
	p.verifier = p.lab.node(t, "n2", func(c *session.Config) { c.Trust = set })
	p.verifier.knows(p.owner, p.mallory)
	p.mallory.knows(p.owner)
	return p
}

func question(id string) lease.Prove {
	q := lease.Prove{ID: 1, IP: ip4, Generation: 7, UID: uid(9), SPIFFEID: id}
	rand.Read(q.Nonce[:])
	return q
}

// asked sends a question and returns it as the owner got it.
func asked(t *testing.T, verifier, owner *node, stream lease.StreamID, q lease.Prove) lease.Prove {
	t.Helper()
	verifier.SendToOwner(stream, q)
	got, ok := await[lease.FromVerifier](t, owner.sink).Message.(lease.Prove)
	if !ok || got != q {
		t.Fatalf("the owner got %+v, want %+v", got, q)
	}
	return got
}

func answered(t *testing.T, verifier *node) lease.Proof {
	t.Helper()
	m := await[lease.FromOwner](t, verifier.sink).Message
	p, ok := m.(lease.Proof)
	if !ok {
		t.Fatalf("%+v is no proof", m)
	}
	return p
}

// What certificates and signatures show, over real sessions: an honest owner, and
// every kind of dishonest one.
func TestProof(t *testing.T) {
	now := time.Now()
	tests := []struct {
		name      string
		ask       string
		svid      func(p *provers) *x509svid.SVID
		federated bool
		want      lease.ProofRefusal
	}{
		{name: "honest", ask: sleepID, svid: func(p *provers) *x509svid.SVID {
			return p.lab.forge(t, sleepID, now.Add(-time.Hour), now.Add(time.Hour))
		}},
		{name: "of a workload that it runs, for one that it does not", ask: sleepID, want: lease.ProofWrongID,
			svid: func(p *provers) *x509svid.SVID {
				return p.lab.forge(t, otherID, now.Add(-time.Hour), now.Add(time.Hour))
			}},
		{name: "expired", ask: sleepID, want: lease.ProofExpired,
			svid: func(p *provers) *x509svid.SVID {
				return p.lab.forge(t, sleepID, now.Add(-2*time.Hour), now.Add(-time.Minute))
			}},
		{name: "not yet valid", ask: sleepID, want: lease.ProofNotYetValid,
			svid: func(p *provers) *x509svid.SVID {
				return p.lab.forge(t, sleepID, now.Add(time.Hour), now.Add(2*time.Hour))
			}},
		{name: "of another trust domain", ask: sleepID, want: lease.ProofWrongTrustDomain, federated: true,
			svid: func(p *provers) *x509svid.SVID {
				return p.friend.forge(t, friendID, now.Add(-time.Hour), now.Add(time.Hour))
			}},
		{name: "of a trust domain that is not federated", ask: friendID, want: lease.ProofWrongTrustDomain,
			svid: func(p *provers) *x509svid.SVID {
				return p.friend.forge(t, friendID, now.Add(-time.Hour), now.Add(time.Hour))
			}},
		{name: "of a federated trust domain", ask: friendID, federated: true,
			svid: func(p *provers) *x509svid.SVID {
				return p.friend.forge(t, friendID, now.Add(-time.Hour), now.Add(time.Hour))
			}},
		{name: "signed by a federated authority for our trust domain", ask: sleepID, want: lease.ProofUntrusted, federated: true,
			svid: func(p *provers) *x509svid.SVID {
				return p.friend.forge(t, sleepID, now.Add(-time.Hour), now.Add(time.Hour))
			}},
		{name: "another's certificate, without its key", ask: sleepID, want: lease.ProofRelayed, svid: func(p *provers) *x509svid.SVID {
			v := p.lab.forge(t, sleepID, now.Add(-time.Hour), now.Add(time.Hour))
			v.PrivateKey = p.lab.forge(t, otherID, now.Add(-time.Hour), now.Add(time.Hour)).PrivateKey
			return v
		}},
	}
	for _, test := range tests {
		t.Run(test.name, func(t *testing.T) {
			p := newProvers(t, test.federated)
			at, with := open(t, p.verifier, p.owner)
			q := asked(t, p.verifier, p.owner, at, question(test.ask))
			v := test.svid(p)
			p.owner.Prove(with, q, v)
			m := answered(t, p.verifier)
			if m.Checked.Refusal != test.want {
				t.Fatalf("%v, want %v", m.Checked.Refusal, test.want)
			}
			if m.Nonce != q.Nonce || m.IP != q.IP || m.Generation != q.Generation || m.UID != q.UID || m.SPIFFEID != q.SPIFFEID {
				t.Errorf("%+v answers %+v", m, q)
			}
			c := v.Certificates[0]
			if m.Checked.SPIFFEID != v.ID.String() || m.Checked.Serial != c.SerialNumber.Text(16) || m.Checked.Issuer != c.Issuer.String() {
				t.Errorf("%+v names another certificate than %v", m.Checked, v.ID)
			}
			if left := time.Until(c.NotAfter); test.want == 0 && (m.Checked.Valid <= left-time.Hour || m.Checked.Valid > left+time.Hour) {
				t.Errorf("valid for %v, the certificate for %v", m.Checked.Valid, left)
			}
		})
	}
}

// A node that does not run the workload gets the question, has the true owner
// answer it, and hands the answer on: it is of another session.
func TestRelayedProof(t *testing.T) {
	p := newProvers(t, false)
	toMallory, atMallory := open(t, p.verifier, p.mallory)
	toOwner, atOwner := open(t, p.mallory, p.owner)
	q := asked(t, p.verifier, p.mallory, toMallory, question(sleepID))
	asked(t, p.mallory, p.owner, toOwner, q)
	p.owner.Prove(atOwner, q, p.lab.forge(t, sleepID, time.Now().Add(-time.Hour), time.Now().Add(time.Hour)))
	p.mallory.SendToVerifier(atMallory, answered(t, p.mallory))
	if got := answered(t, p.verifier).Checked; got.Refusal != lease.ProofRelayed || got.SPIFFEID != sleepID {
		t.Errorf("%+v, want %v", got, lease.ProofRelayed)
	}
}

// Nothing of a proof can be changed afterwards, and a second session has another
// exporter even between the same two nodes.
func TestProofIsForOneQuestionAndSession(t *testing.T) {
	p := newProvers(t, false)
	at, with := open(t, p.verifier, p.owner)
	v := p.lab.forge(t, sleepID, time.Now().Add(-time.Hour), time.Now().Add(time.Hour))
	p.owner.Prove(with, asked(t, p.verifier, p.owner, at, question(sleepID)), v)
	good := answered(t, p.verifier)
	if good.Checked.Refusal != 0 {
		t.Fatal(good.Checked)
	}
	replay := func(at, with lease.StreamID, what string, change func(*lease.Proof)) {
		t.Helper()
		asked(t, p.verifier, p.owner, at, question(sleepID))
		m := good
		change(&m)
		p.owner.SendToVerifier(with, m)
		if got := answered(t, p.verifier).Checked.Refusal; got != lease.ProofRelayed {
			t.Errorf("%s: %v, want %v", what, got, lease.ProofRelayed)
		}
	}
	replay(at, with, "another nonce", func(m *lease.Proof) { m.Nonce[0] ^= 1 })
	replay(at, with, "another generation", func(m *lease.Proof) { m.Generation++ })
	replay(at, with, "another workload", func(m *lease.Proof) { m.UID[0] ^= 1 })
	replay(at, with, "another address", func(m *lease.Proof) { m.IP = ip6 })
	again, withAgain := open(t, p.verifier, p.owner)
	replay(again, withAgain, "another session", func(*lease.Proof) {})

	// Who proves without being asked is not listened to.
	p.owner.SendToVerifier(with, good)
	if gone := await[lease.OwnerGone](t, p.verifier.sink); gone.Stream != at {
		t.Errorf("%+v, want the end of stream %d", gone, at)
	}
}

// The kinds of keys that a workload's SVID can have.
func TestProofKeys(t *testing.T) {
	p := newProvers(t, false)
	at, with := open(t, p.verifier, p.owner)
	keys := map[string]func() (crypto.Signer, error){
		"P-256":   func() (crypto.Signer, error) { return ecdsa.GenerateKey(elliptic.P256(), rand.Reader) },
		"P-384":   func() (crypto.Signer, error) { return ecdsa.GenerateKey(elliptic.P384(), rand.Reader) },
		"P-521":   func() (crypto.Signer, error) { return ecdsa.GenerateKey(elliptic.P521(), rand.Reader) },
		"Ed25519": func() (crypto.Signer, error) { _, k, err := ed25519.GenerateKey(rand.Reader); return k, err },
		"RSA":     func() (crypto.Signer, error) { return rsa.GenerateKey(rand.Reader, 2048) },
	}
	for name, generate := range keys {
		key, err := generate()
		if err != nil {
			t.Fatal(err)
		}
		v := p.lab.forgeFor(t, sleepID, time.Now().Add(-time.Hour), time.Now().Add(time.Hour), key)
		p.owner.Prove(with, asked(t, p.verifier, p.owner, at, question(sleepID)), v)
		if got := answered(t, p.verifier).Checked; got.Refusal != 0 {
			t.Errorf("%s: %v", name, got.Refusal)
		}
	}
}

func BenchmarkProof(b *testing.B) {
	l := newLab(b, "portcullis.lab", time.Hour, "n1", "n2")
	source := l.source(b, "n1")
	bundle, err := source.GetX509BundleForTrustDomain(spiffeid.RequireTrustDomainFromString("portcullis.lab"))
	if err != nil {
		b.Fatal(err)
	}
	owner, verifier := l.node(b, "n1"), l.node(b, "n2", func(c *session.Config) { c.Trust = x509bundle.NewSet(bundle) })
	verifier.knows(owner)
	verifier.Open("n1")
	at := await[lease.StreamOpened](b, verifier.sink).Stream
	with := await[lease.StreamAccepted](b, owner.sink).Stream
	v := l.forge(b, sleepID, time.Now().Add(-time.Hour), time.Now().Add(time.Hour))
	q := question(sleepID)
	for b.Loop() {
		verifier.SendToOwner(at, q)
		await[lease.FromVerifier](b, owner.sink)
		owner.Prove(with, q, v)
		if p, ok := await[lease.FromOwner](b, verifier.sink).Message.(lease.Proof); !ok || p.Checked.Refusal != 0 {
			b.Fatal(p.Checked)
		}
	}
}
