package svid

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"time"

	"github.com/spiffe/go-spiffe/v2/bundle/x509bundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/svid/x509svid"
	"github.com/spiffe/go-spiffe/v2/workloadapi"
	"go.uber.org/zap"
)

// Errors of a Source. Callers may match them; the text around them says more.
var (
	// ErrNone: the provider has not given an SVID yet.
	ErrNone = errors.New("no SVID yet")
	// ErrExpired: the SVID's certificate, or one that it was signed by, is
	// past its end.
	ErrExpired = errors.New("the SVID has expired")
	// ErrNotYetValid: the certificate's life begins in the future.
	ErrNotYetValid = errors.New("the SVID is not valid yet: compare the clocks of this host and of the SPIFFE server")
	// ErrNoSocket: there is no socket at the Workload API's address.
	ErrNoSocket = errors.New("there is no Workload API socket: is the SPIFFE agent running, and is its socket's directory visible here?")
	// ErrNotGiven: the provider answers, and has no SVID for who asks, of any
	// name. It can come later: a SPIFFE agent hears of a new entry after some
	// seconds.
	ErrNotGiven = errors.New("no SVID was given yet: is there an entry for it, and has the SPIFFE agent heard of it?")
	// ErrWithdrawn: the provider gave the SVID, and then took it back.
	ErrWithdrawn = errors.New("the SVID was withdrawn: its entry is gone")
	// ErrWrongID: the provider knows this process by other names.
	ErrWrongID = errors.New("no SVID of that name was given: is this process registered under it?")
)

// Provider is a place that gives this process its SVID. WorkloadAPI makes one;
// so does identity/issuer/client.
type Provider interface {
	// WatchX509Context tells w of the SVIDs and the bundles, now and at each
	// change, and of each failure, from one goroutine, until ctx ends or the
	// provider gives up. It may be called again then, and never twice at a time.
	WatchX509Context(ctx context.Context, w workloadapi.X509ContextWatcher) error
	// Kind is one word for what it is, as status shows it: "workload-api".
	Kind() string
	// String names it in messages, with its address.
	String() string
}

// Config says where SVIDs come from. All fields but Log are required.
type Config struct {
	From Provider
	// Workload: the SVID is a workload's, which whoever vouches for it may take
	// back: an answer without it ends it. The agent's own SVID outlives such
	// an answer, for without it there are no sessions.
	Workload bool
	// ID is the name that the SVID must bear. SVIDs of other names are not used.
	ID spiffeid.ID
	// Log gets rotations, failures and alarms. nil: none.
	Log *zap.Logger

	onChange func() // called after each change, without locks; may be nil
}

// Source holds the newest SVID and bundles. It implements x509svid.Source and
// x509bundle.Source.
type Source struct {
	cfg Config

	mu      sync.Mutex
	svid    *x509svid.SVID  // guarded by mu; nil until given
	bundles *x509bundle.Set // guarded by mu; nil until given
	last    error           // guarded by mu; why the last watch failed, nil while it stands
	changed chan struct{}   // guarded by mu; closed and replaced at each change
	gaveUp  string          // guarded by mu; the last failure that was logged
}

// New checks the configuration. Nothing is read before Run.
func New(cfg Config) (*Source, error) {
	if cfg.From == nil {
		return nil, errors.New("svid: Config.From is required: where SVIDs come from")
	}
	if cfg.ID.IsZero() {
		return nil, errors.New("svid: Config.ID is required: the SPIFFE ID of this process")
	}
	if cfg.Log == nil {
		cfg.Log = zap.NewNop()
	}
	return &Source{cfg: cfg, changed: make(chan struct{})}, nil
}

// Run keeps the SVID and the bundles up to date until ctx ends; then it returns
// nil. What is wrong with the provider is no error of Run: it is logged,
// tried again, and told by GetX509SVID and Wait.
func (s *Source) Run(ctx context.Context) error {
	var wg sync.WaitGroup
	wg.Go(func() { s.alarms(ctx) })
	defer wg.Wait()
	for ctx.Err() == nil {
		// The watch tries again by itself but for errors that it believes
		// to be final. Whoever was replaced can answer later.
		if err := s.cfg.From.WatchX509Context(ctx, (*watcher)(s)); ctx.Err() == nil {
			s.failed(err)
			pause(ctx, retryMax)
		}
	}
	return nil
}

