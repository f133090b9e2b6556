package main

import (
	"bytes"
	"context"
	"flag"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/durationpb"
	"google.golang.org/protobuf/types/known/timestamppb"

	"portcullis/agent/api"
)

var update = flag.Bool("update", false, "rewrite the golden files")

var now = time.Date(2026, 11, 22, 12, 0, 0, 0, time.UTC)

// wire is the far end of the socket: it answers with fixed data, so that what
// is tested is all between the wire and the screen. What the data mean is
// tested with the real agent.
type wire struct {
	groups []string // of addresses, in force
	api.UnimplementedAgentServer
	unhealthy bool
	empty     bool
	events    []*api.MonitorResponse
	end       error // of the stream, after the events; nil: when the caller goes

	mu       sync.Mutex
	requests []any
}

func (w *wire) saw(r any) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.requests = append(w.requests, r)
}

// serveWire serves w until the test ends and returns its socket.
func serveWire(t *testing.T, w *wire) string {
	t.Helper()
	dir, err := os.MkdirTemp("", "pc") // t.TempDir can be too long for a socket
	if err != nil {
		t.Fatal(err)
	}
	socket := filepath.Join(dir, "agent.sock")
	l, err := api.Listen(socket)
	if err != nil {
		t.Fatal(err)
	}
	server := grpc.NewServer(grpc.MaxRecvMsgSize(api.MaxMessage))
	api.RegisterAgentServer(server, w)
	done := make(chan error, 1)
	go func() { done <- server.Serve(l) }()
	t.Cleanup(func() {
		server.Stop()
		if err := <-done; err != nil {
			t.Error(err)
		}
		os.RemoveAll(dir)
	})
	return socket
}

// result is what a command left behind.
type result struct {
	code           int
	stdout, stderr string
}

// command runs one command line. PORTCULLIS_SOCKET is set to the socket.
func command(ctx context.Context, socket, stdin string, args ...string) result {
	var stdout, stderr bytes.Buffer
	code := run(ctx, &Env{
		Args: args, Stdin: strings.NewReader(stdin), Stdout: &stdout, Stderr: &stderr, Now: func() time.Time { return now },
		Getenv: func(key string) string {
			if key == "PORTCULLIS_SOCKET" {
				return socket
			}
			return ""
		},
	})
	return result{code, stdout.String(), stderr.String()}
}

