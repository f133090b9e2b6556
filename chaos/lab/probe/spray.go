package probe

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"net/netip"
	"time"

	"golang.org/x/sys/unix"
)

// Packet is one packet of a Spray: a UDP datagram, or with TCP a SYN.
type Packet struct {
	To         netip.AddrPort
	SourcePort uint16
	TCP        bool
}

// sprayTick is how often a Spray catches up with its rate, and sprayBurst the
// longest time that it makes up for: a storm that lost its core does not
// return as a greater one.
const (
	sprayTick  = time.Millisecond
	sprayBurst = 20 * time.Millisecond
)

// Spray sends IPv4 packets from an address of this namespace, rate in a second
// (0: as fast as it can), until ctx ends: next(0), next(1), ... Every packet
// may be a flow of its own; nobody listens for answers. It needs CAP_NET_RAW.
// It blocks the calling thread, in whose namespace it stays. sent are packets
// that the kernel took, also if it dropped them later; an error is none of the
// network's.
func Spray(ctx context.Context, from netip.Addr, rate int, next func(n uint64) Packet) (sent uint64, err error) {
	// Protocol RAW sends packets with their own header and receives none.
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_RAW|unix.SOCK_CLOEXEC, unix.IPPROTO_RAW)
	if err != nil {
		return 0, fmt.Errorf("raw socket: %w", err)
	}
	defer unix.Close(fd)
	tick := time.NewTicker(sprayTick)
	defer tick.Stop()
	var buf [sprayTCP]byte
	begin, asked := time.Now(), uint64(0)
	for ctx.Err() == nil {
		due := asked + 64
		if rate > 0 {
			due = uint64(time.Since(begin).Seconds() * float64(rate))
			if most := uint64(sprayBurst.Seconds() * float64(rate)); due > asked+most {
				// What it is behind is given up.
				begin = begin.Add(time.Duration(float64(due-asked-most) / float64(rate) * 1e9))
				due = asked + most
			}
		}
		for ; asked < due; asked++ {
			p := next(asked)
			err := unix.Sendto(fd, packet(&buf, from, p), 0, &unix.SockaddrInet4{Addr: p.To.Addr().As4()})
			switch {
			case err == nil, errors.Is(err, unix.EPERM):
				sent++
			case !ofTheNetwork(err):
				return sent, fmt.Errorf("send to %v: %w", p.To, err)
			}
		}
		if rate > 0 {
			<-tick.C
		}
	}
	return sent, nil
}

func ofTheNetwork(err error) bool {
	for _, e := range []unix.Errno{unix.ENOBUFS, unix.EHOSTUNREACH, unix.ENETUNREACH, unix.ECONNREFUSED, unix.EINTR, unix.EAGAIN} {
		if errors.Is(err, e) {
			return true
		}
	}
	return false
}

// Bytes of the two kinds of packets.
const (
	sprayUDP = 20 + 8 + 5
	sprayTCP = 20 + 20
)

// packet writes an IPv4 packet. The kernel fills in length, identification and
// checksum of the IP header.
func packet(buf *[sprayTCP]byte, from netip.Addr, p Packet) []byte {
	*buf = [sprayTCP]byte{0: 0x45, 8: 64, 9: unix.IPPROTO_UDP}
	src, dst := from.As4(), p.To.Addr().As4()
	copy(buf[12:], src[:])
	copy(buf[16:], dst[:])
	b := binary.BigEndian
	b.PutUint16(buf[20:], p.SourcePort)
	b.PutUint16(buf[22:], p.To.Port())
	if !p.TCP {
		b.PutUint16(buf[24:], sprayUDP-20) // no checksum: IPv4 allows that
		copy(buf[28:], "flood")
		return buf[:sprayUDP]
	}
	buf[9], buf[32], buf[33] = unix.IPPROTO_TCP, 5<<4, 2 // header of 5 words, SYN
	b.PutUint16(buf[34:], 1024)
	sum := uint32(unix.IPPROTO_TCP + 20) // with the pseudo-header
	for i := 12; i < sprayTCP; i += 2 {
		sum += uint32(b.Uint16(buf[i:]))
	}
	for sum > 0xffff {
		sum = sum>>16 + sum&0xffff
	}
	b.PutUint16(buf[36:], ^uint16(sum))
	return buf[:]
}
