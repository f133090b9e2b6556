package main

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"

	"github.com/spf13/cobra"

	"portcullis/agent/api"
)

// maxPolicyBytes bounds all files of one import together.
const maxPolicyBytes = 16 << 20

// addFiles gives a command its --filename flag.
func addFiles(cmd *cobra.Command) *[]string {
	return cmd.Flags().StringArrayP("filename", "f", nil, "policy file, directory, or - for the standard input (repeatable)")
}

// readFiles reads what --filename names.
func readFiles(env *Env, names []string) ([]*api.PolicyFile, error) {
	if len(names) == 0 {
		return nil, usagef("name the policy files with -f FILE (repeatable; a directory or - will do)")
	}
	var out []*api.PolicyFile
	err := eachFile(env, names, false, maxPolicyBytes, "import them in several turns", func(name string, data []byte) {
		out = append(out, &api.PolicyFile{Name: name, Content: data})
	})
	return out, err
}

// eachFile reads files, those in directories (deep: and below), and - for the
// standard input. Every one that cannot be read is reported, not only the first.
// All together may have so many bytes; instead says what to do with more.
func eachFile(env *Env, names []string, deep bool, bytes int64, instead string, file func(name string, data []byte)) error {
	var errs []error
	left := bytes
	read := func(name string, in io.Reader) {
		if left < 0 {
			return // said already
		}
		data, err := io.ReadAll(io.LimitReader(in, left+1))
		if left -= int64(len(data)); left < 0 {
			err = fmt.Errorf("the files together exceed %d MiB: %s", bytes>>20, instead)
		}
		if err != nil {
			errs = append(errs, fmt.Errorf("read %s: %w", name, err))
			return
		}
		file(name, data)
	}
	for _, name := range names {
		if name == "-" {
			read("standard input", env.Stdin)
			continue
		}
		paths, err := expand(name, deep)
		if err != nil {
			errs = append(errs, err)
			continue
		}
		for _, path := range paths {
			f, err := os.Open(path)
			if err != nil {
				errs = append(errs, err)
				continue
			}
			read(path, f)
			f.Close()
		}
	}
	return errors.Join(errs...)
}

// expand returns the file, or the manifests in the directory (deep: and below),
// in the order of their names.
func expand(name string, deep bool) (paths []string, err error) {
	info, err := os.Stat(name)
	if err != nil {
		return nil, err
	}
	if !info.IsDir() {
		return []string{name}, nil
	}
	err = filepath.WalkDir(name, func(path string, d fs.DirEntry, err error) error {
		switch {
		case err != nil:
			return err
		case d.IsDir() && path != name && !deep:
			return fs.SkipDir
		case !d.IsDir() && isManifest(path):
			paths = append(paths, path)
		}
		return nil
	})
	if err == nil && len(paths) == 0 {
		err = fmt.Errorf("%s holds no *.yaml, *.yml or *.json file", name)
	}
	return paths, err
}

func isManifest(name string) bool {
	ext := filepath.Ext(name)
	return ext == ".yaml" || ext == ".yml" || ext == ".json"
}
