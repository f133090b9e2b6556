package authz

import (
	"maps"
	"slices"

	"portcullis/bpf/abi"
	"portcullis/identity"
)

// RuleRef says which rule of which policy an entry comes from.
type RuleRef struct {
	Policy    Ref           `json:"policy"`
	Path      string        `json:"path"`
	Direction abi.Direction `json:"direction"`
	Action    Action        `json:"action"`
}

// Set is the policy of one subject, ready for the kernel. It belongs to the
// loop that owns its Repository. It goes on meaning what the repository meant
// when it was compiled, whatever policies and facts are put there later; of
// peers' named ports it looks at what the repository knows now. Copies share
// their entries.
type Set struct {
	EnforceIngress, EnforceEgress bool
	// Audit: what the set says is recorded, and the packet passes all the same.
	Audit bool
	// LocalHost: a packet of the subject's own node passes on ingress unless an
	// entry for everybody or for the host has DENY there. It is known where the
	// packet comes in that it is the node's own, so this asks for no evidence,
	// and the entries say nothing of it.
	LocalHost bool
	// Rules by abi.Policy.Rule; 0 is no rule.
	Rules []RuleRef

	*compiled // nil: no entries
}

// compiled is the entries of a set, and what those of more peers come from.
//
//	any    what is said of everybody: PC_ID_ANY
//	peers  number -> shape: what is said of one peer beyond that. Peers whom
//	       the same rules pick share a shape, so thousands of them cost one.
//
// In both the set's number, and in shapes the peer's, is 0. The flags of
// shorter prefixes are folded into longer ones.
type compiled struct {
	rules []numbered // those behind Rules[1:]
	facts *facts
	ports func(identity.Identity) []identity.NamedPort

	any      *shape
	peers    map[identity.Numeric]*shape // none of them empty
	hosts    numbers                     // of the subject's own node, beside the reserved one
	shapes   map[string]*shape           // by the picks, for peers without named ports
	key      []byte                      // spare, for a key of shapes
	names    bool                        // a rule names ports of peers
	anyNames bool                        // one for every peer does
	insides  [abi.DirMax]bool            // a rule has rules inside a protocol

	// Of Sets: which rules (as indices) a selection makes pick, and when this
	// was compiled.
	bySelection map[*selection][]int
	version     uint64
}

// shape is what is said of a peer, and for its entries with L7 how far it goes
// inside. It is not changed once it is made; nil says nothing.
type shape struct {
	entries map[abi.PolicyKey]abi.Policy
	depths  map[abi.PolicyKey]*depth // nil: none of them has L7
}

// all returns the entries.
func (s *shape) all() map[abi.PolicyKey]abi.Policy {
	if s == nil {
		return nil
	}
	return s.entries
}

func (s *shape) equal(o *shape) bool {
	if s == nil || o == nil {
		return len(s.all()) == len(o.all())
	}
	return s == o || maps.Equal(s.entries, o.entries) && maps.EqualFunc(s.depths, o.depths, (*depth).equal)
}

// maxShapes bounds the shapes that are remembered for peers to come.
const maxShapes = 4096

// numbered is a rule in a set, with its ports apart: those whose numbers are
// known for this subject, and those that depend on the peer.
type numbered struct {
	*Rule
	number uint32
	// unsure: the subject may not be meant. An allow rule then allows nothing,
	// but what it demands is demanded.
	unsure    bool
	ports     []PortRange
	names     []PortRange
	limits    bool // it is what a Limit rule allows nothing by, but says of what is allowed
	sureLimit bool // the Limit rule surely holds
	standing  bool // no policy says it
	looked    bool // in its direction a rule of the set looks inside a protocol
}

// addRule numbers a rule. The called side of ingress is the subject: names
// become the numbers of its own ports.
func (s *Set) addRule(ref RuleRef, r *Rule, unsure bool, own []identity.NamedPort) {
	n := numbered{Rule: r, number: uint32(len(s.Rules)), unsure: unsure, limits: ref.Action == Limit, standing: ref.Policy == (Ref{})}
	for _, p := range r.Ports {
		switch {
		case p.Name == "":
			n.ports = append(n.ports, p)
		case r.Direction == abi.DirIngress:
			n.ports = append(n.ports, p.resolve(own)...)
		default:
			n.names = append(n.names, p)
		}
	}
	s.insides[r.Direction] = s.insides[r.Direction] || r.L7 != nil
	s.names = s.names || len(n.names) > 0
	s.anyNames = s.anyNames || len(n.names) > 0 && r.AnyPeer
	s.rules = append(s.rules, n)
	s.Rules = append(s.Rules, ref)
}

