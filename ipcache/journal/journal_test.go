package journal

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"
	"go.uber.org/zap"
	"go.uber.org/zap/zaptest/observer"
	"golang.org/x/sys/unix"

	"portcullis/identity"
	"portcullis/ipcache/lease"
)

var (
	boot  = identity.BootID{1}
	other = identity.BootID{2}
	equal = cmp.Options{cmpopts.EquateEmpty(), cmpopts.EquateComparable(netip.Addr{})}
)

func record(n int) lease.Record {
	kinds := []lease.RecordKind{lease.RecordGrant, lease.RecordGrantEnded, lease.RecordBound, lease.RecordEnded, lease.RecordWait}
	r := lease.Record{Kind: kinds[n%len(kinds)], At: lease.Time(n + 1), Boot: boot}
	if r.Kind != lease.RecordWait {
		r.IP, r.Generation, r.UID = netip.AddrFrom4([4]byte{10, 1, byte(n >> 8), byte(n)}), identity.Generation(n+1), identity.UID{byte(n)}
	}
	if r.Kind == lease.RecordGrant {
		r.Verifier, r.VerifierBoot = identity.NodeName(fmt.Sprint("node-", n)), other
	}
	return r
}

func records(n int) (out []lease.Record) {
	for i := range n {
		out = append(out, record(i))
	}
	return out
}

// tempDir returns a directory on a tmpfs if there is one, as in life: a rename
// on a disk's file system can wait for the disk.
func tempDir(t *testing.T) string {
	t.Helper()
	dir, err := os.MkdirTemp("/dev/shm", "journal")
	if err != nil {
		return t.TempDir()
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	return dir
}

func open(t *testing.T, dir string, boot identity.BootID) (*Journal, []lease.Record, lease.JournalState, *observer.ObservedLogs) {
	t.Helper()
	core, logs := observer.New(zap.InfoLevel)
	j, got, state, err := Open(dir, boot, zap.New(core))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { j.Close() })
	return j, got, state, logs
}

func appendAll(t *testing.T, j *Journal, in []lease.Record) {
	t.Helper()
	for _, r := range in {
		if err := j.Append(r); err != nil {
			t.Fatal(err)
		}
	}
}

func TestRecordsSurviveTheProcess(t *testing.T) {
	dir := filepath.Join(tempDir(t), "made", "on", "demand")
	j, got, state, _ := open(t, dir, boot)
	if state != lease.JournalMissing || len(got) != 0 {
		t.Errorf("at first: state %d, %v", state, got)
	}
	want := records(100)
	appendAll(t, j, want)
	if j.Len() != len(want) {
		t.Errorf("Len: %d", j.Len())
	}
	// A crash: nothing is closed in order but by the kernel.
	j.lock.Close()
	j, got, state, logs := open(t, dir, boot)
	if d := cmp.Diff(want, got, equal); state != lease.JournalPresent || d != "" {
		t.Errorf("state %d\n%s", state, d)
	}
	if logs.Len() != 0 {
		t.Errorf("unexpected: %v", logs.All())
	}
	appendAll(t, j, records(1))
	j.Close()
	j, got, _, _ = open(t, dir, boot)
	if len(got) != len(want)+1 {
		t.Errorf("%d records, want %d", len(got), len(want)+1)
	}
	j.Close()
}

// Until something was written, a restart must find what the first start found:
// else a crash would cut short the wait that it asks for.
func TestStateIsFoundAgainUntilSomethingWasWritten(t *testing.T) {
	dir := tempDir(t)
	expect := func(b identity.BootID, want lease.JournalState, n int) *Journal {
		t.Helper()
		j, got, state, _ := open(t, dir, b)
		if state != want || len(got) != n {
			t.Errorf("state %d with %d records, want %d with %d", state, len(got), want, n)
		}
		return j
	}
	expect(boot, lease.JournalMissing, 0).Close()
	j := expect(boot, lease.JournalMissing, 0)
	appendAll(t, j, records(2))
	j.Close()
	expect(boot, lease.JournalPresent, 2).Close()
	expect(other, lease.JournalOtherBoot, 0).Close()
	j = expect(other, lease.JournalOtherBoot, 0)
	if err := j.Compact(nil); err != nil { // nothing to know: said by who knows
		t.Fatal(err)
	}
	j.Close()
	expect(other, lease.JournalPresent, 0).Close()
}

