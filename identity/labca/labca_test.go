package labca

import (
	"context"
	"crypto/x509"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/bundle/x509bundle"
	"github.com/spiffe/go-spiffe/v2/proto/spiffe/workload"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/svid/x509svid"
	"github.com/spiffe/go-spiffe/v2/workloadapi"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"

	"portcullis/identity"
)

var td = spiffeid.RequireTrustDomainFromString("portcullis.lab")

// labDir returns a marked directory whose path is short enough for a socket.
func labDir(t *testing.T) string {
	t.Helper()
	dir, err := os.MkdirTemp("", "lab")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	if err := Mark(dir); err != nil {
		t.Fatal(err)
	}
	return dir
}

// start serves until the test ends.
func start(t *testing.T, cfg Config) *CA {
	t.Helper()
	ca, err := New(cfg)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() { done <- ca.Run(ctx) }()
	t.Cleanup(func() {
		cancel()
		if err := <-done; err != nil {
			t.Errorf("Run: %v", err)
		}
	})
	select {
	case <-ca.Ready():
	case err := <-done:
		t.Fatalf("Run: %v", err)
	}
	return ca
}

func client(t *testing.T, dir string, node identity.NodeName) *workloadapi.Client {
	t.Helper()
	c, err := workloadapi.New(t.Context(), workloadapi.WithAddr(Address(dir, node)))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	return c
}

