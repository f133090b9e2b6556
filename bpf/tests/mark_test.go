package tests

import (
	"testing"

	"portcullis/bpf/abi"
)

const (
	epMask  = 0x0003ff00
	epShift = 8
)

// markGate: two local endpoints of which pod may be called by idClient, which
// pod2 is; and the node's own address.
func markGate(t *testing.T, f family, opts ...option) (g *gate, ep, sender abi.Endpoint) {
	opts = append([]option{constant("endpoint_mark_mask", uint32(epMask)), constant("endpoint_mark_shift", uint32(epShift)),
		constant("mark_mask", ^uint32(0)), mapSize("marks", 16)}, opts...)
	g, ep = wantPeer(t, f, opts...)
	sender = g.endpoint(g.pod2, f, f.pod2, 0)
	g.ipRange(f.own, abi.RangeKnown, 0)
	g.bind(f.pod2, idClient, local(g.pod2))
	g.bind(f.pod, idOther, local(g.pod))
	g.bind(f.node, abi.IDHost, local(0))
	g.policy(ep.Policy, rule{identity: abi.IDHost, dir: ingress, proto: protoTCP, port: 80, flags: deny})
	return g, ep, sender
}

// TestEndpointMark: what a workload sends carries its mark, whatever stood
// there; other bits stay, and the mark ends where the packet arrives.
func TestEndpointMark(t *testing.T) {
	eachFamily(t, func(t *testing.T, f family) {
		g, _, sender := markGate(t, f)
		out := tcp(f.pod2, 1, f.world, 80, syn)
		want := sender.HoldIndex << epShift
		for _, before := range []uint32{0, 0x4000_0001, 0x0002_0500, epMask | 0xff} {
			r := g.run("from_workload", out, skBuff{Ifindex: g.pod2, IngressIfindex: g.pod2, Mark: before})
			g.pass(r)
			if r.mark != before&^epMask|want {
				t.Errorf("mark %#x became %#x, want %#x", before, r.mark, before&^epMask|want)
			}
		}
		r := g.run("to_workload", tcp(f.world, 80, f.pod2, 1, ack), skBuff{Ifindex: g.pod2, IngressIfindex: g.uplink, Mark: 0x4000_0300})
		g.pass(r)
		if r.mark != 0x4000_0000 {
			t.Errorf("mark %#x", r.mark)
		}
		// An index that does not fit marks nothing.
		sender.HoldIndex = 1024
		g.put("endpoints", g.pod2, sender)
		r = g.run("from_workload", out, skBuff{Ifindex: g.pod2, IngressIfindex: g.pod2, Mark: 0x500})
		g.pass(r)
		if r.mark != 0 {
			t.Errorf("mark %#x", r.mark)
		}
		// Off: no bit is touched.
		g = newGate(t)
		g.endpoint(g.pod2, f, f.pod2, 0)
		r = g.run("from_workload", out, skBuff{Ifindex: g.pod2, IngressIfindex: g.pod2, Mark: 0x500})
		if g.pass(r); r.mark != 0x500 {
			t.Errorf("mark %#x", r.mark)
		}
	})
}

// TestMasquerade: a packet whose source the node rewrote is its sender's still;
// without its mark it is nobody's, never the host's (I1).
func TestMasquerade(t *testing.T) {
	eachFamily(t, func(t *testing.T, f family) {
		g, ep, sender := markGate(t, f)
		call, back := tcp(f.node, 40000, f.pod, 80, syn), tcp(f.pod, 80, f.node, 40000, syn|ack)
		in := func(mark uint32, from uint32) result {
			return g.run("to_workload", call, skBuff{Ifindex: g.pod, IngressIfindex: from, Mark: mark})
		}
		mark := sender.HoldIndex << epShift
		g.drop(in(mark, g.pod2), abi.ReasonTranslated) // nobody has sent with it yet
		g.pass(g.from(g.pod2, tcp(f.pod2, 1, f.world, 80, syn)))

		r := in(mark, g.pod2)
		g.pass(r)
		if e := r.events[0]; e.SrcIdentity != uint32(idClient) || abi.Evidence(e.Evidence) != abi.EvidenceLocal || r.mark != 0 {
			t.Errorf("event %+v, mark %#x", e, r.mark)
		}
		if r = in(mark, g.pod2); r.verdict != pass || len(r.events) != 0 {
			t.Errorf("known: %v (%v), %d events", r.verdict, r.reason, len(r.events))
		}
		g.pass(g.from(g.pod, back))
		g.pass(g.from(g.pod, back))

		// The flow is the sender's alone: not without the mark, not with
		// another's, not by another device without it, not the host's.
		g.drop(in(0, g.pod2), abi.ReasonTranslated)
		g.drop(in(ep.HoldIndex<<epShift, g.pod2), abi.ReasonPolicyDenied) // who that is may not
		g.drop(in(0, g.uplink), abi.ReasonTranslated)
		g.drop(in(7<<epShift, g.pod2), abi.ReasonTranslated)
		g.drop(in(0, 0), abi.ReasonPolicyDenied) // the host's own
		g.pass(in(mark, g.pod2))

		// Its policy is judged anew for it, also when an answer comes first.
		ep = g.newPolicy(ep, rule{identity: idAny, dir: ingress, proto: protoTCP, port: 80, flags: peerAllow},
			rule{identity: idClient, dir: ingress, proto: protoTCP, port: 80, flags: allow})
		g.pass(g.from(g.pod, back))
		g.pass(in(mark, g.pod2))
		g.newPolicy(ep, rule{identity: idAny, dir: ingress, proto: protoTCP, port: 80, flags: peerAllow})
		g.drop(g.from(g.pod, back), abi.ReasonPolicyDenied)
		g.drop(in(mark, g.pod2), abi.ReasonPolicyDenied)
		g.put("endpoints", g.pod, ep)
		g.pass(in(mark, g.pod2))

		// The sender ends: neither its mark nor its flow serves another (I4).
		next := g.endpoint(g.pod2, f, f.pod2, 0)
		next.HoldIndex = sender.HoldIndex
		g.put("endpoints", g.pod2, next)
		g.bind(f.pod2, idClient, local(g.pod2))
		g.drop(tcpDrop(g, f, mark), abi.ReasonTranslated)
	})
}

// tcpDrop is a new masqueraded call.
func tcpDrop(g *gate, f family, mark uint32) result {
	return g.run("to_workload", tcp(f.node, 40001, f.pod, 80, syn), skBuff{Ifindex: g.pod, IngressIfindex: g.pod2, Mark: mark})
}

// TestMarkThroughBridge: a packet with its sender's own address that comes in by
// the bridge's device is the sender's if its mark says so.
func TestMarkThroughBridge(t *testing.T) {
	eachFamily(t, func(t *testing.T, f family) {
		g, ep, sender := markGate(t, f)
		call := tcp(f.pod2, 40000, f.pod, 80, syn)
		in := func(mark uint32) result {
			return g.run("to_workload", call, skBuff{Ifindex: g.pod, IngressIfindex: g.stranger, Mark: mark})
		}
		g.pass(g.from(g.pod2, call))
		g.drop(in(0), abi.ReasonSpoofed)
		g.drop(in(ep.HoldIndex<<epShift), abi.ReasonSpoofed)
		g.pass(in(sender.HoldIndex << epShift))
		g.pass(g.from(g.pod, tcp(f.pod, 80, f.pod2, 40000, syn|ack)))
	})
}
