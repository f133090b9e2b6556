package datapath_test

import (
	"bytes"
	"encoding/binary"
	"net"
	"net/netip"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netns"
	"golang.org/x/sys/unix"

	"portcullis/bpf/abi"
)

// raw opens a raw socket of an IP protocol in a namespace.
func (l *lab) raw(ns netns.NsHandle, ip netip.Addr, proto string) *net.IPConn {
	l.t.Helper()
	network := "ip4:" + proto
	if ip.Is6() {
		network = "ip6:" + proto
	}
	var c net.PacketConn
	l.in(ns, func() {
		var err error
		c, err = net.ListenPacket(network, ip.String())
		l.must(err)
	})
	l.t.Cleanup(func() { c.Close() })
	l.must(c.SetReadDeadline(time.Now().Add(patience)))
	return c.(*net.IPConn)
}

func sctp(port uint16) []byte {
	b := binary.BigEndian.AppendUint16([]byte{0x17, 0x70}, port)
	b = append(b, make([]byte, 8)...)                                                 // tag and checksum
	return append(b, 1, 0, 0, 20, 1, 2, 3, 4, 0, 0, 255, 255, 0, 1, 0, 1, 0, 0, 0, 1) // INIT
}

// Protocols without ports are let in by their number, SCTP by its port: real
// packets, of both families.
func TestProtocolsByNumber(t *testing.T) {
	for _, tc := range []struct{ from, to netip.Addr }{{remote4, workload4}, {remote6, workload6}} {
		t.Run(tc.to.String(), func(t *testing.T) {
			l := newLab(t)
			d := l.open()
			ep := l.serve(d)
			l.confirm(d, 1, tc.from)
			set, entries := d.State().NextPolicySet(), map[abi.PolicyKey]abi.Policy{}
			for _, id := range []uint32{uint32(abi.IDAny), client} {
				flag := abi.PolicyAllow
				if id != client {
					flag = abi.PolicyPeerAllow
				}
				key := abi.PolicyKey{Set: set, Identity: id, Direction: uint8(abi.DirIngress)}
				key.Prefixlen, key.Proto = uint32(abi.PolicyPrefixProto), unix.IPPROTO_GRE
				entries[key] = abi.Policy{Flags: uint8(flag)}
				key.Prefixlen, key.Proto, key.Port = uint32(abi.PolicyPrefixPort), unix.IPPROTO_SCTP, [2]uint8{0x13, 0x88}
				entries[key] = abi.Policy{Flags: uint8(flag)}
			}
			l.must(d.PutPolicy(set, entries))
			ep.Policy = set
			l.must(d.SetEndpoint(ep))
			for i, p := range []struct {
				proto   string
				payload []byte
				passes  bool
			}{
				{"47", []byte{0, 0, 8, 0, 1, 2, 3, 4}, true}, {"50", []byte{0, 0, 1, 0, 0, 0, 0, 1, 5, 6, 7, 8}, false},
				{"132", sctp(5000), true}, {"132", sctp(5001), false},
			} {
				in, out := l.raw(l.workload, tc.to, p.proto), l.raw(l.remote, tc.from, p.proto)
				before := dropped(l, d, abi.DirIngress, abi.ReasonPolicyDenied)
				_, err := out.WriteTo(p.payload, &net.IPAddr{IP: tc.to.AsSlice()})
				l.must(err)
				if !p.passes {
					l.eventually("it is denied", func() bool { return dropped(l, d, abi.DirIngress, abi.ReasonPolicyDenied) == before+1 })
					continue
				}
				b := make([]byte, 128)
				n, _, err := in.ReadFrom(b)
				if err != nil || !bytes.Equal(b[:n], p.payload) {
					t.Errorf("packet %d of protocol %s: received %x, %v; counters %v", i, p.proto, b[:n], err, counters(l, d))
				}
			}
		})
	}
}

