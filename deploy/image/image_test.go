package image

import (
	"archive/tar"
	"bytes"
	"errors"
	"io"
	"strings"
	"testing"
)

// unpack returns the files of an archive; of directories and links only that
// they are there.
func unpack(t *testing.T, b []byte) map[string][]byte {
	t.Helper()
	out := map[string][]byte{}
	for r := tar.NewReader(bytes.NewReader(b)); ; {
		h, err := r.Next()
		if errors.Is(err, io.EOF) {
			return out
		}
		if err != nil {
			t.Fatal(err)
		}
		if _, twice := out[h.Name]; twice {
			t.Errorf("%s stands twice in the archive", h.Name)
		}
		if out[h.Name], err = io.ReadAll(r); err != nil {
			t.Fatal(err)
		}
	}
}

func TestPack(t *testing.T) {
	files := []File{
		{Path: "/bin/app", Data: []byte("program")},
		{Path: "bin/alias", LinkTo: "app"},
		{Path: "etc/passwd", Data: []byte("root"), Mode: 0o644},
		{Path: "tmp", Dir: true, Mode: 0o1777},
	}
	layer, err := Pack(files)
	if err != nil {
		t.Fatal(err)
	}
	files[0], files[3] = files[3], files[0]
	again, err := Pack(files)
	if err != nil {
		t.Fatal(err)
	}
	if layer.digest != again.digest {
		t.Error("the order of files changes the layer")
	}
	content := unpack(t, layer.tar)
	for _, name := range []string{"bin/", "bin/alias", "bin/app", "etc/", "etc/passwd", "tmp/"} {
		if _, ok := content[name]; !ok {
			t.Errorf("the layer has no %s", name)
		}
	}
	if string(content["bin/app"]) != "program" {
		t.Errorf("bin/app is %q", content["bin/app"])
	}
}

func TestPackRefuses(t *testing.T) {
	for want, files := range map[string][]File{
		"twice":          {{Path: "a"}, {Path: "/a"}},
		"no directory":   {{Path: "a"}, {Path: "a/b"}},
		"without a path": {{Path: "/"}},
	} {
		if _, err := Pack(files); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%+v: %v, want an error that says %q", files, err, want)
		}
	}
}
