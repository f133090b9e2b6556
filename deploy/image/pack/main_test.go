package main

import (
	"archive/tar"
	"bytes"
	"debug/elf"
	"encoding/binary"
	"encoding/json"
	"errors"
	"io"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"testing"
)

// program is the smallest file that is a static program of a machine; edit
// makes it another one.
func program(t *testing.T, machine elf.Machine, edit func(h *elf.Header64, p *elf.Prog64)) []byte {
	t.Helper()
	const size = 64 + 56 // of the two headers, in bytes
	h := elf.Header64{Type: uint16(elf.ET_EXEC), Machine: uint16(machine), Version: uint32(elf.EV_CURRENT), Phoff: 64, Ehsize: 64, Phentsize: 56, Phnum: 1}
	copy(h.Ident[:], elf.ELFMAG)
	h.Ident[elf.EI_CLASS], h.Ident[elf.EI_DATA], h.Ident[elf.EI_VERSION] = byte(elf.ELFCLASS64), byte(elf.ELFDATA2LSB), byte(elf.EV_CURRENT)
	p := elf.Prog64{Type: uint32(elf.PT_LOAD), Filesz: size, Memsz: size}
	if edit != nil {
		edit(&h, &p)
	}
	var b bytes.Buffer
	for _, v := range []any{h, p} {
		if err := binary.Write(&b, binary.LittleEndian, v); err != nil {
			t.Fatal(err)
		}
	}
	return b.Bytes()
}

func TestCheckProgram(t *testing.T) {
	amd64 := func(edit func(*elf.Header64, *elf.Prog64)) []byte { return program(t, elf.EM_X86_64, edit) }
	for _, tc := range []struct {
		name, arch, want string
		data             []byte
	}{
		{"fits", "amd64", "", amd64(nil)},
		{"fits, of arm64", "arm64", "", program(t, elf.EM_AARCH64, nil)},
		{"position independent", "amd64", "", amd64(func(h *elf.Header64, _ *elf.Prog64) { h.Type = uint16(elf.ET_DYN) })},
		{"of another machine", "arm64", "GOARCH=arm64", amd64(nil)},
		{"wants libraries", "amd64", "CGO_ENABLED=0", amd64(func(_ *elf.Header64, p *elf.Prog64) { p.Type = uint32(elf.PT_INTERP) })},
		{"an object", "amd64", "no program", amd64(func(h *elf.Header64, _ *elf.Prog64) { h.Type = uint16(elf.ET_REL) })},
		{"a script", "amd64", "no program of Linux", []byte("#!/bin/sh\n")},
		{"an architecture that nobody builds", "riscv64", "amd64 or arm64", amd64(nil)},
	} {
		err := checkProgram(tc.data, tc.arch)
		if tc.want == "" && err != nil || tc.want != "" && (err == nil || !strings.Contains(err.Error(), tc.want)) {
			t.Errorf("%s: %v, want %q", tc.name, err, tc.want)
		}
	}
}

// What Go makes without cgo is taken, and what it is not for is not: this very
// test's program is of this machine.
func TestCheckProgramOfGo(t *testing.T) {
	path := filepath.Join(t.TempDir(), "app")
	cmd := exec.Command("go", "build", "-o", path, "./testdata/app.go")
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	data, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	if err := checkProgram(data, runtime.GOARCH); err != nil {
		t.Error(err)
	}
}

func archive(t *testing.T, path string) map[string][]byte {
	t.Helper()
	f, err := os.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close() //nolint:errcheck // only read
	out := map[string][]byte{}
	for r := tar.NewReader(f); ; {
		h, err := r.Next()
		if errors.Is(err, io.EOF) {
			return out
		}
		if err != nil {
			t.Fatal(err)
		}
		if out[h.Name], err = io.ReadAll(r); err != nil {
			t.Fatal(err)
		}
	}
}

func TestRun(t *testing.T) {
	dir := t.TempDir()
	for arch, machine := range machines {
		if err := os.WriteFile(filepath.Join(dir, "app-"+arch), program(t, machine, nil), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	j := job{out: filepath.Join(dir, "image.tar"), tag: "app:1", archs: "amd64 arm64", entrypoint: "/app run", files: []string{filepath.Join(dir, "app-{arch}=app")},
		labels: []string{"title=app=1", "arm64:tried=no", "version="}}
	if err := j.run(); err != nil {
		t.Fatal(err)
	}
	both := archive(t, j.out)
	var found []string
	for name, data := range both {
		var c struct {
			Architecture string
			Config       struct {
				Entrypoint []string
				Labels     map[string]string
			}
		}
		if !strings.HasPrefix(name, "blobs/") || json.Unmarshal(data, &c) != nil || c.Architecture == "" {
			continue
		}
		found = append(found, c.Architecture)
		if strings.Join(c.Config.Entrypoint, " ") != "/app run" {
			t.Errorf("%s: entrypoint %q", c.Architecture, c.Config.Entrypoint)
		}
		want := map[string]string{"title": "app=1"}
		if c.Architecture == "arm64" {
			want["tried"] = "no"
		}
		if !maps.Equal(c.Config.Labels, want) {
			t.Errorf("%s: labels %q", c.Architecture, c.Config.Labels)
		}
	}
	if len(found) != 2 || found[0] == found[1] {
		t.Errorf("configurations for %q, want one for each architecture", found)
	}
	j.archs = "arm64"
	if err := j.run(); err != nil {
		t.Fatal(err)
	}
	if one := archive(t, j.out); len(one) >= len(both) {
		t.Errorf("an image for one architecture has %d files, for two %d", len(one), len(both))
	}
}

// What cannot be packed leaves the archive that was there.
func TestRunRefuses(t *testing.T) {
	dir := t.TempDir()
	app, out := filepath.Join(dir, "app"), filepath.Join(dir, "image.tar")
	for path, data := range map[string][]byte{app: program(t, elf.EM_X86_64, nil), out: []byte("former")} {
		if err := os.WriteFile(path, data, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	for want, j := range map[string]job{
		"want -o FILE":   {out: out, tag: "app:1", archs: "amd64", entrypoint: "/app"},
		"-arch NAME":     {out: out, tag: "app:1", archs: " ", entrypoint: "/app", files: []string{app + "=app"}},
		"want FILE=PATH": {out: out, tag: "app:1", archs: "amd64", entrypoint: "/app", files: []string{app}},
		"no such file":   {out: out, tag: "app:1", archs: "amd64", entrypoint: "/app", files: []string{app + "-{arch}=app"}},
		"GOARCH=arm64":   {out: out, tag: "app:1", archs: "amd64,arm64", entrypoint: "/app", files: []string{app + "=app"}},
		"named twice":    {out: out, tag: "app:1", archs: "amd64,amd64", entrypoint: "/app", files: []string{app + "=app"}},
		"-label \"x\"":   {out: out, tag: "app:1", archs: "amd64", entrypoint: "/app", files: []string{app + "=app"}, labels: []string{"x"}},
		"app: twice":     {out: out, tag: "app:1", archs: "amd64", entrypoint: "/app", files: []string{app + "=app", app + "=app"}},
	} {
		if err := j.run(); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%+v: %v, want an error that says %q", j, err, want)
		}
	}
	left, err := os.ReadDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	if b, err := os.ReadFile(out); err != nil || string(b) != "former" || len(left) != 2 {
		t.Errorf("what was there: %q, %v, beside %d files", b, err, len(left)-1)
	}
}
