package authz

import (
	"maps"
	"math/bits"
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
// peers' named ports it looks at what the repository knows now.
type Set struct {
	EnforceIngress, EnforceEgress bool
	// Audit: what the set says is recorded, and the packet passes all the same.
	Audit bool
	// LocalHost: a packet of the subject's own node passes on ingress unless an
	// entry for everybody or for the host has DENY there. It is known where the
	// packet comes in that it is the node's own, so this asks for no evidence,
	// and the entries say nothing of it.
	LocalHost bool
	// Entries of the policy map, with 0 in the place of the set's number.
	// Never nil. The flags of shorter prefixes are folded into longer ones.
	Entries map[abi.PolicyKey]abi.Policy
	// Rules by abi.Policy.Rule; 0 is no rule.
	Rules []RuleRef

	rules []numbered // those behind Rules[1:]
	facts *facts
	ports func(identity.Identity) []identity.NamedPort
}

// numbered is a rule in a set, with its ports apart: those whose numbers are
// known for this subject, and those that depend on the peer.
type numbered struct {
	*Rule
	number uint32
	ports  []PortRange
	names  []PortRange
}

// addRule numbers a rule. The called side of ingress is the subject: names
// become the numbers of its own ports.
func (s *Set) addRule(ref RuleRef, r *Rule, own []identity.NamedPort) {
	n := numbered{Rule: r, number: uint32(len(s.Rules))}
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
		maps.Equal(s.Entries, o.Entries) && slices.Equal(s.Rules, o.Rules)
}

// WithSet returns the entries under the number of a set.
func (s Set) WithSet(id uint32) map[abi.PolicyKey]abi.Policy { return withSet(s.Entries, id) }

func withSet(entries map[abi.PolicyKey]abi.Policy, id uint32) map[abi.PolicyKey]abi.Policy {
	out := make(map[abi.PolicyKey]abi.Policy, len(entries))
	for k, v := range entries {
		k.Set = id
		out[k] = v
	}
	return out
}

// AddPeer adds the entries of one numeric identity to the set and returns them
// (often none), with 0 in the place of the set's number. They never change
// what the set says of anybody else, so the epoch stays; they must be in the
// kernel before anything is published there under the number.
func (s *Set) AddPeer(n identity.Numeric, p Peer) map[abi.PolicyKey]abi.Policy {
	if n == NoPeer {
		return nil // the wildcard is nobody's number
	}
	t := trie{}
	var named []identity.NamedPort
	for _, r := range s.rules {
		if len(r.names) > 0 && named == nil {
			named = s.ports(p.Identity)
		}
		picked := !r.AnyPeer && s.picks(r.Rule, p)
		if picked {
			t.add(r, uint32(n), r.flags(), r.AnyPort, r.ports)
		}
		if picked || r.AnyPeer {
			for _, name := range r.names {
				t.add(r, uint32(n), r.flags(), false, name.resolve(named))
			}
		}
	}
	if len(t) > 0 {
		// What everybody has to meet is met by this peer too, whatever else
		// allows it.
		for _, r := range s.rules {
			if r.AnyPeer && r.demands() {
				t.add(r, uint32(n), r.flags(), r.AnyPort, r.ports)
			}
		}
	}
	out := t.fold()
	maps.Copy(s.Entries, out)
	return out
}

// picks reports whether the rule names the peer. What is not known is on the
// side that lets less pass.
func (s *Set) picks(r *Rule, p Peer) bool {
	return slices.ContainsFunc(r.Peers, func(x PeerSelector) bool { return x.selects(p, s.facts, r.Action == Deny) })
}

// RemovePeer removes the entries of a numeric identity that nobody bears any
// more and returns their keys, with 0 in the place of the set's number.
func (s *Set) RemovePeer(n identity.Numeric) []abi.PolicyKey {
	if n == NoPeer {
		return nil
	}
	var out []abi.PolicyKey
	for k := range s.Entries {
		if k.Identity == uint32(n) {
			out = append(out, k)
			delete(s.Entries, k)
		}
	}
	return out
}

// compileAny returns the entries that speak of every peer. A rule that names
// peers counts here too, whether somebody it names exists or not: where it
// applies, the peer must be known. So does a rule that names ports: any number
// may turn out to be a peer's port of that name.
func (s *Set) compileAny() map[abi.PolicyKey]abi.Policy {
	t := trie{}
	for _, r := range s.rules {
		switch {
		case r.AnyPeer:
			t.add(r, uint32(abi.IDAny), r.flags(), r.AnyPort, r.ports)
		case len(r.Peers) > 0:
			t.add(r, uint32(abi.IDAny), r.peerFlags(), r.AnyPort, r.ports)
		default:
			continue
		}
		for _, p := range r.names {
			t.add(r, uint32(abi.IDAny), r.peerFlags(), false, []PortRange{AllPorts(p.Proto)})
		}
	}
	return t.fold()
}

// flags are those of an entry for whom the rule names.
func (r *Rule) flags() uint8 {
	switch {
	case r.Action == Deny:
		return uint8(abi.PolicyDeny)
	case r.L7:
		return uint8(abi.PolicyAllow | abi.PolicyL7)
	}
	return uint8(abi.PolicyAllow)
}

// peerFlags are those of an entry for everybody, where the rule names some.
func (r *Rule) peerFlags() uint8 {
	switch {
	case r.Action == Deny:
		return uint8(abi.PolicyPeerDeny)
	case r.demands():
		// Whoever it names fares otherwise than everybody, also where
		// everybody is allowed.
		return uint8(abi.PolicyPeerAllow | abi.PolicyPeerDeny)
	}
	return uint8(abi.PolicyPeerAllow)
}

// demands reports whether the rule allows under conditions.
func (r *Rule) demands() bool {
	return r.Action == Allow && (r.L7 || r.Evidence != identity.EvidenceNone)
}

// trie collects entries before they are folded.
type trie map[abi.PolicyKey]cell

// cell is an entry in the making: its flags, and the first rule behind its
// ALLOW and its DENY (0: none).
type cell struct {
	flags       uint8
	evidence    identity.Evidence // the strongest demand of those that allow
	allow, deny uint32
}

func (c cell) merge(o cell) cell {
	c.flags |= o.flags
	c.evidence = max(c.evidence, o.evidence)
	c.allow = first(c.allow, o.allow)
	c.deny = first(c.deny, o.deny)
	return c
}

// first returns the lower of two rule numbers, of which 0 is none.
func first(a, b uint32) uint32 {
	if a == 0 || b != 0 && b < a {
		return b
	}
	return a
}

// add enters a rule's flag under each prefix that the ports come to, or for
// every port and protocol.
func (t trie) add(r numbered, id uint32, flags uint8, anyPort bool, ports []PortRange) {
	c := cell{flags: flags}
	switch {
	case flags&uint8(abi.PolicyAllow) != 0:
		c.allow, c.evidence = r.number, r.Evidence
	case flags&uint8(abi.PolicyDeny) != 0:
		c.deny = r.number
	}
	key := abi.PolicyKey{Identity: id, Direction: uint8(r.Direction), Prefixlen: uint32(abi.PolicyPrefixAny)}
	if anyPort {
		t[key] = t[key].merge(c)
		return
	}
	for _, p := range ports {
		key.Proto = p.Proto
		for port, n := range prefixes(p.First, p.Last) {
			k := key
			k.Prefixlen = uint32(abi.PolicyPrefixProto) + uint32(n)
			k.Port = [2]uint8{uint8(port >> 8), uint8(port)}
			t[k] = t[k].merge(c)
		}
	}
}

// fold returns the entries, each with what its shorter prefixes say merged in:
// the kernel finds the longest match only.
func (t trie) fold() map[abi.PolicyKey]abi.Policy {
	out := make(map[abi.PolicyKey]abi.Policy, len(t))
	for k, c := range t {
		for n := range shorter(k.Prefixlen) {
			c = c.merge(t[truncate(k, n)])
		}
		e := abi.Policy{Flags: c.flags, Rule: c.allow, Evidence: uint8(c.evidence)}
		if c.flags&uint8(abi.PolicyDeny) != 0 {
			e.Rule = c.deny
		}
		out[k] = e
	}
	return out
}

// shorter yields the prefix lengths below n that an entry can have, longest
// first.
func shorter(n uint32) func(func(uint32) bool) {
	return func(yield func(uint32) bool) {
		for n > uint32(abi.PolicyPrefixProto) {
			n--
			if !yield(n) {
				return
			}
		}
		if n > uint32(abi.PolicyPrefixAny) {
			yield(uint32(abi.PolicyPrefixAny))
		}
	}
}

// truncate returns the key with its prefix cut to n bits.
func truncate(k abi.PolicyKey, n uint32) abi.PolicyKey {
	k.Prefixlen = n
	if n < uint32(abi.PolicyPrefixProto) {
		k.Proto, k.Port = 0, [2]uint8{}
		return k
	}
	port := uint16(k.Port[0])<<8 | uint16(k.Port[1])
	port &= ^uint16(0) << (uint32(abi.PolicyPrefixPort) - n)
	k.Port = [2]uint8{uint8(port >> 8), uint8(port)}
	return k
}

// prefixes yields the fewest prefixes (port, bits) that cover exactly
// first..last: at most 30.
func prefixes(first, last uint16) func(func(uint16, int) bool) {
	return func(yield func(uint16, int) bool) {
		for lo, hi := uint32(first), uint32(last); lo <= hi; {
			// The largest aligned block that begins at lo and ends by hi.
			size := min(bits.TrailingZeros32(lo|1<<16), bits.Len32(hi-lo+1)-1)
			if !yield(uint16(lo), 16-size) {
				return
			}
			lo += 1 << size
		}
	}
}
