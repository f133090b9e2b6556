package svid

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"
	"sync"
	"time"

	"github.com/spiffe/go-spiffe/v2/bundle/spiffebundle"
	"github.com/spiffe/go-spiffe/v2/bundle/x509bundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"go.uber.org/zap"
)

// ErrNotFederated: nothing vouches for IDs of that trust domain.
var ErrNotFederated = errors.New("there is no bundle of that trust domain: give one with --federated-bundle TRUST-DOMAIN=FILE, or federate the SPIRE servers (federatesWith of the agent's entry)")

// TrustConfig says by what workloads' SVIDs are verified.
type TrustConfig struct {
	// Own is this node's trust domain.
	Own spiffeid.TrustDomain
	// Agent is the source of the agent's own SVID. Its bundle of Own counts, and
	// of other trust domains what it gives, unless there is a file.
	Agent interface {
		x509bundle.Source
		Changed() <-chan struct{}
	}
	// OwnFile has authorities of workloads' SVIDs of Own that may not sign those
	// of agents, as a cert-manager's beside a portcullis issuer; empty: none.
	OwnFile string
	// Files have the bundles of other trust domains, each for its own.
	Files map[spiffeid.TrustDomain]string
	// Log may be nil.
	Log *zap.Logger
}

// Bundles implements Trust. A bundle vouches for IDs of its own trust domain and
// for no others: whoever verifies asks for the bundle of the trust domain that
// stands in the certificate. Agents' own certificates are not verified by it.
//
// Files are PEM certificates, or a bundle in the SPIFFE format. They are read
// again when they change. What cannot be read as a bundle is not used, and Problem
// tells of it: what was read before stands. A file that is gone ends the trust.
type Bundles struct {
	cfg  TrustConfig
	poll time.Duration

	mu      sync.Mutex
	files   map[spiffeid.TrustDomain]*bundleFile // guarded by mu; of OwnFile under Own
	changed chan struct{}                        // guarded by mu; closed and replaced at each change
}

var _ Trust = (*Bundles)(nil)

// bundleFile is what is known of one file. Immutable.
type bundleFile struct {
	path   string
	data   []byte
	bundle *x509bundle.Bundle // nil: none
	err    error
}

// NewBundles reads the files for the first time. What is wrong with them is told
// by Problem: an agent starts without a partner.
func NewBundles(cfg TrustConfig) (*Bundles, error) {
	if cfg.Own.IsZero() || cfg.Agent == nil {
		return nil, errors.New("svid: TrustConfig.Own and Agent are required")
	}
	if _, there := cfg.Files[cfg.Own]; there {
		return nil, fmt.Errorf("a federated bundle of %s, which is this agent's own trust domain: its bundle comes with the agent's SVID", cfg.Own)
	}
	if cfg.Log == nil {
		cfg.Log = zap.NewNop()
	}
	b := &Bundles{cfg: cfg, poll: pollFiles, files: map[spiffeid.TrustDomain]*bundleFile{}, changed: make(chan struct{})}
	for td, path := range cfg.Files {
		b.files[td] = &bundleFile{path: path}
	}
	if cfg.OwnFile != "" {
		b.files[cfg.Own] = &bundleFile{path: cfg.OwnFile}
	}
	b.read()
	return b, nil
}

// Changed implements Trust.
func (b *Bundles) Changed() <-chan struct{} {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.changed
}

// GetX509BundleForTrustDomain implements Trust.
func (b *Bundles) GetX509BundleForTrustDomain(td spiffeid.TrustDomain) (*x509bundle.Bundle, error) {
	b.mu.Lock()
	file := b.files[td]
	b.mu.Unlock()
	switch {
	case td == b.cfg.Own:
		bundle, err := b.cfg.Agent.GetX509BundleForTrustDomain(td)
		if err != nil || file == nil || file.bundle == nil {
			return bundle, err
		}
		bundle = bundle.Clone()
		for _, a := range file.bundle.X509Authorities() {
			bundle.AddX509Authority(a)
		}
		return bundle, nil
	case file != nil && file.bundle != nil:
		return file.bundle, nil
	case file != nil:
		// No other place is asked: the file was to say who is trusted.
		return nil, fmt.Errorf("bundle of %s: %w", td, file.err)
	}
	bundle, err := b.cfg.Agent.GetX509BundleForTrustDomain(td)
	if err != nil {
		return nil, fmt.Errorf("bundle of %s: %w (%w)", td, ErrNotFederated, err)
	}
	return bundle, nil
}

