package hold

import (
	"encoding/binary"
	"errors"
	"hash/crc32"
)

// vnetHeader is struct virtio_net_hdr: what PACKET_VNET_HDR puts before each
// packet, in host byte order.
const (
	vnetHeaderLen      = 10
	vnetNeedsCsum      = 1
	vnetGSOTCP4        = 1
	vnetGSOTCP6        = 4
	vnetGSOUDPL4       = 5
	vnetGSOECN         = 0x80
	tcpFlagCWR         = 0x80
	ethHeaderLen       = 14
	ethIP4             = 0x0800
	ethIP6             = 0x86dd
	protoHopByHop      = 0
	protoTCP           = 6
	protoUDP           = 17
	protoRouting       = 43
	protoFragment      = 44
	protoDestOpts      = 60
	protoSCTP          = 132
	sctpHeaderLen      = 12
	sctpCsumOffset     = 8
	tcpCsumOffset      = 16
	udpCsumOffset      = 6
	maxExtensionHeader = 8 // a longer chain is sent as it is, without offload
)

// errNotIP: only IP packets are ever held.
var errNotIP = errors.New("held packet is not a whole IPv4 or IPv6 frame")

// frame is where things are in a packet that begins with an Ethernet header.
type frame struct {
	etherType uint16
	proto     uint8 // of the transport header; meaningful if l4 > 0
	l4        int   // offset of the transport header; 0: a fragment, or not understood
	end       int   // of the IP packet: what follows is padding of the frame
	src, dst  []byte
}

// parseFrame finds the transport header. It reads nothing past the packet.
func parseFrame(p []byte) (frame, error) {
	if len(p) < ethHeaderLen {
		return frame{}, errNotIP
	}
	f := frame{etherType: binary.BigEndian.Uint16(p[12:])}
	ip := p[ethHeaderLen:]
	switch {
	case f.etherType == ethIP4 && len(ip) >= 20 && ip[0]>>4 == 4:
		f.src, f.dst, f.proto = ip[12:16], ip[16:20], ip[9]
		fragment := binary.BigEndian.Uint16(ip[6:])&0x3fff != 0 // offset or more fragments
		if header := int(ip[0]&15) * 4; !fragment && header >= 20 && header <= len(ip) {
			f.l4 = ethHeaderLen + header
		}
		f.setEnd(p, int(binary.BigEndian.Uint16(ip[2:])))
		return f, nil
	case f.etherType == ethIP6 && len(ip) >= 40 && ip[0]>>4 == 6:
		f.src, f.dst = ip[8:24], ip[24:40]
		f.setEnd(p, 40+int(binary.BigEndian.Uint16(ip[4:])))
		at, next := 40, ip[6]
		for range maxExtensionHeader {
			switch next {
			case protoHopByHop, protoRouting, protoDestOpts:
				if at+8 > len(ip) {
					return f, nil
				}
				next, at = ip[at], at+8+int(ip[at+1])*8
			case protoFragment:
				return f, nil
			default:
				if at <= len(ip) {
					f.proto, f.l4 = next, ethHeaderLen+at
				}
				return f, nil
			}
		}
		return f, nil
	}
	return frame{}, errNotIP
}

// setEnd believes the IP length only if it lies in the frame: that of a GSO
// packet may say nothing.
func (f *frame) setEnd(p []byte, ipLen int) {
	if f.end = ethHeaderLen + ipLen; f.end > len(p) || f.end < f.l4 {
		f.end = len(p)
	}
}

// prepare fills the virtio header for a packet, and may write its checksum
// field. It never turns a packet that came in damaged into a valid one.
//
// A packet that a local stack has made has, where its checksum will stand,
// the sum of the pseudo-header only (CHECKSUM_PARTIAL): the kernel is told to
// finish it. A packet from a wire has a full checksum, and goes as it is: if
// it is wrong, the receiver drops it, as it would have done without us. SCTP's
// checksum is none that the header can ask for: a local stack leaves it 0, and
// it is computed here. A fragment has its datagram's sum, complete.
func prepare(p []byte, gsoSize uint16, h *[vnetHeaderLen]byte) (frame, error) {
	*h = [vnetHeaderLen]byte{}
	f, err := parseFrame(p)
	if err != nil {
		return f, err
	}
	var at, headers int // of the checksum field; up to the payload
	switch {
	case f.l4 == 0:
	case f.proto == protoTCP && len(p) >= f.l4+20:
		at = f.l4 + tcpCsumOffset
		headers = f.l4 + int(p[f.l4+12]>>4)*4
	case f.proto == protoUDP && len(p) >= f.l4+8:
		at = f.l4 + udpCsumOffset
		headers = f.l4 + 8
	}
	if f.proto == protoSCTP && f.l4 != 0 && gsoSize == 0 {
		finishSCTP(p[f.l4:f.end])
	}
	if at == 0 {
		if gsoSize != 0 {
			return f, errors.New("held GSO packet is neither TCP nor UDP")
		}
		return f, nil
	}
	if gsoSize != 0 || f.end < f.l4 {
		f.end = len(p)
	}
	pseudo := fold(sum(sum(uint32(f.proto)+uint32(f.end-f.l4), f.src), f.dst))
	partial := binary.BigEndian.Uint16(p[at:]) == pseudo
	if gsoSize != 0 {
		// Segments have no checksums before they are cut: always partial.
		partial = true
		binary.BigEndian.PutUint16(p[at:], pseudo)
		switch {
		case headers > len(p):
			return f, errors.New("held GSO packet ends within its headers")
		case f.proto == protoUDP:
			h[1] = vnetGSOUDPL4
		case f.etherType == ethIP4:
			h[1] = vnetGSOTCP4
		default:
			h[1] = vnetGSOTCP6
		}
		if f.proto == protoTCP && p[f.l4+13]&tcpFlagCWR != 0 {
			h[1] |= vnetGSOECN // the first segment alone carries CWR
		}
		binary.NativeEndian.PutUint16(h[2:], uint16(headers))
		binary.NativeEndian.PutUint16(h[4:], gsoSize)
	}
	if partial {
		h[0] = vnetNeedsCsum
		binary.NativeEndian.PutUint16(h[6:], uint16(f.l4))
		binary.NativeEndian.PutUint16(h[8:], uint16(at-f.l4))
	}
	return f, nil
}

// finishSCTP computes the checksum that a local stack left to the device.
func finishSCTP(p []byte) {
	if len(p) < sctpHeaderLen || binary.LittleEndian.Uint32(p[sctpCsumOffset:]) != 0 {
		return
	}
	binary.LittleEndian.PutUint32(p[sctpCsumOffset:], crc32.Checksum(p, castagnoli))
}

var castagnoli = crc32.MakeTable(crc32.Castagnoli)

// sum adds 16-bit big-endian words (RFC 1071).
func sum(acc uint32, b []byte) uint32 {
	for ; len(b) >= 2; b = b[2:] {
		acc += uint32(binary.BigEndian.Uint16(b))
	}
	if len(b) == 1 {
		acc += uint32(b[0]) << 8
	}
	return acc
}

func fold(acc uint32) uint16 {
	for acc > 0xffff {
		acc = acc>>16 + acc&0xffff
	}
	return uint16(acc)
}
