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
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"
)

var begin = time.Date(2026, 11, 22, 12, 0, 0, 0, time.UTC)

func options() Options {
	return Options{Top: "top", Limit: 1 << 20, Longest: 1 << 19, Timeout: time.Minute, Now: func() time.Time { return begin }}
}

// contents reads an archive.
func contents(t *testing.T, r io.Reader) map[string]string {
	t.Helper()
	gz, err := gzip.NewReader(r)
	if err != nil {
		t.Fatal(err)
	}
	out := map[string]string{}
	for tr := tar.NewReader(gz); ; {
		h, err := tr.Next()
		if errors.Is(err, io.EOF) {
			return out
		}
		if err != nil {
			t.Fatal(err)
		}
		b, err := io.ReadAll(tr)
		if err != nil {
			t.Fatal(err)
		}
		if h.Mode != 0o600 || out[h.Name] != "" {
			t.Errorf("%s has mode %o, or is there twice", h.Name, h.Mode)
		}
		out[h.Name] = string(b)
	}
}

// made gathers parts, and returns what is in the archive, and its manifest.
func made(t *testing.T, ctx context.Context, o Options, parts ...Part) (map[string]string, Manifest) {
	t.Helper()
	var b bytes.Buffer
	a := New(&b, o)
	if err := a.Run(ctx, parts, 3); err != nil {
		t.Fatal(err)
	}
	m, err := a.Close(Manifest{Of: "node", Name: "n1", Began: begin})
	if err != nil {
		t.Fatal(err)
	}
	files := contents(t, &b)
	var told Manifest
	if err := json.Unmarshal([]byte(files["top/manifest.json"]), &told); err != nil || told.Files != m.Files || told.Format != 1 {
		t.Fatalf("the manifest: %v\n%s", err, files["top/manifest.json"])
	}
	return files, m
}

func entry(t *testing.T, m Manifest, part string) Entry {
	t.Helper()
	i := slices.IndexFunc(m.Parts, func(e Entry) bool { return e.Part == part })
	if i < 0 {
		t.Fatalf("no part %s in the manifest: %+v", part, m)
	}
	return m.Parts[i]
}

// Whatever becomes of a part, the others are there, and what it had is kept.
func TestParts(t *testing.T) { synctest.Test(t, testParts) }

func testParts(t *testing.T) {
	stuck := make(chan struct{})
	defer close(stuck)
	files, m := made(t, t.Context(), options(),
		Part{Name: "good", Gather: func(_ context.Context, f *Files) error {
			f.Note("a note with password=hunter2")
			return errors.Join(f.Text("a.txt", "kept\npassword=hunter2\n"), f.JSON("a.json", map[string]any{"token": "hunter2", "x": 1}), f.YAML("a.yaml", []byte("secret: hunter2\ny: 1 # hunter2\n")))
		}},
		Part{Name: "fails", Gather: func(_ context.Context, f *Files) error {
			return errors.Join(f.Text("half.txt", "half"), errors.New("no such thing: token=hunter2"))
		}},
		Part{Name: "none", Gather: func(context.Context, *Files) error { return NotHere("no agent") }},
		Part{Name: "panics", Gather: func(context.Context, *Files) error { panic("oh") }},
		Part{Name: "stuck", Timeout: time.Millisecond, Gather: func(_ context.Context, f *Files) error {
			err := f.Text("before.txt", "before")
			<-stuck
			return errors.Join(err, f.Text("after.txt", "after"))
		}},
		Part{Name: "slow", Timeout: time.Millisecond, Gather: func(ctx context.Context, _ *Files) error {
			<-ctx.Done()
			return fmt.Errorf("half done: %w", ctx.Err())
		}},
		Part{Name: "same", Gather: func(_ context.Context, f *Files) error {
			return errors.Join(f.Text("x/../../../etc/passwd", "1"), f.Text("/etc/passwd", "2"), f.Text("odd\nname", "3"))
		}},
	)
	for _, text := range files {
		if strings.Contains(text, "hunter2") {
			t.Errorf("a secret is left: %s", text)
		}
	}
	for name, want := range map[string]string{"top/a.txt": "kept", "top/half.txt": "half", "top/before.txt": "before", "top/etc/passwd": "1", "top/etc/passwd.2": "2", "top/odd_name": "3", "top/errors.txt": "fails: no such thing"} {
		if !strings.Contains(files[name], want) {
			t.Errorf("%s holds %q, want %q", name, files[name], want)
		}
	}
	if want := []string{"fails", "panics", "slow", "stuck"}; !slices.Equal(m.Failed, want) || m.Removed != 3 || entry(t, m, "none").NotHere != "no agent" || files["top/after.txt"] != "" {
		t.Errorf("failed %v, want %v, %d removed, %+v", m.Failed, want, m.Removed, m)
	}
	for _, part := range []string{"stuck", "slow"} {
		if e := entry(t, m, part); !strings.Contains(e.Error, "--timeout") {
			t.Errorf("%s: %+v", part, e)
		}
	}
}

