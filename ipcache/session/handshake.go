package session

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"net"
	"time"

	"github.com/spiffe/go-spiffe/v2/bundle/x509bundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/spiffetls/tlsconfig"
	"github.com/spiffe/go-spiffe/v2/svid/x509svid"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/peer"

	"portcullis/identity"
)

// errResumed cannot happen with the configuration below; it is what keeps a
// change of that configuration from letting an unchecked peer in.
var errResumed = errors.New("the TLS handshake was resumed: the peer's identity was not checked")

// authenticated is what one handshake has shown. It is the gRPC AuthInfo of the
// connection.
type authenticated struct {
	credentials.TLSInfo
	node    identity.NodeName
	id      spiffeid.ID
	expires time.Time          // the earlier end of both sides' certificates
	bundle  *x509bundle.Bundle // which the peer was verified with
	conn    net.Conn           // closing it ends everything at once
}

// handshaker makes gRPC connections authenticated. Each handshake has its own
// TLS configuration, because what it shows is kept with it.
type handshaker struct {
	t         *Transport
	authorize tlsconfig.Authorizer // required
}

// ClientHandshake implements credentials.TransportCredentials.
func (h *handshaker) ClientHandshake(ctx context.Context, authority string, conn net.Conn) (net.Conn, credentials.AuthInfo, error) {
	p := &proof{h: h}
	cfg := tlsconfig.MTLSClientConfig(p, p, p.authorize)
	if err := p.harden(cfg); err != nil {
		return nil, nil, err
	}
	secure, info, err := credentials.NewTLS(cfg).ClientHandshake(ctx, authority, conn)
	return p.finish(conn, secure, info, err)
}

// ServerHandshake implements credentials.TransportCredentials.
func (h *handshaker) ServerHandshake(conn net.Conn) (net.Conn, credentials.AuthInfo, error) {
	p := &proof{h: h}
	cfg := tlsconfig.MTLSServerConfig(p, p, p.authorize)
	if err := p.harden(cfg); err != nil {
		return nil, nil, err
	}
	secure, info, err := credentials.NewTLS(cfg).ServerHandshake(conn)
	if err != nil {
		h.t.log.Warn("refused a connection", remote(conn), why(err))
	}
	secure, auth, err := p.finish(conn, secure, info, err)
	if c, ok := conn.(*placed); ok && err == nil && !c.authenticated(auth.(*authenticated).node) {
		secure.Close()
		return nil, nil, errNoPlace
	}
	return secure, auth, err
}

// Info implements credentials.TransportCredentials.
func (h *handshaker) Info() credentials.ProtocolInfo {
	return credentials.ProtocolInfo{SecurityProtocol: "tls"}
}

// Clone implements credentials.TransportCredentials.
func (h *handshaker) Clone() credentials.TransportCredentials { return h }

// OverrideServerName implements credentials.TransportCredentials. SPIFFE
// verifies IDs, not names.
func (h *handshaker) OverrideServerName(string) error { return nil }

// proof gathers what one handshake shows. It stands between go-spiffe and the
// source, so that it knows exactly which certificates and bundle were used.
type proof struct {
	h      *handshaker
	own    *x509svid.SVID
	bundle *x509bundle.Bundle
	id     spiffeid.ID
	until  time.Time // the end of the peer's certificates
}

// GetX509SVID gives this node's SVID, unless it has expired. Some SPIFFE agents
// hand out expired ones, so what the source says is checked here again.
func (p *proof) GetX509SVID() (*x509svid.SVID, error) {
	svid, err := p.h.t.cfg.Source.GetX509SVID()
	if err != nil {
		return nil, fmt.Errorf("this node's SVID: %w", err)
	}
	if end := chainEnd(svid.Certificates); !time.Now().Before(end) {
		return nil, fmt.Errorf("this node's SVID expired at %s", end.Format(time.RFC3339))
	}
	p.own = svid
	return svid, nil
}

