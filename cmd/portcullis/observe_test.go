package main

import (
	"net"
	"net/netip"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"google.golang.org/grpc"

	"portcullis/bpf/abi"
	"portcullis/identity"
	"portcullis/observe/flow"
	"portcullis/observe/hubble"
)

// serveFlows serves two flows by the Hubble API beside an agent's socket, whose
// name it returns.
func serveFlows(t *testing.T) string {
	ring := flow.NewRing(10)
	for i := range 2 {
		r := flow.Record{Time: time.Now().Add(time.Duration(i-2) * time.Second), Node: "n1", Verdict: abi.VerdictPass, State: abi.FlowNew, Direction: abi.DirIngress, Protocol: 6, TCPFlags: 2,
			Evidence: identity.EvidenceLease, Generation: 4, Stamp: 7, BindingAge: time.Duration(3+i) * time.Second,
			Source: flow.End{IP: netip.MustParseAddr("10.2.0.1"), Port: uint16(40000 + i), Labels: []string{"k8s:io.kubernetes.pod.namespace=default", "k8s:org=empire"}},
			Dest:   flow.End{IP: netip.MustParseAddr("10.1.0.1"), Port: 80, Workload: "default/deathstar"}}
		if i == 0 {
			r.Verdict, r.Reason, r.Source.Workload = abi.VerdictDrop, abi.ReasonPolicyDenied, "default/xwing"
		}
		ring.Put(&r)
	}
	dir := t.TempDir()
	ln, err := net.Listen("unix", filepath.Join(dir, "hubble.sock"))
	if err != nil {
		t.Fatal(err)
	}
	g := grpc.NewServer()
	hubble.NewServer(hubble.Options{Place: hubble.Place{Node: "n1"}, Ring: ring, Started: time.Now()}).Register(g)
	done := make(chan error)
	go func() { done <- g.Serve(ln) }()
	t.Cleanup(func() { g.Stop(); <-done })
	return filepath.Join(dir, "agent.sock")
}

func TestObserve(t *testing.T) {
	socket := serveFlows(t)
	dropped, passed := "default/xwing:40000 -> default/deathstar:80 DROPPED policy-denied lease 3.0s SYN", "10.2.0.1:40001(default) -> default/deathstar:80 FORWARDED lease 4.0s SYN"
	for line, want := range map[string][]string{
		"":                                        {dropped, passed},
		"--last 1":                                {passed},
		"--first 1":                               {dropped},
		"--since 1h":                              {dropped, passed},
		"--since 1h --last 1":                     {passed},
		"--verdict DROPPED":                       {dropped},
		"--not --verdict DROPPED":                 {passed},
		"--not -l org=empire --since 1m":          nil,
		"--pod xwing --to-port 80":                {dropped},
		"-n default --until 1m":                   nil,
		"--reason policy-denied --all":            {dropped},
		"--evidence lease --older-than 3s":        {passed},
		"--evidence svid,local":                   nil,
		"--process wget":                          nil,
		"-t policy-verdict --from-ip 10.2.0.0/16": {dropped},
	} {
		got := command(t.Context(), socket, "", append([]string{"observe"}, strings.Fields(line)...)...)
		var lines []string
		for _, l := range strings.Split(strings.TrimSpace(got.stdout), "\n") {
			if _, text, ok := strings.Cut(l, " "); ok { // the time goes
				lines = append(lines, text)
			}
		}
		if got.code != exitOK || strings.Join(lines, "\n") != strings.Join(want, "\n") {
			t.Errorf("observe %s: status %d, %q %s, want %q", line, got.code, lines, got.stderr, want)
		}
	}
}

func TestObserveUsage(t *testing.T) {
	for _, line := range []string{"--verdict MAYBE", "--not", "--first 2 -f", "-o yaml", "-o table -f", "--since yesterday", "--evidence proof", "--reason because", "--color red", "--label a in"} {
		got := command(t.Context(), "/nowhere/agent.sock", "", append([]string{"observe"}, strings.Fields(line)...)...)
		if got.code != exitUsage {
			t.Errorf("observe %s: status %d, %s", line, got.code, got.stderr)
		}
	}
	got := command(t.Context(), "/nowhere/agent.sock", "", "observe")
	if got.code != exitFailed || !strings.Contains(got.stderr, "/nowhere/hubble.sock") {
		t.Errorf("no server: %+v", got)
	}
}
