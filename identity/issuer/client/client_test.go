package client_test

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"log"
	"math/big"
	mathrand "math/rand/v2"
	"net"
	"net/http"
	"net/url"
	"os"
	"path/filepath"
	"strconv"
	"strings"
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
		Extra: map[string][]string{"authentication.kubernetes.io/node-name": {string(node)}}}, nil
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
	from, err := client.New(c.config(t, node))
	if err != nil {
		t.Fatal(err)
	}
	if s, err = svid.New(svid.Config{From: from, ID: nodeID(t, node)}); err != nil {
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

func TestGivesTheNodesSVID(t *testing.T) {
	c := newCluster(t)
	c.issue(t)
	s, _ := c.agent(t, "n1")
	v := wait(t, s)
	if v.ID != nodeID(t, "n1") {
		t.Errorf("the SVID is of %s", v.ID)
	}
	if _, _, err := x509svid.Verify(v.Certificates, s); err != nil {
		t.Error(err)
	}
	info, err := os.Stat(c.config(t, "n1").CacheFile)
	if err != nil || info.Mode().Perm() != 0o600 {
		t.Errorf("the file that is kept: %v, %v", info, err)
	}
	if s.From().Kind() != "issuer" || !strings.Contains(s.From().String(), c.addr) {
		t.Errorf("the provider is %s %s", s.From().Kind(), s.From())
	}
}

// An agent with the token of another node gets that node's name, which is not
// the one that it wants, and uses nothing.
func TestAnothersTokenIsOfNoUse(t *testing.T) {
	c := newCluster(t)
	c.issue(t)
	c.knows("token-of-n1", "n2")
	s, _ := c.agent(t, "n1")
	until(t, "an error that names both", func() bool {
		_, err := s.GetX509SVID()
		if err == nil {
			t.Fatal("another node's SVID was taken")
		}
		return strings.Contains(err.Error(), "/node/n2, not of") && errors.Is(err, svid.ErrNone)
	})
}

func TestTokenIsReadAgain(t *testing.T) {
	c := newCluster(t)
	c.issue(t)
	c.knows("second", "n1") // the first is over
	s, _ := c.agent(t, "n1")
	until(t, "the refusal is told", func() bool {
		_, err := s.GetX509SVID()
		return err != nil && strings.Contains(err.Error(), string(issuer.RefusedToken))
	})
	if err := os.WriteFile(c.token("n1"), []byte("second"), 0o600); err != nil {
		t.Fatal(err)
	}
	wait(t, s)
}

// While no issuer answers, the SVID goes on, also through a restart of the
// agent; and a new agent takes nothing that it cannot check.
func TestIssuerGone(t *testing.T) {
	c := newCluster(t)
	_, stopIssuer := c.issue(t)
	s, stop := c.agent(t, "n1")
	before := wait(t, s)
	stopIssuer()
	until(t, "its absence is noticed", func() bool {
		return s.Problem() != nil
	})
	if _, err := s.GetX509SVID(); err != nil {
		t.Errorf("without the issuer: %v", err)
	}
	stop()
	s, stop = c.agent(t, "n1")
	if after := wait(t, s); !after.Certificates[0].Equal(before.Certificates[0]) || authorities(s) != 1 {
		t.Error("after a restart it is another SVID, or there is no bundle")
	}
	stop()

	cache := c.config(t, "n1").CacheFile
	good, err := os.ReadFile(cache)
	if err != nil {
		t.Fatal(err)
	}
	for name, spoil := range map[string]func(){
		"open to others": func() { os.Chmod(cache, 0o644) },
		"no JSON":        func() { os.WriteFile(cache, []byte("x"), 0o600) },
		"another's":      func() { os.WriteFile(cache, cacheOf(t, c, "n2"), 0o600) },
		"cut off":        func() { os.WriteFile(cache, good[:len(good)/2], 0o600) },
		"a link":         func() { os.Rename(cache, cache+".real"); os.Symlink(cache+".real", cache) },
	} {
		t.Run(name, func(t *testing.T) {
			os.Remove(cache)
			if err := os.WriteFile(cache, good, 0o600); err != nil {
				t.Fatal(err)
			}
			spoil()
			s, stop := c.agent(t, "n1")
			defer stop()
			until(t, "it says that nobody answers", func() bool { return s.Problem() != nil })
			if v, err := s.GetX509SVID(); err == nil {
				t.Errorf("an SVID of %s came out of it", v.ID)
			}
		})
	}
	os.Remove(cache)
	c.issue(t)
	s, _ = c.agent(t, "n1")
	wait(t, s)
}

// cacheOf runs an issuer for as long as it takes to have a node's file.
func cacheOf(t *testing.T, c *cluster, node identity.NodeName) []byte {
	t.Helper()
	_, stopIssuer := c.issue(t)
	defer stopIssuer()
	s, stop := c.agent(t, node)
	defer stop()
	wait(t, s)
	data, err := os.ReadFile(c.config(t, node).CacheFile)
	if err != nil {
		t.Fatal(err)
	}
	return data
}

// The token goes to nobody who does not prove to be the issuer: not to one under
// another authority, and not to an agent with its SVID.
func TestTokenGoesToTheIssuerOnly(t *testing.T) {
	c := newCluster(t)
	other := newCluster(t)
	other.addr = c.addr
	other.issue(t)
	_, stop := func() (*issuer.Server, func()) { // c's bundle exists, its issuer is gone
		o := &cluster{dir: c.dir, keys: c.keys, bundle: c.bundle, addr: "127.0.0.1:0", tokens: map[string]identity.NodeName{}}
		return o.issue(t)
	}()
	until(t, "the bundle is published", func() bool { _, err := os.Stat(c.bundle.path); return err == nil })
	stop()
	s, _ := c.agent(t, "n1")
	until(t, "the issuer is not believed", func() bool {
		err := s.Problem()
		return err != nil && strings.Contains(err.Error(), "x509")
	})
	if _, err := s.GetX509SVID(); err == nil {
		t.Error("an SVID came from an issuer that is not trusted")
	}
	other.mu.Lock()
	defer other.mu.Unlock()
	if other.asked > 0 {
		t.Error("the token was shown to an issuer that is not trusted")
	}
}

// An agent's SVID is under the same authority, and makes nobody an issuer.
func TestAgentIsNoIssuer(t *testing.T) {
	c := newCluster(t)
	_, stop := c.issue(t)
	s2, _ := c.agent(t, "n2")
	v := wait(t, s2)
	stop()
	ln, err := net.Listen("tcp", c.addr)
	if err != nil {
		t.Fatal(err)
	}
	shown := make(chan string, 16)
	server := &http.Server{
		Handler:   http.HandlerFunc(func(_ http.ResponseWriter, r *http.Request) { shown <- r.Header.Get("Authorization") }),
		TLSConfig: &tls.Config{Certificates: []tls.Certificate{{Certificate: [][]byte{v.Certificates[0].Raw}, PrivateKey: v.PrivateKey}}},
		ErrorLog:  log.New(io.Discard, "", 0),
	}
	var wg sync.WaitGroup
	wg.Go(func() { server.ServeTLS(ln, "", "") })
	t.Cleanup(func() { server.Close(); wg.Wait() })
	s1, _ := c.agent(t, "n1")
	until(t, "the impostor is refused by its name", func() bool {
		err := s1.Problem()
		return err != nil && strings.Contains(err.Error(), "/portcullis/node/n2")
	})
	select {
	case token := <-shown:
		t.Errorf("it was shown %q", token)
	default:
	}
}

func TestNoBundleYet(t *testing.T) {
	c := newCluster(t)
	s, _ := c.agent(t, "n1")
	until(t, "the error names the file", func() bool {
		_, err := s.GetX509SVID()
		return err != nil && strings.Contains(err.Error(), c.bundle.path)
	})
	if err := os.WriteFile(c.bundle.path, nil, 0o600); err != nil { // the manifest's empty ConfigMap
		t.Fatal(err)
	}
	until(t, "the error says that it is empty", func() bool {
		_, err := s.GetX509SVID()
		return err != nil && strings.Contains(err.Error(), "empty")
	})
	c.issue(t)
	wait(t, s)
}

// An authority that was withdrawn takes its SVIDs with it: agents have new ones
// at once, and none comes back with an old bundle.
func TestWithdrawnAuthority(t *testing.T) {
	c := newCluster(t)
	c.issue(t)
	s, _ := c.agent(t, "n1")
	before := wait(t, s)
	old, _, _ := c.bundle.Load(t.Context())
	c.keys.edit(t, func([]byte) []byte { return nil })
	until(t, "another SVID under another authority", func() bool {
		v, err := s.GetX509SVID()
		if err != nil || v.Certificates[0].Equal(before.Certificates[0]) {
			return false
		}
		_, _, err = x509svid.Verify(v.Certificates, s)
		return err == nil
	})
	if err := os.WriteFile(c.bundle.path, old, 0o600); err != nil { // a kubelet that is late
		t.Fatal(err)
	}
	seen := time.Now()
	until(t, "some looks at the file", func() bool { return time.Since(seen) > 200*time.Millisecond })
	if _, _, err := x509svid.Verify(before.Certificates, s); err == nil {
		t.Error("the authority that was withdrawn is trusted again")
	}
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
