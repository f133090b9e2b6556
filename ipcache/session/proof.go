package session

import (
	"bytes"
	"crypto"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/rand"
	"crypto/rsa"
	_ "crypto/sha256" // the hashes below
	_ "crypto/sha512"
	"crypto/tls"
	"crypto/x509"
	"encoding/binary"
	"errors"
	"fmt"
	"slices"
	"time"

	"github.com/spiffe/go-spiffe/v2/bundle/x509bundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/svid/x509svid"

	"portcullis/identity"
	"portcullis/ipcache/lease"
)

/*
A proof is made in the session, and for it alone. What is signed with the
workload's key:

	64 x 0x20 | "portcullis proof v1" | 0        as TLS 1.3 begins what it signs: no
	                                             signature serves both
	exporter of the session's TLS connection     both ends of it and nobody else have
	                                             it, so nobody can hand a proof on
	owner | verifier                             names of the nodes
	IP | generation | UID | SPIFFE ID | nonce    as the verifier asked

Each part of variable length has its length before it.
*/
const (
	exporterLabel = "EXPORTER-portcullis-proof-v1"
	exporterBytes = 32
	proofContext  = "portcullis proof v1"
)

// proofExporter is the session's part of every proof in it.
func proofExporter(state *tls.ConnectionState) ([]byte, error) {
	return state.ExportKeyingMaterial(exporterLabel, nil, exporterBytes)
}

// proofText is what is signed.
func proofText(exporter []byte, owner, verifier identity.NodeName, m *lease.Proof) []byte {
	b := bytes.Repeat([]byte{0x20}, 64)
	b = append(append(b, proofContext...), 0)
	part := func(p []byte) { b = append(binary.BigEndian.AppendUint32(b, uint32(len(p))), p...) }
	part(exporter)
	part([]byte(owner))
	part([]byte(verifier))
	part(m.IP.AsSlice())
	b = binary.BigEndian.AppendUint64(b, uint64(m.Generation))
	b = append(b, m.UID[:]...)
	part([]byte(m.SPIFFEID))
	return append(b, m.Nonce[:]...)
}

// errKey: neither ECDSA on a NIST curve, nor Ed25519, nor RSA.
var errKey = errors.New("a workload's key must be ECDSA (P-256, P-384, P-521), Ed25519 or RSA")

// proofHash is the hash that goes with a public key; 0: the text itself is signed.
func proofHash(public crypto.PublicKey) (crypto.Hash, error) {
	switch k := public.(type) {
	case *ecdsa.PublicKey:
		switch k.Curve.Params().BitSize {
		case 256:
			return crypto.SHA256, nil
		case 384:
			return crypto.SHA384, nil
		case 521:
			return crypto.SHA512, nil
		}
	case ed25519.PublicKey:
		return 0, nil
	case *rsa.PublicKey:
		return crypto.SHA256, nil
	}
	return 0, errKey
}

func digest(h crypto.Hash, text []byte) []byte {
	if h == 0 {
		return text
	}
	d := h.New()
	d.Write(text)
	return d.Sum(nil)
}

// errTooLarge: certificates beyond the bounds of limits.go.
var errTooLarge = errors.New("the workload has too many certificates for a proof, or too large ones")

// bounded tells whether a chain has a size that is listened to.
func bounded(chain [][]byte) bool {
	bytes := 0
	for _, c := range chain {
		bytes += len(c)
	}
	return len(chain) >= 1 && len(chain) <= maxChain && bytes <= maxChainBytes
}

