package tests

import (
	"testing"

	"portcullis/bpf/abi"
)

// TestSeal: a judgement that is not whole counts for nothing.
func TestSeal(t *testing.T) {
	f := families[0]
	changes := map[string]func(*abi.Judgement){
		"stamp":    func(j *abi.Judgement) { j.Stamp++ },
		"no stamp": func(j *abi.Judgement) { j.Stamp = 0 },
		"slot":     func(j *abi.Judgement) { j.Slot++ },
		"evidence": func(j *abi.Judgement) { j.Evidence = 0 },
		"flags":    func(j *abi.Judgement) { j.Flags |= uint8(abi.JudgedByRange) },
		"seal":     func(j *abi.Judgement) { j.Seal ^= 1 },
	}
	for name, change := range changes {
		t.Run(name, func(t *testing.T) {
			g, ep := wantPeer(t, f)
			g.bind(f.peer, idClient)
			call := tcp(f.peer, 40000, f.pod, 80, ack)
			g.pass(g.to(g.pod, g.uplink, call))
			// Were the entry believed, the packet would pass; judged anew
			// it meets a set without entries.
			k, v := g.oneFlow()
			change(&v.Judgement[ingress])
			g.put("conntrack", k, v)
			g.policy(ep.Policy, rule{identity: idAny, dir: ingress, proto: protoTCP, port: 80, flags: deny})
			g.drop(g.to(g.pod, g.uplink, call), abi.ReasonPolicyDenied)
		})
	}
	t.Run("another flow's", func(t *testing.T) {
		g, ep := wantPeer(t, f)
		g.bind(f.peer, idClient)
		g.policy(ep.Policy, rule{identity: idAny, dir: ingress, proto: protoTCP, port: 81, flags: allow})
		g.pass(g.to(g.pod, g.uplink, tcp(f.peer, 40000, f.pod, 81, ack)))
		k, v := g.oneFlow()
		k.APort = 80
		k.BPort = 40000
		g.put("conntrack", k, v)
		g.policy(ep.Policy, rule{identity: idAny, dir: ingress, proto: protoTCP, port: 80, flags: deny})
		g.drop(g.to(g.pod, g.uplink, tcp(f.peer, 40000, f.pod, 80, ack)), abi.ReasonPolicyDenied)
	})
	t.Run("turned round", func(t *testing.T) {
		g, ep := wantPeer(t, f)
		g.bind(f.peer, idClient)
		g.pass(g.to(g.pod, g.uplink, tcp(f.peer, 40000, f.pod, 80, ack)))
		k, v := g.oneFlow()
		v.Flags ^= uint32(abi.CTForwardB)
		v.Judgement[egress] = v.Judgement[ingress]
		g.put("conntrack", k, v)
		g.policy(ep.Policy, rule{identity: idAny, dir: ingress, proto: protoTCP, port: 80, flags: deny})
		// Would be a reply to the pod's own call.
		g.drop(g.to(g.pod, g.uplink, tcp(f.peer, 40000, f.pod, 80, ack)), abi.ReasonPolicyDenied)
	})
}

// TestRangeEpoch: a flow that was judged by its peer's range is judged again
// after the ranges changed (I5).
func TestRangeEpoch(t *testing.T) {
	eachFamily(t, func(t *testing.T, f family) {
		g, _ := wantPeer(t, f)
		call, back := tcp(f.world, 40000, f.pod, 80, ack), tcp(f.pod, 80, f.world, 40000, ack)
		g.pass(g.to(g.pod, g.uplink, call))
		g.pass(g.from(g.pod, back))
		p, _ := f.world.Prefix(24)
		g.ipRange(p, abi.RangeKnown|abi.RangeHoldable, 0)
		g.state(func(s *abi.State) { s.RangeEpoch++ })
		g.want(g.from(g.pod, back), held, abi.ReasonUnbound)
		g.want(g.to(g.pod, g.uplink, call), held, abi.ReasonUnbound)
		g.delete("ranges", rangeKey(p))
		g.state(func(s *abi.State) { s.RangeEpoch++ })
		g.pass(g.from(g.pod, back))
		g.pass(g.to(g.pod, g.uplink, call))
	})
}

// TestMapFull: what needs an entry is dropped when there is no room; what is
// remembered for the record alone passes, and is counted as such (I6).
func TestMapFull(t *testing.T) {
	eachFamily(t, func(t *testing.T, f family) {
		g := newGate(t, mapSize("conntrack", 8))
		ep := g.endpoint(g.pod, f, f.pod, enforceIn)
		g.endpoint(g.pod2, f, f.pod2, 0)
		g.policy(ep.Policy, rule{identity: idAny, dir: ingress, proto: protoTCP, port: 80, flags: allow})
		port := uint16(1)
		for ; len(g.flows()) < 8; port++ {
			g.pass(g.from(g.pod, tcp(f.pod, port, f.peer, 9, syn)))
		}
		g.drop(g.from(g.pod, tcp(f.pod, 5000, f.peer, 9, syn)), abi.ReasonMapFull)
		g.drop(g.to(g.pod, g.uplink, tcp(f.peer, 5000, f.pod, 80, syn)), abi.ReasonMapFull)
		g.want(g.from(g.pod2, tcp(f.pod2, 5000, f.peer, 9, syn)), pass, abi.ReasonMapFull)
		// Flows that live go on living, and their entries can be rewritten.
		g.newPolicy(ep)
		g.pass(g.to(g.pod, g.uplink, tcp(f.peer, 9, f.pod, 1, syn|ack)))
		g.pass(g.from(g.pod, tcp(f.pod, 1, f.peer, 9, ack)))
		if n := len(g.flows()); n != 8 {
			t.Errorf("%d entries", n)
		}
	})
}
