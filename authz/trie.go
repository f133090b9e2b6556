package authz

import (
	"math/bits"

	"portcullis/bpf/abi"
	"portcullis/identity"
)

// demand is what an allow rule asks for beside its peer and port.
type demand struct {
	evidence identity.Evidence
	l7       bool
}

func (d demand) merge(o demand) demand {
	return demand{max(d.evidence, o.evidence), d.l7 || o.l7}
}

// demands reports whether the rule allows under conditions.
func (r *Rule) demands() bool { return r.Action == Allow && r.demand() != demand{} }

func (r *Rule) demand() demand { return demand{r.Evidence, r.L7 != nil} }

// trie collects entries before they are folded.
type trie map[abi.PolicyKey]cell

// cell is an entry in the making: its flags, what those that allow demand (a
// doubtful one without allowing), and the first rule behind its ALLOW and its
// DENY (0: none).
type cell struct {
	flags       uint8
	demand      demand
	peers       demand // of the rules that name peers, in an entry for everybody
	depth       *depth // where l7 is demanded: what is allowed inside the protocol
	allow, deny uint32
}

// cell is the rule's, in an entry for whom it names.
func (r numbered) cell(doubt bool) cell {
	switch {
	case r.Action == Deny:
		return cell{flags: uint8(abi.PolicyDeny), deny: r.number}
	case doubt:
		return cell{demand: r.demand(), depth: r.depth(doubt)}
	}
	return cell{flags: uint8(abi.PolicyAllow), allow: r.number, demand: r.demand(), depth: r.depth(doubt)}
}

// peersCell is the rule's, in an entry for everybody where the rule names some.
func (r numbered) peersCell() cell {
	switch {
	case r.Action == Deny:
		return cell{flags: uint8(abi.PolicyPeerDeny)}
	case r.unsure:
		return cell{peers: r.demand()}
	}
	return cell{flags: uint8(abi.PolicyPeerAllow), peers: r.demand()}
}

func (c cell) merge(o cell) cell {
	c.flags |= o.flags
	c.demand = c.demand.merge(o.demand)
	c.peers = c.peers.merge(o.peers)
	c.depth = c.depth.merge(o.depth)
	c.allow = first(c.allow, o.allow)
	c.deny = first(c.deny, o.deny)
	return c
}

// entry is the cell as the kernel has it; false: it would say nothing.
func (c cell) entry() (abi.Policy, bool) {
	e := abi.Policy{Flags: c.flags, Rule: c.allow}
	switch {
	case c.flags&uint8(abi.PolicyDeny) != 0:
		e.Rule = c.deny
	case c.flags&uint8(abi.PolicyAllow) != 0:
		e.Evidence = uint8(c.demand.evidence)
		if c.demand.l7 {
			e.Flags |= uint8(abi.PolicyL7)
		}
		if c.demand.merge(c.peers) != c.demand {
			// Some fare otherwise than everybody.
			e.Flags |= uint8(abi.PolicyPeerDeny)
		}
	case c.flags&uint8(abi.PolicyPeerAllow) == 0:
		return e, false
	}
	return e, true
}

// first returns the lower of two rule numbers, of which 0 is none.
func first(a, b uint32) uint32 {
	if a == 0 || b != 0 && b < a {
		return b
	}
	return a
}

// add enters a cell under each prefix that the ports come to, or for every
// port and protocol.
func (t trie) add(dir abi.Direction, id uint32, c cell, anyPort bool, ports []PortRange) {
	key := abi.PolicyKey{Identity: id, Direction: uint8(dir), Prefixlen: uint32(abi.PolicyPrefixAny)}
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
// the kernel finds the longest match only. One that says what the next
// shorter one says is left out.
func (t trie) fold() *shape {
	var lengths [abi.PolicyPrefixPort + 1]bool // that there are
	for k := range t {
		lengths[k.Prefixlen] = true
	}
	out := make(map[abi.PolicyKey]abi.Policy, len(t))
	depths := map[abi.PolicyKey]*depth{}
	for k, c := range t {
		for n := range shorter(k.Prefixlen) {
			if lengths[n] {
				c = c.merge(t[truncate(k, n)])
			}
		}
		if e, ok := c.entry(); ok {
			out[k] = e
			if has(e, abi.PolicyL7) {
				depths[k] = c.depth
			}
		}
	}
	var idle []abi.PolicyKey
	for k, e := range out {
		for n := range shorter(k.Prefixlen) {
			if !lengths[n] {
				continue
			}
			if s, ok := out[truncate(k, n)]; ok {
				if s == e && depths[k].equal(depths[truncate(k, n)]) {
					idle = append(idle, k)
				}
				break
			}
		}
	}
	for _, k := range idle {
		delete(out, k)
		delete(depths, k)
	}
	if len(depths) == 0 {
		depths = nil
	}
	return &shape{out, depths}
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
