package tools

import (
	"iter"

	"portcullis/authz"
)

// part is what of a file is parsed at once.
type part struct {
	data      []byte
	lines     int // before it in the file
	documents int // before it in the file
}

// shift makes a problem of the part one of the file.
func (p part) shift(x *authz.Problem) {
	if x.Line > 0 {
		x.Line += p.lines
	}
	if x.Document > 0 {
		x.Document += p.documents
	}
}

// parts yields the parts of a file.
func parts(_ string, data []byte) iter.Seq[part] {
	return func(yield func(part) bool) { yield(part{data: data}) }
}
