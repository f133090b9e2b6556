package tests

import (
	"encoding/binary"
	"testing"

	"portcullis/bpf/abi"
)

const (
	sctpData             = 0
	sctpInit             = 1
	sctpInitAck          = 2
	sctpAbort            = 6
	sctpShutdown         = 7
	sctpShutdownComplete = 14
)

func sctpHeader(sport, dport uint16, chunk uint8) []byte {
	b := binary.BigEndian.AppendUint16(nil, sport)
	b = binary.BigEndian.AppendUint16(b, dport)
	return append(b, 0, 0, 0, 0, 0, 0, 0, 0, chunk, 0, 0, 4)
}

// TestSCTP: by its ports, as TCP and UDP; an INIT opens a flow, and is never a
// reply.
func TestSCTP(t *testing.T) {
	eachFamily(t, func(t *testing.T, f family) {
		g := newGate(t)
		ep := g.endpoint(g.pod, f, f.pod, enforceIn)
		g.known(f)
		g.policy(ep.Policy,
			rule{identity: idAny, dir: ingress, proto: protoSCTP, port: 80, flags: peerAllow},
			rule{identity: idClient, dir: ingress, proto: protoSCTP, port: 80, flags: allow})
		call := func(port uint16, chunk uint8) []byte {
			return frame(f.peer, f.pod, protoSCTP, sctpHeader(40000, port, chunk))
		}
		back := func(chunk uint8) []byte { return frame(f.pod, f.peer, protoSCTP, sctpHeader(80, 40000, chunk)) }
		g.drop(g.to(g.pod, g.uplink, call(81, sctpInit)), abi.ReasonPolicyDenied)
		r := g.to(g.pod, g.uplink, call(80, sctpInit))
		g.want(r, held, abi.ReasonUnbound)
		if h := r.held[0]; h.Sport != 40000 || h.Dport != 80 || h.Proto != protoSCTP {
			t.Errorf("held %+v", h.Held)
		}
		g.bind(f.peer, idClient)
		g.pass(g.to(g.pod, g.uplink, call(80, sctpInit)))
		r = g.from(g.pod, back(sctpInitAck))
		g.pass(r)
		if e := r.events[0]; abi.FlowState(e.State) != abi.FlowReply || e.Sport != 80 {
			t.Errorf("event %+v", e)
		}
		k, v := g.oneFlow()
		if k.Proto != protoSCTP || v.Flags&uint32(abi.CTSeenReply) == 0 {
			t.Errorf("entry %+v %+v", k, v)
		}
		// The server's own INIT is a call of its own, and egress is free.
		r = g.from(g.pod, back(sctpInit))
		g.pass(r)
		if _, v = g.oneFlow(); abi.FlowState(r.events[0].State) != abi.FlowNew || v.Judgement[egress].Endpoint != ep.ID {
			t.Errorf("event %+v entry %+v", r.events[0], v)
		}
		// How it ends.
		flags := func(p []byte, in bool, want abi.CTFlag) {
			t.Helper()
			if in {
				g.pass(g.to(g.pod, g.uplink, p))
			} else {
				g.pass(g.from(g.pod, p))
			}
			const ends = abi.CTFinForward | abi.CTFinReply | abi.CTRst
			if _, v := g.oneFlow(); abi.CTFlag(v.Flags)&ends != want {
				t.Errorf("flags %#x, want %#x", v.Flags, want)
			}
		}
		flags(call(80, sctpInit), true, 0)
		flags(call(80, sctpData), true, 0)
		flags(call(80, sctpShutdown), true, abi.CTFinForward)
		flags(back(sctpShutdown), false, abi.CTFinForward|abi.CTFinReply)
		flags(call(80, sctpShutdownComplete), true, abi.CTFinForward|abi.CTFinReply|abi.CTRst)
		flags(call(80, sctpInit), true, 0)
		flags(back(sctpAbort), false, abi.CTRst)
	})
}

