package svid

import (
	"bytes"
	"context"
	"crypto/sha256"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"time"

	"github.com/spiffe/go-spiffe/v2/bundle/x509bundle"
	"github.com/spiffe/go-spiffe/v2/svid/x509svid"
	"github.com/spiffe/go-spiffe/v2/workloadapi"
)

// Bounds of a directory of PEM files.
const (
	pollFiles   = 2 * time.Second
	maxFileSize = 1 << 20
	maxSets     = 4096 // SVIDs in one directory
)

// fileNames are the names under which certificate, key and bundle lie side by
// side: cert-manager's, and spiffe-helper's.
var fileNames = [][3]string{
	{"tls.crt", "tls.key", "ca.crt"},
	{"svid.pem", "svid_key.pem", "svid_bundle.pem"},
}

// directory is the provider that reads PEM files.
type directory struct {
	path string
	poll time.Duration
}

// Directory returns the SVIDs that somebody keeps as PEM files in a directory and
// in its direct subdirectories, one in each: tls.crt, tls.key and ca.crt as
// cert-manager writes them, or svid.pem, svid_key.pem and svid_bundle.pem as
// spiffe-helper does by default. They are read again when they change, within
// some seconds. path is absolute.
func Directory(path string) (Provider, error) {
	if !filepath.IsAbs(path) {
		return nil, fmt.Errorf("the directory of SVIDs %q: want an absolute path", path)
	}
	return &directory{path: path, poll: pollFiles}, nil
}

// Kind implements Provider.
func (*directory) Kind() string { return "svid-directory" }

// String implements Provider.
func (d *directory) String() string { return d.path }

// WatchX509Context implements Provider. It ends with ctx only.
func (d *directory) WatchX509Context(ctx context.Context, w workloadapi.X509ContextWatcher) error {
	var seen [sha256.Size]byte
	again := true // also when it is the same: the first time, and after a failure
	for ctx.Err() == nil {
		found, sum, err := d.read()
		if err != nil {
			// Files that do not fit together are being replaced, or wrong:
			// what was read before stands until its end.
			w.OnX509ContextWatchError(err)
		}
		if len(found.SVIDs) > 0 && (again || sum != seen) {
			seen = sum
			w.OnX509ContextUpdate(found)
		}
		again = err != nil
		pause(ctx, d.poll)
	}
	return ctx.Err()
}

// read returns every SVID of the directory that is whole, a checksum of what it
// is made of, and what is wrong with the others.
func (d *directory) read() (*workloadapi.X509Context, [sha256.Size]byte, error) {
	found := &workloadapi.X509Context{Bundles: x509bundle.NewSet()}
	hash := sha256.New()
	var errs []error
	entries, err := os.ReadDir(d.path)
	if err != nil {
		return found, [sha256.Size]byte{}, err
	}
	places := []string{d.path}
	for _, e := range entries {
		// A directory beginning with two dots is the kubelet's own way to
		// replace all files at once; the names beside it lead into it.
		if path := filepath.Join(d.path, e.Name()); isDirectory(path) && e.Name()[0] != '.' {
			places = append(places, path)
		}
	}
	if len(places) > maxSets {
		return found, [sha256.Size]byte{}, fmt.Errorf("%s has more than %d directories", d.path, maxSets)
	}
	for _, place := range places {
		set, err := readSet(place)
		switch {
		case errors.Is(err, fs.ErrNotExist):
			continue // no SVID here
		case err != nil:
			errs = append(errs, fmt.Errorf("the SVID in %s: %w", place, err))
			continue
		}
		found.SVIDs = append(found.SVIDs, set.svid)
		bundle := set.bundle
		if other, ok := found.Bundles.Get(set.svid.ID.TrustDomain()); ok {
			bundle = bundle.Clone()
			for _, a := range other.X509Authorities() {
				bundle.AddX509Authority(a)
			}
		}
		found.Bundles.Add(bundle)
		hash.Write(set.sum[:])
	}
	if len(found.SVIDs) == 0 && len(errs) == 0 {
		errs = append(errs, fmt.Errorf("there is no SVID in %s: want %s, or %s", d.path, fileNames[0], fileNames[1]))
	}
	return found, [sha256.Size]byte(hash.Sum(nil)), errors.Join(errs...)
}

func isDirectory(path string) bool {
	info, err := os.Stat(path) // a link counts as what it leads to
	return err == nil && info.IsDir()
}

// pemSet is what lies in one place.
type pemSet struct {
	svid   *x509svid.SVID
	bundle *x509bundle.Bundle // of the SVID's own trust domain
	sum    [sha256.Size]byte
}

// readSet reads certificate, key and bundle from a directory. The error is
// fs.ErrNotExist if no certificate is there.
func readSet(dir string) (set pemSet, err error) {
	for _, names := range fileNames {
		cert, err := readFile(filepath.Join(dir, names[0]))
		if errors.Is(err, fs.ErrNotExist) {
			continue
		}
		key, keyErr := readFile(filepath.Join(dir, names[1]))
		roots, rootsErr := readFile(filepath.Join(dir, names[2]))
		for _, err := range []error{err, keyErr, rootsErr} {
			if err != nil {
				return set, fmt.Errorf("%v", err) // not ErrNotExist: the certificate is there
			}
		}
		// Parse checks that key and certificate belong together.
		if set.svid, err = x509svid.Parse(cert, key); err != nil {
			return set, err
		}
		authorities, err := parseCertificates(roots)
		if err != nil {
			return set, fmt.Errorf("%s: %w", names[2], err)
		}
		td := set.svid.ID.TrustDomain()
		set.bundle = x509bundle.FromX509Authorities(td, authorities)
		// Files are replaced one by one. Nothing is believed of a set that does
		// not hold together; whether it is over is asked when it is used.
		var invalid x509.CertificateInvalidError
		if _, _, err := x509svid.Verify(set.svid.Certificates, set.bundle); err != nil && !(errors.As(err, &invalid) && invalid.Reason == x509.Expired) {
			return set, err
		}
		set.sum = sha256.Sum256(bytes.Join([][]byte{cert, key, roots}, []byte{0}))
		return set, nil
	}
	return set, fs.ErrNotExist
}

func readFile(path string) ([]byte, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	data, err := io.ReadAll(io.LimitReader(f, maxFileSize+1))
	if err == nil && len(data) > maxFileSize {
		err = fmt.Errorf("%s is longer than %d bytes", path, maxFileSize)
	}
	return data, err
}

// parseCertificates reads PEM certificates, and nothing else is among them.
func parseCertificates(data []byte) (out []*x509.Certificate, err error) {
	for {
		var block *pem.Block
		if block, data = pem.Decode(data); block == nil {
			break
		}
		if block.Type != "CERTIFICATE" {
			return nil, fmt.Errorf("there is a %s among the certificates", block.Type)
		}
		cert, err := x509.ParseCertificate(block.Bytes)
		if err != nil {
			return nil, err
		}
		out = append(out, cert)
	}
	if len(out) == 0 {
		return nil, errors.New("there is no certificate in it")
	}
	return out, nil
}
