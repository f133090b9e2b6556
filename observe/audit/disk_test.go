package audit

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"go.uber.org/zap"
	"go.uber.org/zap/zaptest/observer"
	"golang.org/x/sys/unix"
)

// /dev/full refuses every write, as a full disk does. What waits is bounded,
// what does not fit is counted, and the log tells of it when it can.
func TestAFailingWriteIsNotSilent(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		core, logs := observer.New(zap.WarnLevel)
		a := newAuthority(t)
		l, err := Open(Config{Path: "/dev/full", Node: "n1", Log: zap.New(core), Queue: 100, Signer: a.agent("n1")})
		must(t, err)
		synctest.Wait()
		if l.Writable() {
			t.Error("writable")
		}
		kept := 0
		for i := range 1000 {
			if err := l.Append(full, nil); err == nil {
				kept++
			} else if !errors.Is(err, ErrFull) {
				t.Fatal(err)
			}
			if i%50 == 49 {
				synctest.Wait()
			}
		}
		if kept > 100+2*batch || l.Lost() != uint64(1000-kept) {
			t.Errorf("%d kept, %d lost", kept, l.Lost())
		}
		if writing, _ := l.Problems(); !strings.Contains(writing, "no space") {
			t.Errorf("%q", writing)
		}
		alarms := func() int { return logs.FilterLevelExact(zap.ErrorLevel).FilterMessageSnippet("ALARM").Len() }
		if alarms() != 1 {
			t.Errorf("%d alarms at once", alarms())
		}
		time.Sleep(alarmEvery + 2*tick)
		if alarms() != 2 {
			t.Errorf("%d alarms, the trouble goes on and nobody hears", alarms())
		}
		path := filepath.Join(t.TempDir(), "audit.log")
		must(t, l.ask(func(w *writer) { w.cfg.Path = path }))
		must(t, l.Reopen())
		synctest.Wait() // what was stuck leaves the queue, which is full until then
		must(t, l.Append(full, nil))
		must(t, l.Close())
		if !l.Writable() {
			t.Error("still not writable")
		}
		r := whole(t, a.options(), path)
		if r.Lost != uint64(1000-kept) {
			t.Errorf("the log tells of %d lost, not %d", r.Lost, 1000-kept)
		}
		refusals := 0
		for _, m := range rows(t, path) {
			if m["kind"] == "refusal" {
				refusals++
			}
		}
		if refusals != kept+1 {
			t.Errorf("%d of %d are in the log", refusals, kept+1)
		}
	})
}

// Close does not wait for ever for a disk that takes nothing, and says what is
// missing.
func TestCloseOnFullDisk(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		l, err := Open(Config{Path: "/dev/full", Node: "n1"})
		must(t, err)
		for range 2000 {
			must(t, l.Append(full, nil))
		}
		if err := l.Close(); err == nil || l.Lost() < 2000 {
			t.Errorf("%v, %d lost", err, l.Lost())
		}
	})
}

func TestReopen(t *testing.T) {
	dir := t.TempDir()
	path := filepath.Join(dir, "audit.log")
	a := newAuthority(t)
	l, err := Open(Config{Path: path, Node: "n1", Signer: a.agent("n1")})
	must(t, err)
	must(t, l.Append(full, nil))
	must(t, l.Reopen()) // nobody moved it
	must(t, os.Rename(path, path+".1"))
	must(t, l.Append(full, nil))
	must(t, l.Reopen())
	must(t, l.Append(full, nil))
	must(t, l.Close())
	r := whole(t, a.options(), dir)
	if len(r.Files) != 2 || len(rows(t, path+".1")) != 5 || len(rows(t, path)) != 3 {
		t.Errorf("%+v: %d, %d", r, len(rows(t, path+".1")), len(rows(t, path)))
	}
	if _, err := Open(Config{Path: filepath.Join(path, "x"), Node: "n1"}); err == nil {
		t.Error("a path that cannot be opened was taken")
	}
	if _, err := Open(Config{Path: path, Node: "n2"}); err == nil {
		t.Error("another node's log is continued")
	}
}

