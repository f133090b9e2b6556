package lab

import (
	"crypto/rand"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"slices"
	"strconv"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netns"
	"golang.org/x/sys/unix"
)

const (
	maxNodes    = 200
	uplink      = "eth0" // of a node
	bridgeName  = "underlay"
	maxHostName = 15 // of a device
)

// underlayPrefixes hold the nodes' own addresses.
var underlayPrefixes = prefixes("172.30.0.0/24", "fd00:30::/64")

// A workload's way out: an address on its link that answers for everything.
// Both sides know each other's MAC from the start, so no ARP or ND is needed,
// and none can be spoofed.
var (
	gateway4 = netip.MustParseAddr("169.254.1.1")
	gateway6 = netip.MustParseAddr("fe80::1")
)

// prefLocal is where a node's `local` table is looked up: after the rules of
// cuts, so that a cut drops what arrives, in silence, as a broken cable would.
const (
	prefCut   = 10
	prefLocal = 100
)

func nodeIPs(index int) []netip.Addr {
	var out []netip.Addr
	for _, p := range underlayPrefixes {
		out = append(out, addOffset(p.Addr(), uint64(10+index)))
	}
	return out
}

// nodeMAC is fixed by the index, so that nodes can know each other's.
func nodeMAC(index int) net.HardwareAddr {
	return net.HardwareAddr{0x02, 0x50, 0x43, 0, byte(index >> 8), byte(index)}
}

func (l *Lab) underlayNS() string        { return netnsDir + "/pc." + l.name + ".underlay" }
func (l *Lab) nodeNS(node string) string { return netnsDir + "/pc." + l.name + ".n." + node }
func (l *Lab) proxyNS(node string) string {
	return netnsDir + "/pc." + l.name + ".p." + node
}
func (l *Lab) workloadNS(w Workload) string {
	return netnsDir + "/pc." + l.name + ".w." + w.Namespace + "." + w.Name
}

// makeUnderlay makes the bridge that joins the nodes.
func (l *Lab) makeUnderlay() error {
	return createNamespace(l.underlayNS(), func() error {
		if err := sysctl("ipv6/conf/all/disable_ipv6", "1"); err != nil {
			return err
		}
		attrs := netlink.NewLinkAttrs()
		attrs.Name = bridgeName
		snooping := false // nothing here joins multicast groups
		br := &netlink.Bridge{LinkAttrs: attrs, MulticastSnooping: &snooping}
		if err := netlink.LinkAdd(br); err != nil {
			return fmt.Errorf("make the underlay bridge: %w", err)
		}
		return netlink.LinkSetUp(br)
	})
}

// makeNode makes a node's namespace: a router with an uplink, and routes to
// the ranges of every other node.
func (l *Lab) makeNode(n *nodeState, all []*nodeState) error {
	if err := createNamespace(l.nodeNS(n.Name), nodeSysctls); err != nil {
		return err
	}
	return inNamespace(l.nodeNS(n.Name), func() error {
		bridgeNS, err := netns.GetFromPath(l.underlayNS())
		if err != nil {
			return err
		}
		defer bridgeNS.Close()
		port := "n" + strconv.Itoa(n.Index)
		attrs := netlink.NewLinkAttrs()
		attrs.Name, attrs.HardwareAddr = uplink, nodeMAC(n.Index)
		veth := netlink.NewVeth(attrs)
		veth.PeerName, veth.PeerNamespace = port, netlink.NsFd(int(bridgeNS))
		if err := netlink.LinkAdd(veth); err != nil {
			return fmt.Errorf("make the uplink of node %s: %w", n.Name, err)
		}
		if err := l.plug(port); err != nil {
			return err
		}
		if err := upWithAddresses(uplink, n.IPs, []int{24, 64}); err != nil {
			return err
		}
		if err := cuttable(); err != nil {
			return err
		}
		link, err := netlink.LinkByName(uplink)
		if err != nil {
			return err
		}
		for _, o := range all {
			if o.Name == n.Name {
				continue
			}
			if err := routeToNode(link, o); err != nil {
				return err
			}
		}
		return nil
	})
}

func nodeSysctls() error {
	for _, kv := range [][2]string{
		{"ipv4/ip_forward", "1"}, {"ipv6/conf/all/forwarding", "1"},
		{"ipv4/conf/all/rp_filter", "0"}, {"ipv4/conf/default/rp_filter", "0"},
		{"ipv4/conf/all/send_redirects", "0"}, {"ipv4/conf/default/send_redirects", "0"},
		// No link-local addresses, no duplicate-address detection: nothing
		// is sent that nobody asked for, and addresses serve at once.
		{"ipv6/conf/default/addr_gen_mode", "1"}, {"ipv6/conf/default/accept_dad", "0"},
		{"ipv6/conf/default/accept_ra", "0"},
	} {
		if err := sysctl(kv[0], kv[1]); err != nil {
			return err
		}
	}
	return linkUp("lo")
}