// Federated returns the trust domains of the files, sorted.
func (b *Bundles) Federated() []spiffeid.TrustDomain {
	return slices.SortedFunc(maps.Keys(b.cfg.Files), spiffeid.TrustDomain.Compare)
}

// Problem returns what is wrong with the files, nil if nothing is.
func (b *Bundles) Problem() error {
	b.mu.Lock()
	defer b.mu.Unlock()
	var errs []error
	for _, td := range slices.SortedFunc(maps.Keys(b.files), spiffeid.TrustDomain.Compare) {
		if f := b.files[td]; f.err != nil {
			errs = append(errs, fmt.Errorf("the bundle of %s: %w", td, f.err))
		}
	}
	return errors.Join(errs...)
}

// Run reads the files again as they change, until ctx ends; then it returns nil.
func (b *Bundles) Run(ctx context.Context) error {
	timer := time.NewTicker(b.poll)
	defer timer.Stop()
	changed := b.cfg.Agent.Changed()
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-changed:
			changed = b.cfg.Agent.Changed()
			b.mu.Lock()
			b.notify()
			b.mu.Unlock()
		case <-timer.C:
			b.read()
		}
	}
}

func (b *Bundles) notify() { // mu is held
	close(b.changed)
	b.changed = make(chan struct{})
}

// read looks at every file. Only NewBundles and Run call it.
func (b *Bundles) read() {
	b.mu.Lock()
	files := maps.Clone(b.files)
	b.mu.Unlock()
	for td, old := range files {
		next := old.readAgain(td)
		if next == old {
			continue
		}
		b.mu.Lock()
		b.files[td] = next
		b.notify()
		b.mu.Unlock()
		if next.err != nil {
			b.cfg.Log.Error("a trust bundle cannot be read", zap.Stringer("trust_domain", td), zap.String("file", next.path), zap.Bool("former_stands", next.bundle != nil), zap.Error(next.err))
		} else {
			b.cfg.Log.Info("a trust bundle was read", zap.Stringer("trust_domain", td), zap.String("file", next.path), zap.Int("authorities", len(next.bundle.X509Authorities())))
		}
	}
}

// readAgain returns f if nothing has changed.
func (f *bundleFile) readAgain(td spiffeid.TrustDomain) *bundleFile {
	data, err := readFile(f.path)
	switch {
	case err != nil && f.err != nil && f.err.Error() == err.Error():
		return f
	case err != nil:
		// Trust that cannot be read any more is none.
		return &bundleFile{path: f.path, err: err}
	case f.data != nil && bytes.Equal(data, f.data):
		return f
	}
	next := &bundleFile{path: f.path, data: data}
	if next.bundle, next.err = parseBundle(td, data); next.err != nil {
		next.bundle = f.bundle // it may be half written
	}
	return next
}

// parseBundle reads PEM certificates, or a bundle in the SPIFFE format.
func parseBundle(td spiffeid.TrustDomain, data []byte) (*x509bundle.Bundle, error) {
	if bytes.HasPrefix(bytes.TrimSpace(data), []byte("{")) {
		bundle, err := spiffebundle.Parse(td, data)
		if err != nil {
			return nil, err
		}
		if len(bundle.X509Authorities()) == 0 {
			return nil, errors.New("there is no X.509 authority in it")
		}
		return bundle.X509Bundle(), nil
	}
	certs, err := parseCertificates(data)
	if err != nil {
		return nil, err
	}
	for _, c := range certs {
		if !c.IsCA {
			return nil, fmt.Errorf("the certificate of %q is no authority's", c.Subject)
		}
	}
	return x509bundle.FromX509Authorities(td, certs), nil
}
