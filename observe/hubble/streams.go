package hubble

import (
	"context"
	"sync/atomic"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/peer"
	"google.golang.org/grpc/status"
)

// Bounds of the streams of one server: each has a goroutine and a batch of
// records. Who comes over the network takes no place of who is on the node, and
// the other way round.
const (
	maxLocalStreams  = 32  // on the unix socket
	maxRemoteStreams = 128 // on all other listeners
)

// streams counts those that are open. Safe for concurrent use.
type streams struct{ local, remote atomic.Int64 }

// enter takes the place of a stream of that context; the caller gives it back.
func (s *streams) enter(ctx context.Context) (leave func(), err error) {
	n, most, where := &s.remote, int64(maxRemoteStreams), "from other nodes"
	if p, ok := peer.FromContext(ctx); ok && p.Addr != nil && p.Addr.Network() == "unix" {
		n, most, where = &s.local, maxLocalStreams, "on this socket"
	}
	if n.Add(1) > most {
		n.Add(-1)
		return nil, status.Errorf(codes.ResourceExhausted, "%d streams %s are open already: end one of them", most, where)
	}
	return func() { n.Add(-1) }, nil
}
