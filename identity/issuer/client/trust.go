package client

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"os"
	"sync"

	"github.com/spiffe/go-spiffe/v2/bundle/spiffebundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"portcullis/identity/issuer"
)

// trust is the newest bundle that this agent has heard of. bundle is safe for
// concurrent use, for handshakes; the rest is the client's goroutine's.
type trust struct {
	td   spiffeid.TrustDomain
	path string
	seen []byte // the file, when it was last good

	mu     sync.Mutex
	newest *spiffebundle.Bundle // guarded by mu; never changed once it is here
}

func newTrust(td spiffeid.TrustDomain, path string) *trust { return &trust{td: td, path: path} }

// bundle returns the newest bundle, nil if there is none.
func (t *trust) bundle() *spiffebundle.Bundle {
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.newest
}

// readFile takes the file's bundle, if that is newer. An unreadable file takes
// nothing away that is known.
func (t *trust) readFile() error {
	data, err := readBounded(t.path, issuer.MaxAnswer)
	if err != nil {
		return fmt.Errorf("the trust bundle: %w (is the issuer's ConfigMap mounted?)", err)
	}
	if len(data) > 0 && bytes.Equal(data, t.seen) {
		return nil
	}
	if err := t.offer(data); err != nil {
		return fmt.Errorf("the trust bundle in %s: %w", t.path, err)
	}
	t.seen = data
	return nil
}

// offer takes a bundle if it is newer than what is known. One without a sequence
// number is no issuer's, and refused: it could not be told from an old one.
func (t *trust) offer(data []byte) error {
	if len(bytes.TrimSpace(data)) == 0 {
		return errors.New("it is empty: has an issuer run yet?")
	}
	b, err := spiffebundle.Parse(t.td, data)
	if err != nil {
		return err
	}
	n, ok := b.SequenceNumber()
	if !ok || len(b.X509Authorities()) == 0 {
		return errors.New("it has no sequence number, or no authority")
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.newest != nil {
		if have, _ := t.newest.SequenceNumber(); n <= have {
			return nil
		}
	}
	t.newest = b
	return nil
}

// readBounded reads a file of at most limit bytes.
func readBounded(path string, limit int64) ([]byte, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	data, err := io.ReadAll(io.LimitReader(f, limit+1))
	if err == nil && int64(len(data)) > limit {
		err = fmt.Errorf("%s is longer than %d bytes", path, limit)
	}
	return data, err
}
