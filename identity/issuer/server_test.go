package issuer

import (
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"errors"
	"io"
	"net"
	"net/http"
	"net/netip"
	"os"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/bundle/spiffebundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/spiffetls/tlsconfig"
	"github.com/spiffe/go-spiffe/v2/svid/x509svid"
	"go.uber.org/zap"
	"go.uber.org/zap/zaptest/observer"
)

// reviews answers by token.
type reviews struct {
	mu  sync.Mutex
	by  map[string]Review
	err error
}

func (r *reviews) Review(_ context.Context, token, audience string) (Review, error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if audience != DefaultAudience {
		return Review{}, errors.New("asked for another audience")
	}
	return r.by[token], r.err
}

// served is a running server.
type served struct {
	url    string
	keys   *memory
	bundle *memory
	api    *reviews
	logs   *observer.ObservedLogs
	server *Server
	stop   func()
}

func serve(t *testing.T) *served {
	t.Helper()
	s := &served{keys: &memory{name: "keys"}, bundle: &memory{name: "bundle"}, api: &reviews{by: map[string]Review{"t1": good()}}}
	core, logs := observer.New(zap.InfoLevel)
	s.logs = logs
	k, err := NewKeeper(KeeperConfig{TrustDomain: td, Keys: s.keys, Bundle: s.bundle, Interval: 20 * time.Millisecond})
	if err != nil {
		t.Fatal(err)
	}
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	s.url = "https://" + ln.Addr().String()
	if s.server, err = NewServer(ServerConfig{Keeper: k, Reviewer: s.api, Rules: rules, Listener: ln, Log: zap.New(core)}); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	var wg sync.WaitGroup
	for _, run := range []func(context.Context) error{k.Run, s.server.Run} {
		wg.Go(func() {
			if err := run(ctx); err != nil {
				t.Error(err)
			}
		})
	}
	s.stop = sync.OnceFunc(func() { cancel(); wg.Wait() })
	t.Cleanup(s.stop)
	select {
	case <-k.Ready():
	case <-time.After(time.Minute):
		t.Fatal("the keeper is not ready after a minute")
	}
	return s
}

// client trusts what is published.
func (s *served) client(t *testing.T) *http.Client {
	t.Helper()
	var data []byte
	for deadline := time.Now().Add(time.Minute); len(data) == 0; {
		data, _, _ = s.bundle.Load(t.Context())
		if time.Now().After(deadline) {
			t.Fatal("no bundle is published")
		}
	}
	b, err := spiffebundle.Parse(td, data)
	if err != nil {
		t.Fatal(err)
	}
	id, err := ID(td)
	if err != nil {
		t.Fatal(err)
	}
	tr := &http.Transport{TLSClientConfig: tlsconfig.TLSClientConfig(b, tlsconfig.AuthorizeID(id))}
	t.Cleanup(tr.CloseIdleConnections)
	return &http.Client{Transport: tr, Timeout: time.Minute}
}

func (s *served) post(t *testing.T, c *http.Client, header string, body []byte) (code int, answer []byte) {
	t.Helper()
	req, err := http.NewRequestWithContext(t.Context(), http.MethodPost, s.url+PathSVID, bytes.NewReader(body))
	if err != nil {
		t.Fatal(err)
	}
	if header != "" {
		req.Header.Set("Authorization", header)
	}
	return s.do(t, c, req)
}

func (s *served) get(t *testing.T, c *http.Client, path string) (code int, answer []byte) {
	t.Helper()
	req, err := http.NewRequestWithContext(t.Context(), http.MethodGet, s.url+path, nil)
	if err != nil {
		t.Fatal(err)
	}
	return s.do(t, c, req)
}

func (s *served) do(t *testing.T, c *http.Client, req *http.Request) (int, []byte) {
	t.Helper()
	resp, err := c.Do(req)
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	answer, err := io.ReadAll(resp.Body)
	if err != nil {
		t.Fatal(err)
	}
	return resp.StatusCode, answer
}

func newKey(t *testing.T) *ecdsa.PrivateKey {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	return key
}

