package main

import (
	"fmt"
	"iter"
	"math/rand/v2"
	"net/netip"

	"portcullis/authz"
	"portcullis/bpf/abi"
	"portcullis/identity"
)

const (
	trustDomain = "bench"
	apps        = 10 // in each namespace
	blocks      = 100
)

// load is what is compiled. Everything in it follows from its numbers.
type load struct {
	policies, identities, endpoints, namespaces int
}

func namespace(i int) string { return fmt.Sprintf("ns-%d", i) }

func app(i int) authz.Requirement { return authz.Label("app", fmt.Sprint("app-", i%apps)) }

// identity is the i-th: each namespace has as many, of all apps.
func (l load) identity(i int) identity.Identity {
	return identity.New(trustDomain, namespace(i%l.namespaces), fmt.Sprint("sa-", i%3), map[string]string{
		"app": fmt.Sprint("app-", i/l.namespaces%apps), "version": fmt.Sprint("v", i/l.namespaces/apps), "tier": fmt.Sprint(i % 4)})
}

// subject is the i-th local workload's identity.
func (l load) subject(i int) identity.Identity { return l.identity(i * 7919 % l.identities) }

func (l load) labels(ns, version int) map[string]string {
	return map[string]string{"team": fmt.Sprint("team-", ns%20), "version": fmt.Sprint(version)}
}

func block(i int) netip.Prefix {
	return netip.PrefixFrom(netip.AddrFrom4([4]byte{10, byte(i), 0, 0}), 16)
}

// allPeers are every identity's number, and the world's blocks'.
func (l load) allPeers() iter.Seq2[identity.Numeric, authz.Peer] {
	return func(yield func(identity.Numeric, authz.Peer) bool) {
		for i := range l.identities {
			if !yield(identity.Numeric(1000+i), authz.Peer{Identity: l.identity(i)}) {
				return
			}
		}
		for i := range blocks {
			if !yield(identity.Numeric(1000+l.identities+i), authz.Peer{Identity: identity.Identity{Reserved: "world"}, Block: block(i)}) {
				return
			}
		}
	}
}

// policy is the i-th. version changes a port of it.
func (l load) policy(i, version int) *authz.Policy {
	r := rand.New(rand.NewPCG(uint64(i), 0))
	ns := i % l.namespaces
	allow := func(dir abi.Direction, path string, peers []authz.PeerSelector, ports ...authz.PortRange) authz.Rule {
		return authz.Rule{Direction: dir, Action: authz.Allow, Peers: peers, Ports: ports, Path: path}
	}
	one := func(s authz.PeerSelector) []authz.PeerSelector { return []authz.PeerSelector{s} }
	web := []authz.PortRange{authz.Port(authz.ProtoTCP, 80), authz.Port(authz.ProtoTCP, 443)}
	spec := authz.Spec{Subject: authz.Selector{authz.InNamespace(namespace(ns)), app(i / l.namespaces)}, DenyIngress: true, DenyEgress: true}
	other := namespace(r.IntN(l.namespaces))
	spec.Rules = []authz.Rule{
		allow(abi.DirIngress, "spec.ingress[0]", one(authz.Selector{authz.InNamespace(namespace(ns)), app(r.IntN(apps))}), web...),
		allow(abi.DirIngress, "spec.ingress[1]", []authz.PeerSelector{authz.Selector{authz.InNamespace(other), app(r.IntN(apps))},
			authz.Selector{authz.NamespaceHasLabel("team", fmt.Sprint("team-", r.IntN(20))), app(r.IntN(apps))}},
			authz.PortRange{Proto: authz.ProtoTCP, First: 8000, Last: uint16(8090 + version%7)}),
		allow(abi.DirEgress, "spec.egress[0]", one(authz.Selector{authz.InNamespace(other)}), web...),
		allow(abi.DirEgress, "spec.egress[1]", one(authz.Selector{authz.InNamespace(namespace(0)), app(0)}), authz.Port(authz.ProtoUDP, 53), authz.PortNamed(authz.ProtoTCP, "dns-tcp")),
		allow(abi.DirEgress, "spec.egress[2]", []authz.PeerSelector{authz.Block{Prefix: block(r.IntN(blocks))}, authz.BlockGroup{Name: fmt.Sprint("group-", i%10)}}, web...),
	}
	kind, in := "CiliumNetworkPolicy", namespace(ns)
	if i%50 == 49 { // of the whole cluster
		kind, in = "CiliumClusterwideNetworkPolicy", ""
		spec.Subject, spec.DenyIngress, spec.DenyEgress = nil, false, false
		spec.Rules = []authz.Rule{
			allow(abi.DirIngress, "spec.ingress[0]", one(authz.Selector{authz.InNamespace(other), app(0)}), authz.Port(authz.ProtoTCP, uint16(9000+version%7))),
			{Direction: abi.DirIngress, Action: authz.Deny, Peers: one(authz.Entities{"world"}), Ports: []authz.PortRange{authz.Port(authz.ProtoTCP, 22)}, Path: "spec.ingressDeny[0]"},
		}
	}
	return &authz.Policy{Ref: authz.Ref{Kind: kind, Namespace: in, Name: fmt.Sprint("p", i)}, Specs: []authz.Spec{spec}}
}

// fill tells a repository everything but the peers.
func (l load) fill(r *authz.Repository) error {
	for i := range l.namespaces {
		r.SetNamespaceLabels(namespace(i), l.labels(i, 0))
	}
	for i := range 10 {
		l.setGroup(r, i, 0)
	}
	policies := make([]*authz.Policy, l.policies)
	for i := range policies {
		policies[i] = l.policy(i, 0)
	}
	return r.Put(policies...)
}

// setGroup says what blocks a group has; another version has others.
func (l load) setGroup(r *authz.Repository, i, version int) {
	var of []netip.Prefix
	for j := range 10 {
		of = append(of, block((i*10+j+version)%blocks))
	}
	r.SetBlockGroup(fmt.Sprint("group-", i), nil, of)
}
