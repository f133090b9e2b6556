package tests

import (
	"net/netip"
	"testing"
	"time"

	"portcullis/bpf/abi"
)

const (
	egress  = abi.DirEgress
	ingress = abi.DirIngress

	allow     = abi.PolicyAllow
	deny      = abi.PolicyDeny
	peerAllow = abi.PolicyPeerAllow
	peerDeny  = abi.PolicyPeerDeny

	enforceIn  = abi.EPEnforceIngress
	enforceOut = abi.EPEnforceEgress

	idAny    = abi.IDAny
	idClient = abi.Identity(1001)
	idOther  = abi.Identity(1002)
	idCIDR   = abi.Identity(5000)

	drop = abi.VerdictDrop
	pass = abi.VerdictPass
	held = abi.VerdictHold
)

// known makes the peers' range known, with an owner who can be asked.
func (g *gate) known(f family) { g.ipRange(f.remote, abi.RangeKnown|abi.RangeHoldable, 0) }

// eachFamily runs a test over IPv4 and IPv6.
func eachFamily(t *testing.T, test func(t *testing.T, f family)) {
	for _, f := range families {
		t.Run(f.name, func(t *testing.T) { test(t, f) })
	}
}

// TestPolicy: the two lookups of abi.h, for a peer with a live lease who calls
// TCP port 80 of an enforced endpoint.
func TestPolicy(t *testing.T) {
	set := func(r ...rule) []rule {
		for i := range r {
			if r[i].rule == 0 {
				r[i].rule = uint32(100 + i)
			}
			r[i].dir = ingress
			if r[i].prefix == 0 && r[i].proto == 0 {
				r[i].proto, r[i].port = protoTCP, 80
			}
		}
		return r
	}
	tests := []struct {
		name       string
		rules      []rule
		verdict    abi.Verdict
		reason     abi.Reason
		rule       uint32
		noEvidence bool
	}{
		{"no entry", nil, drop, abi.ReasonPolicyDenied, 0, true},
		{"everyone", set(rule{identity: idAny, flags: allow}), pass, 0, 100, true},
		{"no one", set(rule{identity: idAny, flags: deny}), drop, abi.ReasonPolicyDenied, 100, true},
		{"deny beats allow for everyone", set(rule{identity: idAny, flags: deny | allow | peerAllow}, rule{identity: idClient, flags: allow}),
			drop, abi.ReasonPolicyDenied, 100, true},
		{"some, and the peer is one", set(rule{identity: idAny, flags: peerAllow}, rule{identity: idClient, flags: allow}), pass, 0, 101, false},
		{"some, and the peer is none", set(rule{identity: idAny, flags: peerAllow}, rule{identity: idOther, flags: allow}),
			drop, abi.ReasonPolicyDenied, 100, false},
		{"an entry for the peer alone does not count", set(rule{identity: idClient, flags: allow}), drop, abi.ReasonPolicyDenied, 0, true},
		{"everyone but some, and the peer is one of them", set(rule{identity: idAny, flags: allow | peerDeny}, rule{identity: idClient, flags: deny}),
			drop, abi.ReasonPolicyDenied, 101, false},
		{"everyone but some, and the peer is none of them", set(rule{identity: idAny, flags: allow | peerDeny}, rule{identity: idOther, flags: deny}),
			pass, 0, 100, false},
		{"deny beats allow for the peer", set(rule{identity: idAny, flags: peerAllow | peerDeny}, rule{identity: idClient, flags: allow | deny}),
			drop, abi.ReasonPolicyDenied, 101, false},
		{"another port", set(rule{identity: idAny, flags: allow, proto: protoTCP, port: 81}), drop, abi.ReasonPolicyDenied, 0, true},
		{"another protocol", set(rule{identity: idAny, flags: allow, proto: protoUDP, port: 80}), drop, abi.ReasonPolicyDenied, 0, true},
		{"all ports of the protocol", set(rule{identity: idAny, flags: allow, proto: protoTCP, prefix: abi.PolicyPrefixProto}), pass, 0, 100, true},
		{"all ports of another", set(rule{identity: idAny, flags: allow, proto: protoUDP, prefix: abi.PolicyPrefixProto}), drop, abi.ReasonPolicyDenied, 0, true},
		{"all protocols", set(rule{identity: idAny, flags: allow, prefix: abi.PolicyPrefixAny}), pass, 0, 100, true},
		{"a port range with it", set(rule{identity: idAny, flags: allow, proto: protoTCP, port: 64, prefix: abi.PolicyPrefixProto + 11}), pass, 0, 100, true},
		{"a port range without it", set(rule{identity: idAny, flags: allow, proto: protoTCP, port: 96, prefix: abi.PolicyPrefixProto + 11}), drop, abi.ReasonPolicyDenied, 0, true},
		{"the longer prefix decides", set(rule{identity: idAny, flags: allow, prefix: abi.PolicyPrefixAny},
			rule{identity: idAny, flags: deny, proto: protoTCP, port: 80}), drop, abi.ReasonPolicyDenied, 101, true},
		{"evidence by number that the binding has", set(rule{identity: idAny, flags: peerAllow}, rule{identity: idClient, flags: allow, evidence: abi.EvidenceLease}),
			pass, 0, 101, false},
		{"evidence by number that it has not", set(rule{identity: idAny, flags: peerAllow}, rule{identity: idClient, flags: allow, evidence: abi.EvidenceSvid}),
			drop, abi.ReasonEvidenceTooWeak, 101, false},
		{"everyone, who has evidence", set(rule{identity: idAny, flags: allow, evidence: abi.EvidenceSvid}), drop, abi.ReasonEvidenceTooWeak, 100, false},
		{"the peer's own entry decides on evidence", set(rule{identity: idAny, flags: allow, evidence: abi.EvidenceSvid},
			rule{identity: idClient, flags: allow, evidence: abi.EvidenceWatch}), pass, 0, 101, false},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			eachFamily(t, func(t *testing.T, f family) {
				g := newGate(t)
				g.known(f)
				ep := g.endpoint(g.pod, f, f.pod, enforceIn)
				peer := g.bind(f.peer, idClient)
				g.policy(ep.Policy, tt.rules...)
				// Another set's entries are not this endpoint's.
				g.policy(ep.Policy+1000, rule{identity: idAny, dir: ingress, flags: allow, prefix: abi.PolicyPrefixAny},
					rule{identity: idAny, dir: egress, flags: allow, prefix: abi.PolicyPrefixAny})

				r := g.to(g.pod, g.uplink, tcp(f.peer, 40000, f.pod, 80, syn))
				g.want(r, tt.verdict, tt.reason)
				if len(r.events) != 1 {
					t.Fatalf("%d events, want 1", len(r.events))
				}
				e := r.events[0]
				if e.Rule != tt.rule {
					t.Errorf("rule %d decided, want %d", e.Rule, tt.rule)
				}
				if no := e.Flags&uint8(abi.EventNoEvidence) != 0; no != tt.noEvidence {
					t.Errorf("no-evidence is %v, want %v", no, tt.noEvidence)
				}
				want := abi.Event{
					Time: e.Time, Stamp: peer.stamp, Generation: 42, Installed: peer.Installed,
					Src: addr(f.peer), Dst: addr(f.pod), SrcIdentity: uint32(idClient), DstIdentity: ep.Identity,
					Ifindex: g.pod, Endpoint: ep.ID, Len: e.Len, Rule: tt.rule, Sport: 40000, Dport: 80, Proto: protoTCP,
					Direction: uint8(ingress), Verdict: uint8(tt.verdict), Reason: uint8(tt.reason),
					Evidence: uint8(abi.EvidenceLease), State: uint8(abi.FlowNew), TcpFlags: syn, Flags: e.Flags,
				}
				if e != want {
					t.Errorf("event\n got %+v\nwant %+v", e, want)
				}
				if now := boottime(); e.Time > now || now-e.Time > uint64(time.Minute) {
					t.Errorf("event of %d at %d", e.Time, now)
				}
				if n := len(g.flows()); (n == 1) != (tt.verdict == pass) {
					t.Errorf("%d conntrack entries after %v", n, tt.verdict)
				}
			})
		})
	}
}