func TestIssuesTheNodesNameAndNoOther(t *testing.T) {
	s := serve(t)
	key := newKey(t)
	code, body := s.post(t, s.client(t), "Bearer t1", csr(t, x509.CertificateRequest{}, key))
	var got Issued
	if err := json.Unmarshal(body, &got); err != nil || code != http.StatusOK {
		t.Fatalf("%d %s %v", code, body, err)
	}
	b, err := spiffebundle.Parse(td, got.Bundle)
	if err != nil {
		t.Fatal(err)
	}
	cert, err := x509.ParseCertificate(got.Certificate)
	if err != nil {
		t.Fatal(err)
	}
	id, _, err := x509svid.Verify([]*x509.Certificate{cert}, b)
	if want := spiffeid.RequireFromPath(td, "/portcullis/node/n1"); err != nil || id != want {
		t.Errorf("%s, %v; want %s", id, err, want)
	}
	if !key.PublicKey.Equal(cert.PublicKey) || cert.IsCA || cert.KeyUsage != x509.KeyUsageDigitalSignature || len(cert.DNSNames)+len(cert.IPAddresses)+len(cert.URIs) != 1 {
		t.Errorf("the certificate: key %v, CA %v, usage %v, names %v %v %v", cert.PublicKey, cert.IsCA, cert.KeyUsage, cert.DNSNames, cert.IPAddresses, cert.URIs)
	}
	if left := time.Until(cert.NotAfter); left > DefaultSVIDLife || left < DefaultSVIDLife-10*time.Minute {
		t.Errorf("it ends in %s", left)
	}
	line := s.logs.FilterMessage("issued an SVID").All()
	if len(line) != 1 {
		t.Fatalf("%d lines of log", len(line))
	}
	for _, field := range []string{"remote", "username", "node", "pod", "pod_uid", "spiffe_id", "serial", "expires"} {
		if _, ok := line[0].ContextMap()[field]; !ok {
			t.Errorf("the log does not tell %s", field)
		}
	}
	if st := s.server.Status(); st.Issued != 1 || len(st.Refused) != 0 || st.Problem != "" {
		t.Errorf("status: %+v", st)
	}
}

// Every refusal has its status, its word, its line in the log and its counter;
// none says anything of the token.
func TestRefusals(t *testing.T) {
	s := serve(t)
	c := s.client(t)
	edit := func(token string, change func(*Review)) {
		r := good()
		change(&r)
		s.api.by[token] = r
	}
	edit("audience", func(r *Review) { r.Audiences = []string{"other"} })
	edit("account", func(r *Review) { r.Username = "system:serviceaccount:default:default" })
	edit("nonode", func(r *Review) { delete(r.Extra, extraNode) })
	edit("twonodes", func(r *Review) { r.Extra[extraNode] = []string{"n1", "n2"} })
	edit("expired", func(r *Review) { *r = Review{Error: "token has expired"} })
	request := csr(t, x509.CertificateRequest{}, newKey(t))
	for _, test := range []struct {
		header string
		body   []byte
		code   int
		reason Refusal
	}{
		{"", request, 401, RefusedNoToken},
		{"Basic x", request, 401, RefusedNoToken},
		{"Bearer ", request, 401, RefusedNoToken},
		{"Bearer unknown", request, 401, RefusedToken},
		{"Bearer expired", request, 401, RefusedToken},
		{"Bearer audience", request, 403, RefusedAudience},
		{"Bearer account", request, 403, RefusedAccount},
		{"Bearer nonode", request, 403, RefusedNoNode},
		{"Bearer twonodes", request, 403, RefusedNodes},
		{"Bearer t1", nil, 400, RefusedRequest},
		{"Bearer t1", make([]byte, MaxRequest+1), 400, RefusedRequest},
		{"Bearer t1", csr(t, x509.CertificateRequest{DNSNames: []string{"n2"}}, newKey(t)), 400, RefusedRequest},
	} {
		before := s.server.Status().Refused[string(test.reason)]
		s.logs.TakeAll()
		code, body := s.post(t, c, test.header, test.body)
		var p Problem
		if err := json.Unmarshal(body, &p); err != nil || code != test.code || p.Reason != string(test.reason) || p.Message == "" {
			t.Errorf("%q: %d %s %v; want %d %s", test.header, code, body, err, test.code, test.reason)
		}
		if got := s.server.Status().Refused[string(test.reason)]; got != before+1 {
			t.Errorf("%q: counted %d times", test.header, got-before)
		}
		lines := s.logs.FilterMessage("refused an SVID").All()
		if len(lines) != 1 || lines[0].ContextMap()["reason"] != string(test.reason) {
			t.Errorf("%q: the log says %v", test.header, lines)
		}
	}
	if st := s.server.Status(); st.Issued != 0 {
		t.Errorf("%d SVIDs were issued", st.Issued)
	}
}

