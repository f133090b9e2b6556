package conformance

import (
	"encoding/binary"
	"net/netip"

	"portcullis/authz"
	"portcullis/bpf/abi"
)

// packet is one that opens a flow. Checksums are left zero: test-run and the
// programs do not look at them.
type packet struct {
	src, dst     netip.Addr
	proto        uint8
	sport, dport uint16 // of ICMP: identifier; type << 8 | code, or 0 for an echo request
}

func (p packet) bytes() []byte {
	var l4 []byte
	switch p.proto {
	case authz.ProtoTCP:
		l4 = make([]byte, 20)
		binary.BigEndian.PutUint16(l4, p.sport)
		binary.BigEndian.PutUint16(l4[2:], p.dport)
		l4[12], l4[13] = 5<<4, 2 // no options, SYN
	case authz.ProtoUDP:
		l4 = make([]byte, 8)
		binary.BigEndian.PutUint16(l4, p.sport)
		binary.BigEndian.PutUint16(l4[2:], p.dport)
		binary.BigEndian.PutUint16(l4[4:], 8)
	case authz.ProtoSCTP:
		l4 = make([]byte, 12+20)
		binary.BigEndian.PutUint16(l4, p.sport)
		binary.BigEndian.PutUint16(l4[2:], p.dport)
		l4[12] = 1 // INIT
		binary.BigEndian.PutUint16(l4[14:], 20)
	default:
		l4 = make([]byte, 8)
		if l4[0] = echoRequest(p.proto); p.dport != 0 {
			l4[0], l4[1] = byte(p.dport>>8), byte(p.dport)
		}
		binary.BigEndian.PutUint16(l4[4:], p.sport)
	}
	eth := make([]byte, 14)
	eth[0], eth[6] = 2, 2
	if p.src.Is4() {
		ip := make([]byte, 20)
		ip[0], ip[8], ip[9] = 0x45, 64, p.proto
		binary.BigEndian.PutUint16(ip[2:], uint16(20+len(l4)))
		copy(ip[12:], p.src.AsSlice())
		copy(ip[16:], p.dst.AsSlice())
		binary.BigEndian.PutUint16(eth[12:], 0x0800)
		return append(append(eth, ip...), l4...)
	}
	ip := make([]byte, 40)
	ip[0], ip[6], ip[7] = 6<<4, p.proto, 64
	binary.BigEndian.PutUint16(ip[4:], uint16(len(l4)))
	copy(ip[8:], p.src.AsSlice())
	copy(ip[24:], p.dst.AsSlice())
	binary.BigEndian.PutUint16(eth[12:], 0x86dd)
	return append(append(eth, ip...), l4...)
}

func echoRequest(proto uint8) uint8 {
	if proto == authz.ProtoICMPv6 {
		return 128
	}
	return 8
}

// policyPort is the port that policy speaks of.
func (p packet) policyPort() uint16 {
	if p.proto == authz.ProtoICMP || p.proto == authz.ProtoICMPv6 {
		return uint16(echoRequest(p.proto)) << 8
	}
	return p.dport
}

func addr(a netip.Addr) abi.Addr { return a.As16() }
