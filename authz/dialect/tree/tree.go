package tree

import (
	"regexp"
	"strings"

	"portcullis/authz"
	"portcullis/authz/dialect"
	"portcullis/bpf/abi"
)

// Kind is the kind of the policies that this package makes. They are in no
// namespace, and their name is the path of the tree's node.
const Kind = "PolicyTree"

// Dialect is this package's, for dialect.ParseFile.
var Dialect = dialect.Dialect{Kind: Kind, Is: isTree, Parse: Parse}

// isTree reports whether the object looks like a node of a tree.
func isTree(v *dialect.Value) bool { return v.Has("rules") || v.Has("children") }

// root is the name, and the path, of the node above all.
const root = "root"

// Parse parses one tree. It returns the policy or every problem.
func Parse(doc *dialect.Document) (dialect.Result, []authz.Problem) {
	p := &authz.Policy{Ref: authz.Ref{Kind: Kind, Name: root}, Source: doc.Source}
	t := tree{policy: p}
	top := doc.Root()
	if name := top.Field("name"); name != nil {
		if s, ok := name.Text(); ok {
			if p.Name = topPath(s); p.Name == "" {
				name.Refuse("want root, the name of a child of it, or a path as in root.empire")
			}
		}
	}
	t.node(top, p.Name, dialect.Accept)
	t.checkAlways()
	if bad := doc.Problems(); len(bad) > 0 {
		return dialect.Result{}, bad
	}
	p.NotEnforced, p.NeedsProxy = doc.NotEnforced(), doc.NeedsProxy()
	return dialect.Result{Policies: []*authz.Policy{p}}, nil
}

var nodeName = regexp.MustCompile(`^[A-Za-z0-9]([-A-Za-z0-9_]{0,61}[A-Za-z0-9])?$`)

// maxPath bounds a path, as it does a label's key.
const maxPath = 253

// topPath returns the path of a tree's uppermost node, by its name; or "".
func topPath(name string) string {
	names := strings.Split(name, ".")
	if names[0] != root {
		if len(names) > 1 {
			return ""
		}
		names = []string{root, name}
	}
	for _, n := range names {
		if !nodeName.MatchString(n) {
			return ""
		}
	}
	if path := strings.Join(names, "."); len(path) <= maxPath {
		return path
	}
	return ""
}

// tree is a tree that is being parsed.
type tree struct {
	policy *authz.Policy
	always []*dialect.Value // what says always-accept
	denies bool             // something denies or requires
}

// node parses a node and those below it.
func (t *tree) node(v *dialect.Value, path string, name func(*dialect.Value)) {
	v.Object(dialect.Fields{
		"name": name,
		"rules": func(rules *dialect.Value) {
			rules.List(func(_ int, r *dialect.Value) { t.rule(r, path) })
		},
		"children": func(children *dialect.Value) {
			children.Each(func(key string, child *dialect.Value) {
				below := path + "." + key
				if !nodeName.MatchString(key) || len(below) > maxPath {
					child.Refuse("want the name of a node: up to 63 letters, digits, - and _, and %d for the whole path", maxPath)
					return
				}
				t.node(child, below, func(name *dialect.Value) {
					if s, ok := name.Text(); ok && s != key && s != below {
						name.Refuse("its key in children is another: %s", key)
					}
				})
			})
		},
	})
}

// rule parses one rule: whom it covers, and one of the four things that it can
// say of them.
func (t *tree) rule(v *dialect.Value, path string) {
	var s authz.Spec
	covered, said := false, 0
	if c := v.Field("coverage"); c != nil {
		s.Subject, covered = t.coverage(c, path)
	}
	says := func(f func(*authz.Spec, *dialect.Value, string)) func(*dialect.Value) {
		return func(v *dialect.Value) {
			said++
			f(&s, v, path)
		}
	}
	v.Object(dialect.Fields{
		"coverage":     dialect.Accept, // above
		"allow":        says(t.allow),
		"always-allow": says(t.alwaysAllow),
		"requires":     says(t.requires),
		"l4":           says(t.l4),
	})
	switch {
	case !v.IsObject():
		return
	case said != 1:
		v.Refuse("want allow, always-allow, requires or l4, one of them: write a rule for each")
	case covered:
	case path != root:
		v.Refuse("coverage is missing: name the labels of the workloads that the rule covers")
	case v.Has("requires"):
		v.Refuse("coverage is missing: a requires without it says nothing")
	}
	t.policy.Specs = append(t.policy.Specs, s)
}

// coverage parses labels, all of which the subjects have. covered tells that
// there are some.
func (t *tree) coverage(v *dialect.Value, path string) (s authz.Selector, covered bool) {
	v.List(func(_ int, l *dialect.Value) {
		covered = true
		switch label, ok := parseLabel(l, path, false); {
		case !ok || label.reserved == "all":
		case label.reserved != "":
			l.Refuse("policies speak of workloads, and what has this label is none: protect it by other means")
		case label.requirement.Attribute == authz.PodLabel && !within(label.requirement.Key, path):
			l.Refuse("the label is not below the node, which is at %s: move the rule to the root, or write a label that begins with %s", path, root+".")
		default:
			s = append(s, label.requirement)
		}
	})
	return s, covered
}

