package tests

import (
	"testing"
	"time"

	"portcullis/bpf/abi"
)

func (g *gate) oneFlow() (abi.CTKey, abi.CT) {
	g.t.Helper()
	all := g.flows()
	if len(all) != 1 {
		g.t.Fatalf("%d conntrack entries, want 1", len(all))
	}
	for k, v := range all {
		return k, v
	}
	panic("unreachable")
}

// TestConntrackKey: both directions are one entry, ordered as abi.h says.
func TestConntrackKey(t *testing.T) {
	eachFamily(t, func(t *testing.T, f family) {
		for _, tt := range []struct {
			name         string
			out, back    []byte
			proto        uint8
			sport, dport uint16
		}{
			{"tcp", tcp(f.pod, 40000, f.peer, 80, syn), tcp(f.peer, 80, f.pod, 40000, syn|ack), protoTCP, 40000, 80},
			{"udp", udp(f.pod, 40000, f.peer, 53), udp(f.peer, 53, f.pod, 40000), protoUDP, 40000, 53},
			{"echo", icmpEcho(f, f.pod, f.peer, f.echo, 7), icmpEcho(f, f.peer, f.pod, f.answer, 7), f.icmp, 7, 0},
		} {
			t.Run(tt.name, func(t *testing.T) {
				g := newGate(t)
				ep := g.endpoint(g.pod, f, f.pod, enforceIn) // nobody may call
				g.drop(g.to(g.pod, g.uplink, tt.back), abi.ReasonPolicyDenied)
				before := boottime()
				g.pass(g.from(g.pod, tt.out))
				r := g.to(g.pod, g.uplink, tt.back)
				g.pass(r)
				if len(r.events) != 1 || abi.FlowState(r.events[0].State) != abi.FlowReply {
					t.Errorf("events of the first reply: %+v", r.events)
				}
				k, v := g.oneFlow()
				// The pod's address is the smaller one.
				want := abi.CTKey{A: addr(f.pod), B: addr(f.peer), APort: tt.sport, BPort: tt.dport, Proto: tt.proto}
				if k != want {
					t.Errorf("key %+v, want %+v", k, want)
				}
				if v.Flags != uint32(abi.CTSeenReply) {
					t.Errorf("flags %#x", v.Flags)
				}
				j := v.Judgement[egress]
				if j.Endpoint != ep.ID || j.Epoch != ep.Policy || j.Stamp != 0 || v.Judgement[ingress].Endpoint != 0 {
					t.Errorf("judgements %+v", v.Judgement)
				}
				tick := uint64(20 * time.Millisecond)
				if v.LastSeen+tick < before || v.LastSeen > boottime() {
					t.Errorf("last seen %d, test began %d", v.LastSeen, before)
				}
			})
		}
	})
}

// TestTCPState: FIN and RST of both sides are kept for the collector, and a
// new SYN begins anew.
func TestTCPState(t *testing.T) {
	eachFamily(t, func(t *testing.T, f family) {
		g := newGate(t)
		g.endpoint(g.pod, f, f.pod, 0)
		out := func(flags uint8) { g.pass(g.from(g.pod, tcp(f.pod, 1, f.peer, 2, flags))) }
		in := func(flags uint8) { g.pass(g.to(g.pod, g.uplink, tcp(f.peer, 2, f.pod, 1, flags))) }
		flags := func(want abi.CTFlag) {
			t.Helper()
			if _, v := g.oneFlow(); v.Flags != uint32(want) {
				t.Errorf("flags %#x, want %#x", v.Flags, want)
			}
		}
		out(syn)
		flags(0)
		in(syn | ack)
		flags(abi.CTSeenReply)
		out(fin | ack)
		flags(abi.CTSeenReply | abi.CTFinForward)
		in(fin | ack)
		flags(abi.CTSeenReply | abi.CTFinForward | abi.CTFinReply)
		in(rst)
		flags(abi.CTSeenReply | abi.CTFinForward | abi.CTFinReply | abi.CTRst)
		out(syn)
		flags(abi.CTSeenReply)
	})
}

