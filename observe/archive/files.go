package archive

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path"
	"strings"
	"sync"

	"portcullis/observe/redact"
)

// Files takes what one part gathers. It is safe for concurrent use; after the
// part's end everything that is put in is thrown away.
type Files struct {
	mu      sync.Mutex
	left    int64 // bytes that may still be put in
	longest int64 // bytes of one file
	ended   bool
	held    []held
	notes   []string
}

// held is a file that waits for the end of its part.
type held struct {
	entry File
	data  []byte
}

// mostFiles bounds the files of one part: who sends an archive could send ever
// more empty ones.
const mostFiles = 10000

// errFull says that no more fits; it ends a copy, and is told in the manifest as
// a file that was cut.
var errFull = errors.New("no more fits")

// bounded is a buffer with a bound. The buffer is not embedded: its other methods
// know of none.
type bounded struct {
	buf  bytes.Buffer
	left int64
	cut  bool
}

func (b *bounded) Write(p []byte) (int, error) {
	if int64(len(p)) > b.left {
		p, b.cut = p[:b.left], true
	}
	b.left -= int64(len(p))
	b.buf.Write(p)
	if b.cut {
		return len(p), errFull
	}
	return len(p), nil
}

// add puts a file in, which take writes without secrets.
func (f *Files) add(name string, take func(w io.Writer) (removed int, err error)) error {
	f.mu.Lock()
	room := min(f.left, f.longest)
	ended := f.ended
	f.mu.Unlock()
	if ended {
		return os.ErrDeadlineExceeded
	}
	b := &bounded{left: room}
	removed, err := take(b)
	if errors.Is(err, errFull) {
		err = nil
	}
	if b.buf.Len() == 0 && (err != nil || b.cut) {
		if b.cut {
			err = fmt.Errorf("%s: nothing of it fits: raise --size-limit", name)
		}
		return err
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.ended {
		return os.ErrDeadlineExceeded
	}
	if len(f.held) == mostFiles {
		return fmt.Errorf("%s and what comes after it: one part has no more than %d files", clean(name), mostFiles)
	}
	f.left -= int64(b.buf.Len())
	f.held = append(f.held, held{File{Name: clean(name), Bytes: int64(b.buf.Len()), Removed: removed, Cut: b.cut}, b.buf.Bytes()})
	return err
}

// clean is the name of a file within the archive: never outside of it.
func clean(name string) string {
	name = strings.Map(func(r rune) rune {
		if r < ' ' || r == 0x7f || r == '\\' {
			return '_'
		}
		return r
	}, name)
	return strings.TrimPrefix(path.Clean("/"+name), "/")
}

// Write puts in a text that a function writes: logs, listings, JSON lines. The
// writer's errors must be returned, for they end it where no more fits.
func (f *Files) Write(name string, text func(w io.Writer) error) error {
	return f.add(name, func(w io.Writer) (int, error) {
		to := redact.NewWriter(w)
		err := text(to)
		if closed := to.Close(); err == nil {
			err = closed
		}
		return to.Removed(), err
	})
}

// Copy puts in a text, read to its end.
func (f *Files) Copy(name string, r io.Reader) error {
	return f.Write(name, func(w io.Writer) error {
		_, err := io.Copy(w, r)
		return err
	})
}

// Text puts in a text.
func (f *Files) Text(name, text string) error { return f.Copy(name, strings.NewReader(text)) }

// JSON puts in a value, or a json.RawMessage, as an indented document.
func (f *Files) JSON(name string, v any) error {
	b, err := json.Marshal(v)
	if err != nil {
		return fmt.Errorf("%s: %w", name, err)
	}
	return f.document(name, b, redact.JSON)
}

// YAML puts in documents; what is no YAML becomes a text.
func (f *Files) YAML(name string, b []byte) error { return f.document(name, b, redact.YAML) }

func (f *Files) document(name string, b []byte, redacted func([]byte) ([]byte, int)) error {
	return f.add(name, func(w io.Writer) (int, error) {
		out, removed := redacted(b)
		_, err := w.Write(out)
		return removed, err
	})
}

// Note tells in the manifest what somebody should know who reads the part.
func (f *Files) Note(format string, args ...any) {
	text, _ := redact.Text(fmt.Sprintf(format, args...))
	f.mu.Lock()
	defer f.mu.Unlock()
	f.notes = append(f.notes, text)
}

// end returns what was put in, and takes no more.
func (f *Files) end() ([]held, []string) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.ended = true
	return f.held, f.notes
}
