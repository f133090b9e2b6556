package svid_test

import (
	"context"
	"errors"
	"os"
	"strings"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/svid/x509svid"
	"go.uber.org/zap"
	"go.uber.org/zap/zaptest/observer"

	"portcullis/identity"
	"portcullis/identity/labca"
	"portcullis/identity/svid"
)

var td = spiffeid.RequireTrustDomainFromString("portcullis.lab")

func nodeID(t *testing.T, node identity.NodeName) spiffeid.ID {
	t.Helper()
	id, err := spiffeid.FromPath(td, identity.AgentSPIFFEPath(node))
	if err != nil {
		t.Fatal(err)
	}
	return id
}

func labDir(t *testing.T) string {
	t.Helper()
	dir, err := os.MkdirTemp("", "lab")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	if err := labca.Mark(dir); err != nil {
		t.Fatal(err)
	}
	return dir
}

// serve runs a lab's authority; stop ends it and waits.
func serve(t *testing.T, dir string, ttl time.Duration) (ca *labca.CA, stop func()) {
	t.Helper()
	ca, err := labca.New(labca.Config{Dir: dir, TrustDomain: td, Nodes: []identity.NodeName{"n1"}, TTL: ttl})
	if err != nil {
		t.Fatal(err)
	}
	stop = background(t, ca.Run)
	<-ca.Ready()
	return ca, stop
}

func background(t *testing.T, run func(context.Context) error) (stop func()) {
	t.Helper()
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- run(ctx) }()
	stopped := false
	stop = func() {
		if stopped {
			return
		}
		stopped = true
		cancel()
		if err := <-done; err != nil {
			t.Errorf("Run: %v", err)
		}
	}
	t.Cleanup(stop)
	return stop
}

func source(t *testing.T, cfg svid.Config) *svid.Source {
	t.Helper()
	s, err := svid.New(cfg)
	if err != nil {
		t.Fatal(err)
	}
	background(t, s.Run)
	return s
}

func workloadAPI(t *testing.T, addr string) svid.Provider {
	t.Helper()
	p, err := svid.WorkloadAPI(addr)
	if err != nil {
		t.Fatal(err)
	}
	return p
}

// within bounds a wait, so that a broken test ends.
func within(t *testing.T, d time.Duration) context.Context {
	ctx, cancel := context.WithTimeout(t.Context(), d)
	t.Cleanup(cancel)
	return ctx
}

func TestGivesTheNodesSVID(t *testing.T) {
	dir := labDir(t)
	serve(t, dir, 0)
	s := source(t, svid.Config{From: workloadAPI(t, labca.Address(dir, "n1")), ID: nodeID(t, "n1")})
	if err := s.Wait(within(t, 10*time.Second)); err != nil {
		t.Fatal(err)
	}
	v, err := s.GetX509SVID()
	if err != nil || v.ID != nodeID(t, "n1") {
		t.Fatalf("GetX509SVID: %v %v", v, err)
	}
	if _, _, err := x509svid.Verify(v.Certificates, s); err != nil {
		t.Errorf("the SVID does not verify with the source's bundle: %v", err)
	}
	if _, err := s.GetX509BundleForTrustDomain(spiffeid.RequireTrustDomainFromString("other.lab")); err == nil {
		t.Error("a bundle of a trust domain that nobody vouched for")
	}
	if begin, end := s.Life(); !begin.Before(time.Now()) || !end.After(time.Now()) {
		t.Errorf("Life: %s to %s", begin, end)
	}
}

func TestTellsOfRotationAndBundleChange(t *testing.T) {
	dir := labDir(t)
	ca, _ := serve(t, dir, 0)
	s := source(t, svid.Config{From: workloadAPI(t, labca.Address(dir, "n1")), ID: nodeID(t, "n1")})
	if err := s.Wait(within(t, 10*time.Second)); err != nil {
		t.Fatal(err)
	}
	changed := s.Changed()
	before, _ := s.GetX509SVID()
	oldBundle, _ := s.GetX509BundleForTrustDomain(td)
	if err := ca.ReplaceAuthority(true); err != nil {
		t.Fatal(err)
	}
	select {
	case <-changed:
	case <-within(t, 10*time.Second).Done():
		t.Fatal("no notification")
	}
	after, err := s.GetX509SVID()
	if err != nil || after.Certificates[0].Equal(before.Certificates[0]) {
		t.Errorf("the SVID is the old one: %v", err)
	}
	if b, err := s.GetX509BundleForTrustDomain(td); err != nil || b.Equal(oldBundle) {
		t.Errorf("the bundle is the old one: %v", err)
	}
}