// TestPolicyProtocols: which port policy is asked for.
func TestPolicyProtocols(t *testing.T) {
	eachFamily(t, func(t *testing.T, f family) {
		tests := []struct {
			name   string
			proto  uint8
			port   uint16
			packet []byte
		}{
			{"tcp", protoTCP, 80, tcp(f.peer, 9, f.pod, 80, syn)},
			{"tcp in the middle of a stream", protoTCP, 80, tcp(f.peer, 9, f.pod, 80, ack)},
			{"udp", protoUDP, 53, udp(f.peer, 9, f.pod, 53)},
			{"echo", f.icmp, uint16(f.echo) << 8, icmpEcho(f, f.peer, f.pod, f.echo, 77)},
			{"echo reply that answers nothing", f.icmp, uint16(f.answer) << 8, icmpEcho(f, f.peer, f.pod, f.answer, 77)},
		}
		for _, tt := range tests {
			t.Run(tt.name, func(t *testing.T) {
				g := newGate(t)
				ep := g.endpoint(g.pod, f, f.pod, enforceIn)
				g.drop(g.to(g.pod, g.uplink, tt.packet), abi.ReasonPolicyDenied)
				g.policy(ep.Policy, rule{identity: idAny, dir: egress, proto: tt.proto, port: tt.port, flags: allow})
				g.drop(g.to(g.pod, g.uplink, tt.packet), abi.ReasonPolicyDenied)
				g.policy(ep.Policy, rule{identity: idAny, dir: ingress, proto: tt.proto, port: tt.port, flags: allow})
				g.pass(g.to(g.pod, g.uplink, tt.packet))
			})
		}
	})
}

