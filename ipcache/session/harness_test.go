package session_test

import (
	"bytes"
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"encoding/pem"
	"fmt"
	"math/big"
	"net/url"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/bundle/x509bundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/svid/x509svid"
	"go.uber.org/zap"
	"go.uber.org/zap/zaptest"

	"portcullis/identity"
	"portcullis/identity/labca"
	"portcullis/identity/svid"
	"portcullis/ipcache/lease"
	"portcullis/ipcache/session"
)

// patience bounds every wait. Nothing is expected to take this long.
const patience = 20 * time.Second

// TestMain fails if a goroutine or a file descriptor outlives the tests.
func TestMain(m *testing.M) {
	before := descriptors()
	code := m.Run()
	if left := leaked(before); left != "" && code == 0 {
		fmt.Fprintln(os.Stderr, "left behind by the tests:\n"+left)
		code = 1
	}
	os.Exit(code)
}

func descriptors() int {
	entries, _ := os.ReadDir("/proc/self/fd")
	return len(entries)
}

func leaked(before int) (left string) {
	for deadline := time.Now().Add(5 * time.Second); ; time.Sleep(10 * time.Millisecond) {
		buf := make([]byte, 1<<20)
		var stacks []string
		for _, g := range strings.Split(string(buf[:runtime.Stack(buf, true)]), "\n\n") {
			if strings.Contains(g, "TestMain") || strings.Contains(g, "testing.") && !strings.Contains(g, "portcullis/") {
				continue
			}
			if strings.Contains(g, "portcullis/") || strings.Contains(g, "grpc") {
				stacks = append(stacks, g)
			}
		}
		left = strings.Join(stacks, "\n\n")
		if n := descriptors(); n > before+2 { // the poller's own descriptors come with the first socket
			left += fmt.Sprintf("\n%d file descriptors, there were %d", n, before)
		}
		if left == "" || time.Now().After(deadline) {
			return left
		}
	}
}

// lab is a trust domain with its Workload API, on loopback.
type lab struct {
	dir string
	td  spiffeid.TrustDomain
	ca  *labca.CA
}

func newLab(t testing.TB, name string, ttl time.Duration, nodes ...identity.NodeName) *lab {
	t.Helper()
	dir, err := os.MkdirTemp("", "lab")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	if err := labca.Mark(dir); err != nil {
		t.Fatal(err)
	}
	l := &lab{dir: dir, td: spiffeid.RequireTrustDomainFromString(name)}
	l.ca, err = labca.New(labca.Config{Dir: dir, TrustDomain: l.td, Nodes: nodes, TTL: ttl})
	if err != nil {
		t.Fatal(err)
	}
	background(t, l.ca.Run)
	<-l.ca.Ready()
	return l
}

// background runs until the test ends, and waits for the end.
func background(t testing.TB, run func(context.Context) error) (stop func()) {
	t.Helper()
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- run(ctx) }()
	stop = sync.OnceFunc(func() {
		cancel()
		if err := <-done; err != nil {
			t.Errorf("Run: %v", err)
		}
	})
	t.Cleanup(stop)
	return stop
}

func (l *lab) source(t testing.TB, node identity.NodeName) *svid.Source {
	t.Helper()
	id, err := session.AgentID(l.td, node)
	if err != nil {
		t.Fatal(err)
	}
	from, err := svid.WorkloadAPI(labca.Address(l.dir, node))
	if err != nil {
		t.Fatal(err)
	}
	s, err := svid.New(svid.Config{From: from, ID: id})
	if err != nil {
		t.Fatal(err)
	}
	background(t, s.Run)
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	if err := s.Wait(ctx); err != nil {
		t.Fatal(err)
	}
	return s
}

// forge signs an SVID with the lab's authority: for what labca itself would
// never issue.
func (l *lab) forge(t testing.TB, id string, begin, end time.Time) *x509svid.SVID {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	return l.forgeFor(t, id, begin, end, key)
}

func (l *lab) forgeFor(t testing.TB, id string, begin, end time.Time, key crypto.Signer) *x509svid.SVID {
	t.Helper()
	data, err := os.ReadFile(filepath.Join(l.dir, "authority.pem"))
	if err != nil {
		t.Fatal(err)
	}
	block, rest := pem.Decode(data)
	signer, err := x509.ParsePKCS8PrivateKey(block.Bytes)
	if err != nil {
		t.Fatal(err)
	}
	block, _ = pem.Decode(rest)
	authority, err := x509.ParseCertificate(block.Bytes)
	if err != nil {
		t.Fatal(err)
	}
	u, err := url.Parse(id)
	if err != nil {
		t.Fatal(err)
	}
	der, err := x509.CreateCertificate(rand.Reader, &x509.Certificate{
		SerialNumber: big.NewInt(time.Now().UnixNano()), NotBefore: begin, NotAfter: end,
		KeyUsage: x509.KeyUsageDigitalSignature, BasicConstraintsValid: true, URIs: []*url.URL{u},
	}, authority, key.Public(), signer)
	if err != nil {
		t.Fatal(err)
	}
	cert, err := x509.ParseCertificate(der)
	if err != nil {
		t.Fatal(err)
	}
	return &x509svid.SVID{ID: spiffeid.RequireFromString(id), Certificates: []*x509.Certificate{cert}, PrivateKey: key}
}

