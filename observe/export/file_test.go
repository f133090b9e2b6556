package export

import (
	"os"
	"path/filepath"
	"testing"
	"time"
)

// A line that was cut, by a full disk or the agent's end, spoils no other.
func TestAfterATornLine(t *testing.T) {
	path := filepath.Join(t.TempDir(), "all.jsonl")
	if err := os.WriteFile(path, []byte("{\"whole\":1}\n{\"to"), 0o600); err != nil {
		t.Fatal(err)
	}
	for _, line := range []string{"{\"next\":1}\n", "{\"next\":2}\n"} { // the second finds a file that is whole
		o := &file{e: &Export{File: path, MaxBytes: 4096, Keep: 1}, now: time.Now}
		if err := o.write([]byte(line)); err != nil {
			t.Fatal(err)
		}
		if err := o.close(); err != nil {
			t.Fatal(err)
		}
	}
	b, err := os.ReadFile(path)
	if want := "{\"whole\":1}\n{\"to\n{\"next\":1}\n{\"next\":2}\n"; err != nil || string(b) != want {
		t.Errorf("%q, %v; want %q", b, err, want)
	}
}

// Files that cannot be compressed, as on a disk with little room left, are no more
// than those that are to be kept.
func TestPrunesWhatCannotBeCompressed(t *testing.T) {
	dir := t.TempDir()
	path := filepath.Join(dir, "all.jsonl")
	at := time.Unix(1_600_000_000, 0)
	o := &file{e: &Export{File: path, MaxBytes: 8, Keep: 2, Compress: true}, now: func() time.Time { at = at.Add(time.Second); return at }}
	failed := 0
	for i := range 10 {
		// Where the compressed form would be made there is a directory.
		next := at.Add(time.Second).UTC().Format(stamp)
		if err := os.MkdirAll(filepath.Join(dir, "all-"+next+".jsonl.gz.part"), 0o700); err != nil {
			t.Fatal(err)
		}
		if err := o.write([]byte("12345\n")); err != nil {
			failed++
		}
		if err := o.close(); err != nil {
			t.Fatal(i, err)
		}
	}
	names, err := filepath.Glob(filepath.Join(dir, "all-*.jsonl"))
	if err != nil || len(names) != 2 || failed == 0 {
		t.Errorf("%d failed; kept %v, %v", failed, names, err)
	}
}