func golden(t *testing.T, name, got string) {
	t.Helper()
	file := filepath.Join("testdata", name)
	if *update {
		if err := os.WriteFile(file, []byte(got), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	want, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(strings.Split(string(want), "\n"), strings.Split(got, "\n")); diff != "" {
		t.Errorf("%s (-want +got):\n%s", file, diff)
	}
}

// ---- the data -------------------------------------------------------------

func seconds(s float64) *durationpb.Duration {
	return durationpb.New(time.Duration(s * float64(time.Second)))
}

func ago(s float64) *timestamppb.Timestamp {
	return timestamppb.New(now.Add(-time.Duration(s * float64(time.Second))))
}

func xwing() *api.Identity {
	return &api.Identity{Numeric: 5163, Text: "default/xwing[class=xwing org=alliance]", SpiffeId: "spiffe://lab.test/ns/default/sa/xwing",
		Hash: "9c1f0a77b2d4e688", Users: 1, Labels: []string{"k8s:class=xwing", "k8s:io.cilium.k8s.policy.serviceaccount=xwing",
			"k8s:io.kubernetes.pod.namespace=default", "k8s:org=alliance"}}
}

func deathstar() *api.Identity {
	return &api.Identity{Numeric: 19842, Text: "default/deathstar[class=deathstar org=empire]",
		SpiffeId: "spiffe://lab.test/ns/default/sa/deathstar", Hash: "2b7e151628aed2a6", Users: 2,
		Labels: []string{"k8s:class=deathstar", "k8s:io.cilium.k8s.policy.serviceaccount=deathstar",
			"k8s:io.kubernetes.pod.namespace=default", "k8s:org=empire"}}
}

func (w *wire) Status(context.Context, *api.StatusRequest) (*api.StatusResponse, error) {
	s := &api.StatusResponse{
		Healthy: !w.unhealthy, Node: "n2", Version: "devel", Started: ago(3725), BootId: "5e0a3f0c-7c6f-4a57-9d3a-1a2b3c4d5e6f",
		EvidenceMode: "lease", Ttl: seconds(3), Heartbeat: seconds(0.5), ReuseMargin: seconds(0.01),
		SpiffeId: "spiffe://lab.test/portcullis/node/n2", CertificateExpiry: ago(-3000),
		Sources: []*api.Source{
			{Name: "workload-api", State: "ok"},
			{Name: "journal", State: "ok", Detail: "3 grants of before the start accounted for"},
		},
		Maps: []*api.Map{{Name: "bindings", Entries: 12, Capacity: 65536}, {Name: "conntrack", Entries: 98304, Capacity: 131072}},
		Counters: []*api.Counter{
			{Direction: "ingress", Verdict: "drop", Reason: "policy-denied", Packets: 3, Bytes: 222},
			{Direction: "ingress", Verdict: "pass", Reason: "none", Packets: 1204, Bytes: 901221},
		},
		Held:      &api.HeldPackets{Outstanding: 1, Limit: 4096, Total: 40, Reinjected: 37, Dropped: 2},
		Endpoints: 3, EndpointsQuarantined: 1, Bindings: 12, Grants: 4, Policies: 2, Sessions: 3, SessionsUp: 2,
	}
	if w.unhealthy {
		s.EvidenceMode = "classic"
		s.Problems = []string{"the SVID has expired: see the Workload API at unix:///run/spire/agent.sock"}
		s.CertificateExpiry = ago(60)
		s.StartupWait = seconds(42.4)
		s.LostEvents, s.LimitedEvents = 7, 1200
		s.Maps = append(s.Maps, &api.Map{Name: "leases"}) // no capacity: no division by it
		s.Alarms = []*api.Alarm{{Name: "map-full", Since: ago(90), Count: 12, Text: "map conntrack is full: new flows are dropped: raise --conntrack"}}
	}
	return s, nil
}

func (w *wire) ListEndpoints(context.Context, *api.ListEndpointsRequest) (*api.ListEndpointsResponse, error) {
	if w.empty {
		return &api.ListEndpointsResponse{}, nil
	}
	return &api.ListEndpointsResponse{Endpoints: []*api.Endpoint{
		{Id: 24, Workload: &api.Workload{Uid: "3f0f5d8e-93a4-4bb5-8d35-5a0b1c2d3e4f", Namespace: "default", Name: "deathstar"}, Identity: deathstar(),
			Ips: []string{"10.2.0.2", "fd00:2::2"}, Mac: "0a:00:00:00:00:02", Ifname: "pcl7", Ifindex: 7, Generation: 81234567890, State: "active", Evidence: "local",
			IngressEnforced: true, PolicyEpoch: 5, Pid: 4711, Created: ago(60), Ports: []*api.NamedPort{{Name: "http", Port: 80, Protocol: "TCP"}}},
		{Id: 25, Workload: &api.Workload{Uid: "a7c6d1b0-0000-4000-8000-000000000025"}, Ips: []string{"10.2.0.3"}, State: "quarantined",
			Detail: "waits for 1 leases on the IP's last holder, 2.1s at the most",
			Grants: []*api.Grant{{Verifier: "n3", Remaining: seconds(2.1), Revoked: true, Ip: "10.2.0.3", Generation: 7000000000}}},
	}}, nil
}

// RelabelWorkload answers as an agent in mode prompt.
func (w *wire) RelabelWorkload(_ context.Context, r *api.RelabelWorkloadRequest) (*api.RelabelWorkloadResponse, error) {
	w.saw(r)
	if r.GetUid() != "3f0f5d8e-93a4-4bb5-8d35-5a0b1c2d3e4f" {
		return &api.RelabelWorkloadResponse{State: "quarantined", Detail: "waits", Identity: &api.Identity{Text: "-"}}, nil
	}
	id := deathstar()
	id.Text = "default/deathstar[class=museum org=alliance]"
	return &api.RelabelWorkloadResponse{Generation: 91234567890, State: "active", Endpoint: 24, Identity: id, Leases: 2}, nil
}

func (w *wire) ListIdentities(_ context.Context, r *api.ListIdentitiesRequest) (*api.ListIdentitiesResponse, error) {
	w.saw(r)
	res := &api.ListIdentitiesResponse{Identities: []*api.Identity{xwing(), deathstar()}}
	if r.GetReserved() {
		world := &api.Identity{Numeric: 2, Text: "reserved:world", Labels: []string{"reserved:world"}, Hash: "77aa"}
		res.Identities = append([]*api.Identity{world}, res.Identities...)
	}
	return res, nil
}

func (w *wire) ListBindings(_ context.Context, r *api.ListBindingsRequest) (*api.ListBindingsResponse, error) {
	all := []*api.Binding{
		{Ip: "10.1.0.3", Generation: 42000000000, Workload: &api.Workload{Uid: "11111111-2222-4333-8444-555555555555"}, Identity: xwing(),
			Evidence: "lease", Mode: "lease", Owner: "n1", Remaining: seconds(2.6), Age: seconds(12.3), State: "live", Stamp: 7},
		{Ip: "10.1.0.9", Generation: 43000000000, Workload: &api.Workload{Uid: "66666666-7777-4888-8999-aaaaaaaaaaaa"}, Identity: xwing(),
			Evidence: "watch", Mode: "classic", Owner: "n1", Age: seconds(400), State: "live", Stamp: 8},
		{Ip: "10.2.0.2", Generation: 81234567890, Workload: &api.Workload{Uid: "3f0f5d8e-93a4-4bb5-8d35-5a0b1c2d3e4f", Namespace: "default", Name: "deathstar"},
			Identity: deathstar(), Evidence: "local", Mode: "lease", Owner: "n2", Age: seconds(60), State: "live", Local: true, Stamp: 2,
			Grants: []*api.Grant{{Verifier: "n1", Remaining: seconds(3.1), Ip: "10.2.0.2", Generation: 81234567890},
				{Verifier: "n3", Remaining: seconds(0.4), Revoked: true, Ip: "10.2.0.2", Generation: 81234567890}}},
		{Ip: "10.3.0.5", Generation: 9000000000, Workload: &api.Workload{Uid: "bbbbbbbb-cccc-4ddd-8eee-ffffffffffff"}, Identity: xwing(),
			Evidence: "lease", Mode: "lease", Owner: "n3", Remaining: seconds(0), Age: seconds(70), State: "stale", Stamp: 5},
	}
	if len(r.GetIps()) > 0 {
		all = slices.DeleteFunc(all, func(b *api.Binding) bool { return !slices.Contains(r.GetIps(), b.GetIp()) })
	}
	return &api.ListBindingsResponse{Bindings: all}, nil
}

func (w *wire) ListSessions(context.Context, *api.ListSessionsRequest) (*api.ListSessionsResponse, error) {
	return &api.ListSessionsResponse{Sessions: []*api.Session{
		{Peer: "n1", Role: "verifier", State: "up", SpiffeId: "spiffe://lab.test/portcullis/node/n1", CertificateExpiry: ago(-3000), Bindings: 2,
			LastRenewal: ago(0.4), Remaining: seconds(2.6), Address: "192.0.2.1:4260", Since: ago(100)},
		{Peer: "n1", Role: "owner", State: "up", SpiffeId: "spiffe://lab.test/portcullis/node/n1", CertificateExpiry: ago(-3000), Bindings: 1,
			LastRenewal: ago(0.1), Remaining: seconds(3.6)},
		{Peer: "n3", Role: "verifier", State: "down", Detail: "dial 192.0.2.3:4260: connection refused", Bindings: 1},
	}}, nil
}

// ListNames answers about two workloads.
func (w *wire) ListNames(_ context.Context, r *api.ListNamesRequest) (*api.ListNamesResponse, error) {
	w.saw(r)
	star := &api.Workload{Uid: "3f0f5d8e-93a4-4bb5-8d35-5a0b1c2d3e4f", Namespace: "default", Name: "deathstar"}
	all := []*api.LearntName{
		{Endpoint: 24, Workload: star, Name: "api.example.com", Addresses: []*api.LearntAddress{
			{Ip: "192.0.2.10", Ttl: seconds(28.4), Source: "lookup", Connections: 2}, {Ip: "2001:db8::10", Ttl: seconds(28.4), Source: "lookup"}}},
		{Endpoint: 24, Workload: star, Name: "old.example.com", Addresses: []*api.LearntAddress{{Ip: "192.0.2.77", Source: "connection", Connections: 1}}},
		{Endpoint: 25, Workload: &api.Workload{Uid: "a7c6d1b0-0000-4000-8000-000000000025"}, Name: "www.example.org",
			Addresses: []*api.LearntAddress{{Ip: "198.51.100.1", Source: "grace"}}},
	}
	if uid := r.GetUid(); uid != "" {
		all = slices.DeleteFunc(all, func(n *api.LearntName) bool { return n.GetWorkload().GetUid() != uid })
	}
	return &api.ListNamesResponse{Names: all}, nil
}

func (w *wire) ResetSession(_ context.Context, r *api.ResetSessionRequest) (*api.ResetSessionResponse, error) {
	switch r.GetPeer() {
	case "n1":
		return &api.ResetSessionResponse{Existed: true, Bindings: 2}, nil
	case "n3":
		return &api.ResetSessionResponse{}, nil
	}
	return nil, status.Error(codes.NotFound, "no such peer")
}

// ImportPolicies answers with the real parser's findings.
func (w *wire) ImportPolicies(_ context.Context, r *api.ImportPoliciesRequest) (*api.ImportPoliciesResponse, error) {
	w.saw(r)
	policies, problems := api.ParsePolicies(r.GetFiles())
	res := &api.ImportPoliciesResponse{Problems: problems}
	for _, p := range policies {
		res.Imported = append(res.Imported, &api.ImportedPolicy{Ref: api.FromRef(p.Ref), Replaced: p.Name == "old"})
	}
	return res, nil
}

const policySource = "# kept as it was\napiVersion: networking.k8s.io/v1\nkind: NetworkPolicy\nmetadata: {name: deny, namespace: default}\nspec: {podSelector: {}, policyTypes: [Ingress]}\n"

func policy(source bool) *api.Policy {
	p := &api.Policy{Ref: &api.PolicyRef{Kind: "NetworkPolicy", Namespace: "default", Name: "deny"}, File: "deny.yaml", Imported: ago(75), Endpoints: 2}
	if source {
		p.Source = policySource
	}
	return p
}

func (w *wire) ListPolicies(_ context.Context, r *api.ListPoliciesRequest) (*api.ListPoliciesResponse, error) {
	res := &api.ListPoliciesResponse{Policies: []*api.Policy{policy(r.GetSource())}}
	for _, name := range w.groups {
		res.Policies = append(res.Policies, &api.Policy{Ref: &api.PolicyRef{Kind: "CiliumCIDRGroup", Name: name}})
	}
	return res, nil
}

func (w *wire) GetPolicy(_ context.Context, r *api.GetPolicyRequest) (*api.GetPolicyResponse, error) {
	if r.GetRef().Ref() != "NetworkPolicy/default/deny" {
		return nil, status.Error(codes.NotFound, "no such policy")
	}
	return &api.GetPolicyResponse{Policy: policy(true)}, nil
}

func (w *wire) DeletePolicies(_ context.Context, r *api.DeletePoliciesRequest) (*api.DeletePoliciesResponse, error) {
	w.saw(r)
	if r.GetAll() {
		return &api.DeletePoliciesResponse{Deleted: []*api.PolicyRef{policy(false).GetRef()}}, nil
	}
	for _, ref := range r.GetRefs() {
		if ref.GetName() != "deny" {
			return nil, status.Errorf(codes.NotFound, "there is no policy %s; nothing was deleted", ref.Ref())
		}
	}
	return &api.DeletePoliciesResponse{Deleted: r.GetRefs()}, nil
}

func (w *wire) Monitor(r *api.MonitorRequest, stream grpc.ServerStreamingServer[api.MonitorResponse]) error {
	w.saw(r)
	if err := stream.SendHeader(metadata.MD{}); err != nil {
		return err
	}
	for _, ev := range w.events {
		if err := stream.Send(ev); err != nil {
			return err
		}
	}
	if w.end != nil {
		return w.end
	}
	<-stream.Context().Done()
	return nil
}
