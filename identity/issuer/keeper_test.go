package issuer

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"errors"
	"strconv"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
)

// memory is an object of a cluster: one value under a version.
type memory struct {
	name string

	mu      sync.Mutex
	there   bool
	value   []byte
	version int
	down    error
	writes  int
}

func (m *memory) String() string { return m.name }

func (m *memory) Load(context.Context) ([]byte, string, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	switch {
	case m.down != nil:
		return nil, "", m.down
	case !m.there:
		return nil, "", ErrMissing
	}
	return m.value, strconv.Itoa(m.version), nil
}

func (m *memory) Save(_ context.Context, value []byte, version string) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	switch {
	case m.down != nil:
		return m.down
	case m.there && version != strconv.Itoa(m.version), !m.there && version != "":
		return ErrConflict
	}
	m.value, m.there = value, true
	m.version++
	m.writes++
	return nil
}

func (m *memory) fail(err error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.down = err
}

func (m *memory) empty() {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.value, m.version = nil, m.version+1
}

func (m *memory) count() int {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.writes
}

// look is how often a replica looks at the objects in these tests.
const look = 30 * time.Second

// replicas starts n keepers on the same objects. It is called in a bubble.
func replicas(t *testing.T, n int, keys, bundle *memory, life times) []*Keeper {
	t.Helper()
	ctx, cancel := context.WithCancel(t.Context())
	var wg sync.WaitGroup
	t.Cleanup(func() { cancel(); wg.Wait() })
	var out []*Keeper
	for range n {
		k, err := NewKeeper(KeeperConfig{TrustDomain: td, Keys: keys, Bundle: bundle, SVIDLife: life.svid, AuthorityLife: life.authority, Margin: life.margin, Interval: look})
		if err != nil {
			t.Fatal(err)
		}
		out = append(out, k)
		wg.Go(func() {
			if err := k.Run(ctx); err != nil {
				t.Error(err)
			}
		})
	}
	return out
}

func signer(t *testing.T, k *Keeper) string {
	t.Helper()
	r, err := k.current()
	if err != nil {
		t.Fatal(err)
	}
	return r.signing().cert.SerialNumber.String()
}

// Several replicas that start on nothing agree on one authority, and rotate
// together.
func TestReplicasShareOneAuthority(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		keys, bundle := &memory{name: "keys"}, &memory{name: "bundle"}
		ks := replicas(t, 2, keys, bundle, times{svid: 10 * time.Minute, authority: 100 * time.Minute, margin: 5 * time.Minute})
		seen := map[string]bool{}
		time.Sleep(look / 2) // not just when a replica looks
		for range 140 {
			time.Sleep(time.Minute)
			for _, k := range ks {
				if s := k.status(); s.Problem != "" || len(s.Authorities) == 0 {
					t.Fatalf("status: %+v", s)
				}
				if signer(t, k) != signer(t, ks[0]) {
					t.Fatal("a minute after it was written, replicas sign with different authorities")
				}
			}
			seen[signer(t, ks[0])] = true
			if _, sequence, err := ks[1].bundle(); err != nil || parsedSequence(bundle) != sequence {
				t.Fatalf("the bundle of a replica is %d, the published one %d, %v", sequence, parsedSequence(bundle), err)
			}
		}
		if len(seen) < 3 {
			t.Errorf("%d authorities signed in 140 minutes", len(seen))
		}
		// Each rotation is: next, published, switched, gone.
		if n := keys.count(); n > 4*len(seen)+1 {
			t.Errorf("the Secret was written %d times for %d authorities", n, len(seen))
		}
	})
}

func parsedSequence(m *memory) uint64 {
	data, _, _ := m.Load(context.Background())
	n, _ := parseBundle(td, data).SequenceNumber()
	return n
}

// While the Secret cannot be read for long, nothing is signed: another replica
// may have moved on. It goes on by itself.
func TestNothingIsSignedWithAnOldKeyring(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		keys, bundle := &memory{name: "keys"}, &memory{name: "bundle"}
		k := replicas(t, 1, keys, bundle, hours)[0]
		synctest.Wait()
		key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
		if err != nil {
			t.Fatal(err)
		}
		id := spiffeid.RequireFromPath(td, "/portcullis/node/n1")
		sign := func() error { _, err := k.sign(key.Public(), id); return err }
		if err := sign(); err != nil {
			t.Fatal(err)
		}
		keys.fail(errors.New("the API server is away"))
		time.Sleep(fresh / 2)
		if err := sign(); err != nil {
			t.Errorf("after half a minute: %v", err)
		}
		time.Sleep(fresh)
		if err := sign(); !errors.Is(err, errNotReady) || !strings.Contains(err.Error(), "is away") {
			t.Errorf("after a minute and a half: %v", err)
		}
		if k.status().Problem == "" {
			t.Error("the status shows no problem")
		}
		keys.fail(nil)
		time.Sleep(look)
		synctest.Wait()
		if err := sign(); err != nil {
			t.Errorf("when it is back: %v", err)
		}
	})
}

