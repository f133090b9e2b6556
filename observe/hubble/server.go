package hubble

import (
	"context"
	"errors"
	"slices"
	"strings"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/health"
	healthpb "google.golang.org/grpc/health/grpc_health_v1"
	"google.golang.org/grpc/reflection"
	"google.golang.org/grpc/status"

	observerpb "github.com/cilium/cilium/api/v1/observer"
	peerpb "github.com/cilium/cilium/api/v1/peer"
	relaypb "github.com/cilium/cilium/api/v1/relay"
	"portcullis/observe/flow"
)

// HealthName is the name under which Hubble's clients ask for a server's health.
const HealthName = "hubble.server.Observer"

// Options are what a server tells of. All are required, but where it says so.
type Options struct {
	Place   Place
	Ring    *flow.Ring
	Events  *Events   // of the agent
	Started time.Time // uptime counts from here
	// Peers returns the nodes that serve this API, this one included; it is
	// called concurrently. nil: this one only.
	Peers func() []Peer
	// Address is where other nodes reach this server; "": they do not.
	Address string
	// Follow is called when somebody begins to follow the flows, and what it returns
	// when that ends. nil: nothing is done.
	Follow func(context.Context) (stop func())

	converted *conversions // nil: each reader converts for itself
}

// Peer is a node that serves the API.
type Peer struct {
	Name    string // as in Place.Name
	Address string // host:port; "": not known
}

// Server serves this node's flows. Safe for concurrent use.
type Server struct {
	observerpb.UnimplementedObserverServer
	peerpb.UnimplementedPeerServer
	o       Options
	streams streams
}

// NewServer returns a server of the node's records.
func NewServer(o Options) *Server {
	if o.Peers == nil {
		o.Peers = func() []Peer { return []Peer{{o.Place.Name(), o.Address}} }
	}
	o.converted = &conversions{}
	return &Server{o: o}
}

// Register adds the services to a gRPC server: observer, peer, health under
// HealthName and "", and reflection.
func (s *Server) Register(g *grpc.Server) {
	observerpb.RegisterObserverServer(g, s)
	peerpb.RegisterPeerServer(g, s)
	registerCommon(g)
}

func registerCommon(g *grpc.Server) {
	h := health.NewServer()
	h.SetServingStatus(HealthName, healthpb.HealthCheckResponse_SERVING)
	healthpb.RegisterHealthServer(g, h)
	reflection.Register(g)
}

// GetFlows implements observer.ObserverServer.
func (s *Server) GetFlows(req *observerpb.GetFlowsRequest, stream grpc.ServerStreamingServer[observerpb.GetFlowsResponse]) error {
	leave, err := s.streams.enter(stream.Context())
	if err != nil {
		return err
	}
	defer leave()
	q, err := newQuery(req)
	if err != nil {
		return status.Error(codes.InvalidArgument, err.Error())
	}
	if q.follow && s.o.Follow != nil {
		defer s.o.Follow(stream.Context())()
	}
	r := reader{o: &s.o, q: q, send: stream.Send, buf: make([]flow.Record, batch)}
	err = r.run(stream.Context())
	if errors.Is(err, context.Canceled) || errors.Is(err, context.DeadlineExceeded) {
		return status.FromContextError(err).Err()
	}
	return err
}

// ServerStatus implements observer.ObserverServer. What was lost counts as one
// flow for each time that it was noticed.
func (s *Server) ServerStatus(context.Context, *observerpb.ServerStatusRequest) (*observerpb.ServerStatusResponse, error) {
	oldest, next := s.o.Ring.Bounds()
	return &observerpb.ServerStatusResponse{NumFlows: next - oldest, MaxFlows: uint64(s.o.Ring.Size()), SeenFlows: next,
		UptimeNs: uint64(time.Since(s.o.Started)), Version: s.version(), FlowsRate: s.rate(time.Now())}, nil
}

func (s *Server) version() string { return "portcullis " + s.o.Place.Version }

// rate returns how many flows came per second in the last minute.
func (s *Server) rate(now time.Time) float64 {
	from, n := now.Add(-time.Minute), 0
	first := now
	s.backwards(func(r *flow.Record, _ uint64) bool {
		if r.Time.Before(from) {
			first = from
			return false
		}
		first, n = r.Time, n+1
		return true
	})
	if d := now.Sub(first).Seconds(); n > 0 && d > 0 {
		return float64(n) / max(d, 1)
	}
	return 0
}

// backwards calls f for each record that is kept, the last first, until it
// returns false.
func (s *Server) backwards(f func(r *flow.Record, number uint64) bool) { backwards(s.o.Ring, f) }

