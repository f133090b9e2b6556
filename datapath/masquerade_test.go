package datapath_test

import (
	"net"
	"net/netip"
	"testing"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netns"

	"portcullis/bpf/abi"
	"portcullis/datapath"
)

const nodeMask = 0x00f00000

// translating is a lab whose node has two workloads, with or without endpoint
// marks; the server lets one identity in, and every address is known.
type translating struct {
	*lab
	d            *datapath.Datapath
	server, ep   abi.Endpoint
	ns           netns.NsHandle
	node, own    netip.Addr // the node's address towards the server; the client's
	to, from     *net.UDPConn
	serverAddr   netip.Addr
	clientNumber uint32
}

func newTranslating(t *testing.T, marks bool, is4 bool, allowed uint32) *translating {
	x := &translating{lab: newLab(t), node: netip.MustParseAddr("10.8.0.1"), own: neighbour4, serverAddr: workload4, clientNumber: client}
	cfg := x.config()
	if marks {
		cfg.EndpointMarkMask = nodeMask
	}
	d, err := datapath.Open(cfg)
	x.must(err)
	t.Cleanup(func() { x.must(d.Close()) })
	x.d, x.server = d, x.serve(d)
	x.ns, x.ep = x.neighbour(d)
	if !is4 {
		x.node, x.own, x.serverAddr = netip.MustParseAddr("fd08::1"), netip.MustParseAddr("fd08:1::2"), workload6
		x.address("wl1", "fd08:1::1/64")
		x.in(x.ns, func() {
			x.address("eth0", "fd08:1::2/64")
			x.must(netlink.RouteAdd(&netlink.Route{Gw: net.ParseIP("fd08:1::1")}))
		})
		x.ep.IP6 = datapath.Addr(x.own)
		x.must(d.SetEndpoint(x.ep))
	}
	set := d.State().NextPolicySet()
	key := abi.PolicyKey{Prefixlen: uint32(abi.PolicyPrefixAny), Set: set, Identity: uint32(abi.IDAny), Direction: uint8(abi.DirIngress)}
	peer := key
	peer.Identity = allowed
	x.must(d.PutPolicy(set, map[abi.PolicyKey]abi.Policy{key: {Flags: uint8(abi.PolicyPeerAllow)}, peer: {Flags: uint8(abi.PolicyAllow)}}))
	x.server.Policy = set
	x.must(d.SetEndpoint(x.server))
	x.ep.Flags = 0 // nothing is asked of it
	x.must(d.SetEndpoint(x.ep))
	x.local(1, x.server, x.serverAddr, 2000)
	x.local(2, x.ep, x.own, client)
	x.local(3, abi.Endpoint{}, x.node, uint32(abi.IDHost))
	x.from, x.to = x.udp(x.ns, x.own, 6000), x.udp(x.workload, x.serverAddr, 5000)
	return x
}

// local installs the binding of an address of the node.
func (x *translating) local(slot uint32, ep abi.Endpoint, ip netip.Addr, identity uint32) {
	x.t.Helper()
	x.must(x.d.InstallSlot(slot, abi.Slot{Stamp: x.d.State().ReserveStamps(1), IP: datapath.Addr(ip), Identity: identity,
		Lease: uint32(abi.LeaseLocal), Ifindex: ep.Ifindex, Evidence: uint8(abi.EvidenceLocal)}, abi.SlotCold{}))
}

// answered checks that the server received a datagram, from whom, and that its
// answer arrives.
func (x *translating) answered(from netip.Addr) {
	x.t.Helper()
	b := make([]byte, 64)
	n, who, err := x.to.ReadFromUDPAddrPort(b)
	x.must(err)
	if string(b[:n]) != "call" || who.Addr().Unmap() != from {
		x.t.Fatalf("received %q from %v, want it from %v", b[:n], who, from)
	}
	_, err = x.to.WriteToUDPAddrPort([]byte("answer"), who)
	x.must(err)
	x.receive(x.from, "answer")
}

func bothFamilies(t *testing.T, f func(t *testing.T, is4 bool)) {
	t.Run("ip4", func(t *testing.T) { f(t, true) })
	t.Run("ip6", func(t *testing.T) { f(t, false) })
}

