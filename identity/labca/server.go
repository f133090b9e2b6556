package labca

import (
	"context"

	"github.com/spiffe/go-spiffe/v2/proto/spiffe/workload"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"

	"portcullis/identity"
)

// server is the Workload API of one node. The profiles of other kinds of SVID
// answer Unimplemented, as the specification wants it.
type server struct {
	workload.UnimplementedSpiffeWorkloadAPIServer
	ca   *CA
	node identity.NodeName
}

// checkHeader demands the metadata that keeps a request forgery by a proxy or a
// browser out.
func checkHeader(ctx context.Context) error {
	md, _ := metadata.FromIncomingContext(ctx)
	if v := md.Get("workload.spiffe.io"); len(v) != 1 || v[0] != "true" {
		return status.Error(codes.InvalidArgument, "security header missing from request: workload.spiffe.io must be true")
	}
	return nil
}

// FetchX509SVID sends the node's SVID now and at each change.
func (s *server) FetchX509SVID(_ *workload.X509SVIDRequest, stream grpc.ServerStreamingServer[workload.X509SVIDResponse]) error {
	return s.follow(stream.Context(), func(a *authority, svid *issued) error {
		return stream.Send(&workload.X509SVIDResponse{Svids: []*workload.X509SVID{{
			SpiffeId: svid.id.String(), X509Svid: svid.cert, X509SvidKey: svid.key, Bundle: a.bundle(),
		}}})
	})
}

// FetchX509Bundles sends the trust bundle now and at each change.
func (s *server) FetchX509Bundles(_ *workload.X509BundlesRequest, stream grpc.ServerStreamingServer[workload.X509BundlesResponse]) error {
	var sent *authority
	return s.follow(stream.Context(), func(a *authority, _ *issued) error {
		if a == sent {
			return nil
		}
		sent = a
		return stream.Send(&workload.X509BundlesResponse{Bundles: map[string][]byte{a.td.IDString(): a.bundle()}})
	})
}

// follow calls send now and at each change, until the stream ends.
func (s *server) follow(ctx context.Context, send func(*authority, *issued) error) error {
	if err := checkHeader(ctx); err != nil {
		return err
	}
	for {
		s.ca.mu.Lock()
		a, svid, changed := s.ca.authority, s.ca.svids[s.node], s.ca.changed
		s.ca.mu.Unlock()
		if err := send(a, svid); err != nil {
			return err
		}
		select {
		case <-changed:
		case <-ctx.Done():
			return status.FromContextError(ctx.Err()).Err()
		}
	}
}
