package l7

import (
	"iter"
	"strings"
)

// reading is one of the ways in which a server may read a request. What rules
// ask for is looked for in what was sent; what they exclude, in all of them.
type reading struct {
	path      string // without the query
	eachLine  bool   // lines of one header are not joined: any of them may be the one
	excluding bool   // it is one of all those that are looked at
}

func (r *Request) asSent() reading {
	path, _, _ := strings.Cut(r.Target, "?")
	return reading{path: path}
}

// readings yields what was sent first, and then what servers make of it: escapes
// decoded, parameters (";x=1") taken off the segments, slashes in a row merged,
// each with and without the others. Nothing is said of servers that do not tell
// small letters from large ones.
func (r *Request) readings() iter.Seq[reading] {
	return func(yield func(reading) bool) {
		sent := r.asSent()
		for _, decode := range [2]bool{false, true} {
			for _, strip := range [2]bool{false, true} {
				for _, merge := range [2]bool{false, true} {
					path := sent.path
					if decode {
						path = decoded(path)
					}
					if strip {
						path = stripped(path)
					}
					if merge {
						path = merged(path)
					}
					if (decode || strip || merge) && path == sent.path {
						continue // it makes no difference
					}
					if !yield(reading{path, false, true}) || !yield(reading{path, true, true}) {
						return
					}
				}
			}
		}
	}
}

// decoded decodes the escapes that are well-formed.
func decoded(path string) string {
	if !strings.Contains(path, "%") {
		return path
	}
	var b strings.Builder
	for i := 0; i < len(path); i++ {
		if path[i] == '%' && i+2 < len(path) && hex[path[i+1]] >= 0 && hex[path[i+2]] >= 0 {
			b.WriteByte(byte(hex[path[i+1]]<<4 | hex[path[i+2]]))
			i += 2
			continue
		}
		b.WriteByte(path[i])
	}
	return b.String()
}

var hex = func() (t [256]int16) {
	for i := range t {
		t[i] = int16(strings.IndexByte("0123456789abcdef", byte(i)))
		if 'A' <= i && i <= 'F' {
			t[i] = int16(i - 'A' + 10)
		}
	}
	return t
}()

// stripped takes the parameters off the segments.
func stripped(path string) string {
	if !strings.Contains(path, ";") {
		return path
	}
	segments := strings.Split(path, "/")
	for i, s := range segments {
		segments[i], _, _ = strings.Cut(s, ";")
	}
	return strings.Join(segments, "/")
}

// merged makes one of slashes in a row.
func merged(path string) string {
	for strings.Contains(path, "//") {
		path = strings.ReplaceAll(path, "//", "/")
	}
	return path
}
