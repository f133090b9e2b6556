package datapath_test

import (
	"net/netip"
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

// TestRangeEpochAtTheStart: an agent may have died after it changed a range, or
// bound an IP of none, and before it said so. The next one says it: else flows
// that were judged by what was there before would go on (I5).
func TestRangeEpochAtTheStart(t *testing.T) {
	l := newLab(t)
	d := l.open()
	epoch := func() uint64 {
		var s abi.State
		l.must(pinnedMap(l, "state").Lookup(uint32(0), &s))
		return s.RangeEpoch
	}
	l.must(d.Close())
	before := epoch()
	want := map[netip.Prefix]abi.Range{netip.MustParsePrefix("10.9.0.0/24"): {Flags: uint32(abi.RangeKnown)}}
	key := abi.RangeKey{Prefixlen: 96 + 24, Addr: datapath.Addr(netip.MustParseAddr("10.9.0.0"))}
	l.must(pinnedMap(l, "ranges").Put(&key, abi.Range{Flags: uint32(abi.RangeKnown)}))
	d = l.open()
	l.must(d.SetRanges(want))
	if epoch() <= before {
		t.Errorf("epoch %d, was %d", epoch(), before)
	}
	l.must(d.Close())
}