// TestStrictTCP: with the flag, a flow begins with a SYN; without, a stream
// that ran before is judged like a first packet.
func TestStrictTCP(t *testing.T) {
	eachFamily(t, func(t *testing.T, f family) {
		g := newGate(t)
		g.endpoint(g.pod, f, f.pod, abi.EPStrictTcp)
		g.drop(g.from(g.pod, tcp(f.pod, 1, f.peer, 2, ack)), abi.ReasonNoFlow)
		g.drop(g.to(g.pod, g.uplink, tcp(f.peer, 2, f.pod, 1, syn|ack)), abi.ReasonNoFlow)
		g.pass(g.from(g.pod, udp(f.pod, 1, f.peer, 2)))
		g.pass(g.from(g.pod, tcp(f.pod, 1, f.peer, 2, syn)))
		g.pass(g.to(g.pod, g.uplink, tcp(f.peer, 2, f.pod, 1, syn|ack)))
		g.pass(g.from(g.pod, tcp(f.pod, 1, f.peer, 2, ack)))

		g.endpoint(g.pod2, f, f.pod2, 0)
		g.pass(g.from(g.pod2, tcp(f.pod2, 1, f.peer, 2, ack)))
	})
}

// TestServerDoesNotCallBack: a SYN from the server side of a flow is a call of
// its own, not a reply; so is an echo request.
func TestServerDoesNotCallBack(t *testing.T) {
	eachFamily(t, func(t *testing.T, f family) {
		g := newGate(t)
		g.endpoint(g.pod, f, f.pod, enforceIn)
		g.pass(g.from(g.pod, tcp(f.pod, 40000, f.peer, 80, syn)))
		g.pass(g.to(g.pod, g.uplink, tcp(f.peer, 80, f.pod, 40000, syn|ack)))
		g.drop(g.to(g.pod, g.uplink, tcp(f.peer, 80, f.pod, 40000, syn)), abi.ReasonPolicyDenied)
		g.pass(g.to(g.pod, g.uplink, tcp(f.peer, 80, f.pod, 40000, ack)))
		g.pass(g.from(g.pod, icmpEcho(f, f.pod, f.peer, f.echo, 0)))
		g.pass(g.to(g.pod, g.uplink, icmpEcho(f, f.peer, f.pod, f.answer, 0)))
		g.drop(g.to(g.pod, g.uplink, icmpEcho(f, f.peer, f.pod, f.echo, 0)), abi.ReasonPolicyDenied)
	})
}

// TestUnsolicitedEchoReply opens nothing.
func TestUnsolicitedEchoReply(t *testing.T) {
	eachFamily(t, func(t *testing.T, f family) {
		g := newGate(t)
		g.endpoint(g.pod, f, f.pod, 0)
		g.pass(g.from(g.pod, icmpEcho(f, f.pod, f.peer, f.answer, 7)))
		if n := len(g.flows()); n != 0 {
			t.Errorf("%d entries", n)
		}
	})
}

// TestStaleStampForward: the peer of an established flow is revoked, then
// someone else has its IP. A forward packet is judged as a first one (I4).
func TestStaleStampForward(t *testing.T) {
	eachFamily(t, func(t *testing.T, f family) {
		g, _ := wantPeer(t, f)
		p := tcp(f.peer, 40000, f.pod, 80, ack)
		first := g.bind(f.peer, idClient)
		g.pass(g.to(g.pod, g.uplink, p))
		g.revoke(first)
		g.want(g.to(g.pod, g.uplink, p), held, abi.ReasonUnbound)
		g.bind(f.peer, idOther)
		g.drop(g.to(g.pod, g.uplink, p), abi.ReasonPolicyDenied)
		// The entry still names the first binding; it revives for nobody.
		_, v := g.oneFlow()
		if v.Judgement[ingress].Stamp != first.stamp {
			t.Errorf("stamp %d, want %d", v.Judgement[ingress].Stamp, first.stamp)
		}
		third := g.bind(f.peer, idClient)
		r := g.to(g.pod, g.uplink, p)
		g.pass(r)
		if len(r.events) != 1 || abi.FlowState(r.events[0].State) != abi.FlowNew || r.events[0].Stamp != third.stamp {
			t.Errorf("another binding's flow is not told as new: %+v", r.events)
		}
		if _, v = g.oneFlow(); v.Judgement[ingress].Stamp != third.stamp {
			t.Errorf("stamp %d, want %d", v.Judgement[ingress].Stamp, third.stamp)
		}
	})
}

