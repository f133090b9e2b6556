package tools

import (
	"cmp"
	"fmt"
	"maps"
	"net/netip"
	"slices"
	"strings"

	"portcullis/authz"
	"portcullis/bpf/abi"
	"portcullis/identity"
)

// Verdicts, as tables show them.
const (
	Allowed   = '.'
	Blocked   = 'X'
	ThroughL7 = '7' // allowed as far as the rules inside the protocol go
	NotJudged = '-'
)

// Judge judges flows in a World. Its sets are compiled once for each subject
// that differs, when they are first asked for.
type Judge struct {
	world *World
	repo  *authz.Repository

	blocks   []netip.Prefix // that are told apart among workloads
	byNode   bool           // policies tell nodes apart
	hashes   []identity.Hash
	byIP     []map[netip.Addr]identity.Numeric // of workloads
	subjects map[string]*subject
	of       []*subject // by workload; nil: not compiled yet
	peers    []authz.Peer
	numbers  map[string]identity.Numeric

	reasons []Reason
	reason  map[Reason]uint32
}

// subject is whom policies select: all workloads that they do not tell apart.
type subject struct {
	inside   *authz.Inside // nil until something is asked of it
	insideOf map[identity.Numeric]bool
	index    int
	set      authz.Set
	added    map[identity.Numeric]bool
	deny     [abi.DirMax][]authz.Ref // the policies that put it under default deny
	whys     map[uint64]uint32       // by direction, rule and outcome
}

// Reason is what decided of a cell.
type Reason struct {
	Policy string `json:"policy,omitempty"` // empty: the default
	Rule   string `json:"rule,omitempty"`   // its path in the policy
	Text   string `json:"text"`
}

// firstPeer is the lowest number of a peer that is not the host.
const firstPeer = 1 << 20

// NewJudge returns a judge of the world. Of the options the trust domain is the
// world's. It is an error if a policy is invalid, which no parser makes.
func NewJudge(w *World, opts authz.Options) (*Judge, error) {
	opts.TrustDomain = cmp.Or(w.TrustDomain, TrustDomain)
	j := &Judge{world: w, repo: authz.NewRepository(opts), subjects: map[string]*subject{}, of: make([]*subject, len(w.Workloads)),
		numbers: map[string]identity.Numeric{}, reason: map[Reason]uint32{}, reasons: []Reason{{}}}
	for _, p := range w.Policies {
		if err := j.repo.Put(p.Policy); err != nil {
			return nil, err
		}
	}
	for ns, labels := range w.Namespaces {
		j.repo.SetNamespaceLabels(ns, labels)
	}
	for _, g := range w.Groups {
		j.repo.SetBlockGroup(g.Name, g.Labels, g.Blocks)
	}
	for at, s := range w.Services {
		j.repo.SetService(at, &s.Backends)
	}
	for i, x := range w.Workloads {
		j.hashes = append(j.hashes, x.Identity.Hash())
		j.byIP = append(j.byIP, map[netip.Addr]identity.Numeric{})
		j.repo.AddPorts(uint64(i+1), x.Identity, named(x.Ports))
	}
	j.blocks = j.repo.Blocks(true)
	for spec := range w.specs() {
		j.byNode = j.byNode || slices.ContainsFunc(spec.Rules, func(r authz.Rule) bool {
			return slices.ContainsFunc(r.Peers, func(s authz.PeerSelector) bool { _, ok := s.(authz.Nodes); return ok })
		})
	}
	return j, nil
}

// Selects returns how many workloads, of those that are judged, a policy speaks
// of.
func (j *Judge) Selects(p Policy) (n int) {
	for _, x := range j.world.Workloads {
		if !x.Peer && j.repo.Selects(p.Policy, x.Identity) {
			n++
		}
	}
	return n
}

// Idle returns the policies that speak of no workload, which is seldom meant.
func (j *Judge) Idle() (out []string) {
	for _, p := range j.world.Policies {
		if j.Selects(p) == 0 {
			out = append(out, p.Ref.String())
		}
	}
	return out
}

// World returns the judge's.
func (j *Judge) World() *World { return j.world }

// nodeLabels returns the labels of a node, nil if they are not known.
func (j *Judge) nodeLabels(name string) map[string]string {
	i := slices.IndexFunc(j.world.Nodes, func(n Node) bool { return n.Name == name })
	if i < 0 || name == "" {
		return nil
	}
	return j.world.Nodes[i].Labels
}

