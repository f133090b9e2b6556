package session_test

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"crypto/x509"
	"io"
	"math/big"
	"net/url"
	"strings"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/svid/x509svid"

	"portcullis/ipcache/lease"
)

// claimed has a public key whose private key nobody needs to have.
type claimed struct{ public crypto.PublicKey }

func (c claimed) Public() crypto.PublicKey { return c.public }
func (c claimed) Sign(io.Reader, []byte, crypto.SignerOpts) ([]byte, error) {
	return make([]byte, 256), nil
}

// selfSigned is a certificate as anybody can make one.
func selfSigned(t *testing.T, serial *big.Int, id string, key crypto.PublicKey) *x509.Certificate {
	t.Helper()
	u, err := url.Parse(id)
	if err != nil {
		t.Fatal(err)
	}
	signer, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	if key == nil {
		key = signer.Public()
	}
	template := &x509.Certificate{SerialNumber: serial, NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour), URIs: []*url.URL{u}}
	der, err := x509.CreateCertificate(rand.Reader, template, template, key, signer)
	if err != nil {
		t.Fatal(err)
	}
	cert, err := x509.ParseCertificate(der)
	if err != nil {
		t.Fatal(err)
	}
	return cert
}

// What a dishonest owner can have a verifier compute, and write down.
func TestProofIsBounded(t *testing.T) {
	p := newProvers(t, false)
	at, with := open(t, p.verifier, p.owner)
	say := func(c ...*x509.Certificate) lease.Checked {
		t.Helper()
		q := asked(t, p.verifier, p.owner, at, question(sleepID))
		m := lease.Proof{ID: q.ID, IP: q.IP, Generation: q.Generation, UID: q.UID, SPIFFEID: q.SPIFFEID, Nonce: q.Nonce, Signature: []byte{1}}
		for _, c := range c {
			m.Chain = append(m.Chain, c.Raw)
		}
		p.owner.SendToVerifier(with, m)
		return answered(t, p.verifier).Checked
	}
	huge := new(big.Int).Lsh(big.NewInt(1), 100_000)
	if c := say(selfSigned(t, huge, sleepID, nil)); c.Refusal == 0 || len(c.Serial) > 300 {
		t.Errorf("refusal %v, a serial of %d letters", c.Refusal, len(c.Serial))
	}
	if c := say(selfSigned(t, big.NewInt(1), "spiffe://portcullis.lab/"+strings.Repeat("x", 20_000), nil)); c.Refusal != lease.ProofWrongID || len(c.SPIFFEID) > 300 {
		t.Errorf("refusal %v, an ID of %d letters", c.Refusal, len(c.SPIFFEID))
	}
	modulus := new(big.Int).Lsh(big.NewInt(1), 8193)
	key := &rsa.PublicKey{N: modulus.Add(modulus, big.NewInt(1)), E: 1<<31 - 1}
	leaf := p.lab.forge(t, sleepID, time.Now().Add(-time.Hour), time.Now().Add(time.Hour)).Certificates[0]
	for _, chain := range [][]*x509.Certificate{{selfSigned(t, big.NewInt(1), sleepID, key)}, {leaf, selfSigned(t, big.NewInt(1), sleepID, key)}} {
		if c := say(chain...); c.Refusal != lease.ProofUntrusted {
			t.Errorf("a key that takes long, in %d certificates: %v, want %v", len(chain), c.Refusal, lease.ProofUntrusted)
		}
	}
}

// A workload whose certificates are beyond the bounds has no proof; it does not
// cost its node the session.
func TestLargeSVIDLeavesTheSession(t *testing.T) {
	p := newProvers(t, false)
	at, with := open(t, p.verifier, p.owner)
	good := p.lab.forge(t, sleepID, time.Now().Add(-time.Hour), time.Now().Add(time.Hour))
	long, large := *good, *good
	for range 9 {
		long.Certificates = append(long.Certificates, good.Certificates[0])
	}
	modulus := new(big.Int).Lsh(big.NewInt(1), 16385)
	large = x509svid.SVID{ID: good.ID, PrivateKey: claimed{&rsa.PublicKey{N: modulus.Add(modulus, big.NewInt(1)), E: 65537}}}
	large.Certificates = []*x509.Certificate{selfSigned(t, big.NewInt(1), sleepID, large.PrivateKey.Public())}
	for _, v := range []*x509svid.SVID{&long, &large} {
		p.owner.Prove(with, asked(t, p.verifier, p.owner, at, question(sleepID)), v)
		if m, ok := await[lease.FromOwner](t, p.verifier.sink).Message.(lease.ProofRefused); !ok || m.Reason != lease.ProofNoSVID {
			t.Fatalf("%+v, want a refusal", m)
		}
	}
	p.owner.Prove(with, asked(t, p.verifier, p.owner, at, question(sleepID)), good)
	if got := answered(t, p.verifier).Checked; got.Refusal != 0 {
		t.Error(got.Refusal)
	}
}