// TestRepliesToChangedBinding: the called endpoint's replies go only to the
// binding that called (I4), on the same 5-tuple, TCP and UDP.
func TestRepliesToChangedBinding(t *testing.T) {
	eachFamily(t, func(t *testing.T, f family) {
		for _, tt := range []struct {
			name       string
			call, back []byte
		}{
			{"tcp", tcp(f.peer, 40000, f.pod, 80, syn), tcp(f.pod, 80, f.peer, 40000, syn|ack)},
			{"udp", udp(f.peer, 40000, f.pod, 80), udp(f.pod, 80, f.peer, 40000)},
		} {
			t.Run(tt.name, func(t *testing.T) {
				g, _ := wantPeer(t, f)
				first := g.bind(f.peer, idClient)
				g.pass(g.to(g.pod, g.uplink, tt.call))
				g.pass(g.from(g.pod, tt.back))
				g.revoke(first)
				g.drop(g.from(g.pod, tt.back), abi.ReasonGenerationChanged)
				g.bind(f.peer, idOther)
				g.drop(g.from(g.pod, tt.back), abi.ReasonGenerationChanged)
				g.drop(g.to(g.pod, g.uplink, tt.call), abi.ReasonPolicyDenied)
				// Even one of the same identity is not the one that called.
				g.bind(f.peer, idClient)
				g.drop(g.from(g.pod, tt.back), abi.ReasonGenerationChanged)
				// It has to call itself.
				g.pass(g.to(g.pod, g.uplink, tt.call))
				g.pass(g.from(g.pod, tt.back))
			})
		}
	})
}

// TestRepliesFromChangedBinding: the calling endpoint takes replies only from
// the binding that it called.
func TestRepliesFromChangedBinding(t *testing.T) {
	eachFamily(t, func(t *testing.T, f family) {
		g := newGate(t)
		g.known(f)
		ep := g.endpoint(g.pod, f, f.pod, enforceOut)
		g.policy(ep.Policy, rule{identity: idAny, dir: egress, proto: protoUDP, port: 80, flags: peerAllow},
			rule{identity: idClient, dir: egress, proto: protoUDP, port: 80, flags: allow})
		call, back := udp(f.pod, 40000, f.peer, 80), udp(f.peer, 80, f.pod, 40000)

		first := g.bind(f.peer, idClient)
		g.pass(g.from(g.pod, call))
		g.pass(g.to(g.pod, g.uplink, back))
		g.lease(session, -time.Second)
		g.want(g.to(g.pod, g.uplink, back), held, abi.ReasonStaleLease)
		g.want(g.from(g.pod, call), held, abi.ReasonStaleLease)
		g.ipRange(f.remote, abi.RangeKnown, 0)
		g.drop(g.to(g.pod, g.uplink, back), abi.ReasonStaleLease)
		g.lease(session, time.Hour)
		g.pass(g.to(g.pod, g.uplink, back))

		g.revoke(first)
		g.drop(g.to(g.pod, g.uplink, back), abi.ReasonGenerationChanged)
		g.drop(g.from(g.pod, call), abi.ReasonUnbound)
		g.bind(f.peer, idClient)
		g.drop(g.to(g.pod, g.uplink, back), abi.ReasonGenerationChanged)
		g.pass(g.from(g.pod, call))
		g.pass(g.to(g.pod, g.uplink, back))
	})
}