// Files are begun by size and by age, and the oldest removed: the chain tells.
func TestRotation(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		dir := t.TempDir()
		path := filepath.Join(dir, "audit.log")
		a := newAuthority(t)
		key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
		must(t, err)
		s := signer{svid: a.svid("spiffe://portcullis.lab/portcullis/node/n1", key, 900*time.Hour)}
		l, err := Open(Config{Path: path, Node: "n1", Signer: s, MaxBytes: 20_000, Keep: 3, MaxAge: 30 * time.Hour})
		must(t, err)
		for range 40 {
			for range 10 {
				must(t, l.Append(full, peer))
			}
			time.Sleep(2 * tick)
		}
		time.Sleep(31 * time.Hour)
		time.Sleep(31 * time.Hour) // the third is of nothing but beginnings
		must(t, l.Close())
		o := a.options()
		o.Sealed = true
		r := whole(t, o, path)
		if len(r.Files) != 4 || r.First == 1 {
			t.Errorf("%+v", r)
		}
		if other := whole(t, o, dir); len(other.Files) != 4 || other.Head != r.Head {
			t.Errorf("%+v", other)
		}
		// The oldest that is kept is missing, without a word in the log.
		must(t, os.Remove(r.Files[0]))
		if b := judged(t, o, path).Broken; b == nil || !strings.Contains(b.What, "no record tells of their removal") {
			t.Errorf("%+v", b)
		}
	})
}

// A disk that becomes full within a line: the line is finished when there is
// room again, and nothing is lost that fitted into the queue.
func TestDiskFull(t *testing.T) {
	if os.Geteuid() != 0 {
		if os.Getenv("CI") == "true" {
			t.Fatal("this test mounts a tmpfs: run it as root")
		}
		t.Skip("this test mounts a tmpfs: run it as root")
	}
	dir := t.TempDir()
	must(t, unix.Mount("tmpfs", dir, "tmpfs", 0, "size=16k"))
	t.Cleanup(func() { unix.Unmount(dir, unix.MNT_DETACH) })
	path := filepath.Join(dir, "audit.log")
	a := newAuthority(t)
	for _, how := range []string{"more room", "dies", "moved away"} {
		t.Run(how, func(t *testing.T) {
			os.Remove(path)
			must(t, unix.Mount("tmpfs", dir, "tmpfs", unix.MS_REMOUNT, "size=16k"))
			cfg := Config{Path: path, Node: "n1", Signer: a.agent("n1")}
			l, err := Open(cfg)
			must(t, err)
			n := 0
			for deadline := time.Now().Add(60 * time.Second); ; {
				if writing, _ := l.Problems(); strings.Contains(writing, "no space") {
					break
				}
				if time.Now().After(deadline) {
					t.Fatal("16k took everything")
				}
				if len(l.queue) > 10 { // so that little is left to Close, whose patience has an end
					time.Sleep(time.Millisecond)
					continue
				}
				must(t, l.Append(full, peer))
				n++
			}
			switch how {
			case "dies":
				data, err := os.ReadFile(path) // as it is on the disk now
				must(t, err)
				if data[len(data)-1] == '\n' {
					t.Fatal("the disk became full just between two lines")
				}
				must(t, unix.Mount("tmpfs", dir, "tmpfs", unix.MS_REMOUNT, "size=64m"))
				must(t, l.Close())
				must(t, os.WriteFile(path, data, 0o600))
				l, err = Open(cfg)
				must(t, err)
			case "moved away":
				must(t, os.Rename(path, path+".full"))
				must(t, unix.Mount("tmpfs", dir, "tmpfs", unix.MS_REMOUNT, "size=64m"))
				must(t, l.Reopen())
			default:
				must(t, unix.Mount("tmpfs", dir, "tmpfs", unix.MS_REMOUNT, "size=64m"))
			}
			must(t, l.Append(full, peer))
			must(t, l.Close())
			r := whole(t, a.options(), dir)
			if got := r.Records - r.Checkpoints - r.Starts; how == "more room" && got != uint64(n+1) || l.Lost() != 0 {
				t.Errorf("%d of %d records, %d lost", got, n+1, l.Lost())
			}
			if (how == "dies") != (r.Unclean == 1) {
				t.Errorf("%+v", r)
			}
			os.Remove(path + ".full")
		})
	}
}
