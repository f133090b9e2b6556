package audit

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/spiffe/go-spiffe/v2/svid/x509svid"
	"go.uber.org/zap"
	"go.uber.org/zap/zaptest/observer"

	"portcullis/ipcache/lease"
)

// An end that was cut off just after a checkpoint, or with whole files, is no
// sealed end: only an agent that stops signs as one that stops.
func TestCutAtCheckpoints(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		dir := t.TempDir()
		a := newAuthority(t)
		l, err := Open(Config{Path: filepath.Join(dir, "audit.log"), Node: "n1", Signer: a.agent("n1"), MaxBytes: 4000})
		must(t, err)
		for range 30 {
			must(t, l.Append(full, peer))
			time.Sleep(90 * time.Second) // a checkpoint after each, now and then a file
		}
		must(t, l.Close())
		o := a.options()
		o.Sealed = true
		r := whole(t, o, dir)
		if len(r.Files) < 3 {
			t.Fatalf("%d files", len(r.Files))
		}
		last := r.Files[len(r.Files)-1]
		data, err := os.ReadFile(last)
		must(t, err)
		lines := bytes.SplitAfter(data, []byte("\n"))
		for n := len(lines) - 2; n >= 0; n-- {
			if n > 0 {
				must(t, os.WriteFile(last, bytes.Join(lines[:n], nil), 0o600))
			} else {
				must(t, os.Remove(last))
			}
			if r := judged(t, o, dir); r.Broken == nil || r.Broken.Sequence != r.Head.Sequence+1 {
				t.Errorf("%d lines of the last file are left, and the log is called whole and sealed: %s", n, show(r))
			}
			whole(t, a.options(), dir) // of what is there every record is as it was written
		}
	})
}

// An agent that stops when everything is signed has stopped in order too, and so
// has one that cannot sign.
func TestIdleStopIsNoCrash(t *testing.T) {
	for _, can := range []bool{true, false} {
		synctest.Test(t, func(t *testing.T) {
			a := newAuthority(t)
			cfg := Config{Path: filepath.Join(t.TempDir(), "audit.log"), Node: "n1", Signer: &late{}}
			if can {
				cfg.Signer = a.agent("n1")
			}
			for range 2 {
				l, err := Open(cfg)
				must(t, err)
				must(t, l.Append(full, peer))
				time.Sleep(10 * time.Minute) // signed, or told that it cannot be
				must(t, l.Close())
			}
			o := Options{}
			if can {
				o = a.options()
				o.Sealed = true
			}
			if r := whole(t, o, cfg.Path); r.Unclean != 0 || r.Starts != 2 {
				t.Errorf("can sign %v: %s", can, show(r))
			}
		})
	}
}

// Nothing follows the end of an agent that stops: no new file where the end fills
// one, and no word of records that come too late.
func TestNothingFollowsTheEnd(t *testing.T) {
	for name, end := range map[string]func(*testing.T, *Log, *knocker){
		"the end fills the file": func(t *testing.T, l *Log, _ *knocker) {
			time.Sleep(rotateEvery)
			must(t, l.ask(func(w *writer) { w.cfg.MaxBytes = w.size + 1 }))
		},
		"late records": func(t *testing.T, l *Log, k *knocker) {
			n := 0
			k.knock = func() { // at each signature, the end's too
				for n < 10 && !errors.Is(l.Append(full, peer), ErrClosed) {
					n++
					time.Sleep(time.Second)
				}
				n++
			}
			must(t, l.Append(full, peer))
		},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				a := newAuthority(t)
				k := &knocker{Signer: a.agent("n1")}
				cfg := Config{Path: filepath.Join(t.TempDir(), "audit.log"), Node: "n1", Signer: k, Records: 1}
				for range 2 {
					l, err := Open(cfg)
					must(t, err)
					synctest.Wait()
					end(t, l, k)
					must(t, l.Close())
					k.knock = nil
				}
				o := a.options()
				o.Sealed = true
				if r := whole(t, o, filepath.Dir(cfg.Path)); r.Unclean != 0 || r.Starts != 2 {
					t.Errorf("%s", show(r))
				}
			})
		})
	}
}

