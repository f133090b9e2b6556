package session_test

import (
	"context"
	"crypto/tls"
	"errors"
	"net"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/bundle/x509bundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/svid/x509svid"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/mem"

	"portcullis/identity"
	"portcullis/ipcache/lease"
	"portcullis/ipcache/session"
)

// certificate makes a TLS certificate of an SVID.
func certificate(s *x509svid.SVID) tls.Certificate {
	c := tls.Certificate{PrivateKey: s.PrivateKey}
	for _, x := range s.Certificates {
		c.Certificate = append(c.Certificate, x.Raw)
	}
	return c
}

// intruder is a client that checks nothing and presents what it likes.
func intruder(s *x509svid.SVID) *tls.Config {
	cfg := &tls.Config{InsecureSkipVerify: true, NextProtos: []string{"h2"}}
	if s != nil {
		cfg.Certificates = []tls.Certificate{certificate(s)}
	}
	return cfg
}

// knock connects to an owner and tells whether it lets the intruder in. In TLS
// 1.3 a client learns it with the first read.
func knock(t *testing.T, addr string, cfg *tls.Config) error {
	t.Helper()
	conn, err := tls.Dial("tcp", addr, cfg)
	if err != nil {
		return err
	}
	defer conn.Close()
	conn.SetDeadline(time.Now().Add(patience))
	_, err = conn.Read(make([]byte, 1)) // HTTP/2's SETTINGS
	return err
}

func bundleOf(t *testing.T, l *lab, n identity.NodeName) *x509bundle.Bundle {
	t.Helper()
	b, err := l.source(t, n).GetX509BundleForTrustDomain(l.td)
	if err != nil {
		t.Fatal(err)
	}
	return b
}

// Who may not ask an owner. Each differs from an agent that may in one thing.
func TestOwnerRefuses(t *testing.T) {
	l := newLab(t, "portcullis.lab", 0, "n1", "n2")
	other := newLab(t, "other.lab", 0, "n2")
	// The owner's source vouches for other.lab too, as if it were federated.
	src := l.source(t, "n1")
	svid, err := src.GetX509SVID()
	if err != nil {
		t.Fatal(err)
	}
	federated := fixed{svid, x509bundle.NewSet(bundleOf(t, l, "n1"), bundleOf(t, other, "n2"))}
	owner := l.node(t, "n1", func(c *session.Config) {
		c.Source = federated
		c.Known = func(n identity.NodeName) bool { return n == "n2" }
	})
	now := time.Now()
	begin, end := now.Add(-time.Minute), now.Add(time.Minute)
	forge := func(id string) *x509svid.SVID { return l.forge(t, id, begin, end) }
	good := forge("spiffe://portcullis.lab/portcullis/node/n2")
	stolen := *good
	stolen.PrivateKey = forge("spiffe://portcullis.lab/portcullis/node/n2").PrivateKey
	old := intruder(good)
	old.MaxVersion = tls.VersionTLS12
	for _, test := range []struct {
		name string
		cfg  *tls.Config
	}{
		{"no certificate", intruder(nil)},
		{"another trust domain", intruder(other.forge(t, "spiffe://other.lab/portcullis/node/n2", begin, end))},
		{"our name, signed by another trust domain", intruder(other.forge(t, "spiffe://portcullis.lab/portcullis/node/n2", begin, end))},
		{"a workload", intruder(forge("spiffe://portcullis.lab/ns/default/sa/sleep"))},
		{"a path that begins like an agent's", intruder(forge("spiffe://portcullis.lab/portcullis/node/n2/x"))},
		{"a path that ends like an agent's", intruder(forge("spiffe://portcullis.lab/x/portcullis/node/n2"))},
		{"a node that is not known", intruder(forge("spiffe://portcullis.lab/portcullis/node/n3"))},
		{"the owner itself", intruder(forge("spiffe://portcullis.lab/portcullis/node/n1"))},
		{"expired", intruder(l.forge(t, "spiffe://portcullis.lab/portcullis/node/n2", begin, now.Add(-time.Second)))},
		{"not yet valid", intruder(l.forge(t, "spiffe://portcullis.lab/portcullis/node/n2", now.Add(time.Hour), now.Add(2*time.Hour)))},
		{"without the key", intruder(&stolen)},
		{"TLS 1.2", old},
	} {
		t.Run(test.name, func(t *testing.T) {
			if err := knock(t, owner.Addr().String(), test.cfg); err == nil {
				t.Error("let in")
			}
		})
	}
	if err := knock(t, owner.Addr().String(), intruder(good)); err != nil {
		t.Errorf("an agent that may ask was refused: %v", err)
	}
	if n := len(owner.Sessions()); n != 0 || seen[lease.StreamAccepted](owner.sink) {
		t.Errorf("%d sessions were opened", n)
	}
}

