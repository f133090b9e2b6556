package hubble

import (
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"math/big"
	"net"
	"net/url"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/bundle/x509bundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/svid/x509svid"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/status"

	observerpb "github.com/cilium/cilium/api/v1/observer"
	peerpb "github.com/cilium/cilium/api/v1/peer"
	"portcullis/observe/flow"
)

// authority is a trust domain.
type authority struct {
	t    *testing.T
	cert *x509.Certificate
	key  crypto.Signer
}

var trust = spiffeid.RequireTrustDomainFromString("lab.test")

func newAuthority(t *testing.T) *authority {
	a := &authority{t: t}
	a.cert, a.key = a.sign(&x509.Certificate{IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign, NotAfter: time.Now().Add(time.Hour), URIs: []*url.URL{trust.ID().URL()}})
	return a
}

func (a *authority) sign(c *x509.Certificate) (*x509.Certificate, crypto.Signer) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		a.t.Fatal(err)
	}
	c.SerialNumber, c.NotBefore = big.NewInt(time.Now().UnixNano()), time.Now().Add(-time.Minute)
	by, with := a.cert, a.key
	if by == nil {
		by, with = c, key
	}
	der, err := x509.CreateCertificate(rand.Reader, c, by, key.Public(), with)
	if err != nil {
		a.t.Fatal(err)
	}
	cert, err := x509.ParseCertificate(der)
	if err != nil {
		a.t.Fatal(err)
	}
	return cert, key
}

// holder has an SVID, which may be renewed.
type holder struct {
	a    *authority
	svid atomic.Pointer[x509svid.SVID]
}

func (a *authority) holder(path string, life time.Duration) *holder {
	h := &holder{a: a}
	h.renew(path, life)
	return h
}

func (h *holder) renew(path string, life time.Duration) {
	id := spiffeid.RequireFromPath(trust, path)
	cert, key := h.a.sign(&x509.Certificate{NotAfter: time.Now().Add(life), KeyUsage: x509.KeyUsageDigitalSignature, URIs: []*url.URL{id.URL()}})
	h.svid.Store(&x509svid.SVID{ID: id, Certificates: []*x509.Certificate{cert}, PrivateKey: key})
}

func (h *holder) GetX509SVID() (*x509svid.SVID, error) { return h.svid.Load(), nil }
func (h *holder) GetX509BundleForTrustDomain(spiffeid.TrustDomain) (*x509bundle.Bundle, error) {
	return x509bundle.FromX509Authorities(trust, []*x509.Certificate{h.a.cert}), nil
}

// listen serves on a listener until the test ends.
func listen(t *testing.T, s *Server, network, address string, opts ...grpc.ServerOption) net.Listener {
	t.Helper()
	ln, err := net.Listen(network, address)
	if err != nil {
		t.Fatal(err)
	}
	g := grpc.NewServer(opts...)
	s.Register(g)
	done := make(chan error)
	go func() { done <- g.Serve(ln) }()
	t.Cleanup(func() { g.Stop(); <-done })
	return ln
}

func dial(t *testing.T, target string, creds credentials.TransportCredentials) *grpc.ClientConn {
	t.Helper()
	conn, err := grpc.NewClient(target, grpc.WithTransportCredentials(creds))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close() })
	return conn
}

// A stream does not outlive the SVID that it began with, and who has another one
// by then gets in again by itself.
func TestStreamsEndWithTheSVID(t *testing.T) {
	a := newAuthority(t)
	s := NewServer(Options{Place: Place{Node: "n1"}, Ring: flow.NewRing(10), Started: time.Now()})
	ln := listen(t, s, "tcp", "127.0.0.1:0", ServeTLS(a.holder("/server", time.Hour), func(spiffeid.ID) error { return nil })...)
	client := a.holder("/client", 5*time.Second)
	ends := client.svid.Load().Certificates[0].NotAfter
	conn := dial(t, "passthrough:///"+ln.Addr().String(), credentials.NewTLS(ClientTLS(client, func(spiffeid.ID) error { return nil })))
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	c := observerpb.NewObserverClient(conn)
	if _, err := c.ServerStatus(ctx, &observerpb.ServerStatusRequest{}); err != nil {
		t.Fatal(err)
	}
	stream, err := c.GetFlows(ctx, &observerpb.GetFlowsRequest{Follow: true})
	if err != nil {
		t.Fatal(err)
	}
	client.renew("/client", time.Hour) // the connection goes on with the former one
	_, err = stream.Recv()
	if status.Code(err) != codes.Unauthenticated || !strings.Contains(err.Error(), "connect again") {
		t.Errorf("at its end: %v", err)
	}
	if time.Now().Before(ends) {
		t.Error("it ended before its SVID")
	}
	for {
		_, err := c.ServerStatus(ctx, &observerpb.ServerStatusRequest{})
		if err == nil {
			return
		}
		if ctx.Err() != nil {
			t.Fatalf("with its next SVID: %v", err)
		}
		time.Sleep(20 * time.Millisecond)
	}
}

// However many streams others have open, there are some for who is on the node;
// and the other way round.
func TestNobodyIsLockedOut(t *testing.T) {
	s := NewServer(Options{Place: Place{Node: "n1"}, Ring: flow.NewRing(10), Started: time.Now()})
	socket := filepath.Join(t.TempDir(), "s")
	listen(t, s, "unix", socket)
	remote := listen(t, s, "tcp", "127.0.0.1:0")
	local, far := dial(t, "unix:"+socket, insecure.NewCredentials()), dial(t, "passthrough:///"+remote.Addr().String(), insecure.NewCredentials())
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	open := func(conn *grpc.ClientConn) error {
		stream, err := peerpb.NewPeerClient(conn).Notify(ctx, &peerpb.NotifyRequest{})
		if err == nil {
			_, err = stream.Recv()
		}
		return err
	}
	for _, c := range []struct {
		name string
		conn *grpc.ClientConn
		most int
	}{{"from other nodes", far, maxRemoteStreams}, {"on the socket", local, maxLocalStreams}} {
		for i := range c.most {
			if err := open(c.conn); err != nil {
				t.Fatalf("stream %d %s: %v", i, c.name, err)
			}
		}
		if err := open(c.conn); status.Code(err) != codes.ResourceExhausted {
			t.Errorf("one more %s: %v", c.name, err)
		}
	}
}
