package datapath_test

import (
	"encoding/binary"
	"net/netip"
	"strings"
	"testing"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/asm"
	"github.com/cilium/ebpf/link"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"portcullis/bpf/abi"
	"portcullis/datapath"
)

// defragment makes the node put together what it forwards, and cut it again, as
// connection tracking does.
func (l *lab) defragment() {
	l.t.Helper()
	p, err := ebpf.NewProgram(&ebpf.ProgramSpec{Type: ebpf.Netfilter, AttachType: ebpf.AttachNetfilter, License: "GPL",
		Instructions: asm.Instructions{asm.Mov.Imm(asm.R0, 1), asm.Return()}}) // NF_ACCEPT
	l.must(err)
	l.t.Cleanup(func() { p.Close() })
	const ipDefrag = 1 // BPF_F_NETFILTER_IP_DEFRAG
	for _, family := range []link.NetfilterProtocolFamily{link.NetfilterProtoIPv4, link.NetfilterProtoIPv6} {
		k, err := link.AttachNetfilter(link.NetfilterOptions{Program: p, ProtocolFamily: family, Hook: link.NetfilterInetForward,
			Priority: 700, NetfilterFlags: ipDefrag})
		l.must(err)
		l.t.Cleanup(func() { k.Close() })
	}
}

// fragmented sends a UDP datagram from the remote host in three fragments, of
// which the first has options that the others lack: a node that defragments
// has no room for them in the others, and cuts the datagram anew.
func (l *lab) fragmented(src, dst netip.Addr, sport, dport uint16, n int) {
	l.t.Helper()
	udp := binary.BigEndian.AppendUint16(nil, sport)
	udp = binary.BigEndian.AppendUint16(udp, dport)
	udp = binary.BigEndian.AppendUint16(udp, uint16(8+n))
	udp = append(udp, make([]byte, 2+n)...)
	a, b := src.AsSlice(), dst.AsSlice()
	pseudo := binary.BigEndian.AppendUint16(append(append([]byte{0, 17}, a...), b...), uint16(len(udp)))
	binary.BigEndian.PutUint16(udp[6:], checksum(append(pseudo, udp...)))
	up, err := netlink.LinkByName("up0")
	l.must(err)
	to := up.Attrs().HardwareAddr
	l.in(l.remote, func() {
		eth0, err := netlink.LinkByName("eth0")
		l.must(err)
		fd, err := unix.Socket(unix.AF_PACKET, unix.SOCK_RAW, 0)
		l.must(err)
		defer unix.Close(fd)
		for at := 0; at < len(udp); at += 1000 {
			part, more := udp[at:min(at+1000, len(udp))], at+1000 < len(udp)
			p := append(append([]byte{}, to...), eth0.Attrs().HardwareAddr...)
			if src.Is4() {
				p = append(append(p, 8, 0), fragment4(a, b, at, more, part)...)
			} else {
				p = append(append(p, 0x86, 0xdd), fragment6(a, b, at, more, part)...)
			}
			l.must(unix.Sendto(fd, p, 0, &unix.SockaddrLinklayer{Ifindex: eth0.Attrs().Index, Halen: 6,
				Protocol: binary.NativeEndian.Uint16(p[12:14])}))
		}
	})
}

func fragment4(src, dst []byte, at int, more bool, part []byte) []byte {
	h := []byte{0x45, 0, 0, 0, 0, 9, byte(at >> 11), byte(at >> 3), 64, 17, 0, 0}
	if more {
		h[6] |= 0x20
	}
	h = append(append(h, src...), dst...)
	if at == 0 {
		h = append(h, make([]byte, 40)...)
		for i := 20; i < 60; i++ {
			h[i] = 1 // no operation
		}
		h[0] = 0x4f
	}
	binary.BigEndian.PutUint16(h[2:], uint16(len(h)+len(part)))
	binary.BigEndian.PutUint16(h[10:], checksum(h))
	return append(h, part...)
}

func fragment6(src, dst []byte, at int, more bool, part []byte) []byte {
	f := []byte{17, 0, byte(at >> 8), byte(at), 0, 0, 0, 9}
	if more {
		f[3] |= 1
	}
	next := byte(44)
	if at == 0 {
		f = append(append([]byte{44, 4, 0x1e, 36}, make([]byte, 36)...), f...) // hop by hop: an experiment's
		next = 0
	}
	f = append(f, part...)
	h := []byte{0x60, 0, 0, 0, byte(len(f) >> 8), byte(len(f)), next, 64}
	return append(append(append(h, src...), dst...), f...)
}

func checksum(b []byte) uint16 {
	sum := uint32(0)
	for i := 0; i < len(b); i += 2 {
		sum += uint32(b[i]) << 8
		if i+1 < len(b) {
			sum += uint32(b[i+1])
		}
	}
	for sum > 0xffff {
		sum = sum>>16 + sum&0xffff
	}
	return ^uint16(sum)
}

// Only what the node sends itself is `host` (I1). A node that puts datagrams
// together and cuts them again forgets where IPv6 fragments came in.
func TestCutAnewIsNotHost(t *testing.T) {
	l := newLab(t)
	d := l.open()
	l.serve(d)
	l.confirm(d, 1, remote4)
	node6 := netip.MustParseAddr("fd09::1") // also the node's, but not on the workload's link
	l.must(d.InstallSlot(2, abi.Slot{Stamp: d.State().ReserveStamps(1), IP: datapath.Addr(node6), Installed: uint64(d.Now()), Generation: 5,
		Identity: uint32(abi.IDHost), Lease: uint32(abi.LeaseLocal), Evidence: uint8(abi.EvidenceLocal)}, abi.SlotCold{}))
	ep, err := d.Endpoints()
	l.must(err)
	l.must(d.PutPolicy(ep["wl0"].Policy, map[abi.PolicyKey]abi.Policy{
		{Prefixlen: uint32(abi.PolicyPrefixAny), Set: ep["wl0"].Policy, Identity: uint32(abi.IDHost), Direction: uint8(abi.DirIngress)}: {Flags: uint8(abi.PolicyAllow)},
	}))
	l.defragment()
	server4, server6 := l.udp(l.workload, workload4, 5000), l.udp(l.workload, workload6, 5000)

	// The node's own, in fragments.
	own := l.udp(l.node, node6, 7000)
	big := strings.Repeat("fragment", 800)
	l.send(own, workload6, 5000, big)
	l.receive(server6, big)

	// Forged, as of another flow, and as of the node's own.
	for i, port := range []uint16{7001, 7000} {
		before := dropped(l, d, abi.DirIngress, abi.ReasonTranslated)
		l.fragmented(node6, workload6, port, 5000, 2500)
		l.eventually("a drop: translated", func() bool { return dropped(l, d, abi.DirIngress, abi.ReasonTranslated) > before })
		if n := counters(l, d)[datapath.CounterKey{Direction: abi.DirIngress, Verdict: abi.VerdictPass}].Packets; n < 5 && i == 0 {
			t.Errorf("the node's own fragments: %d", n)
		}
	}
	l.nothing(server6)

	// IPv4 remembers.
	l.fragmented(remote4, workload4, 6000, 5000, 2500)
	l.receive(server4, strings.Repeat("\x00", 2500))
}
