package tests

import (
	"testing"
	"time"

	"portcullis/bpf/abi"
)

const l7 = abi.PolicyL7

const (
	egressMark  = 0x11110000
	ingressMark = 0x22220000
)

// steering sets a proxy up, with the uplink2 and stranger devices as the outer
// devices.
func (g *gate) steering() {
	g.t.Helper()
	g.put("steering", uint32(egress), abi.Steering{Outer: g.uplink2, Inner: 77, Mark: egressMark, Mac: [6]byte{2, 0xcc, 0, 0, 0, 1}})
	g.put("steering", uint32(ingress), abi.Steering{Outer: g.stranger, Inner: 78, Mark: ingressMark, Mac: [6]byte{2, 0xcc, 0, 0, 0, 2}})
}

func (g *gate) steered(r result) { g.t.Helper(); g.want(r, abi.VerdictSteer, abi.ReasonNone) }

// proxy sends what the proxy sends by an outer device; it must be let on, with a
// mark that is returned.
func (g *gate) proxy(outer uint32, packet []byte) uint32 {
	g.t.Helper()
	r := g.runUncounted("from_proxy", packet, skBuff{Ifindex: outer, IngressIfindex: outer})
	if r.ret != tcxRedirect {
		g.t.Errorf("the proxy's packet ends: %d, %+v", r.ret, r.events)
	}
	return r.mark
}

// silenced sends what the proxy must not send.
func (g *gate) silenced(outer uint32, packet []byte, reason abi.Reason) {
	g.t.Helper()
	r := g.runUncounted("from_proxy", packet, skBuff{Ifindex: outer, IngressIfindex: outer})
	if r.ret != tcxDrop || len(r.events) != 1 || abi.Reason(r.events[0].Reason) != reason || abi.Verdict(r.events[0].Verdict) != drop {
		g.t.Errorf("the proxy's packet: %d, %+v; want a drop (%v)", r.ret, r.events, reason)
	}
}

// fromMarked and toMarked are what comes by the workload's device from the proxy.
func (g *gate) fromMarked(mark uint32, packet []byte) result {
	g.t.Helper()
	return g.run("from_workload", packet, skBuff{Ifindex: g.pod, IngressIfindex: g.pod, Mark: mark})
}

func (g *gate) toMarked(mark, outer uint32, packet []byte) result {
	g.t.Helper()
	return g.run("to_workload", packet, skBuff{Ifindex: g.pod, IngressIfindex: outer, Mark: mark})
}

// caller sets up a pod whose calls to the peer's port 80 (TCP) and 53 (UDP) go
// through the proxy.
func caller(t *testing.T, f family) (*gate, abi.Endpoint, bound) {
	g := newGate(t)
	ep := g.endpoint(g.pod, f, f.pod, enforceOut)
	g.bind(f.pod, abi.Identity(ep.Identity), local(g.pod))
	g.callerRules(ep.Policy, allow|l7)
	g.known(f)
	return g, ep, g.bind(f.peer, idClient)
}

func (g *gate) callerRules(set uint32, flags abi.PolicyFlag) {
	for _, r := range []rule{{proto: protoTCP, port: 80}, {proto: protoUDP, port: 53}} {
		g.policy(set, rule{identity: idAny, dir: egress, proto: r.proto, port: r.port, flags: peerAllow},
			rule{identity: idClient, dir: egress, proto: r.proto, port: r.port, flags: flags})
	}
}

// called sets up a pod of which the client's calls of port 80 go through the
// proxy.
func called(t *testing.T, f family) (*gate, abi.Endpoint, bound) {
	g := newGate(t)
	ep := g.endpoint(g.pod, f, f.pod, enforceIn)
	g.bind(f.pod, abi.Identity(ep.Identity), local(g.pod))
	for _, proto := range []uint8{protoTCP, protoUDP} {
		g.policy(ep.Policy, rule{identity: idAny, dir: ingress, proto: proto, port: 80, flags: peerAllow},
			rule{identity: idClient, dir: ingress, proto: proto, port: 80, flags: allow | l7})
	}
	g.known(f)
	return g, ep, g.bind(f.peer, idClient)
}

