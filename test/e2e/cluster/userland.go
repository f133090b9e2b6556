package cluster

import (
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"

	"portcullis/deploy/image"
)

// libraryForm finds the files that ldd names.
var libraryForm = regexp.MustCompile(`(?:=> |^\s*)(/[^ ]+) \(0x`)

// packUserland makes a layer of programs of this machine's distribution with the
// libraries that they need.
func packUserland(ctx context.Context, root, dir string) (l image.Layer, err error) {
	files := map[string][]byte{"etc/nsswitch.conf": []byte("passwd: files\nhosts: files dns\n")}
	add := func(name, path string) error {
		data, err := os.ReadFile(path)
		files[strings.TrimPrefix(name, "/")] = data
		return err
	}
	var programs []string
	for _, name := range []string{"curl", "getent"} {
		path, err := exec.LookPath(name)
		if err != nil {
			return l, err
		}
		if err := add("usr/bin/"+name, path); err != nil {
			return l, err
		}
		programs = append(programs, path)
	}
	if _, err := exec.LookPath("gcc"); err == nil {
		path := filepath.Join(dir, "probe-cgo")
		cmd := exec.CommandContext(ctx, "go", "build", "-trimpath", "-buildvcs=false", "-ldflags=-s -w", "-tags=netcgo", "-o", path, "./test/e2e/probe")
		cmd.Dir = root
		cmd.Env = append(os.Environ(), "CGO_ENABLED=1")
		if out, err := cmd.CombinedOutput(); err != nil {
			return l, fmt.Errorf("build the probe with the C library's resolver: %w: %s", err, out)
		}
		if err := add("probe-cgo", path); err != nil {
			return l, err
		}
		programs = append(programs, path)
	}
	for _, p := range programs {
		out, err := exec.CommandContext(ctx, "ldd", p).Output()
		if err != nil {
			return l, fmt.Errorf("libraries of %s: %w", p, err)
		}
		for line := range strings.Lines(string(out)) {
			if m := libraryForm.FindStringSubmatch(line); m != nil {
				if err := add(m[1], m[1]); err != nil {
					return l, err
				}
			}
		}
	}
	var list []image.File
	for name, data := range files {
		list = append(list, image.File{Path: name, Data: data})
	}
	return image.Pack(list)
}