// signProof answers a question with the workload's SVID.
func signProof(exporter []byte, owner, verifier identity.NodeName, q lease.Prove, svid *x509svid.SVID) (lease.Proof, error) {
	m := lease.Proof{ID: q.ID, IP: q.IP, Generation: q.Generation, UID: q.UID, SPIFFEID: q.SPIFFEID, Nonce: q.Nonce}
	for _, c := range svid.Certificates {
		m.Chain = append(m.Chain, c.Raw)
	}
	if !bounded(m.Chain) || !affordable(svid.Certificates) {
		return m, errTooLarge // who is sent it all the same ends the session
	}
	h, err := proofHash(svid.PrivateKey.Public())
	if err != nil {
		return m, err
	}
	var opts crypto.SignerOpts = h
	if _, ok := svid.PrivateKey.Public().(*rsa.PublicKey); ok {
		opts = &rsa.PSSOptions{SaltLength: rsa.PSSSaltLengthEqualsHash, Hash: h}
	}
	m.Signature, err = svid.PrivateKey.Sign(rand.Reader, digest(h, proofText(exporter, owner, verifier, &m)), opts)
	return m, err
}

func signatureHolds(public crypto.PublicKey, text, signature []byte) bool {
	h, err := proofHash(public)
	if err != nil {
		return false
	}
	switch k := public.(type) {
	case *ecdsa.PublicKey:
		return ecdsa.VerifyASN1(k, digest(h, text), signature)
	case ed25519.PublicKey:
		return ed25519.Verify(k, text, signature)
	case *rsa.PublicKey:
		return rsa.VerifyPSS(k, h, digest(h, text), signature, &rsa.PSSOptions{SaltLength: rsa.PSSSaltLengthEqualsHash, Hash: h}) == nil
	}
	return false
}

// checkProof says what a proof's certificates and signature show. Whatever is
// wrong is a refusal: only a proof in which all holds has none. The expiry is
// looked at here, by this node's wall clock, before anybody else's opinion.
func checkProof(exporter []byte, owner, verifier identity.NodeName, m *lease.Proof, trust x509bundle.Source, now time.Time) (c lease.Checked) {
	refuse := func(r lease.ProofRefusal) lease.Checked { c.Refusal = r; return c }
	var chain []*x509.Certificate
	for _, der := range m.Chain {
		cert, err := x509.ParseCertificate(der)
		if err != nil {
			return refuse(lease.ProofUntrusted)
		}
		chain = append(chain, cert)
	}
	if len(chain) == 0 {
		return refuse(lease.ProofUntrusted)
	}
	leaf := chain[0]
	c.Serial, c.Issuer = brief(leaf.SerialNumber.Text(16)), brief(leaf.Issuer.String())
	id, err := x509svid.IDFromCert(leaf)
	if err != nil {
		return refuse(lease.ProofWrongID)
	}
	if c.SPIFFEID = id.String(); len(c.SPIFFEID) > maxSPIFFEID {
		c.SPIFFEID = brief(c.SPIFFEID) // it goes into logs
		return refuse(lease.ProofWrongID)
	}
	asked, err := spiffeid.FromString(m.SPIFFEID)
	switch {
	case err != nil:
		return refuse(lease.ProofWrongID)
	case asked.TrustDomain() != id.TrustDomain():
		return refuse(lease.ProofWrongTrustDomain)
	case asked != id:
		return refuse(lease.ProofWrongID)
	}
	if r := inLife(chain, now); r != 0 {
		return refuse(r)
	}
	if !affordable(chain) {
		return refuse(lease.ProofUntrusted)
	}
	// Before the chain: a signature costs less, and of another's session none holds.
	if !signatureHolds(leaf.PublicKey, proofText(exporter, owner, verifier, m), m.Signature) {
		return refuse(lease.ProofRelayed)
	}
	valid, r := vouched(chain, id, trust, now)
	if r != 0 {
		return refuse(r)
	}
	c.Valid = valid
	return c
}

// affordable tells whether no key of the chain takes unduly long to verify with:
// the owner chooses them all, and how often it answers. (TLS has the same bound.)
func affordable(chain []*x509.Certificate) bool {
	return !slices.ContainsFunc(chain, func(c *x509.Certificate) bool {
		k, isRSA := c.PublicKey.(*rsa.PublicKey)
		return isRSA && k.N.BitLen() > maxRSABits
	})
}

