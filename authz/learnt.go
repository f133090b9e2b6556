package authz

import (
	"maps"
	"net/netip"
	"slices"

	"portcullis/bpf/abi"
	"portcullis/identity"
)

// What a workload was told by DNS is said of that workload alone: a selection by
// DNS names belongs to one subject, and meets those of its addresses that have a
// number of their own, as world.
//
//	toFQDNs of a rule --one selection for each subject--> numbers of single addresses
//	                                ^
//	Learn(subject, address, names) -'  costs that subject's selections by names
//
// An address in a known range has no such number, and one with a binding is not
// world, so no name makes anybody a workload or a node (I5).

// single returns the address at which the peer is seen, if it is one.
func (p Peer) single() (netip.Addr, bool) {
	return p.Block.Addr(), p.isWorld() && p.Block.IsValid() && p.Block.IsSingleIP()
}

// asKnownTo returns the peer with the names that the subject knows it by, beside
// those that everybody does.
func (p Peer) asKnownTo(s *Subject) Peer {
	if ip, ok := p.single(); ok && len(s.learnt[ip]) > 0 {
		p.Names = slices.Concat(p.Names, s.learnt[ip])
	}
	return p
}

// Learn says by which names (lower case, no final dot) a subject knows an
// address from now on; none: it does not any more. What that changes in its set
// in force is returned: what to add must be in the kernel before the subject
// hears of the address. Numbers that it has none of yet are entered by AddPeer,
// which looks at what was learnt. Where an entry changes that was there before,
// the subject is stale besides, for established flows have to be judged again.
func (x *Sets) Learn(s *Subject, ip netip.Addr, names []string) (out Delta) {
	out.Subject = s
	if slices.Equal(s.learnt[ip], names) {
		return out
	}
	if len(names) == 0 {
		delete(s.learnt, ip)
	} else {
		if s.learnt == nil {
			s.learnt = map[netip.Addr][]string{}
		}
		s.learnt[ip] = slices.Clone(names)
	}
	if len(s.named) == 0 {
		return out
	}
	for n := range x.singles[ip] {
		changed := false
		for sel := range s.named {
			wasSure, wasMaybe := sel.of(n)
			if sure, maybe := x.meets(sel, n); sure != wasSure || maybe != wasMaybe {
				sel.put(n, sure, maybe)
				changed = true
			}
		}
		if changed {
			x.reenter(s, n, &out)
		}
	}
	return out
}

// reenter makes the entries of a peer in a set in force anew.
func (x *Sets) reenter(s *Subject, n identity.Numeric, out *Delta) {
	x.version++
	if s.stale || s.set.compiled == nil {
		s.stale = true // what it is to mean comes with the next set
		return
	}
	before := maps.Clone(s.set.peers[n].all())
	p := x.peers[n]
	var picks []pick
	for sel := range x.meeting(p) {
		sure, maybe := sel.of(n)
		for _, rule := range s.set.bySelection[sel] {
			if pk, ok := s.set.picked(rule, sure, maybe); ok {
				picks = addPick(picks, pk)
			}
		}
	}
	now := s.set.enter(n, p, picks)
	for k := range before {
		was := before[k]
		k.Identity = uint32(n)
		is, still := now[k]
		switch {
		case !still:
			out.Remove = append(out.Remove, k)
		case is != was:
			s.makeStale(x.repo.facts)
		}
	}
	if len(now) > 0 && out.Add == nil {
		out.Add = map[abi.PolicyKey]abi.Policy{}
	}
	maps.Copy(out.Add, now)
}

// meets returns how a selection sees a number.
func (x *Sets) meets(sel *selection, n identity.Numeric) (sure, maybe bool) {
	p := x.peers[n]
	if sel.subject != nil {
		p = p.asKnownTo(sel.subject)
	}
	return sel.meets(p, x.repo.facts)
}

// Distrust makes a subject stale: the kernel may not have what its set in force
// says.
func (x *Sets) Distrust(s *Subject) { s.makeStale(x.repo.facts) }

// Wants reports whether a rule of the subject's set in force speaks of a name.
func (s *Subject) Wants(name string) bool {
	for sel := range s.named {
		if n, ok := sel.selector.(DNSName); ok && n.Matches(name) {
			return true
		}
	}
	return false
}

// noteNames keeps the books of numbers that names may be of: those of single
// addresses, and those with names that everybody knows.
func (x *Sets) noteNames(n identity.Numeric, p Peer, there bool) {
	if delete(x.public, n); there && len(p.Names) > 0 {
		x.public[n] = struct{}{}
	}
	ip, ok := p.single()
	switch {
	case !ok:
	case there:
		if x.singles[ip] == nil {
			x.singles[ip] = numbers{}
		}
		x.singles[ip][n] = struct{}{}
	default:
		if delete(x.singles[ip], n); len(x.singles[ip]) == 0 {
			delete(x.singles, ip)
		}
	}
}

// evaluateNames looks at every peer that a selection by names can meet.
func (x *Sets) evaluateNames(sel *selection, before *facts) {
	for n := range x.public {
		x.see(sel, n, before)
	}
	for ip := range sel.subject.learnt {
		for n := range x.singles[ip] {
			x.see(sel, n, before)
		}
	}
}
