package audit

import (
	"bufio"
	"bytes"
	"cmp"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
)

func base(path string) string { return filepath.Base(path) }

// rotatedName is the name of a file that is full: the number of its first
// record comes after that of the log.
func rotatedName(path string, first uint64) string { return fmt.Sprintf("%s.%016d", path, first) }

type oldFile struct {
	path, name string
	first      uint64
}

// rotated returns the files that rotation has left beside the log at path, the
// oldest first.
func rotated(path string) ([]oldFile, error) {
	entries, err := os.ReadDir(filepath.Dir(path))
	if err != nil {
		return nil, err
	}
	var out []oldFile
	for _, e := range entries {
		number, ok := strings.CutPrefix(e.Name(), base(path)+".")
		if !ok || len(number) < 16 || !e.Type().IsRegular() {
			continue
		}
		if first, err := strconv.ParseUint(number, 10, 64); err == nil {
			out = append(out, oldFile{filepath.Join(filepath.Dir(path), e.Name()), e.Name(), first})
		}
	}
	slices.SortFunc(out, func(a, b oldFile) int { return cmp.Compare(a.first, b.first) })
	return out, nil
}

// ending is how a file ends.
type ending struct {
	record  *Record // the last, nil if there is none
	junk    int64   // bytes after it
	sum     string  // their SHA-256, with the newline that ends them
	newline bool    // the file ends with one, or is empty
}

func (e ending) torn() *Torn {
	if e.junk == 0 {
		return nil
	}
	n := e.junk
	if !e.newline {
		n++
	}
	return &Torn{Bytes: n, SHA256: e.sum}
}

func tornOf(cut []byte) *Torn {
	sum := sha256.Sum256(cut)
	return &Torn{Bytes: int64(len(cut)), SHA256: hex.EncodeToString(sum[:])}
}

// lastRecord reads a file from its end until there is a record. Memory is
// bounded by the file's size, and little when the file is whole.
func lastRecord(f io.ReaderAt, size int64) (ending, error) {
	for n := int64(64 << 10); ; n *= 8 {
		n = min(n, size)
		data := make([]byte, n)
		if _, err := f.ReadAt(data, size-n); err != nil && !errors.Is(err, io.EOF) {
			return ending{}, err
		}
		e := ending{newline: n == 0 || data[n-1] == '\n'}
		end := len(data)
		for end > 0 {
			begin := bytes.LastIndexByte(data[:end], '\n') + 1
			if begin == 0 && n < size {
				break // perhaps the line begins before what was read
			}
			// An unterminated line can be whole but for its newline.
			if r, err := parse(data[begin:end]); err == nil {
				e.record = r
				rest := bytes.TrimPrefix(data[end:], []byte{'\n'})
				if end == len(data) {
					rest = nil
				}
				return e.with(rest), nil
			}
			if end = begin - 1; end < 0 {
				end = 0
			}
		}
		if n == size {
			return e.with(data), nil
		}
	}
}

func (e ending) with(junk []byte) ending {
	e.junk = int64(len(junk))
	if !e.newline && len(junk) > 0 {
		junk = append(slices.Clone(junk), '\n')
	}
	sum := sha256.Sum256(junk)
	e.sum = hex.EncodeToString(sum[:])
	return e
}

// lastOf returns the last record of a file.
func lastOf(path string) (*Record, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	info, err := f.Stat()
	if err != nil {
		return nil, err
	}
	e, err := lastRecord(f, info.Size())
	return e.record, err
}

// firstOf returns the first record of a file that has one.
func firstOf(path string) (*Record, error) {
	var first *Record
	for l, err := range lines(path, io.Discard) {
		if err != nil {
			return nil, err
		}
		if r, err := parse(l.text); err == nil {
			first = r
			break
		}
	}
	if first == nil {
		return nil, fmt.Errorf("%s: %w", path, errNoRecord)
	}
	return first, nil
}

// line is one line of a file.
type line struct {
	file   string
	number int    // from 1
	text   []byte // without its newline; valid until the next
	cut    bool   // the file ends without a newline here
	long   bool   // it is longer than maxLine: text is empty
}

// lines reads a file line by line. A line that is too long to be a record is
// written to long, with its newline, and not kept.
func lines(path string, long io.Writer) func(yield func(line, error) bool) {
	return func(yield func(line, error) bool) {
		f, err := os.Open(path)
		if err != nil {
			yield(line{}, err)
			return
		}
		defer f.Close()
		for l, err := range readLines(f, path, long) {
			if !yield(l, err) {
				return
			}
		}
	}
}

func readLines(f io.Reader, name string, long io.Writer) func(yield func(line, error) bool) {
	return func(yield func(line, error) bool) {
		r := bufio.NewReaderSize(f, 64<<10)
		var buf []byte
		for n := 1; ; n++ {
			buf = buf[:0]
			l := line{file: name, number: n}
			for {
				part, err := r.ReadSlice('\n')
				if !l.long && len(buf)+len(part) > maxLine {
					l.long = true
					long.Write(buf) //nolint:errcheck // a hash
					buf = buf[:0]
				}
				if l.long {
					long.Write(part) //nolint:errcheck // a hash
				} else {
					buf = append(buf, part...)
				}
				if errors.Is(err, bufio.ErrBufferFull) {
					continue
				}
				if err != nil && !errors.Is(err, io.EOF) {
					yield(l, err)
					return
				}
				l.cut = err != nil
				break
			}
			l.text = bytes.TrimSuffix(buf, []byte{'\n'})
			if l.cut && !l.long && len(l.text) == 0 {
				return
			}
			if !yield(l, nil) || l.cut {
				return
			}
		}
	}
}
