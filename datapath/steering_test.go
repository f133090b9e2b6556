package datapath_test

import (
	"bytes"
	"context"
	"crypto/rand"
	"errors"
	"io"
	"net"
	"net/netip"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netns"
	"golang.org/x/sys/unix"

	"portcullis/bpf/abi"
	"portcullis/datapath"
	"portcullis/datapath/steer"
)

var (
	another4 = netip.MustParseAddr("10.8.1.2")
	another6 = netip.MustParseAddr("fd08:1::2")
)

// steered is a lab with two workloads on the node, all of whose TCP goes through a
// proxy, out and in; and peers that are confirmed.
type steered struct {
	*lab
	d       *datapath.Datapath
	another netns.NsHandle
	eps     map[string]abi.Endpoint // by device
	stamps  map[netip.Addr]uint64
	s       datapath.Steering
	cfg     steer.Config
}

// through says which of a workload's traffic goes through the proxy, and whether
// the workloads are behind a bridge.
type through struct{ egress, ingress, bridge bool }

// bridge puts both workloads behind a bridge, which has the node's addresses then.
func (x *steered) bridge() {
	x.t.Helper()
	x.must(netlink.LinkAdd(&netlink.Bridge{LinkAttrs: netlink.LinkAttrs{Name: "br0"}}))
	br, err := netlink.LinkByName("br0")
	x.must(err)
	for _, name := range []string{"wl0", "wl1"} {
		port, err := netlink.LinkByName(name)
		x.must(err)
		addrs, err := netlink.AddrList(port, netlink.FAMILY_ALL)
		x.must(err)
		for _, a := range addrs {
			if !a.IP.IsLinkLocalUnicast() {
				x.must(netlink.AddrDel(port, &a))
			}
		}
		x.must(netlink.LinkSetMaster(port, br))
	}
	x.address("br0", "10.8.0.1/24", "fd08::1/64", "10.8.1.1/24", "fd08:1::1/64")
}

func newSteered(t *testing.T, first, second through) *steered {
	x := &steered{lab: newLab(t), eps: map[string]abi.Endpoint{}, stamps: map[netip.Addr]uint64{}}
	var err error
	x.another, err = netns.New()
	x.must(err)
	t.Cleanup(func() { x.another.Close() })
	x.must(netns.Set(x.node))
	wl1 := x.veth("wl1", x.another)
	x.address("wl1", "10.8.1.1/24", "fd08:1::1/64")
	x.in(x.another, func() {
		x.up0("lo")
		x.address("eth0", "10.8.1.2/24", "fd08:1::2/64")
		for _, gw := range []string{"10.8.1.1", "fd08:1::1"} {
			x.must(netlink.RouteAdd(&netlink.Route{Gw: net.ParseIP(gw)}))
		}
	})
	cfg := x.config()
	if first.bridge {
		x.bridge()
		// Only the mark says whose a packet is that the node routes from one of
		// the bridge's ports to another.
		cfg.EndpointMarkMask = nodeMask
	}
	x.d, err = datapath.Open(cfg)
	x.must(err)
	t.Cleanup(func() { x.must(x.d.Close()) })
	x.must(x.d.SetUplinks([]int{x.up}))
	x.must(x.d.SetRanges(map[netip.Prefix]abi.Range{
		netip.MustParsePrefix("10.8.0.0/15"): {Flags: uint32(abi.RangeKnown)},
		netip.MustParsePrefix("fd00::/8"):    {Flags: uint32(abi.RangeKnown)},
	}))
	x.s, x.cfg = x.steering(x.d)
	x.workloadOf("wl0", 1, x.wl, x.workload, workload4, workload6, first)
	x.workloadOf("wl1", 2, wl1, x.another, another4, another6, second)
	x.stamps[remote4] = x.confirm(x.d, 10, remote4)
	x.stamps[remote6] = x.confirm(x.d, 11, remote6)
	return x
}

