package client_test

import (
	"crypto/tls"
	"errors"
	"io"
	"log"
	"net"
	"net/http"
	"os"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/svid/x509svid"

	"portcullis/identity"
	"portcullis/identity/issuer"
	"portcullis/identity/svid"
)

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
