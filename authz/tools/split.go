package tools

import (
	"bytes"
	"encoding/json"
	"iter"
	"regexp"
	"strconv"
	"strings"

	"portcullis/authz"
)

// A cluster's manifests are larger than the policy files that the dialects'
// reader takes: a List of every pod is one document. So what is large is read
// in parts: some documents at a time, and of a List some items at a time.
// Splitting needs no YAML parser and is not trusted to be one: each part is
// parsed by itself, and what was cut in a place that is no border (within a
// quoted text) does not parse.

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
		if len(data) <= partSize {
			yield(part{data: data})
			return
		}
		data = bytes.TrimPrefix(data, []byte("\ufeff"))
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
			if !blank(doc) {
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

// blank reports whether there is nothing but markers, comments and white space.
func blank(doc []byte) bool {
	for line := range bytes.Lines(doc) {
		if line = bytes.TrimSpace(line); len(line) > 0 && line[0] != '#' && string(line) != "---" && string(line) != "..." {
			return false
		}
	}
	return true
}

// itemsOf yields a document, or if it is a list a part for each few of its
// items.
func itemsOf(doc []byte, partSize int) iter.Seq[part] {
	list := splitYAML(doc)
	if text := bytes.TrimLeft(doc, " \t\r\n"); len(text) > 0 && text[0] == '{' {
		list = splitJSON(doc)
	}
	return func(yield func(part) bool) {
		if len(list.items) == 0 || len(list.items) > maxItems || len(list.head)+len(list.tail) > max(partSize, 1<<10) {
			yield(part{data: doc, places: []place{{1, 0}}})
			return
		}
		for from := 0; from < len(list.items); {
			p := part{data: []byte(list.head), places: []place{{1, 0}}, items: from}
			size, to := 0, from
			for to < len(list.items) && (to == from || size+len(list.items[to].text) <= partSize) {
				size += len(list.items[to].text)
				if to > from {
					p.data = append(p.data, list.between...)
				}
				line := bytes.Count(p.data, []byte("\n"))
				p.places = append(p.places, place{line + 1, list.items[to].line - line})
				p.data = append(p.data, list.items[to].text...)
				to++
			}
			line := bytes.Count(p.data, []byte("\n"))
			p.places = append(p.places, place{line + 1, list.tailLine - line})
			p.data = append(p.data, list.tail...)
			if !yield(p) {
				return
			}
			from = to
		}
	}
}

// listText is the text of a list. The head ends where the first item begins.
type listText struct {
	head, between, tail string
	tailLine            int // lines before the tail
	items               []itemText
}

type itemText struct {
	line int // lines before it
	text []byte
}

// splitYAML splits a list as kubectl prints it: items in block style, under the
// field items in the first column.
func splitYAML(doc []byte) (list listText) {
	indent, number, at, tail := -1, 0, 0, len(doc)
	for line := range bytes.Lines(doc) {
		start := at
		at += len(line)
		number++
		if list.head == "" {
			if string(bytes.TrimRight(line, " \r\n")) == "items:" {
				list.head = string(doc[:at])
			}
			continue
		}
		text := bytes.TrimLeft(line, " ")
		depth := len(line) - len(text)
		text = bytes.TrimRight(text, " \r\n")
		isItem := bytes.Equal(text, []byte("-")) || bytes.HasPrefix(text, []byte("- "))
		if indent < 0 && isItem {
			indent = depth
		}
		if indent < 0 && len(text) > 0 || len(list.items) > maxItems {
			return listText{} // not in block style, or no list of objects
		}
		switch {
		case isItem && depth == indent:
			list.items = append(list.items, itemText{line: number - 1, text: doc[start:at]})
			continue
		case len(text) == 0, depth > indent:
			if n := len(list.items); n > 0 {
				last := &list.items[n-1].text
				*last = doc[start-len(*last) : at]
			}
			continue
		}
		tail, list.tailLine = start, number-1
		break
	}
	if tail == len(doc) {
		list.tailLine = number
	}
	list.tail = string(doc[tail:])
	return list
}

// splitJSON splits a list in JSON.
func splitJSON(doc []byte) (list listText) {
	in := json.NewDecoder(bytes.NewReader(doc))
	if t, err := in.Token(); err != nil || t != json.Delim('{') {
		return listText{}
	}
	var head []string
	seen, at, line := false, 0, 0
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
			head = append(head, string(name)+": "+strings.ReplaceAll(string(v), "\n", " "))
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
	if _, err := in.Token(); err != nil || len(bytes.TrimSpace(doc[in.InputOffset():])) > 0 {
		return listText{}
	}
	list.head = "{" + strings.Join(append(head, `"items": [`), ", ")
	list.between, list.tail = ",\n", "]}\n"
	list.tailLine = bytes.Count(doc, []byte("\n"))
	return list
}
