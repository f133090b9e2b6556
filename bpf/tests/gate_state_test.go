package tests

import (
	"net/netip"
	"sync/atomic"
	"testing"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"

	"portcullis/bpf/abi"
)

// TestNoEndpoint: a device without an endpoint, and a closed gate, let nothing
// through; not ARP either.
func TestNoEndpoint(t *testing.T) {
	eachFamily(t, func(t *testing.T, f family) {
		for name, change := range map[string]func(g *gate, ep abi.Endpoint){
			"none":          func(g *gate, ep abi.Endpoint) { g.delete("endpoints", g.pod) },
			"closed":        func(g *gate, ep abi.Endpoint) { ep.State = uint32(abi.EPClosed); g.put("endpoints", g.pod, ep) },
			"unknown state": func(g *gate, ep abi.Endpoint) { ep.State = 9; g.put("endpoints", g.pod, ep) },
			"id zero":       func(g *gate, ep abi.Endpoint) { ep.ID = 0; g.put("endpoints", g.pod, ep) },
			"recycled":      func(g *gate, ep abi.Endpoint) { ep.Ifindex = g.pod2; g.put("endpoints", g.pod, ep) },
		} {
			t.Run(name, func(t *testing.T) {
				g := newGate(t)
				ep := g.endpoint(g.pod, f, f.pod, 0)
				out, in := tcp(f.pod, 1, f.peer, 2, syn), tcp(f.peer, 2, f.pod, 1, syn|ack)
				g.pass(g.from(g.pod, out))
				g.pass(g.to(g.pod, g.uplink, in))
				change(g, ep)
				g.drop(g.from(g.pod, out), abi.ReasonNoEndpoint)
				g.drop(g.to(g.pod, g.uplink, in), abi.ReasonNoEndpoint)
				g.drop(g.from(g.pod, arp(1, podMAC, families[0].pod, families[0].node)), abi.ReasonNoEndpoint)
				g.drop(g.to(g.pod, 0, arp(1, hostMAC, families[0].node, families[0].pod)), abi.ReasonNoEndpoint)
				g.drop(g.from(g.pod, []byte("a frame that is nothing")), abi.ReasonNoEndpoint)
			})
		}
	})
}

// TestSpoofing: a workload sends under its own addresses only (I1).
func TestSpoofing(t *testing.T) {
	v4, v6 := families[0], families[1]
	for _, tt := range []struct {
		name   string
		f      family
		flags  abi.EndpointFlag
		packet []byte
		reason abi.Reason
	}{
		{"own IPv4", v4, 0, udp(v4.pod, 1, v4.peer, 2), 0},
		{"own IPv6", v6, 0, udp(v6.pod, 1, v6.peer, 2), 0},
		{"a neighbour's IPv4", v4, 0, udp(v4.pod2, 1, v4.peer, 2), abi.ReasonSpoofed},
		{"a neighbour's IPv6", v6, 0, udp(v6.pod2, 1, v6.peer, 2), abi.ReasonSpoofed},
		{"IPv6 without having one", v4, 0, udp(v6.pod, 1, v6.peer, 2), abi.ReasonSpoofed},
		{"IPv4 without having one", v6, 0, udp(v4.pod, 1, v4.peer, 2), abi.ReasonSpoofed},
		{"unspecified IPv4", v6, 0, udp(ip("0.0.0.0"), 68, ip("255.255.255.255"), 67), abi.ReasonSpoofed},
		{"unspecified IPv6", v4, 0, udp(ip("::"), 1, v6.peer, 2), abi.ReasonSpoofed},
		{"link-local", v6, 0, udp(ip("fe80::1"), 1, v6.peer, 2), abi.ReasonSpoofed},
		{"echo", v4, 0, icmpEcho(v4, v4.pod2, v4.peer, 8, 1), abi.ReasonSpoofed},
		{"multicast IPv4", v4, 0, udp(ip("224.0.0.1"), 1, v4.peer, 2), abi.ReasonSpoofed},
		{"own MAC", v4, abi.EPCheckMac, udp(v4.pod, 1, v4.peer, 2), 0},
		{"another MAC, unchecked", v4, 0, withMAC(udp(v4.pod, 1, v4.peer, 2), pod2MAC), 0},
		{"another MAC", v4, abi.EPCheckMac, withMAC(udp(v4.pod, 1, v4.peer, 2), pod2MAC), abi.ReasonSpoofed},
		{"another MAC, IPv6", v6, abi.EPCheckMac, withMAC(udp(v6.pod, 1, v6.peer, 2), pod2MAC), abi.ReasonSpoofed},
		{"another MAC, last byte", v6, abi.EPCheckMac, withMAC(udp(v6.pod, 1, v6.peer, 2), [6]byte{2, 0xaa, 0, 0, 0, 9}), abi.ReasonSpoofed},
	} {
		t.Run(tt.name, func(t *testing.T) {
			g := newGate(t)
			g.endpoint(g.pod, tt.f, tt.f.pod, tt.flags)
			r := g.from(g.pod, tt.packet)
			v := drop
			if tt.reason == 0 {
				v = pass
			}
			g.want(r, v, tt.reason)
			if n := len(g.flows()); n != 0 && v == drop {
				t.Errorf("%d entries", n)
			}
		})
	}
}

