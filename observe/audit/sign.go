package audit

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/rand"
	"crypto/rsa"
	"crypto/sha256"
	"crypto/x509"
	"errors"
	"fmt"

	"github.com/spiffe/go-spiffe/v2/bundle/x509bundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/svid/x509svid"

	"portcullis/identity"
)

// Signer gives the agent's current SVID, an error when there is none that can
// be used. Safe for concurrent use.
type Signer interface {
	GetX509SVID() (*x509svid.SVID, error)
}

var errNoSigner = errors.New("no SVID is configured")

// sign fills in the checkpoint of a record whose number, time and previous hash
// are set.
func sign(s Signer, r *Record, why string) error {
	if s == nil {
		return errNoSigner
	}
	svid, err := s.GetX509SVID()
	if err != nil {
		return err
	}
	c := &Checkpoint{Why: why}
	for _, cert := range svid.Certificates {
		c.Certificates = append(c.Certificates, cert.Raw)
	}
	r.Checkpoint = c
	statement := Statement(r)
	var hash crypto.Hash
	if _, pure := svid.PrivateKey.Public().(ed25519.PublicKey); !pure {
		sum := sha256.Sum256(statement)
		statement, hash = sum[:], crypto.SHA256
	}
	if c.Signature, err = svid.PrivateKey.Sign(rand.Reader, statement, hash); err != nil {
		return err
	}
	return nil
}

// judge checks a checkpoint: that its certificates lead to one of roots at the
// time that it states, that they are those of the node's agent, and that the
// key in them signed the record's place in the chain. It returns the trust
// domain.
func judge(r *Record, roots []*x509.Certificate) (td spiffeid.TrustDomain, err error) {
	c := r.Checkpoint
	if c == nil {
		return td, errors.New("it has no signature")
	}
	// The signature is not over the whole line: nothing else may be in it.
	bare := Record{Sequence: r.Sequence, Time: r.Time, Node: r.Node, Kind: r.Kind, Checkpoint: c, Previous: r.Previous}
	if _, err := bare.seal(); err != nil || bare.Hash != r.Hash {
		return td, errors.New("there is more in it than belongs into a checkpoint")
	}
	var certs []*x509.Certificate
	for _, der := range c.Certificates {
		cert, err := x509.ParseCertificate(der)
		if err != nil {
			return td, fmt.Errorf("certificate: %w", err)
		}
		certs = append(certs, cert)
	}
	if len(certs) == 0 {
		return td, errors.New("it has no certificate")
	}
	id, err := x509svid.IDFromCert(certs[0])
	if err != nil {
		return td, err
	}
	td = id.TrustDomain()
	if _, _, err := x509svid.Verify(certs, x509bundle.FromX509Authorities(td, roots), x509svid.WithTime(r.Time)); err != nil {
		return td, err
	}
	if id.Path() != identity.AgentSPIFFEPath(r.Node) {
		return td, fmt.Errorf("it was signed as %s, which is not the agent of node %s", id, r.Node)
	}
	algorithm := x509.SHA256WithRSA
	switch certs[0].PublicKey.(type) {
	case *ecdsa.PublicKey:
		algorithm = x509.ECDSAWithSHA256
	case ed25519.PublicKey:
		algorithm = x509.PureEd25519
	case *rsa.PublicKey:
	}
	if err := certs[0].CheckSignature(algorithm, Statement(r), c.Signature); err != nil {
		return td, fmt.Errorf("the signature is not over this record's place in the log: %w", err)
	}
	return td, nil
}