// TestSteerEgress: all four kinds of packets of a flow that goes through the proxy
// by its caller's rules, and none goes on without the proxy.
func TestSteerEgress(t *testing.T) {
	eachFamily(t, func(t *testing.T, f family) {
		g, _, _ := caller(t, f)
		request, reply := tcp(f.pod, 40000, f.peer, 80, ack), tcp(f.peer, 80, f.pod, 40000, ack)
		open, opened := tcp(f.pod, 40000, f.peer, 80, syn), tcp(f.peer, 80, f.pod, 40000, syn|ack)
		g.drop(g.from(g.pod, open), abi.ReasonL7Unavailable)
		g.drop(g.to(g.pod, g.uplink, opened), abi.ReasonL7Unavailable)
		g.steering()
		g.delete("conntrack", func() abi.CTKey { k, _ := g.oneFlow(); return k }())

		r := g.from(g.pod, open)
		g.steered(r)
		if len(r.events) != 1 || abi.FlowState(r.events[0].State) != abi.FlowNew {
			t.Errorf("events of the first packet: %+v", r.events)
		}
		// The proxy takes the connection, and makes one of its own.
		mark := g.proxy(g.uplink2, opened)
		if mark != egressMark {
			t.Errorf("mark %#x", mark)
		}
		if r = g.toMarked(mark, g.uplink2, opened); r.mark != 0 {
			t.Errorf("mark %#x is left", r.mark)
		}
		g.pass(r)
		if r = g.fromMarked(g.proxy(g.uplink2, open), open); r.mark != 0 {
			t.Errorf("mark %#x is left", r.mark)
		}
		g.pass(r)
		g.steered(g.to(g.pod, g.uplink, opened))
		for range 5 { // within a tick: nothing is remembered that would let by
			g.steered(g.from(g.pod, request))
			g.pass(g.fromMarked(egressMark, request))
			g.steered(g.to(g.pod, g.uplink, reply))
			g.pass(g.toMarked(egressMark, g.uplink2, reply))
		}
		// Another's mark is none, nor is a guess, nor the other end's.
		for _, forged := range []uint32{ingressMark, egressMark ^ 0x10000, reinjectMark, 0xffff0000} {
			g.steered(g.fromMarked(forged, request))
			g.steered(g.toMarked(forged, g.uplink, reply))
		}
		// The peer's packets are asked where they come in, before they go there.
		g.drop(g.to(g.pod, g.stranger, reply), abi.ReasonSpoofed)

		g.steered(g.from(g.pod, udp(f.pod, 40000, f.peer, 53)))
		g.pass(g.fromMarked(g.proxy(g.uplink2, udp(f.pod, 40000, f.peer, 53)), udp(f.pod, 40000, f.peer, 53)))
		g.steered(g.to(g.pod, g.uplink, udp(f.peer, 53, f.pod, 40000)))
		g.steered(g.to(g.pod, g.uplink, icmpError(f, f.world, f.pod, map[bool]uint8{false: 3, true: 1}[f.is6],
			ipPacket(f.pod, f.peer, protoTCP, tcpHeader(40000, 80, ack)))))
	})
}

// TestSteerIngress: the same by the rules of the one that is called; UDP no proxy
// looks into there.
func TestSteerIngress(t *testing.T) {
	eachFamily(t, func(t *testing.T, f family) {
		g, _, _ := called(t, f)
		g.steering()
		open, opened := tcp(f.peer, 40000, f.pod, 80, syn), tcp(f.pod, 80, f.peer, 40000, syn|ack)
		g.steered(g.to(g.pod, g.uplink, open))
		g.pass(g.fromMarked(g.proxy(g.stranger, opened), opened))
		g.pass(g.toMarked(g.proxy(g.stranger, open), g.stranger, open))
		g.steered(g.from(g.pod, opened))
		for _, forged := range []uint32{egressMark, reinjectMark} {
			g.steered(g.fromMarked(forged, opened))
		}
		g.silenced(g.uplink2, opened, abi.ReasonNoFlow)
		g.drop(g.to(g.pod, g.uplink, udp(f.peer, 40000, f.pod, 80)), abi.ReasonL7Unavailable)
	})
}

