package tools

import (
	"bytes"
	"encoding/json"
	"fmt"
	"iter"
	"regexp"
	"strconv"
	"strings"
	"unicode/utf8"

	"portcullis/authz"
	"portcullis/authz/dialect"
)

// A cluster's manifests are larger than the policy files that the dialects'
// reader takes: a List of every pod is one document. So what is large is read
// in parts: some documents at a time, and of a List some items at a time.
// Splitting needs no YAML parser and is not trusted to be one: each part is
// parsed by itself, and what was cut in a place that is no border (within a
// quoted text) does not parse. What a list is, and which it is, the dialects'
// reader says of the text around the items; each part of it has a head made of
// that, so that nothing in the text can end what a cut left open. Only what is
// bounded a document is bounded a part.

// partSize is about how many bytes are parsed at once. One object may be larger,
// up to what the dialects take.
const partSize = 256 << 10

// part is what of a file is parsed at once.
type part struct {
	data      []byte
	places    []place // by line in the part
	documents int     // before it in the file
	items     int     // of the same list, before it
}

// place says that from a line of the part on (from 1) lines are so many further
// down in the file.
type place struct{ line, shift int }

var itemPath = regexp.MustCompile(`^items\[([0-9]+)\]`)

// shift makes a problem of the part one of the file.
func (p part) shift(x *authz.Problem) {
	for i := len(p.places) - 1; i >= 0 && x.Line > 0; i-- {
		if x.Line >= p.places[i].line {
			x.Line += p.places[i].shift
			break
		}
	}
	if x.Document > 0 {
		x.Document += p.documents
	}
	if m := itemPath.FindStringSubmatch(x.Path); m != nil && p.items > 0 {
		if n, err := strconv.Atoi(m[1]); err == nil {
			x.Path = "items[" + strconv.Itoa(n+p.items) + "]" + x.Path[len(m[0]):]
		}
	}
}

// maxItems bounds the items of one list that is read in parts.
const maxItems = 100_000

// parts yields the parts of a file, each of about so many bytes.
func parts(data []byte, partSize int) iter.Seq[part] {
	return func(yield func(part) bool) {
		if len(data) <= partSize || !utf8.Valid(data) {
			yield(part{data: data})
			return
		}
		var some part // documents that are parsed together
		count := 0    // documents
		flush := func() bool {
			ok := len(some.data) == 0 || yield(some)
			some = part{}
			return ok
		}
		for line, doc := range documents(data) {
			if len(some.data)+len(doc) > partSize && !flush() {
				return
			}
			if len(doc) > partSize {
				for p := range itemsOf(doc, partSize) {
					for i := range p.places {
						p.places[i].shift += line
					}
					if p.documents = count; !yield(p) {
						return
					}
				}
			} else {
				if len(some.data) == 0 {
					some = part{places: []place{{1, line}}, documents: count}
				}
				some.data = append(some.data, doc...)
			}
			if !blank(unmarked(doc)) {
				count++
			}
		}
		flush()
	}
}

// documents yields the text from each document marker to the next, and how many
// lines stand before it.
func documents(data []byte) iter.Seq2[int, []byte] {
	return func(yield func(int, []byte) bool) {
		first, start, line, at := 0, 0, 0, 0
		for text := range bytes.Lines(data) {
			if at > start && isMarker(text) {
				if !yield(first, data[start:at]) {
					return
				}
				first, start = line, at
			}
			line++
			at += len(text)
		}
		if at > start {
			yield(first, data[start:])
		}
	}
}

func isMarker(line []byte) bool {
	return (bytes.HasPrefix(line, []byte("---")) || bytes.HasPrefix(line, []byte("..."))) && (len(line) == 3 || bytes.IndexByte([]byte(" \t\r\n"), line[3]) >= 0)
}

// unmarked returns the document without a marker that has its line for itself,
// as the dialects' reader reads it.
func unmarked(doc []byte) []byte {
	line, rest, _ := bytes.Cut(doc, []byte("\n"))
	if isMarker(line) && blank(line[3:]) {
		return rest
	}
	return doc
}

// blank reports whether there is nothing but comments and white space.
func blank(text []byte) bool {
	for line := range bytes.Lines(text) {
		if line = bytes.TrimSpace(line); len(line) > 0 && line[0] != '#' {
			return false
		}
	}
	return true
}

// itemsOf yields a document, or if it is a list a part for each few of its
// items.
func itemsOf(doc []byte, partSize int) iter.Seq[part] {
	text := unmarked(doc)
	list := splitJSON(text)
	if len(list.items) == 0 {
		list = splitYAML(text)
	}
	above := bytes.Count(doc[:len(doc)-len(text)], []byte("\n"))
	return func(yield func(part) bool) {
		if len(list.items) == 0 || len(list.items) > maxItems {
			yield(part{data: doc, places: []place{{1, 0}}})
			return
		}
		for from := 0; from < len(list.items); {
			p := part{data: []byte(list.head), items: from}
			size, to, line := 0, from, strings.Count(list.head, "\n")
			for to < len(list.items) && (to == from || size+len(list.items[to].text) <= partSize) {
				item := list.items[to]
				size += len(item.text)
				if to > from {
					p.data = append(p.data, list.between...)
					line += strings.Count(list.between, "\n")
				}
				p.places = append(p.places, place{line + 1, above + item.line - line})
				p.data = append(p.data, item.text...)
				line += bytes.Count(item.text, []byte("\n"))
				to++
			}
			p.data = append(p.data, list.tail...)
			if !yield(p) {
				return
			}
			from = to
		}
	}
}