// A workload whose source the node masquerades is itself to a workload of the
// same node, where packets carry marks: the kernel's own masquerade, both ways.
func TestMasqueradedKeepsItsIdentity(t *testing.T) {
	bothFamilies(t, func(t *testing.T, is4 bool) {
		x := newTranslating(t, true, is4, client)
		x.masquerade(is4)
		events := x.events(x.d)
		for range 3 {
			x.send(x.from, x.serverAddr, 5000, "call")
			x.answered(x.node)
		}
		seen := false
		x.eventually("a record of the flow", func() bool {
			for {
				select {
				case e := <-events:
					if abi.Direction(e.Direction) == abi.DirIngress && e.Endpoint == x.server.ID && abi.Verdict(e.Verdict) == abi.VerdictPass {
						seen = true
						if e.SrcIdentity != client {
							t.Errorf("told as identity %d", e.SrcIdentity)
						}
					}
				default:
					return seen
				}
			}
		})

		// Its binding goes: the flow ends with it, and so does the next.
		stamp := x.stampOf(2)
		x.must(x.d.ZeroSlot(2, stamp, x.own))
		x.send(x.from, x.serverAddr, 5000, "call")
		other := x.udp(x.ns, x.own, 6001)
		x.send(other, x.serverAddr, 5000, "call")
		x.eventually("two drops", func() bool {
			return dropped(x.lab, x.d, abi.DirIngress, abi.ReasonTranslated)+dropped(x.lab, x.d, abi.DirIngress, abi.ReasonGenerationChanged) == 2
		})
		x.nothing(x.to)
	})
}

func (x *translating) stampOf(slot uint32) uint64 {
	x.t.Helper()
	for i, s := range x.d.Slots() {
		if i == slot {
			return s.Stamp
		}
	}
	x.t.Fatalf("slot %d is empty", slot)
	return 0
}

// A policy that lets the node itself in lets in nobody whose address the node
// only lent: neither a workload, marked or not, nor somebody from outside.
func TestForwardedIsNeverHost(t *testing.T) {
	bothFamilies(t, func(t *testing.T, is4 bool) {
		for name, marks := range map[string]bool{"marks": true, "no marks": false} {
			t.Run(name, func(t *testing.T) {
				x := newTranslating(t, marks, is4, uint32(abi.IDHost))
				// The node itself is let in.
				x.from = x.udp(x.lab.node, x.node, 6000)
				x.send(x.from, x.serverAddr, 5000, "call")
				x.answered(x.node)

				x.masquerade(is4)
				x.send(x.udp(x.ns, x.own, 6002), x.serverAddr, 5000, "call")
				why := abi.ReasonTranslated
				if marks {
					why = abi.ReasonPolicyDenied // it is who it is, who is not the host
				}
				x.eventually("a workload's packet is dropped", func() bool { return dropped(x.lab, x.d, abi.DirIngress, why) == 1 })
				outside := remote4
				if !is4 {
					outside = remote6
				}
				before := dropped(x.lab, x.d, abi.DirIngress, abi.ReasonTranslated)
				x.send(x.udp(x.remote, outside, 6000), x.serverAddr, 5000, "call")
				x.eventually("a packet from outside is dropped", func() bool {
					return dropped(x.lab, x.d, abi.DirIngress, abi.ReasonTranslated) == before+1
				})
				x.nothing(x.to)
			})
		}
	})
}

// A workload that calls another of its node by an address of the node, which
// leads there (a NodePort): it is judged as the node's, and then, behind the
// translation, by whom it goes to; so is the answer, which bears the node's
// address.
func TestAnswerByWayOfTheNode(t *testing.T) {
	bothFamilies(t, func(t *testing.T, is4 bool) {
		for name, marks := range map[string]bool{"marks": true, "no marks": false} {
			t.Run(name, func(t *testing.T) {
				x := newTranslating(t, marks, is4, client)
				x.forward(netip.AddrPortFrom(x.node, 30080), netip.AddrPortFrom(x.serverAddr, 5000))
				x.send(x.from, x.node, 30080, "call")
				x.answered(x.own)

				x.egressTo(uint32(abi.IDHost))
				x.send(x.udp(x.ns, x.own, 6001), x.node, 30080, "call")
				x.eventually("the call is dropped", func() bool { return dropped(x.lab, x.d, abi.DirEgress, abi.ReasonPolicyDenied) == 1 })
				x.nothing(x.to)

				x.egressTo(uint32(abi.IDHost), 2000)
				x.from = x.udp(x.ns, x.own, 6002)
				x.send(x.from, x.node, 30080, "call")
				x.answered(x.own)
			})
		}
	})
}

// egressTo lets the client call some identities, and nobody else.
func (x *translating) egressTo(identities ...uint32) {
	x.t.Helper()
	set := x.d.State().NextPolicySet()
	key := abi.PolicyKey{Prefixlen: uint32(abi.PolicyPrefixAny), Set: set, Identity: uint32(abi.IDAny), Direction: uint8(abi.DirEgress)}
	entries := map[abi.PolicyKey]abi.Policy{key: {Flags: uint8(abi.PolicyPeerAllow)}}
	for _, id := range identities {
		key.Identity = id
		entries[key] = abi.Policy{Flags: uint8(abi.PolicyAllow)}
	}
	x.must(x.d.PutPolicy(set, entries))
	x.ep.Policy, x.ep.Flags = set, uint32(abi.EPEnforceEgress)
	x.must(x.d.SetEndpoint(x.ep))
}
