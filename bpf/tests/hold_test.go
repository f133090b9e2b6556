package tests

import (
	"bytes"
	"net/netip"
	"testing"
	"time"

	"portcullis/bpf/abi"
)

func (g *gate) quota(index uint32) abi.HoldQuota {
	g.t.Helper()
	var q abi.HoldQuota
	if err := g.coll.Maps["hold_quota"].Lookup(index, &q); err != nil {
		g.t.Fatal(err)
	}
	return q
}

func padded(p []byte, n int) []byte { return append(p, make([]byte, n-len(p))...) }

// TestHeldRecord: what user space gets of a held packet.
func TestHeldRecord(t *testing.T) {
	const header = 104
	eachFamily(t, func(t *testing.T, f family) {
		for _, tt := range []struct {
			name string
			len  int
			size int
		}{
			{"as short as it is", 0, int(abi.HeldSmall)},
			{"largest small one", int(abi.HeldSmall) - header, int(abi.HeldSmall)},
			{"smallest large one", int(abi.HeldSmall) - header + 1, int(abi.HeldLarge)},
			{"3000 bytes", 3000, int(abi.HeldLarge)},
		} {
			t.Run(tt.name, func(t *testing.T) {
				g, ep := wantPeer(t, f)
				p := tcp(f.peer, 40000, f.pod, 80, syn)
				if tt.len > 0 {
					p = padded(p, tt.len)
				}
				before := boottime()
				r := g.run("to_workload", p, skBuff{Ifindex: g.pod, IngressIfindex: g.uplink, GSOSize: 1400, GSOSegs: 3})
				g.want(r, held, abi.ReasonUnbound)
				h := r.held[0]
				if h.size != tt.size {
					t.Errorf("record of %d bytes, want %d", h.size, tt.size)
				}
				if h.Arrival < before || h.Arrival > boottime() {
					t.Errorf("arrived at %d, test began at %d", h.Arrival, before)
				}
				want := abi.Held{Arrival: h.Arrival, Peer: addr(f.peer), Local: addr(f.pod), Endpoint: ep.ID, Ifindex: g.pod,
					HoldIndex: ep.HoldIndex, Len: uint32(len(p)), GsoSize: 1400, GsoSegs: 3, Direction: uint8(ingress),
					Proto: protoTCP, Reason: uint8(abi.ReasonUnbound), Sport: 40000, Dport: 80}
				if h.Held != want {
					t.Errorf("held\n got %+v\nwant %+v", h.Held, want)
				}
				if !bytes.Equal(h.packet, p) {
					t.Error("the packet is not what was sent")
				}
				if e := r.events[0]; e.Flags != 0 || e.Endpoint != ep.ID {
					t.Errorf("event %+v", e)
				}
				if n := len(g.flows()); n != 0 {
					t.Errorf("%d conntrack entries for a held packet", n)
				}
			})
		}
	})
}

// TestHoldQuota: of one endpoint and of all; one endpoint's storm leaves
// another's place alone.
func TestHoldQuota(t *testing.T) {
	f := families[0]
	small := []option{constant("hold_per_endpoint", uint32(3)), constant("hold_total", uint32(5))}
	g, ep := wantPeer(t, f, small...)
	other := g.endpoint(g.pod2, f, f.pod2, enforceIn)
	g.policy(other.Policy, rule{identity: idAny, dir: ingress, proto: protoTCP, port: 80, flags: peerAllow})
	storm := func() result { return g.to(g.pod, g.uplink, tcp(f.peer, 1, f.pod, 80, syn)) }
	quiet := func() result { return g.to(g.pod2, g.uplink, tcp(f.peer, 1, f.pod2, 80, syn)) }
	for range 3 {
		g.want(storm(), held, abi.ReasonUnbound)
	}
	for range 3 {
		g.drop(storm(), abi.ReasonHoldOverflow)
	}
	g.want(quiet(), held, abi.ReasonUnbound)
	g.want(quiet(), held, abi.ReasonUnbound)
	g.drop(quiet(), abi.ReasonHoldOverflow) // five in all
	// An overflow takes no place.
	for index, want := range map[uint32]uint64{0: 5, ep.HoldIndex: 3, other.HoldIndex: 2} {
		if q := g.quota(index); q.In != want || q.Out != 0 {
			t.Errorf("quota %d is %+v, want in %d", index, q, want)
		}
	}
	// The agent gives back what it has dealt with.
	g.put("hold_quota", ep.HoldIndex, abi.HoldQuota{In: 3, Out: 2})
	g.drop(storm(), abi.ReasonHoldOverflow)
	g.put("hold_quota", uint32(0), abi.HoldQuota{In: 5, Out: 2})
	g.want(storm(), held, abi.ReasonUnbound)

	// An endpoint without a quota of its own holds nothing.
	ep.HoldIndex = 0
	g.put("endpoints", g.pod, ep)
	g.drop(storm(), abi.ReasonHoldOverflow)
	ep.HoldIndex = 1 << 20
	g.put("endpoints", g.pod, ep)
	g.drop(storm(), abi.ReasonHoldOverflow)
}

