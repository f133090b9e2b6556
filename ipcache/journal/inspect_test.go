package journal

import (
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"testing"

	"portcullis/ipcache/lease"
)

// A journal is told of while an agent has it open, without a change to it; so is
// one that is cut off, and one that is damaged.
func TestInspect(t *testing.T) {
	dir := t.TempDir()
	if _, err := Inspect(dir); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("of none: %v", err)
	}
	j, _, _, err := Open(dir, boot, nil)
	if err != nil {
		t.Fatal(err)
	}
	defer j.Close()
	appendAll(t, j, []lease.Record{record(2), record(0), record(5)})
	path := filepath.Join(dir, fileName)
	before, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	i, err := Inspect(dir)
	if err != nil || i.Format != Format || i.Boot != boot || i.Bytes != len(before) || i.Torn != 0 || i.Records["grant"] != 2 || i.Records["bound"] != 1 {
		t.Errorf("%+v, %v", i, err)
	}
	if after, err := os.ReadFile(path); err != nil || string(after) != string(before) {
		t.Errorf("it was changed: %v", err)
	}
	write := func(b []byte) {
		if err := os.WriteFile(path, b, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	write(before[:len(before)-3])
	if i, err := Inspect(dir); err != nil || i.Torn == 0 || i.Records["grant"] != 1 {
		t.Errorf("cut off: %+v, %v", i, err)
	}
	before[len(before)-1] ^= 1
	write(before)
	if i, err := Inspect(dir); err == nil || i.Bytes != len(before) || i.Boot != boot {
		t.Errorf("damaged: %+v, %v", i, err)
	}
}
