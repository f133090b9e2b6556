package client_test

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"encoding/json"
	"encoding/pem"
	"fmt"
	"math/big"
	mathrand "math/rand/v2"
	"net"
	"net/url"
	"os"
	"path/filepath"
	"strconv"
	"sync"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/svid/x509svid"

	"portcullis/identity"
	"portcullis/identity/issuer"
	"portcullis/identity/issuer/client"
	"portcullis/identity/svid"
)

const patience = time.Minute

var td = spiffeid.RequireTrustDomainFromString("cluster.example")

func nodeID(t testing.TB, node identity.NodeName) spiffeid.ID {
	t.Helper()
	id, err := spiffeid.FromPath(td, identity.AgentSPIFFEPath(node))
	if err != nil {
		t.Fatal(err)
	}
	return id
}

// object is an object of a cluster, mounted as a file if it has a path.
type object struct {
	path string

	mu      sync.Mutex
	value   []byte
	version int
	down    error
}

func (o *object) String() string { return "the object" }

func (o *object) Load(context.Context) ([]byte, string, error) {
	o.mu.Lock()
	defer o.mu.Unlock()
	return o.value, strconv.Itoa(o.version), o.down
}

func (o *object) Save(_ context.Context, value []byte, version string) error {
	o.mu.Lock()
	defer o.mu.Unlock()
	if version != strconv.Itoa(o.version) {
		return issuer.ErrConflict
	}
	o.value, o.version = value, o.version+1
	if o.path == "" {
		return nil
	}
	if err := os.WriteFile(o.path+".new", value, 0o600); err != nil {
		return err
	}
	return os.Rename(o.path+".new", o.path)
}

