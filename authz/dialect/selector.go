package dialect

import (
	"regexp"
	"slices"

	"portcullis/authz"
)

// LabelSelector parses a label selector, whose matchLabels are expressions
// "In" with one value. require is called for each requirement, whose key it
// must check (LabelKey of at) and whose Attribute it must set.
func (v *Value) LabelSelector(require func(at *Value, r authz.Requirement)) {
	v.Object(Fields{
		"matchLabels": func(m *Value) {
			m.Each(func(key string, f *Value) {
				if value, ok := f.LabelValue(); ok {
					require(f, authz.Requirement{Key: key, Operator: authz.In, Values: []string{value}})
				}
			})
		},
		"matchExpressions": func(e *Value) {
			e.List(func(_ int, x *Value) {
				if r, ok := x.expression(); ok {
					require(x.field("key"), r)
				}
			})
		},
	})
}

// expression parses an element of matchExpressions.
func (v *Value) expression() (r authz.Requirement, ok bool) {
	before := len(v.doc.problems)
	values := v
	v.Object(Fields{
		"key": func(f *Value) { r.Key, _ = f.Text() },
		"operator": func(f *Value) {
			s, isText := f.Text()
			if r.Operator, ok = authz.ParseOperator(s); isText && !ok {
				f.Refuse("want In, NotIn, Exists or DoesNotExist")
			}
		},
		"values": func(f *Value) {
			values = f
			f.List(func(_ int, item *Value) {
				if s, ok := item.LabelValue(); ok {
					r.Values = append(r.Values, s)
				}
			})
		},
	})
	v.Require("key")
	v.Require("operator")
	switch {
	case len(v.doc.problems) > before || !ok:
		return r, false
	case r.Operator.TakesValues() && len(r.Values) == 0:
		values.Refuse("this operator wants one value or more")
	case !r.Operator.TakesValues() && len(r.Values) > 0:
		values.Refuse("this operator takes no values: remove them, or use In or NotIn")
	default:
		slices.Sort(r.Values)
		r.Values = slices.Compact(r.Values)
		return r, true
	}
	return r, false
}

// LabelKey reports whether the key of a label is well-formed; if not, it
// refuses v, which stands where the key does.
func (v *Value) LabelKey(key string) bool {
	if !labelKey.MatchString(key) {
		v.Refuse("%s is not a label's key", quote(key))
		return false
	}
	return true
}

var (
	portName   = regexp.MustCompile(`^[a-z0-9]([a-z0-9]|-[a-z0-9]){0,14}$`)
	someLetter = regexp.MustCompile(`[a-z]`)
)

// IsPortName reports whether s can be the name of a container port: an IANA
// service name in small letters.
func IsPortName(s string) bool {
	return len(s) <= 15 && portName.MatchString(s) && someLetter.MatchString(s)
}