// pretender is a server that presents what it likes and accepts everybody. It
// tells of each handshake that the client went through with.
func pretender(t *testing.T, s *x509svid.SVID, change ...func(*tls.Config)) (addr string, states <-chan tls.ConnectionState) {
	t.Helper()
	cfg := &tls.Config{Certificates: []tls.Certificate{certificate(s)}, ClientAuth: tls.RequireAnyClientCert, NextProtos: []string{"h2"}}
	for _, f := range change {
		f(cfg)
	}
	ln, err := tls.Listen("tcp", "127.0.0.1:0", cfg)
	if err != nil {
		t.Fatal(err)
	}
	var wg sync.WaitGroup
	t.Cleanup(func() { ln.Close(); wg.Wait() })
	got := make(chan tls.ConnectionState, 16)
	wg.Go(func() {
		for {
			conn, err := ln.Accept()
			if err != nil {
				return
			}
			c := conn.(*tls.Conn)
			c.SetDeadline(time.Now().Add(patience))
			if c.Handshake() == nil {
				got <- c.ConnectionState()
				c.Read(make([]byte, 1)) // the ticket, if any, is on its way with the handshake's end
			}
			c.Close()
		}
	})
	return ln.Addr().String(), got
}

// Whom a verifier does not believe when it asked n1.
func TestVerifierRefuses(t *testing.T) {
	l := newLab(t, "portcullis.lab", 0, "n1", "n2", "n3")
	other := newLab(t, "other.lab", 0, "n1")
	src := l.source(t, "n2")
	svid, err := src.GetX509SVID()
	if err != nil {
		t.Fatal(err)
	}
	verifier := l.node(t, "n2", func(c *session.Config) {
		c.Source = fixed{svid, x509bundle.NewSet(bundleOf(t, l, "n2"), bundleOf(t, other, "n1"))}
	})
	now := time.Now()
	begin, end := now.Add(-time.Minute), now.Add(time.Minute)
	for _, test := range []struct {
		name, words string
		svid        *x509svid.SVID
	}{
		{"another trust domain", "other.lab", other.forge(t, "spiffe://other.lab/portcullis/node/n1", begin, end)},
		{"our name, signed by another trust domain", "verify", other.forge(t, "spiffe://portcullis.lab/portcullis/node/n1", begin, end)},
		{"another node", "where the agent of node n1 was asked", l.forge(t, "spiffe://portcullis.lab/portcullis/node/n3", begin, end)},
		{"a workload", "not the SPIFFE ID of a node's agent", l.forge(t, "spiffe://portcullis.lab/ns/default/sa/sleep", begin, end)},
		{"expired", "expired", l.forge(t, "spiffe://portcullis.lab/portcullis/node/n1", begin, now.Add(-time.Second))},
	} {
		t.Run(test.name, func(t *testing.T) {
			addr, states := pretender(t, test.svid)
			verifier.peers["n1"] = addr
			refused(t, verifier, "n1", test.words)
			select {
			case <-states:
				t.Error("the verifier went through with the handshake")
			default:
			}
		})
	}

	// The real thing, at another node's address.
	third := l.node(t, "n3")
	verifier.peers["n1"] = third.Addr().String()
	refused(t, verifier, "n1", "where the agent of node n1 was asked")
}

