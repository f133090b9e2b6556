package netdev

import (
	"net/netip"
	"slices"
	"testing"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netns"
	"golang.org/x/sys/unix"
)

// Two workloads whose devices have the same name, and a veth whose other end
// is here.
func TestPeers(t *testing.T) {
	newNamespace(t)
	addVeth(t, "both")
	here, err := netns.Get()
	must(t, err)
	defer here.Close()
	if peers, err := Peers(); err != nil || len(peers) != 0 {
		t.Fatalf("without workloads: %+v, %v", peers, err)
	}
	want := map[string][]netip.Addr{
		"w1": {netip.MustParseAddr("10.9.0.1"), netip.MustParseAddr("fd00:9::1")},
		"w2": {netip.MustParseAddr("10.9.0.2")},
	}
	macs := map[string][6]byte{}
	for name, ips := range want {
		ns, err := netns.New() // and the thread is in it
		must(t, err)
		defer ns.Close()
		must(t, netns.Set(here))
		must(t, netlink.LinkAdd(&netlink.Veth{LinkAttrs: netlink.LinkAttrs{Name: name}, PeerName: "eth0", PeerNamespace: netlink.NsFd(ns)}))
		must(t, netns.Set(ns))
		eth0, err := netlink.LinkByName("eth0")
		must(t, err)
		macs[name] = [6]byte(eth0.Attrs().HardwareAddr)
		must(t, netlink.LinkSetUp(eth0))
		for _, ip := range ips {
			a, err := netlink.ParseAddr(netip.PrefixFrom(ip, ip.BitLen()).String())
			must(t, err)
			a.Flags = unix.IFA_F_NODAD
			must(t, netlink.AddrAdd(eth0, a))
		}
		must(t, netns.Set(here))
	}
	peers, err := Peers()
	must(t, err)
	if len(peers) != len(want) {
		t.Errorf("%d peers, want %d: %+v", len(peers), len(want), peers)
	}
	for _, p := range peers {
		name := p.Device.Name
		if !slices.Equal(p.IPs, want[name]) || p.MAC != macs[name] || p.MAC == [6]byte{} || p.Ifindex == 0 || p.Name != "eth0" {
			t.Errorf("%s: %+v, want the addresses %v and %v", name, p, want[name], macs[name])
		}
		if d, err := ByName(name); err != nil || d.Ifindex != p.Device.Ifindex {
			t.Errorf("%s: index %d: %+v, %v", name, p.Device.Ifindex, d, err)
		}
	}
}