// TestOtherProtocols: by their number, with port 0; an entry for the protocol,
// or for all, speaks of them. The answer belongs to the flow.
func TestOtherProtocols(t *testing.T) {
	const gre, esp, ah = 47, 50, 51
	eachFamily(t, func(t *testing.T, f family) {
		for _, proto := range []uint8{gre, esp, ah, 4, 200} {
			for _, prefix := range []abi.PolicyPrefix{abi.PolicyPrefixAny, abi.PolicyPrefixProto, abi.PolicyPrefixPort} {
				g := newGate(t)
				ep := g.endpoint(g.pod, f, f.pod, enforceIn|enforceOut)
				g.known(f)
				key := rule{dir: ingress, proto: proto, prefix: prefix}
				if prefix == abi.PolicyPrefixAny {
					key.proto = 0
				}
				p, back := frame(f.peer, f.pod, proto, []byte{1, 2, 3, 4}), frame(f.pod, f.peer, proto, []byte{4, 3, 2, 1})
				g.drop(g.to(g.pod, g.uplink, p), abi.ReasonPolicyDenied)
				any, client := key, key
				any.identity, any.flags = idAny, peerAllow
				client.identity, client.flags = idClient, allow
				g.policy(ep.Policy, any, client)
				g.want(g.to(g.pod, g.uplink, p), held, abi.ReasonUnbound)
				b := g.bind(f.peer, idClient)
				g.drop(g.from(g.pod, back), abi.ReasonPolicyDenied) // nobody has called
				r := g.to(g.pod, g.uplink, p)
				g.pass(r)
				if e := r.events[0]; e.Proto != proto || e.Sport != 0 || e.Dport != 0 {
					t.Errorf("event %+v", e)
				}
				g.pass(g.from(g.pod, back))
				g.drop(g.from(g.pod, frame(f.pod, f.peer, proto+1, []byte{4, 3, 2, 1})), abi.ReasonPolicyDenied)
				g.revoke(b)
				g.drop(g.from(g.pod, back), abi.ReasonGenerationChanged)
			}
		}
	})
}

// TestOptionsAndChains: what stands between the addresses and the ports does
// not change by which ports a packet is judged.
func TestOptionsAndChains(t *testing.T) {
	v4, v6 := families[0], families[1]
	alert := []byte{148, 4, 0, 0}
	long := []byte{68, 36, 37, 0} // time stamps
	long = append(long, make([]byte, 36-len(long))...)
	for _, tt := range []struct {
		name   string
		f      family
		packet func(port uint16) []byte
	}{
		{"router alert", v4, func(port uint16) []byte { return ip4Options(tcp(v4.peer, 1, v4.pod, port, syn), alert...) }},
		{"the longest header", v4, func(port uint16) []byte {
			return ip4Options(tcp(v4.peer, 1, v4.pod, port, syn), append(alert, long...)...)
		}},
		{"nothing but padding", v4, func(port uint16) []byte {
			o := make([]byte, 40)
			for i := range o {
				o[i] = 1
			}
			return ip4Options(udp(v4.peer, 1, v4.pod, port), o...)
		}},
		{"behind the end of the list anything", v4, func(port uint16) []byte {
			return ip4Options(udp(v4.peer, 1, v4.pod, port), 0, 131, 0, 0)
		}},
		{"hop-by-hop options", v6, func(port uint16) []byte { return chain(v6.peer, v6.pod, tcpHeader(1, port, syn), protoTCP, 0) }},
		{"all of them", v6, func(port uint16) []byte {
			return chain(v6.peer, v6.pod, udpHeader(1, port), protoUDP, 0, 60, 43, 60)
		}},
		{"as many as are allowed", v6, func(port uint16) []byte {
			return chain(v6.peer, v6.pod, tcpHeader(1, port, syn), protoTCP, 0, 60, 60, 60, 60, 60)
		}},
		{"a fragment that is whole", v6, func(port uint16) []byte {
			return frame(v6.peer, v6.pod, 44, append([]byte{protoUDP, 0, 0, 0, 0, 0, 0, 9}, udpHeader(1, port)...))
		}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			g, _ := wantPeer(t, tt.f)
			g.bind(tt.f.peer, idClient)
			r := g.to(g.pod, g.uplink, tt.packet(80))
			g.pass(r)
			if e := r.events[0]; e.Sport != 1 || e.Dport != 80 {
				t.Errorf("event %+v", e)
			}
			g.drop(g.to(g.pod, g.uplink, tt.packet(81)), abi.ReasonPolicyDenied)
		})
	}
	// BIG TCP: longer than the header can say, which only a GSO packet may be.
	g, _ := wantPeer(t, v6)
	g.bind(v6.peer, idClient)
	big := frame(v6.peer, v6.pod, 0, append([]byte{6, 0, 0xc2, 4, 0, 1, 0, 0}, tcpHeader(1, 80, syn)...))
	big[14+4], big[14+5] = 0, 0
	g.pass(g.run("to_workload", big, skBuff{Ifindex: g.pod, IngressIfindex: g.uplink, GSOSize: 1400, GSOSegs: 2}))
	g.drop(g.to(g.pod, g.uplink, big), abi.ReasonMalformed)
}

