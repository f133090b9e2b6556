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
)

const genTrustDomain = "test"

func pick[T any](r *rand.Rand, from []T) T { return from[r.IntN(len(from))] }

func genIdentity(r *rand.Rand) identity.Identity {
	labels := map[string]string{}
	for _, k := range genKeys {
		if r.IntN(3) > 0 {
			labels[k] = pick(r, genValues)
		}
	}
	td := genTrustDomain
	if r.IntN(12) == 0 {
		td = "elsewhere"
	}
	return identity.New(td, pick(r, genNamespaces), pick(r, genAccounts), labels)
}

func genSelector(r *rand.Rand) Selector {
	s := Selector{}
	for range r.IntN(3) {
		switch r.IntN(5) {
		case 0:
			s = append(s, InNamespace(pick(r, genNamespaces)))
		case 1:
			s = append(s, HasServiceAccount(pick(r, genAccounts)))
		case 2:
			s = append(s, NamespaceHasLabel("team", pick(r, genValues)))
		case 3:
			s = append(s, NamespaceHasLabel(nameLabel, pick(r, genNamespaces)))
		default:
			s = append(s, Label(pick(r, genKeys), pick(r, genValues)))
		}
	}
	return s
}

func genRule(r *rand.Rand, i int) Rule {
	rule := Rule{Action: Allow, Path: fmt.Sprintf("rule[%d]", i), Direction: abi.DirIngress}
	if r.IntN(4) == 0 {
		rule.Direction = abi.DirEgress
	}
	if r.IntN(4) == 0 {
		rule.Action = Deny
	}
	if rule.AnyPeer = r.IntN(4) == 0; !rule.AnyPeer {
		for range r.IntN(3) {
			rule.Peers = append(rule.Peers, genSelector(r))
		}
	}
	if rule.AnyPort = r.IntN(5) == 0; !rule.AnyPort {
		for range r.IntN(4) {
			a, b := pick(r, genPorts), pick(r, genPorts)
			switch p := pick(r, genProtos); r.IntN(4) {
			case 0:
				rule.Ports = append(rule.Ports, AllPorts(p))
			case 1:
				rule.Ports = append(rule.Ports, PortRange{p, min(a, b), max(a, b)})
			default:
				rule.Ports = append(rule.Ports, Port(p, a))
			}
		}
	}
	return rule
}

func genPolicy(r *rand.Rand, i int) *Policy {
	p := &Policy{Ref: Ref{"Test", pick(r, genNamespaces), fmt.Sprint(i)}}
	if r.IntN(3) > 0 {
		p.Subject = genSelector(r)
	}
	p.DenyIngress, p.DenyEgress = r.IntN(3) > 0, r.IntN(3) == 0
	for j := range r.IntN(4) {
		p.Rules = append(p.Rules, genRule(r, j))
	}
	return p
}

// world is a generated repository with the identities that a node knows.
type world struct {
	*Repository
	alloc *identity.Allocator
}

func genWorld(r *rand.Rand) world {
	w := world{NewRepository(Options{TrustDomain: genTrustDomain}), identity.NewAllocator()}
	for i := range 1 + r.IntN(5) {
		if err := w.Put(genPolicy(r, i)); err != nil {
			panic(err)
		}
	}
	for _, ns := range genNamespaces {
		if r.IntN(2) == 0 {
			w.SetNamespaceLabels(ns, map[string]string{"team": pick(r, genValues)})
		}
	}
	for range 6 {
		w.alloc.Acquire(genIdentity(r))
	}
	return w
}

func (w world) peers() iter.Seq2[identity.Numeric, identity.Identity] { return w.alloc.All }