// workloadOf makes an active endpoint, whose peers must be confirmed.
func (x *steered) workloadOf(name string, index uint32, ifindex int, ns netns.NsHandle, ip4, ip6 netip.Addr, th through) {
	x.t.Helper()
	ep := abi.Endpoint{IP4: datapath.Addr(ip4), IP6: datapath.Addr(ip6), Generation: 1, ID: x.d.State().NextEndpointID(), Ifindex: uint32(ifindex),
		State: uint32(abi.EPActive), Flags: uint32(abi.EPEnforceIngress | abi.EPEnforceEgress | abi.EPCheckMac), Identity: client, Policy: x.policy(th), HoldIndex: index}
	x.in(ns, func() {
		link, err := netlink.LinkByName("eth0")
		x.must(err)
		copy(ep.Mac[:], link.Attrs().HardwareAddr)
	})
	x.must(x.d.Attach(name, ep.Ifindex))
	x.must(x.d.AddEndpoint(name, ep))
	x.must(x.d.SetEndpoint(ep))
	x.eps[name] = ep
	for i, ip := range []netip.Addr{ip4, ip6} {
		x.local(20+2*index+uint32(i), ep.Ifindex, ip)
	}
}

func (x *steered) local(slot, ifindex uint32, ip netip.Addr) {
	x.t.Helper()
	stamp := x.d.State().ReserveStamps(1)
	x.must(x.d.InstallSlot(slot, abi.Slot{Stamp: stamp, IP: datapath.Addr(ip), Identity: client,
		Lease: uint32(abi.LeaseLocal), Ifindex: ifindex, Evidence: uint8(abi.EvidenceLocal)}, abi.SlotCold{}))
}

// policy lets confirmed peers in and out, through the proxy or not, by TCP on any
// port.
func (x *steered) policy(th through) uint32 {
	x.t.Helper()
	set := x.d.State().NextPolicySet()
	entries := map[abi.PolicyKey]abi.Policy{}
	for dir, l7 := range map[abi.Direction]bool{abi.DirEgress: th.egress, abi.DirIngress: th.ingress} {
		key := abi.PolicyKey{Prefixlen: uint32(abi.PolicyPrefixProto), Set: set, Identity: uint32(abi.IDAny), Direction: uint8(dir), Proto: unix.IPPROTO_TCP}
		peer := key
		peer.Identity = client
		flags := abi.PolicyAllow
		if l7 {
			flags |= abi.PolicyL7
		}
		entries[key], entries[peer] = abi.Policy{Flags: uint8(abi.PolicyPeerAllow)}, abi.Policy{Flags: uint8(flags), Rule: 9}
	}
	x.must(x.d.PutPolicy(set, entries))
	return set
}

// serveTCP listens in a namespace and returns the connections that come.
func (x *steered) serveTCP(ns netns.NsHandle, at netip.AddrPort) <-chan net.Conn {
	x.t.Helper()
	var ln net.Listener
	x.in(ns, func() {
		var lc net.ListenConfig
		lc.SetMultipathTCP(false)
		var err error
		ln, err = lc.Listen(context.Background(), "tcp", at.String())
		x.must(err)
	})
	conns := make(chan net.Conn, 16)
	go func() {
		defer close(conns)
		for {
			c, err := ln.Accept()
			if err != nil {
				return
			}
			conns <- c
		}
	}()
	x.t.Cleanup(func() {
		ln.Close()
		for c := range conns {
			c.Close()
		}
	})
	return conns
}

func (x *steered) dial(ns netns.NsHandle, from netip.Addr, to netip.AddrPort) (c net.Conn, err error) {
	x.t.Helper()
	x.in(ns, func() {
		d := net.Dialer{LocalAddr: &net.TCPAddr{IP: from.AsSlice()}, Timeout: patience}
		d.SetMultipathTCP(false)
		c, err = d.Dial("tcp", to.String())
	})
	if err == nil {
		x.t.Cleanup(func() { c.Close() })
	}
	return c, err
}