func withMAC(p []byte, mac [6]byte) []byte { copy(p[6:], mac[:]); return p }

// TestQuarantine: neither sends nor receives; ARP and duplicate-address
// detection excepted (I1).
func TestQuarantine(t *testing.T) {
	v4, v6 := families[0], families[1]
	allNodes := ip("ff02::1")
	for _, f := range families {
		g := newGate(t)
		ep := g.endpoint(g.pod, f, f.pod, 0)
		out, in := udp(f.pod, 1, f.peer, 2), udp(f.peer, 2, f.pod, 1)
		g.pass(g.from(g.pod, out))
		ep.State = uint32(abi.EPQuarantined)
		g.put("endpoints", g.pod, ep)
		g.drop(g.from(g.pod, out), abi.ReasonQuarantined)
		g.drop(g.to(g.pod, g.uplink, in), abi.ReasonQuarantined)
		g.drop(g.reinject(g.pod, in), abi.ReasonQuarantined)
		g.drop(g.to(g.pod, g.uplink, icmpError(f, f.world, f.pod, 3, out[14:])), abi.ReasonQuarantined)
		g.drop(g.from(g.pod, []byte("a frame that is nothing")), abi.ReasonQuarantined)
		if f.is6 {
			g.pass(g.from(g.pod, nd(135, ip("::"), ip("ff02::1:ff00:5"), v6.pod, 255)))
			g.drop(g.from(g.pod, nd(135, ip("::"), ip("ff02::1:ff00:6"), v6.pod2, 255)), abi.ReasonSpoofed)
			g.drop(g.from(g.pod, nd(135, ip("::"), ip("ff02::1:ff00:5"), v6.pod, 64)), abi.ReasonQuarantined)
			g.drop(g.from(g.pod, nd(135, v6.pod, ip("ff02::1:ff00:1"), v6.node, 255)), abi.ReasonQuarantined)
			g.drop(g.from(g.pod, nd(136, v6.pod, allNodes, v6.pod, 255)), abi.ReasonQuarantined)
			g.drop(g.from(g.pod, nd(133, ip("::"), ip("ff02::2"), ip("::"), 255)), abi.ReasonQuarantined)
			g.pass(g.to(g.pod, 0, nd(135, ip("::"), ip("ff02::1:ff00:5"), v6.pod, 255)))
			g.pass(g.to(g.pod, 0, nd(136, v6.pod2, allNodes, v6.pod, 255)))
			g.drop(g.to(g.pod, 0, nd(135, v6.node, ip("ff02::1:ff00:5"), v6.pod, 255)), abi.ReasonQuarantined)
			g.drop(g.to(g.pod, 0, nd(136, v6.node, v6.pod, v6.node, 255)), abi.ReasonQuarantined)
		} else {
			g.pass(g.from(g.pod, arp(1, podMAC, v4.pod, v4.node)))
			g.pass(g.to(g.pod, 0, arp(2, hostMAC, v4.node, v4.pod)))
			g.drop(g.from(g.pod, arp(2, podMAC, v4.node, v4.pod)), abi.ReasonSpoofed)
		}
		ep.State = uint32(abi.EPActive)
		g.put("endpoints", g.pod, ep)
		g.pass(g.from(g.pod, out))
	}
}

