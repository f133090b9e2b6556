package tests

import (
	"bytes"
	"encoding/binary"
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
		{"IPv4 options that are none", v4, patch(tcp4(), 14, 0x4f), abi.ReasonMalformed},
		{"IPv4 options, loose source route", v4, ip4Options(tcp4(), 131, 7, 4, 10, 0, 9, 9), abi.ReasonUnsupported},
		{"IPv4 options, strict source route behind others", v4, ip4Options(tcp4(), 1, 1, 148, 4, 0, 0, 137, 3, 4), abi.ReasonUnsupported},
		{"IPv4 options, length 0", v4, ip4Options(tcp4(), 148, 0, 0, 0), abi.ReasonMalformed},
		{"IPv4 options, longer than the header", v4, ip4Options(tcp4(), 148, 9, 0, 0), abi.ReasonMalformed},
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
		{"first fragment of odd length", v4, patch(tcp4(), 20, 0x20), abi.ReasonMalformed},
		{"fragment over the ports", v4, patch(tcp4(), 21, 2), abi.ReasonMalformed},
		{"hop-by-hop options twice", v6, chain(v6.pod, v6.pod, nil, 0, 0), abi.ReasonMalformed},
		{"hop-by-hop options not first", v6, chain(v6.pod, v6.pod, tcpHeader(1, 2, syn), protoTCP, 60, 0), abi.ReasonMalformed},
		{"options longer than the packet", v6, frame(v6.pod, v6.pod, 60, []byte{6, 9, 1, 4, 0, 0, 0, 0}), abi.ReasonMalformed},
		{"option longer than its header", v6, frame(v6.pod, v6.pod, 60, append([]byte{6, 0, 1, 5, 0, 0, 0, 0}, tcpHeader(1, 2, syn)...)), abi.ReasonMalformed},
		{"home address", v6, frame(v6.pod, v6.pod, 60, append([]byte{6, 2, 1, 2, 0, 0, 0xc9, 16, 0xfd, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 9},
			tcpHeader(1, 2, syn)...)), abi.ReasonUnsupported},
		{"jumbogram", v6, frame(v6.pod, v6.pod, 0, append([]byte{6, 0, 0xc2, 4, 0, 1, 0, 0}, tcpHeader(1, 2, syn)...)), abi.ReasonUnsupported},
		{"routing header with segments left", v6, frame(v6.pod, v6.pod, 43, append([]byte{6, 0, 4, 1, 0, 0, 0, 0}, tcpHeader(1, 2, syn)...)), abi.ReasonUnsupported},
		{"routing header of type 0", v6, frame(v6.pod, v6.pod, 43, append([]byte{6, 0, 0, 0, 0, 0, 0, 0}, tcpHeader(1, 2, syn)...)), abi.ReasonUnsupported},
		{"extension headers without end", v6, chain(v6.pod, v6.pod, tcpHeader(1, 2, syn), protoTCP, 0, 60, 60, 60, 60, 60, 60, 60), abi.ReasonUnsupported},
		{"extension headers, and nothing", v6, chain(v6.pod, v6.pod, nil, protoTCP, 60), abi.ReasonMalformed},
		{"no next header", v6, frame(v6.pod, v6.pod, 59, make([]byte, 8)), abi.ReasonUnsupported},
		{"neighbour discovery behind options", v6, hops(chain(v6.pod, v6.pod, make([]byte, 24), protoICMP6, 60), 255, 14+40+8, 135), abi.ReasonUnsupported},
		{"half an SCTP header", v4, frame(v4.pod, v4.pod, protoSCTP, make([]byte, 12)), abi.ReasonMalformed},
		{"half an IGMP header", v4, hops(frame(v4.pod, v4.pod, 2, make([]byte, 7)), 1, 14+20, 0x16), abi.ReasonMalformed},
		{"IGMP from afar", v4, hops(frame(v4.pod, v4.pod, 2, make([]byte, 8)), 2, 14+20, 0x16), abi.ReasonMalformed},
		{"DVMRP", v4, hops(frame(v4.pod, v4.pod, 2, make([]byte, 8)), 1, 14+20, 0x13), abi.ReasonUnsupported},
		{"ICMPv6 in IPv4", v4, frame(v4.pod, v4.pod, protoICMP6, []byte{128, 0, 0, 0, 0, 1, 0, 1}), abi.ReasonUnsupported},
		{"ICMP in IPv6", v6, frame(v6.pod, v6.pod, protoICMP, []byte{8, 0, 0, 0, 0, 1, 0, 1}), abi.ReasonUnsupported},
		{"ICMP redirect", v4, icmpError(v4, v4.pod, v4.pod, 5, tcp4()[14:]), abi.ReasonUnsupported},
		{"ICMP timestamp", v4, icmpEcho(v4, v4.pod, v4.pod, 13, 1), abi.ReasonUnsupported},
		{"MLD from afar", v6, icmpEcho(v6, v6.pod, v6.pod, 143, 1), abi.ReasonMalformed},
		{"router renumbering", v6, icmpEcho(v6, v6.pod, v6.pod, 138, 1), abi.ReasonUnsupported},
		{"VLAN with ARP in it", v4, ether(podMAC, hostMAC, 0x8100, append([]byte{0, 5}, arp(1, podMAC, v4.pod, v4.node)[12:]...)), abi.ReasonUnsupported},
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

// ip4Options puts options into an IPv4 packet, padded with the list's end.
func ip4Options(p []byte, o ...byte) []byte {
	o = append(o, make([]byte, -len(o)&3)...)
	out := append(bytes.Clone(p[:34]), append(o, p[34:]...)...)
	out[14] = 0x40 | byte(5+len(o)/4)
	binary.BigEndian.PutUint16(out[16:], uint16(len(out)-14))
	return out
}

// chain is an IPv6 packet with empty extension headers (PadN) before its last
// header, which is of protocol last.
func chain(src, dst netip.Addr, payload []byte, last uint8, headers ...uint8) []byte {
	for i := len(headers) - 1; i >= 0; i-- {
		h := []byte{last, 0, 1, 4, 0, 0, 0, 0}
		if headers[i] == 43 {
			h = []byte{last, 0, 2, 0, 0, 0, 0, 0} // no segments left
		}
		payload, last = append(h, payload...), headers[i]
	}
	return frame(src, dst, last, payload)
}

// hops sets the hop limit of a frame, and one byte more.
func hops(p []byte, n byte, at int, v byte) []byte {
	if p[14]>>4 == 4 {
		p[14+8] = n
	} else {
		p[14+7] = n
	}
	p[at] = v
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

		r := g.to(g.pod, g.uplink, toPod(back))
		g.drop(r, abi.ReasonUnsupported) // of no flow
		if len(r.events) != 1 || r.events[0].IcmpType != kind || r.events[0].Flags&uint8(abi.EventFragment) != 0 {
			t.Errorf("an error of type %d is told as %+v", kind, r.events)
		}
		g.pass(g.to(g.pod, g.uplink, call))
		_, before := g.oneFlow()
		ok := func() {
			t.Helper()
			g.pass(g.to(g.pod, g.uplink, toPod(back)))
			g.pass(g.from(g.pod, icmpError(f, f.pod, f.peer, kind, call[14:])))
			// To its sender only: not to whom egress policy denies.
			g.drop(g.from(g.pod, icmpError(f, f.pod, f.world, kind, call[14:])), abi.ReasonUnsupported)
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
