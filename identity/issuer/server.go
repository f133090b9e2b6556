package issuer

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"net"
	"net/http"
	"net/netip"
	"sync"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"go.uber.org/zap"
	"golang.org/x/net/netutil"
)

// Bounds of the server.
const (
	maxConnections = 2048
	maxReviews     = 8 // at a time: the API server is others' too
	requestTimeout = 15 * time.Second
	shutdownWait   = 5 * time.Second
)

// ServerConfig configures a Server. All fields but Log are required.
type ServerConfig struct {
	Keeper   *Keeper
	Reviewer Reviewer
	Rules    Rules
	Listener net.Listener // TCP; closed by Run
	Log      *zap.Logger  // may be nil
}

// Server answers agents. It is stateless but for its counters and the rate of
// each node: any number of replicas can run.
type Server struct {
	cfg     ServerConfig
	log     *zap.Logger
	id      spiffeid.ID
	limits  *limiter[Attested]
	sources *limiter[netip.Prefix]
	reviews chan struct{} // a place for each review at a time

	mu      sync.Mutex
	issued  uint64             // guarded by mu
	refused map[Refusal]uint64 // guarded by mu
	own     ownCertificate     // guarded by mu
}

// ownCertificate is what the server shows to agents.
type ownCertificate struct {
	tls    *tls.Certificate
	signer *x509.Certificate
	renew  time.Time
}

// NewServer checks the configuration.
func NewServer(cfg ServerConfig) (*Server, error) {
	if cfg.Keeper == nil || cfg.Reviewer == nil || cfg.Listener == nil || cfg.Rules.Audience == "" || cfg.Rules.Account == "" {
		return nil, errors.New("issuer: ServerConfig: Keeper, Reviewer, Rules and Listener are required")
	}
	if cfg.Log == nil {
		cfg.Log = zap.NewNop()
	}
	id, err := ID(cfg.Keeper.cfg.TrustDomain)
	if err != nil {
		return nil, err
	}
	return &Server{cfg: cfg, log: cfg.Log, id: id, limits: newNodeLimiter(), sources: newSourceLimiter(), reviews: make(chan struct{}, maxReviews), refused: map[Refusal]uint64{}}, nil
}

// Run serves until ctx ends; then it lets requests that are under way finish,
// for 5 s at the most, and returns nil. It is called once.
func (s *Server) Run(ctx context.Context) error {
	mux := http.NewServeMux()
	mux.HandleFunc("POST "+PathSVID, s.svid)
	mux.HandleFunc("GET "+PathBundle, s.bundle)
	mux.HandleFunc("GET "+PathHealth, s.health)
	mux.HandleFunc("GET "+PathStatus, s.status)
	server := &http.Server{
		Handler: http.TimeoutHandler(mux, requestTimeout, `{"reason":"unavailable","message":"the issuer took too long"}`),
		// No resumption: an agent's check of our name does not run on a
		// resumed handshake. One protocol is enough for a request an hour.
		TLSConfig:         &tls.Config{MinVersion: tls.VersionTLS13, SessionTicketsDisabled: true, GetCertificate: s.certificate},
		TLSNextProto:      map[string]func(*http.Server, *tls.Conn, http.Handler){},
		ReadHeaderTimeout: 5 * time.Second, ReadTimeout: 10 * time.Second,
		WriteTimeout: requestTimeout + 5*time.Second, IdleTimeout: 2 * time.Minute,
		MaxHeaderBytes: MaxToken + 4<<10,
		ErrorLog:       zap.NewStdLog(s.log),
	}
	failed := make(chan error, 1)
	go func() {
		failed <- server.ServeTLS(netutil.LimitListener(newFairListener(s.cfg.Listener), maxConnections), "", "")
	}()
	s.log.Info("answering agents", zap.Stringer("address", s.cfg.Listener.Addr()), zap.Stringer("spiffe_id", s.id), zap.String("account", s.cfg.Rules.Account))
	select {
	case err := <-failed:
		return fmt.Errorf("serve agents: %w", err)
	case <-ctx.Done():
	}
	wait, cancel := context.WithTimeout(context.WithoutCancel(ctx), shutdownWait)
	defer cancel()
	if err := server.Shutdown(wait); err != nil {
		server.Close()
	}
	<-failed
	return nil
}

// certificate gives the server's own certificate, made anew when half of its
// life is over and when another authority signs.
func (s *Server) certificate(*tls.ClientHelloInfo) (*tls.Certificate, error) {
	ring, err := s.cfg.Keeper.current()
	if err != nil {
		return nil, err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	now := time.Now().Round(0)
	if s.own.tls != nil && s.own.signer.Equal(ring.signing().cert) && now.Before(s.own.renew) {
		return s.own.tls, nil
	}
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, err
	}
	made, err := s.cfg.Keeper.sign(key.Public(), s.id)
	if err != nil {
		return nil, err
	}
	leaf, err := made.parse()
	if err != nil {
		return nil, err
	}
	s.own = ownCertificate{
		tls:    &tls.Certificate{Certificate: [][]byte{made.der}, PrivateKey: key, Leaf: leaf},
		signer: made.signer.cert, renew: now.Add(leaf.NotAfter.Sub(now) / 2),
	}
	return s.own.tls, nil
}
