package client

import (
	"cmp"
	"context"
	"crypto/ecdsa"
	"crypto/x509"
	"errors"
	"fmt"
	"math/rand/v2"
	"net/http"
	"net/url"
	"path/filepath"
	"time"

	"github.com/spiffe/go-spiffe/v2/bundle/spiffebundle"
	"github.com/spiffe/go-spiffe/v2/bundle/x509bundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/svid/x509svid"
	"github.com/spiffe/go-spiffe/v2/workloadapi"
	"go.uber.org/zap"

	"portcullis/identity/issuer"
)

// Times of the client.
const (
	// pollFile is how often the bundle's file is read, which is replaced
	// without a word.
	pollFile = 2 * time.Second
	retryMin = time.Second
	retryMax = 30 * time.Second
	// requestTime bounds one question.
	requestTime = 20 * time.Second
)

// Config configures a Client. All fields but Poll and Log are required.
type Config struct {
	URL        string // https://HOST:PORT
	TokenFile  string // a projected service-account token
	BundleFile string // the trust bundle in the SPIFFE format
	CacheFile  string // where key, certificate and bundle are kept; on a tmpfs
	ID         spiffeid.ID
	Poll       time.Duration // between two questions for the bundle; 0: DefaultPoll
	Log        *zap.Logger   // may be nil
}

// DefaultPoll is how often an issuer is asked for the bundle.
const DefaultPoll = 30 * time.Second

// Check reports everything that is wrong, by the names of the agent's flags.
func (c *Config) Check() error {
	var errs []error
	if u, err := url.Parse(c.URL); err != nil || u.Scheme != "https" || u.Host == "" || u.Path != "" && u.Path != "/" || u.User != nil || u.RawQuery != "" || u.Fragment != "" {
		errs = append(errs, fmt.Errorf("--issuer %q: want https://HOST:PORT", c.URL))
	}
	for _, f := range []struct{ flag, path string }{{"--issuer-token", c.TokenFile}, {"--issuer-bundle", c.BundleFile}} {
		if !filepath.IsAbs(f.path) {
			errs = append(errs, fmt.Errorf("%s %q: want an absolute path", f.flag, f.path))
		}
	}
	return errors.Join(errs...)
}

// Client is the provider. It is used by one goroutine.
type Client struct {
	cfg    Config
	td     spiffeid.TrustDomain
	issuer spiffeid.ID
	log    *zap.Logger
	http   *http.Client
	trust  *trust

	key  *ecdsa.PrivateKey  // of chain; nil: none yet
	cert *x509.Certificate  // nil: none yet
	told *x509bundle.Bundle // the bundle that the watcher has; nil: none
	sent *x509.Certificate  // the certificate that the watcher has

	renew  time.Time // wall clock: when the next SVID is due
	retry  time.Duration
	next   time.Time // not before: after a failure
	polled time.Time // when the bundle is due
}

// New checks the configuration; nothing is read yet.
func New(cfg Config) (*Client, error) {
	if err := cfg.Check(); err != nil {
		return nil, err
	}
	if cfg.ID.IsZero() || !filepath.IsAbs(cfg.CacheFile) {
		return nil, errors.New("issuer client: Config.ID and an absolute Config.CacheFile are required")
	}
	if cfg.Poll < 0 {
		return nil, errors.New("issuer client: Config.Poll is negative")
	}
	cfg.Poll = cmp.Or(cfg.Poll, DefaultPoll)
	if cfg.Log == nil {
		cfg.Log = zap.NewNop()
	}
	td := cfg.ID.TrustDomain()
	id, err := issuer.ID(td)
	if err != nil {
		return nil, err
	}
	c := &Client{cfg: cfg, td: td, issuer: id, log: cfg.Log, trust: newTrust(td, cfg.BundleFile)}
	c.http = c.newHTTP()
	return c, nil
}

// Kind is what status calls this kind of provider.
func (*Client) Kind() string { return "issuer" }

// String names the issuer in messages.
func (c *Client) String() string { return "the issuer at " + c.cfg.URL }

