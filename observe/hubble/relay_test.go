package hubble

import (
	"context"
	"errors"
	"io"
	"net"
	"slices"
	"testing"
	"testing/synctest"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/status"
	"google.golang.org/grpc/test/bufconn"
	"google.golang.org/protobuf/proto"

	flowpb "github.com/cilium/cilium/api/v1/flow"
	observerpb "github.com/cilium/cilium/api/v1/observer"
	relaypb "github.com/cilium/cilium/api/v1/relay"
	"portcullis/observe/flow"
)

// relayed is a relay over nodes that run here, and over one that never answers.
type relayed struct {
	*world
	relay *Relay
	rings []*flow.Ring
	nodes []*grpc.Server
}

// newRelayed makes count nodes, of which node i has the records i, i+count, ...
// up to most; with silent, one more whose connection nobody takes.
func newRelayed(t *testing.T, count, most int, silent bool) *relayed {
	w := &relayed{}
	dials := map[string]*bufconn.Listener{}
	var peers []Peer
	for i := range count {
		name := string(rune('a' + i))
		ring := flow.NewRing(1000)
		for n := i; n < most; n += count {
			ring.Put(record(n))
		}
		ln, g := bufconn.Listen(1<<20), grpc.NewServer()
		NewServer(Options{Place: Place{Node: name}, Ring: ring, Started: time.Now()}).Register(g)
		done := make(chan error)
		go func() { done <- g.Serve(ln) }()
		t.Cleanup(func() { g.Stop(); <-done })
		dials[name], w.rings, w.nodes, peers = ln, append(w.rings, ring), append(w.nodes, g), append(peers, Peer{name, name})
	}
	patience := time.Minute
	if silent {
		patience = silence
		dials["silent"] = bufconn.Listen(1)
		peers = append(peers, Peer{"silent", "silent"})
	}
	r := NewRelay(RelayOptions{Place: Place{Node: "relay"}, Nodes: func() []Peer { return peers }, Patience: patience, Dial: func(p Peer) (*grpc.ClientConn, error) {
		return grpc.NewClient("passthrough:///"+p.Address, grpc.WithTransportCredentials(insecure.NewCredentials()),
			grpc.WithContextDialer(func(ctx context.Context, addr string) (net.Conn, error) { return dials[addr].DialContext(ctx) }))
	}})
	conn := serve(t, r.Register)
	t.Cleanup(func() {
		if err := r.Close(); err != nil {
			t.Error(err)
		}
	})
	w.relay = r
	w.world = &world{t: t, conn: conn, ObserverClient: observerpb.NewObserverClient(conn)}
	return w
}

// What the nodes say comes in the order of time, and so many as were asked for.
func TestRelayMerges(t *testing.T) {
	w := newRelayed(t, 3, 200, false)
	for name, tt := range map[string]struct {
		req  *observerpb.GetFlowsRequest
		want []int
	}{
		"all":   {&observerpb.GetFlowsRequest{}, upTo(0, 199, 1)},
		"last":  {&observerpb.GetFlowsRequest{Number: 20}, upTo(180, 199, 1)},
		"first": {&observerpb.GetFlowsRequest{Number: 7, First: true}, upTo(0, 6, 1)},
		"some":  {&observerpb.GetFlowsRequest{Number: 5, Whitelist: []*flowpb.FlowFilter{{Verdict: []flowpb.Verdict{flowpb.Verdict_DROPPED}}}}, upTo(186, 198, 3)},
		"node":  {&observerpb.GetFlowsRequest{Number: 3, Whitelist: []*flowpb.FlowFilter{{NodeName: []string{"b"}}}}, []int{193, 196, 199}},
	} {
		got, err := w.flows(tt.req, 1000)
		if err != nil || !slices.Equal(numbers(got), tt.want) {
			t.Errorf("%s: %v, %v; want %v", name, numbers(got), err, tt.want)
		}
	}
}

// A node that does not answer is reported, and not waited for. The clock is the
// bubble's: it goes on only when nobody has anything to do, so the others have
// said all before the silent one's time is over, however busy the machine is.
func TestRelayDoesNotWaitForASilentNode(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		time.Sleep(time.Until(start.Add(2 * time.Hour))) // the records are of the past
		w := newRelayed(t, 2, 50, true)
		began := time.Now()
		tryWithASilentNode(t, w)
		if waited := time.Since(began); waited != 4*silence {
			t.Errorf("four requests waited for %v, want %v each", waited, silence)
		}
	})
}

// silence is how long a relay waits for a node that never answers.
const silence = 5 * time.Second

