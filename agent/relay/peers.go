package relay

import (
	"context"
	"fmt"
	"maps"
	"slices"
	"sync"
	"time"

	"go.uber.org/zap"
	"google.golang.org/grpc"

	peerpb "github.com/cilium/cilium/api/v1/peer"
	"portcullis/observe/hubble"
)

// Bounds of what an agent may tell of nodes.
const (
	maxPeers = 10000
	maxName  = 512 // bytes of a name, and of an address
)

// peers are the nodes that are known. Safe for concurrent use.
type peers struct {
	mu      sync.Mutex
	list    map[string]known // by name; at most maxPeers; guarded by mu
	stream  uint64           // number of the stream of notices that is heard; guarded by mu
	refused bool             // a node found no room; guarded by mu
}

type known struct {
	hubble.Peer
	stream uint64 // that told of it last
}

// all returns them in the order of names.
func (p *peers) all() (out []hubble.Peer) {
	p.mu.Lock()
	defer p.mu.Unlock()
	for _, name := range slices.Sorted(maps.Keys(p.list)) {
		out = append(out, p.list[name].Peer)
	}
	return out
}

// retryEvery is how often an agent that does not tell of its peers is asked again.
const retryEvery = time.Second

// follow keeps the nodes as the agent at a connection knows them, until ctx ends.
// While it does not answer, the nodes stay as they were.
func (p *peers) follow(ctx context.Context, conn *grpc.ClientConn, log *zap.Logger) error {
	for told := ""; ; {
		err := p.notices(ctx, peerpb.NewPeerClient(conn), log)
		if ctx.Err() != nil {
			return ctx.Err()
		}
		if text := fmt.Sprint(err); text != told {
			log.Warn("the agent does not tell of its peers; asked again", zap.String("agent", conn.Target()), zap.Error(err))
			told = text
		}
		select {
		case <-time.After(retryEvery):
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}

// settles is how long after the begin of a stream of notices a node that it has not
// told of is forgotten: it went while nobody listened. An agent that has just
// started needs a while until it knows them all.
const settles = time.Minute

// notices takes in one stream of notices, which begins with all peers.
func (p *peers) notices(ctx context.Context, c peerpb.PeerClient, log *zap.Logger) error {
	stream, err := c.Notify(ctx, &peerpb.NotifyRequest{})
	if err != nil {
		return err
	}
	number := p.begin()
	defer time.AfterFunc(settles, func() { p.forget(number) }).Stop()
	for {
		n, err := stream.Recv()
		if err != nil {
			return err
		}
		if !p.notice(n) {
			log.Warn("the agent tells of more nodes than a relay asks", zap.Int("most", maxPeers), zap.Int("longest name or address", maxName))
		}
	}
}

func (p *peers) begin() (number uint64) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.stream++
	return p.stream
}

// forget forgets the nodes that the stream of that number has not told of, if it
// is the one that is heard.
func (p *peers) forget(number uint64) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.stream == number {
		maps.DeleteFunc(p.list, func(_ string, k known) bool { return k.stream < number })
	}
}

// notice takes in one; false: it is the first that there is no room for.
func (p *peers) notice(n *peerpb.ChangeNotification) bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	if n.GetType() == peerpb.ChangeNotificationType_PEER_DELETED {
		delete(p.list, n.GetName())
		return true
	}
	_, there := p.list[n.GetName()]
	if !there && len(p.list) >= maxPeers || len(n.GetName()) > maxName || len(n.GetAddress()) > maxName {
		first := !p.refused
		p.refused = true
		return !first
	}
	p.list[n.GetName()] = known{hubble.Peer{Name: n.GetName(), Address: n.GetAddress()}, p.stream}
	return true
}
