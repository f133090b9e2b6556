package authz

import (
	"fmt"
	"iter"
	"math/rand/v2"

	"portcullis/bpf/abi"
	"portcullis/identity"
)

// A small world, so that generated selectors meet somebody.
var (
	genNamespaces = []string{"default", "empire", "alliance"}
	genAccounts   = []string{"default", "sleep-v1", "sleep-v2"}
	genKeys       = []string{"app", "org"}
	genValues     = []string{"a", "b"}
	genPorts      = []uint16{0, 1, 79, 80, 81, 443, 5000, 8191, 8192, 65534, 65535}
	genProtos     = []uint8{ProtoTCP, ProtoUDP, ProtoICMP, ProtoICMPv6, ProtoSCTP}
	genNames      = []string{"http", "dns"}
)

const genTrustDomain = "test"

func oneOf[T any](r *rand.Rand, from []T) T { return from[r.IntN(len(from))] }

func genIdentity(r *rand.Rand) identity.Identity {
	labels := map[string]string{}
	for _, k := range genKeys {
		if r.IntN(3) > 0 {
			labels[k] = oneOf(r, genValues)
		}
	}
	td := genTrustDomain
	if r.IntN(12) == 0 {
		td = "elsewhere"
	}
	return identity.New(td, oneOf(r, genNamespaces), oneOf(r, genAccounts), labels)
}

func genSelector(r *rand.Rand) Selector {
	s := Selector{}
	for range r.IntN(3) {
		q := oneOf(r, []Requirement{
			InNamespace(oneOf(r, genNamespaces)), HasServiceAccount(oneOf(r, genAccounts)),
			NamespaceHasLabel("team", oneOf(r, genValues)), NamespaceHasLabel(nameLabel, oneOf(r, genNamespaces)),
			Label(oneOf(r, genKeys), oneOf(r, genValues)), Label(oneOf(r, genKeys), oneOf(r, genValues)),
		})
		switch r.IntN(6) {
		case 0:
			q.Operator = NotIn
		case 1:
			q.Operator, q.Values = Exists, nil
		case 2:
			q.Operator, q.Values = DoesNotExist, nil
		case 3:
			q.Values = append(q.Values, oneOf(r, genValues))
		}
		s = append(s, q)
	}
	return s
}

// genNamed returns the named ports of one workload.
func genNamed(r *rand.Rand) (out []identity.NamedPort) {
	for range r.IntN(3) {
		out = append(out, identity.NamedPort{Name: oneOf(r, genNames), Port: max(1, oneOf(r, genPorts)), Protocol: oneOf(r, []string{"TCP", "UDP", "SCTP"})})
	}
	return out
}

func genRule(r *rand.Rand, i int) Rule {
	rule := Rule{Action: Allow, Path: fmt.Sprintf("rule[%d]", i), Direction: abi.DirIngress}
	if r.IntN(2) == 0 {
		rule.Direction = abi.DirEgress
	}
	if r.IntN(4) == 0 {
		rule.Action = Deny
	}
	if rule.AnyPeer = r.IntN(4) == 0; !rule.AnyPeer {
		for range r.IntN(3) {
			var s PeerSelector = genSelector(r)
			if r.IntN(8) == 0 {
				s = AllBut{s}
			}
			rule.Peers = append(rule.Peers, s)
		}
	}
	if r.IntN(8) == 0 {
		rule.Action, rule.AnyPeer, rule.Peers = Limit, true, nil
		for range r.IntN(4) {
			a, b := oneOf(r, genPorts), oneOf(r, genPorts)
			rule.Ports = append(rule.Ports, PortRange{Proto: oneOf(r, []uint8{ProtoTCP, ProtoUDP}), First: min(a, b), Last: max(a, b)})
		}
		return rule
	}
	if rule.AnyPort = r.IntN(5) == 0; !rule.AnyPort {
		for range r.IntN(4) {
			a, b := oneOf(r, genPorts), oneOf(r, genPorts)
			switch p := oneOf(r, genProtos); r.IntN(5) {
			case 0:
				rule.Ports = append(rule.Ports, AllPorts(p))
			case 1:
				rule.Ports = append(rule.Ports, PortRange{Proto: p, First: min(a, b), Last: max(a, b)})
			case 2:
				rule.Ports = append(rule.Ports, PortNamed(oneOf(r, []uint8{ProtoTCP, ProtoUDP, ProtoSCTP}), oneOf(r, genNames)))
			default:
				rule.Ports = append(rule.Ports, Port(p, a))
			}
		}
	}
	return rule
}

func genPolicy(r *rand.Rand, i int) *Policy {
	p := &Policy{Ref: Ref{"Test", oneOf(r, genNamespaces), fmt.Sprint(i)}}
	for range 1 + r.IntN(2)*r.IntN(2) {
		var s Spec
		if r.IntN(3) > 0 {
			s.Subject = genSelector(r)
		}
		s.DenyIngress, s.DenyEgress = r.IntN(3) > 0, r.IntN(3) == 0
		for j := range r.IntN(4) {
			s.Rules = append(s.Rules, genRule(r, j))
		}
		p.Specs = append(p.Specs, s)
	}
	return p
}

// world is a generated repository with the identities that a node knows.
type world struct {
	*Repository
	alloc *identity.Allocator
	// named ports of the workloads behind each identity, one list for each
	named map[identity.Numeric][][]identity.NamedPort
}

func genWorld(r *rand.Rand) world {
	opts := Options{TrustDomain: genTrustDomain, EnforceIn: map[string]Enforcement{}}
	if r.IntN(4) == 0 {
		opts.Enforce = Enforcement(r.IntN(4))
	}
	if r.IntN(4) == 0 {
		opts.EnforceIn[oneOf(r, genNamespaces)] = Enforcement(r.IntN(4))
	}
	w := world{NewRepository(opts), identity.NewAllocator(), map[identity.Numeric][][]identity.NamedPort{}}
	for i := range 1 + r.IntN(5) {
		if err := w.Put(genPolicy(r, i)); err != nil {
			panic(err)
		}
	}
	for _, ns := range genNamespaces {
		switch r.IntN(4) {
		case 0: // nobody speaks of it
		case 1:
			w.SetNamespaceLabels(ns, map[string]string{})
		default:
			w.SetNamespaceLabels(ns, map[string]string{"team": oneOf(r, genValues)})
		}
	}
	for i := range 8 {
		id := genIdentity(r)
		n, _ := w.alloc.Acquire(id)
		ports := genNamed(r)
		w.AddPorts(uint64(i+1), id, ports)
		w.named[n] = append(w.named[n], ports)
	}
	return w
}

func (w world) peers() iter.Seq2[identity.Numeric, Peer] { return Peers(w.alloc.All) }