func tryWithASilentNode(t *testing.T, w *relayed) {
	got, err := w.flows(&observerpb.GetFlowsRequest{}, 1000)
	if err != nil || !slices.Equal(numbers(got), upTo(0, 49, 1)) {
		t.Errorf("%v, %v", numbers(got), err)
	}
	if i := slices.IndexFunc(got, func(r *observerpb.GetFlowsResponse) bool {
		s := r.GetNodeStatus()
		return s.GetStateChange() == relaypb.NodeState_NODE_UNAVAILABLE && slices.Equal(s.GetNodeNames(), []string{"silent"})
	}); i < 0 {
		t.Errorf("nobody is told of the silent node: %v", got)
	}
	st, err := w.ServerStatus(t.Context(), &observerpb.ServerStatusRequest{})
	if err != nil || st.SeenFlows != 50 || st.MaxFlows != 2000 || st.NumConnectedNodes.GetValue() != 2 || st.NumUnavailableNodes.GetValue() != 1 || !slices.Equal(st.UnavailableNodes, []string{"silent"}) {
		t.Errorf("status %v, %v", st, err)
	}
	nodes, err := w.GetNodes(t.Context(), &observerpb.GetNodesRequest{})
	if err != nil || len(nodes.GetNodes()) != 3 || nodes.Nodes[0].State != relaypb.NodeState_NODE_CONNECTED || nodes.Nodes[2].State != relaypb.NodeState_NODE_UNAVAILABLE {
		t.Errorf("nodes %v, %v", nodes, err)
	}
	ns, err := w.GetNamespaces(t.Context(), &observerpb.GetNamespacesRequest{})
	if err != nil || len(ns.Namespaces) != 0 {
		t.Errorf("namespaces %v, %v", ns, err)
	}
}

// Who follows gets what comes from any node, while others say nothing, and is
// told of a node that goes.
func TestRelayFollows(t *testing.T) {
	w := newRelayed(t, 2, 0, false)
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	stream, err := w.GetFlows(ctx, &observerpb.GetFlowsRequest{Follow: true, Number: 1000})
	if err != nil {
		t.Fatal(err)
	}
	for i := range 20 {
		w.rings[i%2].Put(record(i))
		resp, err := stream.Recv()
		if err != nil || resp.GetFlow().GetL4().GetTCP().GetDestinationPort() != uint32(i) {
			t.Fatalf("record %d: %v, %v", i, resp, err)
		}
	}
	w.nodes[1].Stop()
	resp, err := stream.Recv()
	if s := resp.GetNodeStatus(); err != nil || s.GetStateChange() != relaypb.NodeState_NODE_UNAVAILABLE || !slices.Equal(s.GetNodeNames(), []string{"b"}) {
		t.Fatalf("after node b went: %v, %v", resp, err)
	}
	w.rings[0].Put(record(20))
	if resp, err = stream.Recv(); err != nil || resp.GetFlow().GetL4().GetTCP().GetDestinationPort() != 20 {
		t.Fatalf("of node a: %v, %v", resp, err)
	}
	cancel()
	if _, err := stream.Recv(); err == nil || errors.Is(err, io.EOF) {
		t.Errorf("after the caller went: %v", err)
	}
}

// What requests for the last flows keep is bounded, all of them together, and given
// back when they end.
func TestRelayKeepsNoMoreThanItHasRoomFor(t *testing.T) {
	w := newRelayed(t, 2, 400, false)
	last := &observerpb.GetFlowsRequest{Number: 200}
	got, err := w.flows(last, 1000)
	if err != nil || !slices.Equal(numbers(got), upTo(200, 399, 1)) {
		t.Errorf("%v, %v", numbers(got), err)
	}
	w.relay.room.most = int64(100 * proto.Size(got[0]))
	if _, err := w.flows(last, 1000); status.Code(err) != codes.ResourceExhausted {
		t.Errorf("more than there is room for: %v", err)
	}
	got, err = w.flows(&observerpb.GetFlowsRequest{Number: 20}, 1000)
	if err != nil || !slices.Equal(numbers(got), upTo(380, 399, 1)) {
		t.Errorf("fewer: %v, %v", numbers(got), err)
	}
	for deadline := time.Now().Add(time.Minute); w.relay.room.used.Load() != 0; time.Sleep(time.Millisecond) { // who asked may hear of the end first
		if time.Now().After(deadline) {
			t.Fatalf("%d bytes are kept when all have ended", w.relay.room.used.Load())
		}
	}
}
