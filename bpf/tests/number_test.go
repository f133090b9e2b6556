package tests

import (
	"testing"

	"portcullis/bpf/abi"
)

// TestNumberTakenAway: a program may be descheduled between the reading of its
// peer's number and the look at policy for as long as it likes. If the number is
// the peer's no more then, and its entries have gone, their lack allows nothing.
// Here they go at once, while packets run, under ever new numbers: each of them
// is denied at all times at which the peer has it.
func TestNumberTakenAway(t *testing.T) {
	for _, kind := range []string{"bound", "by range"} {
		t.Run(kind, func(t *testing.T) {
			f := families[0]
			g := newGate(t)
			ep := g.endpoint(g.pod, f, f.pod, enforceIn)
			const first, rounds, packets = 1 << 20, 40, 5000
			g.policy(ep.Policy, rule{identity: idAny, dir: ingress, flags: allow | peerDeny, prefix: abi.PolicyPrefixAny})
			key := func(n uint32) abi.PolicyKey {
				return abi.PolicyKey{Prefixlen: uint32(abi.PolicyPrefixAny), Set: ep.Policy, Identity: n, Direction: uint8(ingress)}
			}
			denied := abi.Policy{Flags: uint8(deny)}
			g.put("policy", key(first), denied)
			name := g.numberPeer(kind, f, first)

			stop, done := make(chan struct{}), make(chan error, 1)
			go func() { // what user space does, but that it lets numbers rest
				m := g.coll.Maps["policy"]
				for n := uint32(first); ; n++ {
					select {
					case <-stop:
						done <- nil
						return
					default:
					}
					err := m.Put(key(n+1), denied)
					if err == nil {
						err = name(n + 1)
					}
					if err == nil {
						err = m.Delete(key(n))
					}
					if err != nil {
						done <- err
						return
					}
				}
			}()
			packet := tcp(f.peer, 40000, f.pod, 80, syn)
			for range rounds {
				g.runMany("to_workload", packet, skBuff{Ifindex: g.pod, IngressIfindex: g.uplink}, packets)
			}
			close(stop)
			if err := <-done; err != nil {
				t.Fatal(err)
			}
			total := uint64(0)
			for k, c := range g.counters() {
				total += c.Packets
				if k.verdict == abi.VerdictPass {
					t.Errorf("%d packets passed of a peer that is denied under each of its numbers", c.Packets)
				}
			}
			if total != rounds*packets {
				t.Errorf("%d packets are counted, were %d", total, rounds*packets)
			}
		})
	}
}

// numberPeer makes the peer known, by a binding or by its range, under a number;
// the function puts it under another one.
func (g *gate) numberPeer(kind string, f family, n uint32) func(n uint32) error {
	if kind == "bound" {
		g.known(f)
		b := g.bind(f.peer, abi.Identity(n))
		slots := g.coll.Maps["slots"]
		return func(n uint32) error {
			b.Slot.Identity = n
			return slots.Put(b.slot, b.Slot)
		}
	}
	g.ipRange(f.remote, 0, abi.Identity(n))
	state, ranges, s := g.coll.Maps["state"], g.coll.Maps["ranges"], g.state(nil)
	return func(n uint32) error {
		if err := ranges.Put(rangeKey(f.remote), abi.Range{Identity: n}); err != nil {
			return err
		}
		s.RangeEpoch++
		return state.Put(uint32(0), s)
	}
}
