package datapath_test

import (
	"encoding/binary"
	"errors"
	"net"
	"net/netip"
	"os"
	"strings"
	"testing"

	"github.com/cilium/ebpf"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"portcullis/bpf/abi"
	"portcullis/datapath"
)

// bridge puts the workload behind a bridge, which has the node's address then.
func (x *serving) bridge() netlink.Link {
	x.t.Helper()
	x.must(netlink.LinkAdd(&netlink.Bridge{LinkAttrs: netlink.LinkAttrs{Name: "br0"}}))
	bridge, err := netlink.LinkByName("br0")
	x.must(err)
	port, err := netlink.LinkByName("wl0")
	x.must(err)
	for _, a := range []string{"10.8.0.1/24", "fd08::1/64"} {
		gateway, err := netlink.ParseAddr(a)
		x.must(err)
		x.must(netlink.AddrDel(port, gateway))
	}
	x.must(netlink.LinkSetMaster(port, bridge))
	x.answers("br0", "10.8.0.1/24")
	x.answers("br0", "fd08::1/64")
	bridge, err = netlink.LinkByName("br0") // its address is that of a port
	x.must(err)
	return bridge
}

// door is a way onto the bridge at which no program is: a packet that comes by it
// is as one that from_workload has let go already.
type door struct {
	x       *serving
	ifindex int
	from    []byte // MAC
	to      []byte
}

func (x *serving) door(bridge netlink.Link) *door {
	x.t.Helper()
	x.veth2("door0")
	inside, err := netlink.LinkByName("door0")
	x.must(err)
	x.must(netlink.LinkSetMaster(inside, bridge))
	x.up0("door0")
	x.up0("peer")
	outside, err := netlink.LinkByName("peer")
	x.must(err)
	bridge, err = netlink.LinkByName("br0")
	x.must(err)
	return &door{x: x, ifindex: outside.Attrs().Index, from: outside.Attrs().HardwareAddr, to: bridge.Attrs().HardwareAddr}
}

// send sends a datagram to the service.
func (d *door) send(src netip.Addr, sport uint16, payload string) {
	d.x.t.Helper()
	dst := d.x.service.Addr()
	udp := binary.BigEndian.AppendUint16(nil, sport)
	udp = binary.BigEndian.AppendUint16(udp, d.x.service.Port())
	udp = binary.BigEndian.AppendUint16(udp, uint16(8+len(payload)))
	udp = append(append(udp, 0, 0), payload...)
	a, b := src.AsSlice(), dst.AsSlice()
	pseudo := binary.BigEndian.AppendUint16(append(append([]byte{0, 17}, a...), b...), uint16(len(udp)))
	binary.BigEndian.PutUint16(udp[6:], checksum(append(pseudo, udp...)))
	p := append(append([]byte{}, d.to...), d.from...)
	if src.Is4() {
		h := append(append([]byte{0x45, 0, 0, byte(20 + len(udp)), 0, 9, 0, 0, 64, 17, 0, 0}, a...), b...)
		binary.BigEndian.PutUint16(h[10:], checksum(h))
		p = append(append(p, 8, 0), h...)
	} else {
		p = append(append(append(p, 0x86, 0xdd, 0x60, 0, 0, 0, 0, byte(len(udp)), 17, 64), a...), b...)
	}
	p = append(p, udp...)
	fd, err := unix.Socket(unix.AF_PACKET, unix.SOCK_RAW|unix.SOCK_CLOEXEC, 0)
	d.x.must(err)
	defer unix.Close(fd)
	d.x.must(unix.Sendto(fd, p, 0, &unix.SockaddrLinklayer{Ifindex: d.ifindex, Halen: 6, Protocol: binary.NativeEndian.Uint16(p[12:14])}))
}

// Behind a bridge, what from_workload has let go before its workload ended is
// dropped behind the translation. Somebody who never was a workload is none of our
// business.
func TestServiceSenderHasEnded(t *testing.T) {
	bothFamilies(t, func(t *testing.T, is4 bool) {
		x := newServing(t, is4)
		way := x.door(x.bridge())
		x.confirm(x.d, 2, x.remote)
		x.lead(x.remote)
		server := x.udp(x.lab.remote, x.remote, x.backendPort)
		x.call("in force")
		x.exchange(server, "in force")
		way.send(x.own, 6001, "under way")
		x.receive(server, "under way")

		var stamp uint64
		for i, s := range x.d.Slots() {
			if i == 1 {
				stamp = s.Stamp
			}
		}
		drops := func() uint64 { return x.egress(abi.VerdictDrop, abi.ReasonNoEndpoint) }
		dropped := func(sport uint16, payload string) {
			t.Helper()
			before := drops()
			way.send(x.own, sport, payload)
			x.eventually("a drop of "+payload, func() bool { return drops() > before })
			x.nothing(server)
		}
		x.must(x.d.ZeroSlot(1, stamp, x.own)) // and no change of a slot until the next
		dropped(6001, "too late")
		dropped(6002, "another's")
		nobody := netip.MustParseAddr("10.8.0.77")
		if !is4 {
			nobody = netip.MustParseAddr("fd08::77")
		}
		way.send(nobody, 6001, "not managed")
		x.receive(server, "not managed")

		entry := func(ip netip.Addr) error {
			key := datapath.Addr(ip)
			return pinnedMap(x.lab, "bindings").Lookup(&key, &abi.Binding{})
		}
		x.eventually("its entry goes in the end", func() bool {
			x.must(x.d.ZeroSlot(1, stamp, x.own)) // it may be repeated
			return errors.Is(entry(x.own), ebpf.ErrKeyNotExist)
		})

		// Bound again, it is who it is now.
		x.local(3, x.ep.Ifindex, x.own, 2001)
		way.send(x.own, 6003, "again")
		x.receive(server, "again")
		x.ep.State = uint32(abi.EPClosed)
		x.must(x.d.SetEndpoint(x.ep))
		dropped(6003, "closed")
	})
}

