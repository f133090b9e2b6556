package tests

import (
	"net/netip"
	"testing"
	"time"

	"portcullis/bpf/abi"
)

// wantPeer sets up an endpoint that lets identity idClient (and world and host)
// call TCP port 80, so that every packet to it needs evidence.
func wantPeer(t *testing.T, f family, opts ...option) (*gate, abi.Endpoint) {
	g := newGate(t, opts...)
	ep := g.endpoint(g.pod, f, f.pod, enforceIn)
	for _, proto := range []uint8{protoTCP, protoUDP} {
		for _, id := range []abi.Identity{idClient, abi.IDWorld, abi.IDHost, abi.IDRemoteNode, abi.IDUnmanaged, idCIDR} {
			g.policy(ep.Policy,
				rule{identity: idAny, dir: ingress, proto: proto, port: 80, flags: peerAllow},
				rule{identity: id, dir: ingress, proto: proto, port: 80, flags: allow})
		}
	}
	g.known(f)
	return g, ep
}

// TestEvidence: who the source of a first packet is, and whether that is known
// well enough (I1, I2, I5).
func TestEvidence(t *testing.T) {
	weak := func(s *abi.Slot) { s.Evidence = uint8(abi.EvidenceWatch) }
	leaseIs := func(i abi.LeaseIndex) func(*abi.Slot) { return func(s *abi.Slot) { s.Lease = uint32(i) } }
	classic := []option{constant("classic", uint32(1)), constant("default_evidence", uint32(abi.EvidenceWatch))}

	tests := []struct {
		name    string
		opts    []option
		setup   func(g *gate, f family)
		src     func(f family) netip.Addr // nil: peer
		in      func(g *gate) uint32      // nil: uplink
		mark    uint32
		verdict abi.Verdict
		reason  abi.Reason
		ident   abi.Identity
	}{
		{name: "live lease", setup: func(g *gate, f family) { g.bind(f.peer, idClient) }, verdict: pass, ident: idClient},
		{name: "live lease, by the other uplink", setup: func(g *gate, f family) { g.bind(f.peer, idClient) },
			in: func(g *gate) uint32 { return g.uplink2 }, verdict: pass, ident: idClient},
		{name: "no binding, owner known", verdict: held, reason: abi.ReasonUnbound},
		{name: "no binding, no owner to ask", setup: func(g *gate, f family) { g.ipRange(f.remote, abi.RangeKnown, 0) },
			verdict: drop, reason: abi.ReasonUnbound},
		{name: "lease ended, owner known", setup: func(g *gate, f family) { g.bind(f.peer, idClient); g.lease(session, -time.Second) },
			verdict: held, reason: abi.ReasonStaleLease},
		{name: "lease ended, no owner to ask", setup: func(g *gate, f family) {
			g.ipRange(f.remote, abi.RangeKnown, 0)
			g.bind(f.peer, idClient)
			g.lease(session, -time.Second)
		}, verdict: drop, reason: abi.ReasonStaleLease},
		{name: "lease ended outside every range", setup: func(g *gate, f family) {
			g.bind(f.world, idClient)
			g.lease(session, -time.Second)
		}, src: func(f family) netip.Addr { return f.world }, verdict: drop, reason: abi.ReasonStaleLease},
		{name: "deadline zero", setup: func(g *gate, f family) { g.bind(f.peer, idClient); g.put("leases", session, abi.Lease{}) },
			verdict: held, reason: abi.ReasonStaleLease},
		{name: "lease index none, whatever stands there", setup: func(g *gate, f family) {
			g.bind(f.peer, idClient, leaseIs(abi.LeaseNone))
			g.lease(uint32(abi.LeaseNone), time.Hour)
		}, verdict: held, reason: abi.ReasonStaleLease},
		{name: "lease index out of bounds", setup: func(g *gate, f family) { g.bind(f.peer, idClient, leaseIs(1<<30)) },
			verdict: held, reason: abi.ReasonStaleLease},
		{name: "classic's lease without classic", setup: func(g *gate, f family) {
			g.bind(f.peer, idClient, leaseIs(abi.LeaseClassic))
			g.put("leases", uint32(abi.LeaseClassic), abi.Lease{Deadline: ^uint64(0)})
		}, verdict: held, reason: abi.ReasonStaleLease},
		{name: "classic", opts: classic, setup: func(g *gate, f family) {
			g.bind(f.peer, idClient, leaseIs(abi.LeaseClassic), weak)
			g.put("leases", uint32(abi.LeaseClassic), abi.Lease{Deadline: ^uint64(0)})
		}, verdict: pass, ident: idClient},
		{name: "classic, unknown IP in a known range", opts: classic, setup: func(g *gate, f family) { g.ipRange(f.remote, abi.RangeKnown, 0) },
			verdict: drop, reason: abi.ReasonUnbound},
		{name: "watch is weaker than the default", setup: func(g *gate, f family) { g.bind(f.peer, idClient, weak) },
			verdict: drop, reason: abi.ReasonEvidenceTooWeak, ident: idClient},
		{name: "revoked", setup: func(g *gate, f family) { g.revoke(g.bind(f.peer, idClient)) }, verdict: held, reason: abi.ReasonUnbound},
		{name: "slot recycled for another IP", setup: func(g *gate, f family) {
			b := g.bind(f.peer, idClient)
			g.revoke(b)
			b.Slot.Stamp, b.Slot.IP = b.stamp+50, addr(f.peer2)
			g.put("slots", b.slot, b.Slot)
			g.put("bindings", addr(f.peer2), abi.Binding{Stamp: b.stamp + 50, Slot: b.slot})
		}, verdict: held, reason: abi.ReasonUnbound},
		{name: "binding names a slot of another IP, with its stamp", setup: func(g *gate, f family) {
			b := g.bind(f.peer2, idClient)
			g.put("bindings", addr(f.peer), abi.Binding{Stamp: b.stamp, Slot: b.slot})
		}, verdict: held, reason: abi.ReasonUnbound},
		{name: "empty slot with a binding of stamp zero", setup: func(g *gate, f family) {
			g.put("slots", uint32(9), abi.Slot{IP: addr(f.peer), Identity: uint32(idClient), Lease: session, Evidence: uint8(abi.EvidenceLease)})
			g.lease(session, time.Hour)
			g.put("bindings", addr(f.peer), abi.Binding{Slot: 9})
		}, verdict: held, reason: abi.ReasonUnbound},
		{name: "slot out of bounds", setup: func(g *gate, f family) { g.put("bindings", addr(f.peer), abi.Binding{Stamp: 5, Slot: 1 << 30}) },
			verdict: held, reason: abi.ReasonUnbound},

		// Where the packet came from.
		{name: "remote source, not by an uplink", setup: func(g *gate, f family) { g.bind(f.peer, idClient) },
			in: func(g *gate) uint32 { return g.stranger }, verdict: drop, reason: abi.ReasonSpoofed},
		{name: "remote source, locally generated", setup: func(g *gate, f family) { g.bind(f.peer, idClient) },
			in: func(g *gate) uint32 { return 0 }, verdict: drop, reason: abi.ReasonSpoofed},
		{name: "remote source from a local workload", setup: func(g *gate, f family) { g.bind(f.peer, idClient) },
			in: func(g *gate) uint32 { return g.pod2 }, verdict: drop, reason: abi.ReasonSpoofed},
		{name: "unbound remote source, not by an uplink", in: func(g *gate) uint32 { return g.stranger }, verdict: drop, reason: abi.ReasonSpoofed},
		{name: "remote source past its lease, not by an uplink", setup: func(g *gate, f family) { g.bind(f.peer, idClient); g.lease(session, -time.Second) },
			in: func(g *gate) uint32 { return g.stranger }, verdict: drop, reason: abi.ReasonSpoofed},
		{name: "local workload by its veth", setup: func(g *gate, f family) { g.bind(f.pod2, idClient, local(g.pod2)) },
			src: func(f family) netip.Addr { return f.pod2 }, in: func(g *gate) uint32 { return g.pod2 }, verdict: pass, ident: idClient},
		{name: "local workload's address by an uplink", setup: func(g *gate, f family) { g.bind(f.pod2, idClient, local(g.pod2)) },
			src: func(f family) netip.Addr { return f.pod2 }, verdict: drop, reason: abi.ReasonSpoofed},
		{name: "local workload's address from the node itself", setup: func(g *gate, f family) { g.bind(f.pod2, idClient, local(g.pod2)) },
			src: func(f family) netip.Addr { return f.pod2 }, in: func(*gate) uint32 { return 0 }, verdict: drop, reason: abi.ReasonSpoofed},
		{name: "local workload's address, re-injected", setup: func(g *gate, f family) { g.bind(f.pod2, idClient, local(g.pod2)) },
			src: func(f family) netip.Addr { return f.pod2 }, in: func(*gate) uint32 { return 0 }, mark: reinjectMark, verdict: drop, reason: abi.ReasonSpoofed},
		{name: "unregistered address of this node's range", setup: func(g *gate, f family) { g.ipRange(f.own, abi.RangeKnown, 0) },
			src: func(f family) netip.Addr { return f.pod2 }, in: func(g *gate) uint32 { return g.pod2 }, verdict: drop, reason: abi.ReasonUnbound},
		{name: "host", setup: func(g *gate, f family) { g.bind(f.node, abi.IDHost, local(0)) },
			src: func(f family) netip.Addr { return f.node }, in: func(*gate) uint32 { return 0 }, verdict: pass, ident: abi.IDHost},
		{name: "node address, forwarded from a workload", setup: func(g *gate, f family) { g.bind(f.node, abi.IDHost, local(0)) },
			src: func(f family) netip.Addr { return f.node }, in: func(g *gate) uint32 { return g.pod2 }, verdict: drop, reason: abi.ReasonTranslated},
		{name: "node address, forwarded from an uplink", setup: func(g *gate, f family) { g.bind(f.node, abi.IDHost, local(0)) },
			src: func(f family) netip.Addr { return f.node }, verdict: drop, reason: abi.ReasonTranslated},
		{name: "node address, re-injected", setup: func(g *gate, f family) { g.bind(f.node, abi.IDHost, local(0)) },
			src: func(f family) netip.Addr { return f.node }, in: func(*gate) uint32 { return 0 }, mark: reinjectMark, verdict: drop, reason: abi.ReasonTranslated},
		{name: "another node's address", setup: func(g *gate, f family) { g.bind(f.world, abi.IDRemoteNode) },
			src: func(f family) netip.Addr { return f.world }, verdict: pass, ident: abi.IDRemoteNode},

		// Ranges.
		{name: "world", src: func(f family) netip.Addr { return f.world }, verdict: pass, ident: abi.IDWorld},
		{name: "world, not by an uplink", src: func(f family) netip.Addr { return f.world }, in: func(g *gate) uint32 { return g.stranger },
			verdict: drop, reason: abi.ReasonSpoofed},
		{name: "CIDR identity", setup: func(g *gate, f family) { p, _ := f.world.Prefix(24); g.ipRange(p, 0, idCIDR) },
			src: func(f family) netip.Addr { return f.world }, verdict: pass, ident: idCIDR},
		{name: "a known range within a CIDR identity", setup: func(g *gate, f family) {
			p, _ := f.peer.Prefix(8)
			g.ipRange(p, 0, idCIDR)
		}, verdict: held, reason: abi.ReasonUnbound},
		{name: "a range that two nodes claim", setup: func(g *gate, f family) { g.ipRange(f.remote, abi.RangeKnown|abi.RangeConflict, 0) },
			verdict: drop, reason: abi.ReasonConflict},
		{name: "a range of a node without an agent", setup: func(g *gate, f family) { g.ipRange(f.remote, abi.RangeKnown|abi.RangeUnmanaged, 0) },
			verdict: drop, reason: abi.ReasonUnmanaged},
		{name: "a node without an agent, during a migration", setup: func(g *gate, f family) { g.ipRange(f.remote, 0, abi.IDUnmanaged) },
			verdict: pass, ident: abi.IDUnmanaged},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			eachFamily(t, func(t *testing.T, f family) {
				g, _ := wantPeer(t, f, tt.opts...)
				if tt.setup != nil {
					tt.setup(g, f)
				}
				src, in := f.peer, g.uplink
				if tt.src != nil {
					src = tt.src(f)
				}
				if tt.in != nil {
					in = tt.in(g)
				}
				p := tcp(src, 40000, f.pod, 80, syn)
				r := g.run("to_workload", p, skBuff{Ifindex: g.pod, IngressIfindex: in, Mark: tt.mark})
				g.want(r, tt.verdict, tt.reason)
				if e := r.events[0]; e.SrcIdentity != uint32(tt.ident) {
					t.Errorf("the event names identity %d, want %d", e.SrcIdentity, tt.ident)
				}
				if (len(r.held) == 1) != (tt.verdict == held) {
					t.Errorf("%d packets held", len(r.held))
				}
				if tt.verdict != pass {
					return
				}
				// The next packet is judged by the entry: same answer, no event,
				// and from elsewhere it is another answer.
				next := skBuff{Ifindex: g.pod, IngressIfindex: in, Mark: tt.mark}
				if r = g.run("to_workload", p, next); len(r.events) != 0 {
					t.Errorf("the second packet has %d events", len(r.events))
				}
				g.pass(r)
				next.IngressIfindex = g.stranger
				if r = g.run("to_workload", p, next); r.verdict == pass {
					t.Error("the same flow passes from a device where the peer is not")
				}
				g.pass(g.run("to_workload", p, skBuff{Ifindex: g.pod, IngressIfindex: in, Mark: tt.mark}))
			})
		})
	}
}

