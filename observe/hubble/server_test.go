package hubble

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"slices"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	healthpb "google.golang.org/grpc/health/grpc_health_v1"
	"google.golang.org/grpc/status"
	"google.golang.org/grpc/test/bufconn"
	"google.golang.org/protobuf/encoding/protojson"
	"google.golang.org/protobuf/types/known/fieldmaskpb"
	"google.golang.org/protobuf/types/known/timestamppb"

	flowpb "github.com/cilium/cilium/api/v1/flow"
	observerpb "github.com/cilium/cilium/api/v1/observer"
	peerpb "github.com/cilium/cilium/api/v1/peer"
	"portcullis/bpf/abi"
	"portcullis/identity"
	"portcullis/observe/flow"
)

// start is the time of the first record; each is a second after the last.
var start = time.Date(2020, 11, 22, 22, 0, 0, 0, time.UTC)

// record makes the i-th record: every third is dropped by policy, at port i.
func record(i int) *flow.Record {
	r := &flow.Record{Time: start.Add(time.Duration(i) * time.Second), BootTime: uint64(i), Node: "n1", Verdict: abi.VerdictPass, State: abi.FlowNew, Direction: abi.DirIngress,
		Protocol: 6, TCPFlags: 2, Endpoint: 24, Ifindex: 3, Interface: "veth3", Evidence: identity.EvidenceLease, Generation: 42, Stamp: 7, BindingAge: 3 * time.Second, LeaseLeft: 25 * time.Second,
		Source: flow.End{IP: netip.MustParseAddr("10.0.0.1"), Port: 40000, Identity: 300, Labels: []string{"k8s:io.kubernetes.pod.namespace=default", "k8s:org=alliance"}, SPIFFE: "spiffe://lab.test/ns/default/sa/xwing"},
		Dest:   flow.End{IP: netip.MustParseAddr("10.0.1.1"), Port: uint16(i), Identity: 301, Labels: []string{"k8s:org=empire"}, Workload: "empire/deathstar", Endpoint: 24},
		Rule:   9, Policy: "CiliumNetworkPolicy/empire/rule1"}
	if i%3 == 0 {
		r.Verdict, r.Reason = abi.VerdictDrop, abi.ReasonPolicyDenied
	}
	return r
}

// world is a server with a ring, and a client of it.
type world struct {
	t      *testing.T
	ring   *flow.Ring
	events *Events
	observerpb.ObserverClient
	conn *grpc.ClientConn
}

func newWorld(t *testing.T, size, records int) *world {
	w := &world{t: t, ring: flow.NewRing(size), events: NewEvents()}
	for i := range records {
		w.ring.Put(record(i))
	}
	s := NewServer(Options{Place: Place{Node: "n1", Version: "v1"}, Ring: w.ring, Events: w.events, Started: time.Now(), Address: "192.0.2.1:4244"})
	w.conn = serve(t, s.Register)
	w.ObserverClient = observerpb.NewObserverClient(w.conn)
	return w
}

// serve runs services until the test ends, and returns a connection to them.
func serve(t *testing.T, register func(*grpc.Server)) *grpc.ClientConn {
	t.Helper()
	ln, g := bufconn.Listen(1<<20), grpc.NewServer()
	register(g)
	done := make(chan error)
	go func() { done <- g.Serve(ln) }()
	conn, err := grpc.NewClient("passthrough:///x", grpc.WithTransportCredentials(insecure.NewCredentials()),
		grpc.WithContextDialer(func(ctx context.Context, _ string) (net.Conn, error) { return ln.DialContext(ctx) }))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		conn.Close()
		g.Stop()
		<-done
	})
	return conn
}

// flows returns what a request is answered, up to most answers.
func (w *world) flows(req *observerpb.GetFlowsRequest, most int) (out []*observerpb.GetFlowsResponse, err error) {
	ctx, cancel := context.WithTimeout(w.t.Context(), time.Minute)
	defer cancel()
	stream, err := w.GetFlows(ctx, req)
	if err != nil {
		w.t.Fatal(err)
	}
	for len(out) < most {
		resp, err := stream.Recv()
		if errors.Is(err, io.EOF) {
			return out, nil
		}
		if err != nil {
			return out, err
		}
		out = append(out, resp)
	}
	return out, nil
}