// A node whose own SVID has expired neither asks nor answers, though its source
// goes on handing it out.
func TestOwnExpiredSVID(t *testing.T) {
	l := newLab(t, "portcullis.lab", 0, "n1", "n2")
	expired := l.forge(t, "spiffe://portcullis.lab/portcullis/node/n1", time.Now().Add(-time.Hour), time.Now().Add(-time.Second))
	stale := l.node(t, "n1", func(c *session.Config) {
		c.Source = fixed{expired, x509bundle.NewSet(bundleOf(t, l, "n1"))}
	})
	fresh := l.node(t, "n2").knows(stale)
	stale.knows(fresh)
	refused(t, stale, "n2", "this node's SVID expired")
	refused(t, fresh, "n1", "")
}

// A resumed handshake would skip the check of the peer's identity: neither side
// may give or take a ticket.
func TestNoResumption(t *testing.T) {
	l := newLab(t, "portcullis.lab", 0, "n1", "n2")
	now := time.Now()
	peer := l.forge(t, "spiffe://portcullis.lab/portcullis/node/n2", now.Add(-time.Minute), now.Add(time.Minute))

	t.Run("owner", func(t *testing.T) {
		owner := l.node(t, "n1")
		cache := &countingCache{ClientSessionCache: tls.NewLRUClientSessionCache(8)}
		cfg := intruder(peer)
		cfg.ClientSessionCache, cfg.ServerName = cache, "n1"
		for range 3 {
			conn, err := tls.Dial("tcp", owner.Addr().String(), cfg)
			if err != nil {
				t.Fatal(err)
			}
			conn.SetDeadline(time.Now().Add(patience))
			if _, err := conn.Read(make([]byte, 1)); err != nil { // a ticket would have come before
				t.Fatal(err)
			}
			if conn.ConnectionState().DidResume {
				t.Error("the handshake was resumed")
			}
			conn.Close()
		}
		if cache.puts != 0 {
			t.Errorf("the owner gave %d tickets", cache.puts)
		}
	})
	t.Run("verifier", func(t *testing.T) {
		// This server gives tickets and would resume.
		addr, states := pretender(t, l.forge(t, "spiffe://portcullis.lab/portcullis/node/n1", now.Add(-time.Minute), now.Add(time.Minute)))
		verifier := l.node(t, "n2", func(c *session.Config) { c.DialTimeout = 5 * time.Second })
		verifier.peers["n1"] = addr
		for range 3 {
			refused(t, verifier, "n1", "") // it speaks no HTTP/2
			if s := <-states; s.DidResume {
				t.Error("the handshake was resumed")
			}
		}
		// The server itself would: a client with a cache resumes.
		cfg := intruder(peer)
		cfg.ClientSessionCache, cfg.ServerName = tls.NewLRUClientSessionCache(8), "n1"
		resumed := false
		for range 3 {
			conn, err := tls.Dial("tcp", addr, cfg)
			if err != nil {
				t.Fatal(err)
			}
			conn.Write([]byte{0})
			conn.SetDeadline(time.Now().Add(patience))
			conn.Read(make([]byte, 1)) // takes the ticket
			conn.Close()
			resumed = (<-states).DidResume || resumed
		}
		if !resumed {
			t.Error("the server of this test never resumes, so the test shows nothing")
		}
	})
}

type countingCache struct {
	tls.ClientSessionCache
	puts int
}

func (c *countingCache) Put(k string, s *tls.ClientSessionState) {
	c.puts++
	c.ClientSessionCache.Put(k, s)
}

