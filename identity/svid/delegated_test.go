package svid

import (
	"errors"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/svid/x509svid"
	delegated "github.com/spiffe/spire-api-sdk/proto/spire/api/agent/delegatedidentity/v1"
	"github.com/spiffe/spire-api-sdk/proto/spire/api/types"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
)

// spireAgent is a double of a SPIRE agent's Delegated Identity API, written from
// the published protocol. What bites in the real one bites here: entries match
// whose selectors are a subset of those asked for; an answer comes at once, with
// no SVIDs if no entry fits yet; what is given is not looked at, so an SVID
// that is over goes out too; SVIDs of an entry come when they come.
type spireAgent struct {
	delegated.UnimplementedDelegatedIdentityServer
	authority *authority

	mu       sync.Mutex
	entries  []entry            // guarded by mu
	stranger bool               // guarded by mu; the caller is no delegate
	process  map[int32][]string // guarded by mu; what the attestors find of a process, by pid
	streams  int                // guarded by mu; of SVIDs that are open
	changed  chan struct{}      // guarded by mu; closed and replaced at each change
}

type entry struct {
	selectors []string
	svid      *x509svid.SVID
	claimed   spiffeid.ID // what the message says that the SVID is of
	key       []byte      // nil: the SVID's
}

func (a *spireAgent) set(entries ...entry) {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.entries = entries
	close(a.changed)
	a.changed = make(chan struct{})
}

func of(v *x509svid.SVID, selectors ...string) entry {
	return entry{selectors: selectors, svid: v, claimed: v.ID}
}

func (a *spireAgent) SubscribeToX509SVIDs(r *delegated.SubscribeToX509SVIDsRequest, stream grpc.ServerStreamingServer[delegated.SubscribeToX509SVIDsResponse]) error {
	if (len(r.Selectors) == 0) == (r.Pid == 0) {
		return status.Error(codes.InvalidArgument, "must provide either selectors or non-zero PID")
	}
	var asked []string
	for _, s := range r.Selectors {
		asked = append(asked, s.Type+":"+s.Value)
	}
	a.mu.Lock()
	asked = append(asked, a.process[r.Pid]...)
	a.streams++
	a.mu.Unlock()
	defer func() {
		a.mu.Lock()
		a.streams--
		a.mu.Unlock()
	}()
	for {
		a.mu.Lock()
		entries, stranger, changed := a.entries, a.stranger, a.changed
		a.mu.Unlock()
		if stranger {
			return status.Error(codes.PermissionDenied, "caller not configured as an authorized delegate")
		}
		answer := &delegated.SubscribeToX509SVIDsResponse{}
		for _, e := range entries {
			if slices.ContainsFunc(e.selectors, func(s string) bool { return !slices.Contains(asked, s) }) {
				continue
			}
			certs, key, err := e.svid.MarshalRaw()
			if err != nil {
				return status.Error(codes.Internal, err.Error())
			}
			if e.key != nil {
				key = e.key
			}
			answer.X509Svids = append(answer.X509Svids, &delegated.X509SVIDWithKey{X509SvidKey: key, X509Svid: &types.X509SVID{
				CertChain: [][]byte{certs}, Id: &types.SPIFFEID{TrustDomain: e.claimed.TrustDomain().Name(), Path: e.claimed.Path()}, ExpiresAt: e.svid.Certificates[0].NotAfter.Unix()}})
		}
		if err := stream.Send(answer); err != nil {
			return err
		}
		select {
		case <-changed:
		case <-stream.Context().Done():
			return stream.Context().Err()
		}
	}
}

func (a *spireAgent) SubscribeToX509Bundles(_ *delegated.SubscribeToX509BundlesRequest, stream grpc.ServerStreamingServer[delegated.SubscribeToX509BundlesResponse]) error {
	if err := stream.Send(&delegated.SubscribeToX509BundlesResponse{CaCertificates: map[string][]byte{self.TrustDomain().IDString(): a.authority.cert.Raw}}); err != nil {
		return err
	}
	<-stream.Context().Done()
	return stream.Context().Err()
}