// TestHoldRingFull: no room in the ring is an overflow, and takes no place.
func TestHoldRingFull(t *testing.T) {
	f := families[0]
	g, ep := wantPeer(t, f, mapSize("held", 4096))
	p := tcp(f.peer, 1, f.pod, 80, syn)
	ctx := skBuff{Ifindex: g.pod, IngressIfindex: g.uplink}
	// A large record never fits.
	g.drop(g.run("to_workload", padded(p, 3000), ctx), abi.ReasonHoldOverflow)
	g.want(g.run("to_workload", p, ctx), held, abi.ReasonUnbound)
	if q := g.quota(0); q.In != 1 {
		t.Errorf("total %+v", q)
	}
	if q := g.quota(ep.HoldIndex); q.In != 1 {
		t.Errorf("own %+v", q)
	}
}

// TestReinject: a held packet comes back, is recognised, judged again, and its
// mark cleared; it is never held twice (I1).
func TestReinject(t *testing.T) {
	eachFamily(t, func(t *testing.T, f family) {
		g, _ := wantPeer(t, f)
		p := tcp(f.peer, 40000, f.pod, 80, syn)
		r := g.to(g.pod, g.uplink, p)
		g.want(r, held, abi.ReasonUnbound)

		again := g.reinject(g.pod, r.held[0].packet)
		g.drop(again, abi.ReasonUnbound)
		if len(again.held) != 0 {
			t.Error("held twice")
		}
		b := g.bind(f.peer, idOther)
		g.drop(g.reinject(g.pod, p), abi.ReasonPolicyDenied)
		g.revoke(b)
		g.bind(f.peer, idClient)
		g.lease(session, -time.Second)
		g.drop(g.reinject(g.pod, p), abi.ReasonStaleLease)
		g.lease(session, time.Hour)

		again = g.run("to_workload", p, skBuff{Ifindex: g.pod, Mark: reinjectMark | 0x12})
		g.pass(again)
		if e := again.events[0]; e.Flags != uint8(abi.EventReinjected) || abi.FlowState(e.State) != abi.FlowNew {
			t.Errorf("event %+v", e)
		}
		if again.mark != 0x12 {
			t.Errorf("mark %#x leaves, want 0x12", again.mark)
		}
		// A second held packet of the flow is told too: it had been held.
		again = g.reinject(g.pod, p)
		g.pass(again)
		if len(again.events) != 1 || again.events[0].Flags != uint8(abi.EventReinjected) {
			t.Errorf("events %+v", again.events)
		}
		// The flow goes on by the uplink.
		r = g.to(g.pod, g.uplink, p)
		g.pass(r)
		if r.mark != 0 || len(r.events) != 0 {
			t.Errorf("mark %#x, %d events", r.mark, len(r.events))
		}
		g.drop(g.to(g.pod, 0, p), abi.ReasonSpoofed)
	})
}

// TestMarks: only the exact value under the mask is a mark of ours.
func TestMarks(t *testing.T) {
	f := families[0]
	for _, tt := range []struct {
		name string
		opts []option
		mark uint32
		want abi.Verdict
	}{
		{"ours", nil, reinjectMark, pass},
		{"ours, with bits of others", nil, reinjectMark | 0x4000, pass},
		{"none", nil, 0, drop},
		{"a bit more", nil, reinjectMark | 0x80000000, drop},
		{"a bit less", nil, reinjectMark &^ 0x40000000, drop},
		{"not configured", []option{constant("reinject_mark", uint32(0)), constant("mark_mask", uint32(0))}, 0, drop},
	} {
		t.Run(tt.name, func(t *testing.T) {
			g, _ := wantPeer(t, f, tt.opts...)
			g.bind(f.peer, idClient)
			// From nowhere: only a re-injected packet's origin is not asked.
			r := g.run("to_workload", tcp(f.peer, 1, f.pod, 80, syn), skBuff{Ifindex: g.pod, Mark: tt.mark})
			if r.verdict != tt.want {
				t.Errorf("%v (%v), want %v", r.verdict, r.reason, tt.want)
			}
		})
	}
}

