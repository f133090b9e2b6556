package authz

import (
	"fmt"
	"iter"
	"maps"
	"math/rand/v2"
	"net/netip"
	"slices"
	"strings"

	"portcullis/authz/l7"
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
	genEvidence   = []identity.Evidence{identity.EvidenceNone, identity.EvidenceWatch, identity.EvidenceLease, identity.EvidenceSVID}
	genReserved   = []string{"host", "remote-node", "kube-apiserver", "world", "health", "ingress"}
	genDNS        = []string{"a.test", "b.test", "x.a.test"}
	genServices   = []ServiceName{{"default", "web"}, {"default", "db"}, {"empire", "web"}}
	// No union of some of these is another one, so a block that is not in one
	// of them is not in all of them together either.
	genPrefixes = prefixList("0.0.0.0/0 10.0.0.0/8 10.1.0.0/16 10.1.2.0/24 10.1.2.3/32 10.200.0.0/16 192.0.2.0/24 ::/0 2001:db8::/32 2001:db8:1::/48 2001:db8:1::5/128")
	genEdges    = edges(genPrefixes)
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

func prefixList(s string) (out []netip.Prefix) {
	for _, f := range strings.Fields(s) {
		out = append(out, netip.MustParsePrefix(f))
	}
	return out
}

// edges are the first address of each prefix, and the one after its last.
func edges(prefixes []netip.Prefix) (out []netip.Addr) {
	for _, p := range prefixes {
		out = append(out, p.Addr())
		last := p.Addr().AsSlice()
		for i := p.Bits(); i < len(last)*8; i++ {
			last[i/8] |= 0x80 >> (i % 8)
		}
		if after, _ := netip.AddrFromSlice(last); after.Next().IsValid() {
			out = append(out, after.Next())
		}
	}
	return out
}

// genLabels are a selector of what has nothing but labels.
func genLabels(r *rand.Rand, a Attribute) (out Selector) {
	for range r.IntN(3) {
		q := Requirement{Attribute: a, Key: oneOf(r, genKeys), Operator: Operator(1 + r.IntN(4))}
		if q.Operator.TakesValues() {
			q.Values = []string{oneOf(r, genValues)}
		}
		out = append(out, q)
	}
	return out
}

func genLabelMap(r *rand.Rand) map[string]string {
	return map[string]string{oneOf(r, genKeys): oneOf(r, genValues)}
}

// genExcept are some prefixes within one.
func genExcept(r *rand.Rand, in netip.Prefix) (out []netip.Prefix) {
	for range r.IntN(3) {
		if p := oneOf(r, genPrefixes); in.IsValid() && p.Overlaps(in) && p.Bits() > in.Bits() {
			out = append(out, p)
		}
	}
	slices.SortFunc(out, netip.Prefix.Compare)
	return out
}

func genPeerSelector(r *rand.Rand) PeerSelector {
	switch r.IntN(10) {
	case 0:
		return Entities{oneOf(r, genReserved), oneOf(r, genReserved)}
	case 1, 2:
		p := oneOf(r, genPrefixes)
		return Block{Prefix: p, Except: genExcept(r, p), Bound: r.IntN(2) == 0}
	case 3:
		return BlockGroup{Name: oneOf(r, []string{"g", "h", "nobody-speaks-of-it"}), Except: genExcept(r, genPrefixes[0])}
	case 4:
		return oneOf(r, []PeerSelector{BlockGroup{Labels: genLabels(r, GroupLabel)}, Nodes(genLabels(r, NodeLabel)), Service{Labels: genLabels(r, ServiceLabel)}})
	case 5:
		at := oneOf(r, genServices)
		return Service{Namespace: at.Namespace, Name: at.Name}
	case 6:
		return oneOf(r, []PeerSelector{DNSName{Name: oneOf(r, genDNS)}, DNSName{Pattern: "*.test"}, DNSName{Pattern: "*"}})
	}
	return genSelector(r)
}

func genPeer(r *rand.Rand) Peer {
	p := Peer{Identity: genIdentity(r)}
	if r.IntN(2) == 0 {
		p.Identity = identity.Identity{Reserved: oneOf(r, genReserved)}
	}
	switch r.IntN(4) {
	case 0:
	case 1:
		a := oneOf(r, genEdges)
		p.Block = netip.PrefixFrom(a, a.BitLen())
	default:
		p.Block = oneOf(r, genPrefixes)
		p.Holes = genExcept(r, p.Block)
	}
	if p.Identity.Reserved == worldName && r.IntN(2) == 0 {
		p.Names = []string{oneOf(r, genDNS)}
	}
	if r.IntN(3) > 0 {
		p.Node = genLabelMap(r)
	}
	return p
}

func genSelector(r *rand.Rand) Selector {
	s := Selector{}
	for range r.IntN(3) {
		q := oneOf(r, []Requirement{
			InNamespace(oneOf(r, genNamespaces)), HasServiceAccount(oneOf(r, genAccounts)),
			{Attribute: Cluster, Operator: In, Values: []string{oneOf(r, []string{"default", "other"})}},
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
			slices.Sort(q.Values)
			q.Values = slices.Compact(q.Values)
		}
		s = append(s, q)
	}
	if r.IntN(20) == 0 {
		s = append(s, Requirement{Attribute: TrustDomain, Operator: In, Values: oneOf(r, [][]string{{genTrustDomain}, {"elsewhere"}, {"elsewhere", genTrustDomain}})})
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
	if rule.Action == Allow && r.IntN(3) == 0 {
		rule.Evidence = oneOf(r, genEvidence)
		if r.IntN(3) == 0 {
			rule.L7 = genL7(r, false)
		}
	}
	if rule.AnyPeer = r.IntN(4) == 0; !rule.AnyPeer {
		rule.Peers = []PeerSelector{}
		for range r.IntN(4) {
			s := genPeerSelector(r)
			if r.IntN(8) == 0 {
				if _, byName := s.(DNSName); !byName {
					s = AllBut{s}
				}
			}
			rule.Peers = append(rule.Peers, s)
		}
	}
	if r.IntN(10) == 0 {
		rule.Action, rule.AnyPeer, rule.Peers, rule.Evidence = Limit, true, nil, identity.EvidenceNone
		if rule.L7 = nil; r.IntN(3) == 0 {
			rule.L7 = genL7(r, true)
		}
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

// genMethods are those that rules inside HTTP speak of.
var genMethods = []string{"GET", "PUT", "POST", "HEAD"}

// genL7 returns rules inside HTTP that allow some methods, as an expression of a
// tree or as Cilium has them.
func genL7(r *rand.Rand, tree bool) *l7.Rules {
	out := &l7.Rules{Parser: l7.ParserHTTP}
	for _, m := range genMethods {
		switch {
		case r.IntN(2) == 0:
		case tree:
			out.HTTP = append(out.HTTP, l7.HTTP{Expr: &l7.Expr{Method: m}})
		default:
			out.HTTP = append(out.HTTP, l7.HTTP{Method: m})
		}
	}
	return out
}

func genPolicy(r *rand.Rand, i int) *Policy {
	p := &Policy{Ref: Ref{"Test", oneOf(r, genNamespaces), fmt.Sprint(i)}}
	for range 1 + r.IntN(2)*r.IntN(2) {
		var s Spec
		if r.IntN(3) > 0 {
			s.Subject = genSelector(r)
		}
		s.DenyIngress, s.DenyEgress = r.IntN(3) > 0, r.IntN(3) == 0
		s.Nodes = r.IntN(20) == 0 && len(s.Subject) == 0
		for j := range r.IntN(4) {
			s.Rules = append(s.Rules, genRule(r, j))
		}
		p.Specs = append(p.Specs, s)
	}
	return p
}

// known is what a world was told beside policies.
type known struct {
	namespaces map[string]map[string]string
	groups     map[string]blockGroup
	services   map[ServiceName]Backends
}

type binding struct {
	id    identity.Identity
	ports []identity.NamedPort
}

// world is a generated repository with the peers that a node knows.
type world struct {
	*Repository
	known
	peers    map[identity.Numeric]Peer
	bindings map[uint64]binding
}

func genWorld(r *rand.Rand) *world {
	opts := Options{TrustDomain: genTrustDomain, EnforceIn: map[string]Enforcement{}, LocalHost: r.IntN(3) == 0}
	if r.IntN(4) == 0 {
		opts.Enforce = Enforcement(r.IntN(4))
	}
	if r.IntN(4) == 0 {
		opts.EnforceIn[oneOf(r, genNamespaces)] = Enforcement(r.IntN(4))
	}
	w := &world{NewRepository(opts), known{map[string]map[string]string{}, map[string]blockGroup{}, map[ServiceName]Backends{}},
		map[identity.Numeric]Peer{}, map[uint64]binding{}}
	for range 1 + r.IntN(5) {
		w.changePolicy(r)
	}
	for range 12 {
		w.changeFact(r)
	}
	for i := range 10 {
		w.peers[identity.Numeric(300+i)] = genPeer(r)
		w.changePorts(r)
	}
	return w
}

func (w *world) changePolicy(r *rand.Rand) {
	p := genPolicy(r, r.IntN(6))
	if r.IntN(6) == 0 {
		w.Delete(p.Ref)
	} else if err := w.Put(p); err != nil {
		panic(err)
	}
}

func (w *world) changeFact(r *rand.Rand) {
	switch r.IntN(3) {
	case 0:
		ns := oneOf(r, genNamespaces)
		labels := oneOf(r, []map[string]string{nil, {}, {"team": "a"}, {"team": "b"}})
		w.SetNamespaceLabels(ns, labels)
		if labels == nil {
			delete(w.namespaces, ns)
		} else {
			w.namespaces[ns] = labels
		}
	case 1:
		name := oneOf(r, []string{"g", "h"})
		if r.IntN(4) == 0 {
			w.DeleteBlockGroup(name)
			delete(w.groups, name)
			return
		}
		g := blockGroup{labels: genLabelMap(r)}
		for range r.IntN(4) {
			g.blocks = append(g.blocks, oneOf(r, genPrefixes))
		}
		w.SetBlockGroup(name, g.labels, g.blocks)
		w.groups[name] = g
	case 2:
		at := oneOf(r, genServices)
		if r.IntN(4) == 0 {
			w.SetService(at, nil)
			delete(w.services, at)
			return
		}
		b := Backends{Labels: genLabelMap(r)}
		if r.IntN(2) == 0 {
			b.Selector = genLabelMap(r)
		} else {
			b.Blocks = []netip.Prefix{oneOf(r, genPrefixes), oneOf(r, genPrefixes)}
		}
		w.SetService(at, &b)
		w.services[at] = b
	}
}

// changePorts says that a binding of some peer comes or goes.
func (w *world) changePorts(r *rand.Rand) {
	stamp := uint64(1 + r.IntN(12))
	if r.IntN(4) == 0 {
		w.RemovePorts(stamp)
		delete(w.bindings, stamp)
		return
	}
	b := binding{genIdentity(r), genNamed(r)}
	for _, p := range w.all() {
		if p.Identity.Reserved == "" && r.IntN(3) > 0 {
			b.id = p.Identity
		}
	}
	w.AddPorts(stamp, b.id, b.ports)
	w.bindings[stamp] = b
}

func (w *world) namedPorts(id identity.Identity) (out []identity.NamedPort) {
	for _, b := range w.bindings {
		if b.id.Equal(id) {
			out = append(out, b.ports...)
		}
	}
	return out
}

// all yields the peers in one order, so that a seed says everything.
func (w *world) all() iter.Seq2[identity.Numeric, Peer] {
	return func(yield func(identity.Numeric, Peer) bool) {
		for _, n := range slices.Sorted(maps.Keys(w.peers)) {
			if !yield(n, w.peers[n]) {
				return
			}
		}
	}
}