// subject returns the compiled policy of a workload.
func (j *Judge) subject(i int) *subject {
	if s := j.of[i]; s != nil {
		return s
	}
	x := &j.world.Workloads[i]
	own := named(x.Ports)
	key := fmt.Sprint(j.hashes[i], own)
	if j.byNode {
		key += " " + x.Node
	}
	s := j.subjects[key]
	if s == nil {
		host := authz.Peer{Identity: identity.Identity{Reserved: "host"}, Node: j.nodeLabels(x.Node)}
		s = &subject{index: len(j.subjects), added: map[identity.Numeric]bool{identity.NumHost: true}, whys: map[uint64]uint32{}}
		s.set = j.repo.Compile(x.Identity, maps.All(map[identity.Numeric]authz.Peer{identity.NumHost: host}), own...)
		for _, p := range j.world.Policies {
			for dir := range abi.DirMax {
				if slices.ContainsFunc(p.Specs, func(spec authz.Spec) bool { return j.denies(&spec, x.Identity, dir) }) {
					s.deny[dir] = append(s.deny[dir], p.Ref)
				}
			}
		}
		j.subjects[key] = s
	}
	j.of[i] = s
	return s
}

// denies reports whether the spec puts the subject under default deny.
func (j *Judge) denies(spec *authz.Spec, id identity.Identity, dir abi.Direction) bool {
	if dir == abi.DirIngress && !spec.DenyIngress || dir == abi.DirEgress && !spec.DenyEgress {
		return false
	}
	selected, _ := j.repo.Speaks(spec, id)
	return selected
}

// number returns the number of a peer, known by a key.
func (j *Judge) number(key string, p authz.Peer) identity.Numeric {
	n, ok := j.numbers[key]
	if !ok {
		n = identity.Numeric(firstPeer + len(j.peers))
		j.numbers[key] = n
		j.peers = append(j.peers, p)
	}
	return n
}

// peer returns who is behind a number.
func (j *Judge) peer(n identity.Numeric) authz.Peer { return j.peers[n-firstPeer] }

// workload returns the number of a workload that is met by one of its
// addresses. Those that no policy tells apart have one number.
func (j *Judge) workload(i int, ip netip.Addr) identity.Numeric {
	if n, ok := j.byIP[i][ip]; ok {
		return n
	}
	p := authz.Peer{Identity: j.world.Workloads[i].Identity}
	key := []byte("w")
	key = append(key, j.hashes[i][:]...)
	if len(j.blocks) > 0 {
		if key = append(key, 0); ip.IsValid() {
			p.Block = netip.PrefixFrom(ip, ip.BitLen())
			key[len(key)-1] = 1
		}
		for n, b := range j.blocks {
			if ip.IsValid() && b.Contains(ip) {
				key = fmt.Append(key, n, " ")
			}
		}
	}
	n := j.number(string(key), p)
	j.byIP[i][ip] = n
	return n
}

// numbersFor returns as whom a subject meets a party, in a family of addresses.
func (j *Judge) numbersFor(subject int, p Party, six bool) []identity.Numeric {
	x := &j.world.Workloads[subject]
	switch {
	case p.Workload >= 0:
		ip := p.ip
		if !ip.IsValid() {
			ip = addressOf(&j.world.Workloads[p.Workload], six)
		}
		return []identity.Numeric{j.workload(p.Workload, ip)}
	case p.nobody:
		return []identity.Numeric{authz.NoPeer}
	case p.node != nil && p.node.Name != "" && p.node.Name == x.Node:
		return []identity.Numeric{identity.NumHost}
	case p.node != nil:
		peer := authz.Peer{Identity: identity.Identity{Reserved: "remote-node"}, Node: p.node.Labels}
		key := "node " + p.node.Name
		if p.ip.IsValid() { // rules on addresses tell a node's apart
			peer.Block = netip.PrefixFrom(p.ip, p.ip.BitLen())
			key += " " + p.ip.String()
		}
		return []identity.Numeric{j.number(key, peer)}
	case p.peers[0].Identity.Reserved == "host":
		return []identity.Numeric{identity.NumHost}
	}
	var out []identity.Numeric
	for _, peer := range p.peers {
		if len(p.peers) > 1 && peer.Block.Addr().Is6() != six {
			continue // world of the other family
		}
		out = append(out, j.number(fmt.Sprint("x", peer.Identity, peer.Block, peer.Names), peer))
	}
	return out
}

func addressOf(x *Workload, six bool) netip.Addr {
	for _, ip := range x.IPs {
		if ip.Is6() == six {
			return ip
		}
	}
	return netip.Addr{}
}

