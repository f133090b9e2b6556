package tests

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"net/netip"
	"testing"
	"time"

	"portcullis/bpf/abi"
)

// fragments cuts a datagram into fragments of n bytes of payload each.
func fragments(src, dst netip.Addr, proto uint8, id uint32, payload []byte, n int) (out [][]byte) {
	for at := 0; at < len(payload); at += n {
		part := payload[at:min(at+n, len(payload))]
		out = append(out, fragment(src, dst, proto, id, at, at+n < len(payload), part))
	}
	return out
}

func fragment(src, dst netip.Addr, proto uint8, id uint32, at int, more bool, part []byte) []byte {
	m := uint16(0)
	if src.Is4() {
		if more {
			m = 0x2000
		}
		p := frame(src, dst, proto, part)
		binary.BigEndian.PutUint16(p[14+4:], uint16(id))
		binary.BigEndian.PutUint16(p[14+6:], m|uint16(at/8))
		return p
	}
	if more {
		m = 1
	}
	h := binary.BigEndian.AppendUint16([]byte{proto, 0}, uint16(at)|m)
	return frame(src, dst, 44, append(binary.BigEndian.AppendUint32(h, id), part...))
}

func datagram(sport, dport uint16, n int) []byte {
	return append(udpHeader(sport, dport), make([]byte, n)...)
}

func fragmentGate(t *testing.T, f family) (*gate, abi.Endpoint) {
	return wantPeer(t, f, mapSize("fragments", 8*uint32(abi.FragmentsPerEndpoint)))
}

// TestFragments: the others follow their first, in any order, and only while
// its grounds stand.
func TestFragments(t *testing.T) {
	eachFamily(t, func(t *testing.T, f family) {
		g, ep := fragmentGate(t, f)
		b := g.bind(f.peer, idClient)
		id := uint32(0)
		next := func(dport uint16) [][]byte {
			id++
			return fragments(f.peer, f.pod, protoUDP, id, datagram(40000, dport, 150), 32)
		}
		in := func(p []byte) result { return g.to(g.pod, g.uplink, p) }

		p := next(80)
		g.drop(in(p[1]), abi.ReasonUnsupported) // before its first
		g.pass(in(p[0]))
		for _, i := range []int{3, 1, 2} {
			if r := in(p[i]); r.verdict != pass || len(r.events) != 0 {
				t.Errorf("fragment %d: %v (%v), %d events", i, r.verdict, r.reason, len(r.events))
			}
		}
		g.pass(in(p[4]))
		g.drop(in(p[1]), abi.ReasonUnsupported) // the datagram is complete
		if len(g.flows()) != 1 {
			t.Errorf("%d flows", len(g.flows()))
		}

		// Denied: nothing is remembered.
		p = next(81)
		g.drop(in(p[0]), abi.ReasonPolicyDenied)
		g.drop(in(p[1]), abi.ReasonUnsupported)

		// Another datagram: other id, source, destination, protocol.
		p = next(80)
		g.pass(in(p[0]))
		g.drop(in(next(80)[1]), abi.ReasonUnsupported)
		g.drop(in(fragments(f.peer2, f.pod, protoUDP, id-1, datagram(1, 80, 150), 32)[1]), abi.ReasonUnsupported)
		if !f.is6 { // IPv6 puts them together whatever they say
			g.drop(in(fragment(f.peer, f.pod, protoTCP, id-1, 32, true, make([]byte, 32))), abi.ReasonUnsupported)
		}
		// Another endpoint's, and the other direction.
		g.endpoint(g.pod2, f, f.pod2, 0)
		g.drop(g.to(g.pod2, g.uplink, fragments(f.peer, f.pod2, protoUDP, id-1, datagram(1, 80, 150), 32)[1]), abi.ReasonUnsupported)
		g.drop(g.from(g.pod, fragment(f.pod, f.peer, protoUDP, id-1, 32, true, make([]byte, 32))), abi.ReasonUnsupported)
		// Another way in.
		g.drop(g.to(g.pod, g.uplink2, p[1]), abi.ReasonSpoofed)
		g.drop(g.to(g.pod, 0, p[1]), abi.ReasonSpoofed)
		g.pass(in(p[1]))

		// Every ground must stand at each of them (I4).
		g.lease(session, -time.Second)
		g.drop(in(p[2]), abi.ReasonStaleLease)
		g.lease(session, time.Hour)
		g.pass(in(p[2]))
		g.revoke(b)
		g.drop(in(p[3]), abi.ReasonGenerationChanged)
		g.bind(f.peer, idClient)
		g.drop(in(p[3]), abi.ReasonGenerationChanged)
		p = next(80)
		g.pass(in(p[0]))
		ep.Policy += 1000
		g.put("endpoints", g.pod, ep)
		g.drop(in(p[1]), abi.ReasonNoEndpoint)
	})
}