func linkUp(name string) error {
	link, err := netlink.LinkByName(name)
	if err != nil {
		return fmt.Errorf("device %s: %w", name, err)
	}
	return netlink.LinkSetUp(link)
}

// plug attaches a node's port to the bridge.
func (l *Lab) plug(port string) error {
	h, err := handleAt(l.underlayNS())
	if err != nil {
		return err
	}
	defer h.Close()
	br, err := h.LinkByName(bridgeName)
	if err != nil {
		return err
	}
	p, err := h.LinkByName(port)
	if err != nil {
		return err
	}
	if err := h.LinkSetMaster(p, br); err != nil {
		return fmt.Errorf("plug %s into the underlay: %w", port, err)
	}
	return h.LinkSetUp(p)
}

// upWithAddresses gives the device its addresses, in the thread's namespace.
func upWithAddresses(dev string, ips []netip.Addr, bits []int) error {
	link, err := netlink.LinkByName(dev)
	if err != nil {
		return err
	}
	for i, ip := range ips {
		a := &netlink.Addr{IPNet: ipnet(netip.PrefixFrom(ip, bits[i]))}
		if ip.Is6() {
			a.Flags = unix.IFA_F_NODAD
		}
		if err := netlink.AddrAdd(link, a); err != nil {
			return fmt.Errorf("address %v on %s: %w", ip, dev, err)
		}
	}
	return netlink.LinkSetUp(link)
}

// cuttable moves the lookup of the local table behind the place for cuts.
func cuttable() error {
	for _, family := range []int{unix.AF_INET, unix.AF_INET6} {
		r := netlink.NewRule()
		r.Family, r.Priority, r.Table = family, prefLocal, unix.RT_TABLE_LOCAL
		if err := netlink.RuleAdd(r); err != nil {
			return fmt.Errorf("routing rule: %w", err)
		}
		r.Priority = 0
		if err := netlink.RuleDel(r); err != nil {
			return fmt.Errorf("routing rule: %w", err)
		}
	}
	return nil
}

func routeToNode(link netlink.Link, o *nodeState) error {
	for _, ip := range o.IPs {
		if err := netlink.NeighSet(neighbour(link, ip, nodeMAC(o.Index))); err != nil {
			return fmt.Errorf("neighbour %v: %w", ip, err)
		}
	}
	for _, r := range o.Ranges {
		i := slices.IndexFunc(o.IPs, func(ip netip.Addr) bool { return ip.Is4() == r.Addr().Is4() })
		if err := netlink.RouteReplace(&netlink.Route{LinkIndex: link.Attrs().Index, Dst: ipnet(r), Gw: o.IPs[i].AsSlice()}); err != nil {
			return fmt.Errorf("route to %v: %w", r, err)
		}
	}
	return nil
}

func neighbour(link netlink.Link, ip netip.Addr, mac net.HardwareAddr) *netlink.Neigh {
	family := unix.AF_INET
	if ip.Is6() {
		family = unix.AF_INET6
	}
	return &netlink.Neigh{LinkIndex: link.Attrs().Index, Family: family, State: netlink.NUD_PERMANENT,
		IP: ip.AsSlice(), HardwareAddr: mac}
}

func ipnet(p netip.Prefix) *net.IPNet {
	return &net.IPNet{IP: p.Addr().AsSlice(), Mask: net.CIDRMask(p.Bits(), p.Addr().BitLen())}
}

func host(ip netip.Addr) netip.Prefix { return netip.PrefixFrom(ip, ip.BitLen()) }

func randomMAC() net.HardwareAddr {
	mac := make(net.HardwareAddr, 6)
	rand.Read(mac)
	mac[0] = mac[0]&^1 | 2 // unicast, locally administered
	return mac
}

