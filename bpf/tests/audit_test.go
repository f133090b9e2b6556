package tests

import (
	"testing"
	"time"

	"portcullis/bpf/abi"
)

const audit = abi.VerdictAudit

// TestAudit: what policy and evidence refuse passes, with its reason; what is
// no matter of policy does not.
func TestAudit(t *testing.T) {
	eachFamily(t, func(t *testing.T, f family) {
		g, ep := wantPeer(t, f, mapSize("fragments", 8*uint32(abi.FragmentsPerEndpoint)))
		ep.Flags |= uint32(abi.EPAudit)
		g.put("endpoints", g.pod, ep)
		in := func(port uint16, flags uint8) result {
			return g.to(g.pod, g.uplink, tcp(f.peer, 40000, f.pod, port, flags))
		}

		// Denied whoever it is: told once, counted each time, both ways.
		r := in(81, syn)
		g.want(r, audit, abi.ReasonPolicyDenied)
		if len(r.events) != 1 {
			t.Errorf("%d events", len(r.events))
		}
		for range 3 {
			if r = in(81, ack); len(r.events) != 0 {
				t.Errorf("events %+v", r.events)
			}
			g.want(r, audit, abi.ReasonPolicyDenied)
			g.want(g.from(g.pod, tcp(f.pod, 81, f.peer, 40000, ack)), audit, abi.ReasonPolicyDenied)
		}
		// An ICMP error about it, and about what nobody remembers.
		g.pass(g.to(g.pod, g.uplink, icmpError(f, f.world, f.pod, 3, tcp(f.pod, 81, f.peer, 40000, ack)[14:])))
		g.want(g.to(g.pod, g.uplink, icmpError(f, f.world, f.pod, 3, tcp(f.pod, 82, f.peer, 40000, ack)[14:])), audit, abi.ReasonUnsupported)

		// No evidence: it passes, told each time; its peer is asked for, and it
		// is judged when the answer is there.
		for range 2 {
			r = in(80, syn)
			g.want(r, audit, abi.ReasonUnbound)
			if len(r.held) != 1 || r.held[0].Passed != 1 || len(r.events) != 1 {
				t.Errorf("held %+v, %d events", r.held, len(r.events))
			}
		}
		// Its answer is an answer, and lacks as much.
		g.want(g.from(g.pod, tcp(f.pod, 80, f.peer, 40000, syn|ack)), audit, abi.ReasonUnbound)
		g.want(in(80, ack), audit, abi.ReasonUnbound)
		b := g.bind(f.peer, idClient)
		if r = in(80, ack); len(r.events) != 1 {
			t.Errorf("known at last: events %+v", r.events)
		}
		g.pass(r)
		g.pass(in(80, ack))
		g.pass(g.from(g.pod, tcp(f.pod, 80, f.peer, 40000, ack)))
		g.pass(in(80, syn))
		g.lease(session, -time.Second)
		g.want(in(80, ack), audit, abi.ReasonStaleLease)
		g.lease(session, time.Hour)
		g.pass(in(80, ack))
		g.revoke(b)
		g.want(g.from(g.pod, tcp(f.pod, 80, f.peer, 40000, ack)), audit, abi.ReasonGenerationChanged)
		g.bind(f.peer, idOther)
		g.want(in(80, syn), audit, abi.ReasonPolicyDenied)

		// Fragments follow.
		for i, x := range fragments(f.peer, f.pod, protoUDP, 5, datagram(1, 99, 100), 40) {
			r = g.to(g.pod, g.uplink, x)
			g.want(r, audit, abi.ReasonPolicyDenied)
			if len(r.events) != 1 {
				t.Errorf("fragment %d: %d events", i, len(r.events))
			}
		}

		// Policy changes: judged again.
		set := ep.Policy
		ep.Policy += 1000
		g.policy(ep.Policy, rule{identity: idAny, dir: ingress, proto: protoTCP, port: 81, flags: allow})
		g.put("endpoints", g.pod, ep)
		g.pass(in(81, ack))
		ep.Policy = set
		g.put("endpoints", g.pod, ep)
		g.want(in(81, ack), audit, abi.ReasonPolicyDenied)

		// No matter of policy.
		g.drop(g.to(g.pod, g.stranger, tcp(f.peer, 1, f.pod, 80, syn)), abi.ReasonSpoofed)
		g.drop(g.from(g.pod, tcp(f.pod2, 1, f.peer, 80, syn)), abi.ReasonSpoofed)
		g.drop(g.from(g.pod, ether(podMAC, hostMAC, 0x8100, make([]byte, 40))), abi.ReasonUnsupported)
		g.drop(g.from(g.pod, patch(tcp(f.pod, 1, f.peer, 80, syn), 14, 0x50)), abi.ReasonMalformed)
		for state, reason := range map[abi.EndpointState]abi.Reason{abi.EPQuarantined: abi.ReasonQuarantined, abi.EPClosed: abi.ReasonNoEndpoint} {
			ep.State = uint32(state)
			g.put("endpoints", g.pod, ep)
			g.drop(in(81, ack), reason)
			g.drop(g.from(g.pod, tcp(f.pod, 1, f.peer, 80, syn)), reason)
		}

		// The flag goes: what passed under audit does not pass any more, whoever
		// forgets to give the endpoint a new policy set.
		ep.State, ep.Flags = uint32(abi.EPActive), uint32(enforceIn)
		g.put("endpoints", g.pod, ep)
		g.drop(in(81, ack), abi.ReasonPolicyDenied)
		g.drop(g.from(g.pod, tcp(f.pod, 81, f.peer, 40000, ack)), abi.ReasonPolicyDenied)
	})
}

// TestAuditMapFull: no room for the entry is no reason to drop.
func TestAuditMapFull(t *testing.T) {
	f := families[0]
	g := newGate(t, constant("ct_per_endpoint", uint32(1)))
	g.endpoint(g.pod, f, f.pod, enforceIn|abi.EPAudit)
	g.pass(g.from(g.pod, udp(f.pod, 1, f.world, 80)))
	g.want(g.from(g.pod, udp(f.pod, 2, f.world, 80)), audit, abi.ReasonMapFull)
	g.want(g.to(g.pod, g.uplink, udp(f.world, 2, f.pod, 3)), audit, abi.ReasonPolicyDenied)
}

// TestAuditTranslated: a call of which nobody knows who makes it is remembered
// under audit as one: its answer is an answer, and does not make the rest of the
// call the answer to a flow that the workload opened.
func TestAuditTranslated(t *testing.T) {
	eachFamily(t, func(t *testing.T, f family) {
		g, ep := wantPeer(t, f)
		g.bind(f.node, abi.IDHost, local(0))
		ep.Flags |= uint32(abi.EPAudit)
		g.put("endpoints", g.pod, ep)
		in := func(flags uint8) result { return g.to(g.pod, g.uplink, tcp(f.node, 40000, f.pod, 80, flags)) }
		g.want(in(syn), audit, abi.ReasonTranslated)
		g.pass(g.from(g.pod, tcp(f.pod, 80, f.node, 40000, syn|ack)))
		g.want(in(ack), audit, abi.ReasonTranslated)
	})
}