// TestReplyPastLease: the called endpoint's reply to a caller whose lease ended.
func TestReplyPastLease(t *testing.T) {
	eachFamily(t, func(t *testing.T, f family) {
		g, _ := wantPeer(t, f)
		g.bind(f.peer, idClient)
		call, back := tcp(f.peer, 40000, f.pod, 80, ack), tcp(f.pod, 80, f.peer, 40000, ack)
		g.pass(g.to(g.pod, g.uplink, call))
		g.pass(g.from(g.pod, back))
		g.lease(session, -time.Second)
		r := g.from(g.pod, back)
		g.want(r, held, abi.ReasonStaleLease)
		if h := r.held[0]; h.Peer != addr(f.peer) || h.Local != addr(f.pod) || abi.Direction(h.Direction) != egress {
			t.Errorf("held %+v", h.Held)
		}
		g.drop(g.turned(g.pod, back), abi.ReasonStaleLease) // never twice
		g.want(g.to(g.pod, g.uplink, call), held, abi.ReasonStaleLease)
		g.lease(session, time.Hour)
		g.pass(g.from(g.pod, back))
		g.pass(g.to(g.pod, g.uplink, call))
	})
}

// TestLeaseSwitch: what stands keeps slot and stamp; its lease index moves to
// the new session in place, and no entry notices.
func TestLeaseSwitch(t *testing.T) {
	f := families[0]
	g, _ := wantPeer(t, f)
	b := g.bind(f.peer, idClient)
	p := tcp(f.peer, 40000, f.pod, 80, ack)
	g.pass(g.to(g.pod, g.uplink, p))
	g.lease(session+1, time.Hour)
	b.Slot.Stamp, b.Slot.Lease = b.stamp, session+1
	g.put("slots", b.slot, b.Slot)
	g.put("leases", session, abi.Lease{})
	r := g.to(g.pod, g.uplink, p)
	g.pass(r)
	if len(r.events) != 0 {
		t.Error("judged anew")
	}
}

// newPolicy puts the endpoint under another set, as a policy change does.
func (g *gate) newPolicy(ep abi.Endpoint, rules ...rule) abi.Endpoint {
	g.t.Helper()
	ep.Policy += 100
	g.policy(ep.Policy, rules...)
	g.put("endpoints", ep.Ifindex, ep)
	return ep
}