// A crash can cut the file at any byte of the last record; whatever is cut, what
// was whole before must be there and nothing else.
func TestCutAtEveryByte(t *testing.T) {
	dir := tempDir(t)
	path := filepath.Join(dir, fileName)
	j, _, _, _ := open(t, dir, boot)
	ends := []int64{j.size}
	for _, r := range records(4) {
		appendAll(t, j, []lease.Record{r})
		ends = append(ends, j.size)
	}
	j.Close()
	data, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	for cut := range len(data) + 1 {
		if err := os.WriteFile(path, data[:cut], 0o600); err != nil {
			t.Fatal(err)
		}
		j, got, state, logs := open(t, dir, boot)
		whole := -1
		for _, e := range ends {
			if int64(cut) >= e {
				whole++
			}
		}
		if whole < 0 { // the header: the file was never cut there by a crash
			isCorrupt(t, fmt.Sprint("cut at ", cut), got, state, logs)
			j.Close()
			continue
		}
		want := lease.JournalPresent
		if whole == 0 {
			want = lease.JournalMissing
		}
		if d := cmp.Diff(records(whole), got, equal); d != "" || state != want {
			t.Fatalf("cut at %d: state %d, want %d\n%s", cut, state, want, d)
		}
		if torn := int64(cut) != ends[whole]; torn != (logs.FilterMessageSnippet("cut off").Len() == 1) {
			t.Errorf("cut at %d: logged %v", cut, logs.All())
		}
		// What follows must stand behind whole records.
		appendAll(t, j, []lease.Record{record(9)})
		j.Close()
		j, got, _, _ = open(t, dir, boot)
		if d := cmp.Diff(append(records(whole), record(9)), got, equal); d != "" {
			t.Fatalf("cut at %d, then appended:\n%s", cut, d)
		}
		j.Close()
	}
}

// isCorrupt expects a journal that asks for the whole wait, and that it was told.
func isCorrupt(t *testing.T, what string, got []lease.Record, state lease.JournalState, logs *observer.ObservedLogs) {
	t.Helper()
	now, err := bootTime()
	if err != nil {
		t.Fatal(err)
	}
	if state != lease.JournalPresent || len(got) != 1 || got[0].Kind != lease.RecordWait || got[0].Boot != boot {
		t.Fatalf("%s: state %d, %+v, want one RecordWait", what, state, got)
	}
	if left := got[0].At.Sub(now); left > longestLease || left < longestLease-time.Minute {
		t.Errorf("%s: the wait is %s, want %s", what, left, longestLease)
	}
	if logs.FilterMessageSnippet("cannot be read").FilterLevelExact(zap.ErrorLevel).Len() != 1 {
		t.Errorf("%s: nobody was told: %v", what, logs.All())
	}
}

// No changed bit may go unnoticed, wherever it is: in a length, it could hide
// all grants that follow.
func TestDamageAtEveryByte(t *testing.T) {
	dir := tempDir(t)
	path := filepath.Join(dir, fileName)
	j, _, _, _ := open(t, dir, boot)
	appendAll(t, j, records(3))
	j.Close()
	data, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	for i := range data {
		bad := append([]byte(nil), data...)
		bad[i] ^= 1 << (i % 8)
		if err := os.WriteFile(path, bad, 0o600); err != nil {
			t.Fatal(err)
		}
		j, got, state, logs := open(t, dir, boot)
		isCorrupt(t, fmt.Sprint("byte ", i), got, state, logs)
		if kept, err := os.ReadFile(filepath.Join(dir, corruptName)); err != nil || string(kept) != string(bad) {
			t.Fatalf("byte %d: the damaged journal was not kept: %v", i, err)
		}
		j.Close()
		// A crash right after it finds the same wait.
		j, again, _, _ := open(t, dir, boot)
		if d := cmp.Diff(got, again, equal); d != "" {
			t.Fatalf("byte %d, second start:\n%s", i, d)
		}
		j.Close()
	}
}

