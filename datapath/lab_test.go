package datapath_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"runtime"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netns"
	"golang.org/x/sys/unix"

	"portcullis/bpf/abi"
	"portcullis/datapath"
	"portcullis/datapath/hold"
)

// A small world for tests on the real kernel:
//
//	[ workload 10.8.0.2 ] eth0 ---- wl0 [ node ] up0 ---- eth0 [ remote 10.9.0.2, .3, .4 ]
//	          fd08::2                                             fd09::2
//
// The test's own goroutine lives in the node's network namespace.
type lab struct {
	t                      *testing.T
	node, workload, remote netns.NsHandle
	wl, up                 int // ifindex, in the node
	mac                    [6]byte
	pins                   string
}

var (
	workload4 = netip.MustParseAddr("10.8.0.2")
	workload6 = netip.MustParseAddr("fd08::2")
	remote4   = netip.MustParseAddr("10.9.0.2")
	remote6   = netip.MustParseAddr("fd09::2")
	serial    atomic.Uint32
)

const (
	patience = time.Minute // until a test that waits for something gives up
	client   = 1000        // the identity that policy lets in
)

func needRoot(t *testing.T) {
	t.Helper()
	if os.Geteuid() == 0 {
		return
	}
	if os.Getenv("CI") == "true" {
		t.Fatal("this test needs root, and CI must run it")
	}
	t.Skip("needs root: network namespaces and kernel programs")
}

func newLab(t *testing.T) *lab {
	needRoot(t)
	runtime.LockOSThread() // never unlocked: the thread ends with the test's goroutine
	l := &lab{t: t, pins: fmt.Sprintf("/sys/fs/bpf/portcullis-test-%d-%d", os.Getpid(), serial.Add(1))}
	for _, ns := range []*netns.NsHandle{&l.workload, &l.remote, &l.node} {
		h, err := netns.New()
		l.must(err)
		*ns = h
		t.Cleanup(func() { h.Close() })
		// Link-local addresses are usable at once: neighbour discovery waits
		// for them, for a second.
		l.must(os.WriteFile("/proc/sys/net/ipv6/conf/default/accept_dad", []byte("0"), 0))
	}
	t.Cleanup(func() {
		if err := datapath.Remove(l.pins); err != nil {
			t.Errorf("remove the pins: %v", err)
		}
	})
	l.wl = l.veth("wl0", l.workload)
	l.up = l.veth("up0", l.remote)
	for path, v := range map[string]string{"ipv4/ip_forward": "1", "ipv6/conf/all/forwarding": "1", "ipv4/conf/all/rp_filter": "0"} {
		l.must(os.WriteFile("/proc/sys/net/"+path, []byte(v), 0))
	}
	l.address("wl0", "10.8.0.1/24", "fd08::1/64")
	l.address("up0", "10.9.0.1/24", "fd09::1/64")
	for _, side := range []struct {
		ns    netns.NsHandle
		addrs []string
		gw    []string
	}{
		{l.workload, []string{"10.8.0.2/24", "fd08::2/64"}, []string{"10.8.0.1", "fd08::1"}},
		{l.remote, []string{"10.9.0.2/24", "10.9.0.3/24", "10.9.0.4/24", "fd09::2/64"}, []string{"10.9.0.1", "fd09::1"}},
	} {
		l.in(side.ns, func() {
			l.up0("lo")
			l.address("eth0", side.addrs...)
			for _, gw := range side.gw {
				l.must(netlink.RouteAdd(&netlink.Route{Gw: net.ParseIP(gw)}))
			}
			if side.ns == l.workload {
				link, err := netlink.LinkByName("eth0")
				l.must(err)
				copy(l.mac[:], link.Attrs().HardwareAddr)
			}
		})
	}
	l.up0("lo")
	return l
}

func (l *lab) must(err error) {
	l.t.Helper()
	if err != nil {
		l.t.Fatal(err)
	}
}

func (l *lab) veth(name string, peer netns.NsHandle) int {
	l.t.Helper()
	l.must(netlink.LinkAdd(&netlink.Veth{LinkAttrs: netlink.LinkAttrs{Name: name}, PeerName: "eth0", PeerNamespace: netlink.NsFd(peer)}))
	link, err := netlink.LinkByName(name)
	l.must(err)
	return link.Attrs().Index
}

func (l *lab) up0(name string) {
	l.t.Helper()
	link, err := netlink.LinkByName(name)
	l.must(err)
	l.must(netlink.LinkSetUp(link))
}

func (l *lab) address(name string, prefixes ...string) {
	l.t.Helper()
	l.up0(name)
	link, err := netlink.LinkByName(name)
	l.must(err)
	for _, p := range prefixes {
		a, err := netlink.ParseAddr(p)
		l.must(err)
		a.Flags = unix.IFA_F_NODAD
		l.must(netlink.AddrAdd(link, a))
	}
}

