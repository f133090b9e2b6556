package session

import (
	"context"
	"fmt"
	"maps"
	"slices"
	"time"

	"github.com/spiffe/go-spiffe/v2/bundle/x509bundle"
)

// lookAtWall is how often the wall clock is compared with the certificates'
// ends: it can be set, so no timer can stand for it.
const lookAtWall = time.Second

// endStale ends sessions whose certificates expire or whose bundle changed,
// until ctx ends.
func (t *Transport) endStale(ctx context.Context) {
	for {
		changed := t.cfg.Source.Changed() // before the values are read
		now, bundle := time.Now().Round(0), t.bundle()
		sleep := lookAtWall
		t.mu.Lock()
		streams := slices.Collect(maps.Values(t.streams))
		t.mu.Unlock()
		for _, s := range streams {
			if why := t.stale(s, bundle, now); why != "" {
				s.close(why)
				continue
			}
			sleep = min(sleep, max(s.auth.expires.Sub(now), time.Millisecond))
		}
		timer := time.NewTimer(sleep)
		select {
		case <-ctx.Done():
			timer.Stop()
			return
		case <-changed:
			timer.Stop()
		case <-timer.C:
		}
	}
}

// bundle returns the trust domain's bundle of this moment, nil if there is none.
func (t *Transport) bundle() *x509bundle.Bundle {
	b, err := t.cfg.Source.GetX509BundleForTrustDomain(t.cfg.TrustDomain)
	if err != nil {
		return nil
	}
	return b
}

// stale tells why a stream must end, "" if it need not.
func (t *Transport) stale(s *stream, bundle *x509bundle.Bundle, now time.Time) string {
	switch {
	case bundle == nil:
		// Nobody could be let in now, so nobody stays.
		return "there is no trust bundle any more"
	case !bundle.Equal(s.auth.bundle):
		return "the trust bundle has changed"
	case !now.Round(0).Before(s.auth.expires):
		return fmt.Sprintf("a certificate of the session expired at %s", s.auth.expires.UTC().Format(time.RFC3339))
	}
	return ""
}
