package issuer

import (
	"context"
	"crypto"
	"crypto/x509"
	"errors"
	"fmt"
	"sync"
	"time"

	"github.com/spiffe/go-spiffe/v2/bundle/spiffebundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"go.uber.org/zap"
)

// Errors of a Store.
var (
	// ErrMissing: there is no such object.
	ErrMissing = errors.New("there is no such object")
	// ErrConflict: somebody else has written, or made, the object meanwhile.
	ErrConflict = errors.New("the object was changed meanwhile")
)

// Store is one value in one object of the cluster, under optimistic locking.
// Safe for concurrent use.
type Store interface {
	// Load returns the value, nil if the object is there and has none, and the
	// object's version. Errors: ErrMissing, and whatever the API server says.
	Load(ctx context.Context) (value []byte, version string, err error)
	// Save writes the value if the object still has that version; with the
	// version "" it makes the object. Errors: ErrConflict, and whatever the API
	// server says.
	Save(ctx context.Context, value []byte, version string) error
	// String names the object in messages.
	String() string
}

// Defaults of KeeperConfig.
const (
	DefaultSVIDLife      = time.Hour
	DefaultAuthorityLife = 30 * 24 * time.Hour
	DefaultMargin        = 5 * time.Minute
	DefaultInterval      = 10 * time.Second
)

// fresh is how long a keyring may be used after it was read: another replica
// may have moved on. Well below the margin, so that nobody signs with an
// authority that is about to leave the bundle.
const fresh = time.Minute

// shortest is the least life of an SVID that is worth making.
const shortest = 10 * time.Second

// errNotReady: there is no keyring that may be used.
var errNotReady = errors.New("the authority's key cannot be read")

// KeeperConfig configures a Keeper. TrustDomain, Keys and Bundle are required.
type KeeperConfig struct {
	TrustDomain spiffeid.TrustDomain
	Keys        Store // secret
	Bundle      Store // what agents read; not secret

	SVIDLife      time.Duration // of an SVID; 0: DefaultSVIDLife
	AuthorityLife time.Duration // of an authority; 0: DefaultAuthorityLife
	Margin        time.Duration // for replicas that lag and clocks that differ; 0: DefaultMargin
	Interval      time.Duration // between two looks at the stores; 0: DefaultInterval
	Log           *zap.Logger   // may be nil
}

// Keeper keeps the keyring: it makes the first one, reads what other replicas
// write, rotates when that is due, and publishes the bundle. All methods but
// Run are safe for concurrent use.
type Keeper struct {
	cfg   KeeperConfig
	times times
	ready chan struct{} // closed when there is a keyring

	mu      sync.Mutex
	ring    *keyring  // guarded by mu; nil until read
	read    time.Time // guarded by mu; when the reading of ring began
	problem error     // guarded by mu; of the last look at the stores
}

// NewKeeper checks the configuration.
func NewKeeper(cfg KeeperConfig) (*Keeper, error) {
	if cfg.TrustDomain.IsZero() || cfg.Keys == nil || cfg.Bundle == nil {
		return nil, errors.New("issuer: KeeperConfig.TrustDomain, Keys and Bundle are required")
	}
	for _, d := range []struct {
		field *time.Duration
		or    time.Duration
	}{{&cfg.SVIDLife, DefaultSVIDLife}, {&cfg.AuthorityLife, DefaultAuthorityLife}, {&cfg.Margin, DefaultMargin}, {&cfg.Interval, DefaultInterval}} {
		if *d.field == 0 {
			*d.field = d.or
		}
	}
	if cfg.Log == nil {
		cfg.Log = zap.NewNop()
	}
	t := times{svid: cfg.SVIDLife, authority: cfg.AuthorityLife, margin: cfg.Margin}
	if err := t.check(); err != nil {
		return nil, err
	}
	if cfg.Interval <= 0 || cfg.Interval > fresh/2 {
		return nil, fmt.Errorf("issuer: KeeperConfig.Interval %s: want at most %s", cfg.Interval, fresh/2)
	}
	return &Keeper{cfg: cfg, times: t, ready: make(chan struct{})}, nil
}