// fixed is a source that always gives the same, whatever its worth.
type fixed struct {
	svid    *x509svid.SVID
	bundles x509bundle.Source
}

func (f fixed) GetX509SVID() (*x509svid.SVID, error) { return f.svid, nil }
func (f fixed) Changed() <-chan struct{}             { return nil }
func (f fixed) GetX509BundleForTrustDomain(td spiffeid.TrustDomain) (*x509bundle.Bundle, error) {
	return f.bundles.GetX509BundleForTrustDomain(td)
}

// recorder is a sink that keeps what it was given.
type recorder struct {
	mu    sync.Mutex
	owner []lease.OwnerInput
	verif []lease.VerifierInput
	block chan struct{} // when not nil, messages wait until it is closed
	more  chan struct{} // closed and replaced at each call
}

func newRecorder() *recorder { return &recorder{more: make(chan struct{})} }

func (r *recorder) note(add func()) {
	r.mu.Lock()
	defer r.mu.Unlock()
	add()
	close(r.more)
	r.more = make(chan struct{})
}

func (r *recorder) Owner(in lease.OwnerInput) {
	if _, ok := in.(lease.FromVerifier); ok && r.block != nil {
		<-r.block
	}
	r.note(func() { r.owner = append(r.owner, in) })
}

func (r *recorder) Verifier(in lease.VerifierInput) {
	r.note(func() { r.verif = append(r.verif, in) })
}

// await returns the first input, of those not yet taken, that is a T, and takes
// it.
func await[T any](t testing.TB, r *recorder) T {
	t.Helper()
	timeout := time.After(patience)
	for {
		r.mu.Lock()
		more := r.more
		for i, in := range r.owner {
			if v, ok := any(in).(T); ok {
				r.owner = slices.Delete(r.owner, i, i+1)
				r.mu.Unlock()
				return v
			}
		}
		for i, in := range r.verif {
			if v, ok := any(in).(T); ok {
				r.verif = slices.Delete(r.verif, i, i+1)
				r.mu.Unlock()
				return v
			}
		}
		r.mu.Unlock()
		select {
		case <-more:
		case <-timeout:
			var want T
			t.Fatalf("no %T came; there are %v and %v", want, r.owner, r.verif)
		}
	}
}

// seen tells whether an input of that type was given and not taken.
func seen[T any](r *recorder) bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	for _, in := range r.owner {
		if _, ok := any(in).(T); ok {
			return true
		}
	}
	for _, in := range r.verif {
		if _, ok := any(in).(T); ok {
			return true
		}
	}
	return false
}

// node is one agent's transport.
type node struct {
	*session.Transport
	name  identity.NodeName
	sink  *recorder
	peers map[identity.NodeName]string // written before the first Open
	stop  func()
}

func (l *lab) node(t testing.TB, name identity.NodeName, change ...func(*session.Config)) *node {
	t.Helper()
	n := &node{name: name, sink: newRecorder(), peers: map[identity.NodeName]string{}}
	cfg := session.Config{
		Node: name, TrustDomain: l.td, Listen: "127.0.0.1:0", Sink: n.sink,
		Peer:        func(o identity.NodeName) (string, bool) { a, ok := n.peers[o]; return a, ok },
		Known:       func(identity.NodeName) bool { return true },
		DialTimeout: patience, // the machine may be busy; tests of the timeout set it
	}
	if _, bench := t.(*testing.B); !bench {
		cfg.Log = zaptest.NewLogger(t, zaptest.Level(zap.WarnLevel))
	}
	for _, f := range change {
		f(&cfg)
	}
	if cfg.Source == nil {
		cfg.Source = l.source(t, name)
	}
	tr, err := session.New(cfg)
	if err != nil {
		t.Fatal(err)
	}
	n.Transport = tr
	n.stop = background(t, tr.Run)
	<-tr.Listening()
	return n
}

// knows tells n where others listen.
func (n *node) knows(others ...*node) *node {
	for _, o := range others {
		n.peers[o.name] = o.Addr().String()
	}
	return n
}

// open makes a session and returns its streams at both ends.
func open(t testing.TB, verifier, owner *node) (atVerifier, atOwner lease.StreamID) {
	t.Helper()
	verifier.Open(owner.name)
	opened := await[lease.StreamOpened](t, verifier.sink)
	accepted := await[lease.StreamAccepted](t, owner.sink)
	if opened.Owner != owner.name || accepted.Verifier != verifier.name || opened.Stream == 0 || accepted.Stream == 0 {
		t.Fatalf("%+v, %+v", opened, accepted)
	}
	return opened.Stream, accepted.Stream
}

// refused opens and expects that it fails for a reason with these words.
func refused(t testing.TB, verifier *node, owner identity.NodeName, words string) {
	t.Helper()
	verifier.Open(owner)
	gone := await[lease.OwnerGone](t, verifier.sink)
	if gone.Stream != 0 || gone.Owner != owner || !strings.Contains(gone.Why, words) {
		t.Errorf("%+v, want stream 0 and a reason with %q", gone, words)
	}
	if seen[lease.StreamOpened](verifier.sink) {
		t.Error("the sink was told of an open stream")
	}
}

func uid(b byte) (u identity.UID) { copy(u[:], bytes.Repeat([]byte{b}, 16)); return u }