// ports returns the destination ports of flows: the numbers of their records.
func numbers(responses []*observerpb.GetFlowsResponse) (out []int) {
	for _, r := range responses {
		if r.GetFlow() != nil {
			out = append(out, int(r.GetFlow().GetL4().GetTCP().GetDestinationPort()))
		}
	}
	return out
}

func upTo(from, to, step int) (out []int) {
	for i := from; i <= to; i += step {
		out = append(out, i)
	}
	return out
}

func at(i int) *timestamppb.Timestamp {
	return timestamppb.New(start.Add(time.Duration(i) * time.Second))
}

func TestGetFlows(t *testing.T) {
	w := newWorld(t, 300, 200)
	dropped := []*flowpb.FlowFilter{{Verdict: []flowpb.Verdict{flowpb.Verdict_DROPPED}}}
	for name, tt := range map[string]struct {
		req  *observerpb.GetFlowsRequest
		want []int
	}{
		"all":             {&observerpb.GetFlowsRequest{}, upTo(0, 199, 1)},
		"all by number":   {&observerpb.GetFlowsRequest{Number: 1<<64 - 1}, upTo(0, 199, 1)},
		"last":            {&observerpb.GetFlowsRequest{Number: 20}, upTo(180, 199, 1)},
		"last of some":    {&observerpb.GetFlowsRequest{Number: 40, Whitelist: dropped}, upTo(81, 198, 3)},
		"last, few match": {&observerpb.GetFlowsRequest{Number: 100, Whitelist: dropped}, upTo(0, 198, 3)},
		"first":           {&observerpb.GetFlowsRequest{Number: 5, First: true}, upTo(0, 4, 1)},
		"first of some":   {&observerpb.GetFlowsRequest{Number: 5, First: true, Blacklist: dropped[:1], Whitelist: []*flowpb.FlowFilter{{DestinationPort: []string{"3", "4", "5", "7"}}}}, []int{4, 5, 7}},
		"since":           {&observerpb.GetFlowsRequest{Since: at(190)}, upTo(190, 199, 1)},
		"until":           {&observerpb.GetFlowsRequest{Until: at(9)}, upTo(0, 9, 1)},
		"since, until":    {&observerpb.GetFlowsRequest{Since: at(90), Until: at(100), Blacklist: []*flowpb.FlowFilter{{DestinationPort: []string{"95"}}}}, append(upTo(90, 94, 1), upTo(96, 100, 1)...)},
		"last since":      {&observerpb.GetFlowsRequest{Since: at(90), Until: at(100), Number: 3}, upTo(98, 100, 1)},
	} {
		t.Run(name, func(t *testing.T) {
			got, err := w.flows(tt.req, 1000)
			if err != nil || !slices.Equal(numbers(got), tt.want) {
				t.Errorf("%v, %v; want %v", numbers(got), err, tt.want)
			}
		})
	}
}

// A policy's drop is a drop, and to who asks for policy verdicts a denial: once.
func TestOneRecordIsOneFlow(t *testing.T) {
	w := newWorld(t, 10, 2) // record 0 is dropped, record 1 passes
	for name, tt := range map[string]struct {
		types []int32
		want  []int32 // event types of the two records
	}{
		"any":            {nil, []int32{eventDrop, eventTrace}},
		"drop":           {[]int32{eventDrop}, []int32{eventDrop}},
		"policy-verdict": {[]int32{eventPolicy}, []int32{eventPolicy, eventPolicy}},
		"both":           {[]int32{eventPolicy, eventTrace}, []int32{eventPolicy, eventTrace}},
	} {
		ff := &flowpb.FlowFilter{}
		for _, n := range tt.types {
			ff.EventType = append(ff.EventType, &flowpb.EventTypeFilter{Type: n})
		}
		got, err := w.flows(&observerpb.GetFlowsRequest{Whitelist: []*flowpb.FlowFilter{ff}}, 10)
		var types []int32
		for _, r := range got {
			types = append(types, r.GetFlow().GetEventType().GetType())
		}
		if err != nil || !slices.Equal(types, tt.want) {
			t.Errorf("%s: %v, %v; want %v", name, types, err, tt.want)
		}
	}
}