// knocker does something when it is to sign.
type knocker struct {
	Signer
	knock func()
}

func (k *knocker) GetX509SVID() (*x509svid.SVID, error) {
	if k.knock != nil {
		k.knock()
	}
	return k.Signer.GetX509SVID()
}

// Between the start after a crash and the first checkpoint the log is not called
// broken for the time in which no agent ran.
func TestStartLongAfterACrash(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		a := newAuthority(t)
		cfg := Config{Path: filepath.Join(t.TempDir(), "audit.log"), Node: "n1", Signer: a.agent("n1")}
		l, err := Open(cfg)
		must(t, err)
		time.Sleep(2 * time.Minute)
		must(t, l.Append(full, peer))
		synctest.Wait()
		data, err := os.ReadFile(cfg.Path)
		must(t, err)
		must(t, l.Close())
		must(t, os.WriteFile(cfg.Path, data, 0o600)) // it had died there
		time.Sleep(24 * time.Hour)
		cfg.Signer = a.agent("n1") // the one before has expired
		l, err = Open(cfg)
		must(t, err)
		synctest.Wait()
		if r := whole(t, a.options(), cfg.Path); r.Unclean != 1 || r.Signed == r.Head.Sequence {
			t.Errorf("%s", show(r))
		}
		must(t, l.Close())
	})
}

// While no agent runs, who can write the file can add records, which the next
// agent continues and signs. They are told as such, and more of them than an
// agent leaves unsigned are a break.
func TestForgedWhileNoAgentRuns(t *testing.T) {
	a := newAuthority(t)
	for _, n := range []int{10, 4000} {
		cfg := Config{Path: filepath.Join(t.TempDir(), "audit.log"), Node: "n1", Signer: a.agent("n1")}
		l, err := Open(cfg)
		must(t, err)
		must(t, l.Append(full, peer))
		must(t, l.Close())
		last, err := lastOf(cfg.Path)
		must(t, err)
		first := last.Sequence + 1
		data, err := os.ReadFile(cfg.Path)
		must(t, err)
		for range n {
			r := &Record{Sequence: last.Sequence + 1, Previous: last.Hash, Time: time.Now().UTC(), Node: "n1", Kind: lease.LogConfirmed}
			text, err := r.seal()
			must(t, err)
			data, last = append(data, text...), r
		}
		must(t, os.WriteFile(cfg.Path, data, 0o600))
		l, err = Open(cfg)
		must(t, err)
		must(t, l.Close())
		r := judged(t, a.options(), cfg.Path)
		switch {
		case n < 1000 && (r.Broken != nil || r.Adopted != uint64(n)):
			t.Errorf("%d forged: %s", n, show(r))
		case n > 1000 && (r.Broken == nil || r.Broken.Sequence != first):
			t.Errorf("%d forged from %d on: %s", n, first, show(r))
		}
	}
}