// TestARP: a workload says only where its own address is.
func TestARP(t *testing.T) {
	f := families[0]
	zero := ip("0.0.0.0")
	for _, tt := range []struct {
		name   string
		flags  abi.EndpointFlag
		packet []byte
		reason abi.Reason
	}{
		{"asks for the gateway", 0, arp(1, podMAC, f.pod, f.node), 0},
		{"answers", 0, arp(2, podMAC, f.pod, f.node), 0},
		{"gratuitous request", 0, arp(1, podMAC, f.pod, f.pod), 0},
		{"gratuitous answer", 0, arp(2, podMAC, f.pod, f.pod), 0},
		{"probe for its own", 0, arp(1, podMAC, zero, f.pod), 0},
		{"probe for another's", 0, arp(1, podMAC, zero, f.pod2), abi.ReasonSpoofed},
		{"answers for the gateway", 0, arp(2, podMAC, f.node, f.pod2), abi.ReasonSpoofed},
		{"asks as another", 0, arp(1, podMAC, f.pod2, f.node), abi.ReasonSpoofed},
		{"gratuitous for another", 0, arp(1, podMAC, f.pod2, f.pod2), abi.ReasonSpoofed},
		{"answers for nobody", 0, arp(2, podMAC, zero, f.pod), abi.ReasonSpoofed},
		{"own MAC", abi.EPCheckMac, arp(2, podMAC, f.pod, f.node), 0},
		{"another's MAC in Ethernet and ARP", abi.EPCheckMac, arp(2, pod2MAC, f.pod, f.node), abi.ReasonSpoofed},
		{"another's MAC in ARP", abi.EPCheckMac, withMAC(arp(2, pod2MAC, f.pod, f.node), podMAC), abi.ReasonSpoofed},
		{"reverse ARP", 0, arp(3, podMAC, f.pod, f.node), abi.ReasonUnsupported},
		{"short", 0, arp(1, podMAC, f.pod, f.node)[:40], abi.ReasonMalformed},
		{"not of Ethernet", 0, patch(arp(1, podMAC, f.pod, f.node), 15, 6), abi.ReasonMalformed},
		{"not of IPv4", 0, patch(arp(1, podMAC, f.pod, f.node), 16, 0x86), abi.ReasonMalformed},
		{"odd lengths", 0, patch(arp(1, podMAC, f.pod, f.node), 19, 16), abi.ReasonMalformed},
	} {
		t.Run(tt.name, func(t *testing.T) {
			g := newGate(t)
			g.endpoint(g.pod, f, f.pod, tt.flags|enforceIn|enforceOut) // policy has no say
			v := drop
			if tt.reason == 0 {
				v = pass
			}
			r := g.from(g.pod, tt.packet)
			g.want(r, v, tt.reason)
			if v == pass && len(r.events) != 0 {
				t.Errorf("%d events", len(r.events))
			}
			if tt.reason == abi.ReasonMalformed {
				g.drop(g.to(g.pod, 0, tt.packet), abi.ReasonMalformed)
			} else {
				g.pass(g.to(g.pod, 0, tt.packet))
			}
		})
	}
}

