package hubble

import (
	"context"
	"errors"
	"slices"
	"strings"
	"sync"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/wrapperspb"

	observerpb "github.com/cilium/cilium/api/v1/observer"
	relaypb "github.com/cilium/cilium/api/v1/relay"
)

// RelayOptions are what a relay needs. All are required.
type RelayOptions struct {
	Place Place // of the relay: its name is in what it says itself
	// Nodes returns the nodes to ask; it is called concurrently, for each request.
	Nodes func() []Peer
	// Dial returns a connection to a node, which the relay closes when the node
	// is gone. It must authenticate the node as the one that Peer names.
	Dial     func(Peer) (*grpc.ClientConn, error)
	Patience time.Duration // that a node's next answer is waited for
}

// Relay is one observer for all nodes. What nodes say is merged in the order of
// time; a node that does not answer in time is reported, and not waited for any
// more: what it says later comes later. Safe for concurrent use.
type Relay struct {
	observerpb.UnimplementedObserverServer
	o       RelayOptions
	streams streams
	room    room

	mu    sync.Mutex
	conns map[Peer]*grpc.ClientConn // guarded by mu
}

// NewRelay returns a relay. Close it when no request is under way any more.
func NewRelay(o RelayOptions) *Relay {
	return &Relay{o: o, conns: map[Peer]*grpc.ClientConn{}, room: room{most: mostKept}}
}

// Register adds the services to a gRPC server: observer, health, reflection.
func (r *Relay) Register(g *grpc.Server) {
	observerpb.RegisterObserverServer(g, r)
	registerCommon(g)
}

// Close closes the connections to all nodes.
func (r *Relay) Close() error {
	r.mu.Lock()
	defer r.mu.Unlock()
	var errs []error
	for p, c := range r.conns {
		errs = append(errs, c.Close())
		delete(r.conns, p)
	}
	return errors.Join(errs...)
}

// node is one node of a request.
type node struct {
	peer   Peer
	client observerpb.ObserverClient
	err    error // why there is none
}

// nodes returns all nodes, with a connection to each; connections to nodes that
// are gone are closed.
func (r *Relay) nodes() []node {
	peers := r.o.Nodes()
	r.mu.Lock()
	defer r.mu.Unlock()
	for p, c := range r.conns {
		if !slices.Contains(peers, p) {
			c.Close() //nolint:errcheck // nobody uses it but requests, which see the node go
			delete(r.conns, p)
		}
	}
	var out []node
	for _, p := range peers {
		c, err := r.conns[p], error(nil)
		if c == nil {
			switch {
			case p.Address == "":
				err = errors.New("its address is not known")
			default:
				c, err = r.o.Dial(p)
			}
			if err != nil {
				out = append(out, node{peer: p, err: err})
				continue
			}
			r.conns[p] = c
		}
		out = append(out, node{peer: p, client: observerpb.NewObserverClient(c)})
	}
	return out
}

// MaxAnswer bounds one answer of a node, bytes: a relay holds one of each node for
// each of its streams.
const MaxAnswer = 1 << 20

// mostLast is how many flows of a request for the last ones are put in order at a
// time. Of more, each node's last ones are sent.
const mostLast = 16384

// GetFlows implements observer.ObserverServer.
func (r *Relay) GetFlows(req *observerpb.GetFlowsRequest, stream grpc.ServerStreamingServer[observerpb.GetFlowsResponse]) error {
	leave, err := r.streams.enter(stream.Context())
	if err != nil {
		return err
	}
	defer leave()
	if _, err := newQuery(req); err != nil {
		return status.Error(codes.InvalidArgument, err.Error()) // each node would say so
	}
	ctx, cancel := context.WithCancel(stream.Context())
	var workers sync.WaitGroup
	defer workers.Wait()
	defer cancel()
	m := &merger{patience: r.o.Patience, follow: req.GetFollow(), until: untilOf(req.GetUntil()), in: make(chan said), send: r.sender(req, stream), place: r.o.Place}
	defer m.send.end()
	for _, n := range r.nodes() {
		s := &source{name: n.peer.Name, began: time.Now(), next: make(chan struct{}, 1)}
		m.sources = append(m.sources, s)
		if n.err != nil {
			s.over = true
			m.report(s, relaypb.NodeState_NODE_UNAVAILABLE, n.err.Error())
			continue
		}
		workers.Go(func() { m.listen(ctx, s, n.client, req) })
	}
	if err := m.run(ctx); err != nil {
		if ctx.Err() != nil {
			return status.FromContextError(ctx.Err()).Err()
		}
		return err
	}
	return nil
}