// connect opens a connection and checks that the server sees who really called.
func (x *steered) connect(from netns.NsHandle, ip netip.Addr, to netip.AddrPort, conns <-chan net.Conn) (client, server net.Conn) {
	x.t.Helper()
	client, err := x.dial(from, ip, to)
	if err != nil {
		x.t.Fatalf("%v calls %v: %v; counters %v", ip, to, err, counters(x.lab, x.d))
	}
	select {
	case server = <-conns:
	case <-time.After(patience):
		x.t.Fatalf("%v was not called; counters %v", to, counters(x.lab, x.d))
	}
	x.t.Cleanup(func() { server.Close() })
	if server.RemoteAddr().String() != client.LocalAddr().String() || server.LocalAddr().String() != to.String() {
		x.t.Errorf("the server at %v sees %v as client, it is %v", server.LocalAddr(), server.RemoteAddr(), client.LocalAddr())
	}
	return client, server
}

// bulk sends much both ways at once.
func (x *steered) bulk(a, b net.Conn) {
	x.t.Helper()
	data := make([]byte, 2<<20)
	rand.Read(data)
	errs := make(chan error, 4)
	for _, way := range [][2]net.Conn{{a, b}, {b, a}} {
		way[0].SetDeadline(time.Now().Add(patience))
		go func() { _, err := way[0].Write(data); errs <- err }()
		go func() {
			got := make([]byte, len(data))
			_, err := io.ReadFull(way[1], got)
			if err == nil && !bytes.Equal(got, data) {
				err = errors.New("other bytes")
			}
			errs <- err
		}()
	}
	for range cap(errs) {
		if err := <-errs; err != nil {
			x.t.Fatalf("%v; counters %v", err, counters(x.lab, x.d))
		}
	}
}

// both runs a test over IPv4 and IPv6.
func both(t *testing.T, test func(t *testing.T, own, another, remote netip.Addr)) {
	t.Run("ip4", func(t *testing.T) { test(t, workload4, another4, remote4) })
	t.Run("ip6", func(t *testing.T) { test(t, workload6, another6, remote6) })
}

func (f *forwarder) want(dirs ...abi.Direction) {
	f.t.Helper()
	saw := f.saw()
	if len(saw) != len(dirs) {
		f.t.Fatalf("the proxy saw %v, want %d connections", saw, len(dirs))
	}
	for i, dir := range dirs {
		if saw[i].dir != dir {
			f.t.Errorf("connection %d at the proxy is %v, want %v", i, saw[i].dir, dir)
		}
	}
}

// TestSteeredEgress: a workload's connections go through the proxy, whatever the
// port, and the server sees the workload.
func TestSteeredEgress(t *testing.T) {
	both(t, func(t *testing.T, own, _, remote netip.Addr) {
		x := newSteered(t, through{egress: true}, through{})
		f := x.forwarder(x.s)
		for i, port := range []uint16{80, 31337} {
			at := netip.AddrPortFrom(remote, port)
			client, server := x.connect(x.workload, own, at, x.serveTCP(x.remote, at))
			x.bulk(client, server)
			f.want([]abi.Direction{abi.DirEgress, abi.DirEgress}[:i+1]...)
		}
	})
}

// TestSteeredBridge: behind a bridge the packets of the proxy go up to the node,
// whatever MAC the workload would have sent them to.
func TestSteeredBridge(t *testing.T) {
	both(t, func(t *testing.T, own, another, remote netip.Addr) {
		x := newSteered(t, through{egress: true, bridge: true}, through{ingress: true})
		f := x.forwarder(x.s)
		at := netip.AddrPortFrom(remote, 8080)
		client, server := x.connect(x.workload, own, at, x.serveTCP(x.remote, at))
		x.bulk(client, server)
		f.want(abi.DirEgress)
		at = netip.AddrPortFrom(another, 8080)
		conns := x.serveTCP(x.another, at)
		client, server = x.connect(x.remote, remote, at, conns)
		x.bulk(client, server)
		f.want(abi.DirEgress, abi.DirIngress)
		client, server = x.connect(x.workload, own, at, conns)
		x.bulk(client, server)
		if saw := f.saw(); len(saw) != 4 || saw[2].dir == saw[3].dir {
			t.Errorf("the proxy saw %v", saw)
		}
	})
}

