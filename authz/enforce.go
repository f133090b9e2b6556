package authz

import (
	"fmt"
	"slices"

	"portcullis/identity"
)

// Enforcement is how far policy is enforced on a subject.
type Enforcement uint8

// The kinds of enforcement.
const (
	// EnforceDefault: as the policies say; a subject that none of them
	// selects is not under policy.
	EnforceDefault Enforcement = iota
	// EnforceAlways: every subject is under default deny in both directions,
	// whether a policy selects it or not.
	EnforceAlways
	// EnforceNever: no subject is under policy.
	EnforceNever
	// EnforceAudit: as default, but what policy denies is recorded and passes.
	EnforceAudit
)

var enforcements = []string{"default", "always", "never", "audit"}

// ParseEnforcement returns the enforcement of that name.
func ParseEnforcement(s string) (Enforcement, error) {
	i := slices.Index(enforcements, s)
	if i < 0 {
		return EnforceDefault, fmt.Errorf("%q is not a kind of enforcement: want one of %v", s, enforcements)
	}
	return Enforcement(i), nil
}

// String returns the name.
func (e Enforcement) String() string {
	if int(e) < len(enforcements) {
		return enforcements[e]
	}
	return fmt.Sprintf("Enforcement(%d)", uint8(e))
}

// MarshalText implements encoding.TextMarshaler.
func (e Enforcement) MarshalText() ([]byte, error) { return []byte(e.String()), nil }

// UnmarshalText implements encoding.TextUnmarshaler.
func (e *Enforcement) UnmarshalText(b []byte) (err error) {
	*e, err = ParseEnforcement(string(b))
	return err
}

// enforcement is the subject's: its namespace's, or else the general one.
func (r *Repository) enforcement(subject identity.Identity) Enforcement {
	if e, ok := r.opts.EnforceIn[subject.Namespace]; ok {
		return e
	}
	return r.opts.Enforce
}