// A renewed SVID does not disturb a session; the end of the certificates that
// opened it ends it; the next one has the new ones.
func TestSessionOutlivesRotationAndEndsWithItsCertificate(t *testing.T) {
	l := newLab(t, "portcullis.lab", 12*time.Second, "n1", "n2") // renewed after 5: time for a slow machine
	src := l.source(t, "n2")
	owner := l.node(t, "n1")
	verifier := l.node(t, "n2", func(c *session.Config) { c.Source = src }).knows(owner)
	atVerifier, atOwner := open(t, verifier, owner)
	expires := verifier.Sessions()[0].Expires
	if at := owner.Sessions()[0].Expires; !at.Equal(expires) {
		t.Errorf("the owner believes that the session ends at %s, the verifier at %s", at, expires)
	}
	select {
	case <-src.Changed():
	case <-time.After(patience):
		t.Fatal("no rotation")
	}
	verifier.SendToOwner(atVerifier, lease.Heartbeat{SentAt: 1})
	await[lease.FromVerifier](t, owner.sink)
	if now := time.Now(); !now.Before(expires) {
		t.Fatalf("the rotation was seen at %s, after the session's end at %s: nothing is shown", now, expires)
	}
	gone := await[lease.OwnerGone](t, verifier.sink)
	if now := time.Now(); now.Before(expires) || gone.Stream != atVerifier {
		t.Errorf("%+v at %s, before the certificate's end at %s", gone, now, expires)
	}
	if gone := await[lease.VerifierGone](t, owner.sink); gone.Stream != atOwner {
		t.Errorf("%+v", gone)
	}
	open(t, verifier, owner)
	if next := verifier.Sessions(); len(next) == 0 || !next[0].Expires.After(expires) {
		t.Errorf("the new session has the old certificates: %+v", next)
	}
}

func TestBundleChangeEndsSessions(t *testing.T) {
	l := newLab(t, "portcullis.lab", 0, "n1", "n2")
	src := l.source(t, "n1")
	owner := l.node(t, "n1", func(c *session.Config) { c.Source = src })
	verifier := l.node(t, "n2").knows(owner)
	open(t, verifier, owner)
	// The old authority stays trusted: still, what was verified under another
	// bundle is not what would be verified now.
	if err := l.ca.ReplaceAuthority(true); err != nil {
		t.Fatal(err)
	}
	await[lease.OwnerGone](t, verifier.sink)
	await[lease.VerifierGone](t, owner.sink)
	// Both sides have heard by now or will soon; until then a session may be
	// ended once more.
	for deadline := time.Now().Add(patience); ; {
		verifier.Open("n1")
		select {
		case <-time.After(50 * time.Millisecond):
		case <-t.Context().Done():
		}
		if len(owner.Sessions()) > 0 && len(verifier.Sessions()) > 0 {
			break
		}
		if time.Now().After(deadline) {
			t.Fatal("no session under the new bundle")
		}
	}
}

// rawFrame is a frame as bytes, whatever they are.
type rawFrame []byte

type rawCodec struct{}

func (rawCodec) Name() string { return "proto" }
func (rawCodec) Marshal(v any) (mem.BufferSlice, error) {
	return mem.BufferSlice{mem.SliceBuffer(*v.(*rawFrame))}, nil
}
func (rawCodec) Unmarshal(b mem.BufferSlice, v any) error {
	*v.(*rawFrame) = b.Materialize()
	return nil
}