// TestEgressPolicy: the same function judges what the workload sends.
func TestEgressPolicy(t *testing.T) {
	eachFamily(t, func(t *testing.T, f family) {
		g := newGate(t)
		g.known(f)
		ep := g.endpoint(g.pod, f, f.pod, enforceOut)
		g.policy(ep.Policy,
			rule{identity: idAny, dir: egress, proto: protoTCP, port: 80, flags: peerAllow},
			rule{identity: idClient, dir: egress, proto: protoTCP, port: 80, flags: allow, rule: 5},
			rule{identity: abi.IDWorld, dir: egress, proto: protoTCP, port: 80, flags: allow, rule: 6})
		send := func(to netip.Addr, port uint16) result { return g.from(g.pod, tcp(f.pod, 40000, to, port, syn)) }

		g.drop(send(f.peer, 81), abi.ReasonPolicyDenied)
		g.want(send(f.peer, 80), held, abi.ReasonUnbound)
		b := g.bind(f.peer, idOther)
		g.drop(send(f.peer, 80), abi.ReasonPolicyDenied)
		g.revoke(b)
		g.want(send(f.peer, 80), held, abi.ReasonUnbound)
		g.bind(f.peer, idClient)
		g.lease(session, -time.Second)
		g.want(send(f.peer, 80), held, abi.ReasonStaleLease)
		g.lease(session, time.Hour)
		r := send(f.peer, 80)
		g.pass(r)
		if e := r.events[0]; e.Rule != 5 || e.DstIdentity != uint32(idClient) || e.SrcIdentity != ep.Identity {
			t.Errorf("event %+v", e)
		}
		g.pass(send(f.world, 80)) // outside the known ranges
		g.ipRange(f.remote, abi.RangeKnown, 0)
		g.drop(send(f.peer2, 80), abi.ReasonUnbound) // nobody to ask
		g.known(f)

		// The reply comes in by an uplink, and only there.
		reply := tcp(f.peer, 80, f.pod, 40000, syn|ack)
		g.drop(g.to(g.pod, g.stranger, reply), abi.ReasonSpoofed)
		g.drop(g.to(g.pod, 0, reply), abi.ReasonSpoofed)
		r = g.to(g.pod, g.uplink, reply)
		g.pass(r)
		if len(r.events) != 1 || abi.FlowState(r.events[0].State) != abi.FlowReply || r.events[0].SrcIdentity != uint32(idClient) {
			t.Errorf("events of the first reply: %+v", r.events)
		}
		if r = g.to(g.pod, g.uplink, reply); len(r.events) != 0 {
			t.Errorf("the second reply has %d events", len(r.events))
		}
		g.pass(r)
		g.drop(g.to(g.pod, g.stranger, reply), abi.ReasonSpoofed)
		g.drop(g.to(g.pod, 0, reply), abi.ReasonSpoofed)
	})
}
