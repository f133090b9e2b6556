package floors

import (
	"fmt"
	"go/ast"
	"os"
	"path/filepath"
	"slices"
	"strings"
)

// The limits beyond which a file or a function needs a reason.
const (
	MaxFile     = 500 // lines; test files too, and C
	MaxFunction = 70  // lines, from `func` to the closing brace; tests, which are mostly tables, excepted
)

// Large is a file or a function that may be larger than the limit, and how
// large, so that growth is seen.
type Large struct {
	Where string // "path" or "path Function" or "path (*Type).Method"
	Lines int    // at most
	Why   string
}

// Size is a file or a function beyond its limit.
type Size struct {
	Where string
	Lines int
	Limit int
}

// Oversized returns every hand-written file and function beyond the limits.
// In C, what stands under bpf/include is of others, and is left out.
func Oversized(root string, pkgs []*Package) ([]Size, error) {
	var out []Size
	for _, p := range pkgs {
		for _, f := range p.Files {
			if f.Generated {
				continue
			}
			out = append(out, goSizes(f)...)
		}
	}
	err := Walk(root, func(rel string) error {
		if ext := filepath.Ext(rel); ext != ".c" && ext != ".h" || within(rel, "bpf/include") {
			return nil
		}
		src, err := os.ReadFile(filepath.Join(root, rel))
		if err != nil {
			return err
		}
		out = append(out, cSizes(rel, string(src))...)
		return nil
	})
	slices.SortFunc(out, func(a, b Size) int { return strings.Compare(a.Where, b.Where) })
	return out, err
}

func goSizes(f *File) (out []Size) {
	if f.Lines > MaxFile {
		out = append(out, Size{f.Path, f.Lines, MaxFile})
	}
	if f.Test {
		return out
	}
	for _, d := range f.AST.Decls {
		fn, ok := d.(*ast.FuncDecl)
		if !ok {
			continue
		}
		lines := f.Fset.Position(fn.End()).Line - f.Fset.Position(fn.Pos()).Line + 1
		if lines > MaxFunction {
			out = append(out, Size{f.Path + " " + funcName(fn), lines, MaxFunction})
		}
	}
	return out
}

// funcName returns "Function", "Type.Method" or "(*Type).Method".
func funcName(fn *ast.FuncDecl) string {
	if fn.Recv == nil || len(fn.Recv.List) == 0 {
		return fn.Name.Name
	}
	t, star := receiver(fn)
	if star {
		return "(*" + t + ")." + fn.Name.Name
	}
	return t + "." + fn.Name.Name
}

// receiver returns the name of the receiver's type, and whether it is a pointer.
func receiver(fn *ast.FuncDecl) (name string, pointer bool) {
	t := fn.Recv.List[0].Type
	if s, ok := t.(*ast.StarExpr); ok {
		t, pointer = s.X, true
	}
	switch x := t.(type) {
	case *ast.IndexExpr:
		t = x.X
	case *ast.IndexListExpr:
		t = x.X
	}
	if id, ok := t.(*ast.Ident); ok {
		name = id.Name
	}
	return name, pointer
}

// cSizes measures a C file in kernel style: a function's body begins with a
// brace in the first column, or at the end of a line that closes its
// parameters, and ends with a brace in the first column.
func cSizes(path, src string) (out []Size) {
	lines := strings.Split(src, "\n")
	if n := len(lines) - 1; n > MaxFile {
		out = append(out, Size{path, n, MaxFile})
	}
	begin, name := -1, ""
	for i, l := range lines {
		switch {
		case begin < 0 && strings.HasPrefix(l, "{") || begin < 0 && strings.HasSuffix(l, ") {") && !strings.HasPrefix(l, " ") && !strings.HasPrefix(l, "\t"):
			begin, name = i, cName(lines, i)
		case begin >= 0 && strings.HasPrefix(l, "}"):
			if n := i - begin + 1; n > MaxFunction {
				out = append(out, Size{path + " " + name, n, MaxFunction})
			}
			begin = -1
		}
	}
	return out
}

// cName returns the word before the parenthesis that opens the parameters of
// the function whose body begins at line i.
func cName(lines []string, i int) string {
	for ; i >= 0; i-- {
		head, _, found := strings.Cut(lines[i], "(")
		if found && !strings.HasPrefix(head, "\t") && !strings.HasPrefix(head, " ") {
			fields := strings.Fields(strings.ReplaceAll(head, "*", " "))
			if len(fields) > 0 {
				return fields[len(fields)-1]
			}
		}
	}
	return "?"
}

// CheckSizes compares what is too large with the list of what may be.
func CheckSizes(sizes []Size, allowed []Large) (out []Breach) {
	byWhere := map[string]Large{}
	for _, l := range allowed {
		byWhere[l.Where] = l
	}
	for _, s := range sizes {
		l, ok := byWhere[s.Where]
		delete(byWhere, s.Where)
		switch {
		case !ok:
			out = append(out, Breach{s.Where, fmt.Sprintf("has %d lines, over %d: split it, or list it in test/floors/large.go with the reason", s.Lines, s.Limit)})
		case s.Lines > l.Lines:
			out = append(out, Breach{s.Where, fmt.Sprintf("has grown to %d lines, listed with %d: split it, or raise its number knowingly", s.Lines, l.Lines)})
		}
	}
	for _, l := range allowed {
		if _, unused := byWhere[l.Where]; unused {
			out = append(out, Breach{l.Where, "is listed in test/floors/large.go, but is not large (or is gone): remove it"})
		}
	}
	return out
}