func patch(p []byte, at int, v byte) []byte { p[at] = v; return p }

// TestND: the same in IPv6; routers are not workloads.
func TestND(t *testing.T) {
	f := families[1]
	zero, all, solicited := ip("::"), ip("ff02::1"), ip("ff02::1:ff00:1")
	ownLL, otherLL := ip("fe80::aa:ff:fe00:1"), ip("fe80::1")
	source := func(mac [6]byte) []byte { return append([]byte{1, 1}, mac[:]...) }
	target := func(mac [6]byte) []byte { return append([]byte{2, 1}, mac[:]...) }
	for _, tt := range []struct {
		name   string
		flags  abi.EndpointFlag
		packet []byte
		reason abi.Reason
	}{
		{"asks for the gateway", 0, nd(135, f.pod, solicited, f.node, 255, source(podMAC)...), 0},
		{"asks from link-local", 0, nd(135, ownLL, solicited, f.node, 255), 0},
		{"asks as another", 0, nd(135, f.pod2, solicited, f.node, 255), abi.ReasonSpoofed},
		{"answers for its own", 0, nd(136, f.pod, f.node, f.pod, 255, target(podMAC)...), 0},
		{"answers for its own from link-local", 0, nd(136, ownLL, f.node, f.pod, 255), 0},
		{"answers for another", 0, nd(136, f.pod, f.node, f.pod2, 255), abi.ReasonSpoofed},
		{"answers for the gateway", 0, nd(136, f.pod, all, f.node, 255), abi.ReasonSpoofed},
		{"answers as another", 0, nd(136, f.pod2, all, f.pod, 255), abi.ReasonSpoofed},
		{"DAD", 0, nd(135, zero, solicited, f.pod, 255), 0},
		{"DAD of its link-local", 0, nd(135, zero, solicited, ownLL, 255), 0},
		{"DAD of another's", 0, nd(135, zero, solicited, f.pod2, 255), abi.ReasonSpoofed},
		{"answers without address", 0, nd(136, zero, all, f.pod, 255), abi.ReasonSpoofed},
		{"looks for routers", 0, nd(133, ownLL, ip("ff02::2"), zero, 255), 0},
		{"looks for routers without address", 0, nd(133, zero, ip("ff02::2"), zero, 255), 0},
		{"looks for routers as another", 0, nd(133, f.pod2, ip("ff02::2"), zero, 255), abi.ReasonSpoofed},
		{"router advertisement", 0, nd(134, ownLL, all, zero, 255), abi.ReasonSpoofed},
		{"redirect", 0, nd(137, ownLL, f.pod2, f.node, 255), abi.ReasonSpoofed},
		{"has crossed a router", 0, nd(135, f.pod, solicited, f.node, 254), abi.ReasonMalformed},
		{"cut short", 0, shorten(nd(136, f.pod, f.node, f.pod, 255), 8), abi.ReasonMalformed},

		{"own link-local, MAC checked", abi.EPCheckMac, nd(136, ownLL, all, ownLL, 255, target(podMAC)...), 0},
		{"router's link-local, MAC checked", abi.EPCheckMac, nd(136, ownLL, all, otherLL, 255), abi.ReasonSpoofed},
		{"asks as the router, MAC checked", abi.EPCheckMac, nd(135, otherLL, solicited, f.pod2, 255), abi.ReasonSpoofed},
		{"another's MAC in the answer", abi.EPCheckMac, nd(136, f.pod, all, f.pod, 255, target(pod2MAC)...), abi.ReasonSpoofed},
		{"another's MAC in the question", abi.EPCheckMac, nd(135, f.pod, solicited, f.node, 255, source(pod2MAC)...), abi.ReasonSpoofed},
		{"another's MAC to routers", abi.EPCheckMac, nd(133, f.pod, ip("ff02::2"), zero, 255)[:14+40+8], 0},
		{"another's MAC, unchecked", 0, nd(136, f.pod, all, f.pod, 255, target(pod2MAC)...), 0},
	} {
		t.Run(tt.name, func(t *testing.T) {
			g := newGate(t)
			g.endpoint(g.pod, f, f.pod, tt.flags|enforceIn|enforceOut)
			if tt.name == "another's MAC to routers" { // a payload of 8 bytes: no option to look at
				tt.packet[14+5] = 8
			}
			v := drop
			if tt.reason == 0 {
				v = pass
			}
			g.want(g.from(g.pod, tt.packet), v, tt.reason)
			if len(g.flows()) != 0 {
				t.Error("neighbour discovery in conntrack")
			}
		})
	}
	// Towards the workload the link's word is taken.
	g := newGate(t)
	g.endpoint(g.pod, f, f.pod, enforceIn)
	g.pass(g.to(g.pod, 0, nd(135, f.node, solicited, f.pod, 255)))
	g.pass(g.to(g.pod, 0, nd(136, f.node, f.pod, f.node, 255)))
	g.pass(g.to(g.pod, 0, nd(134, ip("fe80::1"), all, zero, 255)))
	g.drop(g.to(g.pod, g.uplink, nd(136, f.peer, f.pod, f.node, 64)), abi.ReasonMalformed)
}

