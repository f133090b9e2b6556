package tests

import (
	"testing"

	"portcullis/bpf/abi"
)

// TestAdmitHost: what the endpoint's own node sends passes whatever policy does
// not allow, bound to the node's address; nobody else gets in by that, and
// nobody waits for it.
func TestAdmitHost(t *testing.T) {
	const admit = enforceIn | abi.EPAdmitHost
	denyHost := rule{identity: abi.IDHost, dir: ingress, proto: protoTCP, port: 81, flags: deny}
	anyHas := func(flags abi.PolicyFlag) rule {
		return rule{identity: idAny, dir: ingress, proto: protoTCP, port: 81, flags: flags}
	}
	eachFamily(t, func(t *testing.T, f family) {
		call, back := tcp(f.node, 40000, f.pod, 81, syn), tcp(f.pod, 81, f.node, 40000, ack)
		start := func(t *testing.T, flags abi.EndpointFlag, rules ...rule) (*gate, abi.Endpoint) {
			g := newGate(t)
			ep := g.endpoint(g.pod, f, f.pod, flags)
			g.policy(ep.Policy, rules...)
			g.known(f)
			g.bind(f.node, abi.IDHost, local(0))
			return g, ep
		}
		for _, c := range []struct {
			name    string
			flags   abi.EndpointFlag
			rules   []rule
			verdict abi.Verdict
		}{
			{"nothing is allowed", admit, nil, pass},
			{"some peers are allowed", admit, []rule{anyHas(peerAllow)}, pass},
			{"more evidence is asked for than a node has", admit, []rule{anyHas(peerAllow | peerDeny), {identity: abi.IDHost, dir: ingress, proto: protoTCP, port: 81, flags: allow, evidence: abi.EvidenceSvid}}, pass},
			{"denied to it", admit, []rule{denyHost, anyHas(peerDeny)}, drop},
			{"denied to it, allowed to some", admit, []rule{denyHost, anyHas(peerAllow | peerDeny)}, drop},
			{"denied to everybody", admit, []rule{anyHas(deny)}, drop},
			{"without the flag", enforceIn, nil, drop},
			{"without the flag, some peers are allowed", enforceIn, []rule{anyHas(peerAllow)}, drop},
		} {
			t.Run(c.name, func(t *testing.T) {
				g, _ := start(t, c.flags, c.rules...)
				r := g.to(g.pod, 0, call)
				if c.verdict == pass {
					g.pass(r)
				} else {
					g.drop(r, abi.ReasonPolicyDenied)
				}
			})
		}
		t.Run("nobody else", func(t *testing.T) {
			g, _ := start(t, admit)
			g.pass(g.to(g.pod, 0, call))
			g.pass(g.from(g.pod, back))
			// The same flow, from elsewhere: forwarded with the node's address.
			g.drop(g.to(g.pod, g.uplink, tcp(f.node, 40000, f.pod, 81, ack)), abi.ReasonPolicyDenied)
			g.drop(g.to(g.pod, g.pod2, tcp(f.node, 40000, f.pod, 81, ack)), abi.ReasonPolicyDenied)
			g.drop(g.reinject(g.pod, tcp(f.node, 40001, f.pod, 81, syn)), abi.ReasonPolicyDenied)
			// A remote peer is dropped at once, bound or not: the port needs no
			// evidence.
			g.drop(g.to(g.pod, g.uplink, tcp(f.peer, 40000, f.pod, 81, syn)), abi.ReasonPolicyDenied)
			g.drop(g.to(g.pod, 0, tcp(f.peer, 40000, f.pod, 81, syn)), abi.ReasonPolicyDenied)
		})
		t.Run("the answer", func(t *testing.T) {
			g, ep := start(t, admit)
			g.pass(g.to(g.pod, 0, call))
			g.pass(g.from(g.pod, back))
			// Policy changes: the flow is judged again, whichever packet comes
			// first, and lives on.
			ep = g.newPolicy(ep, anyHas(peerAllow))
			g.pass(g.from(g.pod, back))
			g.pass(g.to(g.pod, 0, tcp(f.node, 40000, f.pod, 81, ack)))
			ep = g.newPolicy(ep)
			g.pass(g.from(g.pod, back))
			ep = g.newPolicy(ep, denyHost, anyHas(peerDeny))
			g.drop(g.from(g.pod, back), abi.ReasonPolicyDenied)
			// The node's address went to another binding (I4).
			g.newPolicy(ep)
			former := g.bind(f.node, abi.IDHost, local(0))
			g.pass(g.to(g.pod, 0, tcp(f.node, 40002, f.pod, 81, syn)))
			g.revoke(former)
			g.bind(f.node, abi.IDHost, local(0))
			g.drop(g.from(g.pod, tcp(f.pod, 81, f.node, 40002, ack)), abi.ReasonPolicyDenied)
		})
		t.Run("known by its slot", func(t *testing.T) {
			// Policies may tell the node's addresses apart: the number is another.
			g, _ := start(t, admit)
			g.bind(f.node, 4711, local(0))
			r := g.to(g.pod, 0, call)
			g.pass(r)
			if r.events[0].SrcIdentity != 4711 {
				t.Errorf("told as %d", r.events[0].SrcIdentity)
			}
			g.drop(g.to(g.pod, g.uplink, tcp(f.node, 40009, f.pod, 81, syn)), abi.ReasonPolicyDenied)
		})
	})
}

// TestLocalIsNoSVID: a local binding is known by the node's own word, which is
// no proof by the workload's SVID; it satisfies every other demand.
func TestLocalIsNoSVID(t *testing.T) {
	eachFamily(t, func(t *testing.T, f family) {
		for least, want := range map[abi.Evidence]abi.Reason{abi.EvidenceNone: 0, abi.EvidenceWatch: 0, abi.EvidenceLease: 0, abi.EvidenceSvid: abi.ReasonEvidenceTooWeak, abi.EvidenceLocal: 0} {
			g := newGate(t)
			ep := g.endpoint(g.pod, f, f.pod, enforceIn)
			g.policy(ep.Policy, rule{identity: idAny, dir: ingress, proto: protoTCP, port: 81, flags: peerAllow},
				rule{identity: idClient, dir: ingress, proto: protoTCP, port: 81, flags: allow, evidence: least})
			g.bind(f.pod2, idClient, local(g.pod2))
			r := g.to(g.pod, g.pod2, tcp(f.pod2, 40000, f.pod, 81, syn))
			if want == 0 {
				g.pass(r)
			} else {
				g.drop(r, want)
			}
		}
	})
}
