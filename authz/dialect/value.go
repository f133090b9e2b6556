package dialect

import (
	"fmt"
	"regexp"
	"regexp/syntax"
	"strconv"

	"portcullis/authz"
)

// Document is one document of a file, while it is being parsed.
type Document struct {
	File   string
	Index  int    // in the file, from 1
	Line   int    // of its first line, from 1
	Source string // verbatim

	root     *Value
	problems []authz.Problem
	later    []authz.Problem
	proxied  []authz.Problem
	values   int
	patterns int  // bytes of regular expressions so far
	anchors  bool // there may be some, so nodes may be read twice
}

// Root returns the document's value.
func (d *Document) Root() *Value { return d.root }

// Problems returns what has been refused so far.
func (d *Document) Problems() []authz.Problem { return d.problems }

// NotEnforced returns what Value.NotEnforced has recorded so far.
func (d *Document) NotEnforced() []authz.Problem { return d.later }

// NeedsProxy returns what Value.NeedsProxy has recorded so far.
func (d *Document) NeedsProxy() []authz.Problem { return d.proxied }

// Value is one value of a document. It knows where it stands.
type Value struct {
	Line int // in the file

	doc    *Document
	parent *Value // nil: the root
	key    string // in a parent that is a map
	index  int    // in a parent that is a list
	tag    string // !!map, !!seq, !!str, !!int, ...
	scalar string
	object bool              // a map
	items  []*Value          // of a map: its fields, in order
	byKey  map[string]*Value // of a large map
}

// simpleKey is a key that needs no quotes in a path.
var simpleKey = regexp.MustCompile(`^[A-Za-z0-9_-]{1,64}$`)

// Path returns where the value stands in its file's document, as in
// spec.ingress[0].toPorts or, in a list, items[2].spec; of the root, "".
func (v *Value) Path() string { return v.path(nil) }

// RulePath returns where the value stands in its own document, which is how
// rules are named: other than Path it leaves out the list that the document is
// an item of, for its source does.
func (v *Value) RulePath() string { return v.path(v.doc.root) }

func (v *Value) path(root *Value) string {
	if v.parent == nil || v == root {
		return ""
	}
	path := v.parent.path(root)
	switch {
	case v.parent.tag == "!!seq":
		return path + "[" + strconv.Itoa(v.index) + "]"
	case !simpleKey.MatchString(v.key):
		return path + "[" + quote(v.key) + "]"
	case path == "":
		return v.key
	default:
		return path + "." + v.key
	}
}

// quote quotes foreign text for a message, cut to a length for people.
func quote(s string) string {
	const most = 80
	if r := []rune(s); len(r) > most {
		s = string(r[:most]) + "..."
	}
	return strconv.Quote(s)
}

func (v *Value) problem(format string, args ...any) authz.Problem {
	return authz.Problem{File: v.doc.File, Document: v.doc.Index, Line: v.Line, Path: v.Path(), Message: fmt.Sprintf(format, args...)}
}

// Refuse records a problem with the value. The message says what is wrong and
// what to do.
func (v *Value) Refuse(format string, args ...any) {
	if len(v.doc.problems) <= maxProblems {
		v.doc.problems = append(v.doc.problems, v.problem(format, args...))
	}
}

// Fine reports whether nothing has been refused in the document so far.
func (v *Value) Fine() bool { return len(v.doc.problems) == 0 }

// NotEnforced records that what the value says can be judged, but has no
// datapath yet. The message says why, and what to do instead.
func (v *Value) NotEnforced(format string, args ...any) {
	if len(v.doc.later) <= maxProblems {
		v.doc.later = append(v.doc.later, v.problem("not enforced yet: "+format, args...))
	}
}

// NeedsProxy records that what the value says is judged by a proxy. The message
// says what to do where there is none.
func (v *Value) NeedsProxy(format string, args ...any) {
	if len(v.doc.proxied) <= maxProblems {
		v.doc.proxied = append(v.doc.proxied, v.problem("it needs a proxy, and there is none: "+format, args...))
	}
}

func (v *Value) isMap() bool { return v.tag == "!!map" && v.object }

// fewFields are found by looking at each: most objects have so few, and a map
// of their own would cost more than they do.
const fewFields = 8

// field returns the field of a map, or nil.
func (v *Value) field(key string) *Value {
	if v.byKey != nil {
		return v.byKey[key]
	}
	if v.object {
		for _, f := range v.items {
			if f.key == key {
				return f
			}
		}
	}
	return nil
}

// text returns the string in a field of a map, or "".
func (v *Value) text(key string) string {
	if f := v.field(key); f != nil && f.tag == "!!str" {
		return f.scalar
	}
	return ""
}

// Fields are the fields that an object may have, and what to do with each.
type Fields map[string]func(*Value)

// Accept takes a field that says nothing to policy.
func Accept(*Value) {}

// NotYet refuses a field of the dialect that Portcullis does not obey yet;
// instead says what can be done.
func NotYet(instead string) func(*Value) {
	return func(v *Value) {
		v.Refuse("not supported yet: %s", instead)
	}
}