func TestFollow(t *testing.T) {
	w := newWorld(t, 100, 10)
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	stream, err := w.GetFlows(ctx, &observerpb.GetFlowsRequest{Follow: true, Number: 2})
	if err != nil {
		t.Fatal(err)
	}
	for i := 8; i < 40; i++ {
		if i >= 10 {
			w.ring.Put(record(i))
		}
		resp, err := stream.Recv()
		if err != nil || resp.GetFlow().GetL4().GetTCP().GetDestinationPort() != uint32(i) {
			t.Fatalf("record %d: %v, %v", i, resp, err)
		}
	}
	cancel()
	if _, err := stream.Recv(); status.Code(err) != codes.Canceled {
		t.Errorf("after the caller went: %v", err)
	}
}

// What a reader missed, and what the kernel lost, is told of as lost (I6).
func TestLost(t *testing.T) {
	w := newWorld(t, 10, 0)
	w.ring.Put(record(1))
	w.ring.Put(&flow.Record{Time: start, Lost: &flow.Lost{Count: 7, Where: flow.LostKernel}})
	got, err := w.flows(&observerpb.GetFlowsRequest{Whitelist: []*flowpb.FlowFilter{{DestinationPort: []string{"1"}}}}, 10)
	if err != nil || len(got) != 2 || got[1].GetLostEvents().GetNumEventsLost() != 7 || got[1].GetLostEvents().GetSource() != flowpb.LostEventSource_PERF_EVENT_RING_BUFFER {
		t.Errorf("%v, %v", got, err)
	}
	o := Options{Ring: w.ring}
	var sent []*observerpb.GetFlowsResponse
	r := reader{o: &o, q: query{filter: &Filter{}}, buf: make([]flow.Record, batch)}
	r.send = func(resp *observerpb.GetFlowsResponse) error {
		if sent = append(sent, resp); len(sent) == 1 { // the reader lags: 30 records come while it sends one
			for i := range 30 {
				w.ring.Put(record(i))
			}
		}
		return nil
	}
	r.q.follow, r.q.number = true, 100
	ctx, cancel := context.WithCancel(t.Context())
	inner := r.send
	r.send = func(resp *observerpb.GetFlowsResponse) error {
		if len(numbers(append(sent, resp))) == 11 {
			cancel()
		}
		return inner(resp)
	}
	if err := r.run(ctx); !errors.Is(err, context.Canceled) {
		t.Fatal(err)
	}
	var lost uint64
	for _, resp := range sent {
		if l := resp.GetLostEvents(); l.GetSource() == flowpb.LostEventSource_HUBBLE_RING_BUFFER {
			lost += l.GetNumEventsLost()
		}
	}
	if lost != 20 {
		t.Errorf("%d told of as lost, of 20: %v", lost, sent)
	}
}

