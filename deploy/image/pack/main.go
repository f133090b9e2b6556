// Pack writes the archive of an image that holds one static binary.
//
//	pack -o portcullis-image.tar -tag portcullis:dev -entrypoint /portcullis bin/portcullis=portcullis
package main

import (
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
	out := flag.String("o", "", "file to write")
	tag := flag.String("tag", "", "whole name of the image")
	arch := flag.String("arch", runtime.GOARCH, "architecture of the binaries")
	entrypoint := flag.String("entrypoint", "", "program to run, and its arguments, separated by spaces")
	flag.Parse()
	if err := run(*out, *tag, *arch, *entrypoint, flag.Args()); err != nil {
		fmt.Fprintln(os.Stderr, "pack:", err)
		os.Exit(1)
	}
}

func run(out, tag, arch, entrypoint string, args []string) error {
	if out == "" || tag == "" || entrypoint == "" || len(args) == 0 {
		return errors.New("want -o FILE, -tag NAME, -entrypoint PROGRAM and at least one FILE=PATH")
	}
	var files []image.File
	for _, a := range args {
		from, to, ok := strings.Cut(a, "=")
		if !ok {
			return fmt.Errorf("%q: want FILE=PATH, PATH that in the image", a)
		}
		data, err := os.ReadFile(from)
		if err != nil {
			return err
		}
		files = append(files, image.File{Path: to, Data: data})
	}
	// What runs as root without a shell still wants a place for what it writes.
	files = append(files, image.File{Path: "tmp", Dir: true, Mode: 0o1777})
	layer, err := image.Pack(files)
	if err != nil {
		return err
	}
	// Written beside and renamed, so that a half one is never imported.
	f, err := os.CreateTemp(filepath.Dir(out), ".image-*")
	if err != nil {
		return err
	}
	defer os.Remove(f.Name()) //nolint:errcheck // renamed by then
	err = image.Write(f, []image.Image{{Tags: []string{tag}, Architecture: arch, Layers: []image.Layer{layer},
		Config: image.Config{Entrypoint: strings.Fields(entrypoint), Env: []string{"PATH=/"}}}})
	if err := errors.Join(err, f.Chmod(0o644), f.Close()); err != nil {
		return err
	}
	return os.Rename(f.Name(), out)
}
