package issuer

import (
	"crypto/x509"
	"errors"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/bundle/spiffebundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
)

var (
	td    = spiffeid.RequireTrustDomainFromString("cluster.example")
	day   = time.Date(2026, 3, 1, 0, 0, 0, 0, time.UTC)
	hours = times{svid: time.Hour, authority: 10 * time.Hour, margin: 5 * time.Minute}
)

func ring(t *testing.T, now time.Time) *keyring {
	t.Helper()
	k, err := newKeyring(td, hours, now)
	if err != nil {
		t.Fatal(err)
	}
	return k
}

func advance(t *testing.T, k *keyring, published uint64, now time.Time) *keyring {
	t.Helper()
	n, err := k.advance(hours, published, now)
	if err != nil {
		t.Fatal(err)
	}
	return n
}

func trusts(bundle []*x509.Certificate, signer *x509.Certificate) bool {
	return slices.ContainsFunc(bundle, signer.Equal)
}

// Over several rotations: whoever has a valid SVID is trusted by everybody else
// who has one, even if each heard of the bundle only when it got its SVID. A
// replica may lag by a minute, in what it signs with and in what it tells.
func TestRotationRefusesNobody(t *testing.T) {
	const step, lag = 5, 5 // minutes
	type moment struct {
		bundle []*x509.Certificate
		signer *x509.Certificate
	}
	var history []moment
	k := ring(t, day)
	signers := map[string]bool{}
	for minute := 0; minute < 40*60; minute += step {
		now := day.Add(time.Duration(minute) * time.Minute)
		n := advance(t, k, k.sequence, now)
		if changed := !slices.EqualFunc(bundleOf(n.authorities), bundleOf(k.authorities), (*x509.Certificate).Equal); changed != (n.sequence > k.sequence) {
			t.Fatalf("after %d min: the bundle changed: %v, its sequence went from %d to %d", minute, changed, k.sequence, n.sequence)
		}
		k = n
		signers[k.signing().cert.SerialNumber.String()] = true
		history = append(history, moment{bundleOf(k.authorities), k.signing().cert})
		for _, a := range k.authorities {
			if err := a.check(td); err != nil {
				t.Fatalf("after %d min: %v", minute, err)
			}
		}
		if left := k.signing().cert.NotAfter.Sub(now); left < hours.svid {
			t.Fatalf("after %d min: the authority that signs ends in %s: SVIDs are cut short", minute, left)
		}
		recent := history[max(0, len(history)-1-(60+lag)/step):]
		for _, issued := range recent {
			for _, heard := range recent {
				if !trusts(heard.bundle, issued.signer) {
					t.Fatalf("after %d min: a valid SVID is signed by an authority that an agent with a valid SVID does not trust", minute)
				}
			}
		}
	}
	if len(signers) < 6 {
		t.Errorf("in four authorities' lives %d authorities signed", len(signers))
	}
}

// An authority signs only when agents can have learnt of it: not before the
// ConfigMap had it.
func TestNothingSignsUnpublished(t *testing.T) {
	k := ring(t, day)
	first, before := k.signing().cert, k.sequence
	for at := 5 * time.Hour; at < 10*time.Hour; at += 10 * time.Minute {
		k = advance(t, k, before, day.Add(at)) // the ConfigMap cannot be written
		if !k.signing().cert.Equal(first) {
			t.Fatalf("after %s an authority signs that nobody could learn of", at)
		}
	}
	if len(k.authorities) != 2 {
		t.Fatalf("%d authorities, want one that signs and the next", len(k.authorities))
	}
	k = advance(t, k, k.sequence, day.Add(9*time.Hour+40*time.Minute))
	if k.signing().cert.Equal(first) {
		t.Error("an authority that is about to end did not give way")
	}
}

// An issuer that was away past its authority's end goes on with a new one.
func TestAfterALongAbsence(t *testing.T) {
	k := ring(t, day)
	now := day.Add(100 * time.Hour)
	for range 3 {
		k = advance(t, k, k.sequence, now)
	}
	if len(k.authorities) != 1 || k.signing().cert.NotAfter.Before(now) {
		t.Errorf("%d authorities, the one that signs ends at %s", len(k.authorities), k.signing().cert.NotAfter)
	}
}

