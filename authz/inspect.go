package authz

import "portcullis/identity"

// Selects reports whether the policy speaks of the subject.
func (r *Repository) Selects(p *Policy, subject identity.Identity) bool {
	selected, _ := r.selects(p, subject)
	return selected
}