func TestWhatNoVersionWrote(t *testing.T) {
	dir := tempDir(t)
	path := filepath.Join(dir, fileName)
	j, _, _, _ := open(t, dir, boot)
	now := j.head.Created
	j.Close()
	good := header{format, boot, now, lease.JournalPresent}
	for name, frames := range map[string][]any{
		"a later format":    {header{format + 1, boot, now, lease.JournalPresent}},
		"an unknown origin": {header{format, boot, now, 9}},
		"the future":        {header{format, boot, now.Add(time.Hour), lease.JournalPresent}},
		"an unknown kind":   {good, lease.Record{Kind: 99, IP: netip.MustParseAddr("10.0.0.1")}},
		"a mapped IP":       {good, lease.Record{Kind: lease.RecordBound, IP: netip.MustParseAddr("::ffff:10.0.0.1")}},
		"no IP":             {good, lease.Record{Kind: lease.RecordBound}},
		"an unknown field":  {good, map[string]any{"Kind": 1, "IP": "10.0.0.1", "New": true}},
		"no record":         {good, "x"},
	} {
		var data []byte
		for _, v := range frames {
			var err error
			if data, err = appendFrame(data, v); err != nil {
				t.Fatal(err)
			}
		}
		if err := os.WriteFile(path, data, 0o600); err != nil {
			t.Fatal(err)
		}
		j, got, state, logs := open(t, dir, boot)
		isCorrupt(t, name, got, state, logs)
		j.Close()
	}
}

func TestCompact(t *testing.T) {
	dir := tempDir(t)
	j, _, _, _ := open(t, dir, boot)
	appendAll(t, j, records(500))
	before := j.size
	want := records(7)
	if err := j.Compact(want); err != nil {
		t.Fatal(err)
	}
	if j.size >= before || j.Len() != 7 {
		t.Errorf("%d bytes of %d, %d records", j.size, before, j.Len())
	}
	appendAll(t, j, []lease.Record{record(7)})
	if err := j.Compact([]lease.Record{{Kind: 99}}); err == nil {
		t.Error("a record that cannot be read back was written")
	}
	appendAll(t, j, []lease.Record{record(8)}) // the old file stands
	j.Close()
	// A crash before the rename leaves a file that must not be in the way.
	if err := os.WriteFile(filepath.Join(dir, newName), []byte("half"), 0o600); err != nil {
		t.Fatal(err)
	}
	j, got, state, _ := open(t, dir, boot)
	if d := cmp.Diff(records(9), got, equal); d != "" || state != lease.JournalPresent {
		t.Errorf("state %d\n%s", state, d)
	}
	if err := j.Compact(got); err != nil {
		t.Errorf("with a file left behind: %v", err)
	}
	j.Close()
}

func TestAppendRefuses(t *testing.T) {
	j, _, _, _ := open(t, tempDir(t), boot)
	for _, r := range []lease.Record{
		{}, {Kind: lease.RecordGrant}, {Kind: lease.RecordWait + 1, IP: netip.MustParseAddr("10.0.0.1")},
		{Kind: lease.RecordGrant, IP: netip.MustParseAddr("10.0.0.1"), Verifier: identity.NodeName(strings.Repeat("n", maxPayload))},
	} {
		if err := j.Append(r); err == nil {
			t.Errorf("%+v was written", r)
		}
	}
	if j.Len() != 0 {
		t.Errorf("%d records", j.Len())
	}
}

// The second agent of a node waits, says so, and goes on when the first ended.
func TestSecondAgentWaits(t *testing.T) {
	dir := tempDir(t)
	first, _, _, _ := open(t, dir, boot)
	ctx, cancel := context.WithCancelCause(t.Context())
	cancel(errors.New("enough"))
	if _, _, _, err := OpenContext(ctx, dir, boot, nil); err == nil || !strings.Contains(err.Error(), "another agent") || !strings.Contains(err.Error(), "enough") {
		t.Errorf("a wait that was given up: %v", err)
	}
	core, logs := observer.New(zap.InfoLevel)
	done := make(chan error, 1)
	go func() {
		second, got, _, err := Open(dir, boot, zap.New(core))
		if err == nil && len(got) != 3 {
			err = fmt.Errorf("%d records, want the 3 that the first wrote while the second waited", len(got))
		}
		if err == nil {
			err = second.Close()
		}
		done <- err
	}()
	for deadline := time.Now().Add(20 * time.Second); logs.FilterMessageSnippet("waits until it ends").Len() == 0; {
		if time.Now().After(deadline) {
			t.Fatal("the second agent does not say that it waits")
		}
		select {
		case err := <-done:
			t.Fatalf("the second agent did not wait: %v", err)
		case <-time.After(time.Millisecond):
		}
	}
	appendAll(t, first, records(3))
	first.Close()
	if err := <-done; err != nil {
		t.Error(err)
	}
}