// TestTurnRound: a packet that from_workload shall judge again is turned round
// in to_workload, uncounted, with the mark of a re-injected one; that mark
// allows nothing.
func TestTurnRound(t *testing.T) {
	eachFamily(t, func(t *testing.T, f family) {
		g := newGate(t)
		g.endpoint(g.pod, f, f.pod, enforceOut)
		p := tcp(f.pod, 40000, f.peer, 80, syn)
		before := g.counters()
		r := g.run("to_workload", p, skBuff{Ifindex: g.pod, Mark: turnMark | 7})
		if r.ret != tcxRedirect || r.mark != reinjectMark|7 || len(r.events) != 0 {
			t.Errorf("returns %d with mark %#x and %d events", r.ret, r.mark, len(r.events))
		}
		if len(g.counters()) != len(before) {
			t.Error("counted")
		}
		turned := skBuff{Ifindex: g.pod, IngressIfindex: g.pod, Mark: r.mark}
		r = g.run("from_workload", p, turned)
		g.drop(r, abi.ReasonPolicyDenied)
		if r.events[0].Flags&uint8(abi.EventReinjected) == 0 {
			t.Error("not told as re-injected")
		}
		g.drop(g.run("from_workload", tcp(f.pod2, 40000, f.peer, 80, syn), turned), abi.ReasonSpoofed)
	})
}

// callOut sets up an endpoint that may call identity idClient at TCP and UDP
// port 80, so that what it sends there needs evidence.
func callOut(t testing.TB, f family, opts ...option) (*gate, abi.Endpoint) {
	g := newGate(t, opts...)
	ep := g.endpoint(g.pod, f, f.pod, enforceOut)
	for _, proto := range []uint8{protoTCP, protoUDP} {
		g.policy(ep.Policy, rule{identity: idAny, dir: egress, proto: proto, port: 80, flags: peerAllow},
			rule{identity: idClient, dir: egress, proto: proto, port: 80, flags: allow})
	}
	g.known(f)
	return g, ep
}

// TestHoldEgress: a packet that the workload sends waits for its destination's
// binding, comes back by the turn, and is judged again, once.
func TestHoldEgress(t *testing.T) {
	eachFamily(t, func(t *testing.T, f family) {
		g, ep := callOut(t, f)
		p := tcp(f.pod, 40000, f.peer, 80, syn)
		r := g.from(g.pod, p)
		g.want(r, held, abi.ReasonUnbound)
		h := r.held[0]
		if h.Peer != addr(f.peer) || h.Local != addr(f.pod) || abi.Direction(h.Direction) != egress || h.Ifindex != g.pod ||
			h.Endpoint != ep.ID || h.Sport != 40000 || h.Dport != 80 || !bytes.Equal(h.packet, p) {
			t.Errorf("held %+v", h.Held)
		}
		if n := len(g.flows()); n != 0 {
			t.Errorf("%d conntrack entries for a held packet", n)
		}
		again := g.turned(g.pod, p)
		g.drop(again, abi.ReasonUnbound)
		if len(again.held) != 0 {
			t.Error("held twice")
		}
		b := g.bind(f.peer, idOther)
		g.drop(g.turned(g.pod, p), abi.ReasonPolicyDenied)
		g.revoke(b)
		b = g.bind(f.peer, idClient)
		again = g.turned(g.pod, p)
		g.pass(again)
		if again.mark != 0 || len(again.events) != 1 || again.events[0].Flags != uint8(abi.EventReinjected) ||
			again.events[0].DstIdentity != uint32(idClient) {
			t.Errorf("mark %#x, events %+v", again.mark, again.events)
		}
		r = g.from(g.pod, p)
		g.pass(r)
		if len(r.events) != 0 {
			t.Errorf("the flow is known: %+v", r.events)
		}
		// The answer past its lease waits too, and for the same binding.
		back := tcp(f.peer, 80, f.pod, 40000, syn|ack)
		g.pass(g.to(g.pod, g.uplink, back))
		g.lease(session, -time.Second)
		g.want(g.to(g.pod, g.uplink, back), held, abi.ReasonStaleLease)
		g.want(g.from(g.pod, p), held, abi.ReasonStaleLease)
		g.drop(g.reinject(g.pod, back), abi.ReasonStaleLease)
		g.lease(session, time.Hour)
		g.pass(g.reinject(g.pod, back))
		// Not for another one (I4).
		g.lease(session, -time.Second)
		g.want(g.to(g.pod, g.uplink, back), held, abi.ReasonStaleLease)
		g.revoke(b)
		g.bind(f.peer, idClient)
		g.drop(g.reinject(g.pod, back), abi.ReasonGenerationChanged)
	})
}