// in runs f in another network namespace. Sockets made by f stay there.
func (l *lab) in(ns netns.NsHandle, f func()) {
	l.t.Helper()
	l.must(netns.Set(ns))
	defer func() { l.must(netns.Set(l.node)) }()
	f()
}

func (l *lab) config() datapath.Config {
	return datapath.Config{PinDir: l.pins, Bindings: 64, Conntrack: 1024, Endpoints: 8, Leases: 16, Policy: 64, Ranges: 16,
		HeldBytes: 1 << 20, EventBytes: 1 << 18, AggregationFlags: datapath.TCPFlagsOfEnds}
}

func (l *lab) open() *datapath.Datapath {
	l.t.Helper()
	d, err := datapath.Open(l.config())
	l.must(err)
	l.t.Cleanup(func() { l.must(d.Close()) })
	return d
}

// endpoint is the workload's, under a policy that asks who the peer is and
// lets the identity `client` in.
func (l *lab) endpoint(d *datapath.Datapath) abi.Endpoint {
	l.t.Helper()
	set := d.State().NextPolicySet()
	key := abi.PolicyKey{Prefixlen: uint32(abi.PolicyPrefixAny), Set: set, Identity: uint32(abi.IDAny), Direction: uint8(abi.DirIngress)}
	peer := key
	peer.Identity = client
	l.must(d.PutPolicy(set, map[abi.PolicyKey]abi.Policy{
		key: {Flags: uint8(abi.PolicyPeerAllow)}, peer: {Flags: uint8(abi.PolicyAllow), Rule: 7},
	}))
	return abi.Endpoint{IP4: datapath.Addr(workload4), IP6: datapath.Addr(workload6), Generation: 1, ID: d.State().NextEndpointID(),
		Ifindex: uint32(l.wl), State: uint32(abi.EPActive), Flags: uint32(abi.EPEnforceIngress | abi.EPStrictTcp), Identity: 2000, Policy: set,
		HoldIndex: 1, Mac: l.mac}
}

// serve makes the workload an active endpoint, whose peers must be confirmed.
func (l *lab) serve(d *datapath.Datapath) abi.Endpoint {
	l.t.Helper()
	l.must(d.SetUplinks([]int{l.up}))
	l.must(d.SetRanges(map[netip.Prefix]abi.Range{
		netip.MustParsePrefix("10.8.0.0/15"): {Flags: uint32(abi.RangeKnown | abi.RangeHoldable)},
		netip.MustParsePrefix("fd00::/8"):    {Flags: uint32(abi.RangeKnown | abi.RangeHoldable)},
	}))
	ep := l.endpoint(d)
	l.must(d.Attach("wl0", ep.Ifindex))
	l.must(d.AddEndpoint("wl0", ep))
	l.must(d.SetEndpoint(ep))
	return ep
}

const sessionLease = uint32(abi.LeaseFirst)

// confirm installs the binding of a remote IP under a fresh stamp and a lease
// that lasts for the test.
func (l *lab) confirm(d *datapath.Datapath, slot uint32, ip netip.Addr) (stamp uint64) {
	l.t.Helper()
	stamp = d.State().ReserveStamps(1)
	l.must(d.SetDeadline(sessionLease, d.Now()+int64(time.Hour)))
	l.must(d.InstallSlot(slot, abi.Slot{Stamp: stamp, IP: datapath.Addr(ip), Installed: uint64(d.Now()), Generation: 5,
		Identity: client, Lease: sessionLease, Evidence: uint8(abi.EvidenceLease)}, abi.SlotCold{}))
	return stamp
}

// gate is what the agent's loop does with held packets.
type gate struct {
	d       *datapath.Datapath
	records chan hold.Record
	stop    func()
}

func (l *lab) gate(d *datapath.Datapath) *gate {
	ctx, cancel := context.WithCancel(context.Background())
	g := &gate{d: d, records: make(chan hold.Record, 256)}
	before := tick(l, d)
	done := make(chan error, 1)
	go func() {
		done <- d.Held(ctx, func(r hold.Record) {
			select {
			case g.records <- r:
			case <-ctx.Done():
			}
		})
	}()
	stopped := false
	g.stop = func() {
		if stopped {
			return
		}
		stopped = true
		cancel()
		if err := <-done; !errors.Is(err, context.Canceled) {
			l.t.Errorf("Held ended with %v", err)
		}
	}
	l.t.Cleanup(g.stop)
	l.eventually("the hold reader ticks", func() bool { return tick(l, d) > before })
	return g
}

func tick(l *lab, d *datapath.Datapath) uint64 {
	var s abi.State
	l.must(pinnedMap(l, "state").Lookup(uint32(0), &s))
	return s.ReaderTick
}

