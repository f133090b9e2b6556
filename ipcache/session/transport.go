package session

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"maps"
	"net"
	"net/netip"
	"slices"
	"sync"
	"time"

	"github.com/spiffe/go-spiffe/v2/bundle/x509bundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/svid/x509svid"
	"go.uber.org/zap"
	"google.golang.org/grpc"
	"google.golang.org/grpc/keepalive"

	"portcullis/identity"
	"portcullis/ipcache/lease"
)

// Sink takes what streams bring. The calls for one stream come from one
// goroutine, in order:
//
//	owner's side:    StreamAccepted, FromVerifier..., VerifierGone
//	verifier's side: StreamOpened, FromOwner..., OwnerGone
//
// A stream that could not be opened is told by OwnerGone with Stream 0 alone.
// Nothing of a stream comes after its Gone. Calls for different streams come
// concurrently. A call may block: the peer is then slowed down, and its queue
// closes the stream when it is full. But it must return once Run's context has
// ended, or Run does not return.
type Sink interface {
	Owner(lease.OwnerInput)
	Verifier(lease.VerifierInput)
}

// Source gives this node's SVID and the trust domain's bundle; identity/svid has
// one. It must not hand out expired SVIDs; that is checked here again.
type Source interface {
	x509svid.Source
	x509bundle.Source
	// Changed returns a channel that is closed at the next change.
	Changed() <-chan struct{}
}

// Config configures a Transport. The fields up to Sink are required.
type Config struct {
	Node        identity.NodeName
	TrustDomain spiffeid.TrustDomain
	// Listen is a TCP address, such as 10.0.0.1:4260.
	Listen string
	Source Source
	// Peer returns where an owner's agent listens. Called concurrently.
	Peer func(identity.NodeName) (addr string, ok bool)
	// Known is the authorizer of incoming streams: which nodes may ask this
	// one. Called concurrently, during handshakes.
	Known func(identity.NodeName) bool
	Sink  Sink

	// Trust gives the bundles that workloads' certificates are verified with, of
	// this trust domain and of those that it is federated with. Nil: there are no
	// proofs. Called concurrently.
	Trust x509bundle.Source
	// NodeAddress tells addresses of known nodes, whose connections have places
	// that nobody else can take. Nil: no address is known, and who connects
	// competes with strangers until it has authenticated. Called by one goroutine.
	NodeAddress func(netip.Addr) bool
	// Connections is how many may be open at a time from known nodes; a further
	// one is closed. An eighth as many have places beside those that are not
	// authenticated yet and come from elsewhere. 0: DefaultConnections.
	Connections int
	// Queue is how many messages may wait in one stream; one more closes it.
	// 0: DefaultQueue.
	Queue int
	// DialTimeout bounds the time from Open to its answer. 0: DefaultDialTimeout.
	DialTimeout time.Duration
	// PeerTimeout is how long what was sent may stay unacknowledged by the
	// peer's kernel before the stream ends. 0: DefaultPeerTimeout.
	PeerTimeout time.Duration
	// Log may be nil.
	Log *zap.Logger
}

func (c *Config) check() error {
	var errs []error
	need := func(ok bool, what string) {
		if !ok {
			errs = append(errs, fmt.Errorf("session: Config.%s is required", what))
		}
	}
	need(!c.TrustDomain.IsZero(), "TrustDomain")
	need(c.Listen != "", "Listen")
	need(c.Source != nil, "Source")
	need(c.Peer != nil, "Peer")
	need(c.Known != nil, "Known")
	need(c.Sink != nil, "Sink")
	if _, err := AgentID(c.TrustDomain, c.Node); err != nil && !c.TrustDomain.IsZero() {
		errs = append(errs, err)
	}
	if c.Queue < 0 || c.DialTimeout < 0 || c.PeerTimeout < 0 || c.Connections < 0 {
		errs = append(errs, errors.New("session: Connections, Queue, DialTimeout and PeerTimeout must not be negative"))
	}
	c.Connections = cmp.Or(c.Connections, DefaultConnections)
	c.Queue = cmp.Or(c.Queue, DefaultQueue)
	c.DialTimeout = cmp.Or(c.DialTimeout, DefaultDialTimeout)
	c.PeerTimeout = cmp.Or(c.PeerTimeout, DefaultPeerTimeout)
	if c.Log == nil {
		c.Log = zap.NewNop()
	}
	return errors.Join(errs...)
}

