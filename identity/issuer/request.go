package issuer

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/x509"
)

// requestedKey returns the key of a certificate request, and nothing else of
// it. A request that asks for a name or for anything beyond the key is refused
// and not answered with less: its sender believes something that is not so.
func requestedKey(der []byte) (crypto.PublicKey, error) {
	r, err := x509.ParseCertificateRequest(der)
	if err != nil {
		return nil, refuse(RefusedRequest, "no certificate request in DER: %v", err)
	}
	if err := r.CheckSignature(); err != nil {
		return nil, refuse(RefusedRequest, "its sender does not have the key: %v", err)
	}
	if len(r.Subject.Names) > 0 || len(r.Extensions) > 0 || len(r.URIs)+len(r.DNSNames)+len(r.EmailAddresses)+len(r.IPAddresses) > 0 {
		return nil, refuse(RefusedRequest, "it asks for a name or an extension: the name comes from the token alone")
	}
	key, ok := r.PublicKey.(*ecdsa.PublicKey)
	if !ok || key.Curve != elliptic.P256() {
		return nil, refuse(RefusedRequest, "the key is not ECDSA P-256")
	}
	return key, nil
}
