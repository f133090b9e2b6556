package scenario

import (
	"errors"
	"fmt"
	"strings"
	"testing"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"portcullis/agent/api"
	"portcullis/chaos/lab"
)

// A session that is reset is opened again by the next packet, and what was
// confirmed on it is confirmed anew.
func TestSessionReset(t *testing.T) {
	w := newWorld(t)
	traffic := w.live()
	before := w.binding(w.client)
	r, err := w.api(verifier).ResetSession(t.Context(), &api.ResetSessionRequest{Peer: owner})
	w.must(err)
	if !r.GetExisted() || r.GetBindings() < 1 {
		t.Errorf("reset: %v", r)
	}
	w.eventually("the binding is confirmed again", func() error {
		b := w.binding(w.client)
		if b == nil || b.GetStamp() == before.GetStamp() || b.GetState() != "live" {
			return fmt.Errorf("%v", b)
		}
		if b.GetGeneration() != before.GetGeneration() {
			t.Fatalf("another generation: %v, before %v", b, before)
		}
		return nil
	})
	traffic.goesOn("traffic")
	if _, err := w.api(verifier).ResetSession(t.Context(), &api.ResetSessionRequest{Peer: "nobody"}); status.Code(err) != codes.NotFound {
		t.Errorf("reset of a session with nobody: %v", err)
	}
}

// Without the trust domain agents go on; one that starts says what it lacks,
// and what is in the kernel goes on judging.
func TestTrustDomainGone(t *testing.T) {
	w := newWorld(t)
	traffic := w.live()
	w.must(w.KillAuthority(t.Context()))
	if s := w.status(verifier); !s.GetHealthy() {
		t.Errorf("an agent with an SVID is not healthy: %v", s.GetProblems())
	}
	w.kill(verifier)
	started := make(chan error, 1)
	go func() { started <- w.StartAgent(t.Context(), verifier) }()
	w.eventually("the agent says that it has no SVID", func() error {
		c, err := w.Client(verifier)
		if err != nil {
			return err
		}
		s, err := c.Status(t.Context(), &api.StatusRequest{})
		if err != nil {
			return err
		}
		if s.GetHealthy() || !strings.Contains(strings.Join(s.GetProblems(), " "), "no SVID") {
			return fmt.Errorf("healthy %v: %v", s.GetHealthy(), s.GetProblems())
		}
		return nil
	})
	traffic.goesOn("traffic on the lease")
	heard := w.echo.from(w.stranger)
	if w.reach(w.stranger) == nil || w.echo.from(w.stranger) != heard {
		t.Error("the stranger gets in")
	}
	w.must(w.StartAuthority(t.Context()))
	w.must(<-started)
	w.eventually("the session is back", w.sessionIsUp)
	traffic.goesOn("traffic")
	traffic.lossless()
}

func (w *world) sessionIsUp() error {
	if s := w.session(); s.GetState() != "up" {
		return fmt.Errorf("%v", s)
	}
	return nil
}

// SVIDs that are renewed: sessions end with the certificate that they were
// opened with, and are opened anew; traffic sees nothing of it.
func TestRotation(t *testing.T) {
	w := newWorld(t, func(c *lab.Config) { c.SVIDTTL = 4 * time.Second })
	traffic := w.live()
	before := w.binding(w.client)
	ends := map[time.Time]bool{}
	w.eventually("three sessions, one after the other", func() error {
		if s := w.session(); s.GetState() == "up" {
			ends[s.GetCertificateExpiry().AsTime()] = true
		}
		if len(ends) < 3 {
			return fmt.Errorf("certificates that ended: %v", ends)
		}
		return nil
	})
	if b := w.binding(w.client); b.GetStamp() != before.GetStamp() {
		t.Errorf("the binding was %v, is %v", before, b)
	}
	traffic.lossless()
}

// SVIDs that are not renewed: when they have ended there is no session, and
// when the lease has ended nothing passes, until the trust domain is back.
func TestExpiry(t *testing.T) {
	w := newWorld(t, func(c *lab.Config) {
		c.SVIDTTL, c.TTL, c.Heartbeat = 4*time.Second, 2*time.Second, 200*time.Millisecond
	})
	traffic := w.live()
	w.must(w.KillAuthority(t.Context()))
	expiry := w.status(verifier).GetCertificateExpiry().AsTime()
	var until time.Time // the end of the certificate of the session that was up last
	w.eventually("the last session ends", func() error {
		if s := w.session(); s.GetState() == "up" {
			until = s.GetCertificateExpiry().AsTime()
			return errors.New("it is up")
		}
		now := time.Now()
		if now.Before(until.Add(-time.Second)) {
			t.Errorf("a session ended at %v, its certificate ends at %v", now, until)
		}
		if now.Before(expiry) {
			return errors.New("one that an earlier certificate opened has ended; the last SVID has not")
		}
		return nil
	})
	if traffic.received.Load() == 0 {
		t.Error("nothing had passed before")
	}
	w.eventually("the client is shut out", func() error {
		if w.reach(w.client) == nil {
			return errors.New("it gets in")
		}
		return nil
	})
	if b := w.binding(w.client); b.GetState() == "live" {
		t.Errorf("the binding is still %v", b)
	}
	if s := w.status(verifier); s.GetHealthy() {
		t.Error("an agent whose SVID has ended says that it is healthy")
	}
	w.must(w.StartAuthority(t.Context()))
	w.eventually("the client gets in again", func() error { return w.reach(w.client) })
	w.must(w.sessionIsUp())
	traffic.goesOn("the old traffic")
}

// A trust domain with another key: SVIDs of the old one are worth nothing, so
// sessions end, and are opened anew with the new ones.
func TestBundleChange(t *testing.T) {
	w := newWorld(t)
	traffic := w.live()
	opened := w.session().GetSince().AsTime()
	w.must(w.ReplaceAuthority(t.Context()))
	w.eventually("a new session", func() error {
		if s := w.session(); s.GetState() != "up" || !s.GetSince().AsTime().After(opened) {
			return fmt.Errorf("opened %v, now %v", opened, s)
		}
		return nil
	})
	r, err := w.Run(t.Context(), lab.Workload{Name: "second", Node: owner, Labels: map[string]string{"app": "client"}}, lab.RunOptions{})
	w.must(err)
	w.must(w.reach(r))
	traffic.lossless()
}
