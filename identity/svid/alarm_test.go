package svid

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"math/big"
	"net/url"
	"slices"
	"testing"
	"testing/synctest"
	"time"

	"github.com/spiffe/go-spiffe/v2/bundle/x509bundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/svid/x509svid"
	"github.com/spiffe/go-spiffe/v2/workloadapi"
	"go.uber.org/zap"
	"go.uber.org/zap/zaptest/observer"
)

var self = spiffeid.RequireFromString("spiffe://portcullis.lab/portcullis/node/n1")

func given(t *testing.T, begin, end time.Time) *workloadapi.X509Context {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	template := &x509.Certificate{
		SerialNumber: big.NewInt(begin.UnixNano()), NotBefore: begin, NotAfter: end,
		URIs: []*url.URL{self.URL()}, KeyUsage: x509.KeyUsageDigitalSignature,
	}
	der, err := x509.CreateCertificate(rand.Reader, template, template, key.Public(), key)
	if err != nil {
		t.Fatal(err)
	}
	cert, err := x509.ParseCertificate(der)
	if err != nil {
		t.Fatal(err)
	}
	return &workloadapi.X509Context{
		SVIDs:   []*x509svid.SVID{{ID: self, Certificates: []*x509.Certificate{cert}, PrivateKey: key}},
		Bundles: x509bundle.NewSet(x509bundle.New(self.TrustDomain())),
	}
}

// In the bubble, time jumps to the next timer: each alarm must come once, at its
// share of the certificate's life, and a renewal must begin anew.
func TestAlarms(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		core, logs := observer.New(zap.WarnLevel)
		s, err := New(Config{From: &workloadAPI{addr: "unix:///x"}, ID: self, Log: zap.New(core)})
		if err != nil {
			t.Fatal(err)
		}
		ctx, cancel := context.WithCancel(t.Context())
		done := make(chan struct{})
		go func() { defer close(done); s.alarms(ctx) }()
		start := time.Now()
		alarms := func() (at []time.Duration, percents []int64) {
			for _, e := range logs.TakeAll() {
				at = append(at, e.Time.Sub(start))
				percents = append(percents, e.ContextMap()["life_percent"].(int64))
			}
			return at, percents
		}

		overdue := func(want int64) {
			t.Helper()
			if got := s.Overdue(); got != want {
				t.Errorf("after %v: overdue by %d %%, want %d", time.Since(start), got, want)
			}
		}
		overdue(0)
		s.update(given(t, start, start.Add(1000*time.Second)))
		time.Sleep(600 * time.Second)
		if at, percents := alarms(); !slices.Equal(at, []time.Duration{500 * time.Second}) || !slices.Equal(percents, []int64{50}) {
			t.Errorf("until 600 s: alarms at %v: %v", at, percents)
		}
		s.update(given(t, start.Add(600*time.Second), start.Add(1600*time.Second)))
		overdue(0)
		time.Sleep(749 * time.Second)
		overdue(0)
		time.Sleep(151 * time.Second)
		overdue(90)
		time.Sleep(200 * time.Second)
		overdue(100)
		want := []time.Duration{1100 * time.Second, 1350 * time.Second, 1500 * time.Second, 1600 * time.Second}
		if at, percents := alarms(); !slices.Equal(at, want) || !slices.Equal(percents, []int64{50, 75, 90, 100}) {
			t.Errorf("after the renewal: alarms at %v: %v", at, percents)
		}
		if _, err := s.GetX509SVID(); err == nil {
			t.Error("an expired SVID was handed out")
		}
		cancel()
		<-done
	})
}

func TestLifeIsThatOfTheWholeChain(t *testing.T) {
	begin := time.Date(2026, 1, 1, 0, 0, 0, 0, time.UTC)
	leaf := given(t, begin, begin.Add(10*time.Hour)).SVIDs[0]
	middle := given(t, begin.Add(time.Hour), begin.Add(5*time.Hour)).SVIDs[0]
	leaf.Certificates = append(leaf.Certificates, middle.Certificates...)
	for hours, want := range map[time.Duration]bool{0: false, 1: true, 4: true, 5: false, 9: false} {
		if err := usable(leaf, begin.Add(hours*time.Hour)); (err == nil) != want {
			t.Errorf("after %d h: %v, want usable=%v", hours, err, want)
		}
	}
}