// A verifier that sends what is no message loses its stream, and the owner's
// machine never sees it.
func TestMalformedFrameClosesTheStream(t *testing.T) {
	l := newLab(t, "portcullis.lab", 0, "n1", "n2")
	owner := l.node(t, "n1")
	now := time.Now()
	creds := credentials.NewTLS(intruder(l.forge(t, "spiffe://portcullis.lab/portcullis/node/n2", now.Add(-time.Minute), now.Add(time.Minute))))
	for name, frame := range map[string]rawFrame{
		"empty":               {},
		"garbage":             []byte("\xff\xff\xff\xff portcullis"),
		"an unknown message":  {0x9a, 0x06, 0x00},
		"an unknown field":    {0x12, 0x08, 0x12, 0x04, 10, 1, 0, 7, 0x78, 0x01},
		"an IP of 3 bytes":    {0x12, 0x05, 0x12, 0x03, 10, 1, 0},
		"too large":           make([]byte, 9<<20),
		"an address of a map": append([]byte{0x12, 0x12, 0x12, 0x10}, net.ParseIP("10.1.0.7")...),
	} {
		t.Run(name, func(t *testing.T) {
			conn, err := grpc.NewClient(owner.Addr().String(), grpc.WithTransportCredentials(creds),
				grpc.WithDefaultCallOptions(grpc.ForceCodecV2(rawCodec{})))
			if err != nil {
				t.Fatal(err)
			}
			defer conn.Close()
			ctx, cancel := context.WithTimeout(t.Context(), patience)
			defer cancel()
			s, err := conn.NewStream(ctx, &grpc.StreamDesc{ClientStreams: true, ServerStreams: true}, session.BindingLease_Session_FullMethodName)
			if err != nil {
				t.Fatal(err)
			}
			accepted := await[lease.StreamAccepted](t, owner.sink)
			if err := s.SendMsg(&frame); err != nil && !strings.Contains(err.Error(), "EOF") {
				t.Fatal(err)
			}
			if gone := await[lease.VerifierGone](t, owner.sink); gone.Stream != accepted.Stream {
				t.Errorf("%+v", gone)
			}
			var got rawFrame
			if err := s.RecvMsg(&got); err == nil {
				t.Errorf("the owner answered %x", got)
			}
			if seen[lease.FromVerifier](owner.sink) {
				t.Error("the frame reached the machine")
			}
		})
	}
	// A good frame by the same way, or the test would show nothing.
	conn, err := grpc.NewClient(owner.Addr().String(), grpc.WithTransportCredentials(creds), grpc.WithDefaultCallOptions(grpc.ForceCodecV2(rawCodec{})))
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	s, err := conn.NewStream(t.Context(), &grpc.StreamDesc{ClientStreams: true, ServerStreams: true}, session.BindingLease_Session_FullMethodName)
	if err != nil {
		t.Fatal(err)
	}
	good := rawFrame{0x12, 0x06, 0x12, 0x04, 10, 1, 0, 7}
	if err := s.SendMsg(&good); err != nil {
		t.Fatal(err)
	}
	if m := await[lease.FromVerifier](t, owner.sink).Message; m != (lease.Confirm{IP: ip4}) {
		t.Errorf("%+v", m)
	}
}

// Without a bundle nobody can be judged: sessions end, and none begins.
func TestNoBundleNoSessions(t *testing.T) {
	l := newLab(t, "portcullis.lab", 0, "n1", "n2")
	src := &losing{Source: l.source(t, "n1"), changed: make(chan struct{})}
	owner := l.node(t, "n1", func(c *session.Config) { c.Source = src })
	verifier := l.node(t, "n2").knows(owner)
	open(t, verifier, owner)
	src.lose()
	await[lease.VerifierGone](t, owner.sink)
	await[lease.OwnerGone](t, verifier.sink)
	refused(t, verifier, "n1", "")
}

// losing is a source that loses its bundle.
type losing struct {
	session.Source
	mu      sync.Mutex
	lost    bool // guarded by mu
	changed chan struct{}
}

func (s *losing) lose() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.lost = true
	close(s.changed)
	s.changed = make(chan struct{})
}

func (s *losing) Changed() <-chan struct{} {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.changed
}

func (s *losing) GetX509BundleForTrustDomain(td spiffeid.TrustDomain) (*x509bundle.Bundle, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.lost {
		return nil, errors.New("lost")
	}
	return s.Source.GetX509BundleForTrustDomain(td)
}
