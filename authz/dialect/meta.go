package dialect

import (
	"regexp"

	"portcullis/authz"
)

// DefaultNamespace is that of an object that names none.
const DefaultNamespace = "default"

var (
	dnsLabel     = regexp.MustCompile(`^[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?$`)
	dnsSubdomain = regexp.MustCompile(`^[a-z0-9]([-a-z0-9]*[a-z0-9])?(\.[a-z0-9]([-a-z0-9]*[a-z0-9])?)*$`)
	labelName    = regexp.MustCompile(`^[A-Za-z0-9]([-A-Za-z0-9_.]{0,61}[A-Za-z0-9])?$`)
	labelKey     = regexp.MustCompile(`^(([a-z0-9]([-a-z0-9.]{0,251}[a-z0-9])?)/)?[A-Za-z0-9]([-A-Za-z0-9_.]{0,61}[A-Za-z0-9])?$`)
)

// Policy parses what every namespaced Kubernetes object has into a policy with
// its source, then the fields that its kind has, with the policy's name and
// namespace known.
func (d *Document) Policy(kind string, fields func(*authz.Policy) Fields) *authz.Policy {
	p := &authz.Policy{Ref: authz.Ref{Kind: kind, Namespace: DefaultNamespace}, Source: d.Source}
	if m := d.root.fields["metadata"]; m != nil {
		d.metadata(m, p)
	} else {
		d.root.Refuse("field metadata is missing")
	}
	all := fields(p)
	for _, k := range []string{"apiVersion", "kind", "metadata", "status"} {
		all[k] = Accept
	}
	d.root.Object(all)
	return p
}

func (d *Document) metadata(m *Value, p *authz.Policy) {
	fields := Fields{
		"name": func(v *Value) {
			if s, ok := v.Text(); ok {
				if len(s) > 253 || !dnsSubdomain.MatchString(s) {
					v.Refuse("%s is not a name: want lower-case letters, digits, - and .", quote(s))
				}
				p.Name = s
			}
		},
		"namespace": func(v *Value) {
			if s, ok := v.Namespace(); ok {
				p.Namespace = s
			}
		},
		"uid": func(v *Value) {
			if s, ok := v.Text(); ok {
				p.UID = s
			}
		},
	}
	// What kubectl adds, and what speaks of the object rather than of traffic.
	for _, k := range []string{"labels", "annotations", "creationTimestamp", "managedFields", "resourceVersion",
		"generation", "selfLink", "ownerReferences", "finalizers"} {
		fields[k] = Accept
	}
	if m.Object(fields) {
		m.Require("name")
	}
}

// Namespace returns the name of a namespace.
func (v *Value) Namespace() (string, bool) {
	s, ok := v.Text()
	return s, ok && v.IsNamespace(s)
}

// IsNamespace reports whether s can be the name of a namespace; if not, it
// refuses v, where the name stands.
func (v *Value) IsNamespace(s string) bool {
	if !dnsLabel.MatchString(s) {
		v.Refuse("%s is not the name of a namespace: want lower-case letters, digits and -", quote(s))
		return false
	}
	return true
}

// LabelValue returns the value of a label.
func (v *Value) LabelValue() (string, bool) {
	s, ok := v.Text()
	if ok && s != "" && !labelName.MatchString(s) {
		v.Refuse("%s is not a label's value: want up to 63 letters, digits, -, _ and ., the first and last a letter or digit", quote(s))
		return "", false
	}
	return s, ok
}
