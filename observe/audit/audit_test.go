package audit

import (
	"bytes"
	"crypto"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"crypto/x509"
	"encoding/json"
	"errors"
	"math/big"
	"net/netip"
	"net/url"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/svid/x509svid"
	"golang.org/x/sys/unix"

	"portcullis/identity"
	"portcullis/ipcache/lease"
)

var full = lease.LogEntry{
	Kind: lease.LogRefusal, Peer: "n2", IP: netip.MustParseAddr("10.1.0.7"), Generation: 1<<64 - 1, UID: identity.UID{1},
	Identity: identity.New("portcullis.lab", "default", "sleep", map[string]string{"app": "sleep"}),
	Evidence: identity.EvidenceLease, Reason: "quarantined\n\"x\"", Duration: 1500 * time.Millisecond,
}

var peer = &Session{SPIFFEID: "spiffe://portcullis.lab/portcullis/node/n2", Serial: "c0ffee", Issuer: "O=lab"}

func must(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// authority signs SVIDs of agents.
type authority struct {
	t    testing.TB
	key  crypto.Signer
	cert *x509.Certificate
}

func newAuthority(t testing.TB) *authority {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	must(t, err)
	template := &x509.Certificate{SerialNumber: big.NewInt(1), NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(1000 * time.Hour),
		KeyUsage: x509.KeyUsageCertSign, BasicConstraintsValid: true, IsCA: true}
	der, err := x509.CreateCertificate(rand.Reader, template, template, key.Public(), key)
	must(t, err)
	cert, err := x509.ParseCertificate(der)
	must(t, err)
	return &authority{t, key, cert}
}

func (a *authority) svid(id string, key crypto.Signer, life time.Duration) *x509svid.SVID {
	u, err := url.Parse(id)
	must(a.t, err)
	template := &x509.Certificate{SerialNumber: big.NewInt(2), NotBefore: time.Now().Add(-time.Minute), NotAfter: time.Now().Add(life),
		KeyUsage: x509.KeyUsageDigitalSignature, BasicConstraintsValid: true, URIs: []*url.URL{u}}
	der, err := x509.CreateCertificate(rand.Reader, template, a.cert, key.Public(), a.key)
	must(a.t, err)
	cert, err := x509.ParseCertificate(der)
	must(a.t, err)
	return &x509svid.SVID{ID: spiffeid.RequireFromString(id), Certificates: []*x509.Certificate{cert}, PrivateKey: key}
}

func (a *authority) agent(node string) signer {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	must(a.t, err)
	return signer{svid: a.svid("spiffe://portcullis.lab/portcullis/node/"+node, key, 24*time.Hour)}
}

type signer struct {
	svid *x509svid.SVID
	err  error
}

func (s signer) GetX509SVID() (*x509svid.SVID, error) { return s.svid, s.err }

func (a *authority) options() Options { return Options{Roots: []*x509.Certificate{a.cert}} }

// judged verifies one node's log.
func judged(t testing.TB, o Options, paths ...string) *Result {
	t.Helper()
	s, err := Find(paths...)
	must(t, err)
	res, err := Verify(s, o)
	must(t, err)
	if len(res) != 1 {
		t.Fatalf("%d logs", len(res))
	}
	return res[0]
}

func whole(t testing.TB, o Options, paths ...string) *Result {
	t.Helper()
	r := judged(t, o, paths...)
	if r.Broken != nil {
		t.Fatalf("%+v", *r.Broken)
	}
	return r
}

func rows(t testing.TB, path string) (out []map[string]any) {
	t.Helper()
	data, err := os.ReadFile(path)
	must(t, err)
	for l := range strings.Lines(string(data)) {
		m := map[string]any{}
		if err := json.Unmarshal([]byte(l), &m); err != nil || !strings.HasSuffix(l, "\n") {
			m = map[string]any{"bad": l}
		}
		out = append(out, m)
	}
	return out
}

func TestFormat(t *testing.T) {
	path := filepath.Join(t.TempDir(), "audit.log")
	a := newAuthority(t)
	l, err := Open(Config{Path: path, Node: "n1", Signer: a.agent("n1")})
	must(t, err)
	must(t, l.Append(full, peer))
	must(t, l.Append(lease.LogEntry{Kind: lease.LogSessionUp, Peer: "n2"}, nil))
	must(t, l.Append(lease.LogEntry{Kind: lease.LogGrant, Identity: identity.Identity{Reserved: "remote-node"}}, nil))
	must(t, l.Close())
	got := rows(t, path)
	for i, m := range got {
		at, err := time.Parse(time.RFC3339Nano, m["time"].(string))
		if ago := time.Since(at); err != nil || ago < 0 || ago > time.Minute || at.Location() != time.UTC {
			t.Errorf("time %v: %v", m["time"], err)
		}
		if m["seq"] != float64(i+1) || len(m["hash"].(string)) != 64 || m["prev"] == m["hash"] || i > 0 && m["prev"] != got[i-1]["hash"] {
			t.Errorf("record %d: %v", i+1, m)
		}
	}
	if c := got[len(got)-1]["checkpoint"].(map[string]any); c["why"] != "stop" || c["signature"] == "" {
		t.Errorf("%v", c)
	}
	for _, m := range got {
		for _, k := range []string{"time", "seq", "hash", "prev", "checkpoint"} {
			delete(m, k)
		}
	}
	want := []map[string]any{
		{"node": "n1", "kind": "start", "begin": map[string]any{"version": 1.0, "clean": true, "records": 1000.0, "interval": 60.0}},
		{
			"node": "n1", "kind": "refusal", "peer": "n2", "ip": "10.1.0.7", "generation": "18446744073709551615",
			"uid": "01000000-0000-0000-0000-000000000000", "evidence": "lease", "reason": "quarantined\n\"x\"", "duration": 1.5,
			"identity": map[string]any{"trustDomain": "portcullis.lab", "namespace": "default", "serviceAccount": "sleep", "labels": map[string]any{"app": "sleep"}},
			"session":  map[string]any{"spiffeId": peer.SPIFFEID, "serial": "c0ffee", "issuer": "O=lab"},
		},
		{"node": "n1", "kind": "session-up", "peer": "n2"},
		{"node": "n1", "kind": "grant", "identity": map[string]any{"reserved": "remote-node"}},
		{"node": "n1", "kind": "checkpoint"},
	}
	if d := cmp.Diff(want, got); d != "" {
		t.Error(d)
	}
	if info, err := os.Stat(path); err != nil || info.Mode().Perm() != 0o600 {
		t.Errorf("mode %v %v", info.Mode(), err)
	}
	o := a.options()
	o.Sealed = true
	r := whole(t, o, path)
	if r.Records != 5 || r.Signed != 5 || r.Head != l.Head() || r.TrustDomain != "portcullis.lab" {
		t.Errorf("%+v", r)
	}
}

// Whoever has the line has what the hash is over.
func TestHashWithoutThisPackage(t *testing.T) {
	r := Record{Sequence: 1, Node: "n1", Kind: lease.LogGrant, Reason: `,"hash":"`, Previous: zeroHash}
	text, err := r.seal()
	must(t, err)
	i := bytes.LastIndex(text, []byte(`,"hash":"`))
	if got := tornOf(text[:i]).SHA256; got != r.Hash || !bytes.HasSuffix(text, []byte(got+"\"}\n")) {
		t.Error(got, string(text))
	}
}

// Every kind of key that an SVID may have signs.
func TestKeys(t *testing.T) {
	a := newAuthority(t)
	_, ed, err := ed25519.GenerateKey(rand.Reader)
	must(t, err)
	rs, err := rsa.GenerateKey(rand.Reader, 2048)
	must(t, err)
	p384, err := ecdsa.GenerateKey(elliptic.P384(), rand.Reader)
	must(t, err)
	for _, key := range []crypto.Signer{ed, rs, p384} {
		path := filepath.Join(t.TempDir(), "audit.log")
		l, err := Open(Config{Path: path, Node: "n1", Signer: signer{svid: a.svid("spiffe://portcullis.lab/portcullis/node/n1", key, time.Hour)}})
		must(t, err)
		must(t, l.Close())
		if r := judged(t, a.options(), path); r.Broken != nil || r.Signed != 2 {
			t.Errorf("%T: %+v %+v", key, r, r.Broken)
		}
	}
}

// A checkpoint counts only if the agent of that node signed it, under the
// bundle, at a time when its certificate was valid.
func TestStrangersSignatures(t *testing.T) {
	a, other := newAuthority(t), newAuthority(t)
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	must(t, err)
	wrong := a.agent("n1")
	wrong.svid = &x509svid.SVID{Certificates: wrong.svid.Certificates, PrivateKey: key}
	for what, s := range map[string]signer{
		"another node":      a.agent("n2"),
		"another authority": other.agent("n1"),
		"a workload":        {svid: a.svid("spiffe://portcullis.lab/ns/default/sa/x", key, time.Hour)},
		"expired":           {svid: a.svid("spiffe://portcullis.lab/portcullis/node/n1", key, -time.Second)},
		"another key":       wrong,
	} {
		path := filepath.Join(t.TempDir(), "audit.log")
		l, err := Open(Config{Path: path, Node: "n1", Signer: s})
		must(t, err)
		must(t, l.Close())
		if r := judged(t, a.options(), path); r.Broken == nil || r.Broken.Sequence != 2 || !strings.Contains(r.Broken.What, "not genuine") {
			t.Errorf("%s: %+v", what, r.Broken)
		}
	}
	path := filepath.Join(t.TempDir(), "audit.log")
	l, err := Open(Config{Path: path, Node: "n1", Signer: a.agent("n1")})
	must(t, err)
	must(t, l.Close())
	o := a.options()
	o.TrustDomain = spiffeid.RequireTrustDomainFromString("elsewhere")
	if r := judged(t, o, path); r.Broken == nil {
		t.Error("a trust domain that was not asked for passes")
	}
}

// Many goroutines append; each record is a line, in one chain.
func TestLinesDoNotMix(t *testing.T) {
	path := filepath.Join(t.TempDir(), "audit.log")
	a := newAuthority(t)
	l, err := Open(Config{Path: path, Node: "n1", Signer: a.agent("n1")})
	must(t, err)
	if _, err := Open(Config{Path: path, Node: "n1"}); err == nil {
		t.Error("two processes write one log")
	}
	var wg sync.WaitGroup
	for range 8 {
		wg.Go(func() {
			for range 500 {
				if err := l.Append(full, peer); err != nil {
					t.Error(err)
				}
			}
		})
	}
	wg.Wait()
	for deadline := time.Now().Add(60 * time.Second); len(l.queue) > 0 && time.Now().Before(deadline); { // Close's patience has an end
		time.Sleep(time.Millisecond)
	}
	must(t, l.Close())
	if r := whole(t, a.options(), path); r.Records != 4000+1+r.Checkpoints || r.Checkpoints < 4 {
		t.Errorf("%+v", r)
	}
	if err := l.Append(full, nil); !errors.Is(err, ErrClosed) || l.Lost() != 1 {
		t.Errorf("after Close: %v, %d lost", err, l.Lost())
	}
}

// Without an SVID the log goes on, says so once, and is signed when there is one.
func TestNoSVID(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		path := filepath.Join(t.TempDir(), "audit.log")
		a := newAuthority(t)
		s := &late{}
		l, err := Open(Config{Path: path, Node: "n1", Signer: s})
		must(t, err)
		must(t, l.Append(full, nil))
		time.Sleep(10 * time.Minute)
		if _, signing := l.Problems(); signing == "" {
			t.Error("nobody is told")
		}
		s.set(a.agent("n1"))
		time.Sleep(2 * time.Minute)
		if _, signing := l.Problems(); signing != "" {
			t.Error("told for ever")
		}
		must(t, l.Close())
		if r := whole(t, a.options(), path); r.Unsigned != 1 || r.Signed != 5 { // with the one of the stop
			t.Errorf("%+v", r)
		}
	})
}

