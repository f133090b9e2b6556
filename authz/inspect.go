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
