package archive

import (
	"bytes"
	"io"
)

// Tail is a writer that keeps the last lines of what is written, so many bytes
// of them at the most; it holds twice as many. A line that is cut off at its
// begin is left out: half a secret cannot be known for one. It never fails.
type Tail struct {
	Most int64
	b    []byte
	lost bool // something before b was written
}

// Write takes bytes, which need not end with a line.
func (t *Tail) Write(p []byte) (int, error) {
	n := len(p)
	if cut := int64(len(p)) - t.Most - 1; cut > 0 {
		t.b, p, t.lost = t.b[:0], p[cut:], true
	}
	t.b = append(t.b, p...)
	if int64(len(t.b)) > 2*t.Most+1 {
		t.cut()
	}
	return n, nil
}

// cut forgets what is too much: all but the last bytes, and the one before
// them, which tells whether a line begins there.
func (t *Tail) cut() {
	if over := int64(len(t.b)) - t.Most - 1; over > 0 {
		t.b, t.lost = t.b[:copy(t.b, t.b[over:])], true
	}
}

// Bytes returns the last lines.
func (t *Tail) Bytes() []byte {
	t.cut()
	b := t.b
	if t.lost || int64(len(b)) > t.Most {
		_, b, _ = bytes.Cut(b, []byte("\n"))
	}
	return b
}

// End reads to the end, and returns the last lines, so many bytes of them at the
// most.
func End(r io.Reader, most int64) ([]byte, error) {
	t := Tail{Most: most}
	_, err := io.Copy(&t, r)
	return t.Bytes(), err
}
