package tests

import (
	"net/netip"
	"testing"
	"time"

	"portcullis/bpf/abi"
)

// wantSVID sets up an endpoint that asks for evidence svid of whoever calls TCP
// port 80, at a node whose agent asks for proofs.
func wantSVID(t *testing.T, f family, opts ...option) (*gate, abi.Endpoint) {
	g := newGate(t, append([]option{constant("proofs", uint32(1))}, opts...)...)
	ep := g.endpoint(g.pod, f, f.pod, enforceIn)
	g.policy(ep.Policy,
		rule{identity: idAny, dir: ingress, proto: protoTCP, port: 80, flags: peerAllow},
		rule{identity: idClient, dir: ingress, proto: protoTCP, port: 80, flags: allow, evidence: abi.EvidenceSvid})
	g.known(f)
	return g, ep
}

// prove stores a proof into a slot that stands.
func (g *gate) prove(b bound, d time.Duration) {
	b.Slot.Proved = 0
	if d != 0 {
		b.Slot.Proved = uint64(int64(boottime()) + int64(d))
	}
	g.put("slots", b.slot, b.Slot)
}

// A packet whose peer must be proved waits for that, also after it has waited for
// the binding; the record says under which binding it was judged.
func TestWaitForAProof(t *testing.T) {
	eachFamily(t, func(t *testing.T, f family) {
		g, _ := wantSVID(t, f)
		p := tcp(f.peer, 40000, f.pod, 80, syn)
		in := skBuff{Ifindex: g.pod, IngressIfindex: g.uplink}
		r := g.run("to_workload", p, in)
		g.want(r, held, abi.ReasonUnbound)
		if r.held[0].Stamp != 0 {
			t.Error("a packet without a binding has a stamp")
		}
		b := g.bind(f.peer, idClient)
		again := skBuff{Ifindex: g.pod, Mark: reinjectMark}
		for _, skb := range []skBuff{in, again} {
			r = g.run("to_workload", p, skb)
			g.want(r, held, abi.ReasonEvidenceTooWeak)
			if r.held[0].Stamp != b.stamp || r.held[0].Reason != uint8(abi.ReasonEvidenceTooWeak) {
				t.Errorf("%+v, want stamp %d", r.held[0].Held, b.stamp)
			}
		}
		g.prove(b, time.Hour)
		r = g.run("to_workload", p, again)
		g.pass(r)
		if e := r.events[0]; e.Evidence != uint8(abi.EvidenceSvid) {
			t.Errorf("evidence %d in the event", e.Evidence)
		}
		g.pass(g.run("to_workload", p, in))

		// The proof goes: the flow that asked for it waits again; and it comes back.
		ack := tcp(f.peer, 40000, f.pod, 80, 0x10)
		g.prove(b, 0)
		r = g.run("to_workload", ack, in)
		g.want(r, held, abi.ReasonEvidenceTooWeak)
		g.prove(b, time.Hour)
		g.pass(g.run("to_workload", ack, in))
		g.prove(b, -time.Second) // its deadline stands in the kernel (I2)
		g.want(g.run("to_workload", ack, in), held, abi.ReasonEvidenceTooWeak)
	})
}

// Who cannot be asked for a proof is not waited for.
func TestNoWaitForAProof(t *testing.T) {
	eachFamily(t, func(t *testing.T, f family) {
		p := tcp(f.peer, 40000, f.pod, 80, syn)
		t.Run("no proofs are asked for", func(t *testing.T) {
			g, _ := wantSVID(t, f, constant("proofs", uint32(0)))
			g.bind(f.peer, idClient)
			g.want(g.run("to_workload", p, skBuff{Ifindex: g.pod, IngressIfindex: g.uplink}), drop, abi.ReasonEvidenceTooWeak)
		})
		t.Run("the reader is gone", func(t *testing.T) {
			g, _ := wantSVID(t, f)
			g.bind(f.peer, idClient)
			g.state(func(s *abi.State) { s.ReaderTick = 0 })
			g.want(g.run("to_workload", p, skBuff{Ifindex: g.pod, IngressIfindex: g.uplink}), drop, abi.ReasonEvidenceTooWeak)
		})
		t.Run("lease is not enough, and local neither", func(t *testing.T) {
			g, _ := wantSVID(t, f)
			b := g.bind(f.pod2, idClient, local(g.pod2))
			from := tcp(f.pod2, 40000, f.pod, 80, syn)
			in := skBuff{Ifindex: g.pod, IngressIfindex: g.pod2}
			g.want(g.run("to_workload", from, in), held, abi.ReasonEvidenceTooWeak)
			g.prove(b, time.Hour)
			g.pass(g.run("to_workload", from, in))
			g.prove(b, 0)
			g.want(g.run("to_workload", tcp(f.pod2, 40000, f.pod, 80, 0x10), in), held, abi.ReasonEvidenceTooWeak)
		})
	})
}

// PC_EP_SVID: an endpoint's rules ask for svid where they name nothing; what is
// known by its range needs none.
func TestEndpointAsksForSVID(t *testing.T) {
	eachFamily(t, func(t *testing.T, f family) {
		g := newGate(t, constant("proofs", uint32(1)))
		ep := g.endpoint(g.pod, f, f.pod, enforceIn|abi.EPSvid)
		g.policy(ep.Policy,
			rule{identity: idAny, dir: ingress, proto: protoTCP, port: 80, flags: peerAllow},
			rule{identity: idClient, dir: ingress, proto: protoTCP, port: 80, flags: allow},
			rule{identity: abi.IDWorld, dir: ingress, proto: protoTCP, port: 80, flags: allow})
		g.known(f)
		b := g.bind(f.peer, idClient)
		call := func(src netip.Addr) result {
			return g.run("to_workload", tcp(src, 40000, f.pod, 80, syn), skBuff{Ifindex: g.pod, IngressIfindex: g.uplink})
		}
		g.want(call(f.peer), held, abi.ReasonEvidenceTooWeak)
		g.prove(b, time.Hour)
		g.pass(call(f.peer))
		g.pass(call(f.world))
	})
}

// What was remembered of a flow for the rest of a tick does not outlive its proof.
func TestRecentProof(t *testing.T) {
	f := families[0]
	g, _ := wantSVID(t, f)
	b := g.bind(f.peer, idClient)
	g.withinTick(func(begun func()) {
		g.prove(b, time.Hour)
		ack := tcp(f.peer, 40000, f.pod, 80, 0x10)
		send := func() result {
			return g.run("to_workload", ack, skBuff{Ifindex: g.pod, IngressIfindex: g.uplink})
		}
		g.settle(begun, send)
		g.prove(b, 0)
		if r := send(); r.verdict == pass {
			t.Error("it passes without its proof")
		}
	})
}
