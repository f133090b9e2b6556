package hold

import (
	"bytes"
	"encoding/binary"
	"testing"
)

// eth4 makes a TCP or UDP frame with the partial checksum of a local stack.
func eth4(proto byte, l4 []byte) []byte {
	p := make([]byte, 34, 34+len(l4))
	p[12], p[13] = 8, 0
	ip := p[14:]
	ip[0] = 0x45
	binary.BigEndian.PutUint16(ip[2:], uint16(20+len(l4)))
	ip[9] = proto
	copy(ip[12:], []byte{10, 0, 0, 1, 10, 0, 0, 2})
	return append(p, l4...)
}

func eth6(proto byte, ext, l4 []byte) []byte {
	p := make([]byte, 54)
	p[12], p[13] = 0x86, 0xdd
	ip := p[14:]
	ip[0] = 0x60
	binary.BigEndian.PutUint16(ip[4:], uint16(len(ext)+len(l4)))
	ip[6] = proto
	ip[8], ip[23], ip[24], ip[39] = 0xfd, 1, 0xfd, 2
	return append(append(p, ext...), l4...)
}

func pseudo(p []byte, l4 int, proto byte) uint16 {
	src, dst := p[26:30], p[30:34]
	if p[12] == 0x86 {
		src, dst = p[22:38], p[38:54]
	}
	return fold(sum(sum(uint32(proto)+uint32(len(p)-l4), src), dst))
}

func tcp(n int) []byte { b := make([]byte, 20+n); b[12] = 5 << 4; return b }
func udp(n int) []byte {
	b := make([]byte, 8+n)
	binary.BigEndian.PutUint16(b[4:], uint16(len(b)))
	return b
}

func TestPrepare(t *testing.T) {
	set := func(p []byte, at int, v uint16) []byte { binary.BigEndian.PutUint16(p[at:], v); return p }
	partial := func(p []byte, l4, off int, proto byte) []byte { return set(p, l4+off, pseudo(p, l4, proto)) }
	ext := []byte{protoTCP, 0, 1, 4, 0, 0, 0, 0}
	cwr := tcp(3000)
	cwr[13] = tcpFlagCWR
	frag := eth4(protoUDP, udp(8))
	frag[14+6] = 0x20
	for _, tc := range []struct {
		name              string
		packet            []byte
		gso               uint16
		flags, gsoType    byte
		hdrLen, start, at uint16
		fail              bool
	}{
		{name: "tcp4 partial", packet: partial(eth4(6, tcp(5)), 34, 16, 6), flags: 1, start: 34, at: 16},
		{name: "tcp4 padded frame", packet: append(partial(eth4(6, tcp(0)), 34, 16, 6), 0, 0, 0, 0, 0, 0), flags: 1, start: 34, at: 16},
		{name: "udp4 partial", packet: partial(eth4(17, udp(5)), 34, 6, 17), flags: 1, start: 34, at: 6},
		{name: "tcp6 partial", packet: partial(eth6(6, nil, tcp(5)), 54, 16, 6), flags: 1, start: 54, at: 16},
		{name: "tcp6 behind an extension header", packet: partial(eth6(0, ext, tcp(5)), 62, 16, 6), flags: 1, start: 62, at: 16},
		{name: "full or damaged checksum", packet: set(eth4(6, tcp(5)), 50, 0x1234)},
		{name: "udp4 without checksum", packet: eth4(17, udp(5))},
		{name: "fragment", packet: frag},
		{name: "icmp", packet: eth4(1, make([]byte, 16))},
		{name: "tcp4 gso", packet: eth4(6, tcp(3000)), gso: 1448, flags: 1, gsoType: 1, hdrLen: 54, start: 34, at: 16},
		{name: "tcp4 gso cwr", packet: eth4(6, cwr), gso: 1448, flags: 1, gsoType: 0x81, hdrLen: 54, start: 34, at: 16},
		{name: "tcp6 gso", packet: eth6(6, nil, tcp(3000)), gso: 1428, flags: 1, gsoType: 4, hdrLen: 74, start: 54, at: 16},
		{name: "udp4 gso", packet: eth4(17, udp(3000)), gso: 1000, flags: 1, gsoType: 5, hdrLen: 42, start: 34, at: 6},
		{name: "icmp gso", packet: eth4(1, make([]byte, 16)), gso: 100, fail: true},
		{name: "arp", packet: append(make([]byte, 12), 8, 6, 0, 0), fail: true},
		{name: "empty", fail: true},
	} {
		t.Run(tc.name, func(t *testing.T) {
			var h [vnetHeaderLen]byte
			_, err := prepare(tc.packet, tc.gso, &h)
			if (err != nil) != tc.fail {
				t.Fatalf("err = %v, want failure %v", err, tc.fail)
			}
			ne := binary.NativeEndian
			if tc.fail {
				return
			}
			if h[0] != tc.flags || h[1] != tc.gsoType || ne.Uint16(h[2:]) != tc.hdrLen || ne.Uint16(h[4:]) != tc.gso ||
				ne.Uint16(h[6:]) != tc.start || ne.Uint16(h[8:]) != tc.at {
				t.Errorf("header %v, want %+v", h, tc)
			}
			if tc.gso != 0 {
				at := int(tc.start + tc.at)
				if got, want := binary.BigEndian.Uint16(tc.packet[at:]), pseudo(tc.packet, int(tc.start), map[uint16]byte{16: 6, 6: 17}[tc.at]); got != want {
					t.Errorf("checksum field %#x, want the pseudo-header's %#x", got, want)
				}
			}
		})
	}
}