// listText is the text of a list's items, and what makes a list of some of them.
type listText struct {
	head, between, tail string
	items               []itemText
}

type itemText struct {
	line int // lines before it
	text []byte
}

// otherBreaks are line breaks to YAML, and not to splitYAML.
var otherBreaks = regexp.MustCompile("\r[^\n]|\u0085|\u2028|\u2029")

// splitYAML splits a list as kubectl prints it: items in block style, under the
// field items in the first column. What it takes for something else than it is
// makes it find no list, or parts that do not parse.
func splitYAML(doc []byte) (list listText) {
	begin := firstItem(doc)
	if begin < 0 || otherBreaks.Match(doc) {
		return listText{}
	}
	indent, number, at, tail := -1, bytes.Count(doc[:begin], []byte("\n")), begin, len(doc)
	for line := range bytes.Lines(doc[begin:]) {
		start := at
		at += len(line)
		number++
		text := bytes.TrimLeft(line, " ")
		depth := len(line) - len(text)
		text = bytes.TrimRight(text, " \r\n")
		isItem := bytes.Equal(text, []byte("-")) || bytes.HasPrefix(text, []byte("- "))
		comment := bytes.HasPrefix(text, []byte("#"))
		if indent < 0 && isItem {
			indent = depth
		}
		if indent < 0 && len(text) > 0 && !comment || len(list.items) > maxItems {
			return listText{} // not in block style, or no list of objects
		}
		if isItem && depth == indent {
			list.items = append(list.items, itemText{line: number - 1, text: doc[start:at]})
			continue
		}
		if len(text) > 0 && depth <= indent && !comment {
			tail = start
			break
		}
		if n := len(list.items); n > 0 {
			last := &list.items[n-1].text
			*last = doc[start-len(*last) : at]
		}
	}
	head, behind := string(doc[:begin]), string(doc[tail:])
	version, kind, ok := dialect.ListOf(head, behind)
	if !ok || strings.Contains(head+behind, "&") { // an item may mean what stands there
		return listText{}
	}
	list.head = fmt.Sprintf("apiVersion: %q\nkind: %q\nitems:\n", version, kind)
	return list
}

// firstItem returns where the line behind the field items begins, or -1.
func firstItem(doc []byte) int {
	at := 0
	for line := range bytes.Lines(doc) {
		if at += len(line); string(bytes.TrimRight(line, " \r\n")) == "items:" {
			return at
		}
	}
	return -1
}

// splitJSON splits a list in JSON. Comments can stand before it.
func splitJSON(text []byte) (list listText) {
	begin := bytes.IndexByte(text, '{')
	if begin < 0 || !blank(bytes.TrimPrefix(text[:begin], []byte("\ufeff"))) {
		return listText{}
	}
	doc := text[begin:]
	in := json.NewDecoder(bytes.NewReader(doc))
	if t, err := in.Token(); err != nil || t != json.Delim('{') {
		return listText{}
	}
	var around []string
	seen, at, line := false, 0, bytes.Count(text[:begin], []byte("\n"))
	for in.More() {
		key, err := in.Token()
		if err != nil {
			return listText{}
		}
		name, err := json.Marshal(key)
		if err != nil {
			return listText{}
		}
		if key != "items" {
			var v json.RawMessage
			if err := in.Decode(&v); err != nil {
				return listText{}
			}
			around = append(around, string(name)+": "+strings.ReplaceAll(string(v), "\n", " "))
			continue
		}
		if t, err := in.Token(); err != nil || t != json.Delim('[') || seen {
			return listText{}
		}
		seen = true
		for in.More() {
			var v json.RawMessage
			if err := in.Decode(&v); err != nil {
				return listText{}
			}
			start := int(in.InputOffset()) - len(v)
			if len(list.items) > maxItems {
				return listText{}
			}
			line += bytes.Count(doc[at:start], []byte("\n"))
			at = start
			list.items = append(list.items, itemText{line: line, text: doc[start : start+len(v)]})
		}
		if _, err := in.Token(); err != nil {
			return listText{}
		}
	}
	if _, err := in.Token(); err != nil {
		return listText{}
	}
	behind := doc[in.InputOffset():]
	if len(bytes.Trim(behind, " \t\r\n")) > 0 {
		return listText{}
	}
	version, kind, ok := dialect.ListOf(string(text[:begin])+"{"+strings.Join(append(around, `"items": []`), ", ")+"}"+string(behind), "")
	if !ok {
		return listText{}
	}
	list.head = fmt.Sprintf(`{"apiVersion": %q, "kind": %q, "items": [`, version, kind)
	list.between, list.tail = ",\n", "]}\n"
	return list
}