// Ready is closed when SVIDs can be signed.
func (k *Keeper) Ready() <-chan struct{} { return k.ready }

// Run keeps the keyring until ctx ends; then it returns nil. An API server that
// does not answer is no error of Run: it is asked again.
func (k *Keeper) Run(ctx context.Context) error {
	said := ""
	for {
		err := k.cycle(ctx)
		if ctx.Err() != nil {
			return nil
		}
		k.mu.Lock()
		k.problem = err
		k.mu.Unlock()
		switch {
		case err != nil && err.Error() != said:
			k.cfg.Log.Error("the keyring or the bundle cannot be kept", zap.Error(err))
			said = err.Error()
		case err == nil && said != "":
			k.cfg.Log.Info("the keyring and the bundle can be kept again")
			said = ""
		}
		t := time.NewTimer(k.cfg.Interval)
		select {
		case <-ctx.Done():
			t.Stop()
			return nil
		case <-t.C:
		}
	}
}

// tries bounds how often a cycle begins anew because others write too.
const tries = 8

// cycle does what is due.
func (k *Keeper) cycle(parent context.Context) error {
	ctx, cancel := context.WithTimeout(parent, fresh/2)
	defer cancel()
	for range tries {
		again, err := k.step(ctx)
		switch {
		case errors.Is(err, ErrConflict):
			continue
		case err != nil:
			return err
		case !again:
			return nil
		}
	}
	return errors.New("others write the issuer's objects all the time")
}

// step reads both objects and writes what is due: first the Secret, then the
// ConfigMap. Each write holds only if nobody wrote since the read, so the
// bundle of an older keyring never replaces that of a newer one: whoever has the
// older one fails at the Secret, or at the ConfigMap. again: there is more to do.
func (k *Keeper) step(ctx context.Context) (again bool, err error) {
	began := time.Now()
	stored, version, err := k.cfg.Keys.Load(ctx)
	if err != nil && !errors.Is(err, ErrMissing) {
		return false, fmt.Errorf("read %s: %w", k.cfg.Keys, err)
	}
	published, bundleVersion, bundleErr := k.cfg.Bundle.Load(ctx)
	if errors.Is(bundleErr, ErrMissing) {
		bundleErr = nil
	}
	there := parseBundle(k.cfg.TrustDomain, published)
	sequence, _ := there.SequenceNumber()
	ring, err := k.next(stored, sequence, began)
	if err != nil {
		return false, err
	}
	if ring.changed {
		data, err := ring.encode()
		if err != nil {
			return false, err
		}
		if err := k.cfg.Keys.Save(ctx, data, version); err != nil {
			return false, fmt.Errorf("write %s: %w", k.cfg.Keys, err)
		}
		k.cfg.Log.Info("the keyring was written", zap.Uint64("sequence", ring.sequence), zap.Any("authorities", ring.describe()))
	}
	k.adopt(ring.keyring, began)
	if bundleErr != nil {
		return false, fmt.Errorf("read %s: %w", k.cfg.Bundle, bundleErr)
	}
	bundle, err := ring.bundle()
	if err != nil {
		return false, err
	}
	if !parseBundle(k.cfg.TrustDomain, bundle).Equal(there) {
		if err := k.cfg.Bundle.Save(ctx, bundle, bundleVersion); err != nil {
			return false, fmt.Errorf("write %s: %w", k.cfg.Bundle, err)
		}
		k.cfg.Log.Info("the trust bundle was published", zap.Uint64("sequence", ring.sequence), zap.Stringer("object", k.cfg.Bundle))
		return true, nil // the keyring does not know yet that it is published
	}
	return ring.changed, nil
}

