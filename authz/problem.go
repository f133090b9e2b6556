package authz

import (
	"fmt"
	"strings"
)

// Problem is one reason why a policy file is refused.
type Problem struct {
	File     string `json:"file"`
	Document int    `json:"document"`       // in the file, from 1; 0: the file as a whole
	Line     int    `json:"line"`           // in the file, from 1; 0: unknown
	Path     string `json:"path,omitempty"` // of the field, as in spec.ingress[0].toPorts
	Message  string `json:"message"`        // what is wrong, why, and what to do
}

// String returns "file:line: document N: path: message".
func (p Problem) String() string {
	var b strings.Builder
	b.WriteString(p.File)
	if p.Line > 0 {
		fmt.Fprintf(&b, ":%d", p.Line)
	}
	b.WriteString(": ")
	if p.Document > 0 {
		fmt.Fprintf(&b, "document %d: ", p.Document)
	}
	if p.Path != "" {
		b.WriteString(p.Path + ": ")
	}
	b.WriteString(p.Message)
	return b.String()
}

// Problems is the error of a refused file: every problem of every document.
type Problems []Problem

// Error returns one line for each problem.
func (ps Problems) Error() string {
	lines := make([]string, len(ps))
	for i, p := range ps {
		lines[i] = p.String()
	}
	return strings.Join(lines, "\n")
}