// When the tmpfs is full, what could not be written must leave no trace, and
// what follows once there is room must be readable.
func TestFullFilesystem(t *testing.T) {
	if os.Geteuid() != 0 {
		if os.Getenv("CI") == "true" {
			t.Fatal("this test mounts a tmpfs: run it as root")
		}
		t.Skip("this test mounts a tmpfs: run it as root")
	}
	dir := t.TempDir()
	if err := unix.Mount("tmpfs", dir, "tmpfs", 0, "size=64k"); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { unix.Unmount(dir, unix.MNT_DETACH) })
	j, _, _, _ := open(t, dir, boot)
	var want []lease.Record
	for i := 0; ; i++ {
		if err := j.Append(record(i)); err != nil {
			if !errors.Is(err, unix.ENOSPC) && !strings.Contains(err.Error(), "bytes were written") {
				t.Fatal(err)
			}
			break
		}
		want = append(want, record(i))
	}
	if err := j.Append(record(1)); err == nil {
		t.Error("a full filesystem took a record")
	}
	j.lock.Close()
	j, got, state, logs := open(t, dir, boot)
	if d := cmp.Diff(want, got, equal); d != "" || state != lease.JournalPresent || logs.Len() != 0 {
		t.Fatalf("state %d, %v\n%s", state, logs.All(), d)
	}
	if err := unix.Mount("tmpfs", dir, "tmpfs", unix.MS_REMOUNT, "size=256k"); err != nil {
		t.Fatal(err)
	}
	appendAll(t, j, records(5))
	j.lock.Close()
	j, got, _, _ = open(t, dir, boot)
	if len(got) != len(want)+5 {
		t.Errorf("%d records, want %d", len(got), len(want)+5)
	}
	j.Close()
}

// A real crash: the process is killed while it writes, and everything that it
// said was written must be there.
func TestKilledWhileWriting(t *testing.T) {
	if dir := os.Getenv("JOURNAL_TEST_CHILD"); dir != "" {
		j, _, _, err := Open(dir, boot, nil)
		if err != nil {
			panic(err)
		}
		for i := 0; ; i++ {
			if err := j.Append(record(i)); err != nil {
				panic(err)
			}
			fmt.Println(i)
		}
	}
	for round := range 5 {
		dir := tempDir(t)
		cmd := exec.Command(os.Args[0], "-test.run=^TestKilledWhileWriting$")
		cmd.Env = append(os.Environ(), "JOURNAL_TEST_CHILD="+dir)
		out, err := cmd.StdoutPipe()
		if err != nil {
			t.Fatal(err)
		}
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		last, said := -1, bufio.NewReader(out)
		for n := 0; n < 500*(round+1); n++ {
			if _, err := fmt.Fscanln(said, &last); err != nil {
				t.Fatal(err)
			}
		}
		cmd.Process.Kill()
		cmd.Wait()
		j, got, state, _ := open(t, dir, boot)
		if state != lease.JournalPresent || len(got) <= last {
			t.Errorf("state %d, %d records, but %d was said to be written", state, len(got), last)
		}
		if d := cmp.Diff(records(len(got)), got, equal); d != "" {
			t.Error(d)
		}
		j.Close()
	}
}

func FuzzParse(f *testing.F) {
	data, err := appendFrame(nil, header{format, boot, 1, lease.JournalMissing})
	if err != nil {
		f.Fatal(err)
	}
	f.Add(data)
	for _, r := range records(5) {
		if data, err = appendFrame(data, r); err != nil {
			f.Fatal(err)
		}
	}
	f.Add(data)
	f.Fuzz(func(t *testing.T, data []byte) {
		_, got, good, err := parse(data)
		if err == nil && (good > len(data) || good < frameHead) || err != nil && len(got) != 0 {
			t.Fatalf("%d good bytes of %d, %d records, %v", good, len(data), len(got), err)
		}
	})
}

func BenchmarkAppend(b *testing.B) {
	j, _, _, err := Open(b.TempDir(), boot, nil)
	if err != nil {
		b.Fatal(err)
	}
	defer j.Close()
	for b.Loop() {
		if err := j.Append(record(0)); err != nil {
			b.Fatal(err)
		}
	}
}
