package floors

import (
	"slices"
	"strings"
	"testing"
)

// pkgOf builds a package of one file.
func pkgOf(t *testing.T, path, src string) *Package {
	t.Helper()
	f, err := Parse(path, src)
	if err != nil {
		t.Fatal(err)
	}
	return &Package{Path: path[:strings.LastIndexByte(path, '/')], Name: f.AST.Name.Name, Files: []*File{f}}
}

// Each rule is broken once, and kept once beside it.
func TestImportRules(t *testing.T) {
	const head = "package x\nimport _ "
	for _, tc := range []struct{ path, src, want string }{
		{"authz/x.go", head + `"portcullis/identity"`, ""},
		{"authz/x.go", head + `"portcullis/datapath"`, "floor 1 may not import floor 2"},
		{"authz/x.go", head + `"portcullis/observe/flow"`, "both are on floor 1"},
		{"authz/dialect/k8s/x.go", head + `"portcullis/authz"`, ""},
		{"authz/x.go", head + `"portcullis/ipcache"`, "never meet"},
		{"ipcache/lease/x.go", head + `"portcullis/authz/l7"`, "never meet"},
		{"ipcache/lease/x_test.go", head + `"portcullis/authz"`, "never meet"},
		{"datapath/hold/x.go", head + `"portcullis/datapath"`, ""},
		{"datapath/x.go", head + `"portcullis/ipcache/session"`, "both are on floor 2"},
		{"ipcache/session/x_test.go", head + `"portcullis/identity/labca"`, ""},
		{"ipcache/session/x_test.go", head + `"portcullis/agent"`, "floor 2 may not import floor 3"},
		{"chaos/check/x.go", head + `"portcullis/identity"`, ""},
		{"chaos/check/x.go", head + `"portcullis/bpf/abi"`, "is a leaf"},
		{"chaos/lab/probe/x.go", head + `"portcullis/identity"`, "is a leaf"},
		{"agent/x.go", head + `"portcullis/test/bench"`, "never imports tests"},
		{"agent/x_test.go", head + `"portcullis/test/bench"`, "never imports tests"},
		{"agent/x_test.go", head + `"portcullis/test/peak"`, ""},
		{"agent/x.go", head + `"portcullis/test/peak"`, "never imports tests"},
		{"agent/x.go", head + `"portcullis/bpf/internal/gen"`, "which is a program"},
		{"agent/x.go", head + `"portcullis/elsewhere"`, "not in the table"},
		{"elsewhere/x.go", head + `"fmt"`, "not in the table"},
		{"test/e2e/x.go", head + `"portcullis/agent"`, ""},

		{"datapath/x.go", head + `"github.com/cilium/ebpf/link"`, ""},
		{"datapath/hold/x.go", head + `"github.com/cilium/ebpf"`, "only datapath"},
		{"datapath/hold/x_test.go", head + `"github.com/cilium/ebpf"`, "only datapath"},
		{"agent/x_test.go", head + `"github.com/cilium/ebpf"`, "only datapath"},
		{"bpf/tests/x_test.go", head + `"github.com/cilium/ebpf"`, ""},
		{"agent/kube/x.go", head + `"k8s.io/client-go/rest"`, ""},
		{"agent/x.go", head + `"k8s.io/client-go/rest"`, "only agent/kube"},

		{"authz/x.go", head + `"net/netip"`, ""},
		{"authz/x.go", head + `"net"`, "is pure"},
		{"authz/x.go", head + `"net/http"`, "is pure"},
		{"authz/x.go", head + `"os/exec"`, "is pure"},
		{"authz/x.go", head + `"log/slog"`, "is pure"},
		{"authz/x.go", head + `"math/rand/v2"`, "is pure"},
		{"authz/x.go", head + `"crypto/sha256"`, ""},
		{"authz/x.go", head + `"go.yaml.in/yaml/v3"`, ""},
		{"authz/x.go", head + `"google.golang.org/grpc"`, "is pure"},
		{"authz/x.go", head + `"go.uber.org/zap"`, "is pure"},
		{"authz/x_test.go", head + `"os"`, ""},
		{"agent/x.go", head + `"os"`, ""},
		{"authz/x.go", "package x\nimport \"time\"\nvar _ = time.Second", ""},
		{"authz/x.go", "package x\nimport \"time\"\nvar _ = time.Now()", "time.Now"},
		{"authz/x.go", "package x\nimport \"time\"\nvar now = time.Now", "time.Now"},
		{"authz/x.go", "package x\nimport \"fmt\"\nfunc f() { fmt.Println() }", "fmt.Println"},
		{"authz/x.go", "package x\nfunc f() { go f() }", "goroutine"},
		{"agent/x.go", "package x\nfunc f() { go f() }", ""},
	} {
		rules := Layout()
		rules.Exceptions, rules.PureExceptions = nil, nil
		breaches := CheckImports([]*Package{pkgOf(t, tc.path, tc.src)}, rules)
		switch {
		case tc.want == "" && len(breaches) != 0:
			t.Errorf("%s: %q: refused: %v", tc.path, tc.src, breaches)
		case tc.want != "" && (len(breaches) != 1 || !strings.Contains(breaches[0].String(), tc.want)):
			t.Errorf("%s: %q: got %v, want one breach with %q", tc.path, tc.src, breaches, tc.want)
		case tc.want != "" && !strings.HasPrefix(breaches[0].Where, tc.path):
			t.Errorf("%s: the breach names %s", tc.path, breaches[0].Where)
		}
	}
}

