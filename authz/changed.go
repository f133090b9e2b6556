package authz

import (
	"cmp"
	"slices"

	"portcullis/identity"
)

// What the repository, which may have no sets, tells them.

// policyChanged says that a policy stands in the place of another; nil: none.
func (x *Sets) policyChanged(old, p *Policy) {
	if x == nil {
		return
	}
	x.version++
	ref := cmp.Or(p, old).Ref
	if old != nil {
		for i := range old.Specs {
			for j := range old.Specs[i].Rules {
				delete(x.keys, &old.Specs[i].Rules[j])
			}
		}
	}
	for s := range x.subjects {
		var now []application
		if p != nil && x.repo.enforcement(s.identity) != EnforceNever {
			now = x.repo.applications(p, s.identity)
		}
		i, _ := slices.BinarySearchFunc(s.applied, ref, func(a application, ref Ref) int { return a.policy.compare(ref) })
		j := i
		for j < len(s.applied) && s.applied[j].policy.Ref == ref {
			j++
		}
		if i < j || len(now) > 0 {
			s.applied = slices.Replace(s.applied, i, j, now...)
			s.makeStale(x.repo.facts)
		}
	}
}

// namespaceChanged says that other labels of a namespace are known than before.
func (x *Sets) namespaceChanged(namespace string, before *facts) {
	if x == nil {
		return
	}
	x.version++
	for n := range x.peersAt[place{kind: atNamespace, value: namespace}] {
		for sel := range x.meeting(x.peers[n]) {
			if sel.namespaces {
				x.see(sel, n, before)
			}
		}
	}
	if x.repo.nsSubjects == 0 {
		return
	}
	for s := range x.subjects {
		if s.identity.Namespace != namespace {
			continue
		}
		if now := x.repo.allApplications(s.identity); !slices.Equal(now, s.applied) {
			s.applied = now
			s.makeStale(before)
		}
	}
}

// factsChanged says that other groups or services are known than before, of
// which the selectors that look at them tell.
func (x *Sets) factsChanged(before *facts, looks func(PeerSelector) bool) {
	if x == nil {
		return
	}
	x.version++
	for _, sel := range x.selections {
		if looks(sel.selector) {
			x.evaluate(sel, before)
		}
	}
}

// portsChanged says that workloads of some identities have other named ports.
func (x *Sets) portsChanged(identities ...identity.Hash) {
	if x == nil {
		return
	}
	x.version++
	for _, h := range identities {
		for n := range x.peersAt[place{kind: atIdentity, value: string(h[:])}] {
			p := x.peers[n]
			for s := range x.subjects {
				if s.stale || !s.set.names {
					continue
				}
				s.set.facts = x.repo.facts
				if !s.set.shape(p, s.set.pick(p.asKnownTo(s))).equal(s.set.peers[n]) {
					s.makeStale(x.repo.facts)
				}
			}
		}
	}
}
