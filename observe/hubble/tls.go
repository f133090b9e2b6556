package hubble

import (
	"crypto/tls"
	"errors"

	"github.com/spiffe/go-spiffe/v2/bundle/x509bundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/spiffetls/tlsconfig"
	"github.com/spiffe/go-spiffe/v2/svid/x509svid"
)

// Source is where an SVID and the bundles come from.
type Source interface {
	x509svid.Source
	x509bundle.Source
}

// serverTLS asks every client for an SVID that may returns nil for. Flow records
// tell who talks to whom: nobody else reads them.
func serverTLS(source Source, may func(spiffeid.ID) error) *tls.Config {
	return harden(tlsconfig.MTLSServerConfig(source, source, tlsconfig.AdaptMatcher(spiffeid.Matcher(may))))
}

// ClientTLS shows the SVID to a server for whose may returns nil.
func ClientTLS(source Source, may func(spiffeid.ID) error) *tls.Config {
	return harden(tlsconfig.MTLSClientConfig(source, source, tlsconfig.AdaptMatcher(spiffeid.Matcher(may))))
}

// harden turns off resumption: a resumed handshake does not check the peer.
func harden(cfg *tls.Config) *tls.Config {
	cfg.MinVersion, cfg.SessionTicketsDisabled, cfg.ClientSessionCache = tls.VersionTLS13, true, nil
	cfg.VerifyConnection = func(s tls.ConnectionState) error {
		if s.DidResume {
			return errors.New("a resumed handshake does not check the peer")
		}
		return nil
	}
	return cfg
}
