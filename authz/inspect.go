package authz

import "portcullis/identity"

// Selects reports whether the policy speaks of the subject.
func (r *Repository) Selects(p *Policy, subject identity.Identity) bool {
	for i := range p.Specs {
		if selected, _ := r.selects(&p.Specs[i], subject); selected {
			return true
		}
	}
	return false
}

// Speaks reports whether the spec speaks of the subject. sure is false where
// that hangs on namespace labels that are not known: then its denials hold, and
// its rules that allow do not.
func (r *Repository) Speaks(s *Spec, subject identity.Identity) (selected, sure bool) {
	return r.selects(s, subject)
}

// Picks reports whether the selector selects the peer. sure is false where that
// hangs on what is not known: then a rule that denies means the peer, and one
// that allows does not.
func (r *Repository) Picks(s PeerSelector, p Peer) (picked, sure bool) {
	return s.selects(p, r.facts, true), s.selects(p, r.facts, false)
}

// NamedPorts returns the named ports of all bound workloads of an identity, in
// any order.
func (r *Repository) NamedPorts(id identity.Identity) []identity.NamedPort { return r.ports.of(id) }

// Resolve returns the ports that the range means at a called side with these
// named ports: itself unless it is a name.
func (p PortRange) Resolve(named []identity.NamedPort) []PortRange {
	if p.Name == "" {
		return []PortRange{p}
	}
	return p.resolve(named)
}