// listen serves on an admin socket; stop ends it and its streams.
func (a *spireAgent) listen(t *testing.T, path string) (stop func()) {
	t.Helper()
	ln, err := net.Listen("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	g := grpc.NewServer(grpc.WaitForHandlers(true))
	delegated.RegisterDelegatedIdentityServer(g, a)
	var wg sync.WaitGroup
	wg.Go(func() { g.Serve(ln) })
	stop = sync.OnceFunc(func() { g.Stop(); wg.Wait() })
	t.Cleanup(stop)
	return stop
}

// spire runs a double and a connection to it.
func spire(t *testing.T) (a *spireAgent, d *Delegated, socket string, stop func()) {
	t.Helper()
	dir, err := os.MkdirTemp("", "spire")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	a = &spireAgent{authority: newAuthority(t), changed: make(chan struct{})}
	socket = filepath.Join(dir, "admin.sock")
	stop = a.listen(t, socket)
	if d, err = NewDelegated("unix://" + socket); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { d.Close() })
	return a, d, socket, stop
}

func workload(t *testing.T, d *Delegated, id spiffeid.ID, selectors ...string) *Source {
	t.Helper()
	var list []Selector
	for _, s := range selectors {
		kind, value, _ := strings.Cut(s, ":")
		list = append(list, Selector{kind, value})
	}
	from, err := d.Workload(list)
	if err != nil {
		t.Fatal(err)
	}
	return running(t, Config{From: from, ID: id, Workload: true})
}

func account(name string) spiffeid.ID {
	return spiffeid.RequireFromPath(self.TrustDomain(), "/ns/default/sa/"+name)
}

// The selectors of two pods bring the SVIDs of both: each source has its own.
func TestDelegatedPicksByExactID(t *testing.T) {
	a, d, _, _ := spire(t)
	red, blue := a.authority.issue(t, account("red"), time.Hour), a.authority.issue(t, account("blue"), time.Hour)
	longer := a.authority.issue(t, account("blue"), 2*time.Hour)
	a.set(of(red, "k8s:sa:red"), of(blue, "k8s:sa:blue"), of(longer, "k8s:sa:blue", "k8s:ns:default"))
	all := []string{"k8s:ns:default", "k8s:sa:red", "k8s:sa:blue"}
	s := workload(t, d, account("blue"), all...)
	until(t, "its own, of two the one that ends last", gives(s, longer))
	until(t, "the other's", gives(workload(t, d, account("red"), all...), red))
	if _, _, err := x509svid.Verify(longer.Certificates, s); err != nil {
		t.Errorf("with the bundle that came along: %v", err)
	}
	other := workload(t, d, account("green"), all...)
	until(t, "nobody's", func() bool { return errors.Is(other.Problem(), ErrWrongID) })
	if _, err := other.GetX509SVID(); err == nil {
		t.Error("a workload got another's SVID")
	}
}

// A stream that is opened before the entry is known begins with no SVIDs: that
// is no verdict.
func TestDelegatedComesLate(t *testing.T) {
	a, d, _, _ := spire(t)
	s := workload(t, d, account("red"), "k8s:sa:red")
	until(t, "it is not given yet", func() bool { _, err := s.GetX509SVID(); return errors.Is(err, ErrNotGiven) })
	red := a.authority.issue(t, account("red"), time.Hour)
	a.set(of(red, "k8s:sa:red"))
	until(t, "the SVID", gives(s, red))
}

// While its server is down a SPIRE agent gives out what is over.
func TestDelegatedExpired(t *testing.T) {
	a, d, _, _ := spire(t)
	a.set(of(a.authority.issue(t, account("red"), -time.Minute), "k8s:sa:red"))
	s := workload(t, d, account("red"), "k8s:sa:red")
	until(t, "it is over", func() bool { _, err := s.GetX509SVID(); return errors.Is(err, ErrExpired) })
}

