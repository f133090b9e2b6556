package labca

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"io/fs"
	"net/url"
	"os"
	"path/filepath"
	"slices"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"portcullis/identity/certs"
)

const authorityLife = 365 * 24 * time.Hour

// making allows for the whole seconds in certificates. The lab is one machine: there
// is no difference between clocks to allow for.
var making = certs.Authority{Organization: "Portcullis lab", Backdate: time.Second}

// authority is the key that signs, and every certificate that is trusted.
// Immutable.
type authority struct {
	td      spiffeid.TrustDomain
	key     crypto.Signer
	cert    *x509.Certificate
	trusted []*x509.Certificate // cert is the first
}

// newAuthority makes a key. older stay trusted beside it.
func newAuthority(td spiffeid.TrustDomain, older []*x509.Certificate) (*authority, error) {
	cert, key, err := making.New(td, td.Name()+" (a lab: trust it nowhere else)", authorityLife, time.Now())
	if err != nil {
		return nil, err
	}
	return &authority{td: td, key: key, cert: cert, trusted: append([]*x509.Certificate{cert}, older...)}, nil
}

// issued is one SVID in the form in which the Workload API gives it.
type issued struct {
	id        spiffeid.ID
	cert, key []byte // DER; the key in PKCS #8
	renew     time.Time
	end       time.Time
}

// issue makes an SVID that lives for ttl from now.
func (a *authority) issue(id spiffeid.ID, ttl time.Duration) (*issued, error) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, err
	}
	now := time.Now()
	der, end, err := making.Sign(a.cert, a.key, key.Public(), id, ttl, now)
	if err != nil {
		return nil, err
	}
	keyDER, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		return nil, err
	}
	// Renewed at half-life, less a twentieth: whoever alarms at one half must
	// not see an SVID that is about to be renewed.
	life := end.Sub(now)
	return &issued{id: id, cert: der, key: keyDER, renew: now.Add(life/2 - life/20), end: end}, nil
}

// bundle returns the trusted certificates as the Workload API wants them.
func (a *authority) bundle() []byte {
	var der []byte
	for _, c := range a.trusted {
		der = append(der, c.Raw...)
	}
	return der
}

// authorityFile holds the key and all trusted certificates.
const authorityFile = "authority.pem"

// loadAuthority reads the lab's authority; the error wraps fs.ErrNotExist if
// there is none yet.
func loadAuthority(dir string, td spiffeid.TrustDomain) (*authority, error) {
	path := filepath.Join(dir, authorityFile)
	data, err := os.ReadFile(path)
	if err != nil {
		return nil, fmt.Errorf("the lab's authority: %w", err)
	}
	a := &authority{td: td}
	for {
		var block *pem.Block
		if block, data = pem.Decode(data); block == nil {
			break
		}
		switch block.Type {
		case "PRIVATE KEY":
			key, err := x509.ParsePKCS8PrivateKey(block.Bytes)
			if err != nil {
				return nil, damaged(path, err)
			}
			signer, ok := key.(*ecdsa.PrivateKey)
			if !ok {
				return nil, damaged(path, errors.New("the key is not ECDSA"))
			}
			a.key = signer
		case "CERTIFICATE":
			cert, err := x509.ParseCertificate(block.Bytes)
			if err != nil {
				return nil, damaged(path, err)
			}
			a.trusted = append(a.trusted, cert)
		}
	}
	if a.key == nil || len(a.trusted) == 0 {
		return nil, damaged(path, errors.New("the key or the certificate is missing"))
	}
	a.cert = a.trusted[0]
	if public, ok := a.cert.PublicKey.(*ecdsa.PublicKey); !ok || !public.Equal(a.key.Public()) {
		return nil, damaged(path, errors.New("the key does not belong to the certificate"))
	}
	if !slices.ContainsFunc(a.cert.URIs, func(u *url.URL) bool { return u.String() == td.IDString() }) {
		return nil, fmt.Errorf("the lab's authority in %s is of another trust domain (%v): give that one, or remove the file", path, a.cert.URIs)
	}
	if time.Until(a.cert.NotAfter) < time.Hour {
		return nil, fmt.Errorf("the lab's authority in %s ends at %s: remove the file for a new one", path, a.cert.NotAfter.Format(time.RFC3339))
	}
	return a, nil
}

func damaged(path string, err error) error {
	return fmt.Errorf("the lab's authority in %s is damaged (remove the file for a new one): %w", path, err)
}

// save writes the authority's file, whole or not at all.
func (a *authority) save(dir string) error {
	key, err := x509.MarshalPKCS8PrivateKey(a.key)
	if err != nil {
		return err
	}
	out := pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: key})
	for _, c := range a.trusted {
		out = append(out, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: c.Raw})...)
	}
	path := filepath.Join(dir, authorityFile)
	if err := os.WriteFile(path+".new", out, 0o600); err != nil {
		return fmt.Errorf("the lab's authority: %w", err)
	}
	if err := os.Rename(path+".new", path); err != nil {
		return fmt.Errorf("the lab's authority: %w", err)
	}
	return nil
}

// openAuthority loads the lab's authority, or makes it.
func openAuthority(dir string, td spiffeid.TrustDomain) (*authority, error) {
	a, err := loadAuthority(dir, td)
	if !errors.Is(err, fs.ErrNotExist) {
		return a, err
	}
	if a, err = newAuthority(td, nil); err != nil {
		return nil, err
	}
	return a, a.save(dir)
}