// Transport holds this node's sessions, as owner and as verifier. All methods
// but Run are safe for concurrent use and never block.
type Transport struct {
	cfg Config
	log *zap.Logger

	listening chan struct{} // closed when addr is set
	addr      net.Addr      // written before listening is closed

	wg sync.WaitGroup // dials and verifier streams; Add only with mu held and ended false

	mu      sync.Mutex
	ctx     context.Context                // guarded by mu; nil until Run, ends every stream
	ended   bool                           // guarded by mu; no stream begins any more
	last    lease.StreamID                 // guarded by mu; the last one given out
	streams map[lease.StreamID]*stream     // guarded by mu; told to the sink, not gone
	dialing map[identity.NodeName]struct{} // guarded by mu; Open was called and not answered
}

// New checks the configuration. Nothing happens before Run.
func New(cfg Config) (*Transport, error) {
	if err := cfg.check(); err != nil {
		return nil, err
	}
	return &Transport{
		cfg: cfg, log: cfg.Log, listening: make(chan struct{}),
		streams: map[lease.StreamID]*stream{}, dialing: map[identity.NodeName]struct{}{},
	}, nil
}

// Run listens, serves and dials until its context ends; then it ends every session and
// returns nil when all its goroutines are gone. It is called once.
func (t *Transport) Run(parent context.Context) error {
	ctx, cancel := context.WithCancelCause(parent)
	defer cancel(nil)
	lc := net.ListenConfig{Control: socketOptions(t.cfg.PeerTimeout), KeepAliveConfig: keepAlive}
	lc.SetMultipathTCP(false)
	ln, err := lc.Listen(ctx, "tcp", t.cfg.Listen)
	if err != nil {
		return fmt.Errorf("session: listen for other agents: %w", err)
	}
	srv := grpc.NewServer(
		grpc.Creds(&handshaker{t: t, authorize: t.verifiers()}),
		grpc.ConnectionTimeout(handshakeTimeout),
		grpc.KeepaliveParams(keepalive.ServerParameters{MaxConnectionIdle: handshakeTimeout}), // a connection without a stream
		grpc.MaxConcurrentStreams(1), grpc.MaxHeaderListSize(maxHeaders),
		grpc.MaxRecvMsgSize(maxFrame), grpc.MaxSendMsgSize(maxFrame),
		grpc.StaticStreamWindowSize(window), grpc.StaticConnWindowSize(window),
		grpc.WaitForHandlers(true),
	)
	RegisterBindingLeaseServer(srv, &ownerSide{t: t})

	var wg sync.WaitGroup
	wg.Go(func() {
		if err := srv.Serve(newListener(ln, t.cfg.Connections, t.cfg.NodeAddress, t.log)); err != nil {
			cancel(fmt.Errorf("session: serve other agents: %w", err))
		}
	})
	wg.Go(func() { t.endStale(ctx) })
	t.begin(ctx)
	t.addr = ln.Addr()
	close(t.listening)
	t.log.Info("listening for other agents", zap.Stringer("address", t.addr))

	<-ctx.Done()
	t.end()
	srv.Stop()
	wg.Wait()
	t.wg.Wait()
	if parent.Err() != nil {
		return nil
	}
	return context.Cause(ctx)
}

// begin dials what was asked for before Run.
func (t *Transport) begin(ctx context.Context) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.ctx = ctx
	for owner := range t.dialing {
		t.wg.Go(func() { t.verifierSide(ctx, owner) })
	}
}

// end closes every stream and lets none begin.
func (t *Transport) end() {
	t.mu.Lock()
	t.ended = true
	streams := slices.Collect(maps.Values(t.streams))
	t.mu.Unlock()
	for _, s := range streams {
		s.close(errEnded.Error())
	}
}

