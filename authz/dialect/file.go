package dialect

import (
	"bytes"
	"iter"
	"slices"
	"strings"
	"unicode/utf8"

	"portcullis/authz"
)

// Bounds on one file. What exceeds them is refused.
const (
	MaxFile      = 1 << 20 // bytes
	maxMarks     = 150_000 // characters that can begin a YAML node, in one document
	maxValues    = 100_000 // values in one document, aliases expanded
	maxDepth     = 64      // of nesting
	maxProblems  = 1_000   // reported of one file
	maxDocuments = 10_000
)

// Dialect is one kind of policy document and its parser. One without APIVersion
// and Kind takes every Kubernetes object that no other does.
type Dialect struct {
	APIVersion, Kind string
	// Is, if there is one, recognizes documents without apiVersion and kind by
	// their shape. Else a document is known by these two.
	Is func(*Value) bool
	// Parse returns what the document says, or its problems.
	Parse func(*Document) (Result, []authz.Problem)
}

func (d Dialect) takesOthers() bool { return d.APIVersion == "" && d.Kind == "" }

// Result is what files say: policies, and objects that policies speak of.
type Result struct {
	Policies   []*authz.Policy
	Groups     []*authz.Group
	Namespaces []*authz.NamespaceObject
	Services   []*authz.ServiceObject
	Slices     []*authz.SliceObject
}

// Refs returns the name of each object.
func (r Result) Refs() (refs []authz.Ref) {
	for _, p := range r.Policies {
		refs = append(refs, p.Ref)
	}
	for _, g := range r.Groups {
		refs = append(refs, g.Ref)
	}
	for _, n := range r.Namespaces {
		refs = append(refs, n.Ref)
	}
	for _, s := range r.Services {
		refs = append(refs, s.Ref)
	}
	for _, s := range r.Slices {
		refs = append(refs, s.Ref)
	}
	return refs
}

// Add puts what another file or document says behind what r does.
func (r *Result) Add(o Result) {
	r.Policies = append(r.Policies, o.Policies...)
	r.Groups = append(r.Groups, o.Groups...)
	r.Namespaces = append(r.Namespaces, o.Namespaces...)
	r.Services = append(r.Services, o.Services...)
	r.Slices = append(r.Slices, o.Slices...)
}

// ParseFile parses every document of a file, in YAML or JSON. It returns all
// that they say, or an error of type authz.Problems with every problem of every
// document: a file is taken as a whole or not at all. name is for messages.
// What is to be enforced must pass authz.Policy.Enforceable besides.
func ParseFile(name string, data []byte, dialects ...Dialect) (Result, error) {
	var all Result
	var problems authz.Problems
	seen := map[authz.Ref]int{}
	last := 0
	for doc := range Documents(name, data) {
		said, bad := parse(doc, dialects)
		last = doc.Index
		for _, ref := range said.Refs() {
			if n := seen[ref]; n > 0 && len(bad) == 0 {
				bad = append(bad, doc.root.problem("%s is in document %d already: give one of them another name", ref, n))
			}
			seen[ref] = doc.Index
		}
		all.Add(said)
		if problems = append(problems, bad...); len(problems) > maxProblems {
			problems = append(problems[:maxProblems], authz.Problem{File: name, Message: "there are more problems than are shown"})
			break
		}
	}
	if last == 0 && len(problems) == 0 && !slices.ContainsFunc(dialects, Dialect.takesOthers) {
		problems = authz.Problems{{File: name, Message: "the file contains no policy"}}
	}
	if len(problems) > 0 {
		return Result{}, problems
	}
	return all, nil
}

// parse hands the document to the parser of its kind.
func parse(doc *Document, dialects []Dialect) (Result, []authz.Problem) {
	if len(doc.problems) > 0 {
		return Result{}, doc.problems
	}
	version, kind := doc.root.text("apiVersion"), doc.root.text("kind")
	i := slices.IndexFunc(dialects, func(d Dialect) bool {
		if d.Is != nil {
			return !doc.root.Has("apiVersion") && !doc.root.Has("kind") && d.Is(doc.root)
		}
		return d.APIVersion == version && d.Kind == kind && !d.takesOthers()
	})
	if i >= 0 {
		return dialects[i].Parse(doc)
	}
	if !doc.root.isMap() || kind == "" || version == "" {
		doc.root.Refuse("not a Kubernetes object with apiVersion and kind")
		return Result{}, doc.Problems()
	}
	if i = slices.IndexFunc(dialects, Dialect.takesOthers); i >= 0 && kind != "List" {
		return dialects[i].Parse(doc)
	}
	var known []string
	at := doc.root.field("kind")
	for _, d := range dialects {
		if d.Is != nil {
			continue
		}
		known = append(known, d.APIVersion+" "+d.Kind)
		if d.Kind == kind {
			at = doc.root.field("apiVersion")
		}
	}
	at.Refuse("%s %s is not supported; accepted are: %s, and lists of these", quote(version), quote(kind), strings.Join(known, ", "))
	return Result{}, doc.Problems()
}

// Documents yields the documents of a file, one in memory at a time, leaving
// out empty ones; in the place of a list, each of its items. One that cannot be
// read has problems; its number is 0 if the file as a whole cannot.
func Documents(name string, data []byte) iter.Seq[*Document] {
	return func(yield func(*Document) bool) {
		whole := func(format string, args ...any) {
			d := &Document{File: name}
			d.root = &Value{doc: d}
			d.root.Refuse(format, args...)
			yield(d)
		}
		switch {
		case !utf8.Valid(data):
			whole("the file is not UTF-8")
			return
		case len(data) > MaxFile:
			whole("the file has %d bytes; at most %d are accepted: split it", len(data), MaxFile)
			return
		}
		index := 0
		for line, text := range chunks(string(bytes.TrimPrefix(data, []byte("\ufeff")))) {
			if blank(text) {
				continue
			}
			doc := &Document{File: name, Index: index + 1, Line: line, Source: text}
			if doc.read() {
				continue // empty
			}
			if index++; index > maxDocuments {
				whole("the file has more than %d documents: split it", maxDocuments)
				return
			}
			budget := maxRendered
			if !doc.unwrap(&budget, yield) {
				return
			}
		}
	}
}

// chunks yields the text between document markers and its first line. A
// marker in the first column ends a document even within a quoted or literal
// scalar, so that splitting needs no parser. Other line breaks that YAML 1.1
// knows are caught later: a chunk with a second document in it is refused.
func chunks(data string) func(func(int, string) bool) {
	return func(yield func(int, string) bool) {
		first, start := 1, 0
		for line, at := 1, 0; at < len(data); line++ {
			end := len(data)
			if i := strings.IndexByte(data[at:], '\n'); i >= 0 {
				end = at + i + 1
			}
			rest, ok := marker(data[at:end])
			if ok {
				if !yield(first, data[start:at]) {
					return
				}
				first, start = line, at
				// What follows on the line belongs to the next document;
				// a bare marker does not.
				if blank(rest) {
					first, start = line+1, end
				}
			}
			at = end
		}
		yield(first, data[start:])
	}
}

// marker reports whether the line begins with --- or ..., and what follows.
func marker(line string) (string, bool) {
	if !strings.HasPrefix(line, "---") && !strings.HasPrefix(line, "...") {
		return "", false
	}
	rest := line[3:]
	return rest, rest == "" || strings.ContainsRune(" \t\r\n", rune(rest[0]))
}

// blank reports whether there is nothing but comments and white space.
func blank(text string) bool {
	for line := range strings.Lines(text) {
		if line = strings.TrimSpace(line); line != "" && line[0] != '#' {
			return false
		}
	}
	return true
}
