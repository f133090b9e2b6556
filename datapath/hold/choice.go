package hold

import (
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
	"net/netip"

	"golang.org/x/sys/unix"
)

// A packet to a service is held behind the node's translation, which has chosen
// whom it goes to, and goes back to from_workload as it was sent. It would come
// to another choice there, whose binding may be unknown again. So before it goes
// back the choice is written into the kernel's connection tracking, where the
// translation finds it.

// asSent turns a translated packet into the one that was sent to the service.
// Like prepare it never turns a damaged packet into a valid one.
func asSent(p []byte, gsoSize uint16, service netip.AddrPort) error {
	f, err := parseFrame(p)
	if err != nil {
		return err
	}
	if f.l4 == 0 || len(p) < f.l4+8 || len(f.dst) != service.Addr().BitLen()/8 {
		return errors.New("held packet is not of the service that it names")
	}
	port := binary.BigEndian.AppendUint16(nil, service.Port())
	if gsoSize != 0 {
		f.end = len(p)
	}
	at := 0
	switch {
	case f.proto == protoTCP && len(p) >= f.l4+20:
		at = f.l4 + tcpCsumOffset
	case f.proto == protoUDP:
		at = f.l4 + udpCsumOffset
	case f.proto == protoSCTP && len(p) >= f.l4+sctpHeaderLen:
		// finishSCTP makes the sum anew where there is none.
		field := p[f.l4+sctpCsumOffset : f.l4+sctpHeaderLen]
		have := binary.LittleEndian.Uint32(field)
		copy(field, []byte{0, 0, 0, 0})
		if crc32.Checksum(p[f.l4:f.end], castagnoli) != have {
			binary.LittleEndian.PutUint32(field, have)
		}
	default:
		return errors.New("held packet to a service is of a protocol without ports")
	}
	pseudo := func() uint16 { return fold(sum(sum(uint32(f.proto)+uint32(f.end-f.l4), f.src), f.dst)) }
	partial := at != 0 && (gsoSize != 0 || binary.BigEndian.Uint16(p[at:]) == pseudo())
	if f.etherType == ethIP4 {
		replaceInSum(p[ethHeaderLen+10:], f.dst, service.Addr().AsSlice())
	}
	if at != 0 && !partial && (f.proto != protoUDP || binary.BigEndian.Uint16(p[at:]) != 0) {
		replaceInSum(p[at:], f.dst, service.Addr().AsSlice())
		replaceInSum(p[at:], p[f.l4+2:f.l4+4], port)
	}
	copy(f.dst, service.Addr().AsSlice())
	copy(p[f.l4+2:], port)
	if partial {
		binary.BigEndian.PutUint16(p[at:], pseudo())
	}
	return nil
}

// replaceInSum makes a checksum that was right with before right with after, and
// one that was wrong wrong (RFC 1624).
func replaceInSum(field, before, after []byte) {
	acc := uint32(^binary.BigEndian.Uint16(field))
	for i := 0; i < len(before); i += 2 {
		acc += uint32(^binary.BigEndian.Uint16(before[i:])) + uint32(binary.BigEndian.Uint16(after[i:]))
	}
	binary.BigEndian.PutUint16(field, ^fold(acc))
}

// Of linux/netfilter/nfnetlink_conntrack.h.
const (
	ctNew = unix.NFNL_SUBSYS_CTNETLINK << 8 // IPCTNL_MSG_CT_NEW

	ctTupleOrig, ctTupleReply, ctTimeout, ctNATDst = 1, 2, 7, 13

	ctTupleIP, ctTupleProto                 = 1, 2
	ctSrc4, ctDst4, ctSrc6, ctDst6          = 1, 2, 3, 4
	ctProtoNum, ctProtoSrc, ctProtoDst      = 1, 2, 3
	ctMin4, ctMax4, ctProto, ctMin6, ctMax6 = 1, 2, 3, 4, 5
	ctPortMin, ctPortMax                    = 1, 2

	// choiceSeconds is how long the choice waits for its packet, which comes at
	// once. From then on the connection has its own lifetime.
	choiceSeconds = 5
)

// choices writes into the connection tracking of the network namespace in which
// it first did so.
type choices struct {
	fd  int // 0: not yet open
	seq uint32
}

