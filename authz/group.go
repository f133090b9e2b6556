package authz

import (
	"iter"
	"net/netip"
	"slices"
)

// Group is a named group of blocks of addresses, which policies can speak of
// (BlockGroup). It becomes known by Repository.SetBlockGroup.
type Group struct {
	Ref
	UID    string // of the object in its API server; may be empty
	Source string // the document, verbatim
	Labels map[string]string
	Blocks []netip.Prefix // masked
}

// GroupNames yields the names of groups that rules of the policy name, and what
// each of the rules does.
func (p *Policy) GroupNames() iter.Seq2[string, Action] {
	return func(yield func(string, Action) bool) {
		for _, s := range p.Specs {
			for _, r := range s.Rules {
				for _, x := range r.Peers {
					if b, ok := innermost(x).(BlockGroup); ok && b.Name != "" && !yield(b.Name, r.Action) {
						return
					}
				}
			}
		}
	}
}

// Names reports whether a rule of the policy speaks of the group.
func (p *Policy) Names(g *Group) bool {
	return slices.ContainsFunc(p.Specs, func(s Spec) bool {
		return slices.ContainsFunc(s.Rules, func(r Rule) bool {
			return slices.ContainsFunc(r.Peers, func(x PeerSelector) bool {
				b, ok := x.(BlockGroup)
				return ok && (b.Name == g.Name || b.Name == "" && b.Labels.meets(labelsOf(g.Labels)))
			})
		})
	})
}
