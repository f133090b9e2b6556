package main

import (
	"errors"
	"fmt"
	"io"
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

// readFiles reads what --filename names. Every file that cannot be read is
// reported, not only the first.
func readFiles(env *Env, names []string) ([]*api.PolicyFile, error) {
	if len(names) == 0 {
		return nil, usagef("name the policy files with -f FILE (repeatable; a directory or - will do)")
	}
	var out []*api.PolicyFile
	var errs []error
	total := 0
	add := func(name string, r io.Reader) {
		b, err := io.ReadAll(io.LimitReader(r, maxPolicyBytes+1))
		if err != nil {
			errs = append(errs, fmt.Errorf("read %s: %w", name, err))
			return
		}
		total += len(b)
		out = append(out, &api.PolicyFile{Name: name, Content: b})
	}
	for _, name := range names {
		if name == "-" {
			add("standard input", env.Stdin)
			continue
		}
		paths, err := expand(name)
		if err != nil {
			errs = append(errs, err)
		}
		for _, path := range paths {
			f, err := os.Open(path)
			if err != nil {
				errs = append(errs, err)
				continue
			}
			add(path, f)
			f.Close()
		}
	}
	if total > maxPolicyBytes {
		errs = append(errs, fmt.Errorf("the files together exceed %d MiB: import them in several turns", maxPolicyBytes>>20))
	}
	return out, errors.Join(errs...)
}

// expand returns the file, or the policy files of the directory, sorted; it
// does not descend.
func expand(name string) ([]string, error) {
	info, err := os.Stat(name)
	if err != nil {
		return nil, err
	}
	if !info.IsDir() {
		return []string{name}, nil
	}
	entries, err := os.ReadDir(name) // sorted
	if err != nil {
		return nil, err
	}
	var paths []string
	for _, e := range entries {
		if !e.IsDir() && isManifest(e.Name()) {
			paths = append(paths, filepath.Join(name, e.Name()))
		}
	}
	if len(paths) == 0 {
		return nil, fmt.Errorf("%s holds no *.yaml, *.yml or *.json file", name)
	}
	return paths, nil
}

func isManifest(name string) bool {
	ext := filepath.Ext(name)
	return ext == ".yaml" || ext == ".yml" || ext == ".json"
}
