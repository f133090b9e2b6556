package export

import (
	"bufio"
	"compress/gzip"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"
)

// output takes lines. Not safe for concurrent use.
type output interface {
	write(line []byte) error
	flush() error
	close() error
}

// stream writes to what is open already, and stays open.
type stream struct{ *bufio.Writer }

func (s stream) write(line []byte) error { _, err := s.Writer.Write(line); return err }
func (s stream) flush() error            { return s.Writer.Flush() }
func (s stream) close() error            { return s.Writer.Flush() }

// file writes to a file, and begins a new one when that is full. What is full is
// called NAME-TIME.EXT, and NAME-TIME.EXT.gz when it is compressed.
type file struct {
	e    *Export
	f    *os.File // nil: it could not be opened, or is not yet
	w    *bufio.Writer
	pipe bool // or a device: it is never full
	size int64
	now  func() time.Time
}

// stamp is the time in a file's name: names sort as the times do.
const stamp = "20060102T150405.000000000"

func (o *file) open() error {
	if err := os.MkdirAll(filepath.Dir(o.e.File), 0o750); err != nil {
		return err
	}
	f, err := os.OpenFile(o.e.File, os.O_APPEND|os.O_CREATE|os.O_WRONLY, 0o640)
	if err != nil {
		return err
	}
	info, err := f.Stat()
	if err != nil {
		return errors.Join(err, f.Close())
	}
	o.f, o.w, o.size, o.pipe = f, bufio.NewWriterSize(f, 64<<10), info.Size(), !info.Mode().IsRegular()
	if torn(o.e.File, o.size) {
		o.size++
		return o.w.WriteByte('\n') // or it would spoil the next line, too
	}
	return nil
}

// torn reports whether a file ends within a line: the disk was full then, or the
// agent ended.
func torn(path string, size int64) bool {
	if size == 0 {
		return false // nor is it looked at: it may be no regular file
	}
	f, err := os.Open(path)
	if err != nil {
		return false
	}
	defer f.Close()
	last := []byte{'\n'}
	_, err = f.ReadAt(last, size-1)
	return err == nil && last[0] != '\n'
}

func (o *file) write(line []byte) error {
	if o.f == nil {
		if err := o.open(); err != nil {
			return err
		}
	}
	if !o.pipe && o.size > 0 && o.size+int64(len(line)) > o.e.MaxBytes {
		if err := o.rotate(); err != nil {
			return err
		}
	}
	n, err := o.w.Write(line)
	o.size += int64(n)
	return err
}

func (o *file) flush() error {
	if o.f == nil {
		return nil
	}
	return o.w.Flush()
}

// close ends the file. A file that failed is closed too: the next write opens it
// again.
func (o *file) close() error {
	if o.f == nil {
		return nil
	}
	err := errors.Join(o.w.Flush(), o.f.Close())
	o.f, o.w = nil, nil
	return err
}

// rotate puts the file aside and begins a new one.
func (o *file) rotate() error {
	if err := o.close(); err != nil {
		return err
	}
	base, ext := o.parts()
	full := base + "-" + o.now().UTC().Format(stamp) + ext
	if err := os.Rename(o.e.File, full); err != nil {
		return err
	}
	var failed error
	if o.e.Compress {
		if err := compress(full); err != nil {
			failed = fmt.Errorf("compress %s: %w", full, err) // it stays as it is
		}
	}
	if err := errors.Join(failed, o.prune()); err != nil { // a full disk most of all needs what is old removed
		return err
	}
	return o.open()
}

func (o *file) parts() (base, ext string) {
	ext = filepath.Ext(o.e.File)
	return strings.TrimSuffix(o.e.File, ext), ext
}

// rotated returns the files that were put aside, the oldest first.
func (o *file) rotated() (out []string, err error) {
	base, ext := o.parts()
	entries, err := os.ReadDir(filepath.Dir(o.e.File))
	if err != nil {
		return nil, err
	}
	for _, e := range entries {
		rest, ok := strings.CutPrefix(e.Name(), filepath.Base(base)+"-")
		rest = strings.TrimSuffix(strings.TrimSuffix(rest, ".gz"), ext)
		if _, err := time.Parse(stamp, rest); ok && err == nil { // else it is somebody else's
			out = append(out, filepath.Join(filepath.Dir(o.e.File), e.Name()))
		}
	}
	slices.Sort(out)
	return out, nil
}

// prune removes the oldest of what was put aside.
func (o *file) prune() error {
	all, err := o.rotated()
	if err != nil {
		return err
	}
	for len(all) > o.e.Keep {
		if err := os.Remove(all[0]); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return err
		}
		all = all[1:]
	}
	return nil
}

// compress puts a file's compressed form in its place. Until that is whole the
// file stays.
func compress(path string) (err error) {
	in, err := os.Open(path)
	if err != nil {
		return err
	}
	defer in.Close()
	out, err := os.OpenFile(path+".gz.part", os.O_CREATE|os.O_TRUNC|os.O_WRONLY, 0o640)
	if err != nil {
		return err
	}
	z := gzip.NewWriter(out)
	_, err = io.Copy(z, in)
	if err = errors.Join(err, z.Close(), out.Close()); err != nil {
		return errors.Join(err, os.Remove(out.Name()))
	}
	return errors.Join(os.Rename(out.Name(), path+".gz"), os.Remove(path))
}
