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
	// LeastEvidence that the peer's binding must have for a pass that needs
	// evidence; none stands for the configured default. A weaker binding's
	// packet is dropped all the same (evidence-too-weak).
	LeastEvidence identity.Evidence
	// L7: it passes as far as rules inside the protocol allow.
	L7 bool
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
	d := Decision{Rule: all.Rule}
	switch {
	case has(all, abi.PolicyDeny):
		return d
	case has(all, abi.PolicyAllow) && !has(all, abi.PolicyPeerDeny) && all.Evidence == 0:
		d.Verdict, d.L7 = abi.VerdictPass, has(all, abi.PolicyL7)
		return d
	case !has(all, abi.PolicyAllow) && !has(all, abi.PolicyPeerAllow):
		return d
	}
	d.NeedsEvidence = true
	if peer == NoPeer {
		d.Verdict = abi.VerdictHold
		return d
	}
	key.Identity = uint32(peer)
	one, _ := lookup(key)
	switch {
	case has(one, abi.PolicyDeny):
		d.Rule = one.Rule
	case has(one, abi.PolicyAllow):
		d.Verdict, d.Rule, d.LeastEvidence, d.L7 = abi.VerdictPass, one.Rule, identity.Evidence(one.Evidence), has(one, abi.PolicyL7)
	case has(all, abi.PolicyAllow):
		d.Verdict, d.LeastEvidence, d.L7 = abi.VerdictPass, identity.Evidence(all.Evidence), has(all, abi.PolicyL7)
	}
	return d
}

func has(p abi.Policy, f abi.PolicyFlag) bool { return p.Flags&uint8(f) != 0 }

// Lookup is the kernel's lookup in the set's own entries.
func (s Set) Lookup(k abi.PolicyKey) (abi.Policy, bool) {
	if s.compiled == nil {
		return abi.Policy{}, false
	}
	entries := s.any.all()
	k.Set = 0
	if k.Identity != uint32(abi.IDAny) {
		entries = s.peers[identity.Numeric(k.Identity)].all()
		k.Identity = 0
	}
	if e, ok := entries[k]; ok {
		return e, true
	}
	for n := range shorter(k.Prefixlen) {
		if e, ok := entries[truncate(k, n)]; ok {
			return e, true
		}
	}
	return abi.Policy{}, false
}

// Judge decides on a packet by the set's own entries, and by LocalHost.
func (s Set) Judge(dir abi.Direction, peer identity.Numeric, proto uint8, port uint16) Decision {
	d := Judge(s.Lookup, s.Enforce(dir), dir, peer, proto, port)
	if s.LocalHost && dir == abi.DirIngress && s.isHost(peer) && !s.denies(peer, proto, port) {
		if d.Verdict != abi.VerdictPass {
			d.Rule = 0
		}
		d.Verdict, d.NeedsEvidence, d.LeastEvidence = abi.VerdictPass, false, identity.EvidenceNone
	}
	return d
}

// isHost reports whether the number is the subject's own node's.
func (s Set) isHost(n identity.Numeric) bool {
	if n == identity.NumHost || s.compiled == nil {
		return n == identity.NumHost
	}
	_, ok := s.hosts[n]
	return ok
}

// denies reports whether a rule denies the packet on ingress, rather than
// leaving it without one that allows it.
func (s Set) denies(peer identity.Numeric, proto uint8, port uint16) bool {
	key := abi.PolicyKey{
		Prefixlen: uint32(abi.PolicyPrefixPort), Identity: uint32(abi.IDAny),
		Direction: uint8(abi.DirIngress), Proto: proto, Port: [2]uint8{uint8(port >> 8), uint8(port)},
	}
	all, _ := s.Lookup(key)
	key.Identity = uint32(peer)
	one, _ := s.Lookup(key)
	return has(all, abi.PolicyDeny) || has(one, abi.PolicyDeny)
}