// TestErrorsBehindOptions: an ICMP error is found where it is, and so is what
// it quotes.
func TestErrorsBehindOptions(t *testing.T) {
	v4, v6 := families[0], families[1]
	g, _ := wantPeer(t, v4)
	g.bind(v4.peer, idClient)
	g.pass(g.to(g.pod, g.uplink, udp(v4.peer, 40000, v4.pod, 80)))
	back := ip4Options(udp(v4.pod, 80, v4.peer, 40000), 148, 4, 0, 0)
	g.pass(g.to(g.pod, g.uplink, ip4Options(icmpError(v4, v4.world, v4.pod, 3, back[14:]), 148, 4, 0, 0)))
	other := ip4Options(udp(v4.pod, 81, v4.peer, 40000), 148, 4, 0, 0)
	g.drop(g.to(g.pod, g.uplink, ip4Options(icmpError(v4, v4.world, v4.pod, 3, other[14:]), 148, 4, 0, 0)), abi.ReasonUnsupported)

	g, _ = wantPeer(t, v6)
	g.bind(v6.peer, idClient)
	g.pass(g.to(g.pod, g.uplink, udp(v6.peer, 40000, v6.pod, 80)))
	quote := func(port uint16) []byte {
		inner := chain(v6.pod, v6.peer, udpHeader(port, 40000), protoUDP, 0, 60)[14:]
		return chain(v6.world, v6.pod, append([]byte{2, 0, 0, 0, 0, 0, 5, 0}, inner...), protoICMP6, 60)
	}
	g.pass(g.to(g.pod, g.uplink, quote(80)))
	g.drop(g.to(g.pod, g.uplink, quote(81)), abi.ReasonUnsupported)
}

// TestGroups: IGMP and MLD reports leave under the workload's own address,
// whatever policy says; it does not ask, as routers do.
func TestGroups(t *testing.T) {
	v4, v6 := families[0], families[1]
	group4, group6 := ip("224.0.0.251"), ip("ff02::fb")
	igmp := func(kind byte, src string) []byte {
		return ip4Options(hops(frame(ip(src), group4, 2, make([]byte, 8)), 1, 34, kind), 148, 4, 0, 0)
	}
	mld := func(kind byte, src string) []byte {
		return hops(chain(ip(src), group6, make([]byte, 24), protoICMP6, 0), 1, 14+40+8, kind)
	}
	for _, tt := range []struct {
		name   string
		f      family
		packet []byte
		reason abi.Reason
	}{
		{"IGMPv2 report", v4, igmp(0x16, "10.0.1.5"), 0},
		{"IGMPv3 report", v4, igmp(0x22, "10.0.1.5"), 0},
		{"IGMP leave without address", v4, igmp(0x17, "0.0.0.0"), 0},
		{"IGMP report of another", v4, igmp(0x16, "10.0.1.6"), abi.ReasonSpoofed},
		{"IGMP query", v4, igmp(0x11, "10.0.1.5"), abi.ReasonSpoofed},
		{"IGMP report to one", v4, hops(frame(v4.pod, v4.peer, 2, make([]byte, 8)), 1, 34, 0x16), abi.ReasonUnsupported},
		{"MLD report", v6, mld(131, "fd00:1::5"), 0},
		{"MLDv2 report", v6, mld(143, "fe80::aa:ff:fe00:1"), 0},
		{"MLD report without address", v6, mld(143, "::"), 0},
		{"MLD done", v6, mld(132, "fd00:1::5"), 0},
		{"MLD report of another", v6, mld(143, "fd00:1::6"), abi.ReasonSpoofed},
		{"MLD query", v6, mld(130, "fd00:1::5"), abi.ReasonSpoofed},
	} {
		t.Run(tt.name, func(t *testing.T) {
			g := newGate(t)
			ep := g.endpoint(g.pod, tt.f, tt.f.pod, enforceIn|enforceOut)
			v := drop
			if tt.reason == 0 {
				v = pass
			}
			g.want(g.from(g.pod, tt.packet), v, tt.reason)
			if len(g.flows()) != 0 {
				t.Error("in conntrack")
			}
			if tt.reason != abi.ReasonUnsupported {
				g.pass(g.to(g.pod, 0, tt.packet)) // queries come in this way
			} else {
				g.drop(g.to(g.pod, 0, tt.packet), abi.ReasonUnsupported)
			}
			ep.State = uint32(abi.EPQuarantined)
			g.put("endpoints", g.pod, ep)
			g.drop(g.from(g.pod, tt.packet), abi.ReasonQuarantined)
		})
	}
}
