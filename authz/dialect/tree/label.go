package tree

import (
	"slices"
	"strings"

	"portcullis/authz"
	"portcullis/authz/dialect"
	"portcullis/identity"
)

// label is one label of coverage, allow or requires.
type label struct {
	reserved    string // the NAME of reserved:NAME, or
	requirement authz.Requirement
	denied      bool // it has a ! in front
}

// sources are those that a label of a workload can be written with. It is not
// looked at: a workload has each key once.
var sources = []string{"any", "cilium", "container", "k8s"}

// parseLabel parses [SOURCE:]KEY[=VALUE], with a ! in front where mayDeny, or
// an object of the three. A key without a value means any value, or none.
func parseLabel(v *dialect.Value, path string, mayDeny bool) (l label, ok bool) {
	var source, key, value string
	var hasValue bool
	if v.IsObject() {
		v.Object(dialect.Fields{
			"source": func(f *dialect.Value) { source, _ = f.Text() },
			"key":    func(f *dialect.Value) { key, _ = f.Text() },
			"value": func(f *dialect.Value) {
				value, _ = f.Text()
				hasValue = value != ""
			},
		})
		v.Require("key")
		if key == "" {
			return l, false
		}
	} else {
		s, isText := v.Text()
		if !isText {
			return l, false
		}
		if mayDeny {
			s, l.denied = strings.CutPrefix(s, "!")
		}
		key, value, hasValue = strings.Cut(s, "=")
		if before, after, has := strings.Cut(key, ":"); has {
			source, key = before, after
		}
	}
	switch {
	case source == "reserved":
		l.reserved = key
		if _, known := identity.Reserved(key); hasValue || key != "all" && !known {
			v.Refuse("there is no such reserved label: want reserved:host, reserved:world or reserved:all")
			return l, false
		}
		return l, true
	case source != "" && !slices.Contains(sources, source):
		v.Refuse("the label's source is not known: want reserved:, any:, cilium:, container: or k8s:, or none")
		return l, false
	case key == identity.NamespaceLabel:
		l.requirement = authz.Requirement{Attribute: authz.Namespace, Operator: authz.Exists}
		ok = !hasValue || v.IsNamespace(value)
	case strings.HasPrefix(key, "$"):
		v.Refuse("this was written so in 2016: write reserved:%s", strings.TrimPrefix(key, "$"))
		return l, false
	case strings.HasPrefix(key, "io.cilium"):
		v.Refuse("no workload has a label with this key here: write one of its own labels")
		return l, false
	default:
		key, ok = resolve(key, path)
		if !ok {
			v.Refuse("the label is above the root of the tree: remove a ../")
			return l, false
		}
		l.requirement = authz.Requirement{Attribute: authz.PodLabel, Key: key, Operator: authz.Exists}
		ok = v.LabelKey(key) && v.IsLabelValue(value)
	}
	if hasValue {
		l.requirement.Operator, l.requirement.Values = authz.In, []string{value}
	}
	return l, ok
}

// resolve returns a label's key: relative to the node's path, above it (../),
// or from the root (root.).
func resolve(key, path string) (string, bool) {
	if absolute, ok := strings.CutPrefix(key, root+"."); ok {
		return absolute, true
	}
	for strings.HasPrefix(key, "../") {
		up := strings.LastIndexByte(path, '.')
		if up < 0 {
			return "", false
		}
		key, path = key[len("../"):], path[:up]
	}
	if below, ok := strings.CutPrefix(path, root+"."); ok {
		key = below + "." + key
	}
	return key, true
}
