package redact

import (
	"bytes"
	"fmt"
	"io"
)

// LongestLine is the longest line that a Writer passes on, in bytes. In the
// place of a longer one stands how long it was: what begins with half a secret
// cannot be known for one.
const LongestLine = 1 << 20

// Writer removes secrets from lines on their way to another writer. Close
// passes on a last line that has no newline; it does not close the other one.
type Writer struct {
	to    io.Writer
	state lines
	line  []byte
	long  int // bytes of a line that is too long; 0: it is not
	err   error
}

// NewWriter returns a Writer to another one.
func NewWriter(to io.Writer) *Writer { return &Writer{to: to} }

// Removed is how many secrets were removed until now.
func (w *Writer) Removed() int { return w.state.removed }

// Write takes bytes, which need not end with a line.
func (w *Writer) Write(p []byte) (int, error) {
	n := len(p)
	for len(p) > 0 && w.err == nil {
		end := bytes.IndexByte(p, '\n')
		if end < 0 {
			w.add(p)
			break
		}
		w.add(p[:end])
		w.flush("\n")
		p = p[end+1:]
	}
	if w.err != nil {
		return 0, w.err
	}
	return n, nil
}

func (w *Writer) add(p []byte) {
	if w.long == 0 && len(w.line)+len(p) <= LongestLine {
		w.line = append(w.line, p...)
		return
	}
	w.long += len(w.line) + len(p)
	w.line = w.line[:0]
}

func (w *Writer) flush(newline string) {
	var out string
	some := true
	if w.long > 0 {
		out = fmt.Sprintf("[a line of %d bytes was left out]", w.long)
		w.state = lines{removed: w.state.removed + 1}
	} else if out, some = w.structured(); !some {
		out, some = w.state.line(string(w.line))
	}
	w.line, w.long = w.line[:0], 0
	if some && w.err == nil {
		_, w.err = io.WriteString(w.to, out+newline)
	}
}

// structured reads the line as JSON, and writes it anew: of a name that stands
// twice only the last value was looked at.
func (w *Writer) structured() (string, bool) {
	if len(w.line) == 0 || w.line[0] != '{' {
		return "", false
	}
	v, err := decode(w.line)
	if err != nil {
		return "", false
	}
	var in walker
	v = in.value("", v, false, 0)
	b, err := encode(v, "")
	if err != nil {
		return "", false
	}
	w.state = lines{removed: w.state.removed + in.removed} // whatever went on above has ended
	return string(bytes.TrimSuffix(b, []byte("\n"))), true
}

// Close passes on what is left.
func (w *Writer) Close() error {
	if w.err == nil && (len(w.line) > 0 || w.long > 0) {
		w.flush("")
	}
	return w.err
}