// TestEpoch: after a policy change the forward tuple is judged again, whichever
// packet comes first.
func TestEpoch(t *testing.T) {
	port := func(flags abi.PolicyFlag) rule {
		return rule{identity: idAny, dir: ingress, proto: protoTCP, port: 80, flags: flags}
	}
	client := rule{identity: idClient, dir: ingress, proto: protoTCP, port: 80, flags: allow}
	eachFamily(t, func(t *testing.T, f family) {
		call, back := tcp(f.peer, 40000, f.pod, 80, ack), tcp(f.pod, 80, f.peer, 40000, ack)
		start := func(t *testing.T) (*gate, abi.Endpoint, bound) {
			g, ep := wantPeer(t, f)
			b := g.bind(f.peer, idClient)
			g.pass(g.to(g.pod, g.uplink, call))
			g.pass(g.from(g.pod, back))
			return g, ep, b
		}
		epoch := func(g *gate, want uint32) {
			g.t.Helper()
			if _, v := g.oneFlow(); v.Judgement[ingress].Epoch != want {
				g.t.Errorf("epoch %d, want %d", v.Judgement[ingress].Epoch, want)
			}
		}
		t.Run("still allowed, forward", func(t *testing.T) {
			g, ep, _ := start(t)
			ep = g.newPolicy(ep, port(peerAllow), client)
			r := g.to(g.pod, g.uplink, call)
			g.pass(r)
			epoch(g, ep.Policy)
			if len(r.events) != 0 {
				t.Error("a flow that goes on is told as new")
			}
		})
		t.Run("still allowed, reply", func(t *testing.T) {
			g, ep, _ := start(t)
			ep = g.newPolicy(ep, port(peerAllow), client)
			g.pass(g.from(g.pod, back))
			epoch(g, ep.Policy)
			g.pass(g.to(g.pod, g.uplink, call))
		})
		t.Run("no longer allowed", func(t *testing.T) {
			g, ep, _ := start(t)
			g.newPolicy(ep)
			g.drop(g.from(g.pod, back), abi.ReasonPolicyDenied)
			g.drop(g.to(g.pod, g.uplink, call), abi.ReasonPolicyDenied)
			g.drop(g.from(g.pod, back), abi.ReasonPolicyDenied)
		})
		t.Run("allowed to everyone", func(t *testing.T) {
			g, ep, b := start(t)
			g.newPolicy(ep, port(allow))
			g.revoke(b)
			g.pass(g.from(g.pod, back))
			g.pass(g.to(g.pod, g.uplink, call))
		})
		t.Run("evidence is needed now", func(t *testing.T) {
			g := newGate(t)
			g.known(f)
			ep := g.endpoint(g.pod, f, f.pod, enforceIn)
			g.policy(ep.Policy, port(allow))
			g.pass(g.to(g.pod, g.uplink, call))
			ep = g.newPolicy(ep, port(peerAllow), client)
			g.want(g.from(g.pod, back), held, abi.ReasonUnbound)
			g.want(g.to(g.pod, g.uplink, call), held, abi.ReasonUnbound)
			g.bind(f.peer, idClient)
			g.pass(g.from(g.pod, back))
			g.pass(g.to(g.pod, g.uplink, call))
			epoch(g, ep.Policy)
		})
		t.Run("reply under a new policy to a changed binding", func(t *testing.T) {
			g, ep, b := start(t)
			g.revoke(b)
			g.bind(f.peer, idClient)
			g.newPolicy(ep, port(peerAllow), client)
			g.drop(g.from(g.pod, back), abi.ReasonGenerationChanged)
		})
		t.Run("echo, reply", func(t *testing.T) {
			g := newGate(t)
			ep := g.endpoint(g.pod, f, f.pod, enforceIn)
			ask, answer := icmpEcho(f, f.peer, f.pod, f.echo, 7), icmpEcho(f, f.pod, f.peer, f.answer, 7)
			echo := rule{identity: idAny, dir: ingress, proto: f.icmp, port: uint16(f.echo) << 8, flags: allow}
			g.policy(ep.Policy, echo)
			g.pass(g.to(g.pod, g.uplink, ask))
			ep = g.newPolicy(ep, echo) // the question is judged again, not the answer
			g.pass(g.from(g.pod, answer))
			epoch(g, ep.Policy)
			g.newPolicy(ep)
			g.drop(g.from(g.pod, answer), abi.ReasonPolicyDenied)
		})
		t.Run("enforcement begins", func(t *testing.T) {
			g := newGate(t)
			ep := g.endpoint(g.pod, f, f.pod, 0)
			g.pass(g.to(g.pod, g.uplink, call))
			g.pass(g.from(g.pod, back))
			ep.Flags |= uint32(enforceIn)
			g.newPolicy(ep)
			g.drop(g.from(g.pod, back), abi.ReasonPolicyDenied)
			g.drop(g.to(g.pod, g.uplink, call), abi.ReasonPolicyDenied)
		})
	})
}

// TestTwoJudgements: a same-node flow is judged by the sender's egress and the
// receiver's ingress, in one entry.
func TestTwoJudgements(t *testing.T) {
	eachFamily(t, func(t *testing.T, f family) {
		g := newGate(t)
		a := g.endpoint(g.pod, f, f.pod, enforceOut)
		b := g.endpoint(g.pod2, f, f.pod2, enforceIn)
		g.ipRange(f.own, abi.RangeKnown, 0)
		boundA := g.bind(f.pod, idClient, local(g.pod))
		boundB := g.bind(f.pod2, idOther, local(g.pod2))
		out := []rule{{identity: idAny, dir: egress, proto: protoTCP, port: 80, flags: peerAllow},
			{identity: idOther, dir: egress, proto: protoTCP, port: 80, flags: allow}}
		in := []rule{{identity: idAny, dir: ingress, proto: protoTCP, port: 80, flags: peerAllow},
			{identity: idClient, dir: ingress, proto: protoTCP, port: 80, flags: allow}}
		g.policy(a.Policy, out...)
		call, back := tcp(f.pod, 40000, f.pod2, 80, syn), tcp(f.pod2, 80, f.pod, 40000, syn|ack)

		g.pass(g.from(g.pod, call))
		g.drop(g.to(g.pod2, g.pod, call), abi.ReasonPolicyDenied)
		g.policy(b.Policy, in...)
		g.pass(g.to(g.pod2, g.pod, call))
		_, v := g.oneFlow()
		if e, i := v.Judgement[egress], v.Judgement[ingress]; e.Endpoint != a.ID || e.Stamp != boundB.stamp || e.Epoch != a.Policy ||
			i.Endpoint != b.ID || i.Stamp != boundA.stamp || i.Epoch != b.Policy {
			t.Errorf("judgements %+v", v.Judgement)
		}
		g.pass(g.from(g.pod2, back))
		g.pass(g.to(g.pod, g.pod2, back))
		g.drop(g.to(g.pod, g.uplink, back), abi.ReasonSpoofed)
		g.pass(g.to(g.pod, g.pod2, back))

		// The receiver's policy changes: the sender's judgement stands.
		g.newPolicy(b)
		g.pass(g.from(g.pod, call))
		g.drop(g.to(g.pod2, g.pod, call), abi.ReasonPolicyDenied)
		g.drop(g.from(g.pod2, back), abi.ReasonPolicyDenied)
		g.pass(g.to(g.pod, g.pod2, back))
		// And the sender's.
		g.put("endpoints", g.pod2, b)
		g.newPolicy(a)
		g.drop(g.from(g.pod, call), abi.ReasonPolicyDenied)
		g.drop(g.to(g.pod, g.pod2, back), abi.ReasonPolicyDenied)
		g.pass(g.to(g.pod2, g.pod, call))
	})
}

