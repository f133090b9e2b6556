package hubble

import (
	"context"
	"crypto/x509"
	"errors"
	"net"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/peer"
	"google.golang.org/grpc/status"
)

// ServeTLS returns the options of a gRPC server that asks every client for an SVID
// that may returns nil for. What a client began ends when its SVID does, with
// Unauthenticated; a moment later its connection, so that the next one shows
// the SVID that it has then.
func ServeTLS(source Source, may func(spiffeid.ID) error) []grpc.ServerOption {
	return []grpc.ServerOption{grpc.Creds(expiring{credentials.NewTLS(serverTLS(source, may))}),
		grpc.ChainStreamInterceptor(whileValid), grpc.ChainUnaryInterceptor(ifValid)}
}

// closesAfter is how long a connection outlives its client's SVID: for as long as
// its streams need to tell why they ended.
const closesAfter = time.Second

// errExpired is the cause with which a stream's context ends.
var errExpired = errors.New("the client's SVID has expired")

// expired is what the client is told.
func expired(end time.Time) error {
	return status.Errorf(codes.Unauthenticated, "the SVID that this connection began with ended at %s: connect again with the present one", end.UTC().Format(time.RFC3339))
}

// endOf returns when the first certificate of a client's chain ends; false: it has
// shown none.
func endOf(info credentials.AuthInfo) (end time.Time, ok bool) {
	t, ok := info.(credentials.TLSInfo)
	if !ok {
		return end, false
	}
	return chainEnd(t.State.PeerCertificates), len(t.State.PeerCertificates) > 0
}

func chainEnd(chain []*x509.Certificate) (end time.Time) {
	for i, c := range chain {
		if i == 0 || c.NotAfter.Before(end) {
			end = c.NotAfter
		}
	}
	return end
}

// callerEnd does so for a call. Behind these credentials nobody is without a
// certificate: who has none anyway is refused.
func callerEnd(ctx context.Context) (time.Time, error) {
	if p, ok := peer.FromContext(ctx); ok {
		if end, ok := endOf(p.AuthInfo); ok {
			return end, nil
		}
	}
	return time.Time{}, status.Error(codes.Unauthenticated, "the connection shows no SVID")
}

func ifValid(ctx context.Context, req any, _ *grpc.UnaryServerInfo, handle grpc.UnaryHandler) (any, error) {
	end, err := callerEnd(ctx)
	if err != nil {
		return nil, err
	}
	if !time.Now().Before(end) {
		return nil, expired(end)
	}
	return handle(ctx, req)
}

func whileValid(srv any, stream grpc.ServerStream, _ *grpc.StreamServerInfo, handle grpc.StreamHandler) error {
	end, err := callerEnd(stream.Context())
	if err != nil {
		return err
	}
	ctx, cancel := context.WithDeadlineCause(stream.Context(), end, errExpired)
	defer cancel()
	err = handle(srv, &validStream{stream, ctx})
	if err != nil && context.Cause(ctx) == errExpired { //nolint:errorlint // the very value
		return expired(end)
	}
	return err
}

// validStream sends nothing once its context has ended.
type validStream struct {
	grpc.ServerStream
	ctx context.Context
}

func (s *validStream) Context() context.Context { return s.ctx }

func (s *validStream) SendMsg(m any) error {
	if err := s.ctx.Err(); err != nil {
		return status.FromContextError(err).Err()
	}
	return s.ServerStream.SendMsg(m)
}

// expiring are credentials whose connections end with the client's SVID.
type expiring struct {
	credentials.TransportCredentials
}

func (c expiring) Clone() credentials.TransportCredentials {
	return expiring{c.TransportCredentials.Clone()}
}

func (c expiring) ServerHandshake(raw net.Conn) (net.Conn, credentials.AuthInfo, error) {
	conn, info, err := c.TransportCredentials.ServerHandshake(raw)
	if err != nil {
		return nil, nil, err
	}
	end, ok := endOf(info)
	if !ok {
		conn.Close()
		return nil, nil, errors.New("the client has shown no SVID")
	}
	return &mortal{conn, time.AfterFunc(time.Until(end.Add(closesAfter)), func() { conn.Close() })}, info, nil
}

// mortal is a connection that a timer closes.
type mortal struct {
	net.Conn
	end *time.Timer
}

func (c *mortal) Close() error {
	c.end.Stop()
	return c.Conn.Close()
}