// TestNoEvidence: where the verdict is the same whoever the peer is, nobody is
// asked, and nothing is held, whatever is known.
func TestNoEvidence(t *testing.T) {
	eachFamily(t, func(t *testing.T, f family) {
		g := newGate(t)
		g.known(f)
		ep := g.endpoint(g.pod, f, f.pod, enforceIn)
		g.policy(ep.Policy, rule{identity: idAny, dir: ingress, proto: protoTCP, port: 80, flags: allow})
		r := g.to(g.pod, g.uplink, tcp(f.peer, 1, f.pod, 80, syn))
		g.pass(r)
		if e := r.events[0]; e.Evidence != uint8(abi.EvidenceNone) || e.Flags != uint8(abi.EventNoEvidence) || e.SrcIdentity != 0 {
			t.Errorf("event %+v", e)
		}
		r = g.to(g.pod, g.uplink, tcp(f.peer, 1, f.pod, 81, syn))
		g.drop(r, abi.ReasonPolicyDenied)
		if len(r.held) != 0 {
			t.Error("held although nobody can pass")
		}
	})
}

// TestNoHoldWithoutReader: a dead agent answers nobody (I2).
func TestNoHoldWithoutReader(t *testing.T) {
	f := families[0]
	for _, tt := range []struct {
		name    string
		tick    func() uint64
		verdict abi.Verdict
	}{
		{"never ticked", func() uint64 { return 0 }, drop},
		{"ticked two seconds ago", func() uint64 { return boottime() - uint64(2*time.Second) }, drop},
		{"just ticked", boottime, held},
	} {
		t.Run(tt.name, func(t *testing.T) {
			g, _ := wantPeer(t, f, constant("hold_reader_timeout", uint64(1500*time.Millisecond)))
			g.state(func(s *abi.State) { s.ReaderTick = tt.tick() })
			g.want(g.to(g.pod, g.uplink, tcp(f.peer, 1, f.pod, 80, syn)), tt.verdict, abi.ReasonUnbound)
			g.bind(f.peer, idClient)
			g.lease(session, -time.Second)
			g.state(func(s *abi.State) { s.ReaderTick = tt.tick() })
			g.want(g.to(g.pod, g.uplink, tcp(f.peer, 1, f.pod, 80, syn)), tt.verdict, abi.ReasonStaleLease)
		})
	}
}