type late struct {
	mu sync.Mutex
	s  Signer
}

func (l *late) set(s Signer) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.s = s
}

func (l *late) GetX509SVID() (*x509svid.SVID, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.s == nil {
		return nil, errors.New("no SVID yet")
	}
	return l.s.GetX509SVID()
}

// The clock that goes back is told, and is no tampering.
func TestClockBack(t *testing.T) {
	a := newAuthority(t)
	path := filepath.Join(t.TempDir(), "audit.log")
	s := a.agent("n1")
	at := Head{Hash: zeroHash}
	var out []byte
	now := time.Now().UTC().Round(0)
	for i, back := range []time.Duration{0, 0, time.Minute, 0} {
		r := Record{Sequence: at.Sequence + 1, Previous: at.Hash, Time: now.Add(-back), Node: "n1", Kind: lease.LogGrant}
		switch i {
		case 0:
			r.Kind, r.Begin = KindStart, &Begin{Version: 1, Clean: true, Records: 10, Interval: 60}
		case 3:
			r.Kind = KindCheckpoint
			must(t, sign(s, &r, "stop"))
		}
		text, err := r.seal()
		must(t, err)
		out = append(out, text...)
		at = Head{r.Sequence, r.Hash}
	}
	must(t, os.WriteFile(path, out, 0o600))
	if r := whole(t, a.options(), path); r.ClockBack != time.Minute {
		t.Errorf("%v", r.ClockBack)
	}
}

