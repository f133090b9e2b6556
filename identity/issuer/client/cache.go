package client

import (
	"crypto/ecdsa"
	"crypto/x509"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"

	"github.com/spiffe/go-spiffe/v2/bundle/x509bundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"go.uber.org/zap"

	"portcullis/identity/issuer"
)

// kept is the form of the file. It is not encrypted: it lies on a tmpfs, mode
// 0600, and who can read it can read the agent's memory.
type kept struct {
	Key         []byte          `json:"key"`         // PKCS #8
	Certificate []byte          `json:"certificate"` // DER
	Bundle      json.RawMessage `json:"bundle"`
}

// restore takes what an agent before this one kept. Nothing of it is trusted
// further than what an issuer gives: an SVID that is over, or of another name,
// or under no authority that is trusted now, is asked for anew. A file that
// cannot be used is no error: there is an issuer.
func (c *Client) restore() {
	err := c.readKept()
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		c.log.Warn("the SVID that was kept cannot be used", zap.String("file", c.cfg.CacheFile), zap.Error(err))
	}
}

func (c *Client) readKept() error {
	info, err := os.Lstat(c.cfg.CacheFile)
	if err != nil {
		return err
	}
	if !info.Mode().IsRegular() || info.Mode().Perm()&0o077 != 0 {
		return fmt.Errorf("it is open to others, or no file (%s)", info.Mode())
	}
	data, err := readBounded(c.cfg.CacheFile, issuer.MaxAnswer)
	if err != nil {
		return err
	}
	var k kept
	if err := json.Unmarshal(data, &k); err != nil {
		return err
	}
	// The bundle counts by its sequence, whatever becomes of the SVID: the
	// file of the cluster may be older than what was heard since.
	if err := c.trust.offer(k.Bundle); err != nil {
		return err
	}
	c.trust.readFile() //nolint:errcheck // step tells of it
	cert, err := x509.ParseCertificate(k.Certificate)
	if err != nil {
		return err
	}
	parsed, err := x509.ParsePKCS8PrivateKey(k.Key)
	if err != nil {
		return err
	}
	key, ok := parsed.(*ecdsa.PrivateKey)
	if !ok {
		return errors.New("the key is not ECDSA")
	}
	if public, ok := cert.PublicKey.(*ecdsa.PublicKey); !ok || !public.Equal(key.Public()) {
		return errors.New("the key does not belong to the certificate")
	}
	if err := c.verify(cert, c.trust.bundle()); err != nil {
		return err
	}
	c.use(key, cert)
	c.log.Info("took the SVID that was kept", zap.Time("expires", cert.NotAfter))
	return nil
}

// keep writes key, certificate and bundle, whole or not at all. A failure costs
// a restart its SVID, so it is told and no more.
func (c *Client) keep() {
	if err := c.writeKept(); err != nil {
		c.log.Warn("the SVID cannot be kept: after a restart an issuer must answer", zap.String("file", c.cfg.CacheFile), zap.Error(err))
	}
}

func (c *Client) writeKept() error {
	key, err := x509.MarshalPKCS8PrivateKey(c.key)
	if err != nil {
		return err
	}
	bundle, err := c.trust.bundle().Marshal()
	if err != nil {
		return err
	}
	data, err := json.Marshal(kept{Key: key, Certificate: c.cert.Raw, Bundle: bundle})
	if err != nil {
		return err
	}
	if err := os.MkdirAll(filepath.Dir(c.cfg.CacheFile), 0o700); err != nil {
		return err
	}
	fresh := c.cfg.CacheFile + ".new"
	if err := os.Remove(fresh); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	f, err := os.OpenFile(fresh, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return err
	}
	_, err = f.Write(data)
	if err := errors.Join(err, f.Close()); err != nil {
		return err
	}
	return os.Rename(fresh, c.cfg.CacheFile)
}

// newestBundle gives TLS the newest bundle at each handshake.
type newestBundle struct{ t *trust }

// GetX509BundleForTrustDomain implements x509bundle.Source.
func (n newestBundle) GetX509BundleForTrustDomain(td spiffeid.TrustDomain) (*x509bundle.Bundle, error) {
	b := n.t.bundle()
	if b == nil {
		return nil, fmt.Errorf("no trust bundle of %s", td)
	}
	return b.GetX509BundleForTrustDomain(td)
}
