package api

import (
	"bytes"
	"context"
	"errors"
	"io/fs"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"
	"google.golang.org/grpc"
	"google.golang.org/protobuf/proto"

	"portcullis/bpf/abi"
	"portcullis/identity"
	"portcullis/observe/flow"
)

func TestRecordRoundTrip(t *testing.T) {
	full := flow.Record{
		Time: time.Unix(1_700_000_000, 5).UTC(), BootTime: 1<<64 - 1, Node: "n2",
		Verdict: abi.VerdictDrop, Reason: abi.ReasonStaleLease, Direction: abi.DirIngress, State: abi.FlowReply,
		Protocol: 6, TCPFlags: 0xff, Length: 1500, Endpoint: 24, Ifindex: 3,
		Source: flow.End{IP: netip.MustParseAddr("fd00::1"), Port: 65535, Identity: 1<<32 - 1, Text: "default/xwing[]",
			Labels: []string{"k8s:org=alliance"}, Workload: "default/xwing"},
		Dest:     flow.End{IP: netip.MustParseAddr("10.2.0.2"), Port: 80, Identity: 1, Endpoint: 24},
		Evidence: identity.EvidenceLease, NoEvidenceNeeded: true, Generation: 1<<64 - 1, Stamp: 7, BindingAge: time.Hour + 1,
		Reinjected: true, Rule: 9, Policy: "NetworkPolicy/default/x", ICMP: &flow.ICMP{Type: 3, Code: 255}, Called: netip.MustParseAddrPort("[fd96::7]:443"),
	}
	full.Dest.Owner, full.Dest.Service, full.Dest.Names = flow.Owner{Kind: "Deployment", Name: "web"}, "default/web", []string{"a.example", "b.example"}
	inside := full
	inside.L7 = &flow.L7{Protocol: "http", Verdict: "denied", Reason: "why", Rule: "P x", Latency: time.Second, Version: "1.1", Method: "PUT", Path: "/a", Host: "b", Header: []string{"X: y"}, Status: 403,
		Name: "n", Type: 1, Code: -1, Addresses: []netip.Addr{netip.MustParseAddr("192.0.2.1"), netip.MustParseAddr("::1")}, TTL: time.Minute}
	records := []flow.Record{full, inside, {}} // the zero: neither time nor addresses are known
	for reason := range abi.ReasonMax {
		records = append(records, flow.Record{Reason: reason, Verdict: abi.Verdict(reason) % abi.VerdictMax})
	}
	for _, want := range records {
		b, err := proto.Marshal(FromRecord(&want))
		if err != nil {
			t.Fatal(err)
		}
		var ev FlowEvent
		if err := proto.Unmarshal(b, &ev); err != nil {
			t.Fatal(err)
		}
		got, err := ToRecord(&ev)
		if err != nil {
			t.Fatal(err)
		}
		if diff := cmp.Diff(want, got, cmpopts.EquateComparable(netip.Addr{}, netip.AddrPort{}), cmpopts.EquateEmpty()); diff != "" {
			t.Errorf("after the wire (-want +got):\n%s", diff)
		}
	}
}

func TestToRecordRefusesUnknownWords(t *testing.T) {
	for name, spoil := range map[string]func(*FlowEvent){
		"verdict": func(e *FlowEvent) { e.Verdict = "" }, "reason": func(e *FlowEvent) { e.Reason = "bad" },
		"direction": func(e *FlowEvent) { e.Direction = "up" }, "state": func(e *FlowEvent) { e.State = "old" },
		"protocol": func(e *FlowEvent) { e.Protocol = "TPC" }, "evidence": func(e *FlowEvent) { e.Evidence = "rent" },
		"source": func(e *FlowEvent) { e.Source.Ip = "10.1" }, "destination": func(e *FlowEvent) { e.Destination.Ip = "x" },
	} {
		ev := FromRecord(&flow.Record{})
		spoil(ev)
		if _, err := ToRecord(ev); err == nil {
			t.Errorf("a wrong %s is taken", name)
		}
	}
}