func inLife(chain []*x509.Certificate, now time.Time) lease.ProofRefusal {
	for _, cert := range chain {
		if !now.Before(cert.NotAfter) {
			return lease.ProofExpired
		}
		if now.Before(cert.NotBefore) {
			return lease.ProofNotYetValid
		}
	}
	return 0
}

// vouched returns for how long the bundle of the ID's own trust domain, and no
// other, vouches for a chain (federation).
func vouched(chain []*x509.Certificate, id spiffeid.ID, trust x509bundle.Source, now time.Time) (time.Duration, lease.ProofRefusal) {
	if trust == nil {
		return 0, lease.ProofWrongTrustDomain
	}
	bundle, err := trust.GetX509BundleForTrustDomain(id.TrustDomain())
	if err != nil || bundle.TrustDomain() != id.TrustDomain() {
		return 0, lease.ProofWrongTrustDomain
	}
	got, chains, err := x509svid.Verify(chain, bundle, x509svid.WithTime(now))
	var invalid x509.CertificateInvalidError
	switch {
	case errors.As(err, &invalid) && invalid.Reason == x509.Expired:
		return 0, lease.ProofExpired
	case err != nil || got != id:
		return 0, lease.ProofUntrusted
	}
	var end time.Time // valid as long as one chain is
	for _, chain := range chains {
		if e := chainEnd(chain); e.After(end) {
			end = e
		}
	}
	return min(end.Sub(now), lease.MaxProof), 0
}

// CheckSVID says for how long an SVID of this node's own counts, and if it does
// not, why: as a verifier elsewhere would.
func CheckSVID(v *x509svid.SVID, trust x509bundle.Source, now time.Time) (time.Duration, lease.ProofRefusal) {
	if r := inLife(v.Certificates, now); r != 0 {
		return 0, r
	}
	return vouched(v.Certificates, v.ID, trust, now)
}

// Prove answers a verifier's question with a workload's SVID: it is signed for
// this session when its turn to be sent comes. As SendToVerifier.
func (t *Transport) Prove(id lease.StreamID, q lease.Prove, svid *x509svid.SVID) {
	t.enqueue(id, RoleOwner, queued{message: lease.Proof{ID: q.ID}, prove: q, svid: svid})
}

// sign makes the proof that is queued. What cannot be signed with is no SVID.
func (s *stream) sign(node identity.NodeName, q queued) (lease.Message, error) {
	exporter, err := proofExporter(&s.auth.State)
	if err != nil {
		return nil, fmt.Errorf("session: the TLS exporter: %w", err)
	}
	m, err := signProof(exporter, node, s.auth.node, q.prove, q.svid)
	if err != nil {
		return lease.ProofRefused{ID: q.prove.ID, IP: q.prove.IP, Reason: lease.ProofNoSVID}, nil //nolint:nilerr // the verifier is told
	}
	return m, nil
}

// errUnasked: who sends more proofs than it was asked for has this node verify
// them for nothing.
var errUnasked = errors.New("a proof that was not asked for")

// checked looks at what an owner proves. It costs some hundred microseconds, in
// the stream's own goroutine.
func (t *Transport) checked(s *stream, m lease.Message) (lease.Message, error) {
	switch m := m.(type) {
	case lease.ProofRefused:
		s.proves.Add(-1)
		return m, nil
	case lease.Proof:
		if s.proves.Add(-1) < 0 {
			return nil, errUnasked
		}
		exporter, err := proofExporter(&s.auth.State)
		if err != nil {
			return nil, fmt.Errorf("session: the TLS exporter: %w", err)
		}
		m.Checked = checkProof(exporter, s.auth.node, t.cfg.Node, &m, t.cfg.Trust, time.Now().Round(0))
		return m, nil
	default:
		return m, nil
	}
}
