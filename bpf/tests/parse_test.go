package tests

import (
	"net/netip"
	"testing"
	"time"

	"portcullis/bpf/abi"
)

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
