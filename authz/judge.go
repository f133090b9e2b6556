package authz

import (
	"portcullis/bpf/abi"
	"portcullis/identity"
)

// NoPeer is the peer whose identity is not known yet. It is the number that
// nobody bears.
const NoPeer = identity.Numeric(abi.IDAny)

// Lookup returns the entry of a policy map with the longest prefix that covers
// the key, as the kernel's trie does. The key has full length, and 0 in the
// place of the set's number: a lookup in a shared map fills that in.
type Lookup func(abi.PolicyKey) (abi.Policy, bool)

// Decision is what policy says of one packet.
type Decision struct {
	// Verdict is hold where the peer must be known and is not.
	Verdict abi.Verdict
	// NeedsEvidence: the verdict is not the same for every peer.
	NeedsEvidence bool
	// LeastEvidence that the binding of the peer must have, where evidence is
	// needed; none stands for the configured default.
	LeastEvidence identity.Evidence
	// Rule decided; 0: none, the default.
	Rule uint32
}

// Judge decides on a packet of one direction, as the kernel does: by the
// entries alone. port is the called side's (for ICMP: type << 8 | code). Where
// enforce is false, policy has nothing to say and the packet passes.
func Judge(lookup Lookup, enforce bool, dir abi.Direction, peer identity.Numeric, proto uint8, port uint16) Decision {
	if !enforce {
		return Decision{Verdict: abi.VerdictPass}
	}
	key := abi.PolicyKey{
		Prefixlen: uint32(abi.PolicyPrefixPort), Identity: uint32(abi.IDAny),
		Direction: uint8(dir), Proto: proto, Port: [2]uint8{uint8(port >> 8), uint8(port)},
	}
	// A missing entry is the entry with no flags: it drops.
	all, _ := lookup(key)
	switch {
	case has(all, abi.PolicyDeny):
		return Decision{Verdict: abi.VerdictDrop, Rule: all.Rule}
	case has(all, abi.PolicyAllow) && !has(all, abi.PolicyPeerDeny):
		return Decision{Verdict: abi.VerdictPass, Rule: all.Rule}
	case !has(all, abi.PolicyAllow) && !has(all, abi.PolicyPeerAllow):
		return Decision{Verdict: abi.VerdictDrop}
	}
	d := Decision{NeedsEvidence: true}
	if peer == NoPeer {
		d.Verdict = abi.VerdictHold
		return d
	}
	key.Identity = uint32(peer)
	one, _ := lookup(key)
	d.LeastEvidence = identity.Evidence(max(all.Evidence, one.Evidence))
	switch {
	case has(one, abi.PolicyDeny):
		d.Verdict, d.Rule = abi.VerdictDrop, one.Rule
	case has(one, abi.PolicyAllow):
		d.Verdict, d.Rule = abi.VerdictPass, one.Rule
	case has(all, abi.PolicyAllow):
		d.Verdict, d.Rule = abi.VerdictPass, all.Rule
	default:
		d.Verdict = abi.VerdictDrop
	}
	return d
}

func has(p abi.Policy, f abi.PolicyFlag) bool { return p.Flags&uint8(f) != 0 }

// Lookup is the kernel's lookup in the set's own entries.
func (s Set) Lookup(k abi.PolicyKey) (abi.Policy, bool) {
	k.Set = 0
	if e, ok := s.Entries[k]; ok {
		return e, true
	}
	for n := range shorter(k.Prefixlen) {
		if e, ok := s.Entries[truncate(k, n)]; ok {
			return e, true
		}
	}
	return abi.Policy{}, false
}

// Judge decides on a packet by the set's own entries.
func (s Set) Judge(dir abi.Direction, peer identity.Numeric, proto uint8, port uint16) Decision {
	return Judge(s.Lookup, s.Enforce(dir), dir, peer, proto, port)
}
