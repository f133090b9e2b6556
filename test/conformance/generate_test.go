package conformance

import (
	"fmt"
	"math/rand/v2"
	"net/netip"
	"slices"

	"portcullis/authz"
	"portcullis/bpf/abi"
	"portcullis/identity"
)

var (
	someNamespaces = []string{"a", "b"}
	someValues     = []string{"x", "y"}
	somePorts      = []uint16{1, 53, 80, 81, 4096, 5000, 8191, 65535}
	someNames      = []string{"http", "dns"}
)

func pick[T any](r *rand.Rand, from []T) T { return from[r.IntN(len(from))] }

func someIdentity(r *rand.Rand) identity.Identity {
	labels := map[string]string{"app": pick(r, someValues)}
	if r.IntN(2) == 0 {
		labels["zone"] = pick(r, someValues)
	}
	return identity.New(trustDomain, pick(r, someNamespaces), pick(r, someValues), labels)
}

// someNamed returns the named ports of one workload.
func someNamed(r *rand.Rand) (out []identity.NamedPort) {
	for range r.IntN(3) {
		out = append(out, identity.NamedPort{Name: pick(r, someNames), Port: pick(r, somePorts), Protocol: pick(r, []string{"TCP", "UDP", "SCTP"})})
	}
	return out
}

func someSelector(r *rand.Rand) authz.Selector {
	return pick(r, []authz.Selector{
		{}, {authz.InNamespace(pick(r, someNamespaces))}, {authz.HasServiceAccount(pick(r, someValues))},
		{authz.Label("app", pick(r, someValues))},
		{authz.Label("app", pick(r, someValues)), authz.InNamespace(pick(r, someNamespaces))},
		{authz.Label("app", "nobody")},
		{{Attribute: authz.PodLabel, Key: "zone", Operator: authz.NotIn, Values: []string{pick(r, someValues)}}},
		{{Attribute: authz.PodLabel, Key: "zone", Operator: pick(r, []authz.Operator{authz.Exists, authz.DoesNotExist})}},
	})
}

func somePort(r *rand.Rand) authz.PortRange {
	proto := pick(r, []uint8{authz.ProtoTCP, authz.ProtoTCP, authz.ProtoUDP, authz.ProtoSCTP, authz.ProtoICMP, authz.ProtoICMPv6})
	if proto == authz.ProtoICMP || proto == authz.ProtoICMPv6 {
		if r.IntN(2) == 0 {
			return authz.Port(proto, uint16(echoRequest(proto))<<8)
		}
		return authz.AllPorts(proto)
	}
	a, b := pick(r, somePorts), pick(r, somePorts)
	switch r.IntN(5) {
	case 0:
		return authz.AllPorts(proto)
	case 2:
		return authz.PortNamed(proto, pick(r, someNames))
	case 1:
		return authz.PortRange{Proto: proto, First: min(a, b), Last: max(a, b)}
	}
	return authz.Port(proto, a)
}

// someLimit limits TCP and UDP.
func someLimit(r *rand.Rand, rule authz.Rule) authz.Rule {
	rule.Action, rule.AnyPeer, rule.Ports = authz.Limit, true, nil
	for range 1 + r.IntN(3) {
		a, b := pick(r, somePorts), pick(r, somePorts)
		rule.Ports = append(rule.Ports, authz.PortRange{Proto: pick(r, []uint8{authz.ProtoTCP, authz.ProtoUDP}), First: min(a, b), Last: max(a, b)})
	}
	return rule
}

// somePeers are workloads, or what is none.
func somePeers(r *rand.Rand) authz.PeerSelector {
	switch r.IntN(8) {
	case 0, 1:
		b := authz.Block{Prefix: someBlock(r), Bound: r.IntN(2) == 0}
		b.Except = someExceptions(r, b.Prefix)
		return b
	case 2:
		return authz.Entities{pick(r, []string{"world", "host", "remote-node"})}
	case 3:
		if r.IntN(2) == 0 {
			return authz.BlockGroup{Name: pick(r, []string{"some", "unknown"})}
		}
		return authz.BlockGroup{Labels: authz.Selector{{Attribute: authz.GroupLabel, Key: "zone", Operator: authz.In, Values: []string{pick(r, someValues)}}}}
	case 4:
		return authz.AllBut{PeerSelector: authz.Block{Prefix: someBlock(r), Bound: r.IntN(2) == 0}}
	}
	return someSelector(r)
}

// someBlock is around some peer's address, or a neighbour's.
func someBlock(r *rand.Rand) netip.Prefix {
	p := pick(r, peers)
	ip, bits := netip.MustParseAddr(p.v4), []int{0, 4, 8, 16, 24, 28, 30, 31, 32}
	if r.IntN(2) == 0 {
		ip, bits = netip.MustParseAddr(p.v6), []int{0, 8, 16, 32, 64, 112, 124, 126, 127, 128}
	}
	b, err := ip.Prefix(pick(r, bits))
	if err != nil {
		panic(err)
	}
	return b
}

func someExceptions(r *rand.Rand, within netip.Prefix) (out []netip.Prefix) {
	for range r.IntN(12) {
		if x := someBlock(r); x.Bits() > within.Bits() && within.Overlaps(x) && len(out) < 2 {
			out = append(out, x)
		}
	}
	slices.SortFunc(out, netip.Prefix.Compare)
	return out
}

// somePolicy allows, denies and limits.
func somePolicy(r *rand.Rand, n int) *authz.Policy {
	spec := authz.Spec{DenyIngress: r.IntN(4) > 0, DenyEgress: r.IntN(2) == 0}
	for i := range 1 + r.IntN(4) {
		rule := authz.Rule{Direction: abi.Direction(r.IntN(2)), Action: authz.Allow, Path: fmt.Sprint(i)}
		if r.IntN(5) == 0 {
			rule.Action = authz.Deny
		}
		if r.IntN(8) == 0 {
			spec.Rules = append(spec.Rules, someLimit(r, rule))
			continue
		}
		if rule.AnyPeer = r.IntN(5) == 0; !rule.AnyPeer {
			for range 1 + r.IntN(2) {
				s := somePeers(r)
				if _, nested := s.(authz.AllBut); !nested && r.IntN(6) == 0 {
					s = authz.AllBut{PeerSelector: s}
				}
				rule.Peers = append(rule.Peers, s)
			}
		}
		if rule.Action == authz.Allow && r.IntN(6) == 0 {
			rule.Evidence = pick(r, []identity.Evidence{identity.EvidenceSVID, identity.EvidenceWatch, identity.EvidenceLease})
		}
		if rule.AnyPort = r.IntN(4) == 0; !rule.AnyPort {
			for range 1 + r.IntN(3) {
				rule.Ports = append(rule.Ports, somePort(r))
			}
		}
		spec.Rules = append(spec.Rules, rule)
	}
	return &authz.Policy{Ref: authz.Ref{Kind: "Test", Namespace: "a", Name: fmt.Sprint(n)}, Specs: []authz.Spec{spec}}
}