// The packets come from workloads: nothing in them may make us panic or write
// past the end.
func FuzzPrepare(f *testing.F) {
	f.Add(eth4(6, tcp(100)), uint16(0))
	f.Add(eth4(17, udp(100)), uint16(50))
	f.Add(eth6(0, []byte{60, 255, 0, 0, 0, 0, 0, 0}, tcp(100)), uint16(50))
	f.Fuzz(func(t *testing.T, p []byte, gso uint16) {
		var h [vnetHeaderLen]byte
		if _, err := prepare(p, gso, &h); err != nil || h[0] == 0 {
			return
		}
		start, off := binary.NativeEndian.Uint16(h[6:]), binary.NativeEndian.Uint16(h[8:])
		if int(start)+int(off)+2 > len(p) {
			t.Fatalf("checksum at %d+%d in %d bytes", start, off, len(p))
		}
	})
}

// RFC 9260, appendix A, describes the sum.
func TestSCTPChecksum(t *testing.T) {
	// An INIT as a local stack leaves it to the device.
	init := []byte{
		0x0b, 0x59, 0x0b, 0x59, 0x00, 0x00, 0x00, 0x00, 0, 0, 0, 0,
		0x01, 0x00, 0x00, 0x14, 0x00, 0x00, 0x00, 0x01, 0x00, 0x01, 0x00, 0x00, 0x00, 0x0a, 0x00, 0x0a, 0x00, 0x00, 0x00, 0x01,
	}
	p := eth4(protoSCTP, init)
	padded := append(append([]byte{}, p...), 0, 0, 0) // the frame's padding is not summed
	var h [vnetHeaderLen]byte
	for _, p := range [][]byte{p, padded} {
		if _, err := prepare(p, 0, &h); err != nil || h != [vnetHeaderLen]byte{} {
			t.Fatalf("%v, header %v", err, h)
		}
		if got := binary.LittleEndian.Uint32(p[42:]); got != crc32c(init) || got == 0 {
			t.Errorf("checksum %#x, want %#x", got, crc32c(init))
		}
	}
	// One that has a checksum keeps it, right or wrong.
	p[42] ^= 1
	want := append([]byte{}, p...)
	if _, err := prepare(p, 0, &h); err != nil || !bytes.Equal(p, want) {
		t.Errorf("%v: a checksum was changed", err)
	}
	// A fragment has none, and short ones are left alone.
	frag := eth4(protoSCTP, make([]byte, 32))
	frag[14+6] = 0x20
	if _, err := prepare(frag, 0, &h); err != nil || !bytes.Equal(frag[34:], make([]byte, 32)) {
		t.Errorf("%v: a fragment was changed", err)
	}
	if _, err := prepare(eth4(protoSCTP, make([]byte, 11)), 0, &h); err != nil {
		t.Error(err)
	}
	if _, err := prepare(eth4(protoSCTP, init), 1400, &h); err == nil {
		t.Error("a GSO packet of SCTP was accepted")
	}
}

// crc32c is the sum by its definition, bit by bit.
func crc32c(b []byte) uint32 {
	crc := ^uint32(0)
	for _, v := range b {
		crc ^= uint32(v)
		for range 8 {
			crc = crc>>1 ^ 0x82f63b78*(crc&1)
		}
	}
	return ^crc
}
