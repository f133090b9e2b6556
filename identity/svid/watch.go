package svid

import (
	"context"
	"crypto/x509"
	"errors"
	"slices"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/svid/x509svid"
	"github.com/spiffe/go-spiffe/v2/workloadapi"
	"go.uber.org/zap"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
)

// watcher is a Source as a provider sees it. Its methods are called from one
// goroutine.
type watcher Source

// OnX509ContextUpdate takes what the provider gives.
func (w *watcher) OnX509ContextUpdate(c *workloadapi.X509Context) { (*Source)(w).update(c) }

// OnX509ContextWatchError learns why a watch ended.
func (w *watcher) OnX509ContextWatchError(err error) {
	if status.Code(err) == codes.Canceled || errors.Is(err, context.Canceled) {
		return // Run ends
	}
	(*Source)(w).failed(err)
}

func (s *Source) update(c *workloadapi.X509Context) {
	svid := pick(c.SVIDs, s.cfg.ID)
	if svid == nil {
		s.missing(c)
		return
	}
	s.mu.Lock()
	first, rotated := s.svid == nil, s.svid == nil || !sameChain(s.svid.Certificates, svid.Certificates)
	s.svid, s.bundles, s.last, s.gaveUp = svid, c.Bundles, nil, ""
	s.notify()
	s.mu.Unlock()
	s.told()

	_, end := life(svid)
	switch err := usable(svid, time.Now()); {
	case err != nil:
		// Stored all the same, so that GetX509SVID can say why it gives none.
		s.cfg.Log.Error("an SVID was given that cannot be used", zap.Stringer("from", s.cfg.From), zap.Stringer("spiffe_id", svid.ID), zap.Error(err))
	case first:
		s.cfg.Log.Info("received the first SVID", zap.Stringer("spiffe_id", svid.ID), zap.Time("expires", end))
	case rotated:
		s.cfg.Log.Info("the SVID was renewed", zap.Stringer("spiffe_id", svid.ID), zap.Time("expires", end))
	default:
		s.cfg.Log.Info("the trust bundles were sent anew", zap.Stringer("spiffe_id", svid.ID))
	}
}

// pick returns the SVID of exactly that ID, of several the one that ends last;
// nil if there is none. Never just the first: selectors that fit several
// entries bring the SVIDs of all of them.
func pick(svids []*x509svid.SVID, id spiffeid.ID) (best *x509svid.SVID) {
	var until time.Time
	for _, v := range svids {
		if _, end := life(v); v.ID == id && (best == nil || end.After(until)) {
			best, until = v, end
		}
	}
	return best
}

// missing notes an answer without our SVID. An agent's own is kept until it
// expires; a workload's goes. The bundles count in any case: a withdrawn
// authority must go at once.
func (s *Source) missing(c *workloadapi.X509Context) {
	why := ErrNotGiven
	var ids []string
	for _, v := range c.SVIDs {
		why, ids = ErrWrongID, append(ids, v.ID.String())
	}
	s.mu.Lock()
	if s.cfg.Workload && s.svid != nil {
		s.svid, why = nil, ErrWithdrawn
	}
	s.bundles, s.last = c.Bundles, why
	s.notify()
	s.mu.Unlock()
	s.told()
	s.cfg.Log.Warn("no SVID of this name was given", zap.Stringer("want", s.cfg.ID), zap.Stringer("from", s.cfg.From), zap.Strings("got", ids), zap.NamedError("because", why))
}

func sameChain(a, b []*x509.Certificate) bool {
	return slices.EqualFunc(a, b, (*x509.Certificate).Equal)
}

// failed notes why there is nothing new. Each new reason is logged once.
func (s *Source) failed(err error) {
	s.mu.Lock()
	s.last = err
	fresh := s.gaveUp != err.Error()
	s.gaveUp = err.Error()
	s.mu.Unlock()
	if fresh {
		s.cfg.Log.Warn("no new SVID; what was given before is used until it expires", zap.Stringer("from", s.cfg.From), zap.Error(err))
	}
}