// TestAnotherEndpointsJudgement: a new workload with the old one's IP and
// device inherits no entry (I4).
func TestAnotherEndpointsJudgement(t *testing.T) {
	eachFamily(t, func(t *testing.T, f family) {
		g, ep := wantPeer(t, f)
		g.bind(f.peer, idClient)
		call, back := udp(f.peer, 40000, f.pod, 80), udp(f.pod, 80, f.peer, 40000)
		g.pass(g.to(g.pod, g.uplink, call))
		g.pass(g.from(g.pod, back))
		// The next workload, under the same set's number even; nobody may
		// call it, and it may call nobody.
		next := g.endpoint(g.pod, f, f.pod, enforceIn|enforceOut)
		g.drop(g.to(g.pod, g.uplink, call), abi.ReasonPolicyDenied)
		g.drop(g.from(g.pod, back), abi.ReasonPolicyDenied)
		next.Policy = ep.Policy
		g.put("endpoints", g.pod, next)
		g.drop(g.from(g.pod, back), abi.ReasonPolicyDenied)
		g.pass(g.to(g.pod, g.uplink, call)) // judged anew
		if _, v := g.oneFlow(); v.Judgement[ingress].Endpoint != next.ID {
			t.Errorf("judgement %+v", v.Judgement[ingress])
		}
	})
}

// TestReplyOfNothing: a packet against the direction of an entry that its
// endpoint has not judged is a call of its own, and turns the entry round.
func TestReplyOfNothing(t *testing.T) {
	eachFamily(t, func(t *testing.T, f family) {
		g := newGate(t)
		a := g.endpoint(g.pod, f, f.pod, enforceIn) // nobody may call it
		b := g.endpoint(g.pod2, f, f.pod2, enforceIn)
		call, back := udp(f.pod, 40000, f.pod2, 80), udp(f.pod2, 80, f.pod, 40000)
		g.pass(g.from(g.pod, call))
		g.drop(g.to(g.pod2, g.pod, call), abi.ReasonPolicyDenied)
		// b never accepted the flow, so this is b's call, to which a's
		// ingress policy applies.
		g.pass(g.from(g.pod2, back))
		_, v := g.oneFlow()
		if v.Judgement[egress].Endpoint != b.ID || v.Judgement[ingress].Endpoint != 0 || v.Flags&uint32(abi.CTForwardB) == 0 {
			t.Errorf("entry %+v", v)
		}
		g.drop(g.to(g.pod, g.pod2, back), abi.ReasonPolicyDenied)
		// And a's packets are its own calls again.
		g.pass(g.from(g.pod, call))
		if _, v = g.oneFlow(); v.Judgement[egress].Endpoint != a.ID {
			t.Errorf("entry %+v", v)
		}
	})
}