// Listening is closed when peers can connect.
func (t *Transport) Listening() <-chan struct{} { return t.listening }

// Addr returns where peers connect, nil before Listening is closed.
func (t *Transport) Addr() net.Addr {
	select {
	case <-t.listening:
		return t.addr
	default:
		return nil
	}
}

// Open asks for a stream to an owner. The sink gets StreamOpened or OwnerGone
// for it. While one Open to the owner is unanswered, others are the same one.
// Each stream has a handshake of its own, so Open during a live session makes a
// second one. After Run has ended nothing is answered.
func (t *Transport) Open(owner identity.NodeName) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if _, busy := t.dialing[owner]; busy || t.ended {
		return
	}
	t.dialing[owner] = struct{}{}
	if t.ctx != nil {
		ctx := t.ctx
		t.wg.Go(func() { t.verifierSide(ctx, owner) })
	}
}

// SendToVerifier queues a message in a stream that a verifier opened. The
// message must not be changed afterwards. A full queue closes the stream; a
// stream that is gone already takes nothing.
func (t *Transport) SendToVerifier(id lease.StreamID, m lease.Message) { t.send(id, RoleOwner, m) }

// SendToOwner queues a message in a stream that this node opened, as
// SendToVerifier.
func (t *Transport) SendToOwner(id lease.StreamID, m lease.Message) { t.send(id, RoleVerifier, m) }

func (t *Transport) send(id lease.StreamID, as Role, m lease.Message) {
	t.enqueue(id, as, queued{message: m})
}

func (t *Transport) enqueue(id lease.StreamID, as Role, q queued) {
	t.mu.Lock()
	s := t.streams[id]
	t.mu.Unlock()
	if s == nil {
		return // its Gone is on the way, or was told
	}
	if s.role != as {
		s.close(fmt.Sprintf("bug: %T sent as %s in a stream in which this node is %s", q.message, as, s.role))
		return
	}
	select {
	case s.queue <- q:
	default:
		s.close(fmt.Sprintf("the queue is full: %d messages wait", cap(s.queue)))
	}
}

// Close ends a stream. Messages in its queue may be lost. The sink is told, as
// of any other end.
func (t *Transport) Close(id lease.StreamID, why string) {
	t.mu.Lock()
	s := t.streams[id]
	t.mu.Unlock()
	if s != nil {
		s.close(why)
	}
}

// Info describes an open stream.
type Info struct {
	Stream   lease.StreamID
	Role     Role              // this node's
	Peer     identity.NodeName // as authenticated
	SPIFFEID string            // the peer's
	Serial   string            // of the peer's certificate, hexadecimal
	Issuer   string            // of the peer's certificate
	Remote   string            // the peer's address
	Expires  time.Time         // wall clock: when the stream ends at the latest
	Opened   time.Time         // wall clock
	Queued   int               // messages that wait to be sent
}

// Peer returns who is at the other end of a stream, false if it has ended.
func (t *Transport) Peer(id lease.StreamID) (identity.NodeName, bool) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if s := t.streams[id]; s != nil {
		return s.auth.node, true
	}
	return "", false
}

// Sessions returns the open streams, by number.
func (t *Transport) Sessions() []Info {
	t.mu.Lock()
	defer t.mu.Unlock()
	out := make([]Info, 0, len(t.streams))
	for _, s := range t.streams {
		cert := s.auth.State.PeerCertificates[0] // never empty: see finish
		out = append(out, Info{
			Stream: s.id, Role: s.role, Peer: s.auth.node, SPIFFEID: s.auth.id.String(), Serial: cert.SerialNumber.Text(16), Issuer: cert.Issuer.String(), Remote: s.auth.conn.RemoteAddr().String(),
			Expires: s.auth.expires, Opened: s.opened, Queued: len(s.queue),
		})
	}
	slices.SortFunc(out, func(a, b Info) int { return cmp.Compare(a.Stream, b.Stream) })
	return out
}
