package main

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"runtime"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netns"
	"golang.org/x/sys/unix"
)

const (
	maxOwners = 2000
	// wideOwners is how many owners may have a /16 each; more have a /22.
	wideOwners = 200
	// skipped: a range's first addresses look like a network's.
	skipped = 256
)

// rangeBits is the binary logarithm of an owner's range's size.
func rangeBits(owners int) int {
	if owners > wideOwners {
		return 10
	}
	return 16
}

// perOwner is how many addresses of a range are used.
func perOwner(owners int) int { return 1<<rangeBits(owners) - 2*skipped }

var (
	agentIP    = netip.MustParseAddr("172.31.0.10")
	podRange   = netip.MustParsePrefix("10.9.0.0/24")
	podIP      = netip.MustParseAddr("10.9.0.5")
	podMAC     = net.HardwareAddr{2, 0x50, 0x43, 1, 0, 1}
	podHostMAC = net.HardwareAddr{2, 0x50, 0x43, 1, 0, 2}
	ownersMAC  = net.HardwareAddr{2, 0x50, 0x43, 1, 0, 3}
	gateway    = netip.MustParseAddr("169.254.1.1")
)

const (
	podPort  = 5000
	hostSide = "pod0"
)

func ownerIP(i int) netip.Addr {
	return netip.AddrFrom4([4]byte{172, 31, byte(1 + i/250), byte(1 + i%250)})
}

// place returns an address by its number from 10.20.0.0 on.
func place(n int) netip.Addr {
	return netip.AddrFrom4([4]byte{10, byte(20 + n>>16), byte(n >> 8), byte(n)})
}

func ownerRange(i, owners int) netip.Prefix {
	bits := rangeBits(owners)
	return netip.PrefixFrom(place(i<<bits), 32-bits)
}

// remote returns the n-th remote address: they go round the owners.
func remote(n, owners int) netip.Addr {
	return place((n%owners)<<rangeBits(owners) + n/owners + skipped)
}

// number is remote's inverse.
func number(a netip.Addr, owners int) int {
	b, bits := a.As4(), rangeBits(owners)
	at := int(b[1]-20)<<16 | int(b[2])<<8 | int(b[3])
	return (at&(1<<bits-1)-skipped)*owners + at>>bits
}

// network is what the agent lives in.
type network struct{ agent, pod netns.NsHandle }

// newNetwork makes the namespaces and what joins them. This process is in the
// outer one.
func newNetwork(owners int) (n *network, err error) {
	n = &network{}
	for _, h := range []*netns.NsHandle{&n.agent, &n.pod} {
		*h = netns.None()
		if err := onThread(func() (err error) { *h, err = netns.New(); return err }); err != nil {
			n.close()
			return nil, fmt.Errorf("make a network namespace: %w", err)
		}
	}
	if err := errors.Join(n.outside(owners), n.inAgent(func() error { return n.node(owners) }), n.inPod(pod)); err != nil {
		n.close()
		return nil, err
	}
	return n, nil
}

func (n *network) close() {
	for _, h := range []*netns.NsHandle{&n.agent, &n.pod} {
		if h.IsOpen() {
			h.Close()
		}
	}
	if l, err := netlink.LinkByName("net0"); err == nil {
		netlink.LinkDel(l)
	}
}

func (n *network) inAgent(f func() error) error { return within(n.agent, f) }
func (n *network) inPod(f func() error) error   { return within(n.pod, f) }

// onThread runs f on a thread that ends with it.
func onThread(f func() error) error {
	done := make(chan error, 1)
	go func() {
		runtime.LockOSThread()
		done <- f()
	}()
	return <-done
}

func within(ns netns.NsHandle, f func() error) error {
	return onThread(func() error {
		if err := netns.Set(ns); err != nil {
			return err
		}
		return f()
	})
}

