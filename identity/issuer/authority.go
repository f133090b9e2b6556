package issuer

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/x509"
	"errors"
	"fmt"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"portcullis/identity/certs"
)

// making is backdated: clocks of nodes differ, and a certificate that is not valid yet
// opens no session.
var making = certs.Authority{Organization: "Portcullis", Backdate: time.Minute}

// authority is a certificate that signs SVIDs, with its key and its times. A
// value once made is never changed; the keyring replaces it.
type authority struct {
	cert *x509.Certificate
	key  *ecdsa.PrivateKey // nil: retired, the key is gone

	published time.Time // when every agent that asks could learn of it; zero: not yet
	active    time.Time // when it began to sign; zero: not yet
	retired   time.Time // when it ceased to; zero: not yet
}

func (a authority) state() string {
	switch {
	case !a.retired.IsZero():
		return "retired"
	case !a.active.IsZero():
		return "signing"
	}
	return "next"
}

// newAuthority makes a key and a certificate that lives for life from now.
func newAuthority(td spiffeid.TrustDomain, life time.Duration, now time.Time) (authority, error) {
	cert, key, err := making.New(td, td.Name()+" node SVIDs", life, now)
	if err != nil {
		return authority{}, err
	}
	return authority{cert: cert, key: key}, nil
}

// check tells what is wrong with an authority that was read from outside.
func (a authority) check(td spiffeid.TrustDomain) error {
	public, ok := a.cert.PublicKey.(*ecdsa.PublicKey)
	switch {
	case !ok || public.Curve != elliptic.P256():
		return errors.New("an authority's key is not ECDSA P-256")
	case !a.cert.IsCA:
		return errors.New("a certificate may not sign others")
	case len(a.cert.URIs) != 1 || a.cert.URIs[0].String() != td.IDString():
		return fmt.Errorf("an authority is of another trust domain (%v)", a.cert.URIs)
	case a.key != nil && !public.Equal(a.key.Public()):
		return errors.New("a key does not belong to its certificate")
	case a.key != nil && !a.retired.IsZero():
		return errors.New("a retired authority has a key")
	case a.key == nil && a.retired.IsZero():
		return errors.New("an authority has no key")
	}
	return nil
}

// sign makes a certificate for a key, that ends after life, or with the
// authority if that is sooner.
func (a authority) sign(public crypto.PublicKey, id spiffeid.ID, life time.Duration, now time.Time) ([]byte, error) {
	der, _, err := making.Sign(a.cert, a.key, public, id, life, now)
	return der, err
}