func shorten(p []byte, by int) []byte { return p[:len(p)-by] }

// TestParse: what is not a whole packet is malformed, what is not understood
// is unsupported; both are dropped in both directions, whoever sends them.
// (Test-run itself refuses frames that end within the IP header.)
func TestParse(t *testing.T) {
	v4, v6 := families[0], families[1]
	tcp4, tcp6 := func() []byte { return tcp(v4.pod, 1, v4.pod, 2, syn) }, func() []byte { return tcp(v6.pod, 1, v6.pod, 2, syn) }
	for _, tt := range []struct {
		name   string
		f      family
		packet []byte
		reason abi.Reason
	}{
		{"IPv4 of version 5", v4, patch(tcp4(), 14, 0x55), abi.ReasonMalformed},
		{"IPv6 of version 4", v6, patch(tcp6(), 14, 0x40), abi.ReasonMalformed},
		{"IPv4 header too short", v4, patch(tcp4(), 14, 0x44), abi.ReasonMalformed},
		{"IPv4 options", v4, patch(tcp4(), 14, 0x46), abi.ReasonUnsupported},
		{"IPv4 longer than the frame", v4, patch(tcp4(), 17, 41), abi.ReasonMalformed},
		{"IPv6 longer than the frame", v6, patch(tcp6(), 19, 21), abi.ReasonMalformed},
		{"IPv4 shorter than its header", v4, patch(tcp4(), 17, 19), abi.ReasonMalformed},
		{"IPv4 of length 0", v4, patch(tcp4(), 17, 0), abi.ReasonMalformed},
		{"IPv4 without room for TCP", v4, patch(tcp4(), 17, 39), abi.ReasonMalformed},
		{"IPv6 without room for TCP", v6, patch(tcp6(), 19, 19), abi.ReasonMalformed},
		{"TCP header too short", v4, patch(tcp4(), 14+20+12, 0x40), abi.ReasonMalformed},
		{"half a UDP header", v4, patch(udp(v4.pod, 1, v4.pod, 2), 17, 27), abi.ReasonMalformed},
		{"half an ICMP header", v4, patch(icmpEcho(v4, v4.pod, v4.pod, 8, 1), 17, 27), abi.ReasonMalformed},
		{"half an ICMPv6 header", v6, patch(icmpEcho(v6, v6.pod, v6.pod, 128, 1), 19, 7), abi.ReasonMalformed},
		{"first fragment", v4, patch(tcp4(), 20, 0x20), abi.ReasonUnsupported},
		{"later fragment", v4, patch(tcp4(), 21, 1), abi.ReasonUnsupported},
		{"IPv6 fragment", v6, frame(v6.pod, v6.pod, 44, make([]byte, 20)), abi.ReasonUnsupported},
		{"hop-by-hop options", v6, frame(v6.pod, v6.pod, 0, make([]byte, 20)), abi.ReasonUnsupported},
		{"routing header", v6, frame(v6.pod, v6.pod, 43, make([]byte, 24)), abi.ReasonUnsupported},
		{"SCTP", v4, frame(v4.pod, v4.pod, 132, make([]byte, 20)), abi.ReasonUnsupported},
		{"GRE", v6, frame(v6.pod, v6.pod, 47, make([]byte, 20)), abi.ReasonUnsupported},
		{"ICMPv6 in IPv4", v4, frame(v4.pod, v4.pod, protoICMP6, []byte{128, 0, 0, 0, 0, 1, 0, 1}), abi.ReasonUnsupported},
		{"ICMP in IPv6", v6, frame(v6.pod, v6.pod, protoICMP, []byte{8, 0, 0, 0, 0, 1, 0, 1}), abi.ReasonUnsupported},
		{"ICMP redirect", v4, icmpError(v4, v4.pod, v4.pod, 5, tcp4()[14:]), abi.ReasonUnsupported},
		{"ICMP timestamp", v4, icmpEcho(v4, v4.pod, v4.pod, 13, 1), abi.ReasonUnsupported},
		{"MLD", v6, icmpEcho(v6, v6.pod, v6.pod, 143, 1), abi.ReasonUnsupported},
		{"IPv4-mapped source in IPv6", v4, mapped(frame(v6.pod, v6.pod, protoTCP, tcpHeader(1, 2, syn)), 14+8, v4.pod), abi.ReasonMalformed},
		{"IPv4-mapped destination in IPv6", v6, mapped(tcp6(), 14+24, v4.pod), abi.ReasonMalformed},
		{"VLAN", v4, ether(podMAC, hostMAC, 0x8100, make([]byte, 40)), abi.ReasonUnsupported},
		{"LLDP", v4, ether(podMAC, hostMAC, 0x88cc, make([]byte, 40)), abi.ReasonUnsupported},
		{"802.3 length", v4, ether(podMAC, hostMAC, 38, make([]byte, 40)), abi.ReasonUnsupported},
	} {
		t.Run(tt.name, func(t *testing.T) {
			g := newGate(t)
			g.endpoint(g.pod, tt.f, tt.f.pod, 0)
			g.drop(g.from(g.pod, tt.packet), tt.reason)
			g.drop(g.to(g.pod, g.uplink, tt.packet), tt.reason)
		})
	}
}

