package datapath_test

import (
	"testing"

	"portcullis/bpf/abi"
	"portcullis/datapath"
)

// TestEndpointEpoch: every change of an endpoint raises the epoch, and what
// programs remembered of it is void: also when the agent is down, and after an
// upgrade from programs that had no epoch.
func TestEndpointEpoch(t *testing.T) {
	l := newLab(t)
	l.oldAgent()
	d := l.open()
	last := uint64(0)
	raised := func(what string) {
		t.Helper()
		var s abi.State
		l.must(pinnedMap(l, "state").Lookup(uint32(0), &s))
		if s.EndpointEpoch <= last {
			t.Errorf("%s: epoch %d, was %d", what, s.EndpointEpoch, last)
		}
		last = s.EndpointEpoch
	}
	eps, err := d.Endpoints()
	l.must(err)
	ep := eps["wl0"]
	l.must(d.SetEndpoint(ep))
	raised("set")
	ep.State = uint32(abi.EPClosed)
	l.must(d.SetEndpoint(ep))
	raised("gate closed")
	l.must(d.RemoveEndpoint(ep.Ifindex))
	raised("removed")
	l.must(d.AddEndpoint("wl0", ep))
	raised("added")
	ep.State = uint32(abi.EPActive)
	l.must(d.SetEndpoint(ep))
	raised("opened")
	l.must(d.Close())
	l.must(datapath.Tombstone(l.pins, workload4, workloadUID))
	raised("tombstone")
}