func TestFilter(t *testing.T) {
	got, err := (&MonitorRequest{
		Verdicts: []string{"drop"}, Reasons: []string{"policy-denied", "stale-lease"}, Directions: []string{"egress"},
		Prefixes: []string{"10.1.0.0/16", "fd00::1"}, Labels: []string{"k8s:org=empire"}, Ports: []uint32{80, 65535},
		Protocols: []string{"tcp", "47"}, Endpoints: []uint32{24}, Workloads: []string{"default/xwing"},
	}).Filter()
	if err != nil {
		t.Fatal(err)
	}
	want := flow.Filter{
		Verdicts: []abi.Verdict{abi.VerdictDrop}, Reasons: []abi.Reason{abi.ReasonPolicyDenied, abi.ReasonStaleLease},
		Directions: []abi.Direction{abi.DirEgress}, Prefixes: []netip.Prefix{netip.MustParsePrefix("10.1.0.0/16"), netip.MustParsePrefix("fd00::1/128")},
		Labels: []flow.Label{{Source: "k8s", Key: "org", Value: "empire", Exact: true}}, Ports: []uint16{80, 65535},
		Protocols: []uint8{6, 47}, Endpoints: []uint32{24}, Workloads: []string{"default/xwing"},
	}
	if diff := cmp.Diff(want, got, cmpopts.EquateComparable(netip.Prefix{})); diff != "" {
		t.Errorf("filter (-want +got):\n%s", diff)
	}

	_, err = (&MonitorRequest{
		Verdicts: []string{"allow"}, Reasons: []string{"because"}, Directions: []string{"up"}, Prefixes: []string{"net"},
		Labels: []string{"="}, Ports: []uint32{65536}, Protocols: []string{"xyz"},
	}).Filter()
	for _, word := range []string{`"allow"`, `"because"`, `"up"`, `"net"`, `"="`, "65536", `"xyz"`} {
		if err == nil || !strings.Contains(err.Error(), word) {
			t.Errorf("%s is not reported in: %v", word, err)
		}
	}
}

func TestRef(t *testing.T) {
	for in, want := range map[string]string{
		"NetworkPolicy/default/deny":   "NetworkPolicy/default/deny",
		"netpol/default/deny":          "NetworkPolicy/default/deny",
		"CNP/kube-system/x":            "CiliumNetworkPolicy/kube-system/x",
		"ccnp/everywhere":              "CiliumClusterwideNetworkPolicy/everywhere",
		"SomethingElse/default/x":      "SomethingElse/default/x",
		"ciliumnetworkpolicy/a/rule-1": "CiliumNetworkPolicy/a/rule-1",
	} {
		ref, err := ParseRef(in)
		if err != nil {
			t.Errorf("%s: %v", in, err)
			continue
		}
		if ref.Ref() != want {
			t.Errorf("%s is read as %s, want %s", in, ref.Ref(), want)
		}
	}
	for _, in := range []string{"", "deny", "/deny", "a/b/c/d", "netpol/default/", "netpol//"} {
		if ref, err := ParseRef(in); err == nil {
			t.Errorf("%q is read as %s", in, ref.Ref())
		}
	}
}

// serve answers Status with one large problem.
type serve struct {
	UnimplementedAgentServer
	problem string
}

func (s serve) Status(context.Context, *StatusRequest) (*StatusResponse, error) {
	return &StatusResponse{Problems: []string{s.problem}}, nil
}

