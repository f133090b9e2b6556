package archive

import (
	"archive/tar"
	"bytes"
	"compress/gzip"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"slices"
	"strings"
	"sync"
	"time"

	"portcullis/observe/redact"
)

// Part is one thing to gather.
type Part struct {
	Name    string        // a stable word: "agent/status"
	Timeout time.Duration // 0: that of the Options
	// Gather puts what it finds into out. It may be called beside others, and
	// should end when ctx does.
	Gather func(ctx context.Context, out *Files) error
}

// notHere says that there is nothing to gather, which is no failure.
type notHere struct{ why string }

func (e notHere) Error() string { return e.why }

// NotHere is the error of a part that has nothing to gather on this node, and
// why that is no failure: no agent, no such file.
func NotHere(format string, args ...any) error { return notHere{fmt.Sprintf(format, args...)} }

// IsNotHere reports whether an error is of NotHere.
func IsNotHere(err error) bool { return errors.As(err, new(notHere)) }

// Options are the bounds of an archive. All are required but Say.
type Options struct {
	Top     string           // the directory within the archive that everything is in
	Limit   int64            // bytes of all files, before they are compressed
	Longest int64            // bytes of one file
	Timeout time.Duration    // of one part
	Now     func() time.Time // what the files are dated
	Say     func(format string, args ...any)
}

// Archive is one that is being written.
type Archive struct {
	o   Options
	mu  sync.Mutex
	gz  *gzip.Writer
	tar *tar.Writer
	// left is what still fits, without what parts that run have claimed.
	left  int64
	parts []Entry
	names map[string]int // in use; the last number that was put behind each
	err   error          // writing has failed; nothing more is written
}

// New begins an archive on w.
func New(w io.Writer, o Options) *Archive {
	if o.Say == nil {
		o.Say = func(string, ...any) {}
	}
	gz := gzip.NewWriter(w)
	return &Archive{o: o, gz: gz, tar: tar.NewWriter(gz), left: o.Limit, names: map[string]int{}}
}

// Run gathers parts, so many at once, and returns when all are in the archive.
// What fails is in the manifest. An error means that the archive cannot be
// written, or that whoever asked for it has given up (context.Canceled); a ctx
// that ends by its deadline leaves out what is not gathered by then, which is
// told like any failure.
func (a *Archive) Run(ctx context.Context, parts []Part, atOnce int) error {
	var wg sync.WaitGroup
	places := make(chan struct{}, max(1, atOnce))
	for i := range parts {
		places <- struct{}{}
		wg.Go(func() {
			defer func() { <-places }()
			a.run(ctx, &parts[i])
		})
	}
	wg.Wait()
	if errors.Is(ctx.Err(), context.Canceled) {
		return ctx.Err()
	}
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.err != nil {
		return fmt.Errorf("write the archive: %w", a.err)
	}
	return nil
}

// grace is how long a part that does not end with its context is waited for.
const grace = 200 * time.Millisecond

// run gathers one part.
func (a *Archive) run(ctx context.Context, p *Part) {
	e := Entry{Part: p.Name}
	if ctx.Err() != nil {
		e.Error = "not begun: " + gone(ctx, "the whole")
		a.commit(&e, nil)
		return
	}
	began := time.Now()
	limit := p.Timeout
	if limit == 0 {
		limit = a.o.Timeout
	}
	within, cancel := context.WithTimeout(ctx, limit)
	defer cancel()
	a.mu.Lock()
	f := &Files{left: a.left, longest: a.o.Longest}
	a.mu.Unlock()
	done := make(chan error, 1)
	go func() {
		defer func() {
			if r := recover(); r != nil { // one part is not worth all others
				done <- fmt.Errorf("failed in an unforeseen way: %v", r)
			}
		}()
		done <- p.Gather(within, f)
	}()
	var err error
	select {
	case err = <-done:
	case <-within.Done():
		select {
		case err = <-done:
		case <-time.After(grace):
			err = within.Err()
		}
	}
	if err != nil && errors.Is(within.Err(), context.DeadlineExceeded) {
		err = errors.New("not done: " + gone(ctx, "it") + kept(err))
	}
	held, notes := f.end()
	e.Seconds, e.Notes = time.Since(began).Seconds(), notes
	var nothing notHere
	if errors.As(err, &nothing) {
		e.NotHere, _ = redact.Text(nothing.why)
	} else if err != nil {
		e.Error, _ = redact.Text(err.Error())
	}
	a.commit(&e, held)
}

