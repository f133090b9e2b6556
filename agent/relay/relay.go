package relay

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"go.uber.org/zap"
	"golang.org/x/net/netutil"
	"golang.org/x/sync/errgroup"
	"google.golang.org/grpc"
	"google.golang.org/grpc/backoff"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/credentials/insecure"

	"portcullis/agent/api"
	"portcullis/identity"
	"portcullis/identity/issuer/client"
	"portcullis/identity/svid"
	"portcullis/ipcache/session"
	"portcullis/observe/hubble"
)

// Config says whom to ask, and who may ask.
type Config struct {
	Socket                    string   // unix socket to serve on (0660)
	Listen                    string   // ADDRESS:PORT to serve on over mTLS; "": none
	Clients                   []string // SPIFFE IDs that may read there, beside agents
	Nodes                     []string // NAME=ADDRESS:PORT; none: those that the agent at Peers knows
	Peers                     string   // unix socket of an agent's Hubble API; or HOST:PORT, over mTLS, where any agent answers
	TrustDomain               string   // required
	SPIFFEID                  string   // of the relay's own SVID; "": spiffe://TRUST-DOMAIN/portcullis/relay
	WorkloadAPI               string   // where that comes from
	SVIDDir                   string   // or here
	Issuer                    string   // or from here: https://HOST:PORT of an issuer; the token and the bundle are for asking it
	IssuerToken, IssuerBundle string
	Local                     string // ADDRESS:PORT of the loopback to serve on in the clear; "": none
	Patience                  time.Duration
	Version                   string
}

// Default returns the configuration that flags start from.
func Default() Config {
	return Config{Socket: "/run/portcullis/relay.sock", Peers: "/run/portcullis/hubble.sock", WorkloadAPI: "unix:///run/spire/agent.sock", Patience: time.Second}
}

// Bounds of the listener on TLS, as an agent's.
const (
	connections = 256
	handshake   = 5 * time.Second
)

// Validate reports every problem of the configuration.
func (c *Config) Validate() error {
	var errs []error
	bad := func(format string, args ...any) { errs = append(errs, fmt.Errorf(format, args...)) }
	td, err := spiffeid.TrustDomainFromString(c.TrustDomain)
	if err != nil {
		bad("--trust-domain %q: %v", c.TrustDomain, err)
	}
	if c.SPIFFEID == "" && err == nil {
		c.SPIFFEID = "spiffe://" + td.Name() + identity.RelaySPIFFEPath
	}
	if id, err := spiffeid.FromString(c.SPIFFEID); err != nil {
		bad("--spiffe-id %q: %v: want the name of the SVID that this relay gets", c.SPIFFEID, err)
	} else if id.TrustDomain() != td {
		bad("--spiffe-id %s is not of the trust domain %s: agents will not answer", id, td)
	}
	for _, id := range c.Clients {
		if _, err := spiffeid.FromString(id); err != nil {
			bad("--hubble-client %q: %v", id, err)
		}
	}
	if _, err := c.nodes(); err != nil {
		errs = append(errs, err)
	}
	if !filepath.IsAbs(c.Peers) {
		if host, port, err := net.SplitHostPort(c.Peers); err != nil || host == "" || port == "" {
			bad("--peers %q: want the absolute path of an agent's socket, or HOST:PORT", c.Peers)
		}
	}
	if c.Local != "" {
		// Whoever reaches it reads all flows, so it must be reached from here only.
		if at, err := netip.ParseAddrPort(c.Local); err != nil || !at.Addr().IsLoopback() {
			bad("--listen-local %q: want ADDRESS:PORT of the loopback, e.g. 127.0.0.1:4245", c.Local)
		}
	}
	if c.Listen != "" {
		if _, _, err := net.SplitHostPort(c.Listen); err != nil {
			bad("--listen %q: want ADDRESS:PORT", c.Listen)
		}
	}
	if !filepath.IsAbs(c.Socket) {
		bad("--relay-socket %q: want an absolute path", c.Socket)
	}
	if c.Patience < 10*time.Millisecond || c.Patience > time.Minute {
		bad("--patience %v: want 10ms to 1m", c.Patience)
	}
	if c.Issuer != "" && c.SVIDDir != "" {
		bad("--svid-dir and --issuer exclude each other: the relay's SVID comes from one place")
	}
	if c.Issuer != "" {
		errs = append(errs, c.issuerClient(spiffeid.ID{}, nil).Check())
	} else if c.IssuerToken != "" || c.IssuerBundle != "" {
		bad("--issuer is missing: --issuer-token and --issuer-bundle are for asking one")
	}
	if c.SVIDDir != "" && !filepath.IsAbs(c.SVIDDir) {
		bad("--svid-dir %q: want an absolute path", c.SVIDDir)
	}
	return errors.Join(errs...)
}

// nodes parses the nodes that are configured.
func (c *Config) nodes() (out []hubble.Peer, err error) {
	for _, n := range c.Nodes {
		name, addr, ok := strings.Cut(n, "=")
		if _, _, err := net.SplitHostPort(addr); !ok || name == "" || err != nil {
			return nil, fmt.Errorf("--node %q: want NAME=ADDRESS:PORT, e.g. n1=192.0.2.1:4244", n)
		}
		out = append(out, hubble.Peer{Name: name, Address: addr})
	}
	return out, nil
}