func (g *gate) next(l *lab) hold.Record {
	l.t.Helper()
	select {
	case r := <-g.records:
		return r
	case <-time.After(patience):
		l.t.Fatalf("no packet was held; counters: %v", counters(l, g.d))
		panic("not reached")
	}
}

// release gives the next held packet back, which is lost.
func (g *gate) release(l *lab) {
	l.t.Helper()
	r := g.next(l)
	g.d.ReleaseHold(r.HoldIndex, r.Source)
}

// eventually polls, as no event tells when a packet has been judged.
func (l *lab) eventually(what string, ok func() bool) {
	l.t.Helper()
	deadline := time.Now().Add(patience)
	tick := time.NewTicker(time.Millisecond)
	defer tick.Stop()
	for !ok() {
		if time.Now().After(deadline) {
			l.t.Fatalf("never happened: %s", what)
		}
		<-tick.C
	}
}

func counters(l *lab, d *datapath.Datapath) map[datapath.CounterKey]datapath.Counter {
	l.t.Helper()
	c, err := d.Counters()
	l.must(err)
	return c
}

func dropped(l *lab, d *datapath.Datapath, dir abi.Direction, why abi.Reason) uint64 {
	return counters(l, d)[datapath.CounterKey{Direction: dir, Verdict: abi.VerdictDrop, Reason: why}].Packets
}

func udpNetwork(ip netip.Addr) string {
	if ip.Is4() {
		return "udp4"
	}
	return "udp6"
}

// udp opens a socket in a namespace.
func (l *lab) udp(ns netns.NsHandle, ip netip.Addr, port uint16) *net.UDPConn {
	l.t.Helper()
	var c *net.UDPConn
	l.in(ns, func() {
		var err error
		c, err = net.ListenUDP(udpNetwork(ip), net.UDPAddrFromAddrPort(netip.AddrPortFrom(ip, port)))
		l.must(err)
	})
	l.t.Cleanup(func() { c.Close() })
	return c
}

func (l *lab) send(from *net.UDPConn, to netip.Addr, port uint16, payload string) {
	l.t.Helper()
	_, err := from.WriteToUDPAddrPort([]byte(payload), netip.AddrPortFrom(to, port))
	l.must(err)
}

func (l *lab) receive(c *net.UDPConn, want string) {
	l.t.Helper()
	b := make([]byte, 65536)
	l.must(c.SetReadDeadline(time.Now().Add(patience)))
	n, err := c.Read(b)
	l.must(err)
	if !bytes.Equal(b[:n], []byte(want)) {
		l.t.Fatalf("received %q, want %q", b[:n], want)
	}
}

// nothing checks that the socket has received nothing. A packet that was let
// through is there as soon as it was counted: veth delivers at once.
func (l *lab) nothing(c *net.UDPConn) {
	l.t.Helper()
	raw, err := c.SyscallConn()
	l.must(err)
	l.must(raw.Control(func(fd uintptr) {
		b := make([]byte, 1)
		if _, _, err := unix.Recvfrom(int(fd), b, unix.MSG_PEEK|unix.MSG_DONTWAIT); !errors.Is(err, unix.EAGAIN) {
			l.t.Errorf("a packet came through (%v)", err)
		}
	}))
}

func tcpInfo(t *testing.T, c syscall.Conn) *unix.TCPInfo {
	t.Helper()
	raw, err := c.SyscallConn()
	if err != nil {
		t.Fatal(err)
	}
	var info *unix.TCPInfo
	if e := raw.Control(func(fd uintptr) { info, err = unix.GetsockoptTCPInfo(int(fd), unix.IPPROTO_TCP, unix.TCP_INFO) }); e != nil || err != nil {
		t.Fatal(e, err)
	}
	return info
}

// inThread runs f in a namespace, on a thread that ends with the calling
// goroutine.
func inThread(ns netns.NsHandle, f func() error) error {
	runtime.LockOSThread()
	if err := netns.Set(ns); err != nil {
		return err
	}
	return f()
}

// veth2 makes a device whose other side is in the node too.
func (l *lab) veth2(name string) int {
	l.t.Helper()
	l.must(netlink.LinkAdd(&netlink.Veth{LinkAttrs: netlink.LinkAttrs{Name: name}, PeerName: "peer"}))
	link, err := netlink.LinkByName(name)
	l.must(err)
	return link.Attrs().Index
}

func (l *lab) events(d *datapath.Datapath) <-chan abi.Event {
	ctx, cancel := context.WithCancel(context.Background())
	events, done := make(chan abi.Event, 256), make(chan error, 1)
	go func() {
		done <- d.Events(ctx, func(ev abi.Event) {
			select {
			case events <- ev:
			case <-ctx.Done():
			}
		})
	}()
	l.t.Cleanup(func() {
		cancel()
		if err := <-done; !errors.Is(err, context.Canceled) {
			l.t.Errorf("Events ended with %v", err)
		}
	})
	return events
}