// Wait returns when there is an SVID that can be used. If ctx ends before, the
// error says what stands in the way.
func (s *Source) Wait(ctx context.Context) error {
	for {
		changed := s.Changed()
		if _, err := s.GetX509SVID(); err == nil {
			return nil
		}
		select {
		case <-changed:
		case <-ctx.Done():
			_, err := s.GetX509SVID() // asked again: by now it may know the reason
			if err == nil {
				return nil
			}
			return fmt.Errorf("%w (waited for it: %w)", err, context.Cause(ctx))
		}
	}
}

// Changed returns a channel that is closed at the next change of the SVID or of
// a bundle. Take the channel first and read the values after it, and no change
// is missed.
func (s *Source) Changed() <-chan struct{} {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.changed
}

// GetX509SVID returns the newest SVID. It never returns one that has expired.
func (s *Source) GetX509SVID() (*x509svid.SVID, error) {
	s.mu.Lock()
	svid, last := s.svid, s.last
	s.mu.Unlock()
	err := ErrNone
	if svid != nil {
		if err = usable(svid, time.Now()); err == nil {
			return svid, nil
		}
	}
	if last != nil {
		return nil, fmt.Errorf("%s at %s: %w: %w", s.cfg.ID, s.cfg.From, err, last)
	}
	return nil, fmt.Errorf("%s at %s: %w", s.cfg.ID, s.cfg.From, err)
}

// GetX509BundleForTrustDomain returns the newest bundle of a trust domain.
func (s *Source) GetX509BundleForTrustDomain(td spiffeid.TrustDomain) (*x509bundle.Bundle, error) {
	s.mu.Lock()
	bundles := s.bundles
	s.mu.Unlock()
	if bundles == nil {
		return nil, fmt.Errorf("bundle of %s: %w", td, ErrNone)
	}
	return bundles.GetX509BundleForTrustDomain(td)
}

// Problem returns why the provider gives nothing new, nil while it does. An SVID
// that it gave before may still be usable.
func (s *Source) Problem() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.last
}

// From returns where the SVIDs come from.
func (s *Source) From() Provider { return s.cfg.From }

// Life returns when the newest SVID's life begins and ends, as the wall clock
// tells it; zero times if there is none. It is for display: ask GetX509SVID
// whether the SVID can be used.
func (s *Source) Life() (begin, end time.Time) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.svid == nil {
		return begin, end
	}
	return life(s.svid)
}

// usable tells whether the wall clock lies in the SVID's life.
func usable(svid *x509svid.SVID, now time.Time) error {
	begin, end := life(svid)
	switch {
	case !now.Before(end):
		return fmt.Errorf("%w (at %s)", ErrExpired, end.Format(time.RFC3339))
	case now.Before(begin):
		return fmt.Errorf("%w (from %s)", ErrNotYetValid, begin.Format(time.RFC3339))
	}
	return nil
}

// life is the time in which all certificates of the SVID's chain are valid.
func life(svid *x509svid.SVID) (begin, end time.Time) {
	for i, c := range svid.Certificates {
		if i == 0 || c.NotBefore.After(begin) {
			begin = c.NotBefore
		}
		if i == 0 || c.NotAfter.Before(end) {
			end = c.NotAfter
		}
	}
	return begin, end
}

func (s *Source) notify() { // mu is held
	close(s.changed)
	s.changed = make(chan struct{})
}

// told tells whoever asked for it of a change. mu is not held.
func (s *Source) told() {
	if s.cfg.onChange != nil {
		s.cfg.onChange()
	}
}

func pause(ctx context.Context, d time.Duration) {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-t.C:
	case <-ctx.Done():
	}
}