// makeWorkload makes the workload's namespace and its veth. Nothing leads to it
// before route.
func (l *Lab) makeWorkload(w *workloadState) error {
	path := l.workloadNS(w.Spec)
	if err := createNamespace(path, workloadSysctls); err != nil {
		return err
	}
	mac, err := net.ParseMAC(w.MAC)
	if err != nil {
		return err
	}
	hostMAC := randomMAC()

	ns, err := netns.GetFromPath(path)
	if err != nil {
		return err
	}
	defer ns.Close()
	node, err := handleAt(l.nodeNS(w.Spec.Node))
	if err != nil {
		return err
	}
	defer node.Close()
	attrs := netlink.NewLinkAttrs()
	attrs.Name, attrs.HardwareAddr = w.HostIf, hostMAC
	veth := netlink.NewVeth(attrs)
	veth.PeerName, veth.PeerHardwareAddr, veth.PeerNamespace = "eth0", mac, netlink.NsFd(int(ns))
	if err := node.LinkAdd(veth); err != nil {
		return fmt.Errorf("make the veth of %s: %w", w.Spec.FullName(), err)
	}
	if err := inNamespace(path, func() error { return configureWorkload(w.IPs, hostMAC) }); err != nil {
		return fmt.Errorf("workload %s: %w", w.Spec.FullName(), err)
	}
	link, err := node.LinkByName(w.HostIf)
	if err != nil {
		return err
	}
	for _, ip := range w.IPs {
		if err := node.NeighSet(neighbour(link, ip, mac)); err != nil {
			return fmt.Errorf("neighbour %v: %w", ip, err)
		}
	}
	return node.LinkSetUp(link)
}

func workloadSysctls() error {
	for _, kv := range [][2]string{
		{"ipv6/conf/default/addr_gen_mode", "1"}, {"ipv6/conf/default/accept_dad", "0"},
		{"ipv6/conf/default/accept_ra", "0"},
		{"ipv4/ping_group_range", "0 2147483647"},
		{"ipv4/ip_unprivileged_port_start", "0"},
	} {
		if err := sysctl(kv[0], kv[1]); err != nil {
			return err
		}
	}
	return linkUp("lo")
}

// configureWorkload runs inside: a host address per family, and one gateway
// for everything, whose MAC is known.
func configureWorkload(ips []netip.Addr, hostMAC net.HardwareAddr) error {
	var bits []int
	for _, ip := range ips {
		bits = append(bits, ip.BitLen())
	}
	if err := upWithAddresses("eth0", ips, bits); err != nil {
		return err
	}
	link, err := netlink.LinkByName("eth0")
	if err != nil {
		return err
	}
	for _, ip := range ips {
		gw, all := gateway4, netip.PrefixFrom(netip.IPv4Unspecified(), 0)
		if ip.Is6() {
			gw, all = gateway6, netip.PrefixFrom(netip.IPv6Unspecified(), 0)
		}
		if err := netlink.NeighSet(neighbour(link, gw, hostMAC)); err != nil {
			return fmt.Errorf("neighbour %v: %w", gw, err)
		}
		if err := netlink.RouteReplace(&netlink.Route{LinkIndex: link.Attrs().Index, Dst: ipnet(all), Gw: gw.AsSlice(),
			Flags: int(netlink.FLAG_ONLINK), Src: ip.AsSlice()}); err != nil {
			return fmt.Errorf("default route by %v: %w", gw, err)
		}
	}
	return nil
}

// route leads the workload's addresses to it, away from any other workload
// that had them.
func (l *Lab) route(w *workloadState) error {
	node, err := handleAt(l.nodeNS(w.Spec.Node))
	if err != nil {
		return err
	}
	defer node.Close()
	link, err := node.LinkByName(w.HostIf)
	if err != nil {
		return fmt.Errorf("device %s of %s: %w", w.HostIf, w.Spec.FullName(), err)
	}
	for _, ip := range w.IPs {
		r := &netlink.Route{LinkIndex: link.Attrs().Index, Dst: ipnet(host(ip)), Scope: netlink.SCOPE_LINK}
		if ip.Is6() {
			r.Scope = netlink.SCOPE_UNIVERSE
		}
		if err := node.RouteReplace(r); err != nil {
			return fmt.Errorf("route to %v: %w", ip, err)
		}
	}
	return nil
}

// removeWorkloadLink removes the veth, both ends at once, and its routes. One
// that is gone, perhaps with its node, is no error.
func (l *Lab) removeWorkloadLink(w *workloadState) error {
	if !isNamespace(l.nodeNS(w.Spec.Node)) {
		return nil
	}
	node, err := handleAt(l.nodeNS(w.Spec.Node))
	if err != nil {
		return err
	}
	defer node.Close()
	link, err := node.LinkByName(w.HostIf)
	if errors.As(err, &netlink.LinkNotFoundError{}) {
		return nil
	}
	if err != nil {
		return err
	}
	return node.LinkDel(link)
}