// The real SPIFFE client must accept what is served, and the SVID must verify.
func TestSocketDecidesWhichSVID(t *testing.T) {
	dir := labDir(t)
	start(t, Config{Dir: dir, TrustDomain: td, Nodes: []identity.NodeName{"n1", "n2"}})
	for _, node := range []identity.NodeName{"n1", "n2"} {
		c, err := client(t, dir, node).FetchX509Context(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		svid := c.DefaultSVID()
		if want := "spiffe://portcullis.lab/portcullis/node/" + string(node); svid.ID.String() != want || len(c.SVIDs) != 1 {
			t.Errorf("socket of %s gives %v, want only %s", node, svid.ID, want)
		}
		if id, _, err := x509svid.Verify(svid.Certificates, c.Bundles); err != nil || id != svid.ID {
			t.Errorf("the SVID of %s does not verify: %v %v", node, id, err)
		}
		if life := time.Until(svid.Certificates[0].NotAfter); life > DefaultTTL || life < DefaultTTL-time.Minute {
			t.Errorf("the SVID lives for %s, want %s", life, DefaultTTL)
		}
		if svid.Certificates[0].IsCA || svid.Certificates[0].KeyUsage&x509.KeyUsageCertSign != 0 {
			t.Error("the SVID can sign")
		}
		bundles, err := client(t, dir, node).FetchX509Bundles(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		if b, err := bundles.GetX509BundleForTrustDomain(td); err != nil || len(b.X509Authorities()) != 1 {
			t.Errorf("bundle: %v %v", b, err)
		}
	}
}

func TestSecurityHeaderIsDemanded(t *testing.T) {
	dir := labDir(t)
	start(t, Config{Dir: dir, TrustDomain: td, Nodes: []identity.NodeName{"n1"}})
	conn, err := grpc.NewClient(Address(dir, "n1"), grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	api := workload.NewSpiffeWorkloadAPIClient(conn)
	for _, test := range []struct {
		name string
		ctx  context.Context
		want codes.Code
	}{
		{"missing", t.Context(), codes.InvalidArgument},
		{"false", metadata.AppendToOutgoingContext(t.Context(), "workload.spiffe.io", "false"), codes.InvalidArgument},
		{"twice", metadata.AppendToOutgoingContext(t.Context(), "workload.spiffe.io", "true", "workload.spiffe.io", "x"), codes.InvalidArgument},
		{"true", metadata.AppendToOutgoingContext(t.Context(), "workload.spiffe.io", "true"), codes.OK},
	} {
		t.Run(test.name, func(t *testing.T) {
			ctx, cancel := context.WithCancel(test.ctx)
			defer cancel()
			svids, err := api.FetchX509SVID(ctx, &workload.X509SVIDRequest{})
			if err != nil {
				t.Fatal(err)
			}
			if _, err := svids.Recv(); status.Code(err) != test.want {
				t.Errorf("FetchX509SVID: %v, want %v", err, test.want)
			}
			bundles, err := api.FetchX509Bundles(ctx, &workload.X509BundlesRequest{})
			if err != nil {
				t.Fatal(err)
			}
			if _, err := bundles.Recv(); status.Code(err) != test.want {
				t.Errorf("FetchX509Bundles: %v, want %v", err, test.want)
			}
		})
	}
}

// follower keeps what a watch gives.
type follower struct {
	got chan *workloadapi.X509Context
}

func (f follower) OnX509ContextUpdate(c *workloadapi.X509Context) { f.got <- c }
func (f follower) OnX509ContextWatchError(error)                  {}

func follow(t *testing.T, dir string, node identity.NodeName) <-chan *workloadapi.X509Context {
	f := follower{make(chan *workloadapi.X509Context, 64)}
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan struct{})
	c := client(t, dir, node)
	go func() { defer close(done); c.WatchX509Context(ctx, f) }()
	t.Cleanup(func() { cancel(); <-done })
	return f.got
}

func TestStreamBringsRenewals(t *testing.T) {
	dir := labDir(t)
	start(t, Config{Dir: dir, TrustDomain: td, Nodes: []identity.NodeName{"n1"}, TTL: 4 * time.Second})
	got := follow(t, dir, "n1")
	first := (<-got).DefaultSVID().Certificates[0]
	last := first
	for range 2 {
		next := (<-got).DefaultSVID().Certificates[0]
		if next.Equal(last) {
			t.Fatal("the same SVID was sent again")
		}
		// Certificates know whole seconds only.
		if next.NotAfter.Before(last.NotAfter) {
			t.Errorf("the SVID ends at %v, its renewal at %v", last.NotAfter, next.NotAfter)
		}
		last = next
	}
	if !last.NotAfter.After(first.NotAfter) {
		t.Errorf("the SVID ends at %v, after two renewals at %v", first.NotAfter, last.NotAfter)
	}
}

func TestReplaceAuthority(t *testing.T) {
	dir := labDir(t)
	ca := start(t, Config{Dir: dir, TrustDomain: td, Nodes: []identity.NodeName{"n1"}})
	got := follow(t, dir, "n1")
	first := <-got
	for _, keep := range []bool{true, false} {
		if err := ca.ReplaceAuthority(keep); err != nil {
			t.Fatal(err)
		}
		next := <-got
		if _, _, err := x509svid.Verify(next.DefaultSVID().Certificates, next.Bundles); err != nil {
			t.Errorf("keep=%v: the new SVID does not verify: %v", keep, err)
		}
		if _, _, err := x509svid.Verify(first.DefaultSVID().Certificates, next.Bundles); (err == nil) != keep {
			t.Errorf("keep=%v: verifying an SVID of the old authority: %v", keep, err)
		}
	}
}

func TestAuthoritySurvivesRestart(t *testing.T) {
	dir := labDir(t)
	cfg := Config{Dir: dir, TrustDomain: td, Nodes: []identity.NodeName{"n1"}}
	var bundles []*x509bundle.Bundle
	for range 2 {
		t.Run("", func(t *testing.T) {
			start(t, cfg)
			set, err := client(t, dir, "n1").FetchX509Bundles(t.Context())
			if err != nil {
				t.Fatal(err)
			}
			b, _ := set.Get(td)
			bundles = append(bundles, b)
		})
	}
	if len(bundles) != 2 || !bundles[0].Equal(bundles[1]) {
		t.Error("a restart changed the trust bundle")
	}
	info, err := os.Stat(filepath.Join(dir, authorityFile))
	if err != nil || info.Mode().Perm() != 0o600 {
		t.Errorf("the authority's file: %v %v", info.Mode(), err)
	}
	if err := os.WriteFile(filepath.Join(dir, authorityFile), []byte("x"), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := New(cfg); err == nil || !strings.Contains(err.Error(), "damaged") {
		t.Errorf("a damaged authority: %v", err)
	}
}

func TestOneProcessServesALab(t *testing.T) {
	dir := labDir(t)
	cfg := Config{Dir: dir, TrustDomain: td, Nodes: []identity.NodeName{"n1"}}
	start(t, cfg)
	if err := Run(t.Context(), cfg); err == nil || !strings.Contains(err.Error(), "already") {
		t.Errorf("a second one: %v", err)
	}
}

func TestRefusedOutsideALab(t *testing.T) {
	marked := labDir(t)
	bare, open := t.TempDir(), labDir(t)
	if err := os.Chmod(bare, 0o700); err != nil {
		t.Fatal(err)
	}
	if err := os.Chmod(open, 0o755); err != nil {
		t.Fatal(err)
	}
	link := filepath.Join(t.TempDir(), "link")
	if err := os.Symlink(marked, link); err != nil {
		t.Fatal(err)
	}
	good := []identity.NodeName{"n1"}
	for _, test := range []struct {
		name, want string
		cfg        Config
	}{
		{"no marker", MarkerFile, Config{Dir: bare, TrustDomain: td, Nodes: good}},
		{"open to others", "0700", Config{Dir: open, TrustDomain: td, Nodes: good}},
		{"a link", "0700", Config{Dir: link, TrustDomain: td, Nodes: good}},
		{"missing", "no such file", Config{Dir: filepath.Join(bare, "x"), TrustDomain: td, Nodes: good}},
		{"relative", "absolute", Config{Dir: "lab", TrustDomain: td, Nodes: good}},
		{"real trust domain", ".lab", Config{Dir: marked, TrustDomain: spiffeid.RequireTrustDomainFromString("example.org"), Nodes: good}},
		{"no trust domain", ".lab", Config{Dir: marked, Nodes: good}},
		{"looks like a lab", ".lab", Config{Dir: marked, TrustDomain: spiffeid.RequireTrustDomainFromString("notalab"), Nodes: good}},
		{"no nodes", "names of the nodes", Config{Dir: marked, TrustDomain: td}},
		{"a node twice", "twice", Config{Dir: marked, TrustDomain: td, Nodes: []identity.NodeName{"n1", "n1"}}},
		{"a node with a slash", "node name", Config{Dir: marked, TrustDomain: td, Nodes: []identity.NodeName{"a/b"}}},
		{"a node that goes up", "node name", Config{Dir: marked, TrustDomain: td, Nodes: []identity.NodeName{".."}}},
		{"a long name", "longer than", Config{Dir: marked, TrustDomain: td, Nodes: []identity.NodeName{identity.NodeName(strings.Repeat("n", 120))}}},
		{"short life", "at least", Config{Dir: marked, TrustDomain: td, Nodes: good, TTL: time.Second}},
	} {
		t.Run(test.name, func(t *testing.T) {
			if _, err := New(test.cfg); err == nil || !strings.Contains(err.Error(), test.want) {
				t.Errorf("New: %v, want something with %q", err, test.want)
			}
		})
	}
}
