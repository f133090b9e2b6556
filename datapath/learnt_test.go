package datapath_test

import (
	"net/netip"
	"slices"
	"testing"
	"time"

	"portcullis/bpf/abi"
	"portcullis/datapath"
)

// A sweep tells of flows between the pairs that somebody watches, as long as the
// flows live.
func TestWatchFlows(t *testing.T) {
	l := newLab(t)
	d := l.open()
	l.serve(d)
	l.confirm(d, 1, remote4)
	server, peer := l.udp(l.workload, workload4, 5000), l.udp(l.remote, remote4, 6000)
	l.send(peer, workload4, 5000, "one")
	l.receive(server, "one")
	sweep := func(after time.Duration) []datapath.Pair {
		t.Helper()
		s, err := d.SweepConntrack(d.Now() + int64(after))
		l.must(err)
		return s.Live
	}
	if live := sweep(0); len(live) > 0 {
		t.Errorf("nobody watches, and it tells of %v", live)
	}
	pair := datapath.Pair{Local: workload4, Remote: remote4}
	d.WatchFlows(map[datapath.Pair]struct{}{pair: {}, {Local: pair.Local, Remote: netip.MustParseAddr("192.0.2.99")}: {}})
	if live := sweep(0); !slices.Equal(live, []datapath.Pair{pair}) {
		t.Errorf("live: %v, want %v", live, pair)
	}
	count := map[datapath.Pair]int{pair: 0, {Local: pair.Local, Remote: netip.MustParseAddr("192.0.2.99")}: 0}
	if err := d.CountFlows(count); err != nil || count[pair] != 1 || len(count) != 2 {
		t.Errorf("counted: %v, %v", count, err)
	}
	if live := sweep(time.Hour); len(live) > 0 {
		t.Errorf("a flow that is over lives: %v", live)
	}
	count[pair] = 0
	if err := d.CountFlows(count); err != nil || count[pair] != 0 {
		t.Errorf("counted after the end: %v, %v", count, err)
	}
}

func TestPutAddress(t *testing.T) {
	l := newLab(t)
	d := l.open()
	known := map[netip.Prefix]abi.Range{netip.MustParsePrefix("10.1.0.0/16"): {Flags: uint32(abi.RangeKnown)}}
	l.must(d.SetRanges(known))
	put := func(ip string, want bool) {
		t.Helper()
		done, err := d.PutAddress(netip.MustParseAddr(ip), known, 70000)
		l.must(err)
		ranges, err := d.Ranges()
		l.must(err)
		a := netip.MustParseAddr(ip)
		if r, there := ranges[netip.PrefixFrom(a, a.BitLen())]; done != want || there != want || want && r.Identity != 70000 {
			t.Errorf("%s: put %v, in the kernel %v %+v", ip, done, there, r)
		}
	}
	put("198.51.100.7", true)
	put("2001:db8::7", true)
	put("10.1.2.3", false) // it needs a binding, whatever its name (I5)
	l.must(d.SetRanges(known))
	if ranges, err := d.Ranges(); err != nil || len(ranges) != len(known)+2 { // the families' roots
		t.Errorf("of addresses nobody speaks any more, and there is %v, %v", ranges, err)
	}
}