func TestSequenceIsNeverBehindTheBundle(t *testing.T) {
	k := ring(t, day)
	ahead := k.sequence + 1000
	n := advance(t, k, ahead, day.Add(time.Minute)) // a Secret that was restored
	if n.sequence <= ahead {
		t.Errorf("sequence %d, the agents have %d", n.sequence, ahead)
	}
	if again := advance(t, n, n.sequence, day.Add(2*time.Minute)); again != n {
		t.Error("a keyring changed for which nothing was due")
	}
}

// A replica that makes longer SVIDs lengthens the overlap before it makes one.
func TestLongerSVIDsLengthenTheOverlap(t *testing.T) {
	k := ring(t, day)
	longer := times{svid: 2 * time.Hour, authority: 10 * time.Hour, margin: 5 * time.Minute}
	n, err := k.advance(longer, k.sequence, day.Add(time.Minute))
	if err != nil || n.life != 2*time.Hour {
		t.Fatalf("life %s, %v", n.life, err)
	}
	if back := advance(t, n, n.sequence, day.Add(2*time.Minute)); back.life != 2*time.Hour {
		t.Errorf("SVIDs of two hours are out, and the keyring says %s", back.life)
	}
}

func TestKeyringOutAndIn(t *testing.T) {
	k := advance(t, ring(t, day), 1, day.Add(6*time.Hour))
	data, err := k.encode()
	if err != nil {
		t.Fatal(err)
	}
	n, err := decode(data, td)
	if err != nil || !n.same(k) {
		t.Fatalf("read back: %v", err)
	}
	if !n.signing().key.Equal(k.signing().key) {
		t.Error("another key came back")
	}
	bundle, err := n.bundle()
	if err != nil {
		t.Fatal(err)
	}
	if b, err := spiffebundle.Parse(td, bundle); err != nil || len(b.X509Authorities()) != 2 {
		t.Errorf("the bundle: %v", err)
	}
	if strings.Contains(string(bundle), "PRIVATE") || strings.Contains(string(bundle), `"d"`) {
		t.Error("the bundle holds a key")
	}
}

func TestDamagedKeyring(t *testing.T) {
	data, err := ring(t, day).encode()
	if err != nil {
		t.Fatal(err)
	}
	other, err := ring(t, day).encode()
	if err != nil {
		t.Fatal(err)
	}
	whole := string(data)
	key := func(s string) string { _, s, _ = strings.Cut(s, `"key": "`); s, _, _ = strings.Cut(s, `"`); return s }
	for name, bad := range map[string]string{
		"no JSON":        "x",
		"nothing":        "{}",
		"no authority":   `{"trustDomain":"cluster.example","svidLife":"1h"}`,
		"no life":        strings.Replace(whole, `"1h0m0s"`, `""`, 1),
		"another key":    strings.Replace(whole, key(whole), key(string(other)), 1),
		"no key":         strings.Replace(whole, key(whole), "", 1),
		"cut key":        strings.Replace(whole, key(whole), key(whole)[:40], 1),
		"no certificate": strings.Replace(whole, "BEGIN CERTIFICATE", "BEGIN CERTIFICATION", 1),
		"nobody signs":   strings.Replace(whole, `"active"`, `"inactive"`, 1),
	} {
		if bad == whole {
			t.Fatalf("%s: the test changed nothing", name)
		}
		if _, err := decode([]byte(bad), td); err == nil {
			t.Errorf("%s: accepted", name)
		} else if name != "nothing" && !errors.Is(err, errDamaged) {
			t.Errorf("%s: %v", name, err)
		}
	}
	if _, err := decode(data, spiffeid.RequireTrustDomainFromString("other.example")); err == nil || errors.Is(err, errDamaged) {
		t.Errorf("another trust domain: %v", err)
	}
}

func TestTimesThatCannotRotate(t *testing.T) {
	for _, bad := range []times{{}, {svid: time.Hour, authority: 4 * time.Hour, margin: time.Minute}, {svid: time.Hour, authority: 10 * time.Hour}} {
		if bad.check() == nil {
			t.Errorf("%+v was accepted", bad)
		}
	}
}
