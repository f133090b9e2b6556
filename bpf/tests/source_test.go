package tests

import (
	"encoding/binary"
	"net/netip"
	"testing"

	"portcullis/bpf/abi"
)

func sourceKey(endpoint uint32, p netip.Prefix) []byte {
	k := rangeKey(p)
	out := binary.NativeEndian.AppendUint32(nil, 32+binary.NativeEndian.Uint32(k))
	return append(binary.NativeEndian.AppendUint32(out, endpoint), k[4:]...)
}

// TestForwards: an endpoint that forwards sends and receives for the addresses
// on its list, under its own policy; nobody else does, and no other address.
func TestForwards(t *testing.T) {
	eachFamily(t, func(t *testing.T, f family) {
		inner, _ := f.world.Prefix(24) // what it forwards for
		far := f.peer
		g := newGate(t)
		ep := g.endpoint(g.pod, f, f.pod, abi.EPForwards|enforceOut)
		g.policy(ep.Policy, rule{identity: idAny, dir: egress, proto: protoUDP, port: 80, flags: allow})
		other := g.endpoint(g.pod2, f, f.pod2, abi.EPForwards)
		out, back := udp(f.world, 1, far, 80), udp(far, 80, f.world, 1)

		g.drop(g.from(g.pod, out), abi.ReasonSpoofed)
		g.drop(g.to(g.pod, g.uplink, back), abi.ReasonUnsupported)
		g.put("sources", sourceKey(ep.ID, inner), abi.Source{Flags: uint32(abi.SourceAllow)})
		r := g.from(g.pod, out)
		g.pass(r)
		if e := r.events[0]; e.Src != addr(f.world) || e.SrcIdentity != ep.Identity || e.Endpoint != ep.ID {
			t.Errorf("event %+v", e)
		}
		g.pass(g.to(g.pod, g.uplink, back))
		g.drop(g.from(g.pod, udp(f.world, 1, far, 81)), abi.ReasonPolicyDenied)
		g.pass(g.from(g.pod, udp(f.pod, 1, far, 80))) // its own goes on
		g.drop(g.from(g.pod, udp(f.peer2, 1, far, 80)), abi.ReasonSpoofed)
		// The list is of one endpoint.
		g.drop(g.from(g.pod2, out), abi.ReasonSpoofed)
		g.put("sources", sourceKey(other.ID, inner), abi.Source{})
		g.drop(g.from(g.pod2, out), abi.ReasonSpoofed)
		// A longer prefix takes a part away.
		one, _ := f.world.Prefix(f.world.BitLen())
		g.put("sources", sourceKey(ep.ID, one), abi.Source{})
		g.drop(g.from(g.pod, out), abi.ReasonSpoofed)
		g.delete("sources", sourceKey(ep.ID, one))
		g.pass(g.from(g.pod, out))
		// The flag is the switch.
		ep.Flags = uint32(enforceOut)
		g.put("endpoints", g.pod, ep)
		g.drop(g.from(g.pod, out), abi.ReasonSpoofed)
		// ARP and neighbour discovery are for its own addresses.
		ep.Flags |= uint32(abi.EPForwards)
		g.put("endpoints", g.pod, ep)
		if f.is6 {
			g.drop(g.from(g.pod, nd(136, f.world, f.node, f.world, 255)), abi.ReasonSpoofed)
		} else {
			g.drop(g.from(g.pod, arp(2, podMAC, f.world, f.node)), abi.ReasonSpoofed)
		}
	})
}