// keep makes the translation lead the packet's flow to the peer. That there is a
// connection already is no error: it has its choice.
func (c *choices) keep(r *Record) error {
	if c.fd == 0 {
		fd, err := unix.Socket(unix.AF_NETLINK, unix.SOCK_RAW|unix.SOCK_CLOEXEC, unix.NETLINK_NETFILTER)
		if err != nil {
			return fmt.Errorf("open a netlink socket: %w", err)
		}
		// The kernel answers within the call; this is for the worst.
		if err := unix.SetsockoptTimeval(fd, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &unix.Timeval{Usec: 100_000}); err != nil {
			unix.Close(fd)
			return err
		}
		c.fd = fd
	}
	c.seq++
	if err := unix.Sendto(c.fd, choiceMessage(r, c.seq), 0, &unix.SockaddrNetlink{Family: unix.AF_NETLINK}); err != nil {
		return err
	}
	var b [4096]byte
	for {
		n, _, err := unix.Recvfrom(c.fd, b[:], 0)
		if err != nil {
			return err
		}
		if n < unix.NLMSG_HDRLEN+4 || binary.NativeEndian.Uint32(b[8:]) != c.seq {
			continue // the answer to an earlier one, which came too late
		}
		errno := unix.Errno(-int32(binary.NativeEndian.Uint32(b[unix.NLMSG_HDRLEN:])))
		if errno == 0 || errno == unix.EEXIST {
			return nil
		}
		return errno
	}
}

func (c *choices) close() {
	if c.fd != 0 {
		unix.Close(c.fd)
	}
}

// choiceMessage asks for a connection from Local to Service that is translated to
// Peer and Dport.
func choiceMessage(r *Record, seq uint32) []byte {
	family, src, dst, low, high := uint8(unix.AF_INET), uint16(ctSrc4), uint16(ctDst4), uint16(ctMin4), uint16(ctMax4)
	if r.Service.Addr().Is6() {
		family, src, dst, low, high = unix.AF_INET6, ctSrc6, ctDst6, ctMin6, ctMax6
	}
	be16 := func(v uint16) []byte { return binary.BigEndian.AppendUint16(nil, v) }
	tuple := func(kind uint16, from, to netip.AddrPort) []byte {
		return nest(kind,
			nest(ctTupleIP, attribute(src, from.Addr().AsSlice()), attribute(dst, to.Addr().AsSlice())),
			nest(ctTupleProto, attribute(ctProtoNum, []byte{r.Proto}), attribute(ctProtoSrc, be16(from.Port())), attribute(ctProtoDst, be16(to.Port()))))
	}
	caller := netip.AddrPortFrom(r.Local, r.Sport)
	b := make([]byte, unix.NLMSG_HDRLEN, 256)
	b = append(b, family, 0, 0, 0)
	b = append(b, tuple(ctTupleOrig, caller, r.Service)...)
	b = append(b, tuple(ctTupleReply, r.Service, caller)...)
	b = append(b, attribute(ctTimeout, binary.BigEndian.AppendUint32(nil, choiceSeconds))...)
	b = append(b, nest(ctNATDst, attribute(low, r.Peer.AsSlice()), attribute(high, r.Peer.AsSlice()),
		nest(ctProto, attribute(ctPortMin, be16(r.Dport)), attribute(ctPortMax, be16(r.Dport))))...)
	binary.NativeEndian.PutUint32(b, uint32(len(b)))
	binary.NativeEndian.PutUint16(b[4:], ctNew)
	binary.NativeEndian.PutUint16(b[6:], unix.NLM_F_REQUEST|unix.NLM_F_CREATE|unix.NLM_F_EXCL|unix.NLM_F_ACK)
	binary.NativeEndian.PutUint32(b[8:], seq)
	return b
}

func attribute(kind uint16, value []byte) []byte {
	b := binary.NativeEndian.AppendUint16(nil, uint16(4+len(value)))
	b = append(binary.NativeEndian.AppendUint16(b, kind), value...)
	return append(b, make([]byte, -len(b)&3)...)
}

func nest(kind uint16, attributes ...[]byte) []byte {
	var all []byte
	for _, a := range attributes {
		all = append(all, a...)
	}
	return attribute(kind|unix.NLA_F_NESTED, all)
}
