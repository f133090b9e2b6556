package audit

import (
	"cmp"
	"crypto/x509"
	"encoding/pem"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"unicode"

	"portcullis/identity"
)

// ReadBundle reads the certificates of a PEM file; what else is in it is
// skipped.
func ReadBundle(path string) (out []*x509.Certificate, err error) {
	data, err := os.ReadFile(path)
	if err != nil {
		return nil, fmt.Errorf("trust bundle: %w", err)
	}
	for {
		var block *pem.Block
		if block, data = pem.Decode(data); block == nil {
			break
		}
		if block.Type != "CERTIFICATE" {
			continue
		}
		cert, err := x509.ParseCertificate(block.Bytes)
		if err != nil {
			return nil, fmt.Errorf("trust bundle %s: %w", path, err)
		}
		out = append(out, cert)
	}
	if len(out) == 0 {
		return nil, fmt.Errorf("trust bundle %s: there is no certificate in it", path)
	}
	return out, nil
}

// Set is the files of logs, by node, each node's in the order of the chain.
type Set struct {
	Nodes   []identity.NodeName
	Files   map[identity.NodeName][]string
	Ignored []string // files without a record
}

// Find gathers logs: of a file itself and what rotation left beside it, of a
// directory everything in and below it.
func Find(paths ...string) (*Set, error) {
	s := &Set{Files: map[identity.NodeName][]string{}}
	first := map[string]uint64{}
	add := func(path string) error {
		path = filepath.Clean(path)
		if _, twice := first[path]; twice {
			return nil
		}
		node, seq, err := whose(path)
		if err != nil {
			return err
		}
		first[path] = seq
		if seq == 0 {
			s.Ignored = append(s.Ignored, path)
			return nil
		}
		if s.Files[node] == nil {
			s.Nodes = append(s.Nodes, node)
		}
		s.Files[node] = append(s.Files[node], path)
		return nil
	}
	for _, path := range paths {
		info, err := os.Stat(path)
		if err != nil {
			return nil, err
		}
		if !info.IsDir() {
			older, err := rotated(path)
			if err != nil {
				return nil, err
			}
			for _, f := range older {
				if err := add(f.path); err != nil {
					return nil, err
				}
			}
			if err := add(path); err != nil {
				return nil, err
			}
			continue
		}
		if err := filepath.WalkDir(path, func(p string, e fs.DirEntry, err error) error {
			if err != nil || !e.Type().IsRegular() {
				return err
			}
			return add(p)
		}); err != nil {
			return nil, err
		}
	}
	slices.Sort(s.Nodes)
	for _, files := range s.Files {
		slices.SortStableFunc(files, func(a, b string) int { return cmp.Compare(first[a], first[b]) })
	}
	return s, nil
}

// lookInto bounds how far into a file a record is looked for.
const lookInto = 4 << 20

// whose tells whose log a file is a part of, and at which record it begins: by
// its first record that is whole, else by the first that can be read at all.
func whose(path string) (node identity.NodeName, seq uint64, err error) {
	read := 0
	for l, err := range lines(path, io.Discard) {
		if err != nil {
			return "", 0, err
		}
		if read += len(l.text) + 1; read > lookInto || l.long {
			break // not a log; if it were, the chain would be broken here
		}
		r, err := parse(l.text)
		if err == nil {
			return r.Node, r.Sequence, nil
		}
		if seq == 0 && r != nil {
			node, seq = r.Node, r.Sequence
		}
	}
	return node, seq, nil
}

// clip keeps a text that somebody else wrote within a line.
func clip(s string) string {
	s = Plain(s)
	if len(s) > 300 {
		s = s[:300] + "..."
	}
	return s
}

// Plain makes a text fit for a terminal: what is not printable is written as in
// a Go string.
func Plain(s string) string {
	var b strings.Builder
	for _, r := range s {
		if !unicode.IsPrint(r) {
			fmt.Fprintf(&b, `\u%04x`, r)
			continue
		}
		b.WriteRune(r)
	}
	return b.String()
}