// A ConfigMap that cannot be written stops no SVID, and no authority begins to
// sign meanwhile.
func TestUnpublishedBundle(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		keys, bundle := &memory{name: "keys"}, &memory{name: "bundle"}
		k := replicas(t, 1, keys, bundle, hours)[0]
		synctest.Wait()
		first := signer(t, k)
		bundle.fail(errors.New("forbidden"))
		time.Sleep(8 * time.Hour) // at 5 there is a next one, at 6:05 it would sign
		if signer(t, k) != first {
			t.Error("an authority signs that agents cannot learn of")
		}
		if p := k.status().Problem; !strings.Contains(p, "forbidden") {
			t.Errorf("problem %q", p)
		}
		bundle.fail(nil)
		time.Sleep(hours.svid + hours.margin + 5*time.Minute)
		if signer(t, k) == first {
			t.Error("the rotation did not go on")
		}
	})
}

// Emptying the Secret is how an operator withdraws an authority at once.
func TestEmptySecretMakesANewAuthority(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		keys, bundle := &memory{name: "keys"}, &memory{name: "bundle"}
		ks := replicas(t, 2, keys, bundle, hours)
		synctest.Wait()
		first, before := signer(t, ks[0]), parsedSequence(bundle)
		keys.empty()
		time.Sleep(2 * look)
		synctest.Wait()
		if signer(t, ks[0]) == first || signer(t, ks[0]) != signer(t, ks[1]) {
			t.Error("replicas do not sign with one new authority")
		}
		if now := parsedSequence(bundle); now <= before {
			t.Errorf("the sequence went from %d to %d: agents would keep the old bundle", before, now)
		}
		data, _, _ := bundle.Load(t.Context())
		if n := len(parseBundle(td, data).X509Authorities()); n != 1 {
			t.Errorf("%d authorities are trusted, want the new one only", n)
		}
	})
}

// A damaged Secret is left alone: a new authority would end every session.
func TestDamagedSecretStaysAsItIs(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		keys, bundle := &memory{name: "keys", there: true, value: []byte("garbage")}, &memory{name: "bundle"}
		k := replicas(t, 1, keys, bundle, hours)[0]
		time.Sleep(time.Minute)
		if _, err := k.current(); !errors.Is(err, errDamaged) {
			t.Errorf("current: %v", err)
		}
		if keys.count() != 0 || bundle.count() != 0 {
			t.Error("something was written")
		}
	})
}

// The bundle that agents have is repaired when somebody else changes it.
func TestBundleIsRepaired(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		keys, bundle := &memory{name: "keys"}, &memory{name: "bundle"}
		k := replicas(t, 1, keys, bundle, hours)[0]
		synctest.Wait()
		for _, wrong := range []string{"", "x", `{"keys":[],"spiffe_sequence":99999999999}`} {
			_, version, _ := bundle.Load(t.Context())
			if err := bundle.Save(t.Context(), []byte(wrong), version); err != nil {
				t.Fatal(err)
			}
			time.Sleep(2 * look)
			synctest.Wait()
			data, _, _ := bundle.Load(t.Context())
			b := parseBundle(td, data)
			r, err := k.current()
			if err != nil || !b.HasX509Authority(r.signing().cert) {
				t.Errorf("after %q: %s, %v", wrong, data, err)
			}
			if n, _ := b.SequenceNumber(); strings.Contains(wrong, "9999") && n <= 99999999999 {
				t.Errorf("the sequence is %d: agents would keep the wrong one", n)
			}
		}
	})
}

func TestKeeperRefuses(t *testing.T) {
	keys, bundle := &memory{}, &memory{}
	for name, cfg := range map[string]KeeperConfig{
		"nothing":       {},
		"short SVIDs":   {TrustDomain: td, Keys: keys, Bundle: bundle, SVIDLife: time.Second},
		"short life":    {TrustDomain: td, Keys: keys, Bundle: bundle, AuthorityLife: time.Hour},
		"long interval": {TrustDomain: td, Keys: keys, Bundle: bundle, Interval: time.Hour},
	} {
		if _, err := NewKeeper(cfg); err == nil {
			t.Errorf("%s: accepted", name)
		}
	}
}