// TestHoldEgressQuota: both directions of an endpoint share its places.
func TestHoldEgressQuota(t *testing.T) {
	f := families[0]
	g, ep := callOut(t, f, constant("hold_per_endpoint", uint32(2)))
	p := tcp(f.pod, 40000, f.peer, 80, syn)
	g.want(g.from(g.pod, p), held, abi.ReasonUnbound)
	g.want(g.from(g.pod, p), held, abi.ReasonUnbound)
	g.drop(g.from(g.pod, p), abi.ReasonHoldOverflow)
	if q := g.quota(ep.HoldIndex); q.In != 2 {
		t.Errorf("own %+v", q)
	}
	g.state(func(s *abi.State) { s.ReaderTick = 1 })
	g.drop(g.from(g.pod, p), abi.ReasonUnbound) // nobody reads
}

func (g *gate) source(index uint32) (q abi.HoldQuota) {
	g.t.Helper()
	if err := g.coll.Maps["hold_sources"].Lookup(index, &q); err != nil {
		g.t.Fatal(err)
	}
	return q
}

// TestHoldPerSource: one source's storm leaves the other places to others, at
// whichever endpoint; one endpoint's calls to an address leave alone another's.
func TestHoldPerSource(t *testing.T) {
	eachFamily(t, func(t *testing.T, f family) {
		opts := []option{constant("hold_per_source", uint32(2)), constant("hold_per_endpoint", uint32(5)), constant("hold_key", uint64(12345))}
		g, ep := wantPeer(t, f, opts...)
		other := g.endpoint(g.pod2, f, f.pod2, enforceIn|enforceOut)
		for _, d := range []abi.Direction{ingress, egress} {
			g.policy(other.Policy, rule{identity: idAny, dir: d, proto: protoTCP, port: 80, flags: peerAllow})
		}
		in := func(src netip.Addr) result { return g.to(g.pod, g.uplink, tcp(src, 1, f.pod, 80, syn)) }
		r := in(f.peer)
		g.want(r, held, abi.ReasonUnbound)
		index := r.held[0].SourceIndex
		if index == 0 || index >= uint32(abi.HoldSources) {
			t.Fatalf("source index %d", index)
		}
		g.want(in(f.peer), held, abi.ReasonUnbound)
		for range 3 {
			g.drop(in(f.peer), abi.ReasonHoldOverflow)
		}
		// By the address alone: its storm counts at other endpoints too.
		g.drop(g.to(g.pod2, g.uplink, tcp(f.peer, 1, f.pod2, 80, syn)), abi.ReasonHoldOverflow)
		g.want(in(f.peer2), held, abi.ReasonUnbound)
		// An overflow takes no place, anywhere.
		if q := g.source(index); q.In != 2 || q.Out != 0 {
			t.Errorf("source %+v", q)
		}
		if q := g.quota(ep.HoldIndex); q.In != 3 {
			t.Errorf("own %+v", q)
		}
		// Given back.
		g.put("hold_sources", index, abi.HoldQuota{In: 2, Out: 1})
		g.want(in(f.peer), held, abi.ReasonUnbound)
		g.drop(in(f.peer), abi.ReasonHoldOverflow)

		// What is sent to that address counts for the sender.
		out := func(ifindex uint32, src netip.Addr) result { return g.from(ifindex, tcp(src, 1, f.peer, 80, syn)) }
		r = out(g.pod2, f.pod2)
		g.want(r, held, abi.ReasonUnbound)
		if r.held[0].SourceIndex == index {
			t.Error("the caller and the called share a place")
		}
		g.want(out(g.pod2, f.pod2), held, abi.ReasonUnbound)
		g.drop(out(g.pod2, f.pod2), abi.ReasonHoldOverflow)
		ep.Flags |= uint32(enforceOut)
		ep.Policy = other.Policy
		g.put("endpoints", g.pod, ep)
		g.want(out(g.pod, f.pod), held, abi.ReasonUnbound)

		// No place in the endpoint's quota, or in the ring: given back.
		g, ep = wantPeer(t, f, append(opts, constant("hold_per_endpoint", uint32(1)))...)
		r = in(f.peer)
		index = r.held[0].SourceIndex
		g.drop(in(f.peer), abi.ReasonHoldOverflow)
		if q := g.source(index); q.In != 1 {
			t.Errorf("source %+v", q)
		}
	})
}