func mapped(p []byte, at int, v4 netip.Addr) []byte {
	a := v4.As16()
	copy(p[at:], a[:])
	return p
}

// TestDestination: to_workload judges packets to the endpoint's own addresses,
// and multicast; a packet to another is not understood.
func TestDestination(t *testing.T) {
	eachFamily(t, func(t *testing.T, f family) {
		g := newGate(t)
		g.endpoint(g.pod, f, f.pod, 0)
		g.drop(g.to(g.pod, g.uplink, udp(f.peer, 1, f.pod2, 2)), abi.ReasonUnsupported)
		group := ip("224.0.0.251")
		if f.is6 {
			group = ip("ff02::fb")
		}
		g.pass(g.to(g.pod, g.uplink, udp(f.peer, 5353, group, 5353)))
	})
}

// TestICMPErrors: they pass with a packet of a valid flow, quoted in the right
// direction, and change nothing.
func TestICMPErrors(t *testing.T) {
	eachFamily(t, func(t *testing.T, f family) {
		router, kind := f.world, uint8(3)
		toPod := func(quoted []byte) []byte { return icmpError(f, router, f.pod, kind, quoted[14:]) }
		g, ep := wantPeer(t, f)
		b := g.bind(f.peer, idClient)
		call, back := udp(f.peer, 40000, f.pod, 80), udp(f.pod, 80, f.peer, 40000)

		g.drop(g.to(g.pod, g.uplink, toPod(back)), abi.ReasonUnsupported) // of no flow
		g.pass(g.to(g.pod, g.uplink, call))
		_, before := g.oneFlow()
		ok := func() {
			t.Helper()
			g.pass(g.to(g.pod, g.uplink, toPod(back)))
			g.pass(g.from(g.pod, icmpError(f, f.pod, f.peer, kind, call[14:])))
		}
		bad := func() {
			t.Helper()
			g.drop(g.to(g.pod, g.uplink, toPod(back)), abi.ReasonUnsupported)
			g.drop(g.from(g.pod, icmpError(f, f.pod, f.peer, kind, call[14:])), abi.ReasonUnsupported)
		}
		ok()
		g.pass(g.to(g.pod, g.uplink, toPod(back[:14+len(back)-14]))) // 8 bytes of it are enough
		for _, k := range map[bool][]uint8{false: {3, 11, 12}, true: {1, 2, 3, 4}}[f.is6] {
			g.pass(g.to(g.pod, g.uplink, icmpError(f, router, f.pod, k, back[14:])))
		}
		// Quoted the wrong way round, another port, another protocol, to
		// another, quoting an ICMP error, or cut short.
		g.drop(g.to(g.pod, g.uplink, toPod(call)), abi.ReasonUnsupported)
		g.drop(g.to(g.pod, g.uplink, toPod(udp(f.pod, 81, f.peer, 40000))), abi.ReasonUnsupported)
		g.drop(g.to(g.pod, g.uplink, toPod(tcp(f.pod, 80, f.peer, 40000, ack))), abi.ReasonUnsupported)
		g.drop(g.to(g.pod, g.uplink, toPod(udp(f.pod2, 80, f.peer, 40000))), abi.ReasonUnsupported)
		g.drop(g.to(g.pod, g.uplink, toPod(toPod(back))), abi.ReasonUnsupported)
		g.drop(g.to(g.pod, g.uplink, toPod(back[:len(back)-1])), abi.ReasonMalformed)
		if _, after := g.oneFlow(); after != before {
			t.Errorf("an error changed the entry\n got %+v\nwant %+v", after, before)
		}

		// Every ground of the entry must stand.
		g.lease(session, -time.Second)
		bad()
		g.lease(session, time.Hour)
		ok()
		g.revoke(b)
		bad()
		g.put("slots", b.slot, b.Slot)
		ok()
		g.newPolicy(ep)
		bad()
	})
}