// Nothing of a report rests on a record that may not be as it was written.
func TestReportLeavesOutWhatIsInDoubt(t *testing.T) {
	a := newAuthority(t)
	dir := t.TempDir()
	path := filepath.Join(dir, "audit.log")
	l, err := Open(Config{Path: path, Node: "n1", Signer: a.agent("n1"), Records: 4})
	must(t, err)
	for i := range 12 {
		e := full
		e.Reason = fmt.Sprintf("reason %d", i)
		must(t, l.Append(e, peer))
		must(t, l.ask(func(w *writer) { w.drain(); w.flush() }))
	}
	must(t, l.Close())
	data, err := os.ReadFile(path)
	must(t, err)
	rewrite := func(at int, change func(*Record), chain bool) string {
		var out []byte
		prev := ""
		for i, text := range bytes.SplitAfter(data, []byte("\n")) {
			r, err := parse(bytes.TrimSuffix(text, []byte("\n")))
			if err != nil || i < at {
				out = append(out, text...)
				continue
			}
			if i == at {
				change(r)
			} else if chain {
				r.Previous = prev
			} else {
				out = append(out, text...)
				continue
			}
			text, err = r.seal()
			must(t, err)
			prev, out = r.Hash, append(out, text...)
		}
		dir := t.TempDir()
		must(t, os.WriteFile(filepath.Join(dir, "audit.log"), out, 0o600))
		return dir
	}
	lie := func(r *Record) { r.Reason = "LIE" }
	inserted := bytes.SplitAfter(data, []byte("\n"))
	forged := &Record{Sequence: 3, Previous: zeroHash, Time: time.Now().UTC(), Node: "n1", Kind: lease.LogRefusal, Reason: "LIE"}
	text, err := forged.seal()
	must(t, err)
	more := append([][]byte{}, inserted[:9]...)
	more = append(append(more, text), inserted[9:]...)
	late := t.TempDir()
	must(t, os.WriteFile(filepath.Join(late, "audit.log"), bytes.Join(more, nil), 0o600))
	for what, dir := range map[string]string{
		"edited, its hash made to fit":    rewrite(8, lie, false),
		"edited, and all hashes after it": rewrite(8, lie, true),
		"inserted with an earlier number": late,
	} {
		r := report(t, a.options(), Filter{}, dir)
		if r.Logs[0].Broken == nil {
			t.Fatalf("%s: not broken", what)
		}
		if len(r.Refusals) == 0 {
			t.Errorf("%s: nothing is left", what)
		}
		for _, x := range r.Refusals {
			if x.Reason == "LIE" {
				t.Errorf("%s: the report believes it", what)
			}
		}
	}
}

// Somebody removes the file under the agent: that is told, and the log goes on
// where it can be found.
func TestFileRemovedUnderTheWriter(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		core, logs := observer.New(zap.WarnLevel)
		a := newAuthority(t)
		path := filepath.Join(t.TempDir(), "audit.log")
		l, err := Open(Config{Path: path, Node: "n1", Signer: a.agent("n1"), Log: zap.New(core)})
		must(t, err)
		must(t, l.Append(full, peer))
		time.Sleep(3 * tick)
		must(t, os.Remove(path))
		time.Sleep(3 * tick)
		if writing, _ := l.Problems(); !strings.Contains(writing, "removed") {
			t.Errorf("%q", writing)
		}
		must(t, l.Append(full, peer))
		must(t, l.Close())
		if n := logs.FilterMessageSnippet("ALARM").Len(); n != 1 {
			t.Errorf("%d alarms", n)
		}
		// What went is missed, what came after is there.
		if b := judged(t, a.options(), path).Broken; b == nil || b.Sequence != 3 || !strings.Contains(b.What, "missing") {
			t.Errorf("%+v", b)
		}
		if len(rows(t, path)) < 3 {
			t.Errorf("%v", rows(t, path))
		}
	})
}

// A disk that takes the records and does not keep them takes nothing new, until
// it does.
func TestFailingSync(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		l, err := Open(Config{Path: filepath.Join(t.TempDir(), "audit.log"), Node: "n1"})
		must(t, err)
		time.Sleep(2 * tick)
		r, w, err := os.Pipe() // takes writes, and cannot be synced
		must(t, err)
		defer r.Close()
		var file *os.File
		must(t, l.ask(func(x *writer) { file, x.file = x.file, w }))
		must(t, l.Append(full, peer))
		time.Sleep(2 * tick)
		for range 20 {
			if time.Sleep(tick / 4); l.Writable() {
				t.Fatal("it counts as writable between two tries to sync")
			}
		}
		must(t, l.ask(func(x *writer) { x.file = file }))
		time.Sleep(3 * tick)
		if !l.Writable() {
			t.Error("not writable when it works again")
		}
		must(t, l.Close())
		must(t, w.Close())
	})
}
