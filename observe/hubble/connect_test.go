package hubble

import (
	"encoding/json"
	"fmt"
	"maps"
	"net/netip"
	"slices"
	"strings"
	"testing"
	"time"

	observerpb "github.com/cilium/cilium/api/v1/observer"
	"portcullis/bpf/abi"
	"portcullis/observe/flow"
)

// The record that a talk of 2020 shows, as the tool of that time wrote it.
const talkRecord = `{
  "process_connect": {
    "process": {"exec_id": "d29ya2VyMjoxNTk5MDIyMzQyMDI0MDU6MTcyODk4MA==", "pid": 1728980, "uid": 0, "cwd": "/", "binary": "/usr/bin/wget",
      "flags": "execve", "start_time": "2020-10-23T02:13:09.032597800Z", "auid": 0, "refcnt": 2, "cap": {}},
    "parent": {},
    "source_ip": "192.168.255.118", "source_port": 60148, "destination_ip": "192.168.255.235", "destination_port": 80
  },
  "node_name": "worker2", "time": "2020-10-23T02:13:09.035329600Z"}`

func called() *flow.Record {
	return &flow.Record{Time: time.Date(2020, 10, 23, 2, 13, 9, 35329600, time.UTC), Node: "worker2", Verdict: abi.VerdictPass, State: abi.FlowNew, Direction: abi.DirEgress,
		Protocol: 6, TCPFlags: 2, Source: flow.End{IP: netip.MustParseAddr("192.168.255.118"), Port: 60148}, Dest: flow.End{IP: netip.MustParseAddr("192.168.255.235"), Port: 80},
		Process: &flow.Process{PID: 1728980, CWD: "/", Binary: "/usr/bin/wget", Start: time.Date(2020, 10, 23, 2, 13, 9, 32597800, time.UTC),
			ExecID: "d29ya2VyMjoxNTk5MDIyMzQyMDI0MDU6MTcyODk4MA=="}}
}

func connectOf(t *testing.T, r *flow.Record) map[string]any {
	t.Helper()
	b, err := ConnectJSON(Place{Node: "worker2"}.From(r, 0)[0])
	if err != nil {
		t.Fatal(err)
	}
	if b == nil {
		return nil
	}
	var out map[string]any
	if err := json.Unmarshal(b, &out); err != nil {
		t.Fatalf("%s: %v", b, err)
	}
	return out
}

// flat names every value by its path.
func flat(prefix string, v any, to map[string]string) {
	m, ok := v.(map[string]any)
	if !ok || len(m) == 0 {
		to[prefix] = fmt.Sprintf("%T %v", v, v)
		return
	}
	for k, v := range m {
		flat(prefix+"/"+k, v, to)
	}
}

// Field by field, and type by type, our record is the talk's. What it has less is
// a number of that tool's own cache; what it has more is listed here.
func TestConnectIsTheTalksRecord(t *testing.T) {
	var talk map[string]any
	if err := json.Unmarshal([]byte(talkRecord), &talk); err != nil {
		t.Fatal(err)
	}
	want, got := map[string]string{}, map[string]string{}
	flat("", talk, want)
	flat("", connectOf(t, called()), got)
	delete(want, "/process_connect/process/refcnt")
	want["/process_connect/protocol"], want["/process_connect/verdict"] = "string TCP", "string FORWARDED"
	for _, k := range slices.Sorted(maps.Keys(want)) {
		if got[k] != want[k] {
			t.Errorf("%s is %q, want %q", k, got[k], want[k])
		}
	}
	for k := range got {
		if _, there := want[k]; !there {
			t.Errorf("%s is more than is listed", k)
		}
	}
}

func TestConnectOfOthers(t *testing.T) {
	r := called()
	r.Direction, r.Protocol = abi.DirIngress, 17
	r.Process = &flow.Process{PID: 9, UID: 5, AUID: 1<<32 - 1, Binary: "/srv", Arguments: "/srv -x", Container: "c0", Forked: true, Incomplete: true, Parent: &flow.Process{PID: 1, Binary: "/init", UID: 3}}
	got := map[string]string{}
	flat("", connectOf(t, r), got)
	for k, want := range map[string]string{"process/pid": "float64 9", "process/auid": "float64 4.294967295e+09", "process/flags": "string clone", "process/docker": "string c0", "process/incomplete": "bool true",
		"process/arguments": "string /srv -x", "parent/pid": "float64 1", "parent/binary": "string /init", "parent/uid": "float64 3", "protocol": "string UDP"} {
		if got["/process_accept/"+k] != want {
			t.Errorf("%s is %q, want %q", k, got["/process_accept/"+k], want)
		}
	}
	for what, change := range map[string]func(*flow.Record){
		"no process":       func(r *flow.Record) { r.Process = nil },
		"a reply":          func(r *flow.Record) { r.State = abi.FlowReply },
		"a held one":       func(r *flow.Record) { r.Verdict = abi.VerdictHold },
		"one that goes on": func(r *flow.Record) { r.State, r.Later = abi.FlowEstablished, true },
		"a ping":           func(r *flow.Record) { r.Protocol = 1 },
		"one request":      func(r *flow.Record) { r.L7 = &flow.L7{Protocol: "http", Method: "GET"} },
	} {
		r := called()
		change(r)
		if got := connectOf(t, r); got != nil {
			t.Errorf("%s is told as %v", what, got)
		}
	}
	r = called()
	r.Verdict, r.Reason = abi.VerdictDrop, abi.ReasonPolicyDenied
	got = map[string]string{}
	flat("", connectOf(t, r), got)
	if got["/process_connect/verdict"] != "string DROPPED" {
		t.Errorf("dropped: %v", got)
	}
}

func TestPrinterOfProcesses(t *testing.T) {
	var out strings.Builder
	p := Printer{Form: Connect, Out: &out, Err: &out}
	silent := called()
	silent.Process = nil
	for _, r := range []*flow.Record{called(), silent, called()} {
		if err := p.Print(&observerpb.GetFlowsResponse{ResponseTypes: &observerpb.GetFlowsResponse_Flow{Flow: Place{Node: "worker2"}.From(r, 0)[0]}}); err != nil {
			t.Fatal(err)
		}
	}
	if strings.Count(out.String(), "\n") != 2 || strings.Count(out.String(), `{"process_connect":{"process":{"exec_id":"d29`) != 2 {
		t.Errorf("%s", out.String())
	}
}

func TestFactsHoldTheWholeProcess(t *testing.T) {
	r := called()
	r.Process.Forked, r.Process.Incomplete, r.Process.Parent = true, true, &flow.Process{PID: 2, Incomplete: true}
	facts, err := FactsOf(Place{}.From(r, 0)[0])
	if err != nil || !facts.Process.Forked || !facts.Process.Incomplete || !facts.Process.Parent.Incomplete || facts.Process.Parent.Forked {
		t.Errorf("%+v, %v", facts.Process, err)
	}
}