// Enforce reports whether the direction is under policy.
func (s Set) Enforce(dir abi.Direction) bool {
	if dir == abi.DirIngress {
		return s.EnforceIngress
	}
	return s.EnforceEgress
}

// Equal reports whether the kernel, and who reads its records, would see no
// difference between two sets. They may still differ in what AddPeer will
// say: keep the one that was compiled last.
func (s Set) Equal(o Set) bool {
	return s.EnforceIngress == o.EnforceIngress && s.EnforceEgress == o.EnforceEgress && s.Audit == o.Audit && s.LocalHost == o.LocalHost &&
		slices.Equal(s.Rules, o.Rules) && s.compiled.equal(o.compiled)
}

func (c *compiled) equal(o *compiled) bool {
	if c == nil || o == nil {
		return (c == nil || len(c.any.all())+len(c.peers) == 0) && (o == nil || len(o.any.all())+len(o.peers) == 0)
	}
	return c == o || c.any.equal(o.any) && maps.EqualFunc(c.peers, o.peers, (*shape).equal) && (!c.looksInside() && !o.looksInside() || c.equalRules(o))
}

// Len returns how many entries the set has.
func (s Set) Len() (n int) {
	if s.compiled == nil {
		return 0
	}
	for _, sh := range s.peers {
		n += len(sh.entries)
	}
	return n + len(s.any.all())
}

// WithSet returns the entries of the policy map, under the number of a set.
func (s Set) WithSet(id uint32) map[abi.PolicyKey]abi.Policy {
	out := make(map[abi.PolicyKey]abi.Policy, s.Len())
	if s.compiled == nil {
		return out
	}
	for k, v := range s.any.all() {
		k.Set = id
		out[k] = v
	}
	for n, sh := range s.peers {
		for k, v := range sh.entries {
			k.Set, k.Identity = id, uint32(n)
			out[k] = v
		}
	}
	return out
}

// AddPeer adds the entries of one numeric identity to the set and returns them
// (often none), with 0 in the place of the set's number. They never change
// what the set says of anybody else, so the epoch stays; they must be in the
// kernel before anything is published there under the number.
func (s Set) AddPeer(n identity.Numeric, p Peer) map[abi.PolicyKey]abi.Policy {
	if s.compiled == nil {
		return nil
	}
	return s.enter(n, p, s.pick(p))
}

// enter adds the entries of a peer whom rules pick.
func (c *compiled) enter(n identity.Numeric, p Peer, picks []pick) map[abi.PolicyKey]abi.Policy {
	if n == NoPeer {
		return nil // the wildcard is nobody's number
	}
	sh := c.put(n, p, picks)
	if len(sh.all()) == 0 {
		return nil
	}
	out := make(map[abi.PolicyKey]abi.Policy, len(sh.entries))
	for k, v := range sh.entries {
		k.Identity = uint32(n)
		out[k] = v
	}
	return out
}

func (c *compiled) put(n identity.Numeric, p Peer, picks []pick) *shape {
	sh := c.shape(p, picks)
	c.set(n, p, sh)
	return sh
}

func (c *compiled) set(n identity.Numeric, p Peer, sh *shape) {
	if p.Identity.Reserved == hostName {
		c.hosts[n] = struct{}{}
	}
	if len(sh.all()) == 0 {
		delete(c.peers, n)
	} else {
		c.peers[n] = sh
	}
}

// RemovePeer removes the entries of numeric identities that nobody bears any
// more and returns their keys, with 0 in the place of the set's number.
func (s Set) RemovePeer(numbers ...identity.Numeric) (keys []abi.PolicyKey) {
	if s.compiled == nil {
		return nil
	}
	for _, n := range numbers {
		for k := range s.peers[n].all() {
			k.Identity = uint32(n)
			keys = append(keys, k)
		}
		delete(s.peers, n)
		delete(s.hosts, n)
	}
	return keys
}

// pick says that a rule picks a peer: its index, shifted by one bit for what
// is only a doubt. One in doubt allows nothing, but demands what it demands.
type pick int32

