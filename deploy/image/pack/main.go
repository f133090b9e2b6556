// Pack writes the archive of an image that holds static binaries, for one
// architecture or several. {arch} in the name of a file stands for each of them.
//
//	pack -o portcullis-image.tar -tag portcullis:dev -arch amd64,arm64 -entrypoint /portcullis out/portcullis-{arch}=portcullis
package main

import (
	"bytes"
	"debug/buildinfo"
	"errors"
	"flag"
	"fmt"
	"os"
	"path/filepath"
	"runtime"
	"strings"

	"portcullis/deploy/image"
)

func main() {
	var j job
	flag.StringVar(&j.out, "o", "", "file to write")
	flag.StringVar(&j.tag, "tag", "", "name of the image")
	flag.StringVar(&j.archs, "arch", runtime.GOARCH, "architectures, by Go's names, separated by commas or spaces")
	flag.StringVar(&j.entrypoint, "entrypoint", "", "program to run, and its arguments, separated by spaces")
	flag.Func("label", "a label, NAME=VALUE; ARCH:NAME=VALUE of one architecture (repeat)", func(l string) error {
		j.labels = append(j.labels, l)
		return nil
	})
	flag.Parse()
	j.files = flag.Args()
	if err := j.run(); err != nil {
		fmt.Fprintln(os.Stderr, "pack:", err)
		os.Exit(1)
	}
}

// job is what the command line asks for.
type job struct {
	out, tag, archs, entrypoint string
	files                       []string // FILE=PATH
	labels                      []string // [ARCH:]NAME=VALUE
}

func (j job) run() error {
	archs := strings.FieldsFunc(j.archs, func(r rune) bool { return r == ',' || r == ' ' })
	if j.out == "" || j.tag == "" || j.entrypoint == "" || len(archs) == 0 || len(j.files) == 0 {
		return errors.New("want -o FILE, -tag NAME, -arch NAME,..., -entrypoint PROGRAM and at least one FILE=PATH")
	}
	i := image.Image{Tags: []string{j.tag}, Config: image.Config{Entrypoint: strings.Fields(j.entrypoint), Env: []string{"PATH=/"}}}
	for _, arch := range archs {
		layer, revision, err := j.layer(arch)
		if err != nil {
			return err
		}
		labels, err := j.labelsOf(arch, revision)
		if err != nil {
			return err
		}
		i.Platforms = append(i.Platforms, image.Platform{Architecture: arch, Layers: []image.Layer{layer}, Labels: labels})
	}
	// Written beside and renamed, so that a half one is never imported.
	f, err := os.CreateTemp(filepath.Dir(j.out), ".image-*")
	if err != nil {
		return err
	}
	defer os.Remove(f.Name()) //nolint:errcheck // renamed by then
	err = image.Write(f, []image.Image{i})
	if err := errors.Join(err, f.Chmod(0o644), f.Close()); err != nil {
		return err
	}
	return os.Rename(f.Name(), j.out)
}

// labelsOf are the labels of one architecture, with the commit that its program
// was built of; "": it does not tell one.
func (j job) labelsOf(arch, revision string) (map[string]string, error) {
	out := map[string]string{}
	if revision != "" {
		out["org.opencontainers.image.revision"] = revision
	}
	for _, l := range j.labels {
		name, value, ok := strings.Cut(l, "=")
		if of, rest, one := strings.Cut(name, ":"); one {
			if of != arch {
				continue
			}
			name = rest
		}
		if !ok || name == "" {
			return nil, fmt.Errorf("-label %q: want [ARCH:]NAME=VALUE", l)
		}
		if value != "" {
			out[name] = value
		}
	}
	return out, nil
}

// revisionOf is the commit that a program of Go was built of, with "-dirty" if
// not only of that; "": it tells none.
func revisionOf(data []byte) string {
	info, err := buildinfo.Read(bytes.NewReader(data))
	if err != nil {
		return ""
	}
	revision, changed := "", ""
	for _, s := range info.Settings {
		switch {
		case s.Key == "vcs.revision":
			revision = s.Value
		case s.Key == "vcs.modified" && s.Value == "true":
			changed = "-dirty"
		}
	}
	if revision == "" {
		return ""
	}
	return revision + changed
}

// layer packs the files as one architecture has them, and tells of which commit
// they are.
func (j job) layer(arch string) (l image.Layer, revision string, err error) {
	var files []image.File
	for _, a := range j.files {
		from, to, ok := strings.Cut(a, "=")
		if !ok {
			return l, "", fmt.Errorf("%q: want FILE=PATH, PATH that in the image", a)
		}
		from = strings.ReplaceAll(from, "{arch}", arch)
		data, err := os.ReadFile(from)
		if err != nil {
			return l, "", err
		}
		if err := checkProgram(data, arch); err != nil {
			return l, "", fmt.Errorf("%s: %w", from, err)
		}
		if revision == "" {
			revision = revisionOf(data)
		}
		files = append(files, image.File{Path: to, Data: data})
	}
	// What runs as root without a shell still wants a place for what it writes.
	files = append(files, image.File{Path: "tmp", Dir: true, Mode: 0o1777})
	l, err = image.Pack(files)
	return l, revision, err
}