// within reports whether a label's key is the path of a node, or below it.
func within(key, path string) bool {
	key = root + "." + key
	return key == path || strings.HasPrefix(key, path+".")
}

// allow parses the peers that may reach the subjects, and whom not.
func (t *tree) allow(s *authz.Spec, v *dialect.Value, path string) {
	s.DenyIngress = true
	v.List(func(_ int, e *dialect.Value) {
		if r, ok := t.allowRule(e, path); ok {
			s.Rules = append(s.Rules, r)
		}
	})
}

// alwaysAllow is allow, where to accept is to do so always.
func (t *tree) alwaysAllow(s *authz.Spec, v *dialect.Value, path string) {
	t.always = append(t.always, v)
	t.allow(s, v, path)
}

// allowRule parses one element: a label, or a label with an action.
func (t *tree) allowRule(v *dialect.Value, path string) (authz.Rule, bool) {
	r := authz.Rule{Direction: abi.DirIngress, Action: authz.Allow, AnyPort: true, Path: v.RulePath()}
	var labels []label
	add := func(l label, ok bool) {
		if ok {
			labels = append(labels, l)
		}
	}
	if !v.IsObject() || v.Has("key") {
		l, ok := parseLabel(v, path, true)
		add(l, ok)
		if l.denied {
			r.Action = authz.Deny
		}
	} else {
		v.Object(dialect.Fields{
			"action": func(a *dialect.Value) { r.Action = t.action(a) },
			"label":  func(f *dialect.Value) { add(parseLabel(f, path, false)) },
			"matchLabels": func(f *dialect.Value) {
				f.List(func(_ int, f *dialect.Value) { add(parseLabel(f, path, false)) })
			},
		})
		if v.Has("label") == v.Has("matchLabels") {
			v.Refuse("want a label, or several in matchLabels")
		}
	}
	if len(labels) == 0 {
		if l := v.Field("matchLabels"); l != nil && l.Len() == 0 {
			l.Refuse("it names nobody: write one label or more")
		}
		return r, false
	}
	r.AnyPeer, r.Peers = peers(v, labels)
	if r.Action == authz.Deny {
		t.denies = true
		for _, l := range labels {
			if l.reserved != "" && !knownEntities[l.reserved] {
				v.NotEnforced("who is %s is not known yet, so it cannot be denied", l.reserved)
			}
		}
	}
	return r, true
}

// knownEntities are the reserved labels whose bearers the datapath knows.
var knownEntities = map[string]bool{"all": true, "host": true, "remote-node": true, "world": true}

func (t *tree) action(v *dialect.Value) authz.Action {
	switch s, ok := v.Text(); {
	case !ok, s == "accept":
	case s == "always-accept":
		t.always = append(t.always, v)
	case s == "deny":
		return authz.Deny
	default:
		v.Refuse("want accept, always-accept or deny")
	}
	return authz.Allow
}

// peers returns who has all of the labels.
func peers(v *dialect.Value, labels []label) (anybody bool, _ []authz.PeerSelector) {
	var s authz.Selector
	var entity string
	for _, l := range labels {
		switch {
		case l.reserved == "all":
		case l.reserved != "":
			if entity != "" || len(labels) > 1 {
				v.Refuse("nobody has a reserved: label and others: write an element for each")
			}
			entity = l.reserved
		default:
			s = append(s, l.requirement)
		}
	}
	switch {
	case entity != "":
		return false, []authz.PeerSelector{authz.Entities{entity}}
	case len(s) == 0:
		return true, nil
	}
	return false, []authz.PeerSelector{s}
}

// requires parses labels, all of which a peer must have: who has not is denied.
func (t *tree) requires(s *authz.Spec, v *dialect.Value, path string) {
	s.DenyIngress, t.denies = true, true
	r := authz.Rule{Direction: abi.DirIngress, Action: authz.Deny, AnyPort: true, Path: v.RulePath()}
	var of authz.Selector
	v.List(func(_ int, l *dialect.Value) {
		switch label, ok := parseLabel(l, path, false); {
		case !ok:
		case label.reserved == "all":
			l.Refuse("nobody has this label: remove it")
		case label.reserved != "":
			r.Peers = append(r.Peers, authz.AllBut{PeerSelector: authz.Entities{label.reserved}})
		default:
			of = append(of, label.requirement)
		}
	})
	if v.IsList() && v.Len() == 0 {
		v.Refuse("it requires nothing: write one label or more, or remove the rule")
	}
	if len(of) > 0 {
		r.Peers = append(r.Peers, authz.AllBut{PeerSelector: of})
	}
	s.Rules = append(s.Rules, r)
}

// checkAlways refuses always-accept where it is not the same as accept: it goes
// before what denies further down in the tree, and nothing does here.
func (t *tree) checkAlways() {
	if !t.denies {
		return
	}
	for _, v := range t.always {
		v.Refuse("not supported in a tree in which something is denied or required: nothing goes before that here; write accept, and deny less")
	}
}
