package datapath_test

import (
	"errors"
	"maps"
	"net/netip"
	"slices"
	"testing"

	"github.com/vishvananda/netlink"

	"portcullis/bpf/abi"
	"portcullis/datapath"
)

// A workload that forwards sends and receives under the prefixes listed for it,
// and under no others; they end with the endpoint.
func TestSources(t *testing.T) {
	l := newLab(t)
	d := l.open()
	ep := l.serve(d)
	l.confirm(d, 1, remote4)
	inner, outer := netip.MustParseAddr("10.7.0.5"), netip.MustParseAddr("10.6.0.5")
	l.in(l.workload, func() {
		lo, err := netlink.LinkByName("lo")
		l.must(err)
		for _, ip := range []netip.Addr{inner, outer} {
			a, err := netlink.ParseAddr(ip.String() + "/32")
			l.must(err)
			l.must(netlink.AddrAdd(lo, a))
		}
	})
	for _, ip := range []netip.Addr{inner, outer} {
		l.must(netlink.RouteAdd(&netlink.Route{Dst: netlink.NewIPNet(ip.AsSlice()), Gw: workload4.AsSlice()}))
	}
	from, other := l.udp(l.workload, inner, 7000), l.udp(l.workload, outer, 7000)
	peer := l.udp(l.remote, remote4, 5000)
	spoofed := func() uint64 { return dropped(l, d, abi.DirEgress, abi.ReasonSpoofed) }

	// ARP speaks of its own addresses only, so the gateway is asked for first.
	l.send(l.udp(l.workload, workload4, 7001), remote4, 5000, "own")
	l.receive(peer, "own")
	l.send(from, remote4, 5000, "not listed")
	l.eventually("a drop", func() bool { return spoofed() == 1 })
	prefix := netip.MustParsePrefix
	l.must(d.SetSources(ep.ID, []netip.Prefix{prefix("10.7.0.5/16"), prefix("fd07::/64")}))
	l.send(from, remote4, 5000, "listed, but it does not forward")
	l.eventually("a drop", func() bool { return spoofed() == 2 })
	ep.Flags |= uint32(abi.EPForwards)
	l.must(d.SetEndpoint(ep))
	l.send(from, remote4, 5000, "listed")
	l.receive(peer, "listed")
	l.send(peer, inner, 7000, "back")
	l.receive(from, "back")
	l.send(other, remote4, 5000, "another")
	l.eventually("a drop", func() bool { return spoofed() == 3 })

	list := func() []abi.SourceKey {
		return slices.Collect(maps.Keys(contents[abi.SourceKey, abi.Source](l, "sources")))
	}
	l.must(d.SetSources(ep.ID+7, []netip.Prefix{prefix("10.6.0.0/16")})) // another's
	l.must(d.SetSources(ep.ID, []netip.Prefix{prefix("fd07::/64")}))
	l.must(d.SetSources(ep.ID, []netip.Prefix{prefix("fd07::/64")})) // it may be repeated
	if got := list(); len(got) != 2 {
		t.Errorf("sources %+v", got)
	}
	l.send(from, remote4, 5000, "not any more")
	l.eventually("a drop", func() bool { return spoofed() == 4 })
	l.nothing(peer)
	if err := d.SetSources(ep.ID, []netip.Prefix{{}}); err == nil {
		t.Error("no prefix was taken for a source")
	}
	if err := d.SetSources(0, nil); err == nil {
		t.Error("endpoint 0 was taken")
	}

	// A next agent finds what belongs to an endpoint, and clears the rest.
	l.must(d.Close())
	cfg := l.config()
	cfg.Sources = 3
	d, err := datapath.Open(cfg)
	l.must(err)
	t.Cleanup(func() { l.must(d.Close()) })
	if got := list(); len(got) != 1 || got[0].Endpoint != ep.ID || datapath.AddrFrom(got[0].Addr) != netip.MustParseAddr("fd07::") || got[0].Prefixlen != 32+64 {
		t.Errorf("sources %+v", got)
	}
	var many []netip.Prefix
	for i := range 4 {
		many = append(many, netip.PrefixFrom(netip.AddrFrom4([4]byte{10, 7, byte(i), 0}), 24))
	}
	if err := d.SetSources(ep.ID, many); !errors.Is(err, datapath.ErrMapFull) {
		t.Errorf("too many sources: %v", err)
	}
	dev, err := netlink.LinkByName("wl0")
	l.must(err)
	l.must(netlink.LinkDel(dev))
	l.must(d.RemoveEndpoint(ep.Ifindex))
	if got := list(); len(got) != 0 {
		t.Errorf("sources of an ended endpoint: %+v", got)
	}
}