// TestLostEvents: a full ring is counted, and changes no verdict (I6).
func TestLostEvents(t *testing.T) {
	f := families[0]
	g := newGate(t, mapSize("events", 4096))
	g.endpoint(g.pod, f, f.pod, 0)
	var told int
	const sent = 100
	for i := range uint16(sent) {
		ret, err := g.coll.Programs["from_workload"].Run(runOptions(udp(f.pod, 1+i, f.peer, 2), skBuff{Ifindex: g.pod}))
		if err != nil {
			t.Fatal(err)
		}
		if int(int32(ret)) != tcxNext {
			t.Errorf("packet %d: %d", i, ret)
		}
	}
	told = len(drain(t, g.events, decodeEvent))
	if lost := g.state(nil).LostEvents; told == 0 || lost == 0 || told+int(lost) != sent {
		t.Errorf("%d told and %d lost of %d", told, lost, sent)
	}
}

// TestClockCell: the cell is filled, follows BOOTTIME, and a cell from another
// tick is not believed.
func TestClockCell(t *testing.T) {
	f := families[0]
	g := newGate(t)
	g.endpoint(g.pod, f, f.pod, 0)
	cpus := len(g.clocks())
	future := make([]abi.Clock, cpus)
	for i := range future {
		future[i] = abi.Clock{Coarse: 1, Boot: 1 << 62} // of the first tick of this boot
	}
	g.put("clock", uint32(0), future)
	before := boottime()
	r := g.from(g.pod, udp(f.pod, 1, f.peer, 2))
	after := boottime()
	if e := r.events[0]; e.Time < before || e.Time > after {
		t.Errorf("time %d, not in [%d, %d]", e.Time, before, after)
	}
	for deadline := after + uint64(10*time.Second); ; {
		r = g.from(g.pod, udp(f.pod, 1, f.peer, 2))
		if _, v := g.oneFlow(); v.LastSeen > v.Created {
			break
		}
		if boottime() > deadline {
			t.Fatal("the clock stands still")
		}
	}
}