// six reports whether two parties meet by IPv6: as the protocol or an address
// wants it, or by the caller's main address if the called side has one of that
// family.
func (j *Judge) six(from, to Party, proto uint8) bool {
	switch {
	case proto == authz.ProtoICMP, proto == authz.ProtoICMPv6:
		return proto == authz.ProtoICMPv6
	case from.ip.IsValid():
		return from.ip.Is6()
	case to.ip.IsValid():
		return to.ip.Is6()
	}
	for _, p := range []Party{from, to} {
		if p.Workload < 0 && len(p.peers) == 1 && p.peers[0].Block.IsValid() {
			return p.peers[0].Block.Addr().Is6()
		}
	}
	for _, ip := range j.addresses(from) {
		if to.Workload < 0 || addressOf(&j.world.Workloads[to.Workload], ip.Is6()).IsValid() {
			return ip.Is6()
		}
	}
	for _, ip := range j.addresses(to) {
		return ip.Is6()
	}
	return false
}

func (j *Judge) addresses(p Party) []netip.Addr {
	if p.Workload < 0 {
		return nil
	}
	return j.world.Workloads[p.Workload].IPs
}

// decide judges one side of a flow, at a port of the called side.
func (j *Judge) decide(s *subject, dir abi.Direction, n identity.Numeric, proto uint8, port uint16) authz.Decision {
	if n != authz.NoPeer && !s.added[n] {
		s.added[n] = true
		s.set.AddPeer(n, j.peer(n))
	}
	d := s.set.Judge(dir, n, proto, port)
	if d.Verdict == abi.VerdictPass && d.L7 && j.inside(s, dir, n, proto, port).Everything {
		d.L7 = false // some rule allows it without looking inside
	}
	return d
}

// character is how tables show a decision. Who must be known and is not gets
// nowhere.
func character(d authz.Decision) byte {
	switch {
	case d.Verdict != abi.VerdictPass:
		return Blocked
	case d.L7:
		return ThroughL7
	}
	return Allowed
}

// both is what two sides say together.
func both(egress, ingress byte) byte {
	for _, c := range []byte{Blocked, NotJudged, ThroughL7} {
		if egress == c || ingress == c {
			return c
		}
	}
	return Allowed
}

// why returns the number of the reason for a decision.
func (j *Judge) why(s *subject, dir abi.Direction, d authz.Decision) uint32 {
	key := uint64(d.Rule)<<8 | uint64(dir)<<4 | uint64(d.Verdict)
	n, ok := s.whys[key]
	if !ok {
		r := j.explain(s, dir, d)
		if n, ok = j.reason[r]; !ok {
			n = uint32(len(j.reasons))
			j.reason[r], j.reasons = n, append(j.reasons, r)
		}
		s.whys[key] = n
	}
	return n
}

func (j *Judge) explain(s *subject, dir abi.Direction, d authz.Decision) Reason {
	pass := d.Verdict == abi.VerdictPass
	side := dir.String()
	rule := authz.RuleRef{}
	if int(d.Rule) < len(s.set.Rules) {
		rule = s.set.Rules[d.Rule]
	}
	switch {
	case !s.set.Enforce(dir):
		return Reason{Text: "no policy limits its " + side}
	case d.Verdict == abi.VerdictHold:
		return Reason{Text: "nobody is known at that address"}
	case d.Rule != 0 && rule.Policy.Name == "":
		return Reason{Text: "no policy puts its " + side + " under default deny, and no rule denies it"}
	case d.Rule != 0 && pass == (rule.Action == authz.Allow):
		word := map[bool]string{true: "allowed", false: "denied"}[pass]
		return Reason{Policy: rule.Policy.String(), Rule: rule.Path, Text: fmt.Sprintf("%s by %s: %s", word, rule.Policy, rule.Path)}
	case pass:
		return Reason{Text: "its own node always gets in, unless a rule denies it"}
	}
	names := make([]string, len(s.deny[dir]))
	for i, ref := range s.deny[dir] {
		names[i] = ref.String()
	}
	if len(names) == 0 {
		return Reason{Text: "no rule allows it, and every workload is under default deny"}
	}
	return Reason{Policy: strings.Join(names, ", "), Text: "no rule allows it; under default deny by " + list(names)}
}

func sortedNames(m map[authz.ServiceName]*Service) []authz.ServiceName {
	return slices.SortedFunc(maps.Keys(m), func(a, b authz.ServiceName) int {
		return cmp.Or(cmp.Compare(a.Namespace, b.Namespace), cmp.Compare(a.Name, b.Name))
	})
}
