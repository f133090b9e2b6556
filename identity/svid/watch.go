package svid

import (
	"context"
	"crypto/x509"
	"errors"
	"slices"
	"time"

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
		s.cfg.Log.Error("SVIDs of other names only were given: register this process under its own", zap.Stringer("from", s.cfg.From), zap.Stringer("want", s.cfg.ID), zap.Strings("got", ids))
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
		s.cfg.Log.Error("an SVID was given that cannot be used", zap.Stringer("from", s.cfg.From), zap.Stringer("spiffe_id", svid.ID), zap.Error(err))
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
	s.mu.Lock()
	s.last = err
	fresh := s.gaveUp != err.Error()
	s.gaveUp = err.Error()
	s.mu.Unlock()
	if fresh {
		s.cfg.Log.Warn("no new SVID; what was given before is used until it expires", zap.Stringer("from", s.cfg.From), zap.Error(err))
	}
}