// An API server that does not answer is no yes, and no verdict on the agent.
func TestNoAnswerIsNoYes(t *testing.T) {
	s := serve(t)
	s.api.err = errors.New("connection refused")
	code, body := s.post(t, s.client(t), "Bearer t1", csr(t, x509.CertificateRequest{}, newKey(t)))
	if code != 503 || !strings.Contains(string(body), "connection refused") || !strings.Contains(string(body), string(RefusedUnavailable)) {
		t.Errorf("%d %s", code, body)
	}
}

func TestOneNodeCannotAskForever(t *testing.T) {
	s := serve(t)
	c := s.client(t)
	two := good()
	two.Extra[extraNode] = []string{"n2"}
	s.api.by["t2"] = two
	request := csr(t, x509.CertificateRequest{}, newKey(t))
	for i := range burst {
		if code, body := s.post(t, c, "Bearer t1", request); code != 200 {
			t.Fatalf("number %d: %d %s", i, code, body)
		}
	}
	// On a machine so slow that a refill passes meanwhile, one more is right.
	refusedOne := false
	for range burst {
		code, _ := s.post(t, c, "Bearer t1", request)
		refusedOne = refusedOne || code == 429
	}
	if !refusedOne {
		t.Error("nothing was refused")
	}
	if code, body := s.post(t, c, "Bearer t2", request); code != 200 {
		t.Errorf("another node: %d %s", code, body)
	}
}

// Whoever floods the issuer with tokens does not keep others from the API server.
func TestASourceCannotAskForever(t *testing.T) {
	l, now := newSourceLimiter(), time.Now()
	for i := range sourceBurst {
		if wait := l.take(source("10.0.0.1:1"), now); wait != 0 {
			t.Fatalf("number %d waits %v", i, wait)
		}
	}
	for remote, waits := range map[string]bool{"10.0.0.1:2": true, "[::ffff:10.0.0.1]:3": true, "10.0.0.2:1": false, "[fd00::1]:1": false} {
		if wait := l.take(source(remote), now); (wait > 0) != waits {
			t.Errorf("%s waits %v", remote, wait)
		}
	}
	if source("[fd00::1]:1") != source("[fd00::2%eth0]:9") || source("[fd00::1]:1") == source("[fd00:0:0:1::1]:1") {
		t.Error("a sender has one network of 64 bits")
	}
	if wait := l.take(source("10.0.0.1:1"), now.Add(sourceRefill)); wait != 0 {
		t.Errorf("it waits %v after a refill", wait)
	}
	// And the server asks before it asks the API server.
	s := serve(t)
	s.server.sources = newLimiter[netip.Prefix](1, time.Hour)
	c, request := s.client(t), csr(t, x509.CertificateRequest{}, newKey(t))
	for i, want := range []int{200, 429} {
		if code, body := s.post(t, c, "Bearer t1", request); code != want {
			t.Errorf("number %d: %d %s", i, code, body)
		}
	}
}

func TestASourceCannotHoldEveryConnection(t *testing.T) {
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	fair := newFairListener(ln)
	defer fair.Close()
	accepted := make(chan net.Conn, sourceConnections+1)
	go func() {
		for {
			conn, err := fair.Accept()
			if err != nil {
				return
			}
			accepted <- conn
		}
	}()
	dial := func() net.Conn {
		conn, err := net.Dial("tcp", ln.Addr().String())
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { conn.Close() })
		return conn
	}
	for range sourceConnections {
		dial()
	}
	first := <-accepted
	for range sourceConnections - 1 {
		defer (<-accepted).Close()
	}
	more := dial()
	more.SetReadDeadline(time.Now().Add(time.Minute))
	if _, err := more.Read(make([]byte, 1)); err == nil || errors.Is(err, os.ErrDeadlineExceeded) {
		t.Errorf("one more than %d is open: %v", sourceConnections, err)
	}
	first.Close()
	first.Close() // a place is given free once
	dial()
	defer (<-accepted).Close()
	if n := fair.open[source("127.0.0.1:1")]; n != sourceConnections {
		t.Errorf("%d are counted, want %d", n, sourceConnections)
	}
}