// WatchX509Context gives the SVID and the bundle now and at each change, until
// ctx ends; then it returns ctx's error. An issuer that does not answer is told
// to the watcher and asked again.
func (c *Client) WatchX509Context(ctx context.Context, w workloadapi.X509ContextWatcher) error {
	defer c.http.CloseIdleConnections()
	c.told, c.sent = nil, nil
	if c.cert == nil {
		c.restore()
	}
	for ctx.Err() == nil {
		if err := c.step(ctx, time.Now()); err != nil && ctx.Err() == nil {
			w.OnX509ContextWatchError(err)
		}
		c.tell(w)
		pause(ctx, c.sleep(time.Now()))
	}
	return ctx.Err()
}

// step does what is due: reads the bundle's file, asks for an SVID or for the
// bundle.
func (c *Client) step(ctx context.Context, now time.Time) error {
	fileErr := c.trust.readFile()
	if now.Before(c.next) {
		return nil
	}
	bundle := c.trust.bundle()
	if bundle == nil { // the file is looked at again soon
		return fmt.Errorf("nobody can be trusted yet: %w", fileErr)
	}
	due := c.due(now)
	if !due && !now.After(c.polled) {
		return nil
	}
	c.polled = now.Add(c.cfg.Poll)
	var err error
	if due {
		err = c.request(ctx) // the bundle comes with it
	}
	if !due || err != nil {
		// Who is refused an SVID must hear of a withdrawn authority all the same.
		err = errors.Join(err, c.poll(ctx))
	}
	if err != nil {
		c.failed(now)
		return err
	}
	c.retry = 0
	if fileErr != nil {
		// The issuer is trusted by what it gave before; the next start may
		// have only the file.
		c.log.Warn("the issuer answers, but its bundle's file cannot be used", zap.Error(fileErr))
	}
	return nil
}

// failed has the next question wait, longer each time.
func (c *Client) failed(now time.Time) {
	c.retry = min(max(2*c.retry, retryMin), retryMax)
	c.next = now.Add(c.retry/2 + rand.N(c.retry/2))
}

// due tells that an SVID is needed: none, an old one, or one whose authority is
// trusted no more.
func (c *Client) due(now time.Time) bool {
	if c.cert == nil || !now.Round(0).Before(c.renew) {
		return true
	}
	return c.verify(c.cert, c.trust.bundle()) != nil
}

// verify checks that a certificate is this agent's SVID under a bundle.
func (c *Client) verify(cert *x509.Certificate, b *spiffebundle.Bundle) error {
	id, _, err := x509svid.Verify([]*x509.Certificate{cert}, b)
	if err == nil && id != c.cfg.ID {
		err = fmt.Errorf("it is of %s, not of %s", id, c.cfg.ID)
	}
	return err
}

// use takes a new SVID.
func (c *Client) use(key *ecdsa.PrivateKey, cert *x509.Certificate) {
	c.key, c.cert = key, cert
	// At half-life, less up to a tenth: agents that started together do not
	// ask together, and who alarms at one half sees no SVID that is about to
	// be renewed.
	life := cert.NotAfter.Sub(cert.NotBefore)
	c.renew = cert.NotBefore.Add(life/2 - life/50 - rand.N(life/10))
}

// tell gives the watcher what it does not have.
func (c *Client) tell(w workloadapi.X509ContextWatcher) {
	b := c.trust.bundle()
	if c.cert == nil || b == nil {
		return
	}
	bundle := b.X509Bundle()
	if c.sent != nil && c.sent.Equal(c.cert) && bundle.Equal(c.told) {
		return
	}
	c.keep()
	c.sent, c.told = c.cert, bundle
	w.OnX509ContextUpdate(&workloadapi.X509Context{
		SVIDs:   []*x509svid.SVID{{ID: c.cfg.ID, Certificates: []*x509.Certificate{c.cert}, PrivateKey: c.key}},
		Bundles: x509bundle.NewSet(bundle),
	})
}

// sleep is how long nothing can be due. Certificates end by the wall clock,
// which can be set: so it is short.
func (c *Client) sleep(now time.Time) time.Duration {
	if c.next.After(now) {
		return min(pollFile, c.cfg.Poll, c.next.Sub(now))
	}
	return min(pollFile, c.cfg.Poll)
}

func pause(ctx context.Context, d time.Duration) {
	t := time.NewTimer(max(d, time.Millisecond))
	defer t.Stop()
	select {
	case <-t.C:
	case <-ctx.Done():
	}
}