func (g *gate) clocks() (c []abi.Clock) {
	g.t.Helper()
	if err := g.coll.Maps["clock"].Lookup(uint32(0), &c); err != nil {
		g.t.Fatal(err)
	}
	return c
}

// TestSecondRead races a verifier that revokes a binding and then renews the
// lease, for the bindings that stand, against packets of an established flow
// and of a new one. The binding and its lease are never alive at once, so
// nothing may pass, however the two interleave (I1, I2). A program that reads
// the stamp once, is held up, and then reads the deadline, sees both alive.
func TestSecondRead(t *testing.T) {
	const rounds = 400
	f := families[0]
	g, _ := wantPeer(t, f)
	g.ipRange(f.remote, abi.RangeKnown, 0)
	b := g.bind(f.peer, idClient)
	stamp := word(t, g.mmap("slots", 64*1025), int(b.slot)*64)
	lease := word(t, g.mmap("leases", 8*4096), int(session)*8)
	known, fresh := tcp(f.peer, 1, f.pod, 80, ack), tcp(f.peer, 2, f.pod, 80, ack)

	start, done := make(chan int), make(chan struct{})
	defer func() { close(start); <-done }()
	var spun atomic.Uint64
	go func() { // on the other CPU
		defer close(done)
		for spins := range start {
			for range spins {
				spun.Add(1)
			}
			stamp.Store(0)
			lease.Store(^uint64(0))
			done <- struct{}{}
		}
	}()
	for i := range rounds {
		// A stamp is never used twice.
		b.stamp++
		stamp.Store(b.stamp)
		g.put("bindings", addr(f.peer), abi.Binding{Stamp: b.stamp, Slot: b.slot})
		p := fresh
		if i%2 == 0 {
			p = known
			lease.Store(^uint64(0))
			g.pass(g.to(g.pod, g.uplink, p))
		}
		lease.Store(0)
		opts := runOptions(p, skBuff{Ifindex: g.pod, IngressIfindex: g.uplink})
		opts.Repeat = 1000
		before := g.counters()[counterKey{dir: ingress, verdict: pass}].Packets
		start <- 500 + i*50%10000
		if _, err := g.coll.Programs["to_workload"].Run(opts); err != nil {
			t.Fatal(err)
		}
		<-done
		drain(t, g.events, decodeEvent)
		if n := g.counters()[counterKey{dir: ingress, verdict: pass}].Packets - before; n != 0 {
			t.Errorf("round %d: %d packets passed without a live binding", i, n)
		}
	}
}

func (g *gate) mmap(name string, size int) []byte {
	g.t.Helper()
	page := unix.Getpagesize()
	size = (size + page - 1) / page * page
	mem, err := unix.Mmap(g.coll.Maps[name].FD(), 0, size, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED)
	if err != nil {
		g.t.Fatal(err)
	}
	g.t.Cleanup(func() { unix.Munmap(mem) })
	return mem
}

func word(t *testing.T, mem []byte, at int) *atomic.Uint64 {
	t.Helper()
	return (*atomic.Uint64)(unsafe.Pointer(&mem[at]))
}