func (n *network) outside(owners int) error {
	if err := up("lo"); err != nil {
		return err
	}
	attrs := netlink.NewLinkAttrs()
	attrs.Name, attrs.HardwareAddr = "net0", ownersMAC
	veth := netlink.NewVeth(attrs)
	veth.PeerName, veth.PeerNamespace = "eth0", netlink.NsFd(int(n.agent))
	if err := netlink.LinkAdd(veth); err != nil {
		return err
	}
	for i := range owners {
		if err := address("net0", netip.PrefixFrom(ownerIP(i), 16)); err != nil {
			return err
		}
	}
	if err := n.inAgent(func() error { return up("eth0") }); err != nil {
		return err
	}
	if err := up("net0"); err != nil {
		return err
	}
	return route("net0", podRange, agentIP)
}

// node sets up the agent's namespace: a router.
func (n *network) node(owners int) error {
	for _, kv := range [][2]string{{"ipv4/ip_forward", "1"}, {"ipv4/conf/all/rp_filter", "0"}, {"ipv4/conf/eth0/rp_filter", "0"}, {"ipv6/conf/all/disable_ipv6", "1"}} {
		if err := os.WriteFile("/proc/sys/net/"+kv[0], []byte(kv[1]), 0); err != nil {
			return err
		}
	}
	attrs := netlink.NewLinkAttrs()
	attrs.Name, attrs.HardwareAddr = hostSide, podHostMAC
	veth := netlink.NewVeth(attrs)
	veth.PeerName, veth.PeerHardwareAddr, veth.PeerNamespace = "eth0", podMAC, netlink.NsFd(int(n.pod))
	err := errors.Join(up("lo"), address("eth0", netip.PrefixFrom(agentIP, 16)), netlink.LinkAdd(veth), up(hostSide),
		route(hostSide, netip.PrefixFrom(podIP, 32), netip.Addr{}), neighbour(hostSide, podIP, podMAC))
	for i := range owners {
		// Known for good: the kernel's table of neighbours has a bound.
		err = errors.Join(err, neighbour("eth0", ownerIP(i), ownersMAC), route("eth0", ownerRange(i, owners), ownerIP(i)))
	}
	return err
}

func pod() error {
	return errors.Join(os.WriteFile("/proc/sys/net/ipv6/conf/all/disable_ipv6", []byte("1"), 0), up("lo"),
		address("eth0", netip.PrefixFrom(podIP, 32)), up("eth0"), neighbour("eth0", gateway, podHostMAC),
		route("eth0", netip.PrefixFrom(netip.IPv4Unspecified(), 0), gateway))
}

func up(dev string) error {
	l, err := netlink.LinkByName(dev)
	if err != nil {
		return fmt.Errorf("device %s: %w", dev, err)
	}
	return netlink.LinkSetUp(l)
}

func ipnet(p netip.Prefix) *net.IPNet {
	return &net.IPNet{IP: p.Addr().AsSlice(), Mask: net.CIDRMask(p.Bits(), p.Addr().BitLen())}
}

func address(dev string, p netip.Prefix) error {
	l, err := netlink.LinkByName(dev)
	if err != nil {
		return err
	}
	if err := netlink.AddrAdd(l, &netlink.Addr{IPNet: ipnet(p)}); err != nil {
		return fmt.Errorf("address %v on %s: %w", p, dev, err)
	}
	return nil
}

func route(dev string, to netip.Prefix, via netip.Addr) error {
	l, err := netlink.LinkByName(dev)
	if err != nil {
		return err
	}
	r := &netlink.Route{LinkIndex: l.Attrs().Index, Dst: ipnet(to), Scope: netlink.SCOPE_LINK}
	if via.IsValid() {
		r.Gw, r.Scope, r.Flags = via.AsSlice(), netlink.SCOPE_UNIVERSE, int(netlink.FLAG_ONLINK)
	}
	if err := netlink.RouteReplace(r); err != nil {
		return fmt.Errorf("route to %v: %w", to, err)
	}
	return nil
}

func neighbour(dev string, ip netip.Addr, mac net.HardwareAddr) error {
	l, err := netlink.LinkByName(dev)
	if err != nil {
		return err
	}
	return netlink.NeighSet(&netlink.Neigh{LinkIndex: l.Attrs().Index, Family: unix.AF_INET, State: netlink.NUD_PERMANENT, IP: ip.AsSlice(), HardwareAddr: mac})
}
