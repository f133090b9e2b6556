package tests

import (
	"net/netip"
	"testing"

	"portcullis/bpf/abi"
)

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
		{"padded", 0, append(arp(1, podMAC, f.pod, f.node), make([]byte, 18)...), 0},
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

// TestARPCarriesNoPayload: no policy sees it, nor does quarantine stop it.
func TestARPCarriesNoPayload(t *testing.T) {
	f := families[0]
	g := newGate(t)
	ep := g.endpoint(g.pod, f, f.pod, enforceOut)
	for _, state := range []abi.EndpointState{abi.EPActive, abi.EPQuarantined} {
		ep.State = uint32(state)
		g.put("endpoints", g.pod, ep)
		g.pass(g.from(g.pod, append(arp(1, podMAC, f.pod, f.node), make([]byte, 18)...)))
		g.drop(g.from(g.pod, append(arp(1, podMAC, f.pod, f.node), make([]byte, 19)...)), abi.ReasonMalformed)
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
		{"looks for routers elsewhere", 0, nd(133, f.pod, f.world, zero, 255), abi.ReasonUnsupported},
		{"looks for routers with more to say", 0, nd(133, ownLL, ip("ff02::2"), zero, 255, make([]byte, 24)...), abi.ReasonMalformed},
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
			g.ipRange(netip.PrefixFrom(f.node, 128), abi.RangeKnown, 0) // as the agent has it
			if tt.name == "another's MAC to routers" {                  // a payload of 8 bytes: no option to look at
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
	// To an address that is elsewhere a router would send it on (the hop limit is
	// the receiver's business): egress policy must not be passed by.
	g := newGate(t)
	ep := g.endpoint(g.pod, f, f.pod, enforceOut)
	g.ipRange(f.remote, abi.RangeKnown|abi.RangeHoldable, 0)
	g.ipRange(f.own, abi.RangeKnown, 0)
	g.bind(f.peer2, idClient)
	g.bind(f.pod2, idClient, local(g.pod2))
	for _, tt := range []struct {
		name   string
		to     netip.Addr
		reason abi.Reason
	}{
		{"the world", f.world, abi.ReasonPolicyDenied},
		{"another node's range", f.peer, abi.ReasonPolicyDenied},
		{"a remote workload", f.peer2, abi.ReasonPolicyDenied},
		{"multicast beyond the link", ip("ff0e::1"), abi.ReasonPolicyDenied},
		{"a workload of the same link", f.pod2, 0},
		{"the gateway", ip("fd00:1::1"), 0},
		{"the router's link-local address", otherLL, 0},
	} {
		for kind, p := range map[string][]byte{"question": nd(135, f.pod, tt.to, tt.to, 255), "answer": nd(136, f.pod, tt.to, f.pod, 255)} {
			if r := g.from(g.pod, p); r.reason != tt.reason || (r.verdict == pass) != (tt.reason == 0) || len(r.held) != 0 {
				t.Errorf("%s to %s: %v (%v)", kind, tt.name, r.verdict, r.reason)
			}
		}
	}
	g.drop(g.from(g.pod, nd(135, zero, f.world, f.pod, 255)), abi.ReasonMalformed)
	ep.Flags, ep.Policy = 0, ep.Policy+1000
	g.put("endpoints", g.pod, ep)
	g.pass(g.from(g.pod, nd(136, f.pod, f.world, f.pod, 255)))

	// Towards the workload the link's word is taken.
	g = newGate(t)
	g.endpoint(g.pod, f, f.pod, enforceIn)
	g.pass(g.to(g.pod, 0, nd(135, f.node, solicited, f.pod, 255)))
	g.pass(g.to(g.pod, 0, nd(136, f.node, f.pod, f.node, 255)))
	g.pass(g.to(g.pod, 0, nd(134, ip("fe80::1"), all, zero, 255)))
	g.drop(g.to(g.pod, g.uplink, nd(136, f.peer, f.pod, f.node, 64)), abi.ReasonMalformed)
}

func shorten(p []byte, by int) []byte { return p[:len(p)-by] }