// Object visits the fields of an object in the order of the file. A field that
// fields does not list is refused. It reports whether v is an object.
func (v *Value) Object(fields Fields) bool {
	if !v.isMap() {
		v.Refuse("want an object, not %s", v.what())
		return false
	}
	for _, f := range v.items {
		switch parse := fields[f.key]; {
		case parse == nil:
			f.Refuse("unknown field: check its name and place, or remove it")
		case !f.isNull():
			parse(f)
		}
	}
	return true
}

// Has reports whether an object has a field. One that says null, the word, is
// not there, as Kubernetes reads it.
func (v *Value) Has(key string) bool {
	f := v.field(key)
	return f != nil && !f.isNull()
}

// isNull reports whether the value is the word null.
func (v *Value) isNull() bool { return v.tag == "!!null" && v.scalar == "null" }

// Require refuses an object without a field.
func (v *Value) Require(key string) {
	if v.isMap() && !v.Has(key) {
		v.Refuse("field %s is missing", key)
	}
}

// List visits the items of a list. It reports whether v is a list.
func (v *Value) List(item func(i int, v *Value)) bool {
	if v.tag != "!!seq" {
		v.Refuse("want a list, not %s", v.what())
		return false
	}
	for i, c := range v.items {
		item(i, c)
	}
	return true
}

// Len returns how many items a list or fields an object has.
func (v *Value) Len() int {
	n := 0
	for _, i := range v.items {
		if !v.object || !i.isNull() {
			n++
		}
	}
	return n
}

// Each visits the fields of an object whose keys are free.
func (v *Value) Each(field func(key string, v *Value)) bool {
	if !v.isMap() {
		v.Refuse("want an object, not %s", v.what())
		return false
	}
	for _, f := range v.items {
		field(f.key, f)
	}
	return true
}

// Text returns a string.
func (v *Value) Text() (string, bool) {
	if v.tag != "!!str" {
		hint := ""
		if v.tag != "!!map" && v.tag != "!!seq" && v.tag != "!!null" {
			hint = ": quote it"
		}
		v.Refuse("want a string, not %s%s", v.what(), hint)
		return "", false
	}
	return v.scalar, true
}

// IsText reports whether the value is a string.
func (v *Value) IsText() bool { return v.tag == "!!str" }

// decimal is the only way to write a number that every YAML reader agrees on.
var decimal = regexp.MustCompile(`^(0|[1-9][0-9]{0,8})$`)

// Number returns a whole number.
func (v *Value) Number() (int, bool) {
	if v.tag != "!!int" || !decimal.MatchString(v.scalar) {
		v.Refuse("want a whole decimal number of at most 9 digits, not %s", v.what())
		return 0, false
	}
	n, err := strconv.Atoi(v.scalar)
	return n, err == nil
}

// Boolean returns true or false.
func (v *Value) Boolean() (value, ok bool) {
	if v.tag != "!!bool" || v.scalar != "true" && v.scalar != "false" {
		v.Refuse("want true or false, not %s", v.what())
		return false, false
	}
	return v.scalar == "true", true
}

// maxPatterns bounds the regular expressions of a document, in bytes: some
// take a millisecond to read.
const maxPatterns = 1 << 16

// Pattern returns a regular expression, as Go's package regexp reads it. It is
// not compiled: repetitions would be written out.
func (v *Value) Pattern() (string, bool) {
	s, ok := v.Text()
	if !ok {
		return "", false
	}
	told := v.doc.patterns > maxPatterns
	if wrong := v.CheckPattern(s); wrong != "" {
		if !told {
			v.Refuse("%s", wrong)
		}
		return "", false
	}
	return s, true
}

// CheckPattern returns what is wrong with a regular expression that stands
// within the value, or "".
func (v *Value) CheckPattern(s string) string {
	if v.doc.patterns += len(s); v.doc.patterns > maxPatterns {
		return fmt.Sprintf("the document has more than %d characters of regular expressions: split it", maxPatterns)
	}
	if _, err := syntax.Parse(s, syntax.Perl); err != nil {
		return "not a regular expression: " + string(err.(*syntax.Error).Code)
	}
	return ""
}

// Field returns a field that the object has, or nil.
func (v *Value) Field(key string) *Value {
	if !v.Has(key) {
		return nil
	}
	return v.field(key)
}

// IsList reports whether the value is a list.
func (v *Value) IsList() bool { return v.tag == "!!seq" }

// IsObject reports whether the value is an object.
func (v *Value) IsObject() bool { return v.isMap() }

// Key returns the name of the field in which the value stands.
func (v *Value) Key() string { return v.key }

// what describes the value for a message.
func (v *Value) what() string {
	switch v.tag {
	case "!!map":
		return "an object"
	case "!!seq":
		return "a list"
	case "!!null":
		return "nothing (write a value, or remove the field)"
	case "!!str":
		return "the string " + quote(v.scalar)
	case "!!bool":
		return "the boolean " + quote(v.scalar)
	case "!!int", "!!float":
		return "the number " + quote(v.scalar)
	}
	return quote(v.scalar)
}