// gone says which time was over.
func gone(ctx context.Context, what string) string {
	if errors.Is(ctx.Err(), context.Canceled) {
		return "interrupted"
	}
	if ctx.Err() != nil {
		what = "the whole"
	}
	return what + " took longer than it may (--timeout)"
}

func kept(err error) string {
	if errors.Is(err, context.DeadlineExceeded) || errors.Is(err, context.Canceled) {
		return ""
	}
	return ": " + err.Error()
}

// commit writes what a part has gathered.
func (a *Archive) commit(e *Entry, files []held) {
	a.mu.Lock()
	defer a.mu.Unlock()
	for _, h := range files {
		if h.entry.Bytes > a.left {
			e.Error = strings.TrimPrefix(e.Error+fmt.Sprintf("; %s was left out: no more than --size-limit fits", h.entry.Name), "; ")
			continue
		}
		h.entry.Name = a.unused(h.entry.Name)
		a.write(h.entry.Name, h.data)
		a.left -= h.entry.Bytes
		e.Files = append(e.Files, h.entry)
	}
	a.parts = append(a.parts, *e)
	a.say(e)
}

func (a *Archive) say(e *Entry) {
	var bytes int64
	for _, f := range e.Files {
		bytes += f.Bytes
	}
	switch {
	case e.Error != "":
		a.o.Say("%-24s FAILED: %s", e.Part, strings.ReplaceAll(e.Error, "\n", "; "))
	case e.NotHere != "":
		a.o.Say("%-24s nothing: %s", e.Part, strings.ReplaceAll(e.NotHere, "\n", "; "))
	default:
		a.o.Say("%-24s %s", e.Part, Size(bytes))
	}
}

// unused is the name, or one beside it if two parts have chosen the same.
func (a *Archive) unused(name string) string {
	for free := name; ; {
		if a.names[free] == 0 {
			a.names[free] = 1
			return free
		}
		a.names[name]++ // of so many that are the same each is looked for once
		free = fmt.Sprintf("%s.%d", name, a.names[name])
	}
}

func (a *Archive) write(name string, data []byte) {
	if a.err != nil {
		return
	}
	a.err = a.tar.WriteHeader(&tar.Header{Name: a.o.Top + "/" + name, Mode: 0o600, Size: int64(len(data)), ModTime: a.o.Now(), Format: tar.FormatPAX})
	if a.err == nil {
		_, a.err = a.tar.Write(data)
	}
}

// Close writes the manifest and errors.txt, and ends the archive. about is what
// the manifest says of the whole beside its parts.
func (a *Archive) Close(about Manifest) (Manifest, error) {
	a.mu.Lock()
	defer a.mu.Unlock()
	about.Parts = a.parts
	slices.SortStableFunc(about.Parts, func(x, y Entry) int { return strings.Compare(x.Part, y.Part) })
	about.sum()
	about.Seconds = a.o.Now().Sub(about.Began).Seconds()
	var text bytes.Buffer
	e := json.NewEncoder(&text)
	e.SetEscapeHTML(false)
	e.SetIndent("", "  ")
	if err := e.Encode(about); err != nil {
		return about, err
	}
	a.write("manifest.json", text.Bytes())
	a.write("errors.txt", []byte(about.Troubles()))
	return about, errors.Join(a.err, a.tar.Close(), a.gz.Close())
}
