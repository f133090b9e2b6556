package main

import (
	"bytes"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

// The packages of a module that goes wrong in every way that a test run can.
var badModule = map[string]string{
	"go.mod": "module example\n\ngo 1.26.0\n",
	"good/good_test.go": `package good
import "testing"
func TestAlone(t *testing.T) {}
func TestParent(t *testing.T) {
	t.Run("one", func(t *testing.T) {})
	t.Run("with/slash", func(t *testing.T) {})
}
func TestSkipped(t *testing.T) { t.Skip("because of the weather") }
`,
	"notests/notests.go": "package notests\n",
	"bad/bad_test.go": `package bad
import "testing"
func TestChild(t *testing.T) {
	t.Run("good", func(t *testing.T) {})
	t.Run("bad", func(t *testing.T) { t.Error("child words") })
}
func TestItself(t *testing.T) {
	t.Run("good", func(t *testing.T) {})
	t.Error("parent words")
}
`,
	"panics/panics_test.go": `package panics
import "testing"
func TestGood(t *testing.T) {}
func TestPanics(t *testing.T) { panic("panic words") }
func TestNeverRun(t *testing.T) {}
`,
	"broken/broken_test.go": `package broken
import "testing"
func TestBroken(t *testing.T) { undefinedWord() }
`,
	"main/main_test.go": `package main
import ("os"; "testing")
func TestMain(m *testing.M) { m.Run(); os.Exit(3) }
func TestGood(t *testing.T) {}
`,
	"vet/vet_test.go": `package vet
import ("fmt"; "testing")
func TestVet(t *testing.T) { fmt.Printf("%d\n", "vet words") }
`,
}

func runIn(t *testing.T, files map[string]string, strict bool, args ...string) (string, int) {
	t.Helper()
	dir := t.TempDir()
	for name, text := range files {
		path := filepath.Join(dir, name)
		if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(path, []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	t.Chdir(dir)
	var out bytes.Buffer
	status := run(args, strict, &out)
	return out.String(), status
}

func lastLine(out string) string {
	lines := strings.Split(strings.TrimRight(out, "\n"), "\n")
	return lines[len(lines)-1]
}

func TestEveryWayToFail(t *testing.T) {
	out, status := runIn(t, badModule, false, "./...")
	// Passed: good 3, bad 2, panics 1, main 1. Failed: bad 2, panics 1, broken 1, main 1, vet 1.
	if got, want := lastLine(out), "7 passed, 6 failed, 1 skipped"; got != want {
		t.Errorf("last line %q, want %q", got, want)
	}
	if status != 1 {
		t.Errorf("exit status %d, want 1", status)
	}
	for _, want := range []string{
		"child words", "parent words", "panic words", "undefinedWord", "vet words",
		"because of the weather", "example/good TestSkipped",
		"FAILED: example/bad TestChild/bad", "FAILED: example/bad TestItself", "FAILED: example/broken", "FAILED: example/main",
	} {
		if !strings.Contains(out, want) {
			t.Errorf("the output does not tell %q", want)
		}
	}
	if strings.Contains(out, "FAILED: example/bad TestChild (") {
		t.Error("a parent is counted beside its failed subtest")
	}
	if t.Failed() {
		t.Log(out)
	}
}

func TestSkipIsAFailureInCI(t *testing.T) {
	files := map[string]string{"go.mod": badModule["go.mod"], "good/good_test.go": badModule["good/good_test.go"]}
	if out, status := runIn(t, files, false, "./..."); status != 0 || lastLine(out) != "3 passed, 0 failed, 1 skipped" {
		t.Errorf("not strict: status %d\n%s", status, out)
	}
	out, status := runIn(t, files, true, "./...")
	if status != 1 || lastLine(out) != "3 passed, 1 failed, 1 skipped" {
		t.Errorf("strict: status %d\n%s", status, out)
	}
	allowedSkips["example/good TestSkipped"] = "for this test"
	defer delete(allowedSkips, "example/good TestSkipped")
	if out, status := runIn(t, files, true, "./..."); status != 0 {
		t.Errorf("strict, but listed: status %d\n%s", status, out)
	}
}

func TestBrokenModule(t *testing.T) {
	out, status := runIn(t, map[string]string{"go.mod": "module\n"}, false, "./...")
	if status != 1 || lastLine(out) != "0 passed, 1 failed, 0 skipped" {
		t.Errorf("status %d\n%s", status, out)
	}
}

// The stream of a run that was cut off: what has no result has failed.
func TestCutStream(t *testing.T) {
	var out bytes.Buffer
	c := newCollector(&out)
	c.line([]byte(`{"Action":"start","Package":"p"}`))
	c.line([]byte(`{"Action":"run","Package":"p","Test":"TestX"}`))
	if status := c.finish(false, nil, nil); status != 1 {
		t.Errorf("status %d\n%s", status, out.String())
	}
	if got := lastLine(out.String()); got != "0 passed, 1 failed, 0 skipped" {
		t.Errorf("last line %q", got)
	}
}
