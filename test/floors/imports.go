package floors

import (
	"fmt"
	"go/ast"
	"slices"
	"strings"
)

// Module is the module's path.
const Module = "portcullis"

// Rules is a layout to check packages against.
type Rules struct {
	Table          []Row
	OnlyImporters  []Only
	NeverMeet      [][2]string
	Exceptions     []Exception
	PureExceptions []Exception
}

// Layout returns the rules of this module.
func Layout() Rules {
	return Rules{Table, OnlyImporters, NeverMeet, Exceptions, PureExceptions}
}

// checker gathers breaches, and which exceptions were needed.
type checker struct {
	rules    Rules
	breaches []Breach
	used     map[Exception]bool
}

// CheckImports returns every import that breaks the rules.
//
// Test files stand on their package's floor too, but may import any package of
// that floor or a lower one, and are not held to purity: they meet real parts.
// The rows of OnlyImporters bind them.
func CheckImports(pkgs []*Package, rules Rules) []Breach {
	c := &checker{rules: rules, used: map[Exception]bool{}}
	for _, p := range pkgs {
		row, ok := c.row(p.Path)
		if !ok {
			c.add(p.Files[0].Path, "package %s is not in the table of test/floors", p.Path)
			continue
		}
		for _, f := range p.Files {
			for _, path := range f.Imports {
				c.only(row, f, path)
				if path == Module || strings.HasPrefix(path, Module+"/") {
					c.inner(row, f, strings.TrimPrefix(strings.TrimPrefix(path, Module), "/"))
				} else if isPure(row, f) {
					c.pureImport(row, f, path)
				}
			}
			if isPure(row, f) {
				c.pureCode(f)
			}
		}
	}
	for _, list := range [][]Exception{rules.Exceptions, rules.PureExceptions} {
		for _, e := range list {
			if !c.used[e] {
				c.add("test/floors/table.go", "the exception %s -> %s is needed by nobody: remove it", e.From, e.To)
			}
		}
	}
	return c.breaches
}

func isPure(row Row, f *File) bool {
	return row.Kind == Product && row.Floor <= PureFloor && !f.Test
}

func (c *checker) add(where, format string, args ...any) {
	c.breaches = append(c.breaches, Breach{where, fmt.Sprintf(format, args...)})
}

func (c *checker) row(path string) (Row, bool) {
	i := slices.IndexFunc(c.rules.Table, func(r Row) bool { return r.Path == path })
	if i < 0 {
		return Row{}, false
	}
	return c.rules.Table[i], true
}

// inner checks one import of a package of this module.
func (c *checker) inner(from Row, f *File, path string) {
	to, ok := c.row(path)
	if !ok {
		c.add(f.Path, "imports %s, which is not in the table of test/floors", path)
		return
	}
	if to.Path == from.Path {
		return // the external test of a package
	}
	if from.Leaf != nil && !f.Test {
		if !slices.Contains(from.Leaf, to.Path) {
			c.add(f.Path, "imports %s: %s is a leaf and may import %s only", to.Path, from.Path, orNothing(from.Leaf))
		}
		return
	}
	for _, pair := range c.rules.NeverMeet {
		if within(from.Path, pair[0]) && within(to.Path, pair[1]) || within(from.Path, pair[1]) && within(to.Path, pair[0]) {
			c.add(f.Path, "imports %s: %s and %s never meet", to.Path, pair[0], pair[1])
			return
		}
	}
	switch {
	case to.Kind == Tool:
		c.add(f.Path, "imports %s, which is a program", to.Path)
	case from.Kind != Product:
		// Tests and tools may use every part of the product.
	case to.Kind == Tests && to.Leaf != nil && f.Test:
		// What tests share, and hangs on nothing of the module.
	case to.Kind == Tests:
		c.add(f.Path, "imports %s: the product never imports tests", to.Path)
	case to.Floor < from.Floor:
	case to.Floor == from.Floor && (f.Test || within(from.Path, to.Path)):
	case c.excepted(c.rules.Exceptions, from.Path, to.Path):
	case to.Floor == from.Floor:
		c.add(f.Path, "imports %s: both are on floor %d, where only a package whose path is a prefix may be imported", to.Path, to.Floor)
	default:
		c.add(f.Path, "imports %s: floor %d may not import floor %d", to.Path, from.Floor, to.Floor)
	}
}

// only checks the rows "only X imports Y".
func (c *checker) only(from Row, f *File, path string) {
	for _, o := range c.rules.OnlyImporters {
		if !within(path, o.Import) || slices.Contains(o.By, from.Path) || f.Test && slices.Contains(o.ByTests, from.Path) {
			continue
		}
		if from.Kind == Tests && slices.Contains(o.ByTests, from.Path) {
			continue // helpers of tests in a package that holds tests alone
		}
		c.add(f.Path, "imports %s: only %s may (%s)", path, strings.Join(o.By, ", "), o.Why)
	}
}

// pureImport checks one import, of another module, by a pure package.
func (c *checker) pureImport(from Row, f *File, path string) {
	for _, a := range PureAllowed {
		if within(path, a) {
			return
		}
	}
	standard := !strings.Contains(strings.Split(path, "/")[0], ".")
	forbidden := slices.ContainsFunc(PureForbidden, func(p string) bool { return within(path, p) })
	if standard && !forbidden || c.excepted(c.rules.PureExceptions, from.Path, path) {
		return
	}
	c.add(f.Path, "imports %s: a package on floor %d is pure (no I/O, no clock, no goroutine)", path, from.Floor)
}

// pureCode looks for goroutines and impure functions.
func (c *checker) pureCode(f *File) {
	ast.Inspect(f.AST, func(n ast.Node) bool {
		switch n := n.(type) {
		case *ast.GoStmt:
			c.add(position(f, n), "starts a goroutine in a pure package")
		case *ast.SelectorExpr:
			x, ok := n.X.(*ast.Ident)
			if ok && slices.Contains(f.Imports, x.Name) && slices.Contains(ImpureWords[x.Name], n.Sel.Name) {
				c.add(position(f, n), "uses %s.%s in a pure package: it has no clock and no I/O", x.Name, n.Sel.Name)
			}
		}
		return true
	})
}

func (c *checker) excepted(list []Exception, from, to string) bool {
	for _, e := range list {
		if e.From == from && e.To == to {
			c.used[e] = true
			return true
		}
	}
	return false
}

func position(f *File, n ast.Node) string {
	return fmt.Sprintf("%s:%d", f.Path, f.Fset.Position(n.Pos()).Line)
}

func orNothing(list []string) string {
	if len(list) == 0 {
		return "nothing of the module"
	}
	return strings.Join(list, ", ")
}
