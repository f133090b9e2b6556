package datapath_test

import (
	"testing"

	"portcullis/bpf/abi"
	"portcullis/datapath"
)

// With endpoint marks a packet carries its sender, and still goes where it
// should: from one workload to another of the node.
func TestEndpointMarks(t *testing.T) {
	l := newLab(t)
	cfg := l.config()
	cfg.EndpointMarkMask = 0x00f00000
	d, err := datapath.Open(cfg)
	l.must(err)
	t.Cleanup(func() { l.must(d.Close()) })
	ep := l.serve(d)
	ns, other := l.neighbour(d)
	for i, e := range []abi.Endpoint{ep, other} {
		l.must(d.InstallSlot(uint32(1+i), abi.Slot{Stamp: d.State().ReserveStamps(1), IP: e.IP4, Identity: client, Lease: uint32(abi.LeaseLocal),
			Ifindex: e.Ifindex, Evidence: uint8(abi.EvidenceLocal)}, abi.SlotCold{}))
	}
	from, to := l.udp(ns, neighbour4, 6000), l.udp(l.workload, workload4, 5000)
	l.send(from, workload4, 5000, "marked")
	l.receive(to, "marked")
	l.send(to, neighbour4, 6000, "answer")
	l.receive(from, "answer")
	marks := contents[uint32, abi.Mark](l, "marks")
	for _, e := range []abi.Endpoint{ep, other} {
		if want := uint64(e.ID)<<32 | uint64(e.Ifindex); marks[e.HoldIndex].Who != want {
			t.Errorf("mark %d is %#x, want %#x", e.HoldIndex, marks[e.HoldIndex].Who, want)
		}
	}
	if a, b := d.Marks(); (a|b)&cfg.EndpointMarkMask != 0 {
		t.Errorf("marks %#x and %#x use the endpoints' bits", a, b)
	}
}
