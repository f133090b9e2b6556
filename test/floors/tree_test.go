package floors

import (
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"portcullis/bpf/abi"
	"portcullis/ipcache/lease"
)

// load returns the module's root and packages.
func load(t *testing.T) (string, []*Package) {
	t.Helper()
	root, err := Root(".")
	if err != nil {
		t.Fatal(err)
	}
	pkgs, err := Load(root)
	if err != nil {
		t.Fatal(err)
	}
	return root, pkgs
}

func report(t *testing.T, breaches []Breach) {
	t.Helper()
	for _, b := range breaches {
		t.Error(b)
	}
}

func TestImports(t *testing.T) {
	_, pkgs := load(t)
	report(t, CheckImports(pkgs, Layout()))
}

func TestComments(t *testing.T) {
	_, pkgs := load(t)
	report(t, CheckComments(pkgs, Table))
}

func TestSizes(t *testing.T) {
	root, pkgs := load(t)
	sizes, err := Oversized(root, pkgs)
	if err != nil {
		t.Fatal(err)
	}
	report(t, CheckSizes(sizes, Larges))
}

func TestLinks(t *testing.T) {
	root, _ := load(t)
	breaches, err := CheckLinks(root)
	if err != nil {
		t.Fatal(err)
	}
	report(t, breaches)
}

// Every word that a person may meet is explained in docs/reasons.md, and
// nothing else is.
func TestReasonsAreExplained(t *testing.T) {
	root, _ := load(t)
	text, err := os.ReadFile(filepath.Join(root, "docs", "reasons.md"))
	if err != nil {
		t.Fatal(err)
	}
	explained := Headings(string(text))
	var words []string
	for v := range abi.VerdictMax {
		words = append(words, v.String())
	}
	for r := range abi.ReasonMax {
		if r != abi.ReasonNone {
			words = append(words, r.String())
		}
	}
	for r := lease.Refusal(1); r.String() != "invalid"; r++ {
		words = append(words, r.String())
	}
	for _, w := range words {
		if !slices.Contains(explained, w) {
			t.Errorf("docs/reasons.md has no heading `%s`", w)
		}
	}
	for _, w := range explained {
		if !slices.Contains(words, w) {
			t.Errorf("docs/reasons.md explains %q, which no enumeration holds", w)
		}
	}
}

// A flag that a document names in backquotes is one that the command line has.
func TestFlagsInDocumentsExist(t *testing.T) {
	root, pkgs := load(t)
	flags := map[string]bool{"help": true}
	for _, p := range pkgs {
		if p.Path != "cmd/portcullis" && p.Path != "observe/hubble" { // that one holds the words of observe
			continue
		}
		for _, f := range p.Files {
			for _, s := range Strings(f) {
				flags[s] = true
			}
		}
	}
	named, err := DocumentedFlags(root)
	if err != nil {
		t.Fatal(err)
	}
	if len(named) == 0 {
		t.Fatal("no document names a flag: the search is broken")
	}
	for _, n := range named {
		if !flags[n.What] {
			t.Errorf("%s: names the flag --%s, which no command has", n.Where, n.What)
		}
	}
}

// Every module that is used directly has its sentence of reason.
func TestDependenciesAreExplained(t *testing.T) {
	root, pkgs := load(t)
	gomod, err := os.ReadFile(filepath.Join(root, "go.mod"))
	if err != nil {
		t.Fatal(err)
	}
	text, err := os.ReadFile(filepath.Join(root, "docs", "adr", "dependencies.md"))
	if err != nil {
		t.Fatal(err)
	}
	mods := Direct(string(gomod), pkgs)
	if len(mods) < 3 {
		t.Fatalf("found only %d direct dependencies (%s): go.mod was not understood", len(mods), strings.Join(mods, ", "))
	}
	for _, m := range mods {
		if !strings.Contains(string(text), "`"+m+"`") {
			t.Errorf("docs/adr/dependencies.md does not say why %s is used", m)
		}
	}
}