// TestSteerSubject: the proxy speaks in the flows that were steered to it, by
// their device, and in no others.
func TestSteerSubject(t *testing.T) {
	eachFamily(t, func(t *testing.T, f family) {
		g, ep, _ := caller(t, f)
		g.steering()
		g.policy(ep.Policy, rule{identity: idAny, dir: egress, proto: protoTCP, port: 81, flags: allow})
		g.steered(g.from(g.pod, tcp(f.pod, 40000, f.peer, 80, syn)))
		g.pass(g.from(g.pod, tcp(f.pod, 40000, f.peer, 81, syn)))
		g.proxy(g.uplink2, tcp(f.pod, 40000, f.peer, 80, syn))
		g.silenced(g.uplink2, tcp(f.pod, 40000, f.peer, 81, syn), abi.ReasonNoFlow)       // not through the proxy
		g.silenced(g.uplink2, tcp(f.pod, 40001, f.peer, 80, syn), abi.ReasonNoFlow)       // not known
		g.silenced(g.stranger, tcp(f.pod, 40000, f.peer, 80, syn), abi.ReasonNoFlow)      // another device
		g.silenced(g.uplink, tcp(f.pod, 40000, f.peer, 80, syn), abi.ReasonL7Unavailable) // none of the proxy's
		g.silenced(g.uplink2, tcp(f.peer2, 80, f.pod2, 40000, syn), abi.ReasonNoFlow)
		g.silenced(g.uplink2, icmpEcho(f, f.pod, f.peer, f.echo, 7), abi.ReasonUnsupported)
		// The kernel's own word, that nobody listens.
		unreachable := map[bool]uint8{false: 3, true: 1}[f.is6]
		g.steered(g.from(g.pod, udp(f.pod, 5000, f.peer, 53)))
		quote := ipPacket(f.pod, f.peer, protoUDP, udpHeader(5000, 53))
		g.pass(g.toMarked(g.proxy(g.uplink2, icmpError(f, f.peer, f.pod, unreachable, quote)), g.uplink2, icmpError(f, f.peer, f.pod, unreachable, quote)))
		ep.State = uint32(abi.EPQuarantined)
		g.put("endpoints", g.pod, ep)
		g.silenced(g.uplink2, tcp(f.pod, 40000, f.peer, 80, syn), abi.ReasonNoFlow)
	})
}

// TestSteerGrounds: whatever ends a flow ends it on both sides of the proxy with
// the next packet (I2, I4).
func TestSteerGrounds(t *testing.T) {
	f4, f6 := families[0], families[1] // one code path serves both: each here once
	t.Run("", func(t *testing.T) {
		for _, tt := range []struct {
			name string
			end  func(g *gate, ep abi.Endpoint, b bound)
		}{
			{"stamp", func(g *gate, _ abi.Endpoint, b bound) { g.revoke(b) }},
			{"lease", func(g *gate, _ abi.Endpoint, _ bound) { g.put("leases", session, abi.Lease{}) }},
			{"epoch", func(g *gate, ep abi.Endpoint, _ bound) {
				ep.Policy += 100 // a set without entries
				g.put("endpoints", g.pod, ep)
			}},
			{"gate", func(g *gate, ep abi.Endpoint, _ bound) {
				ep.State = uint32(abi.EPClosed)
				g.put("endpoints", g.pod, ep)
			}},
			{"proxy", func(g *gate, _ abi.Endpoint, _ bound) {
				g.put("steering", uint32(egress), abi.Steering{})
				g.put("steering", uint32(ingress), abi.Steering{})
			}},
		} {
			t.Run("egress "+tt.name, func(t *testing.T) {
				f := f4
				g, ep, b := caller(t, f)
				g.ipRange(f.remote, abi.RangeKnown, 0) // nobody to ask: no holds
				g.steering()
				out, in := tcp(f.pod, 40000, f.peer, 80, ack), tcp(f.peer, 80, f.pod, 40000, ack)
				all := func() []result {
					return []result{g.from(g.pod, out), g.fromMarked(egressMark, out), g.to(g.pod, g.uplink, in), g.toMarked(egressMark, g.uplink2, in)}
				}
				for i, r := range all() {
					if want := [4]abi.Verdict{abi.VerdictSteer, pass, abi.VerdictSteer, pass}[i]; r.verdict != want {
						t.Errorf("packet %d before: %v (%v), want %v", i, r.verdict, r.reason, want)
					}
				}
				tt.end(g, ep, b)
				for i, r := range all() {
					if r.verdict != drop {
						t.Errorf("packet %d: %v (%v)", i, r.verdict, r.reason)
					}
				}
			})
			t.Run("ingress "+tt.name, func(t *testing.T) {
				f := f6
				g, ep, b := called(t, f)
				g.ipRange(f.remote, abi.RangeKnown, 0)
				g.steering()
				in, out := tcp(f.peer, 40000, f.pod, 80, ack), tcp(f.pod, 80, f.peer, 40000, ack)
				g.steered(g.to(g.pod, g.uplink, in))
				g.pass(g.toMarked(ingressMark, g.stranger, in))
				tt.end(g, ep, b)
				for i, r := range []result{g.toMarked(ingressMark, g.stranger, in), g.fromMarked(ingressMark, out), g.from(g.pod, out), g.to(g.pod, g.uplink, in)} {
					if r.verdict != drop {
						t.Errorf("packet %d: %v (%v)", i, r.verdict, r.reason)
					}
				}
			})
		}
	})
}