func TestExceptionsAreNeededAndHonoured(t *testing.T) {
	rules := Layout()
	rules.PureExceptions = nil
	rules.Exceptions = []Exception{{"authz", "observe/flow", "for this test"}}
	p := pkgOf(t, "authz/x.go", "package x\nimport _ \"portcullis/observe/flow\"")
	if b := CheckImports([]*Package{p}, rules); len(b) != 0 {
		t.Errorf("excepted, but refused: %v", b)
	}
	p = pkgOf(t, "authz/x.go", "package x")
	if b := CheckImports([]*Package{p}, rules); len(b) != 1 || !strings.Contains(b[0].What, "needed by nobody") {
		t.Errorf("an exception that nothing needs gave %v", b)
	}
}

// The table itself: no row twice, leaves and exceptions name rows.
func TestTable(t *testing.T) {
	seen := map[string]bool{}
	for _, r := range Table {
		if seen[r.Path] {
			t.Errorf("%s stands twice in the table", r.Path)
		}
		seen[r.Path] = true
	}
	for _, r := range Table {
		for _, l := range r.Leaf {
			if !seen[l] {
				t.Errorf("%s may import %s, which is no row", r.Path, l)
			}
		}
	}
	for _, o := range OnlyImporters {
		for _, p := range append(slices.Clone(o.By), o.ByTests...) {
			if !seen[p] {
				t.Errorf("%s may import %s, but is no row", p, o.Import)
			}
		}
	}
	for _, e := range append(slices.Clone(Exceptions), PureExceptions...) {
		if !seen[e.From] || e.Why == "" {
			t.Errorf("exception %v: no such row, or no reason", e)
		}
	}
}

func TestSizeRules(t *testing.T) {
	long := "package x\n\nfunc (t *T) F() {\n" + strings.Repeat("\tf()\n", MaxFunction) + "}\n"
	f, err := Parse("authz/x.go", long)
	if err != nil {
		t.Fatal(err)
	}
	if got := goSizes(f); len(got) != 1 || got[0].Where != "authz/x.go (*T).F" || got[0].Lines != MaxFunction+2 {
		t.Errorf("long function: %v", got)
	}
	f, err = Parse("authz/x_test.go", long+strings.Repeat("\n", MaxFile))
	if err != nil {
		t.Fatal(err)
	}
	if got := goSizes(f); len(got) != 1 || got[0].Where != "authz/x_test.go" {
		t.Errorf("long test file: %v", got)
	}
	c := "static __always_inline int\njudge(struct x *a,\n\tint b)\n{\n" + strings.Repeat("\tf();\n", MaxFunction) + "}\nint short(void) {\n}\n"
	if got := cSizes("bpf/x.c", c); len(got) != 1 || got[0].Where != "bpf/x.c judge" || got[0].Lines != MaxFunction+2 {
		t.Errorf("long C function: %v", got)
	}

	sizes := []Size{{"a", 600, 500}, {"b", 600, 500}}
	allowed := []Large{{"b", 550, "was shorter"}, {"c", 700, "is gone"}}
	got := CheckSizes(sizes, allowed)
	if len(got) != 3 || !strings.Contains(got[0].What, "split it") || !strings.Contains(got[1].What, "has grown") || !strings.Contains(got[2].What, "remove it") {
		t.Errorf("sizes against the list: %v", got)
	}
}

func TestCommentRules(t *testing.T) {
	p := pkgOf(t, "authz/x.go", `package authz

type Bare struct{}

// Good has one.
type Good struct{}

func (Good) String() string { return "" }
func (Good) Method()        {}
func (hidden) Method()      {}

type hidden struct{}

const (
	One = 1 // has one
	Two = 2
)
`)
	var got []string
	for _, b := range CheckComments([]*Package{p}, Table) {
		got = append(got, b.What)
	}
	for _, want := range []string{"has no package comment", "exported Bare", "exported Good.Method", "exported Two"} {
		if !slices.ContainsFunc(got, func(g string) bool { return strings.Contains(g, want) }) {
			t.Errorf("no breach with %q", want)
		}
	}
	if len(got) != 4 {
		t.Errorf("breaches: %q", got)
	}
}

func TestDirect(t *testing.T) {
	gomod := "module m\n\nrequire example.com/one v1.0.0\nrequire (\n\texample.com/two v1.0.0 // indirect\n\texample.com/two/sub v1.0.0\n\texample.com/three v1.0.0\n)\n\ntool (\n\texample.com/three/cmd/x\n)\n"
	p := pkgOf(t, "a/x.go", "package a\nimport (\n_ \"example.com/one\"\n_ \"example.com/two/sub/pkg\"\n)")
	if got, want := strings.Join(Direct(gomod, []*Package{p}), " "), "example.com/one example.com/three example.com/two/sub"; got != want {
		t.Errorf("got %s, want %s", got, want)
	}
}