func TestFlowOfARecord(t *testing.T) {
	w := newWorld(t, 10, 1)
	got, err := w.flows(&observerpb.GetFlowsRequest{}, 10)
	if err != nil || len(got) != 1 {
		t.Fatal(got, err)
	}
	f := got[0].GetFlow()
	if got[0].NodeName != "n1" || !got[0].Time.AsTime().Equal(start) || f.GetVerdict() != flowpb.Verdict_DROPPED || f.GetDropReasonDesc() != flowpb.DropReason_POLICY_DENIED ||
		//lint:ignore SA1019 hubble's clients still read it
		f.GetSource().GetNamespace() != "default" || f.GetDestination().GetPodName() != "deathstar" || f.GetDestination().GetNamespace() != "empire" || f.GetSummary() != "TCP Flags: SYN" ||
		len(f.GetIngressDeniedBy()) != 1 || f.GetIngressDeniedBy()[0].GetName() != "rule1" || f.GetIsReply() == nil || f.GetIsReply().GetValue() || f.GetInterface().GetName() != "veth3" ||
		f.GetTrafficDirection() != flowpb.TrafficDirection_INGRESS || !f.GetL4().GetTCP().GetFlags().GetSYN() {
		t.Errorf("%s", protojson.Format(f))
	}
	facts, err := FactsOf(f)
	if err != nil || facts.Evidence != "lease" || facts.Reason != "policy-denied" || facts.Generation != 42 || facts.BindingAge != 3*time.Second || facts.LeaseLeft != 25*time.Second ||
		facts.SourceSPIFFE != "spiffe://lab.test/ns/default/sa/xwing" || facts.Policy != "CiliumNetworkPolicy/empire/rule1" {
		t.Errorf("facts %+v, %v", facts, err)
	}
	if _, err := protojson.Marshal(got[0]); err != nil { // as clients do for -o json
		t.Error(err)
	}
	masked, err := w.flows(&observerpb.GetFlowsRequest{FieldMask: &fieldmaskpb.FieldMask{Paths: []string{"verdict", "source.identity"}}}, 10)
	if err != nil || len(masked) != 1 || masked[0].GetFlow().GetSource().GetIdentity() != 300 || masked[0].GetFlow().GetIP() != nil || masked[0].GetFlow().GetExtensions() != nil {
		t.Errorf("masked: %v, %v", masked, err)
	}
}

// Who made the pods, which service was called, by which names and with which packet
// of ICMP: in the fields that Hubble has for it, where filters find it.
func TestFlowOfAService(t *testing.T) {
	r := record(1)
	r.Dest.Owner, r.Dest.Service, r.Dest.Names = flow.Owner{Kind: "Deployment", Name: "deathstar"}, "empire/deathstar", []string{"deathstar.example"}
	r.Called = netip.MustParseAddrPort("10.96.0.7:80")
	f := Place{Node: "n1"}.From(r, 0)[0]
	if s := f.GetDestinationService(); s.GetName() != "deathstar" || s.GetNamespace() != "empire" || f.GetSourceService() != nil || len(f.GetSource().GetWorkloads()) != 0 || len(f.GetSourceNames()) != 0 {
		t.Errorf("%s", protojson.Format(f))
	}
	if facts, err := FactsOf(f); err != nil || facts.Called != r.Called {
		t.Errorf("facts %+v, %v", facts, err)
	}
	for name, ff := range map[string]*flowpb.FlowFilter{"service": {DestinationService: []string{"empire/death"}}, "name": {DestinationFqdn: []string{"*.example"}},
		"workload": {DestinationWorkload: []*flowpb.Workload{{Kind: "Deployment", Name: "deathstar"}}}} {
		if c, err := Compile([]*flowpb.FlowFilter{ff}, nil); err != nil || !c.Match(f) || c.Match(Place{}.From(record(1), 0)[0]) {
			t.Errorf("the filter by %s does not choose by it: %v", name, err)
		}
	}
	r.Protocol, r.TCPFlags, r.ICMP = protoICMPv4, 0, &flow.ICMP{Type: 3, Code: 1}
	f = Place{}.From(r, 0)[0]
	//lint:ignore SA1019 hubble's clients still read it
	if m := f.GetL4().GetICMPv4(); m.GetType() != 3 || m.GetCode() != 1 || f.GetSummary() != "ICMPv4 DestinationUnreachable(Host)" {
		t.Errorf("%s", protojson.Format(f))
	}
}