// What was given can be taken back; a SPIRE agent that restarts, and has nothing
// at first, takes nothing back.
func TestDelegatedWithdrawal(t *testing.T) {
	a, d, socket, stop := spire(t)
	red := a.authority.issue(t, account("red"), time.Hour)
	a.set(of(red, "k8s:sa:red"))
	s := workload(t, d, account("red"), "k8s:sa:red")
	until(t, "the SVID", gives(s, red))

	stop()
	until(t, "the break is noticed", func() bool { return s.Problem() != nil })
	b := &spireAgent{authority: a.authority, changed: make(chan struct{})}
	b.listen(t, socket)
	until(t, "the new one has nothing yet", func() bool { return errors.Is(s.Problem(), ErrNotGiven) })
	if !gives(s, red)() {
		t.Error("a restart of the SPIRE agent took the SVID away")
	}
	next := a.authority.issue(t, account("red"), 2*time.Hour)
	b.set(of(next, "k8s:sa:red"))
	until(t, "the renewed SVID", gives(s, next))
	changed := s.Changed()
	b.set()
	<-changed
	until(t, "it is withdrawn", func() bool { _, err := s.GetX509SVID(); return errors.Is(err, ErrWithdrawn) })
	b.set(of(next, "k8s:sa:red"))
	until(t, "it is given again", gives(s, next))
}

func TestDelegatedRefusal(t *testing.T) {
	a, d, _, _ := spire(t)
	a.stranger = true
	s := workload(t, d, account("red"), "k8s:sa:red")
	until(t, "what to do about it is said", func() bool { _, err := s.GetX509SVID(); return errors.Is(err, ErrNotDelegate) })
	missing, err := NewDelegated("unix:///nonexistent/admin.sock")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { missing.Close() })
	s = workload(t, missing, account("red"), "k8s:sa:red")
	until(t, "the socket is missing", func() bool { return errors.Is(s.Problem(), ErrNoSocket) })
}

// An SVID that is not what the message says, or without its key, is left out;
// the others are not.
func TestDelegatedBroken(t *testing.T) {
	a, d, _, _ := spire(t)
	red, blue := a.authority.issue(t, account("red"), time.Hour), a.authority.issue(t, account("blue"), time.Hour)
	_, othersKey, err := red.MarshalRaw()
	if err != nil {
		t.Fatal(err)
	}
	posing := of(blue, "k8s:sa:red")
	posing.claimed = account("green")
	keyless := of(a.authority.issue(t, account("grey"), time.Hour), "k8s:sa:red")
	keyless.key = othersKey
	a.set(posing, keyless, of(red, "k8s:sa:red"))
	until(t, "the whole one", gives(workload(t, d, account("red"), "k8s:sa:red"), red))
	for _, name := range []string{"green", "blue", "grey"} {
		s := workload(t, d, account(name), "k8s:sa:red")
		until(t, name+" gets nothing", func() bool { return s.Problem() != nil })
		if _, err := s.GetX509SVID(); err == nil {
			t.Errorf("%s: a broken SVID was used", name)
		}
	}
}

func TestDelegatedNeedsSelectors(t *testing.T) {
	_, d, _, _ := spire(t)
	for _, bad := range [][]Selector{nil, {{"k8s", ""}}, {{"", "x"}}} {
		if _, err := d.Workload(bad); err == nil {
			t.Errorf("%v was accepted", bad)
		}
	}
	if _, err := NewDelegated("tcp://127.0.0.1:1"); err == nil {
		t.Error("an address that is no socket was accepted")
	}
}

// The agent's own SVID outlives an answer without it.
func TestAgentsOwnIsKept(t *testing.T) {
	s, err := New(Config{From: &workloadAPI{addr: "unix:///x"}, ID: self})
	if err != nil {
		t.Fatal(err)
	}
	c := given(t, time.Now().Add(-time.Minute), time.Now().Add(time.Hour))
	s.update(c)
	c.SVIDs = nil
	s.update(c)
	if _, err := s.GetX509SVID(); err != nil {
		t.Errorf("it is gone: %v", err)
	}
	if !errors.Is(s.Problem(), ErrNotGiven) {
		t.Errorf("Problem: %v", s.Problem())
	}
}