// sender returns what sends to the caller: of a request for the first or the last
// flows so many of all nodes', though each node sends as many.
func (r *Relay) sender(req *observerpb.GetFlowsRequest, stream grpc.ServerStreamingServer[observerpb.GetFlowsResponse]) sender {
	most := req.GetNumber()
	switch {
	case req.GetFirst() && most > 0:
		return &firstSender{send: stream.Send, left: most}
	case most > 0 && most <= mostLast && !req.GetFollow():
		return &lastSender{send: stream.Send, most: int(most), room: &r.room}
	}
	return &plainSender{stream.Send}
}

// ServerStatus implements observer.ObserverServer: the sum of what nodes say in
// time.
func (r *Relay) ServerStatus(ctx context.Context, req *observerpb.ServerStatusRequest) (*observerpb.ServerStatusResponse, error) {
	out := &observerpb.ServerStatusResponse{Version: "portcullis relay " + r.o.Place.Version}
	var connected uint32
	for _, a := range askAll(ctx, r, func(ctx context.Context, c observerpb.ObserverClient) (*observerpb.ServerStatusResponse, error) {
		return c.ServerStatus(ctx, req)
	}) {
		if a.err != nil {
			out.UnavailableNodes = append(out.UnavailableNodes, a.peer.Name)
			continue
		}
		connected++
		out.NumFlows += a.answer.GetNumFlows()
		out.MaxFlows += a.answer.GetMaxFlows()
		out.SeenFlows += a.answer.GetSeenFlows()
		out.FlowsRate += a.answer.GetFlowsRate()
		out.UptimeNs = max(out.UptimeNs, a.answer.GetUptimeNs())
	}
	out.NumConnectedNodes, out.NumUnavailableNodes = wrapperspb.UInt32(connected), wrapperspb.UInt32(uint32(len(out.UnavailableNodes)))
	return out, nil
}

// GetNodes implements observer.ObserverServer.
func (r *Relay) GetNodes(ctx context.Context, req *observerpb.GetNodesRequest) (*observerpb.GetNodesResponse, error) {
	out := &observerpb.GetNodesResponse{}
	for _, a := range askAll(ctx, r, func(ctx context.Context, c observerpb.ObserverClient) (*observerpb.GetNodesResponse, error) {
		return c.GetNodes(ctx, req)
	}) {
		n := &observerpb.Node{Name: a.peer.Name, State: relaypb.NodeState_NODE_UNAVAILABLE}
		if a.err == nil && len(a.answer.GetNodes()) == 1 {
			n = a.answer.GetNodes()[0]
			n.Name = a.peer.Name // as it was authenticated
		}
		n.Address, n.Tls = a.peer.Address, &observerpb.TLS{Enabled: true, ServerName: a.peer.Name}
		out.Nodes = append(out.Nodes, n)
	}
	return out, nil
}

// GetNamespaces implements observer.ObserverServer.
func (r *Relay) GetNamespaces(ctx context.Context, req *observerpb.GetNamespacesRequest) (*observerpb.GetNamespacesResponse, error) {
	out, seen := &observerpb.GetNamespacesResponse{}, map[string]bool{}
	for _, a := range askAll(ctx, r, func(ctx context.Context, c observerpb.ObserverClient) (*observerpb.GetNamespacesResponse, error) {
		return c.GetNamespaces(ctx, req)
	}) {
		for _, ns := range a.answer.GetNamespaces() {
			if name := ns.GetCluster() + "/" + ns.GetNamespace(); !seen[name] {
				seen[name] = true
				out.Namespaces = append(out.Namespaces, ns)
			}
		}
	}
	sortNamespaces(out.Namespaces)
	return out, nil
}

type answer[T any] struct {
	peer   Peer
	answer T
	err    error
}

// askAll asks every node, and waits for each no longer than the relay's
// patience. The answers are in the order of names.
func askAll[T any](ctx context.Context, r *Relay, ask func(context.Context, observerpb.ObserverClient) (T, error)) []answer[T] {
	ctx, cancel := context.WithTimeout(ctx, r.o.Patience)
	defer cancel()
	nodes := r.nodes()
	out := make([]answer[T], len(nodes))
	var workers sync.WaitGroup
	for i, n := range nodes {
		out[i] = answer[T]{peer: n.peer, err: n.err}
		if n.err == nil {
			workers.Go(func() { out[i].answer, out[i].err = ask(ctx, n.client) })
		}
	}
	workers.Wait()
	slices.SortFunc(out, func(a, b answer[T]) int { return strings.Compare(a.peer.Name, b.peer.Name) })
	return out
}