func TestBundleHealthAndStatus(t *testing.T) {
	s := serve(t)
	c := s.client(t)
	code, body := s.get(t, c, PathBundle)
	b, err := spiffebundle.Parse(td, body)
	if err != nil || code != 200 || len(b.X509Authorities()) != 1 {
		t.Fatalf("bundle: %d %s %v", code, body, err)
	}
	req, err := http.NewRequestWithContext(t.Context(), http.MethodGet, s.url+PathBundle, nil)
	if err != nil {
		t.Fatal(err)
	}
	req.Header.Set("If-None-Match", `"`+jsonSequence(t, body)+`"`)
	if code, body := s.do(t, c, req); code != http.StatusNotModified || len(body) != 0 {
		t.Errorf("a bundle that is known: %d %s", code, body)
	}
	if code, body := s.get(t, c, PathHealth); code != 200 {
		t.Errorf("health: %d %s", code, body)
	}
	var st Status
	if code, body := s.get(t, c, PathStatus); code != 200 || json.Unmarshal(body, &st) != nil || st.TrustDomain != td.Name() || len(st.Authorities) != 1 || st.Authorities[0].State != "signing" {
		t.Errorf("status: %d %s", code, body)
	}
	for _, path := range []string{"/", PathSVID, "/debug/pprof/"} {
		if code, _ := s.get(t, c, path); code != http.StatusNotFound && code != http.StatusMethodNotAllowed {
			t.Errorf("GET %s: %d", path, code)
		}
	}
}

func jsonSequence(t *testing.T, bundle []byte) string {
	t.Helper()
	var doc struct {
		Sequence json.Number `json:"spiffe_sequence"`
	}
	if err := json.Unmarshal(bundle, &doc); err != nil {
		t.Fatal(err)
	}
	return doc.Sequence.String()
}

// The server proves the issuer's name under the published bundle, takes nothing
// older than TLS 1.3, and lets no session be resumed.
func TestServersCertificate(t *testing.T) {
	s := serve(t)
	b := parseBundle(td, func() []byte { s.client(t); data, _, _ := s.bundle.Load(t.Context()); return data }())
	addr := strings.TrimPrefix(s.url, "https://")
	cache := tls.NewLRUClientSessionCache(8)
	for range 2 {
		cfg := &tls.Config{InsecureSkipVerify: true, ClientSessionCache: cache, ServerName: "issuer"}
		conn, err := tls.Dial("tcp", addr, cfg)
		if err != nil {
			t.Fatal(err)
		}
		state := conn.ConnectionState()
		conn.Close()
		if state.DidResume || state.Version != tls.VersionTLS13 {
			t.Errorf("resumed %v, version %x", state.DidResume, state.Version)
		}
		if id, _, err := x509svid.Verify(state.PeerCertificates, b); err != nil || id.Path() != "/portcullis/issuer" {
			t.Errorf("the server is %s, %v", id, err)
		}
	}
	if conn, err := tls.Dial("tcp", addr, &tls.Config{InsecureSkipVerify: true, MaxVersion: tls.VersionTLS12}); err == nil {
		conn.Close()
		t.Error("TLS 1.2 was accepted")
	}
	// When the authority is withdrawn the server has another certificate.
	s.keys.empty()
	for deadline := time.Now().Add(time.Minute); ; {
		conn, err := tls.Dial("tcp", addr, &tls.Config{InsecureSkipVerify: true})
		if err != nil {
			t.Fatal(err)
		}
		chain := conn.ConnectionState().PeerCertificates
		conn.Close()
		if _, _, err := x509svid.Verify(chain, b); err != nil {
			break
		}
		if time.Now().After(deadline) {
			t.Fatal("the server still shows the certificate of the authority that was withdrawn")
		}
	}
}