// Every reason of ours is a reason of a drop for Hubble's clients, too.
func TestEveryReasonIsShown(t *testing.T) {
	for r := abi.Reason(1); r < abi.ReasonMax; r++ {
		rec := record(0)
		rec.Reason = r
		f := Place{Node: "n1"}.From(rec, 0)[0]
		if f.GetDropReasonDesc() == flowpb.DropReason_DROP_REASON_UNKNOWN || f.GetVerdict() != flowpb.Verdict_DROPPED {
			t.Errorf("%v is shown as %v %v", r, f.GetVerdict(), f.GetDropReasonDesc())
		}
	}
}

func TestExtraConditions(t *testing.T) {
	w := newWorld(t, 100, 0)
	for i := range 10 {
		r := record(i)
		if i == 4 {
			r.Evidence, r.BindingAge = identity.EvidenceSVID, time.Hour
			r.Process = &flow.Process{PID: 1, Binary: "/usr/bin/wget"}
		}
		w.ring.Put(r)
	}
	for name, x := range map[string]Extra{
		"evidence": {Evidence: []identity.Evidence{identity.EvidenceSVID}}, "older": {OlderThan: time.Minute}, "process": {Processes: []string{"wget"}}, "path": {Processes: []string{"/usr/*/wg*"}},
		"all": {Evidence: []identity.Evidence{identity.EvidenceSVID, identity.EvidenceWatch}, Reasons: []abi.Reason{abi.ReasonNone}, Processes: []string{"curl", "wget"}},
	} {
		ext, err := x.Extension()
		if err != nil {
			t.Fatal(err)
		}
		got, err := w.flows(&observerpb.GetFlowsRequest{Extensions: ext}, 100)
		if err != nil || !slices.Equal(numbers(got), []int{4}) {
			t.Errorf("%s: %v, %v", name, numbers(got), err)
		}
	}
	if ext, err := (Extra{}).Extension(); ext != nil || err != nil {
		t.Errorf("no condition: %v, %v", ext, err)
	}
}

func TestBadRequests(t *testing.T) {
	w := newWorld(t, 10, 1)
	unknown, err := facts(record(0)).extension(), error(nil)
	for name, req := range map[string]*observerpb.GetFlowsRequest{
		"filter": {Whitelist: []*flowpb.FlowFilter{{SourceIp: []string{"x"}}}}, "mask": {FieldMask: &fieldmaskpb.FieldMask{Paths: []string{"sauce"}}},
		"first and follow": {First: true, Follow: true}, "since": {Since: &timestamppb.Timestamp{Nanos: -1}}, "extension": {Extensions: unknown},
	} {
		if _, err = w.flows(req, 10); status.Code(err) != codes.InvalidArgument {
			t.Errorf("%s: %v", name, err)
		}
	}
	stream, err := w.GetDebugEvents(t.Context(), &observerpb.GetDebugEventsRequest{})
	if err == nil {
		_, err = stream.Recv()
	}
	if status.Code(err) != codes.Unimplemented {
		t.Errorf("debug events: %v", err)
	}
}

func TestStatusNodesNamespaces(t *testing.T) {
	w := newWorld(t, 10, 0)
	for i := range 14 {
		r := record(i)
		r.Time = time.Now().Add(-time.Duration(20-i) * time.Second)
		w.ring.Put(r)
	}
	st, err := w.ServerStatus(t.Context(), &observerpb.ServerStatusRequest{})
	if err != nil || st.NumFlows != 10 || st.MaxFlows != 10 || st.SeenFlows != 14 || st.UptimeNs == 0 || st.FlowsRate <= 0 || st.FlowsRate > 10 {
		t.Errorf("status %v, %v", st, err)
	}
	nodes, err := w.GetNodes(t.Context(), &observerpb.GetNodesRequest{})
	if err != nil || len(nodes.Nodes) != 1 || nodes.Nodes[0].Name != "n1" || nodes.Nodes[0].SeenFlows != 14 {
		t.Errorf("nodes %v, %v", nodes, err)
	}
	ns, err := w.GetNamespaces(t.Context(), &observerpb.GetNamespacesRequest{})
	if err != nil || len(ns.Namespaces) != 2 || ns.Namespaces[0].Namespace != "default" || ns.Namespaces[1].Namespace != "empire" {
		t.Errorf("namespaces %v, %v", ns, err)
	}
	for _, name := range []string{HealthName, ""} {
		h, err := healthpb.NewHealthClient(w.conn).Check(t.Context(), &healthpb.HealthCheckRequest{Service: name})
		if err != nil || h.Status != healthpb.HealthCheckResponse_SERVING {
			t.Errorf("health of %q: %v, %v", name, h, err)
		}
	}
}