// A Workload API that went away must not leave an expired SVID in use, and one
// that comes back must be noticed.
func TestNeverHandsOutAnExpiredSVID(t *testing.T) {
	dir := labDir(t)
	_, stop := serve(t, dir, 2*time.Second)
	core, logs := observer.New(zap.InfoLevel)
	s := source(t, svid.Config{From: workloadAPI(t, labca.Address(dir, "n1")), ID: nodeID(t, "n1"), Log: zap.New(core)})
	if err := s.Wait(within(t, 10*time.Second)); err != nil {
		t.Fatal(err)
	}
	stop()
	for deadline := within(t, 20*time.Second); ; {
		v, err := s.GetX509SVID()
		if err == nil && !time.Now().Before(v.Certificates[0].NotAfter.Add(time.Second)) {
			t.Fatal("an expired SVID was handed out")
		}
		if errors.Is(err, svid.ErrExpired) {
			break
		}
		if err != nil || deadline.Err() != nil {
			t.Fatalf("before the SVID expired: %v (%v)", err, deadline.Err())
		}
		tick(t)
	}
	for deadline := within(t, 10*time.Second); logs.FilterMessageSnippet("has expired").Len() == 0; tick(t) {
		if deadline.Err() != nil {
			t.Fatalf("no alarm: %v", logs.All())
		}
	}
	serve(t, dir, 0)
	if err := s.Wait(within(t, 20*time.Second)); err != nil {
		t.Errorf("after the Workload API came back: %v", err)
	}
}

// tick is the pause of a polling loop.
func tick(t *testing.T) {
	select {
	case <-time.After(10 * time.Millisecond):
	case <-t.Context().Done():
	}
}

func TestSaysWhatIsMissing(t *testing.T) {
	dir := labDir(t)
	t.Run("socket", func(t *testing.T) {
		s := source(t, svid.Config{From: workloadAPI(t, "unix://"+dir+"/none.sock"), ID: nodeID(t, "n1")})
		for deadline := within(t, 10*time.Second); ; tick(t) {
			_, err := s.GetX509SVID()
			if errors.Is(err, svid.ErrNoSocket) && errors.Is(err, svid.ErrNone) && strings.Contains(err.Error(), "none.sock") {
				break
			}
			if deadline.Err() != nil {
				t.Fatalf("the error does not say that the socket is missing: %v", err)
			}
		}
		ctx, cancel := context.WithTimeout(t.Context(), time.Millisecond)
		defer cancel()
		if err := s.Wait(ctx); !errors.Is(err, svid.ErrNoSocket) || !errors.Is(err, context.DeadlineExceeded) {
			t.Errorf("Wait: %v", err)
		}
	})
	t.Run("registration", func(t *testing.T) {
		serve(t, dir, 0)
		s := source(t, svid.Config{From: workloadAPI(t, labca.Address(dir, "n1")), ID: nodeID(t, "n2")})
		for deadline := within(t, 10*time.Second); ; tick(t) {
			_, err := s.GetX509SVID()
			if err == nil {
				t.Fatal("another node's SVID was handed out")
			}
			if errors.Is(err, svid.ErrWrongID) {
				break
			}
			if deadline.Err() != nil {
				t.Fatalf("the error does not say that the name is wrong: %v", err)
			}
		}
	})
}

func TestNewRefuses(t *testing.T) {
	for _, addr := range []string{"", "/run/agent.sock", "tcp://127.0.0.1:80", "unix:agent.sock", "unix://host/agent.sock"} {
		if _, err := svid.WorkloadAPI(addr); err == nil || !strings.Contains(err.Error(), "unix:///") {
			t.Errorf("address %q: %v", addr, err)
		}
	}
	if _, err := svid.New(svid.Config{From: workloadAPI(t, "unix:///run/agent.sock")}); err == nil {
		t.Error("no SPIFFE ID was accepted")
	}
	if _, err := svid.New(svid.Config{ID: nodeID(t, "n1")}); err == nil {
		t.Error("no provider was accepted")
	}
}