// TestDeadlinePasses: a lease runs out while a flow is established; the clock
// cell follows CLOCK_BOOTTIME.
func TestDeadlinePasses(t *testing.T) {
	f := families[0]
	g, _ := wantPeer(t, f)
	g.ipRange(f.remote, abi.RangeKnown, 0)
	g.bind(f.peer, idClient)
	p := tcp(f.peer, 1, f.pod, 80, ack)
	g.pass(g.to(g.pod, g.uplink, p))
	deadline := boottime() + uint64(50*time.Millisecond)
	g.put("leases", session, abi.Lease{Deadline: deadline})
	for {
		r := g.to(g.pod, g.uplink, p)
		after := boottime()
		if r.verdict == drop {
			g.drop(r, abi.ReasonStaleLease)
			if after < deadline {
				t.Errorf("dropped %d ns before the deadline", deadline-after)
			}
			return
		}
		// The cell is at most a tick late (10 ms at 100 Hz).
		if before := r.lastSeen(g); before >= deadline {
			t.Fatalf("passed at %d, deadline %d", before, deadline)
		}
		if after > deadline+uint64(10*time.Second) {
			t.Fatal("passes ten seconds after the deadline")
		}
	}
}

// lastSeen is the time at which the only flow's last packet passed.
func (result) lastSeen(g *gate) uint64 {
	for _, v := range g.flows() {
		return v.LastSeen
	}
	return 0
}