// TestSteerEpoch: a connection stays with the proxy when policy changes its mind,
// for its two sides are two connections; the next one goes as policy says. One that
// nobody looked into goes to the proxy as soon as it must.
func TestSteerEpoch(t *testing.T) {
	eachFamily(t, func(t *testing.T, f family) {
		g, ep, b := caller(t, f)
		g.steering()
		out, in := tcp(f.pod, 40000, f.peer, 80, ack), tcp(f.peer, 80, f.pod, 40000, ack)
		change := func(flags abi.PolicyFlag) {
			ep.Policy++
			g.callerRules(ep.Policy, flags)
			g.put("endpoints", g.pod, ep)
		}
		g.steered(g.from(g.pod, tcp(f.pod, 40000, f.peer, 80, syn)))
		g.pass(g.fromMarked(egressMark, out))
		change(allow | l7)
		g.pass(g.toMarked(egressMark, g.uplink2, in)) // the proxy's word is judged anew, too
		g.steered(g.from(g.pod, out))
		change(allow)
		g.pass(g.toMarked(egressMark, g.uplink2, in))
		g.steered(g.from(g.pod, out))
		g.steered(g.to(g.pod, g.uplink, in))
		g.pass(g.fromMarked(egressMark, out))
		change(allow)
		g.pass(g.from(g.pod, tcp(f.pod, 40000, f.peer, 80, syn)))
		g.pass(g.from(g.pod, out))
		change(allow | l7)
		g.steered(g.to(g.pod, g.uplink, in))
		g.steered(g.from(g.pod, out))
		// What came through the proxy is bound to whom it was judged for.
		g.revoke(b)
		g.bind(f.peer, idClient)
		change(allow | l7)
		g.drop(g.toMarked(egressMark, g.uplink2, in), abi.ReasonGenerationChanged)
		g.drop(g.fromMarked(egressMark, out), abi.ReasonGenerationChanged)
	})
}

// TestSteerAudit: audit changes nothing about what passes, nor how.
func TestSteerAudit(t *testing.T) {
	eachFamily(t, func(t *testing.T, f family) {
		g, ep, _ := caller(t, f)
		g.steering()
		ep.Flags |= uint32(abi.EPAudit)
		g.put("endpoints", g.pod, ep)
		g.pass(g.from(g.pod, tcp(f.pod, 40000, f.peer, 80, syn)))
	})
}

// TestSteerHold: a peer that is not known yet is asked for first, and the packet
// steered when it comes back. What the proxy sends does not wait: its workload
// sends again.
func TestSteerHold(t *testing.T) {
	eachFamily(t, func(t *testing.T, f family) {
		g, _, b := caller(t, f)
		g.steering()
		g.put("hold_quota", uint32(0), abi.HoldQuota{})
		out := tcp(f.pod, 40000, f.peer, 80, syn)
		g.lease(session, -time.Second)
		g.want(g.from(g.pod, out), held, abi.ReasonStaleLease)
		g.lease(session, time.Hour)
		g.steered(g.turned(g.pod, out))
		g.lease(session, -time.Second)
		g.drop(g.fromMarked(egressMark, out), abi.ReasonStaleLease)
		_ = b
	})
}