func TestPeers(t *testing.T) {
	w := newWorld(t, 1, 0)
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	stream, err := peerpb.NewPeerClient(w.conn).Notify(ctx, &peerpb.NotifyRequest{})
	if err != nil {
		t.Fatal(err)
	}
	if c, err := stream.Recv(); err != nil || c.Name != "n1" || c.Address != "192.0.2.1:4244" || c.Type != peerpb.ChangeNotificationType_PEER_ADDED || c.Tls.GetServerName() != "n1" {
		t.Errorf("%v, %v", c, err)
	}
	known := map[string]Peer{}
	steps := []struct {
		now  []Peer
		want string
	}{
		{[]Peer{{"a", "1"}, {"b", ""}}, "a PEER_ADDED b PEER_ADDED "},
		{[]Peer{{"a", "1"}, {"b", ""}}, ""},
		{[]Peer{{"b", "2"}}, "b PEER_UPDATED a PEER_DELETED "},
	}
	for _, s := range steps {
		got := ""
		for _, c := range peerChanges(known, s.now) {
			got += fmt.Sprint(c.Name, " ", c.Type, " ")
		}
		if got != s.want {
			t.Errorf("%v: %q, want %q", s.now, got, s.want)
		}
	}
}

func TestAgentEvents(t *testing.T) {
	w := newWorld(t, 1, 0)
	put := func(i int) {
		w.events.Put(start.Add(time.Duration(i)*time.Second), &flowpb.AgentEvent{Type: flowpb.AgentEventType_ENDPOINT_CREATED,
			Notification: &flowpb.AgentEvent_EndpointUpdate{EndpointUpdate: &flowpb.EndpointUpdateNotification{Id: uint64(i)}}})
	}
	for i := range keptEvents + 10 {
		put(i)
	}
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	for name, tt := range map[string]struct {
		req  *observerpb.GetAgentEventsRequest
		want []int
	}{
		"last":  {&observerpb.GetAgentEventsRequest{Number: 3}, upTo(keptEvents+7, keptEvents+9, 1)},
		"first": {&observerpb.GetAgentEventsRequest{Number: 2, First: true}, upTo(10, 11, 1)},
		"since": {&observerpb.GetAgentEventsRequest{Since: at(keptEvents + 5)}, upTo(keptEvents+5, keptEvents+9, 1)},
		"range": {&observerpb.GetAgentEventsRequest{Since: at(20), Until: at(22)}, upTo(20, 22, 1)},
	} {
		stream, err := w.GetAgentEvents(ctx, tt.req)
		if err != nil {
			t.Fatal(err)
		}
		var got []int
		for {
			resp, err := stream.Recv()
			if errors.Is(err, io.EOF) {
				break
			}
			if err != nil {
				t.Fatal(err)
			}
			got = append(got, int(resp.GetAgentEvent().GetEndpointUpdate().GetId()))
		}
		if !slices.Equal(got, tt.want) {
			t.Errorf("%s: %v, want %v", name, got, tt.want)
		}
	}
	stream, err := w.GetAgentEvents(ctx, &observerpb.GetAgentEventsRequest{Follow: true, Number: 1})
	if err != nil {
		t.Fatal(err)
	}
	for i := keptEvents + 9; i < keptEvents+20; i++ {
		if i > keptEvents+9 {
			put(i)
		}
		if resp, err := stream.Recv(); err != nil || resp.GetAgentEvent().GetEndpointUpdate().GetId() != uint64(i) {
			t.Fatalf("event %d: %v, %v", i, resp, err)
		}
	}
}
