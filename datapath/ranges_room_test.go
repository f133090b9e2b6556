package datapath_test

import (
	"errors"
	"maps"
	"net/netip"
	"testing"

	"portcullis/bpf/abi"
	"portcullis/datapath"
)

// Where there is no room for a known range, none of its IPs is the world's.
func TestNoRoomForAKnownRange(t *testing.T) {
	l := newLab(t)
	cfg := l.config()
	cfg.Ranges = 7
	d, err := datapath.Open(cfg)
	l.must(err)
	t.Cleanup(func() { d.Close() })
	p := netip.MustParsePrefix
	known := abi.Range{Flags: uint32(abi.RangeKnown | abi.RangeHoldable)}
	want := map[netip.Prefix]abi.Range{p("10.8.0.0/24"): known, p("10.0.0.0/8"): {Identity: 300}, p("192.0.2.0/24"): {Identity: 301}, p("10.9.0.128/25"): {Identity: 302}}
	l.must(d.SetRanges(want))
	isKnown := func(ip string) bool {
		var r abi.Range
		l.must(pinnedMap(l, "ranges").Lookup(&abi.RangeKey{Prefixlen: 128, Addr: datapath.Addr(netip.MustParseAddr(ip))}, &r))
		return r.Flags&uint32(abi.RangeKnown) != 0
	}
	more := maps.Clone(want)
	delete(more, p("10.9.0.128/25")) // a known range covers it, as FoldRanges has it
	for _, range_ := range []string{"10.9.0.0/24", "10.10.0.0/24", "fd09::/64", "fd0b::/64"} {
		more[p(range_)] = known
	}
	for range 2 { // it may be repeated
		if err := d.SetRanges(more); !errors.Is(err, datapath.ErrMapFull) {
			t.Fatalf("four ranges, and room for one: %v", err)
		}
		for _, ip := range []string{"10.8.0.7", "10.9.0.7", "10.9.0.200", "10.10.0.7", "fd09::7", "fd0b::7"} {
			if !isKnown(ip) {
				t.Errorf("%s is the world's", ip)
			}
		}
		if isKnown("192.0.2.7") {
			t.Error("what is around no such range is shut")
		}
	}
	delete(more, p("192.0.2.0/24"))
	delete(more, p("10.10.0.0/24"))
	delete(more, p("fd0b::/64"))
	delete(want, p("192.0.2.0/24"))
	delete(want, p("10.9.0.128/25"))
	l.must(d.SetRanges(want)) // what is not wanted any more has to go first
	l.must(d.SetRanges(more))
	for ip, want := range map[string]bool{"10.8.0.7": true, "10.9.0.7": true, "10.10.0.7": false, "fd09::7": true, "fd0a::7": false, "192.0.2.7": false} {
		if isKnown(ip) != want {
			t.Errorf("%s: known %v, want %v", ip, !want, want)
		}
	}
}
