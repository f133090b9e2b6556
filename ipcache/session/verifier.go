package session

import (
	"context"
	"errors"
	"fmt"
	"net"
	"syscall"
	"time"

	"go.uber.org/zap"
	"golang.org/x/sys/unix"
	"google.golang.org/grpc"
	"google.golang.org/grpc/backoff"
	"google.golang.org/grpc/status"

	"portcullis/identity"
	"portcullis/ipcache/lease"
)

// keepAlive finds a dead peer on a stream on which nothing is sent.
var keepAlive = net.KeepAliveConfig{Enable: true, Idle: 5 * time.Second, Interval: time.Second, Count: 3}

// socketOptions bounds how long sent bytes may stay unacknowledged. Accepted
// sockets inherit it from the listener.
func socketOptions(timeout time.Duration) func(string, string, syscall.RawConn) error {
	return func(_, _ string, c syscall.RawConn) error {
		var err error
		if e := c.Control(func(fd uintptr) {
			err = unix.SetsockoptInt(int(fd), unix.IPPROTO_TCP, unix.TCP_USER_TIMEOUT, int(timeout.Milliseconds()))
		}); e != nil {
			return e
		}
		return err
	}
}

// verifierSide opens a stream to an owner and serves it. It answers one Open.
func (t *Transport) verifierSide(ctx context.Context, owner identity.NodeName) {
	g, auth, hangUp, err := t.dial(ctx, owner)
	var s *stream
	if err == nil {
		defer hangUp()
		s, err = t.register(RoleVerifier, auth)
	}
	// Before the answer: an Open that follows from it is a new one.
	t.mu.Lock()
	delete(t.dialing, owner)
	t.mu.Unlock()
	if err != nil {
		t.log.Warn("no session", zap.String("owner", string(owner)), why(err))
		t.cfg.Sink.Verifier(lease.OwnerGone{Owner: owner, Why: err.Error()})
		return
	}
	t.run(s, wire{
		recv: func() (lease.Message, error) {
			f, err := g.Recv()
			if err != nil {
				return nil, err
			}
			m, err := decodeFromOwner(f, auth.node)
			if err != nil {
				return nil, &malformed{err}
			}
			return m, nil
		},
		send: func(m lease.Message) error {
			f, err := encodeFromVerifier(m)
			if err != nil {
				return &unsendable{err}
			}
			return g.Send(f)
		},
	})
}

type sessionStream = grpc.BidiStreamingClient[FromVerifier, FromOwner]

// dial makes a connection with one stream on it. hangUp closes it.
func (t *Transport) dial(ctx context.Context, owner identity.NodeName) (g sessionStream, auth *authenticated, hangUp func(), err error) {
	addr, ok := t.cfg.Peer(owner)
	switch {
	case owner == t.cfg.Node:
		return nil, nil, nil, errors.New("a node has no session with itself")
	case !ok:
		return nil, nil, nil, fmt.Errorf("no address is known for the agent of node %s", owner)
	}
	dialer := net.Dialer{Timeout: t.cfg.DialTimeout, Control: socketOptions(t.cfg.PeerTimeout), KeepAliveConfig: keepAlive}
	dialer.SetMultipathTCP(false)
	conn, err := grpc.NewClient("passthrough:///"+addr,
		grpc.WithTransportCredentials(&handshaker{t: t, authorize: t.exactly(owner)}),
		grpc.WithContextDialer(func(ctx context.Context, addr string) (net.Conn, error) { return dialer.DialContext(ctx, "tcp", addr) }),
		grpc.WithConnectParams(grpc.ConnectParams{Backoff: backoff.DefaultConfig, MinConnectTimeout: t.cfg.DialTimeout}),
		grpc.WithNoProxy(), grpc.WithDisableServiceConfig(), grpc.WithDisableRetry(), grpc.WithDisableHealthCheck(), grpc.WithIdleTimeout(0),
		grpc.WithMaxHeaderListSize(maxHeaders),
		grpc.WithStaticStreamWindowSize(window), grpc.WithStaticConnWindowSize(window),
		grpc.WithDefaultCallOptions(grpc.MaxCallRecvMsgSize(maxFrame), grpc.MaxCallSendMsgSize(maxFrame)),
	)
	if err != nil {
		return nil, nil, nil, fmt.Errorf("agent of node %s at %s: %w", owner, addr, err)
	}
	ctx, cancel := context.WithCancelCause(ctx)
	hangUp = func() {
		cancel(nil)
		conn.Close()
	}
	// The stream outlives the timeout, so it is a timer that ends the attempt.
	late := fmt.Errorf("no answer within %s", t.cfg.DialTimeout)
	timeout := time.AfterFunc(t.cfg.DialTimeout, func() { cancel(late) })
	g, err = NewBindingLeaseClient(conn).Session(ctx)
	if err == nil {
		_, err = g.Header() // comes once the owner has let us in
	}
	if err == nil {
		auth, err = authOf(g.Context())
	}
	if !timeout.Stop() {
		err = late
	}
	if err != nil {
		if s, ok := status.FromError(err); ok {
			err = errors.New(brief(s.Message()))
		}
		hangUp()
		return nil, nil, nil, fmt.Errorf("agent of node %s at %s: %w", owner, addr, err)
	}
	return g, auth, hangUp, nil
}

func remote(conn net.Conn) zap.Field { return zap.Stringer("remote", conn.RemoteAddr()) }

func why(err error) zap.Field { return zap.NamedError("why", err) }