// Extension headers that a socket adds hide no ports.
func TestExtensionHeaders(t *testing.T) {
	l := newLab(t)
	d := l.open()
	l.serve(d)
	l.confirm(d, 1, remote6)
	server, peer := l.udp(l.workload, workload6, 5000), l.udp(l.remote, remote6, 6000)
	c, err := peer.SyscallConn()
	l.must(err)
	for _, option := range []int{unix.IPV6_HOPOPTS, unix.IPV6_DSTOPTS} {
		l.must(c.Control(func(fd uintptr) {
			l.must(unix.SetsockoptString(int(fd), unix.IPPROTO_IPV6, option, "\x00\x00\x01\x04\x00\x00\x00\x00"))
		}))
		l.send(peer, workload6, 5000, "behind options")
		l.receive(server, "behind options")
	}
	if n := len(contents[abi.CTKey, abi.CT](l, "conntrack")); n != 1 {
		t.Errorf("%d flows, want the one", n)
	}
}

// What is neither IP nor ARP is dropped, in VLAN tags and without, whatever
// policy says of its endpoint.
func TestFramesThatAreNotJudged(t *testing.T) {
	l := newLab(t)
	d := l.open()
	ep := l.serve(d)
	ep.Flags = 0
	l.must(d.SetEndpoint(ep))
	inner := udpFrame(l)[12:] // an IP packet that would pass
	l.in(l.workload, func() {
		dev, err := netlink.LinkByName("eth0")
		l.must(err)
		fd, err := unix.Socket(unix.AF_PACKET, unix.SOCK_RAW|unix.SOCK_CLOEXEC, 0)
		l.must(err)
		defer unix.Close(fd)
		for i, tag := range [][]byte{{0x81, 0, 0, 5}, {0x88, 0xa8, 0, 5}, {0x81, 0, 0, 0}, {0x88, 0xcc}, {0x88, 0x64, 0x11, 0}} {
			frame := append(append([]byte{0xff, 0xff, 0xff, 0xff, 0xff, 0xff}, ep.Mac[:]...), tag...)
			// A packet socket may be refused what the program drops.
			_ = unix.Sendto(fd, append(frame, inner...), 0, &unix.SockaddrLinklayer{Ifindex: dev.Attrs().Index})
			l.eventually("it is dropped", func() bool { return dropped(l, d, abi.DirEgress, abi.ReasonUnsupported) == uint64(i+1) })
		}
	})
}

// Fragments that come before their first are dropped, for their ports are in
// it; in order the same datagram arrives.
func TestFragmentsOutOfOrder(t *testing.T) {
	l := newLab(t)
	d := l.open()
	l.serve(d)
	l.confirm(d, 1, remote4)
	server := l.udp(l.workload, workload4, 5000)
	data := bytes.Repeat([]byte("fragment"), 100)
	datagram := binary.BigEndian.AppendUint16([]byte{0x17, 0x70, 0x13, 0x88}, uint16(8+len(data)))
	datagram = append(append(datagram, 0, 0), data...)
	part := func(id uint16, from, to int) []byte {
		b := []byte{0x45, 0, 0, 0, byte(id >> 8), byte(id), byte(from / 8 >> 8), byte(from / 8), 64, unix.IPPROTO_UDP, 0, 0}
		if to < len(datagram) {
			b[6] |= 0x20
		}
		b = append(append(b, remote4.AsSlice()...), workload4.AsSlice()...)
		return append(b, datagram[from:to]...)
	}
	send := func(packets ...[]byte) {
		l.in(l.remote, func() {
			fd, err := unix.Socket(unix.AF_INET, unix.SOCK_RAW|unix.SOCK_CLOEXEC, unix.IPPROTO_RAW)
			l.must(err)
			defer unix.Close(fd)
			for _, p := range packets {
				l.must(unix.Sendto(fd, p, 0, &unix.SockaddrInet4{Addr: workload4.As4()}))
			}
		})
	}
	n := len(datagram)
	send(part(1, 400, n), part(1, 0, 400))
	l.eventually("the later one is dropped", func() bool { return dropped(l, d, abi.DirIngress, abi.ReasonUnsupported) == 1 })
	l.nothing(server)
	send(part(2, 0, 400), part(2, 400, n))
	l.receive(server, string(data))
	send(part(3, 0, 200), part(3, 400, n), part(3, 200, 400)) // behind their first in any order
	l.receive(server, string(data))
}
