package audit

import (
	"encoding/json"
	"errors"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"
	"go.uber.org/zap"
	"go.uber.org/zap/zaptest/observer"
	"golang.org/x/sys/unix"

	"portcullis/identity"
	"portcullis/ipcache/lease"
)

var full = lease.LogEntry{
	Kind: lease.LogRefusal, Peer: "n2", IP: netip.MustParseAddr("10.1.0.7"), Generation: 1<<64 - 1, UID: identity.UID{1},
	Identity: identity.New("portcullis.lab", "default", "sleep", map[string]string{"app": "sleep"}),
	Evidence: identity.EvidenceLease, Reason: "quarantined\n\"x\"", Duration: 1500 * time.Millisecond,
}

func lines(t *testing.T, path string) (out []map[string]any) {
	t.Helper()
	data, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	for l := range strings.Lines(string(data)) {
		m := map[string]any{}
		if err := json.Unmarshal([]byte(l), &m); err != nil || !strings.HasSuffix(l, "\n") {
			m = map[string]any{"bad": l}
		}
		out = append(out, m)
	}
	return out
}

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

func TestFormat(t *testing.T) {
	path := filepath.Join(t.TempDir(), "audit.log")
	l, err := Open(path, "n1", nil)
	must(t, err)
	must(t, l.Append(full))
	must(t, l.Append(lease.LogEntry{Kind: lease.LogSessionUp, Peer: "n2"}))
	must(t, l.Append(lease.LogEntry{Kind: lease.LogGrant, Identity: identity.Identity{Reserved: "remote-node"}}))
	must(t, l.Close())
	got := lines(t, path)
	for _, m := range got {
		at, err := time.Parse(time.RFC3339Nano, m["time"].(string))
		if ago := time.Since(at); err != nil || ago < 0 || ago > time.Minute || at.Location() != time.UTC {
			t.Errorf("time %v: %v", m["time"], err)
		}
		delete(m, "time")
	}
	want := []map[string]any{
		{
			"node": "n1", "kind": "refusal", "peer": "n2", "ip": "10.1.0.7", "generation": "18446744073709551615",
			"uid": "01000000-0000-0000-0000-000000000000", "evidence": "lease", "reason": "quarantined\n\"x\"", "duration": 1.5,
			"identity": map[string]any{"trustDomain": "portcullis.lab", "namespace": "default", "serviceAccount": "sleep", "labels": map[string]any{"app": "sleep"}},
		},
		{"node": "n1", "kind": "session-up", "peer": "n2"},
		{"node": "n1", "kind": "grant", "identity": map[string]any{"reserved": "remote-node"}},
	}
	if d := cmp.Diff(want, got); d != "" {
		t.Error(d)
	}
	if info, err := os.Stat(path); err != nil || info.Mode().Perm() != 0o600 {
		t.Errorf("mode %v %v", info.Mode(), err)
	}
}

// Each line must be one write: two agents and many goroutines append to the
// same file, and no line may be cut.
func TestLinesDoNotMix(t *testing.T) {
	path := filepath.Join(t.TempDir(), "audit.log")
	var wg sync.WaitGroup
	for range 2 {
		l, err := Open(path, "n1", nil)
		must(t, err)
		defer l.Close()
		for range 4 {
			wg.Go(func() {
				for range 100 {
					if err := l.Append(full); err != nil {
						t.Error(err)
					}
				}
			})
		}
	}
	wg.Wait()
	got := lines(t, path)
	for _, m := range got {
		if m["bad"] != nil {
			t.Fatalf("%q", m["bad"])
		}
	}
	if len(got) != 800 {
		t.Errorf("%d lines, want 800", len(got))
	}
}

// What a dying agent left half written must not spoil the next line.
func TestHalfALineStandsAlone(t *testing.T) {
	path := filepath.Join(t.TempDir(), "audit.log")
	must(t, os.WriteFile(path, []byte("{\"kind\":\"grant\"}\n{\"ki"), 0o600))
	l, err := Open(path, "n1", nil)
	must(t, err)
	must(t, l.Append(full))
	must(t, l.Append(full))
	must(t, l.Close())
	got := lines(t, path)
	if len(got) != 4 || got[0]["kind"] != "grant" || got[1]["bad"] != "{\"ki\n" || got[2]["kind"] != "refusal" || got[3]["kind"] != "refusal" {
		t.Errorf("%v", got)
	}
}

