package datapath_test

import (
	"errors"
	"net"
	"net/netip"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"portcullis/bpf/abi"
	"portcullis/datapath"
	"portcullis/datapath/hold"
)

// serving is a lab whose workload may call confirmed peers only, at one port,
// and whose node leads a service's address to others.
type serving struct {
	*lab
	d           *datapath.Datapath
	ep          abi.Endpoint
	own         netip.Addr     // the workload's
	service     netip.AddrPort // the service
	remote      netip.Addr     // a backend on another node
	remote2     netip.Addr     // another
	caller      *net.UDPConn
	backendPort uint16
}

func newServing(t *testing.T, is4 bool) *serving {
	x := &serving{lab: newLab(t), own: workload4, remote: remote4, remote2: netip.MustParseAddr("10.9.0.3"), backendPort: 5000}
	x.service = netip.MustParseAddrPort("10.96.0.10:80")
	services := netip.MustParsePrefix("10.96.0.0/16")
	if !is4 {
		x.own, x.remote, x.remote2 = workload6, remote6, netip.MustParseAddr("fd09::3")
		x.service, services = netip.MustParseAddrPort("[fd96::10]:80"), netip.MustParsePrefix("fd96::/112")
		x.in(x.lab.remote, func() { x.address("eth0", "fd09::3/64") })
	}
	x.d = x.open()
	x.must(x.d.Untranslated())
	x.must(x.d.SetServices([]netip.Prefix{services}))
	x.ep = x.serve(x.d)
	x.allow(client, x.backendPort)
	x.own1(x.ep, x.own)
	x.caller = x.udp(x.workload, x.own, 6000)
	return x
}

// own1 installs the binding of a local address in slot 1.
func (x *serving) own1(ep abi.Endpoint, ip netip.Addr) { x.local(1, ep.Ifindex, ip, 2000) }

func (x *serving) local(slot uint32, ifindex uint32, ip netip.Addr, identity uint32) {
	x.t.Helper()
	x.must(x.d.InstallSlot(slot, abi.Slot{Stamp: x.d.State().ReserveStamps(1), IP: datapath.Addr(ip), Identity: identity,
		Lease: uint32(abi.LeaseLocal), Ifindex: ifindex, Evidence: uint8(abi.EvidenceLocal)}, abi.SlotCold{}))
}

// allow puts the workload's egress under a policy: one identity, at one port.
// What it calls it may be answered; else nobody may call it.
func (x *serving) allow(identity uint32, port uint16) {
	x.t.Helper()
	set := x.d.State().NextPolicySet()
	entries := map[abi.PolicyKey]abi.Policy{}
	for _, proto := range []uint8{unix.IPPROTO_TCP, unix.IPPROTO_UDP} {
		key := abi.PolicyKey{Prefixlen: uint32(abi.PolicyPrefixPort), Set: set, Identity: uint32(abi.IDAny), Direction: uint8(abi.DirEgress),
			Proto: proto, Port: [2]uint8{uint8(port >> 8), uint8(port)}}
		peer := key
		peer.Identity = identity
		entries[key], entries[peer] = abi.Policy{Flags: uint8(abi.PolicyPeerAllow)}, abi.Policy{Flags: uint8(abi.PolicyAllow), Rule: 8}
	}
	x.must(x.d.PutPolicy(set, entries))
	x.ep.Policy, x.ep.Flags = set, uint32(abi.EPEnforceIngress|abi.EPEnforceEgress|abi.EPStrictTcp)
	x.must(x.d.SetEndpoint(x.ep))
}

// lead makes the node translate the service to a backend, from now on.
func (x *serving) lead(to netip.Addr) {
	x.t.Helper()
	x.unforward(x.service.Addr().Is4())
	x.forward(x.service, netip.AddrPortFrom(to, x.backendPort))
}

func (x *serving) call(payload string) {
	x.t.Helper()
	x.send(x.caller, x.service.Addr(), x.service.Port(), payload)
}

// exchange checks that the server received the payload from the workload itself,
// and that its answer arrives as the service's.
func (x *serving) exchange(server *net.UDPConn, payload string) {
	x.t.Helper()
	b := make([]byte, 2048)
	x.must(server.SetReadDeadline(time.Now().Add(patience)))
	n, who, err := server.ReadFromUDPAddrPort(b)
	x.must(err)
	if string(b[:n]) != payload || who.Addr().Unmap() != x.own {
		x.t.Fatalf("received %q from %v, want %q from %v", b[:n], who, payload, x.own)
	}
	_, err = server.WriteToUDPAddrPort([]byte("answer to "+payload), who)
	x.must(err)
	x.must(x.caller.SetReadDeadline(time.Now().Add(patience)))
	n, who, err = x.caller.ReadFromUDPAddrPort(b)
	x.must(err)
	if string(b[:n]) != "answer to "+payload || netip.AddrPortFrom(who.Addr().Unmap(), who.Port()) != x.service {
		x.t.Fatalf("the answer is %q from %v, want it from %v; counters %v", b[:n], who, x.service, counters(x.lab, x.d))
	}
}

func (x *serving) egress(v abi.Verdict, why abi.Reason) uint64 {
	return counters(x.lab, x.d)[datapath.CounterKey{Direction: abi.DirEgress, Verdict: v, Reason: why}].Packets
}

// A packet to a service is held until the backend that the node has chosen is
// confirmed, and goes to that one, though the node would choose another by then.
// Then the flow goes on by itself, both ways, as long as the binding stands.
func TestServiceFirstPacketIsHeldForItsBackend(t *testing.T) {
	bothFamilies(t, func(t *testing.T, is4 bool) {
		x := newServing(t, is4)
		g, in := x.gate(x.d), x.injector(x.d)
		q := hold.NewQueue(hold.Limits{}, x.d.ReleaseHold)
		server, other := x.udp(x.lab.remote, x.remote, x.backendPort), x.udp(x.lab.remote, x.remote2, x.backendPort)
		x.lead(x.remote)
		x.call("first")
		r := g.next(x.lab)
		if r.Peer != x.remote || r.Local != x.own || r.Service != x.service || r.Sport != 6000 || r.Dport != x.backendPort ||
			r.Direction != abi.DirEgress || r.Reason != abi.ReasonUnbound || r.Endpoint != x.ep.ID || r.Ifindex != x.ep.Ifindex {
			t.Fatalf("held %+v", r)
		}
		q.Add(r)
		x.nothing(server)
		x.lead(x.remote2)
		x.confirm(x.d, 2, x.remote)
		inject, _ := q.Answer(x.remote, 0)
		for _, r := range inject {
			x.must(in.Inject(r))
		}
		x.exchange(server, "first")
		for range 3 {
			x.call("next")
			x.exchange(server, "next")
		}
		x.nothing(other)
		if len(g.records) != 0 || x.d.Outstanding(0) != 0 || x.egress(abi.VerdictHold, abi.ReasonUnbound) != 1 {
			t.Errorf("%d held, %d outstanding; counters %v", len(g.records), x.d.Outstanding(0), counters(x.lab, x.d))
		}
	})
}

var _ = errors.Is
var _ = netlink.LinkByName
