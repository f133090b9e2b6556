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

// Meta is what the metadata of an object say.
type Meta struct {
	authz.Ref
	UID    string
	Labels map[string]string
}

// Policy parses what every namespaced Kubernetes object has into a policy with
// its source, then the fields that its kind has, with the policy's name and
// namespace known.
func (d *Document) Policy(kind string, fields func(*authz.Policy) Fields) *authz.Policy {
	return d.policy(authz.Ref{Kind: kind, Namespace: DefaultNamespace}, fields)
}

// ClusterPolicy is Policy for objects that are in no namespace.
func (d *Document) ClusterPolicy(kind string, fields func(*authz.Policy) Fields) *authz.Policy {
	return d.policy(authz.Ref{Kind: kind}, fields)
}

func (d *Document) policy(ref authz.Ref, fields func(*authz.Policy) Fields) *authz.Policy {
	m := d.metadata(ref)
	p := &authz.Policy{Ref: m.Ref, UID: m.UID, Source: d.Source}
	d.Object(fields(p))
	p.NotEnforced, p.NeedsProxy = d.later, d.proxied
	return p
}

// Meta parses the metadata of an object that is in a namespace.
func (d *Document) Meta(kind string) Meta {
	return d.metadata(authz.Ref{Kind: kind, Namespace: DefaultNamespace})
}

// ClusterMeta parses the metadata of an object that is in no namespace.
func (d *Document) ClusterMeta(kind string) Meta { return d.metadata(authz.Ref{Kind: kind}) }

// Object parses the document's fields beside those that every Kubernetes
// object has.
func (d *Document) Object(fields Fields) {
	for _, k := range []string{"apiVersion", "kind", "metadata", "status"} {
		fields[k] = Accept
	}
	d.root.Object(fields)
}

// metadata parses an object's, which is in no namespace if ref names none.
func (d *Document) metadata(ref authz.Ref) Meta {
	meta := Meta{Ref: ref}
	m := d.root.field("metadata")
	if m == nil {
		d.root.Refuse("field metadata is missing")
		return meta
	}
	fields := Fields{
		"name": func(v *Value) { meta.Name, _ = v.ObjectName() },
		"namespace": func(v *Value) {
			if ref.Namespace == "" {
				v.Refuse("a %s is in no namespace: remove it", ref.Kind)
				return
			}
			if s, ok := v.Namespace(); ok {
				meta.Namespace = s
			}
		},
		"uid": func(v *Value) { meta.UID, _ = v.Text() },
		"labels": func(v *Value) {
			v.Each(func(key string, f *Value) {
				if s, ok := f.LabelValue(); ok && f.LabelKey(key) {
					if meta.Labels == nil {
						meta.Labels = map[string]string{}
					}
					meta.Labels[key] = s
				}
			})
		},
	}
	// What kubectl adds, and what speaks of the object rather than of traffic.
	for _, k := range []string{"annotations", "creationTimestamp", "managedFields", "resourceVersion",
		"generation", "generateName", "selfLink", "ownerReferences", "finalizers",
		"deletionTimestamp", "deletionGracePeriodSeconds"} {
		fields[k] = Accept
	}
	if m.Object(fields) {
		m.Require("name")
	}
	return meta
}

// ObjectName returns the name of a Kubernetes object.
func (v *Value) ObjectName() (string, bool) {
	s, ok := v.Text()
	if ok && (len(s) > 253 || !dnsSubdomain.MatchString(s)) {
		v.Refuse("%s is not a name: want lower-case letters, digits, - and .", quote(s))
		return "", false
	}
	return s, ok
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
	if !ok || !v.IsLabelValue(s) {
		return "", false
	}
	return s, true
}

// IsLabelValue reports whether s can be the value of a label; if not, it
// refuses v, where the value stands.
func (v *Value) IsLabelValue(s string) bool {
	if s != "" && !labelName.MatchString(s) {
		v.Refuse("%s is not a label's value: want up to 63 letters, digits, -, _ and ., the first and last a letter or digit", quote(s))
		return false
	}
	return true
}