// Run is the relay, until ctx ends (nil) or something that it cannot work
// without fails. A node that does not answer is no error of it.
func Run(ctx context.Context, cfg Config, log *zap.Logger) error {
	if err := cfg.Validate(); err != nil {
		return err
	}
	source, err := cfg.source(log)
	if err != nil {
		return err
	}
	nodes := &peers{list: map[string]known{}}
	configured, _ := cfg.nodes() // Validate has looked at them
	for _, p := range configured {
		nodes.list[p.Name] = known{Peer: p}
	}
	td := spiffeid.RequireTrustDomainFromString(cfg.TrustDomain)
	r := hubble.NewRelay(hubble.RelayOptions{Place: hubble.Place{Node: "relay", Version: cfg.Version}, Nodes: nodes.all, Patience: cfg.Patience,
		Dial: func(p hubble.Peer) (*grpc.ClientConn, error) { return dial(td, source, p) }})
	defer r.Close()
	group, ctx := errgroup.WithContext(ctx)
	group.Go(func() error { return source.Run(ctx) })
	if len(configured) == 0 {
		conn, err := cfg.dialPeers(td, source)
		if err != nil {
			return err
		}
		defer conn.Close()
		group.Go(func() error { return nodes.follow(ctx, conn, log) })
	}
	if err := cfg.serve(ctx, group, r, source, td); err != nil {
		return err
	}
	log.Info("relay started", zap.String("socket", cfg.Socket), zap.String("listen", cfg.Listen))
	err = group.Wait()
	if ctx.Err() != nil && errors.Is(err, context.Canceled) {
		return nil
	}
	return err
}

func (c *Config) source(log *zap.Logger) (*svid.Source, error) {
	id, err := spiffeid.FromString(c.SPIFFEID)
	if err != nil {
		return nil, err
	}
	var from svid.Provider
	switch {
	case c.Issuer != "":
		from, err = client.New(*c.issuerClient(id, log))
	case c.SVIDDir != "":
		from, err = svid.Directory(c.SVIDDir)
	default:
		from, err = svid.WorkloadAPI(c.WorkloadAPI)
	}
	if err != nil {
		return nil, err
	}
	return svid.New(svid.Config{From: from, ID: id, Log: log})
}

// issuerClient keeps the SVID beside the socket: where that is lost, a new one is
// asked for.
func (c *Config) issuerClient(id spiffeid.ID, log *zap.Logger) *client.Config {
	return &client.Config{URL: c.Issuer, TokenFile: c.IssuerToken, BundleFile: c.IssuerBundle, CacheFile: filepath.Join(filepath.Dir(c.Socket), "relay-svid.json"), ID: id, Log: log}
}

// dial connects to a node's agent, which must be that node's: a name that one
// agent tells of another is only believed with that one's SVID.
func dial(td spiffeid.TrustDomain, source hubble.Source, p hubble.Peer) (*grpc.ClientConn, error) {
	name := p.Name[strings.LastIndex(p.Name, "/")+1:] // less the cluster's
	id, err := session.AgentID(td, identity.NodeName(name))
	if err != nil {
		return nil, err
	}
	return grpc.NewClient("passthrough:///"+p.Address, grpc.WithDefaultCallOptions(grpc.MaxCallRecvMsgSize(hubble.MaxAnswer)),
		grpc.WithTransportCredentials(credentials.NewTLS(hubble.ClientTLS(source, spiffeid.MatchID(id)))),
		grpc.WithConnectParams(grpc.ConnectParams{Backoff: backoff.Config{BaseDelay: 100 * time.Millisecond, Multiplier: 1.6, Jitter: 0.2, MaxDelay: 2 * time.Second}, MinConnectTimeout: handshake}))
}

// dialPeers connects to the agent that tells of the nodes. Whichever it is, its
// word is no more than an address: a node's agent proves itself.
func (c *Config) dialPeers(td spiffeid.TrustDomain, source hubble.Source) (*grpc.ClientConn, error) {
	if filepath.IsAbs(c.Peers) {
		return grpc.NewClient("unix:"+c.Peers, grpc.WithTransportCredentials(insecure.NewCredentials()))
	}
	anyAgent := func(id spiffeid.ID) error { _, err := session.NodeOf(td, id); return err }
	return grpc.NewClient("dns:///"+c.Peers, grpc.WithTransportCredentials(credentials.NewTLS(hubble.ClientTLS(source, anyAgent))))
}

// serve starts the listeners in the group; they end with ctx.
func (c *Config) serve(ctx context.Context, group *errgroup.Group, r *hubble.Relay, source hubble.Source, td spiffeid.TrustDomain) error {
	start := func(ln net.Listener, opts ...grpc.ServerOption) {
		g := grpc.NewServer(append(opts, grpc.MaxConcurrentStreams(128), grpc.MaxRecvMsgSize(hubble.MaxRequest), grpc.ConnectionTimeout(handshake))...)
		r.Register(g)
		stop := context.AfterFunc(ctx, g.Stop)
		group.Go(func() error {
			defer stop()
			return errors.Join(g.Serve(ln), ctx.Err())
		})
	}
	ln, err := api.ListenUnix(c.Socket, "--relay-socket")
	if err != nil {
		return err
	}
	start(ln)
	if c.Local != "" {
		if ln, err = (&net.ListenConfig{}).Listen(ctx, "tcp", c.Local); err != nil {
			return fmt.Errorf("--listen-local: %w", err)
		}
		start(netutil.LimitListener(ln, connections))
	}
	if c.Listen == "" {
		return nil
	}
	if ln, err = (&net.ListenConfig{}).Listen(ctx, "tcp", c.Listen); err != nil {
		return fmt.Errorf("--listen: %w", err)
	}
	start(netutil.LimitListener(ln, connections), hubble.ServeTLS(source, func(id spiffeid.ID) error {
		if slices.Contains(c.Clients, id.String()) {
			return nil
		}
		_, err := session.NodeOf(td, id)
		return err
	})...)
	return nil
}