func TestDialAndListen(t *testing.T) {
	socket := filepath.Join(t.TempDir(), "run", "agent.sock")
	dial := func(want error, hint string) {
		t.Helper()
		_, err := Dial(socket)
		var unreachable *UnreachableError
		if !errors.As(err, &unreachable) || !errors.Is(err, want) || !strings.Contains(err.Error(), hint) {
			t.Errorf("Dial: %v; want an UnreachableError that wraps %v and says %q", err, want, hint)
		}
	}
	dial(fs.ErrNotExist, "the agent is not running or its socket is elsewhere")

	l, err := Listen(socket)
	if err != nil {
		t.Fatal(err)
	}
	info, err := os.Stat(socket)
	if err != nil {
		t.Fatal(err)
	}
	if info.Mode().Perm() != 0o660 {
		t.Errorf("the socket's mode is %o, want 660", info.Mode().Perm())
	}
	entries, err := os.ReadDir(filepath.Dir(socket))
	if err != nil || len(entries) != 1 {
		t.Errorf("beside the socket there is more: %v (%v)", entries, err)
	}
	if _, err := Listen(socket); err == nil || !strings.Contains(err.Error(), "another agent") {
		t.Errorf("a second agent on the socket: %v", err)
	}

	server := grpc.NewServer(grpc.MaxSendMsgSize(MaxMessage))
	RegisterAgentServer(server, serve{problem: strings.Repeat("x", 8<<20)}) // more than gRPC's default bound
	done := make(chan error, 1)
	go func() { done <- server.Serve(l) }()
	c, err := Dial(socket)
	if err != nil {
		t.Fatal(err)
	}
	res, err := c.Status(t.Context(), &StatusRequest{})
	if err != nil || len(res.GetProblems()) != 1 || len(res.GetProblems()[0]) != 8<<20 {
		t.Errorf("a large answer: %v", err)
	}
	if err := c.Close(); err != nil {
		t.Error(err)
	}
	server.Stop()
	if err := <-done; err != nil {
		t.Error(err)
	}
	if _, err := os.Stat(socket); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("the socket outlives its listener: %v", err)
	}

	// The next agent's socket is safe from the last one's second Close.
	next, err := Listen(socket)
	if err != nil {
		t.Fatal(err)
	}
	defer next.Close()
	if err := l.Close(); err != nil {
		t.Error(err)
	}
	if _, err := os.Stat(socket); err != nil {
		t.Errorf("closed the next agent's socket: %v", err)
	}
}

func TestListenReplacesWhatADeadAgentLeft(t *testing.T) {
	socket := filepath.Join(t.TempDir(), "agent.sock")
	dead, err := net.ListenUnix("unix", &net.UnixAddr{Name: socket, Net: "unix"})
	if err != nil {
		t.Fatal(err)
	}
	dead.SetUnlinkOnClose(false)
	dead.Close()
	if _, err := Dial(socket); !errors.Is(err, syscall.ECONNREFUSED) || !strings.Contains(err.Error(), "nobody listens") {
		t.Errorf("Dial to a dead agent: %v", err)
	}
	l, err := Listen(socket)
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	conn, err := net.Dial("unix", socket)
	if err != nil {
		t.Fatal(err)
	}
	conn.Close()
}

func TestListenRefuses(t *testing.T) {
	file := filepath.Join(t.TempDir(), "precious")
	if err := os.WriteFile(file, []byte("data"), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := Listen(file); err == nil || !strings.Contains(err.Error(), "not a socket") {
		t.Errorf("a file in the socket's place: %v", err)
	}
	if b, err := os.ReadFile(file); err != nil || !bytes.Equal(b, []byte("data")) {
		t.Errorf("the file was touched: %q, %v", b, err)
	}
	long := filepath.Join(t.TempDir(), strings.Repeat("x", 100), "agent.sock")
	if _, err := Listen(long); err == nil || !strings.Contains(err.Error(), "too long") {
		t.Errorf("too long a name: %v", err)
	}
}

func TestUnreachableErrorNamesPermission(t *testing.T) {
	err := &UnreachableError{Socket: "/run/x.sock", Err: &fs.PathError{Op: "dial", Path: "/run/x.sock", Err: syscall.EACCES}}
	if !strings.Contains(err.Error(), "root") {
		t.Errorf("without permission: %v", err)
	}
}