// picked returns the pick of a rule whose selectors select a peer so.
func (c *compiled) picked(rule int, sure, maybe bool) (pick, bool) {
	r := c.rules[rule]
	switch {
	case !maybe:
		return 0, false
	case r.Action == Deny || sure && !r.unsure:
		return pick(rule << 1), true // a deny rule denies what it may have meant
	case r.demands():
		return pick(rule<<1 | 1), true
	}
	return 0, false
}

// pick returns what rules name the peer, in their order.
func (c *compiled) pick(p Peer) (picks []pick) {
	for i, r := range c.rules {
		by := func(doubt bool) bool {
			return slices.ContainsFunc(r.Peers, func(s PeerSelector) bool { return s.selects(p, c.facts, doubt) })
		}
		sure := by(false)
		if pk, ok := c.picked(i, sure, sure || by(true)); ok {
			picks = append(picks, pk)
		}
	}
	return picks
}

// named reports whether ports of a peer whom rules pick count by their names.
func (c *compiled) named(picks []pick) bool {
	return c.anyNames || c.names && slices.ContainsFunc(picks, func(pk pick) bool { return len(c.rules[pk>>1].names) > 0 })
}

// shape returns the entries of a peer whom rules pick.
func (c *compiled) shape(p Peer, picks []pick) *shape {
	if c.named(picks) {
		if named := c.ports(p.Identity); len(named) > 0 {
			return c.newShape(named, picks)
		}
	}
	if len(picks) == 0 {
		return nil
	}
	key := c.key[:0]
	for _, pk := range picks {
		key = append(key, byte(pk), byte(pk>>8), byte(pk>>16), byte(pk>>24))
	}
	c.key = key
	sh, ok := c.shapes[string(key)]
	if !ok {
		if len(c.shapes) >= maxShapes {
			clear(c.shapes)
		}
		sh = c.newShape(nil, picks)
		c.shapes[string(key)] = sh
	}
	return sh
}

func (c *compiled) newShape(named []identity.NamedPort, picks []pick) *shape {
	t := trie{}
	// What the peer's entries need of the rules for everybody, since theirs go
	// before those: where it is allowed, what everybody has to meet; where
	// something is demanded of it alone, or said of the inside, what allows
	// everybody.
	var demands, allows [abi.DirMax]bool
	add := func(r numbered, doubt bool, anyPort bool, ports []PortRange) {
		t.add(r.Direction, 0, r.cell(doubt), anyPort, ports)
		if r.Action == Allow && (anyPort || len(ports) > 0) {
			demands[r.Direction] = true
			allows[r.Direction] = allows[r.Direction] || doubt || c.insides[r.Direction]
		}
	}
	for _, pk := range picks {
		r, doubt := c.rules[pk>>1], pk&1 != 0
		add(r, doubt, r.AnyPort, r.ports)
		for _, name := range r.names {
			add(r, doubt, false, name.resolve(named))
		}
	}
	if len(named) > 0 && c.anyNames {
		for _, r := range c.rules {
			for _, name := range r.names {
				if r.AnyPeer {
					add(r, r.unsure, false, name.resolve(named))
				}
			}
		}
	}
	for _, r := range c.rules {
		if r.AnyPeer && r.Action == Allow && (allows[r.Direction] || demands[r.Direction] && r.demands()) {
			t.add(r.Direction, 0, r.cell(r.unsure), r.AnyPort, r.ports)
		}
	}
	return t.fold()
}

// compileAny makes the entries that speak of every peer. A rule that names
// peers counts here too, whether somebody it names exists or not: where it
// applies, the peer must be known. So does a rule that names ports: any number
// may turn out to be a peer's port of that name.
func (c *compiled) compileAny() {
	t := trie{}
	for i := range c.rules {
		c.rules[i].looked = c.insides[c.rules[i].Direction]
	}
	for _, r := range c.rules {
		switch {
		case r.AnyPeer:
			t.add(r.Direction, uint32(abi.IDAny), r.cell(r.unsure), r.AnyPort, r.ports)
		case len(r.Peers) > 0:
			t.add(r.Direction, uint32(abi.IDAny), r.peersCell(), r.AnyPort, r.ports)
		default:
			continue
		}
		for _, p := range r.names {
			t.add(r.Direction, uint32(abi.IDAny), r.peersCell(), false, []PortRange{AllPorts(p.Proto)})
		}
	}
	c.any = t.fold()
}
