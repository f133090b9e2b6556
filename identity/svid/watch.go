package svid

import (
	"crypto/x509"
	"slices"
	"time"

	"github.com/spiffe/go-spiffe/v2/svid/x509svid"
	"github.com/spiffe/go-spiffe/v2/workloadapi"
	"go.uber.org/zap"
	"google.golang.org/grpc"
	"google.golang.org/grpc/backoff"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
)

// How often a broken watch of the Workload API is tried again: it is a local
// socket, so asking is cheap, and an agent without an SVID has no sessions.
const (
	retryMin = 50 * time.Millisecond
	retryMax = 2 * time.Second
)

func clientOptions(addr string) []workloadapi.ClientOption {
	return []workloadapi.ClientOption{
		workloadapi.WithAddr(addr),
		workloadapi.WithBackoffStrategy(retries{}),
		workloadapi.WithDialOptions(grpc.WithConnectParams(grpc.ConnectParams{
			Backoff:           backoff.Config{BaseDelay: retryMin, Multiplier: 2, Jitter: 0.2, MaxDelay: retryMax},
			MinConnectTimeout: retryMax,
		})),
	}
}

type retries struct{}

func (retries) NewBackoff() workloadapi.Backoff { return &doubling{next: retryMin} }

type doubling struct{ next time.Duration }

func (d *doubling) Next() time.Duration {
	n := d.next
	d.next = min(2*n, retryMax)
	return n
}

func (d *doubling) Reset() { d.next = retryMin }

// watcher is a Source as the Workload API's client sees it. Its methods are
// called from one goroutine.
type watcher Source

// OnX509ContextUpdate takes what the Workload API gives.
func (w *watcher) OnX509ContextUpdate(c *workloadapi.X509Context) { (*Source)(w).update(c) }

// OnX509ContextWatchError learns why a watch ended.
func (w *watcher) OnX509ContextWatchError(err error) {
	if status.Code(err) == codes.Canceled {
		return // Run ends
	}
	(*Source)(w).failed(err)
}

func (s *Source) update(c *workloadapi.X509Context) {
	i := slices.IndexFunc(c.SVIDs, func(v *x509svid.SVID) bool { return v.ID == s.cfg.ID })
	if i < 0 {
		// The old SVID is kept until it expires: an answer that does not
		// speak of us takes nothing away that was proved. The bundles count
		// in any case: a withdrawn authority must go at once.
		var ids []string
		for _, v := range c.SVIDs {
			ids = append(ids, v.ID.String())
		}
		s.mu.Lock()
		s.bundles, s.last = c.Bundles, ErrWrongID
		s.notify()
		s.mu.Unlock()
		s.cfg.Log.Error("the Workload API gave SVIDs of other names only: register this process under its own", zap.Stringer("want", s.cfg.ID), zap.Strings("got", ids))
		return
	}
	svid := c.SVIDs[i]
	s.mu.Lock()
	first, rotated := s.svid == nil, s.svid == nil || !sameChain(s.svid.Certificates, svid.Certificates)
	s.svid, s.bundles, s.last, s.gaveUp = svid, c.Bundles, nil, ""
	s.notify()
	s.mu.Unlock()

	_, end := life(svid)
	switch err := usable(svid, time.Now()); {
	case err != nil:
		// Stored all the same, so that GetX509SVID can say why it gives none.
		s.cfg.Log.Error("the Workload API gave an SVID that cannot be used", zap.Stringer("spiffe_id", svid.ID), zap.Error(err))
	case first:
		s.cfg.Log.Info("received the first SVID", zap.Stringer("spiffe_id", svid.ID), zap.Time("expires", end))
	case rotated:
		s.cfg.Log.Info("the SVID was renewed", zap.Stringer("spiffe_id", svid.ID), zap.Time("expires", end))
	default:
		s.cfg.Log.Info("the trust bundles were sent anew", zap.Stringer("spiffe_id", svid.ID))
	}
}

func sameChain(a, b []*x509.Certificate) bool {
	return slices.EqualFunc(a, b, (*x509.Certificate).Equal)
}

// failed notes why there is nothing new. Each new reason is logged once.
func (s *Source) failed(err error) {
	err = socketError(s.path, err)
	s.mu.Lock()
	s.last = err
	fresh := s.gaveUp != err.Error()
	s.gaveUp = err.Error()
	s.mu.Unlock()
	if fresh {
		s.cfg.Log.Warn("the Workload API does not answer; what it gave before is used until it expires",
			zap.String("address", s.cfg.Address), zap.Error(err))
	}
}