func BenchmarkAppend(b *testing.B) {
	for _, sync := range []Sync{SyncNone, SyncInterval, SyncAlways} {
		b.Run(string(sync), func(b *testing.B) {
			a := newAuthority(b)
			l, err := Open(Config{Path: filepath.Join(b.TempDir(), "audit.log"), Node: "n1", Signer: a.agent("n1"), Sync: sync, MaxBytes: 1 << 40})
			must(b, err)
			b.ReportAllocs()
			for b.Loop() {
				for errors.Is(l.Append(full, peer), ErrFull) {
					time.Sleep(100 * time.Microsecond)
				}
			}
			must(b, l.Close())
			b.ReportMetric(float64(b.N)/b.Elapsed().Seconds(), "records/s")
		})
	}
}

// BenchmarkPaced tells what 10,000 records a second cost: CPU in per cent of
// one core, and how long Append takes at the 99.9th percentile.
func BenchmarkPaced(b *testing.B) {
	a := newAuthority(b)
	l, err := Open(Config{Path: filepath.Join(b.TempDir(), "audit.log"), Node: "n1", Signer: a.agent("n1")})
	must(b, err)
	cpu := func() time.Duration {
		var u unix.Rusage
		must(b, unix.Getrusage(unix.RUSAGE_SELF, &u))
		return time.Duration(u.Utime.Nano() + u.Stime.Nano())
	}
	var took []time.Duration
	before, start := cpu(), time.Now()
	for i := range b.N {
		if i%100 == 0 {
			time.Sleep(time.Until(start.Add(time.Duration(i) * 100 * time.Microsecond)))
		}
		at := time.Now()
		must(b, l.Append(full, peer))
		took = append(took, time.Since(at))
	}
	wall := time.Since(start)
	must(b, l.Close())
	slices.Sort(took)
	b.ReportMetric(100*float64(cpu()-before)/float64(wall), "%core")
	b.ReportMetric(float64(took[len(took)*999/1000].Nanoseconds()), "append-p99.9-ns")
}

func BenchmarkVerify(b *testing.B) {
	a := newAuthority(b)
	path := filepath.Join(b.TempDir(), "audit.log")
	l, err := Open(Config{Path: path, Node: "n1", Signer: a.agent("n1"), MaxBytes: 1 << 40})
	must(b, err)
	for range 20_000 {
		for l.Append(full, peer) != nil {
			time.Sleep(time.Millisecond)
		}
	}
	must(b, l.Close())
	records := uint64(0)
	for b.Loop() {
		records += whole(b, a.options(), path).Records
	}
	b.ReportMetric(float64(records)/b.Elapsed().Seconds(), "records/s")
}
