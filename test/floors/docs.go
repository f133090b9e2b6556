package floors

import (
	"go/ast"
	"go/token"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
)

// selfEvident are methods whose meaning their name gives.
var selfEvident = []string{"String", "Error", "Unwrap", "Is", "Len", "Less", "Swap"}

// CheckComments returns every package without a package comment, every package
// of the product without doc.go, and every exported identifier of the product
// without a comment. Generated files are left out.
func CheckComments(pkgs []*Package, table []Row) (out []Breach) {
	for _, p := range pkgs {
		generated := !slices.ContainsFunc(p.Files, func(f *File) bool { return !f.Generated })
		described := slices.ContainsFunc(p.Files, func(f *File) bool { return f.AST.Doc != nil })
		onlyTests := !slices.ContainsFunc(p.Files, func(f *File) bool { return !f.Test })
		if !described && !onlyTests {
			out = append(out, Breach{p.Path, "has no package comment: say in doc.go what it is for, what it may import, and what runs concurrently"})
		}
		i := slices.IndexFunc(table, func(r Row) bool { return r.Path == p.Path })
		product := i >= 0 && table[i].Kind == Product
		hasDoc := slices.ContainsFunc(p.Files, func(f *File) bool { return strings.HasSuffix(f.Path, "/doc.go") })
		if product && !generated && !hasDoc && p.Name != "main" && len(p.Files) > 1 {
			out = append(out, Breach{p.Path, "has no doc.go"})
		}
		if p.Name == "main" {
			continue
		}
		for _, f := range p.Files {
			if !f.Test && !f.Generated {
				out = append(out, undocumented(f)...)
			}
		}
	}
	return out
}

func undocumented(f *File) (out []Breach) {
	miss := func(n ast.Node, name string) {
		out = append(out, Breach{position(f, n), "exported " + name + " has no comment"})
	}
	for _, d := range f.AST.Decls {
		switch d := d.(type) {
		case *ast.FuncDecl:
			if !d.Name.IsExported() || d.Doc != nil || d.Recv != nil && hiddenMethod(d) {
				continue
			}
			miss(d, funcName(d))
		case *ast.GenDecl:
			if d.Tok == token.IMPORT || d.Doc != nil {
				continue
			}
			for _, s := range d.Specs {
				switch s := s.(type) {
				case *ast.TypeSpec:
					if s.Name.IsExported() && s.Doc == nil && s.Comment == nil {
						miss(s, s.Name.Name)
					}
				case *ast.ValueSpec:
					for _, n := range s.Names {
						if n.IsExported() && s.Doc == nil && s.Comment == nil {
							miss(s, n.Name)
						}
					}
				}
			}
		}
	}
	return out
}

// hiddenMethod tells that a method needs no comment of its own.
func hiddenMethod(d *ast.FuncDecl) bool {
	recv, _ := receiver(d)
	return !ast.IsExported(recv) || slices.Contains(selfEvident, d.Name.Name)
}

var (
	mdLink = regexp.MustCompile(`\]\(([^)\s]+)\)`)
	fence  = regexp.MustCompile("(?ms)^```.*?^```")
)

// CheckLinks returns every relative link in a Markdown file that leads to
// nothing.
func CheckLinks(root string) (out []Breach, err error) {
	err = Walk(root, func(rel string) error {
		if filepath.Ext(rel) != ".md" {
			return nil
		}
		src, err := os.ReadFile(filepath.Join(root, rel))
		if err != nil {
			return err
		}
		for _, m := range mdLink.FindAllStringSubmatch(fence.ReplaceAllString(string(src), ""), -1) {
			target, _, _ := strings.Cut(m[1], "#")
			if target == "" || strings.Contains(target, "://") || strings.HasPrefix(target, "mailto:") {
				continue
			}
			if _, err := os.Stat(filepath.Join(root, filepath.Dir(rel), target)); err != nil {
				out = append(out, Breach{rel, "links to " + m[1] + ", which is not there"})
			}
		}
		return nil
	})
	return out, err
}

var (
	inlineCode = regexp.MustCompile("`[^`\n]+`")
	longFlag   = regexp.MustCompile(`(?:^|[\s` + "`" + `])--([a-z][a-z-]*)`)
)

// DocumentedFlags returns every "--flag" in inline code of a Markdown file.
func DocumentedFlags(root string) (out []Breach, err error) {
	err = Walk(root, func(rel string) error {
		if filepath.Ext(rel) != ".md" {
			return nil
		}
		src, err := os.ReadFile(filepath.Join(root, rel))
		if err != nil {
			return err
		}
		for _, code := range inlineCode.FindAllString(string(src), -1) {
			for _, m := range longFlag.FindAllStringSubmatch(code, -1) {
				out = append(out, Breach{rel, m[1]})
			}
		}
		return nil
	})
	return out, err
}

// Strings returns the string literals of a file.
func Strings(f *File) (out []string) {
	ast.Inspect(f.AST, func(n ast.Node) bool {
		if lit, ok := n.(*ast.BasicLit); ok && lit.Kind == token.STRING {
			if s, err := strconv.Unquote(lit.Value); err == nil {
				out = append(out, s)
			}
		}
		return true
	})
	return out
}

// Headings returns the words in backquotes that are headings of the Markdown
// text: "### `word`".
func Headings(text string) (words []string) {
	for _, m := range regexp.MustCompile("(?m)^#+ `([^`]+)`").FindAllStringSubmatch(text, -1) {
		words = append(words, m[1])
	}
	return words
}