// No file is longer than it may, nor all of them together.
func TestBounds(t *testing.T) {
	o := options()
	o.Limit, o.Longest = 2000, 1000
	big := strings.Repeat("a line of text\n", 1000)
	_, m := made(t, t.Context(), o, Part{Name: "big", Gather: func(_ context.Context, f *Files) error {
		return errors.Join(f.Text("1", big), f.Text("2", big), f.Text("3", big))
	}})
	e := entry(t, m, "big")
	if m.Bytes > 2000 || len(e.Files) != 2 || e.Files[0].Bytes != 1000 || !e.Files[0].Cut || !strings.Contains(e.Error, "--size-limit") || !strings.Contains(m.Troubles(), "1 was cut") {
		t.Errorf("%d bytes: %+v", m.Bytes, e)
	}
	// Parts beside each other do not exceed it together.
	same := func(name string) Part {
		return Part{Name: name, Gather: func(_ context.Context, f *Files) error { return f.Text(name, big) }}
	}
	if _, m = made(t, t.Context(), o, same("a"), same("b"), same("c")); m.Bytes > 2000 || len(m.Failed) != 1 {
		t.Errorf("%d bytes, %+v", m.Bytes, m.Failed)
	}
}

// A deadline leaves out what is not gathered by then; giving up ends it all.
func TestEnds(t *testing.T) {
	late, cancel := context.WithDeadline(t.Context(), time.Now())
	defer cancel()
	if _, m := made(t, late, options(), Part{Name: "late", Gather: func(context.Context, *Files) error { return errors.New("was begun") }}); !strings.Contains(entry(t, m, "late").Error, "not begun") {
		t.Errorf("%+v", m)
	}
	gone, giveUp := context.WithCancel(t.Context())
	giveUp()
	if err := New(io.Discard, options()).Run(gone, []Part{{Name: "x", Gather: func(context.Context, *Files) error { return nil }}}, 1); !errors.Is(err, context.Canceled) {
		t.Errorf("given up: %v", err)
	}
}

// The file is there when it is whole, for its owner alone; else nothing is.
func TestToFile(t *testing.T) {
	dir := t.TempDir()
	name := filepath.Join(dir, "x.tar.gz")
	bad := errors.New("no")
	err := ToFile(name, func(w io.Writer) error {
		if _, err := io.WriteString(w, "half"); err != nil {
			return err
		}
		return bad
	})
	left, _ := filepath.Glob(filepath.Join(dir, ".*"))
	if entries, _ := os.ReadDir(dir); !errors.Is(err, bad) || len(entries)+len(left) > 0 {
		t.Fatalf("%v, left behind: %v %v", err, entries, left)
	}
	if err := ToFile(name, func(w io.Writer) error { _, err := io.WriteString(w, "all"); return err }); err != nil {
		t.Fatal(err)
	}
	info, err := os.Stat(name)
	if entries, _ := os.ReadDir(dir); err != nil || info.Mode() != 0o600 || info.Size() != 3 || len(entries) != 1 {
		t.Errorf("%v %v %v", info, err, entries)
	}
	if err := ToFile(dir, func(io.Writer) error { return nil }); err == nil {
		t.Error("a directory was replaced")
	}
	if err := ToFile(filepath.Join(dir, "no", "x"), func(io.Writer) error { return nil }); err == nil {
		t.Error("written where there is no directory")
	}
}

// One archive goes into another, and its secrets are looked for again; what is
// no archive, or breaks off, is said.
func TestInclude(t *testing.T) {
	var inner bytes.Buffer
	gz := gzip.NewWriter(&inner)
	tw := tar.NewWriter(gz)
	for _, f := range [][2]string{{"t/a.txt", "password=hunter2\nkept"}, {"t/../../b.json", `{"token":"hunter2","x":1}`}, {"t/manifest.json", `{"format":1,"of":"node","name":"n2","parts":[{"part":"p","error":"was not"}]}`}} {
		if err := tw.WriteHeader(&tar.Header{Name: f[0], Size: int64(len(f[1])), Mode: 0o600}); err != nil {
			t.Fatal(err)
		}
		if _, err := io.WriteString(tw, f[1]); err != nil {
			t.Fatal(err)
		}
	}
	if err := errors.Join(tw.Close(), gz.Close()); err != nil {
		t.Fatal(err)
	}
	whole := inner.Bytes()
	include := func(b []byte) Part {
		return Part{Name: "nodes/n2", Gather: func(ctx context.Context, f *Files) error {
			m, err := f.Include(ctx, "nodes/n2", bytes.NewReader(b))
			if err == nil && m.Name != "n2" {
				err = fmt.Errorf("its manifest: %+v", m)
			}
			return err
		}}
	}
	files, m := made(t, t.Context(), options(), include(whole))
	if e := entry(t, m, "nodes/n2"); e.Error != "" || !slices.Equal(e.Notes, []string{"p: was not"}) || !strings.Contains(files["top/nodes/n2/a.txt"], "kept") ||
		!strings.Contains(files["top/nodes/n2/b.json"], `"x": 1`) || strings.Contains(fmt.Sprint(files), "hunter2") {
		t.Errorf("%+v\n%v", e, files)
	}
	for _, bad := range [][]byte{[]byte("no archive"), whole[:len(whole)/2], nil} {
		if _, m := made(t, t.Context(), options(), include(bad)); len(m.Failed) != 1 {
			t.Errorf("of %d bytes: %+v", len(bad), m)
		}
	}
}

// Who sends ever more empty files fills nobody's memory.
func TestTooManyFiles(t *testing.T) {
	_, m := made(t, t.Context(), options(), Part{Name: "many", Gather: func(_ context.Context, f *Files) error {
		for range mostFiles + 1 {
			if err := f.Text("empty", ""); err != nil {
				return err
			}
		}
		return nil
	}})
	if e := entry(t, m, "many"); len(e.Files) != mostFiles || !strings.Contains(e.Error, "no more than 10000 files") {
		t.Errorf("%d files, %s", len(e.Files), e.Error)
	}
}