// TestFragmentsEgress: what the workload sends, and its replies.
func TestFragmentsEgress(t *testing.T) {
	eachFamily(t, func(t *testing.T, f family) {
		g, _ := callOut(t, f)
		p := fragments(f.pod, f.peer, protoUDP, 7, datagram(40000, 80, 100), 40)
		g.bind(f.peer, idClient)
		for _, x := range p {
			g.pass(g.from(g.pod, x))
		}
		g.drop(g.from(g.pod, fragments(f.pod2, f.peer, protoUDP, 8, datagram(40000, 80, 100), 40)[1]), abi.ReasonSpoofed)
		for _, x := range fragments(f.peer, f.pod, protoUDP, 9, datagram(80, 40000, 100), 40) {
			g.pass(g.to(g.pod, g.uplink, x))
		}
		// Echo, and a protocol without ports.
		g, _ = fragmentGate(t, f)
		g.endpoint(g.pod, f, f.pod, 0)
		for _, x := range fragments(f.pod, f.peer, f.icmp, 10, append([]byte{f.echo, 0, 0, 0, 0, 1, 0, 1}, make([]byte, 90)...), 40) {
			g.pass(g.from(g.pod, x))
		}
		for _, x := range fragments(f.peer, f.pod, f.icmp, 11, append([]byte{f.answer, 0, 0, 0, 0, 2, 0, 1}, make([]byte, 90)...), 40) {
			g.pass(g.to(g.pod, g.uplink, x)) // answers nothing, yet ingress is free
		}
		for _, x := range fragments(f.pod, f.peer, 47, 12, make([]byte, 90), 40) {
			g.pass(g.from(g.pod, x))
		}
		// Never fragmented: errors and neighbour discovery.
		g.drop(g.from(g.pod, fragments(f.pod, f.peer, f.icmp, 13, append([]byte{3}, make([]byte, 90)...), 40)[0]), abi.ReasonUnsupported)
		if f.is6 {
			g.drop(g.from(g.pod, hops(fragments(f.pod, f.peer, f.icmp, 14, append([]byte{136}, make([]byte, 90)...), 40)[0], 255, 14+6, 44)), abi.ReasonUnsupported)
		}
	})
}

// TestBadFragments: those with which ports are hidden or written over.
func TestBadFragments(t *testing.T) {
	eachFamily(t, func(t *testing.T, f family) {
		g, _ := fragmentGate(t, f)
		g.bind(f.peer, idClient)
		in := func(p []byte) result { return g.to(g.pod, g.uplink, p) }
		seg := append(tcpHeader(40000, 80, syn), make([]byte, 100)...)
		g.drop(in(fragment(f.peer, f.pod, protoTCP, 1, 0, true, seg[:8])), abi.ReasonMalformed)
		g.drop(in(fragment(f.peer, f.pod, protoTCP, 1, 0, true, seg[:16])), abi.ReasonMalformed)
		g.pass(in(fragment(f.peer, f.pod, protoTCP, 1, 0, true, seg[:24])))
		for _, at := range []int{8, 16} {
			g.drop(in(fragment(f.peer, f.pod, protoTCP, 1, at, true, seg[:24])), abi.ReasonMalformed)
		}
		g.pass(in(fragment(f.peer, f.pod, protoTCP, 1, 24, true, seg[24:48])))
		g.drop(in(fragment(f.peer, f.pod, protoTCP, 1, 48, true, seg[48:55])), abi.ReasonMalformed)
		g.drop(in(fragment(f.peer, f.pod, protoTCP, 1, 65528, false, seg[:16])), abi.ReasonMalformed)
		g.drop(in(fragment(f.peer, f.pod, protoTCP, 1, 48, false, nil)), abi.ReasonMalformed)
		if f.is6 {
			// Ports behind more headers, in the second fragment.
			dest := []byte{protoTCP, 0, 1, 4, 0, 0, 0, 0}
			g.drop(in(fragment(f.peer, f.pod, 60, 2, 0, true, dest)), abi.ReasonMalformed)
			g.pass(in(fragment(f.peer, f.pod, 60, 2, 0, true, append(dest, seg[:24]...))))
			// A fragment within a fragment.
			g.drop(in(fragment(f.peer, f.pod, 44, 3, 0, true, append([]byte{protoTCP, 0, 0, 1, 0, 0, 0, 4}, seg[:24]...))), abi.ReasonMalformed)
		}
	})
}

