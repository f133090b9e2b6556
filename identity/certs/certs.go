package certs

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"math/big"
	"net/url"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
)

// Authority is of whom certificates are, and how they are dated.
type Authority struct {
	Organization string        // subject of all of them
	Backdate     time.Duration // by how much a life begins before its making, for clocks that differ
}

// New makes an ECDSA P-256 key and a certificate, signed by itself, that lives for life from now
// and may sign SVIDs of td, but no other authority.
func (a Authority) New(td spiffeid.TrustDomain, name string, life time.Duration, now time.Time) (*x509.Certificate, *ecdsa.PrivateKey, error) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, nil, err
	}
	template := a.template(td.ID(), now, now.Add(life))
	template.Subject.CommonName = name
	template.KeyUsage = x509.KeyUsageCertSign | x509.KeyUsageCRLSign
	template.IsCA, template.MaxPathLenZero = true, true
	der, err := x509.CreateCertificate(rand.Reader, template, template, key.Public(), key)
	if err != nil {
		return nil, nil, err
	}
	cert, err := x509.ParseCertificate(der)
	if err != nil {
		return nil, nil, err
	}
	return cert, key, nil
}

// Sign makes the X.509-SVID (DER) of id for a public key, and tells when it ends:
// after life from now, or with its authority if that is sooner.
func (a Authority) Sign(by *x509.Certificate, key crypto.Signer, public crypto.PublicKey, id spiffeid.ID, life time.Duration, now time.Time) (der []byte, end time.Time, err error) {
	end = now.Add(life)
	if end.After(by.NotAfter) {
		end = by.NotAfter
	}
	template := a.template(id, now, end)
	template.KeyUsage = x509.KeyUsageDigitalSignature
	template.ExtKeyUsage = []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth}
	der, err = x509.CreateCertificate(rand.Reader, template, by, public, key)
	return der, end, err
}

func (a Authority) template(id spiffeid.ID, now, end time.Time) *x509.Certificate {
	return &x509.Certificate{
		SerialNumber:          serial(),
		Subject:               pkix.Name{Organization: []string{a.Organization}},
		NotBefore:             now.Add(-a.Backdate),
		NotAfter:              end,
		BasicConstraintsValid: true,
		URIs:                  []*url.URL{id.URL()},
	}
}

// serial is a random number of 127 bits, above 0 (RFC 5280, section 4.1.2.2).
func serial() *big.Int {
	n, err := rand.Int(rand.Reader, new(big.Int).Lsh(big.NewInt(1), 127))
	if err != nil {
		panic(err) // crypto/rand does not fail
	}
	return n.Add(n, big.NewInt(1))
}