func backwards(ring *flow.Ring, f func(r *flow.Record, number uint64) bool) {
	buf := make([]flow.Record, batch)
	oldest, end := ring.Bounds()
	for end > oldest {
		from := max(oldest, end-min(end, batch))
		n, after, lost := ring.Read(from, buf[:end-from])
		for i := n - 1; i >= 0; i-- {
			if !f(&buf[i], after-uint64(n-i)) {
				return
			}
		}
		if lost > 0 { // the rest was overwritten meanwhile
			return
		}
		end = from
	}
}

// GetNodes implements observer.ObserverServer: it tells of this node only; a
// relay knows all.
func (s *Server) GetNodes(context.Context, *observerpb.GetNodesRequest) (*observerpb.GetNodesResponse, error) {
	oldest, next := s.o.Ring.Bounds()
	return &observerpb.GetNodesResponse{Nodes: []*observerpb.Node{{Name: s.o.Place.Name(), Version: s.version(), Address: s.o.Address,
		State: relaypb.NodeState_NODE_CONNECTED, UptimeNs: uint64(time.Since(s.o.Started)),
		NumFlows: next - oldest, MaxFlows: uint64(s.o.Ring.Size()), SeenFlows: next}}}, nil
}

// GetNamespaces implements observer.ObserverServer: the namespaces of the flows
// that are kept and are not older than an hour.
func (s *Server) GetNamespaces(context.Context, *observerpb.GetNamespacesRequest) (*observerpb.GetNamespacesResponse, error) {
	from, seen := time.Now().Add(-time.Hour), map[string]bool{}
	s.backwards(func(r *flow.Record, _ uint64) bool {
		if r.Time.Before(from) {
			return false
		}
		for _, e := range []*flow.End{&r.Source, &r.Dest} {
			if ns := e.Namespace(); ns != "" {
				seen[ns] = true
			}
		}
		return true
	})
	out := &observerpb.GetNamespacesResponse{}
	for ns := range seen {
		out.Namespaces = append(out.Namespaces, &observerpb.Namespace{Cluster: s.o.Place.Cluster, Namespace: ns})
	}
	sortNamespaces(out.Namespaces)
	return out, nil
}

// GetDebugEvents implements observer.ObserverServer: there are none.
func (s *Server) GetDebugEvents(*observerpb.GetDebugEventsRequest, grpc.ServerStreamingServer[observerpb.GetDebugEventsResponse]) error {
	return status.Error(codes.Unimplemented, "Portcullis has no debug events: `portcullis monitor` shows every event of the datapath")
}

// peersEvery is how often a watcher of peers looks for changes.
const peersEvery = 5 * time.Second

// Notify implements peer.PeerServer: all nodes, then what changes.
func (s *Server) Notify(_ *peerpb.NotifyRequest, stream grpc.ServerStreamingServer[peerpb.ChangeNotification]) error {
	leave, err := s.streams.enter(stream.Context())
	if err != nil {
		return err
	}
	defer leave()
	known := map[string]Peer{}
	look := time.NewTicker(peersEvery)
	defer look.Stop()
	for {
		for _, c := range peerChanges(known, s.o.Peers()) {
			if err := stream.Send(c); err != nil {
				return err
			}
		}
		select {
		case <-stream.Context().Done():
			return status.FromContextError(stream.Context().Err()).Err()
		case <-look.C:
		}
	}
}

// peerChanges brings known up to now, and returns what differs.
func peerChanges(known map[string]Peer, now []Peer) (out []*peerpb.ChangeNotification) {
	present := map[string]bool{}
	for _, p := range now {
		kind := peerpb.ChangeNotificationType_PEER_ADDED
		if before, ok := known[p.Name]; ok {
			kind = peerpb.ChangeNotificationType_PEER_UPDATED
			if before == p {
				kind = peerpb.ChangeNotificationType_UNKNOWN
			}
		}
		known[p.Name], present[p.Name] = p, true
		if kind != peerpb.ChangeNotificationType_UNKNOWN {
			out = append(out, peerNotice(p, kind))
		}
	}
	for name, p := range known {
		if !present[name] {
			delete(known, name)
			out = append(out, peerNotice(p, peerpb.ChangeNotificationType_PEER_DELETED))
		}
	}
	return out
}

func peerNotice(p Peer, kind peerpb.ChangeNotificationType) *peerpb.ChangeNotification {
	c := &peerpb.ChangeNotification{Name: p.Name, Address: p.Address, Type: kind}
	if p.Address != "" {
		c.Tls = &peerpb.TLS{ServerName: p.Name}
	}
	return c
}

func sortNamespaces(all []*observerpb.Namespace) {
	slices.SortFunc(all, func(a, b *observerpb.Namespace) int {
		return strings.Compare(a.GetCluster()+"/"+a.GetNamespace(), b.GetCluster()+"/"+b.GetNamespace())
	})
}