// GetX509BundleForTrustDomain gives the bundle of this node's trust domain
// only, whatever else the source knows.
func (p *proof) GetX509BundleForTrustDomain(td spiffeid.TrustDomain) (*x509bundle.Bundle, error) {
	if td != p.h.t.cfg.TrustDomain {
		return nil, fmt.Errorf("trust domain %s is not %s", td, p.h.t.cfg.TrustDomain)
	}
	bundle, err := p.h.t.cfg.Source.GetX509BundleForTrustDomain(td)
	if err != nil {
		return nil, err
	}
	// A copy: some sources change a bundle in place, and this one says with
	// what the peer was verified.
	p.bundle = bundle.Clone()
	return p.bundle, nil
}

func (p *proof) authorize(id spiffeid.ID, chains [][]*x509.Certificate) error {
	if err := p.h.authorize(id, chains); err != nil {
		return err
	}
	p.id = id
	for _, chain := range chains { // the peer is valid as long as one chain is
		if end := chainEnd(chain); end.After(p.until) {
			p.until = end
		}
	}
	return nil
}

// harden takes away what could skip the check of the peer, and asserts it.
func (p *proof) harden(cfg *tls.Config) error {
	cfg.MinVersion = tls.VersionTLS13
	cfg.SessionTicketsDisabled = true
	cfg.ClientSessionCache = nil
	cfg.VerifyConnection = func(s tls.ConnectionState) error {
		switch {
		case s.DidResume:
			return errResumed
		case s.Version < tls.VersionTLS13:
			return fmt.Errorf("TLS version %#x is older than 1.3", s.Version)
		case p.id.IsZero():
			return errors.New("the peer's identity was not checked")
		}
		return nil
	}
	return checkHardened(cfg)
}

// checkHardened is what a configuration must have before it is used.
func checkHardened(cfg *tls.Config) error {
	if !cfg.SessionTicketsDisabled || cfg.ClientSessionCache != nil || cfg.WrapSession != nil || cfg.UnwrapSession != nil {
		return errors.New("session: TLS resumption is not off: refusing to make a handshake")
	}
	if cfg.MinVersion < tls.VersionTLS13 || cfg.VerifyPeerCertificate == nil || cfg.VerifyConnection == nil {
		return errors.New("session: the TLS configuration does not check the peer: refusing to make a handshake")
	}
	return nil
}

func (p *proof) finish(raw, secure net.Conn, info credentials.AuthInfo, err error) (net.Conn, credentials.AuthInfo, error) {
	if err != nil {
		return nil, nil, err
	}
	tlsInfo, ok := info.(credentials.TLSInfo)
	if !ok || p.own == nil || p.bundle == nil || p.id.IsZero() {
		// Neither side may have skipped a step; close rather than guess.
		secure.Close()
		return nil, nil, errors.New("session: the handshake left the peer or this node unproved")
	}
	node, err := NodeOf(p.h.t.cfg.TrustDomain, p.id)
	if err != nil {
		secure.Close()
		return nil, nil, err
	}
	expires := chainEnd(p.own.Certificates)
	if p.until.Before(expires) {
		expires = p.until
	}
	return secure, &authenticated{TLSInfo: tlsInfo, node: node, id: p.id, expires: expires, bundle: p.bundle, conn: raw}, nil
}

// chainEnd is when the first of the certificates ends.
func chainEnd(chain []*x509.Certificate) (end time.Time) {
	for i, c := range chain {
		if i == 0 || c.NotAfter.Before(end) {
			end = c.NotAfter
		}
	}
	return end
}

// authOf returns what the connection's handshake has shown.
func authOf(ctx context.Context) (*authenticated, error) {
	p, ok := peer.FromContext(ctx)
	if !ok {
		return nil, errors.New("session: a stream without a peer")
	}
	auth, ok := p.AuthInfo.(*authenticated)
	if !ok {
		return nil, errors.New("session: a stream over a connection that was not authenticated")
	}
	return auth, nil
}
