package image

import (
	"archive/tar"
	"bytes"
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"maps"
	"path"
	"slices"
	"strings"
)

// Layer is a layer of files, packed.
type Layer struct {
	tar    []byte
	digest string // sha256 of tar, in hex
}

// File is one file of a layer.
type File struct {
	Path   string // without a leading slash
	Data   []byte
	Mode   int64  // permissions; 0: 0755
	LinkTo string // not empty: a symbolic link; Data and Mode say nothing
	Dir    bool   // a directory; those on the way to a file need not be named
}

// Config says how an image is run.
type Config struct {
	Entrypoint []string          `json:"Entrypoint,omitempty"`
	Cmd        []string          `json:"Cmd,omitempty"`
	Env        []string          `json:"Env,omitempty"`
	WorkingDir string            `json:"WorkingDir,omitempty"`
	Labels     map[string]string `json:"Labels,omitempty"`
}

// Image is one image of an archive.
type Image struct {
	Tags      []string   // docker.io/library/busybox:1, or short: busybox means the same with the tag latest
	Platforms []Platform // at least one, each of another architecture
	Config    Config
}

// Platform is an image as one kind of machine has it. All are Linux.
type Platform struct {
	Architecture string // Go's name of it
	Layers       []Layer
	Labels       map[string]string // beside those of the Config; nil: none
}

// Pack makes a layer. Order does not matter: files are sorted by path.
func Pack(files []File) (Layer, error) {
	all := map[string]File{}
	for _, f := range files {
		f.Path = strings.Trim(path.Clean("/"+f.Path), "/")
		if f.Path == "" {
			return Layer{}, fmt.Errorf("a file without a path")
		}
		if _, twice := all[f.Path]; twice {
			return Layer{}, fmt.Errorf("file %s: twice", f.Path)
		}
		all[f.Path] = f
	}
	for _, f := range slices.Collect(maps.Values(all)) {
		for dir := path.Dir(f.Path); dir != "."; dir = path.Dir(dir) {
			if at, ok := all[dir]; ok && !at.Dir {
				return Layer{}, fmt.Errorf("file %s: %s is no directory", f.Path, dir)
			} else if !ok {
				all[dir] = File{Path: dir, Dir: true}
			}
		}
	}
	var buf bytes.Buffer
	w := tar.NewWriter(&buf)
	for _, name := range slices.Sorted(maps.Keys(all)) {
		if err := add(w, all[name]); err != nil {
			return Layer{}, fmt.Errorf("file %s: %w", name, err)
		}
	}
	if err := w.Close(); err != nil {
		return Layer{}, err
	}
	return Layer{tar: buf.Bytes(), digest: digest(buf.Bytes())}, nil
}

func add(w *tar.Writer, f File) error {
	h := &tar.Header{Name: f.Path, Mode: f.Mode, Typeflag: tar.TypeReg, Size: int64(len(f.Data)), Format: tar.FormatPAX}
	if h.Mode == 0 {
		h.Mode = 0o755
	}
	switch {
	case f.Dir:
		h.Typeflag, h.Name, h.Size = tar.TypeDir, f.Path+"/", 0
	case f.LinkTo != "":
		h.Typeflag, h.Linkname, h.Size, h.Mode = tar.TypeSymlink, f.LinkTo, 0, 0o777
	}
	if err := w.WriteHeader(h); err != nil {
		return err
	}
	if h.Typeflag != tar.TypeReg {
		return nil
	}
	_, err := w.Write(f.Data)
	return err
}

func digest(b []byte) string {
	sum := sha256.Sum256(b)
	return hex.EncodeToString(sum[:])
}
