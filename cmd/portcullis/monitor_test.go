package main

import (
	"context"
	"net/netip"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/testing/protocmp"

	"portcullis/agent/api"
	"portcullis/bpf/abi"
	"portcullis/identity"
	"portcullis/observe/flow"
)

func flowEvent(verdict abi.Verdict, reason abi.Reason) *api.MonitorResponse {
	r := flow.Record{
		Time: now, BootTime: 100e9, Node: "n2", Verdict: verdict, Reason: reason, Direction: abi.DirIngress, State: abi.FlowNew,
		Protocol: 6, TCPFlags: 2, Length: 74, Endpoint: 24, Ifindex: 7,
		Source: flow.End{IP: netip.MustParseAddr("10.1.0.3"), Port: 43210, Identity: 5163, Text: "default/xwing[org=alliance]",
			Labels: []string{"k8s:org=alliance"}, Workload: "default/xwing"},
		Dest: flow.End{IP: netip.MustParseAddr("10.2.0.2"), Port: 80, Identity: 19842, Text: "default/deathstar[org=empire]",
			Labels: []string{"k8s:org=empire"}, Workload: "default/deathstar", Endpoint: 24},
		Evidence: identity.EvidenceLease, Generation: 42e9, Stamp: 7, BindingAge: 3 * time.Second, Policy: "CiliumNetworkPolicy/default/rule1", Rule: 9,
	}
	return &api.MonitorResponse{Event: &api.MonitorResponse_Flow{Flow: api.FromRecord(&r)}}
}

func events() []*api.MonitorResponse {
	return []*api.MonitorResponse{
		flowEvent(abi.VerdictPass, abi.ReasonNone),
		{Event: &api.MonitorResponse_Lost{Lost: &api.LostEvents{Count: 3, Where: "kernel"}}},
		{}, // of a later version
		flowEvent(abi.VerdictDrop, abi.ReasonPolicyDenied),
	}
}

func TestMonitor(t *testing.T) {
	w := &wire{events: events()}
	socket := serveWire(t, w)
	for _, form := range []string{"table", "json"} {
		got := command(t.Context(), socket, "", "monitor", "-n", "2", "-o", form)
		wantErr := "Listening for events. Press Ctrl-C to quit.\n3 events lost: the kernel's ring was full\n"
		if got.code != exitOK || got.stderr != wantErr {
			t.Errorf("status %d, stderr %q", got.code, got.stderr)
		}
		golden(t, "monitor."+form, got.stdout)
	}
	if got := command(t.Context(), socket, "", "monitor", "-n", "1", "-v", "-t"); !strings.Contains(got.stdout, "(default/xwing [k8s:org=alliance])") ||
		!strings.HasPrefix(got.stdout, "Nov 2") {
		t.Errorf("verbose, with time: %s", got.stdout)
	}
}

func TestMonitorSendsItsFilters(t *testing.T) {
	w := &wire{events: events()}
	got := command(t.Context(), serveWire(t, w), "", "monitor", "-n", "1", "--verdict", "drop,pass", "--reason", "none", "--direction", "ingress",
		"--ip", "10.1.0.0/16", "--label", "org=alliance", "--label", "k8s:class", "--port", "80", "--port", "443", "--protocol", "TCP",
		"--endpoint", "24", "--workload", "default/xwing", "--type", "drop,trace", "--type", "verdict", "--related-to", "24,default/xwing")
	if got.code != exitOK {
		t.Fatalf("%+v", got)
	}
	want := &api.MonitorRequest{
		Verdicts: []string{"drop", "pass"}, Reasons: []string{"none"}, Directions: []string{"ingress"}, Prefixes: []string{"10.1.0.0/16"},
		Labels: []string{"org=alliance", "k8s:class"}, Ports: []uint32{80, 443}, Protocols: []string{"TCP"}, Endpoints: []uint32{24},
		Workloads: []string{"default/xwing"}, Types: []string{"drop", "trace", "verdict"}, Related: []string{"24", "default/xwing"},
	}
	if diff := cmp.Diff(want, w.requests[0], protocmp.Transform()); diff != "" {
		t.Errorf("the agent was asked (-want +got):\n%s", diff)
	}
}

// Colours are for terminals, or for who asks for them.
func TestMonitorColours(t *testing.T) {
	socket := serveWire(t, &wire{events: events()})
	for _, args := range []string{"", "--color never", "--color always"} {
		got := command(t.Context(), socket, "", append([]string{"monitor", "-n", "2"}, strings.Fields(args)...)...)
		if want := args == "--color always"; got.code != exitOK || strings.Contains(got.stdout, "\x1b[32m-> endpoint 24") != want || strings.Contains(got.stdout, "\x1b[31mxx drop") != want {
			t.Errorf("%q: %+v", args, got)
		}
	}
	if got := command(t.Context(), socket, "", "monitor", "--color", "pink"); got.code != exitUsage {
		t.Errorf("%+v", got)
	}
	for _, args := range []string{"--type policy", "--related-to deathstar"} {
		if got := command(t.Context(), socket, "", append([]string{"monitor"}, strings.Fields(args)...)...); got.code != exitUsage {
			t.Errorf("%q: %+v", args, got)
		}
	}
}

// Ctrl-C is the way to end it: no error.
func TestMonitorInterrupted(t *testing.T) {
	socket := serveWire(t, &wire{events: events()})
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	stop := &onWrite{after: 2, do: cancel} // both events are there
	var stderr strings.Builder
	code := run(ctx, &Env{Args: []string{"monitor", "--socket", socket}, Stdout: stop, Stderr: &stderr, Now: time.Now,
		Getenv: func(string) string { return "" }})
	if code != exitOK || strings.Contains(stderr.String(), "portcullis:") {
		t.Errorf("status %d, stderr %q", code, stderr.String())
	}
}

func TestMonitorLosesItsAgent(t *testing.T) {
	socket := serveWire(t, &wire{events: events()[:1], end: status.Error(codes.Unavailable, "the agent is stopping")})
	got := command(t.Context(), socket, "", "monitor")
	if got.code != exitFailed || !strings.Contains(got.stderr, "lost the agent") || !strings.HasPrefix(got.stdout, "-> endpoint 24") {
		t.Errorf("%+v", got)
	}
}

type onWrite struct {
	after int
	do    func()
}

func (w *onWrite) Write(b []byte) (int, error) {
	if w.after--; w.after == 0 {
		w.do()
	}
	return len(b), nil
}