// /dev/full refuses every write, as a full disk does.
func TestAFailingWriteIsNotSilent(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		core, logs := observer.New(zap.WarnLevel)
		l, err := Open("/dev/full", "n1", zap.New(core))
		must(t, err)
		for i := range 5 {
			if err := l.Append(full); !errors.Is(err, unix.ENOSPC) {
				t.Errorf("Append: %v", err)
			}
			if l.Lost() != uint64(i+1) {
				t.Errorf("Lost: %d after %d lines", l.Lost(), i+1)
			}
		}
		alarms := func() int { return logs.FilterLevelExact(zap.ErrorLevel).FilterMessageSnippet("ALARM").Len() }
		if alarms() != 1 {
			t.Errorf("%d alarms for five lines at once", alarms())
		}
		time.Sleep(alarmEvery)
		l.Append(full)
		if alarms() != 2 {
			t.Errorf("%d alarms, the trouble goes on and nobody hears", alarms())
		}
		// Once there is room, the gap is told.
		l.path = filepath.Join(t.TempDir(), "audit.log")
		must(t, l.Reopen())
		must(t, l.Append(full))
		if e := logs.FilterMessageSnippet("written again").All(); len(e) != 1 || e[0].ContextMap()["missing"] != uint64(6) {
			t.Errorf("%v", e)
		}
		must(t, l.Append(full))
		if n := logs.FilterMessageSnippet("written again").Len(); n != 1 {
			t.Errorf("told %d times", n)
		}
		must(t, l.Close())
		if err := l.Append(full); !errors.Is(err, os.ErrClosed) || l.Lost() != 7 {
			t.Errorf("after Close: %v, %d lost", err, l.Lost())
		}
	})
}

func TestReopen(t *testing.T) {
	path := filepath.Join(t.TempDir(), "audit.log")
	l, err := Open(path, "n1", nil)
	must(t, err)
	defer l.Close()
	must(t, l.Append(full))
	must(t, os.Rename(path, path+".1"))
	must(t, l.Append(full))
	must(t, l.Reopen())
	must(t, l.Append(full))
	if a, b := len(lines(t, path+".1")), len(lines(t, path)); a != 2 || b != 1 {
		t.Errorf("%d lines in the old file and %d in the new", a, b)
	}
	if _, err := Open(filepath.Join(path, "x"), "n1", nil); err == nil {
		t.Error("a path that cannot be opened was taken")
	}
}

// A disk that becomes full within a line leaves half of it; it must stand alone
// once there is room.
func TestDiskFullWithinALine(t *testing.T) {
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
	l, err := Open(path, "n1", nil)
	must(t, err)
	defer l.Close()
	written := 0
	for ; l.Append(full) == nil; written++ {
	}
	if l.Append(full) == nil {
		t.Error("a full disk took a line")
	}
	must(t, unix.Mount("tmpfs", dir, "tmpfs", unix.MS_REMOUNT, "size=64k"))
	must(t, l.Append(full))
	got := lines(t, path)
	bad := 0
	for _, m := range got {
		if m["bad"] != nil {
			bad++
		}
	}
	if bad > 1 || len(got)-bad != written+1 {
		t.Errorf("%d lines, %d of them bad; %d were written", len(got), bad, written+1)
	}
	if l.Lost() != 2 {
		t.Errorf("Lost: %d", l.Lost())
	}
}

func BenchmarkAppend(b *testing.B) {
	l, err := Open(filepath.Join(b.TempDir(), "audit.log"), "n1", nil)
	if err != nil {
		b.Fatal(err)
	}
	defer l.Close()
	for b.Loop() {
		if err := l.Append(full); err != nil {
			b.Fatal(err)
		}
	}
}
