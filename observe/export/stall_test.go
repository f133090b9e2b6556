package export

import (
	"bytes"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// pipe makes a pipe that nobody reads, and has it read when the test ends.
func (e *exporter) pipe(name string) {
	e.t.Helper()
	path := filepath.Join(e.dir, name)
	if err := unix.Mkfifo(path, 0o600); err != nil {
		e.t.Fatal(err)
	}
	e.t.Cleanup(func() {
		if f, err := os.OpenFile(path, os.O_RDONLY|unix.O_NONBLOCK, 0); err == nil { // who waits to open it goes on
			time.AfterFunc(time.Second, func() { f.Close() })
		}
	})
}

// piped is what was read from a pipe.
type piped struct {
	t    *testing.T
	mu   sync.Mutex
	text []byte // guarded by mu
}

func (p *piped) Write(b []byte) (int, error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.text = append(p.text, b...)
	return len(b), nil
}

// ports returns those of the flows until now, of equal ones in a row one.
func (p *piped) ports() []int {
	p.mu.Lock()
	defer p.mu.Unlock()
	ports, _ := read(p.t, bytes.NewReader(p.text))
	return slices.Compact(ports)
}

// reads reads a pipe until the test ends.
func (e *exporter) reads(name string) *piped {
	e.t.Helper()
	hold, err := os.OpenFile(filepath.Join(e.dir, name), os.O_RDWR, 0) // or a moment without a writer were the end
	if err != nil {
		e.t.Fatal(err)
	}
	f, err := os.Open(hold.Name())
	if err != nil {
		e.t.Fatal(err)
	}
	p, done := &piped{t: e.t}, make(chan struct{})
	go func() {
		defer close(done)
		io.Copy(p, f) //nolint:errcheck // what is missing is seen
	}()
	e.t.Cleanup(func() { e.stop(); hold.Close(); <-done; f.Close() })
	return p
}

// ends reports that it ends, though a file hangs.
func (e *exporter) ends() {
	e.t.Helper()
	done := make(chan struct{})
	go func() { e.stop(); close(done) }()
	select {
	case <-done:
	case <-time.After(time.Minute):
		e.t.Fatal("it does not end")
	}
}

// A file that hangs keeps nobody: not the other exports, not new settings, not the
// agent's end; and is an alarm that says what is lost.
func TestAFileThatHangs(t *testing.T) {
	e := start(t, 8, "exports: []")
	e.pipe("hangs")
	e.settings("exports:\n- {name: hangs, file: DIR/hangs}\n- {name: all, file: DIR/all.jsonl}\n")
	e.await("both have begun", func() bool { e.put(1, 2); return len(e.ports("all.jsonl")) > 0 })
	e.await("the alarm, with what is lost", func() bool {
		e.put(2, 3)
		err := e.problem("hangs")
		return err != nil && strings.Contains(err.Error(), "has taken nothing") && !strings.Contains(err.Error(), " 0 are lost")
	})
	e.settings("exports:\n- {name: other, file: DIR/other.jsonl}\n- {name: hangs, file: DIR/hangs, fields: [l4]}\n")
	e.await("new settings are taken", func() bool { e.put(3, 4); return len(e.ports("other.jsonl")) > 0 })
	for _, when := range []string{"of what was left", "again, while that hangs"} { // or it would expire
		e.await("the alarm tells "+when, func() bool { return e.problem(former(filepath.Join(e.dir, "hangs"))) != nil })
		e.mu.Lock()
		clear(e.problems)
		e.mu.Unlock()
	}
	e.ends()
}

// When it does not hang any more, all is in it or told of as lost, once, and in order;
// by the settings that are in force.
func TestAFileThatHangsForAWhile(t *testing.T) {
	e := start(t, 1000, "exports: []")
	e.pipe("hangs")
	e.settings("exports: [{name: a, file: DIR/hangs, fields: [l4]}, {name: sign, file: DIR/sign.jsonl}]")
	e.await("it has begun", func() bool { e.put(0, 1); return len(e.ports("sign.jsonl")) > 0 })
	e.put(1, 10)
	e.await("the alarm", func() bool { return e.problem("a") != nil })
	e.settings("exports: [{name: a, file: DIR/hangs, fields: [l4, verdict]}]")
	e.await("the settings are taken", func() bool { return e.problem(former(filepath.Join(e.dir, "hangs"))) != nil })
	e.put(10, 20)
	read := e.reads("hangs")
	e.await("the alarm is over", func() bool {
		return e.problem(former(filepath.Join(e.dir, "hangs"))) == nil && e.problem("a") == nil
	})
	e.put(20, 21)
	e.await("all of it, once and in order", func() bool { return slices.Equal(read.ports(), upTo(0, 21, 1)) })
	e.ends()
}

// A pipe is never full: nothing is put in its place.
func TestAPipeIsNotRotated(t *testing.T) {
	e := start(t, 1000, "exports: []")
	e.pipe("pipe")
	read := e.reads("pipe")
	e.settings("exports: [{name: a, file: DIR/pipe, maxBytes: 4096, fields: [l4]}, {name: sign, file: DIR/sign.jsonl}]")
	e.await("it has begun", func() bool { e.put(0, 1); return len(e.ports("sign.jsonl")) > 0 })
	e.put(1, 400)
	e.await("all of it", func() bool { return slices.Equal(read.ports(), upTo(0, 400, 1)) })
	e.ends()
	if info, err := os.Stat(filepath.Join(e.dir, "pipe")); err != nil || info.Mode().IsRegular() {
		t.Errorf("%v, %v", info, err)
	}
}
