package dialect

import (
	"bytes"
	"encoding/json"
	"regexp"
	"strings"
	"unicode/utf8"
)

// maxRendered bounds the sources of the items of all lists in one document:
// aliases can make them many times what is in the file.
const maxRendered = 4 * MaxFile

// isList reports whether the object is a list of objects as kubectl and the
// API server make them: a List of v1, or an XxxList, whose items are each an
// Xxx of its apiVersion. item is Xxx, or "".
func (v *Value) isList() (item string, ok bool) {
	item, ok = strings.CutSuffix(v.text("kind"), "List")
	if !v.isMap() || !ok || item == "" && v.text("apiVersion") != "v1" {
		return "", false
	}
	return item, item == "" || v.Has("items")
}

// ListOf returns apiVersion and kind of a list whose items have been cut out:
// head is its document up to the last field before the cut, items, which is
// empty, and tail what is behind the cut. ok is false if it is not a list whose
// items are read, or if anything in it is to be refused.
func ListOf(head, tail string) (apiVersion, kind string, ok bool) {
	// The head by itself, lest the cut be within a text that the tail ends.
	for _, source := range []string{head, head + tail} {
		d := &Document{Source: source, Line: 1}
		if len(source) > MaxFile || !utf8.ValidString(source) || d.read() || len(d.problems) > 0 || !d.root.isMap() {
			return "", "", false
		}
		items := d.root.field("items")
		if items == nil || len(items.items) > 0 || items.tag != "!!seq" && (items.tag != "!!null" || items.scalar != "") ||
			source == head && items != d.root.items[len(d.root.items)-1] {
			return "", "", false
		}
		if source != head+tail {
			continue
		}
		if _, ok = d.root.isList(); ok {
			items.tag = "!!seq"
			d.root.list()
			apiVersion, kind, ok = d.root.text("apiVersion"), d.root.text("kind"), len(d.problems) == 0
		}
	}
	return apiVersion, kind, ok
}

// list visits the fields of a list.
func (v *Value) list() {
	v.Object(Fields{
		"apiVersion": Accept, "kind": Accept,
		"metadata": func(v *Value) {
			if c := v.field("continue"); c != nil && c.scalar != "" {
				c.Refuse("the list goes on elsewhere: fetch all of it")
			}
		},
		"items": func(v *Value) {
			v.List(func(_ int, item *Value) {
				if !item.isMap() {
					item.Refuse("want an object, not %s", item.what())
				}
			})
		},
	})
	v.Require("items")
}

// unwrap yields the document, or in the place of a list the items in it, each
// a document of its own. An item's path begins at the list, and its source is
// made from its values, for it can lean on anchors elsewhere in the file.
func (d *Document) unwrap(budget *int, yield func(*Document) bool) bool {
	kind, ok := d.root.isList()
	if !ok || len(d.problems) > 0 {
		return yield(d)
	}
	d.root.list()
	if len(d.problems) > 0 {
		return yield(d)
	}
	items := d.root.field("items").items
	for i, item := range items {
		items[i] = nil // what has been read is let go
		doc := &Document{File: d.File, Index: d.Index, Line: item.Line, root: item, patterns: d.patterns}
		item.own(doc)
		if kind != "" {
			item.is("kind", kind)
			item.is("apiVersion", d.root.text("apiVersion"))
		}
		if _, more := item.isList(); !more {
			doc.render(budget)
		}
		if !doc.unwrap(budget, yield) {
			return false
		}
		d.patterns = doc.patterns // the list is one document to its bounds
	}
	return true
}

// render makes the source of an item, as long as that is within the budget.
func (d *Document) render(budget *int) {
	source, ok := d.root.render()
	if !ok || len(source) > *budget {
		d.root.Refuse("the item is too large, or the list is with its aliases written out: split it")
		return
	}
	d.Source = source
	*budget -= len(source)
}

// own makes the value a part of the document.
func (v *Value) own(d *Document) {
	v.doc = d
	for _, c := range v.items {
		c.own(d)
	}
}

// is says what a field of an object must be, whether it is written there or
// not.
func (v *Value) is(key, want string) {
	f := v.field(key)
	switch {
	case f == nil:
		f = &Value{doc: v.doc, Line: v.Line, parent: v, key: key, tag: "!!str", scalar: want}
		v.items = append([]*Value{f}, v.items...)
		if v.byKey != nil {
			v.byKey[key] = f
		}
	case f.tag != "!!str" || f.scalar != want:
		f.Refuse("want %s, as the list's kind and apiVersion say, not %s", quote(want), f.what())
	}
}

// render returns the value as a document that means the same, unless that
// would be larger than is accepted.
func (v *Value) render() (source string, ok bool) {
	var compact, b bytes.Buffer
	if v.json(&compact); compact.Len() > MaxFile {
		return "", false
	}
	if json.Indent(&b, compact.Bytes(), "", "  ") == nil && b.Len() < MaxFile && marks(b.String()) <= maxMarks {
		return b.String() + "\n", true
	}
	return compact.String(), marks(compact.String()) <= maxMarks
}

// literal are the numbers that JSON can say.
var literal = regexp.MustCompile(`^-?(0|[1-9][0-9]*)(\.[0-9]+)?([eE][-+]?[0-9]+)?$`)

// json writes the value until there is more than can be accepted.
func (v *Value) json(b *bytes.Buffer) {
	if b.Len() > MaxFile {
		return
	}
	switch {
	case v.tag == "!!map":
		b.WriteByte('{')
		for i, f := range v.items {
			if i > 0 {
				b.WriteByte(',')
			}
			text(b, f.key)
			b.WriteByte(':')
			f.json(b)
		}
		b.WriteByte('}')
	case v.tag == "!!seq":
		b.WriteByte('[')
		for i, c := range v.items {
			if i > 0 {
				b.WriteByte(',')
			}
			c.json(b)
		}
		b.WriteByte(']')
	case v.tag == "!!null":
		b.WriteString("null")
	case v.tag == "!!bool" && (v.scalar == "true" || v.scalar == "false"),
		(v.tag == "!!int" || v.tag == "!!float") && literal.MatchString(v.scalar):
		b.WriteString(v.scalar)
	default:
		text(b, v.scalar) // dates, and numbers that no field accepts
	}
}

func text(b *bytes.Buffer, s string) {
	e := json.NewEncoder(b)
	e.SetEscapeHTML(false)
	_ = e.Encode(s)         // a buffer takes all, and the file is UTF-8
	b.Truncate(b.Len() - 1) // the line break
}