// TestSteeredRestart: connections live through an agent's restart, whose programs
// take over under the same marks, and through a repair that finds nothing to do;
// what was taken away is made again.
func TestSteeredRestart(t *testing.T) {
	x := newSteered(t, through{egress: true}, through{})
	f := x.forwarder(x.s)
	at := netip.AddrPortFrom(remote4, 8080)
	conns := x.serveTCP(x.remote, at)
	client, server := x.connect(x.workload, workload4, at, conns)
	x.must(x.d.Close())
	var err error
	x.d, err = datapath.Open(x.config())
	x.must(err)
	if err := x.d.PutPolicy(99, map[abi.PolicyKey]abi.Policy{{Set: 99}: {Flags: uint8(abi.PolicyAllow | abi.PolicyL7)}}); !errors.Is(err, datapath.ErrNotSteered) {
		t.Errorf("an entry for a proxy that is not joined: %v", err)
	}
	s, err := steer.Ensure(x.cfg)
	x.must(err)
	defer s.Namespace.Close()
	if s.Sides != x.s.Sides {
		t.Errorf("joined by %v, before by %v", s.Sides, x.s.Sides)
	}
	x.must(x.d.Steer(s))
	x.bulk(client, server)
	f.want(abi.DirEgress)
	// Somebody takes a device away, and with it the other end.
	link, err := netlink.LinkByIndex(int(s.Sides[abi.DirEgress].Outer))
	x.must(err)
	x.must(netlink.LinkDel(link))
	f.stop()
	s2, err := steer.Ensure(x.cfg)
	x.must(err)
	defer s2.Namespace.Close()
	x.must(x.d.Steer(s2))
	if s2.Sides[abi.DirEgress] == s.Sides[abi.DirEgress] || s2.Sides[abi.DirIngress] != s.Sides[abi.DirIngress] {
		t.Errorf("joined by %v, before by %v", s2.Sides, s.Sides)
	}
	f = x.forwarder(s2)
	client, server = x.connect(x.workload, workload4, at, conns)
	x.bulk(client, server)
	f.want(abi.DirEgress)
	x.must(x.d.Unsteer())
	if _, err := client.Write([]byte("more")); err != nil {
		t.Error(err)
	}
	x.eventually("a drop", func() bool { return dropped(x.lab, x.d, abi.DirEgress, abi.ReasonL7Unavailable) > 0 })
}

// TestSteeredIngress: the same for connections to a workload; those of its
// neighbour, under no such rule, pass by the proxy.
func TestSteeredIngress(t *testing.T) {
	both(t, func(t *testing.T, own, another, remote netip.Addr) {
		x := newSteered(t, through{ingress: true}, through{})
		f := x.forwarder(x.s)
		at := netip.AddrPortFrom(own, 8080)
		client, server := x.connect(x.remote, remote, at, x.serveTCP(x.workload, at))
		x.bulk(client, server)
		f.want(abi.DirIngress)
		at = netip.AddrPortFrom(another, 8080)
		client, server = x.connect(x.remote, remote, at, x.serveTCP(x.another, at))
		x.bulk(client, server)
		f.want(abi.DirIngress)
	})
}

// TestSteeredBothEnds: a flow between two workloads of the node goes through the
// proxy twice, under the same addresses and ports.
func TestSteeredBothEnds(t *testing.T) {
	both(t, func(t *testing.T, own, another, remote netip.Addr) {
		x := newSteered(t, through{egress: true, ingress: true}, through{egress: true, ingress: true})
		f := x.forwarder(x.s)
		at := netip.AddrPortFrom(another, 8080)
		client, server := x.connect(x.workload, own, at, x.serveTCP(x.another, at))
		x.bulk(client, server)
		if saw := f.saw(); len(saw) != 2 || saw[0].dir == saw[1].dir || saw[0].client != saw[1].client || saw[0].server != saw[1].server {
			t.Errorf("the proxy saw %v", saw)
		}
		// And both go to the same place elsewhere, from the same port.
		at = netip.AddrPortFrom(remote, 8081)
		conns := x.serveTCP(x.remote, at)
		for _, w := range []struct {
			ns netns.NsHandle
			ip netip.Addr
		}{{x.workload, own}, {x.another, another}} {
			client, server := x.connect(w.ns, w.ip, at, conns)
			x.bulk(client, server)
		}
	})
}
