package tests

import (
	"encoding/binary"
	"net/netip"
)

var (
	podMAC  = [6]byte{0x02, 0xaa, 0, 0, 0, 1}
	pod2MAC = [6]byte{0x02, 0xaa, 0, 0, 0, 2}
	hostMAC = [6]byte{0x02, 0xbb, 0, 0, 0, 1}
)

// family is one of the two address families, with the cast of the tests. One
// path of code serves both, so every table runs over both.
type family struct {
	name   string
	is6    bool
	pod    netip.Addr // the endpoint
	pod2   netip.Addr // another local endpoint
	node   netip.Addr // this node
	peer   netip.Addr // remote workloads, in a known range
	peer2  netip.Addr
	world  netip.Addr
	remote netip.Prefix // the peers' range
	own    netip.Prefix // this node's
	icmp   uint8
	echo   uint8
	answer uint8
}

var families = []family{
	{
		name: "ip4", pod: ip("10.0.1.5"), pod2: ip("10.0.1.6"), node: ip("192.168.0.1"),
		peer: ip("10.0.2.5"), peer2: ip("10.0.2.6"), world: ip("8.8.8.8"),
		remote: netip.MustParsePrefix("10.0.2.0/24"), own: netip.MustParsePrefix("10.0.1.0/24"),
		icmp: protoICMP, echo: 8, answer: 0,
	},
	{
		name: "ip6", is6: true, pod: ip("fd00:1::5"), pod2: ip("fd00:1::6"), node: ip("fd00::1"),
		peer: ip("fd00:2::5"), peer2: ip("fd00:2::6"), world: ip("2001:db8::8"),
		remote: netip.MustParsePrefix("fd00:2::/64"), own: netip.MustParsePrefix("fd00:1::/64"),
		icmp: protoICMP6, echo: 128, answer: 129,
	},
}

func ip(s string) netip.Addr { return netip.MustParseAddr(s) }

const (
	protoICMP  = 1
	protoTCP   = 6
	protoUDP   = 17
	protoICMP6 = 58
	protoSCTP  = 132

	fin = 0x01
	syn = 0x02
	rst = 0x04
	ack = 0x10
)

func ether(src, dst [6]byte, proto uint16, payload []byte) []byte {
	b := append(dst[:len(dst):len(dst)], src[:]...)
	return append(binary.BigEndian.AppendUint16(b, proto), payload...)
}

func ipPacket(src, dst netip.Addr, proto uint8, payload []byte) []byte {
	if src.Is4() {
		b := []byte{0x45, 0, 0, 0, 0, 1, 0, 0, 64, proto, 0, 0}
		binary.BigEndian.PutUint16(b[2:], uint16(20+len(payload)))
		b = append(append(b, src.AsSlice()...), dst.AsSlice()...)
		return append(b, payload...)
	}
	b := []byte{0x60, 0, 0, 0, 0, 0, proto, 64}
	binary.BigEndian.PutUint16(b[4:], uint16(len(payload)))
	b = append(append(b, src.AsSlice()...), dst.AsSlice()...)
	return append(b, payload...)
}

// frame is an IP packet in Ethernet, as the pod and its host exchange them.
func frame(src, dst netip.Addr, proto uint8, payload []byte) []byte {
	t := uint16(0x0800)
	if src.Is6() {
		t = 0x86dd
	}
	return ether(podMAC, hostMAC, t, ipPacket(src, dst, proto, payload))
}

func tcpHeader(sport, dport uint16, flags uint8) []byte {
	b := binary.BigEndian.AppendUint16(nil, sport)
	b = binary.BigEndian.AppendUint16(b, dport)
	b = append(b, 0, 0, 0, 1, 0, 0, 0, 1, 0x50, flags, 0xff, 0xff, 0, 0, 0, 0)
	return b
}

func udpHeader(sport, dport uint16) []byte {
	b := binary.BigEndian.AppendUint16(nil, sport)
	b = binary.BigEndian.AppendUint16(b, dport)
	return append(b, 0, 8, 0, 0)
}

func tcp(src netip.Addr, sport uint16, dst netip.Addr, dport uint16, flags uint8) []byte {
	return frame(src, dst, protoTCP, tcpHeader(sport, dport, flags))
}

func udp(src netip.Addr, sport uint16, dst netip.Addr, dport uint16) []byte {
	return frame(src, dst, protoUDP, udpHeader(sport, dport))
}

func icmpEcho(f family, src, dst netip.Addr, kind uint8, id uint16) []byte {
	b := binary.BigEndian.AppendUint16([]byte{kind, 0, 0, 0}, id)
	return frame(src, dst, f.icmp, append(b, 0, 1))
}

// icmpError quotes an IP packet.
func icmpError(f family, src, dst netip.Addr, kind uint8, quoted []byte) []byte {
	return frame(src, dst, f.icmp, append([]byte{kind, 0, 0, 0, 0, 0, 0, 0}, quoted...))
}

func arp(op uint16, senderMAC [6]byte, sender, target netip.Addr) []byte {
	b := []byte{0, 1, 8, 0, 6, 4}
	b = binary.BigEndian.AppendUint16(b, op)
	b = append(append(b, senderMAC[:]...), sender.AsSlice()...)
	b = append(append(b, make([]byte, 6)...), target.AsSlice()...)
	return ether(senderMAC, [6]byte{0xff, 0xff, 0xff, 0xff, 0xff, 0xff}, 0x0806, b)
}

// nd is a neighbour-discovery message; hops 255 unless it is forged.
func nd(kind uint8, src, dst, target netip.Addr, hops uint8, option ...byte) []byte {
	b := append([]byte{kind, 0, 0, 0, 0, 0, 0, 0}, target.AsSlice()...)
	p := frame(src, dst, protoICMP6, append(b, option...))
	p[14+7] = hops
	return p
}