// A device that is an uplink too may have endpoints behind it: one that forwards,
// or those of a bridge which the node's own link is a port of.
func TestServiceOfAnEndpointBehindAnUplink(t *testing.T) {
	for _, bridged := range []bool{false, true} {
		t.Run(map[bool]string{false: "its own device", true: "a bridge"}[bridged], func(t *testing.T) {
			bothFamilies(t, func(t *testing.T, is4 bool) {
				x := newServing(t, is4)
				in := int(x.ep.Ifindex)
				if bridged {
					in = x.bridge().Attrs().Index
				}
				x.must(x.d.SetUplinks([]int{x.up, in}))
				x.confirm(x.d, 2, x.remote)
				x.lead(x.remote)
				server := x.udp(x.lab.remote, x.remote, x.backendPort)
				x.call("allowed")
				x.exchange(server, "allowed")
				x.allow(client+1, x.backendPort)
				x.call("denied")
				x.eventually("a drop", func() bool { return x.egress(abi.VerdictDrop, abi.ReasonPolicyDenied) == 1 })
				x.nothing(server)
			})
		})
	}
}

// A frame to a service goes to the node and nobody else, whatever MAC it is for:
// a bridge would lead it past the translation, and past its judge.
func TestServiceIsTheNodesWhateverTheFrameSays(t *testing.T) {
	bothFamilies(t, func(t *testing.T, is4 bool) {
		x := newServing(t, is4)
		for _, family := range []string{"ip", "ip6"} {
			x.must(os.WriteFile("/proc/sys/net/bridge/bridge-nf-call-"+family+"tables", []byte("0"), 0))
		}
		x.bridge()
		uplink, err := netlink.LinkByName("up0")
		x.must(err)
		bridge, err := netlink.LinkByName("br0")
		x.must(err)
		x.must(netlink.LinkSetMaster(uplink, bridge))
		var mac net.HardwareAddr
		x.in(x.lab.remote, func() {
			link, err := netlink.LinkByName("eth0")
			x.must(err)
			mac = link.Attrs().HardwareAddr
			x.answers("eth0", netip.PrefixFrom(x.service.Addr(), x.service.Addr().BitLen()).String())
		})
		there := x.udp(x.lab.remote, x.service.Addr(), x.service.Port())
		seen := x.sniff()
		x.in(x.workload, func() {
			link, err := netlink.LinkByName("eth0")
			x.must(err)
			x.must(netlink.NeighSet(&netlink.Neigh{LinkIndex: link.Attrs().Index, IP: netip.MustParseAddr(map[bool]string{true: "10.8.0.1", false: "fd08::1"}[is4]).AsSlice(),
				HardwareAddr: mac, State: netlink.NUD_PERMANENT}))
		})
		length := x.service.Addr().BitLen() // the node would lead it on
		x.must(netlink.RouteAdd(&netlink.Route{LinkIndex: bridge.Attrs().Index, Dst: &net.IPNet{IP: x.service.Addr().AsSlice(), Mask: net.CIDRMask(length, length)}}))
		drops := func() uint64 { return x.egress(abi.VerdictDrop, abi.ReasonServiceUntranslated) }
		x.call("by another's MAC")
		x.eventually("a drop", func() bool { return drops() == 1 })
		x.call(strings.Repeat("in fragments", 400))
		x.eventually("a drop of each fragment: nobody puts them together here", func() bool { return drops() == 5 })
		x.nothing(there)
		seen.none(func(p []byte) bool {
			return strings.Contains(string(p), "fragments") || strings.Contains(string(p), "MAC")
		})
	})
}

// sniffer takes all that comes to the remote host.
type sniffer struct {
	x  *serving
	fd int
}

func (x *serving) sniff() *sniffer {
	s := &sniffer{x: x}
	x.in(x.lab.remote, func() {
		var err error
		s.fd, err = unix.Socket(unix.AF_PACKET, unix.SOCK_RAW|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, int(binary.NativeEndian.Uint16([]byte{0, unix.ETH_P_ALL})))
		x.must(err)
	})
	x.t.Cleanup(func() { unix.Close(s.fd) })
	return s
}

// none checks that nothing has come that is like this.
func (s *sniffer) none(like func(frame []byte) bool) {
	s.x.t.Helper()
	b := make([]byte, 1<<16)
	for {
		n, _, err := unix.Recvfrom(s.fd, b, 0)
		if errors.Is(err, unix.EAGAIN) {
			return
		}
		s.x.must(err)
		if like(b[:n]) {
			s.x.t.Errorf("a frame has come: %x", b[:min(n, 80)])
		}
	}
}