// TestFragmentsHeld: they wait behind their first, and come back after it.
func TestFragmentsHeld(t *testing.T) {
	eachFamily(t, func(t *testing.T, f family) {
		g, _ := fragmentGate(t, f)
		p := fragments(f.peer, f.pod, protoUDP, 1, datagram(40000, 80, 100), 40)
		for i, x := range p {
			r := g.to(g.pod, g.uplink, x)
			g.want(r, held, abi.ReasonUnbound)
			if h := r.held[0]; !bytes.Equal(h.packet, x) || h.Peer != addr(f.peer) || h.Proto != protoUDP {
				t.Errorf("fragment %d held as %+v", i, h.Held)
			}
		}
		g.drop(g.to(g.pod, g.uplink2, p[1]), abi.ReasonSpoofed)
		g.bind(f.peer, idClient)
		g.drop(g.reinject(g.pod, p[1]), abi.ReasonUnbound) // before its first: not twice
		g.pass(g.reinject(g.pod, p[0]))
		g.pass(g.reinject(g.pod, p[1]))
		g.pass(g.to(g.pod, g.uplink, p[2])) // came after the answer
		g.drop(g.to(g.pod, g.uplink, p[1]), abi.ReasonUnsupported)

		// The device by which the first came is remembered through the hold.
		g, _ = fragmentGate(t, f)
		g.want(g.to(g.pod, g.uplink, p[0]), held, abi.ReasonUnbound)
		g.bind(f.peer, idClient)
		g.pass(g.reinject(g.pod, p[0]))
		g.drop(g.to(g.pod, g.uplink2, p[1]), abi.ReasonSpoofed)
		g.pass(g.to(g.pod, g.uplink, p[1]))

		// The first comes back and is dropped: so are the others.
		g, _ = fragmentGate(t, f)
		g.want(g.to(g.pod, g.uplink, p[0]), held, abi.ReasonUnbound)
		g.want(g.to(g.pod, g.uplink, p[1]), held, abi.ReasonUnbound)
		g.bind(f.peer, idOther)
		g.drop(g.reinject(g.pod, p[0]), abi.ReasonPolicyDenied)
		g.drop(g.reinject(g.pod, p[1]), abi.ReasonPolicyDenied)
		g.drop(g.to(g.pod, g.uplink, p[2]), abi.ReasonPolicyDenied)

		// At from_workload too.
		g, _ = callOut(t, f)
		p = fragments(f.pod, f.peer, protoUDP, 1, datagram(40000, 80, 100), 40)
		for _, x := range p {
			g.want(g.from(g.pod, x), held, abi.ReasonUnbound)
		}
		g.bind(f.peer, idClient)
		for _, x := range p {
			g.pass(g.turned(g.pod, x))
		}
	})
}

// TestFragmentFlood: an endpoint's table is bounded, its own, and empties itself.
func TestFragmentFlood(t *testing.T) {
	for _, each := range []uint32{uint32(abi.FragmentWays), 192} {
		t.Run(fmt.Sprint(each), func(t *testing.T) { fragmentFlood(t, each) })
	}
	// The C side's own guard: a number that is none leaves nobody room.
	f := families[0]
	g, _ := wantPeer(t, f, constant("fragments_per_endpoint", uint32(0)))
	g.bind(f.peer, idClient)
	g.drop(g.to(g.pod, g.uplink, fragments(f.peer, f.pod, protoUDP, 1, datagram(40000, 80, 100), 40)[0]), abi.ReasonMapFull)
}

func fragmentFlood(t *testing.T, each uint32) {
	f := families[0]
	const lifetime = 300 * time.Millisecond
	g, _ := wantPeer(t, f, mapSize("fragments", 8*each), constant("fragments_per_endpoint", each), constant("fragment_lifetime", uint64(lifetime)))
	other := g.endpoint(g.pod2, f, f.pod2, 0)
	g.bind(f.peer, idClient)
	first := func(id uint32) []byte {
		return fragments(f.peer, f.pod, protoUDP, id, datagram(40000, 80, 100), 40)[0]
	}
	passed, full, begin := 0, 0, time.Now()
	for id := range 2 * each {
		switch r := g.to(g.pod, g.uplink, first(id)); {
		case r.verdict == pass:
			passed++
		case r.reason == abi.ReasonMapFull:
			full++
		default:
			t.Errorf("%v (%v)", r.verdict, r.reason)
		}
	}
	// On a slow machine the table empties itself meanwhile.
	rounds := 1 + int(time.Since(begin)/lifetime)
	if passed == 0 || passed > rounds*int(each) || full == 0 && rounds == 1 {
		t.Errorf("%d passed, %d found no room", passed, full)
	}
	for _, x := range fragments(f.peer, f.pod2, protoUDP, 1, datagram(40000, 80, 100), 40) {
		g.pass(g.to(g.pod2, g.uplink, x))
	}
	for end := time.Now().Add(10 * time.Second); ; {
		if r := g.to(g.pod, g.uplink, first(1000)); r.verdict == pass {
			break
		}
		if time.Now().After(end) {
			t.Fatal("the table stays full")
		}
	}
	// Without an index of its own, or with one beyond the table, it has none.
	for _, index := range []uint32{0, 8, 1 << 30} {
		other.HoldIndex = index
		g.put("endpoints", g.pod2, other)
		p := fragments(f.peer, f.pod2, protoUDP, 2, datagram(40000, 80, 100), 40)
		g.drop(g.to(g.pod2, g.uplink, p[0]), abi.ReasonMapFull)
		g.drop(g.to(g.pod2, g.uplink, p[1]), abi.ReasonUnsupported)
	}
}
