package floors

import (
	"fmt"
	"go/ast"
	"go/parser"
	"go/token"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
)

// File is one Go file of the module.
type File struct {
	Path      string // below the module's root, with slashes
	Test      bool   // its name ends in _test.go
	Generated bool   // it says "Code generated ... DO NOT EDIT."
	Lines     int
	Imports   []string
	Fset      *token.FileSet
	AST       *ast.File
}

// Package is one directory with Go files.
type Package struct {
	Path  string // below the module's root, with slashes
	Name  string // of the files that are no tests, else of the tests
	Files []*File
}

// Breach is one violation of a rule, and where it is.
type Breach struct{ Where, What string }

// String returns "where: what".
func (b Breach) String() string { return b.Where + ": " + b.What }

// Root returns the module's root, from a directory in it.
func Root(dir string) (string, error) {
	dir, err := filepath.Abs(dir)
	if err != nil {
		return "", err
	}
	for {
		if _, err := os.Stat(filepath.Join(dir, "go.mod")); err == nil {
			return dir, nil
		}
		up := filepath.Dir(dir)
		if up == dir {
			return "", fmt.Errorf("no go.mod above the working directory")
		}
		dir = up
	}
}

// Walk calls f for every file of the source tree: not for what is built, for
// testdata, for modules of their own, or for directories whose name begins with
// a dot or an underscore.
func Walk(root string, f func(path string) error) error {
	return filepath.WalkDir(root, func(path string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		rel, err := filepath.Rel(root, path)
		if err != nil {
			return err
		}
		rel = filepath.ToSlash(rel)
		if d.IsDir() {
			name := d.Name()
			if rel != "." && (name == "testdata" || strings.HasPrefix(name, ".") || strings.HasPrefix(name, "_") || rel == "bin" || rel == "out") {
				return filepath.SkipDir
			}
			if _, err := os.Stat(filepath.Join(path, "go.mod")); err == nil && rel != "." {
				return filepath.SkipDir
			}
			return nil
		}
		return f(rel)
	})
}

// Load parses every Go file of the module.
func Load(root string) ([]*Package, error) {
	byDir := map[string]*Package{}
	err := Walk(root, func(rel string) error {
		if !strings.HasSuffix(rel, ".go") {
			return nil
		}
		src, err := os.ReadFile(filepath.Join(root, rel))
		if err != nil {
			return err
		}
		f, err := Parse(rel, string(src))
		if err != nil {
			return err
		}
		dir := rel[:max(strings.LastIndexByte(rel, '/'), 0)]
		p := byDir[dir]
		if p == nil {
			p = &Package{Path: dir}
			byDir[dir] = p
		}
		if p.Name == "" || !f.Test {
			p.Name = f.AST.Name.Name
		}
		p.Files = append(p.Files, f)
		return nil
	})
	if err != nil {
		return nil, err
	}
	var pkgs []*Package
	for _, p := range byDir {
		pkgs = append(pkgs, p)
	}
	slices.SortFunc(pkgs, func(a, b *Package) int { return strings.Compare(a.Path, b.Path) })
	return pkgs, nil
}

// Parse parses one file. path is below the module's root.
func Parse(path, src string) (*File, error) {
	fset := token.NewFileSet()
	tree, err := parser.ParseFile(fset, path, src, parser.ParseComments|parser.SkipObjectResolution)
	if err != nil {
		return nil, err
	}
	f := &File{
		Path: path, Test: strings.HasSuffix(path, "_test.go"), Generated: ast.IsGenerated(tree),
		Lines: strings.Count(src, "\n"), Fset: fset, AST: tree,
	}
	for _, spec := range tree.Imports {
		p, err := strconv.Unquote(spec.Path.Value)
		if err != nil {
			return nil, fmt.Errorf("%s: import %s: %w", path, spec.Path.Value, err)
		}
		f.Imports = append(f.Imports, p)
	}
	return f, nil
}

// within reports whether path is tree or lies below it.
func within(path, tree string) bool {
	return path == tree || strings.HasPrefix(path, tree+"/")
}