// edit changes what is stored, as an operator would.
func (o *object) edit(t *testing.T, change func([]byte) []byte) {
	t.Helper()
	for {
		value, version, err := o.Load(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		if err := o.Save(t.Context(), change(value), version); err == nil {
			return
		}
	}
}

// cluster is what a cluster has of the issuer: objects, tokens, an address.
type cluster struct {
	dir    string
	keys   *object
	bundle *object
	addr   string

	mu     sync.Mutex
	tokens map[string]identity.NodeName // guarded by mu; who the API server says it is
	asked  int                          // guarded by mu; how often it was asked
}

// Review is the API server's word on a token.
func (c *cluster) Review(_ context.Context, token, audience string) (issuer.Review, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.asked++
	node, ok := c.tokens[token]
	if !ok {
		return issuer.Review{Error: "unknown token"}, nil
	}
	return issuer.Review{Authenticated: true, Audiences: []string{audience}, Username: "system:serviceaccount:portcullis:portcullis-agent",
		Extra: map[string][]string{"authentication.kubernetes.io/node-name": {string(node)}, "authentication.kubernetes.io/pod-name": {"agent"}, "authentication.kubernetes.io/pod-uid": {"u"}}}, nil
}

// knows has the API server know a token from now on.
func (c *cluster) knows(token string, node identity.NodeName) {
	c.mu.Lock()
	defer c.mu.Unlock()
	clear(c.tokens)
	c.tokens[token] = node
}

func newCluster(t *testing.T) *cluster {
	t.Helper()
	dir := t.TempDir()
	c := &cluster{dir: dir, keys: &object{}, bundle: &object{path: filepath.Join(dir, "bundle.json")}, tokens: map[string]identity.NodeName{}}
	// An address of its own, so that nobody takes the port while no issuer runs.
	ln, err := net.Listen("tcp", fmt.Sprintf("127.%d.%d.%d:0", 1+mathrand.N(250), mathrand.N(250), 1+mathrand.N(250)))
	if err != nil {
		t.Fatal(err)
	}
	c.addr = ln.Addr().String()
	ln.Close()
	for _, node := range []identity.NodeName{"n1", "n2"} {
		c.tokens["token-of-"+string(node)] = node
		if err := os.WriteFile(c.token(node), []byte("token-of-"+string(node)+"\n"), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	return c
}

func (c *cluster) token(node identity.NodeName) string {
	return filepath.Join(c.dir, "token-"+string(node))
}

// issue runs an issuer; stop ends it and waits.
func (c *cluster) issue(t *testing.T) (s *issuer.Server, stop func()) {
	t.Helper()
	k, err := issuer.NewKeeper(issuer.KeeperConfig{TrustDomain: td, Keys: c.keys, Bundle: c.bundle, Interval: 20 * time.Millisecond})
	if err != nil {
		t.Fatal(err)
	}
	ln, err := net.Listen("tcp", c.addr)
	if err != nil {
		t.Fatal(err)
	}
	s, err = issuer.NewServer(issuer.ServerConfig{Keeper: k, Reviewer: c, Listener: ln,
		Rules: issuer.Rules{Audience: issuer.DefaultAudience, Account: "system:serviceaccount:portcullis:portcullis-agent"}})
	if err != nil {
		t.Fatal(err)
	}
	return s, background(t, k.Run, s.Run)
}

func background(t *testing.T, runs ...func(context.Context) error) (stop func()) {
	t.Helper()
	ctx, cancel := context.WithCancel(context.Background())
	var wg sync.WaitGroup
	for _, run := range runs {
		wg.Go(func() {
			if err := run(ctx); err != nil {
				t.Errorf("Run: %v", err)
			}
		})
	}
	stop = sync.OnceFunc(func() { cancel(); wg.Wait() })
	t.Cleanup(stop)
	return stop
}

func (c *cluster) config(t *testing.T, node identity.NodeName) client.Config {
	return client.Config{URL: "https://" + c.addr, TokenFile: c.token(node), BundleFile: c.bundle.path,
		CacheFile: filepath.Join(c.dir, "run-"+string(node), "node-svid.json"), ID: nodeID(t, node), Poll: 20 * time.Millisecond}
}

// agent runs a node's source of SVIDs.
func (c *cluster) agent(t *testing.T, node identity.NodeName) (s *svid.Source, stop func()) {
	t.Helper()
	return c.source(t, c.config(t, node))
}

func (c *cluster) source(t *testing.T, cfg client.Config) (s *svid.Source, stop func()) {
	t.Helper()
	from, err := client.New(cfg)
	if err != nil {
		t.Fatal(err)
	}
	if s, err = svid.New(svid.Config{From: from, ID: cfg.ID}); err != nil {
		t.Fatal(err)
	}
	return s, background(t, s.Run)
}

func wait(t *testing.T, s *svid.Source) *x509svid.SVID {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	if err := s.Wait(ctx); err != nil {
		t.Fatal(err)
	}
	v, err := s.GetX509SVID()
	if err != nil {
		t.Fatal(err)
	}
	return v
}

// until polls a condition.
func until(t *testing.T, what string, ok func() bool) {
	t.Helper()
	for deadline := time.Now().Add(patience); !ok(); {
		if time.Now().After(deadline) {
			t.Fatalf("after %s: not yet: %s", patience, what)
		}
		select {
		case <-time.After(5 * time.Millisecond):
		case <-t.Context().Done():
		}
	}
}

func authorities(s *svid.Source) int {
	b, err := s.GetX509BundleForTrustDomain(td)
	if err != nil {
		return 0
	}
	return len(b.X509Authorities())
}

// aged returns a Secret whose only authority is past the half of its life.
func aged(t *testing.T) []byte {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	begin := time.Now().Add(-20 * 24 * time.Hour)
	template := &x509.Certificate{SerialNumber: big.NewInt(7), NotBefore: begin, NotAfter: begin.Add(issuer.DefaultAuthorityLife),
		KeyUsage: x509.KeyUsageCertSign, IsCA: true, BasicConstraintsValid: true, MaxPathLenZero: true, URIs: []*url.URL{td.ID().URL()}}
	der, err := x509.CreateCertificate(rand.Reader, template, template, key.Public(), key)
	if err != nil {
		t.Fatal(err)
	}
	private, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		t.Fatal(err)
	}
	block := func(kind string, der []byte) string {
		return string(pem.EncodeToMemory(&pem.Block{Type: kind, Bytes: der}))
	}
	data, err := json.Marshal(map[string]any{"trustDomain": td.Name(), "sequence": 1, "svidLife": "1h",
		"authorities": []map[string]any{{"certificate": block("CERTIFICATE", der), "key": block("PRIVATE KEY", private), "published": begin, "active": begin}}})
	if err != nil {
		t.Fatal(err)
	}
	return data
}

// earlier puts a time of the stored authorities further back, so that what
// comes after it is due.
func earlier(t *testing.T, field string) func([]byte) []byte {
	return func(data []byte) []byte {
		var ring map[string]any
		if err := json.Unmarshal(data, &ring); err != nil {
			t.Fatal(err)
		}
		for _, a := range ring["authorities"].([]any) {
			a := a.(map[string]any)
			if at, ok := a[field].(string); ok {
				parsed, err := time.Parse(time.RFC3339, at)
				if err != nil {
					t.Fatal(err)
				}
				a[field] = parsed.Add(-3 * time.Hour)
			}
		}
		out, err := json.Marshal(ring)
		if err != nil {
			t.Fatal(err)
		}
		return out
	}
}