// due is a keyring, and whether it must be written.
type due struct {
	*keyring
	changed bool
}

// next computes the keyring from what is stored.
func (k *Keeper) next(stored []byte, published uint64, now time.Time) (due, error) {
	if len(stored) == 0 {
		ring, err := newKeyring(k.cfg.TrustDomain, k.times, now)
		if err != nil {
			return due{}, err
		}
		ring.sequence = max(ring.sequence, published+1)
		k.cfg.Log.Warn("there is no authority: making one; agents learn of it from the bundle", zap.Stringer("object", k.cfg.Keys))
		return due{ring, true}, nil
	}
	old, err := decode(stored, k.cfg.TrustDomain)
	if err != nil {
		return due{}, err // nothing is guessed: a new authority would end every session
	}
	ring, err := old.advance(k.times, published, now)
	if err != nil {
		return due{}, err
	}
	return due{ring, ring != old}, nil
}

// parseBundle returns a bundle in the SPIFFE format, an empty one if that is none.
func parseBundle(td spiffeid.TrustDomain, data []byte) *spiffebundle.Bundle {
	if b, err := spiffebundle.Parse(td, data); err == nil {
		return b
	}
	return spiffebundle.New(td)
}

func (k *Keeper) adopt(ring *keyring, read time.Time) {
	k.mu.Lock()
	first := k.ring == nil
	k.ring, k.read = ring, read
	k.mu.Unlock()
	if first {
		close(k.ready)
	}
}

// current returns the keyring, if it may be used.
func (k *Keeper) current() (*keyring, error) {
	k.mu.Lock()
	defer k.mu.Unlock()
	if k.ring != nil && time.Since(k.read) < fresh {
		return k.ring, nil
	}
	if k.problem != nil {
		return nil, fmt.Errorf("%w: %w", errNotReady, k.problem)
	}
	return nil, errNotReady
}

// signed is a certificate with what signed it.
type signed struct {
	der    []byte
	ring   *keyring
	signer authority
}

// sign makes a certificate for a key under a name.
func (k *Keeper) sign(public crypto.PublicKey, id spiffeid.ID) (signed, error) {
	ring, err := k.current()
	if err != nil {
		return signed{}, err
	}
	now := time.Now()
	a := ring.signing()
	if a.cert.NotAfter.Sub(now) < shortest {
		return signed{}, fmt.Errorf("the authority ends at %s, and the next one cannot sign yet", a.cert.NotAfter.Format(time.RFC3339))
	}
	// Never for longer than the keyring knows of: the overlap rests on it.
	der, err := a.sign(public, id, min(k.cfg.SVIDLife, ring.life), now)
	return signed{der, ring, a}, err
}

// bundle returns the trust bundle in the SPIFFE format, and its sequence.
func (k *Keeper) bundle() ([]byte, uint64, error) {
	ring, err := k.current()
	if err != nil {
		return nil, 0, err
	}
	b, err := ring.bundle()
	return b, ring.sequence, err
}

// status fills in what the keeper knows.
func (k *Keeper) status() Status {
	s := Status{TrustDomain: k.cfg.TrustDomain.Name()}
	k.mu.Lock()
	ring, problem := k.ring, k.problem
	k.mu.Unlock()
	if ring != nil {
		s.Sequence, s.Authorities = ring.sequence, ring.describe()
	}
	if _, err := k.current(); err != nil {
		problem = err
	}
	if problem != nil {
		s.Problem = problem.Error()
	}
	return s
}

func (k *keyring) describe() (out []AuthorityStatus) {
	for _, a := range k.authorities {
		out = append(out, AuthorityStatus{Serial: a.cert.SerialNumber.Text(16), State: a.state(), Expires: a.cert.NotAfter.UTC().Format(time.RFC3339)})
	}
	return out
}

// parse reads back a certificate that was made here.
func (s signed) parse() (*x509.Certificate, error) { return x509.ParseCertificate(s.der) }
