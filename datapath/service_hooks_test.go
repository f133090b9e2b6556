package datapath_test

import (
	"os"
	"testing"
	"time"

	"portcullis/bpf/abi"
	"portcullis/datapath"
)

// The hooks outlive the agent, the next one takes them over, and Remove takes
// them away.
func TestServiceHooksAreAdopted(t *testing.T) {
	x := newServing(t, true)
	x.confirm(x.d, 2, x.remote)
	x.lead(x.remote)
	server := x.udp(x.lab.remote, x.remote, x.backendPort)
	x.call("before")
	x.exchange(server, "before")
	x.must(x.d.Close())
	x.call("meanwhile")
	b := make([]byte, 64)
	x.must(server.SetReadDeadline(time.Now().Add(patience)))
	_, _, err := server.ReadFromUDPAddrPort(b)
	x.must(err)
	for range 3 {
		d := x.open()
		x.d = d
		x.caller = x.udp(x.workload, x.own, 0)
		x.call("after")
		x.exchange(server, "after")
		if got := x.pinned(); len(got) != 4 {
			t.Errorf("pinned are %v, want one of each hook", got)
		}
		x.must(d.Close())
	}
	x.must(datapath.Remove(x.pins))
	x.call("unguarded")
	x.must(server.SetReadDeadline(time.Now().Add(patience)))
	_, _, err = server.ReadFromUDPAddrPort(b)
	x.must(err)
}

func (x *serving) pinned() (names []string) {
	entries, err := os.ReadDir(x.pins + "/hooks")
	x.must(err)
	for _, e := range entries {
		names = append(names, e.Name())
	}
	return names
}

// Behind a bridge the device does not say whose a packet is any more.
func TestServiceBehindABridge(t *testing.T) {
	x := newServing(t, true)
	x.bridge()
	x.confirm(x.d, 2, x.remote)
	x.lead(x.remote)
	server := x.udp(x.lab.remote, x.remote, x.backendPort)
	x.call("over the bridge")
	x.exchange(server, "over the bridge")
	x.allow(client+1, x.backendPort)
	x.call("denied")
	x.eventually("a drop", func() bool { return x.egress(abi.VerdictDrop, abi.ReasonPolicyDenied) == 1 })
	x.nothing(server)
	// Without its own binding the caller is nobody behind the bridge.
	x.allow(client, x.backendPort)
	for i, s := range x.d.Slots() {
		if i == 1 {
			x.must(x.d.ZeroSlot(1, s.Stamp, x.own))
		}
	}
	x.must(x.caller.Close())
	x.caller = x.udp(x.workload, x.own, 6001)
	x.call("nobody's")
	x.eventually("a drop", func() bool { return x.egress(abi.VerdictDrop, abi.ReasonServiceUntranslated) == 1 })
	x.nothing(server)
}

// Under audit what would be dropped passes, and is told.
func TestServiceUnderAudit(t *testing.T) {
	x := newServing(t, true)
	x.confirm(x.d, 2, x.remote)
	x.lead(x.remote)
	server := x.udp(x.lab.remote, x.remote, x.backendPort)
	x.allow(client+1, x.backendPort)
	x.ep.Flags |= uint32(abi.EPAudit)
	x.must(x.d.SetEndpoint(x.ep))
	for range 3 {
		x.call("audited")
		x.exchange(server, "audited")
	}
	if n := x.egress(abi.VerdictAudit, abi.ReasonPolicyDenied); n != 3 {
		t.Errorf("%d audited, want 3: %v", n, counters(x.lab, x.d))
	}
}
