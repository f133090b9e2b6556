package main

import (
	"encoding/json"
	"fmt"
	"io"
	"maps"
	"slices"
	"strings"
	"sync"
	"time"
)

// maxKept bounds the output kept for one test: at least so many of its last
// lines, and at most twice as many.
const maxKept = 2000

// event is one line of `go test -json`: those of cmd/test2json, and those of
// the build (build-output, build-fail).
type event struct {
	Action      string
	Package     string
	ImportPath  string // of build events
	Test        string
	Elapsed     float64
	Output      string
	FailedBuild string
}

// test is one test or subtest that has begun, and its result.
type test struct {
	result   string // "" while it runs, else pass, fail or skip
	children int
	failed   int // descendants that failed
	output   []string
	cut      bool // output is not whole
	began    time.Time
}

// pkg is one package's tests.
type pkg struct {
	tests  map[string]*test
	order  []string
	output []string // of the package, outside its tests
	cut    bool
	began  time.Time
	done   bool
}

// collector turns events into counts. Its methods may be called concurrently.
type collector struct {
	mu       sync.Mutex // guards all below
	out      io.Writer
	pkgs     map[string]*pkg
	builds   map[string][]string // output by import path
	reported map[string]bool     // failed builds whose output was printed
	lastLine time.Time

	passed, failed, skipped int
	failures, skips         []string // "package Test"
}

func newCollector(out io.Writer) *collector {
	return &collector{out: out, pkgs: map[string]*pkg{}, builds: map[string][]string{}, reported: map[string]bool{}, lastLine: time.Now()}
}

// line takes one line of go test's standard output.
func (c *collector) line(b []byte) {
	c.mu.Lock()
	defer c.mu.Unlock()
	var e event
	if err := json.Unmarshal(b, &e); err != nil || e.Action == "" {
		// Not an event: print it, lest an explanation be lost.
		c.printf("%s", b)
		return
	}
	switch e.Action {
	case "build-output":
		c.builds[e.ImportPath] = append(c.builds[e.ImportPath], e.Output)
		return
	case "build-fail":
		return // the packages that needed it fail with FailedBuild
	}
	if e.Package == "" {
		return
	}
	p := c.pkgs[e.Package]
	if p == nil {
		p = &pkg{tests: map[string]*test{}, began: time.Now()}
		c.pkgs[e.Package] = p
	}
	if e.Test == "" {
		c.packageEvent(p, e)
	} else {
		c.testEvent(p, e)
	}
}

func (c *collector) testEvent(p *pkg, e event) {
	t := p.tests[e.Test]
	if t == nil {
		t = &test{began: time.Now()}
		p.tests[e.Test] = t
		p.order = append(p.order, e.Test)
		for name := parentOf(e.Test); name != ""; name = parentOf(name) {
			// The nearest ancestor that is a test: a name may hold slashes itself.
			if parent, ok := p.tests[name]; ok {
				parent.children++
				break
			}
		}
	}
	switch e.Action {
	case "output":
		t.output, t.cut = keep(t.output, t.cut, e.Output)
	case "pass":
		t.result, t.output = "pass", nil
	case "skip":
		t.result = "skip"
	case "fail":
		t.result = "fail"
		for name := parentOf(e.Test); name != ""; name = parentOf(name) {
			if parent := p.tests[name]; parent != nil {
				parent.failed++
			}
		}
	}
}

func (c *collector) packageEvent(p *pkg, e event) {
	switch e.Action {
	case "output":
		p.output, p.cut = keep(p.output, p.cut, e.Output)
	case "pass", "skip", "fail":
		if !p.done {
			p.done = true
			c.packageDone(p, e)
		}
	}
}

// packageDone counts a package's tests and prints its line, after the output
// of what failed.
func (c *collector) packageDone(p *pkg, e event) {
	var passed, failed, skipped int
	for _, name := range p.order {
		t := p.tests[name]
		full := e.Package + " " + name
		switch {
		case t.result == "" && e.Action == "fail":
			// It was running when the package died. Its subtests tell more.
			if t.children == 0 {
				failed++
				c.failure(full, "did not finish", t)
			}
		case t.result == "fail" && t.failed == 0:
			failed++
			c.failure(full, "failed", t)
		case t.result == "fail":
			c.printOutput(t.output, t.cut) // the parent's own words; its subtests are counted
		case t.result == "skip" && t.children == 0:
			skipped++
			c.skips = append(c.skips, full)
			c.printf("--- skipped: %s: %s\n", full, lastWords(t.output))
		case t.result == "pass" && t.children == 0:
			passed++
		}
	}
	if e.Action == "fail" && (failed == 0 || e.FailedBuild != "") {
		failed++
		c.failures = append(c.failures, e.Package)
		c.printf("--- FAILED: %s\n", e.Package)
		c.printBuild(e.FailedBuild)
	}
	if e.Action == "fail" {
		c.printOutput(p.output, p.cut)
	}
	c.passed += passed
	c.failed += failed
	c.skipped += skipped
	switch {
	case e.Action == "fail":
		c.printf("FAIL %-50s %7.1fs  %d passed, %d failed, %d skipped\n", e.Package, e.Elapsed, passed, failed, skipped)
	case passed+skipped == 0:
		// No tests: nothing to tell.
	case skipped > 0:
		c.printf("ok   %-50s %7.1fs  %d passed, %d skipped\n", e.Package, e.Elapsed, passed, skipped)
	default:
		c.printf("ok   %-50s %7.1fs  %d passed\n", e.Package, e.Elapsed, passed)
	}
	p.tests, p.order, p.output = nil, nil, nil
}

func (c *collector) failure(full, how string, t *test) {
	c.failures = append(c.failures, full)
	c.printf("--- FAILED: %s (%s)\n", full, how)
	c.printOutput(t.output, t.cut)
}

func (c *collector) printOutput(lines []string, cut bool) {
	if cut {
		c.printf("    [only the last lines are shown]\n")
	}
	for _, l := range lines {
		if s := strings.TrimSpace(l); strings.HasPrefix(s, "=== ") || s == "" {
			continue
		}
		c.printf("    %s\n", strings.TrimRight(l, "\n"))
	}
}

// printBuild prints the compiler's words once, however many packages need them.
func (c *collector) printBuild(importPath string) {
	if importPath == "" || c.reported[importPath] {
		return
	}
	c.reported[importPath] = true
	for _, l := range c.builds[importPath] {
		c.printf("    %s\n", strings.TrimRight(l, "\n"))
	}
}

// stillRunning prints which tests run, if nothing was printed for a while.
func (c *collector) stillRunning(now time.Time) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if now.Sub(c.lastLine) < progressEvery {
		return
	}
	var running []string
	for path, p := range c.pkgs {
		if p.done {
			continue
		}
		for name, t := range p.tests {
			if t.result == "" && t.children == 0 {
				running = append(running, fmt.Sprintf("%s %s (%ds)", path, name, int(now.Sub(t.began).Seconds())))
			}
		}
	}
	slices.Sort(running)
	if len(running) == 0 {
		c.printf("...  building, or waiting for a package to begin\n")
		return
	}
	const most = 4
	more := ""
	if len(running) > most {
		more = fmt.Sprintf(" and %d more", len(running)-most)
		running = running[:most]
	}
	c.printf("...  running: %s%s\n", strings.Join(running, ", "), more)
}

// finish prints the lists and the last line, and returns the exit status.
// readErr and waitErr are how the reading and the process ended.
func (c *collector) finish(strict bool, readErr, waitErr error) int {
	c.mu.Lock()
	defer c.mu.Unlock()
	for _, path := range slices.Sorted(maps.Keys(c.pkgs)) {
		if !c.pkgs[path].done {
			// The stream ended before the package did.
			c.failed++
			c.failures = append(c.failures, path+" (no result)")
		}
	}
	if readErr != nil {
		c.failed++
		c.failures = append(c.failures, "reading the results: "+readErr.Error())
	}
	if waitErr != nil && c.failed == 0 {
		// go test failed outside every package: a broken go.mod, no such pattern.
		c.failed++
		c.failures = append(c.failures, "go test: "+waitErr.Error())
	}
	if len(c.pkgs) == 0 && c.failed == 0 {
		c.failed++
		c.failures = append(c.failures, "go test found no package")
	}
	if strict {
		for _, s := range c.skips {
			if _, ok := allowedSkips[s]; !ok {
				c.failed++
				c.failures = append(c.failures, s+" (skipped: with CI=true every test must run)")
			}
		}
	}
	c.list("skipped", c.skips)
	c.list("failed", c.failures)
	c.printf("%d passed, %d failed, %d skipped\n", c.passed, c.failed, c.skipped)
	if c.failed > 0 {
		return 1
	}
	return 0
}

func (c *collector) list(title string, names []string) {
	if len(names) == 0 {
		return
	}
	c.printf("\n%s:\n", title)
	for _, n := range names {
		c.printf("    %s\n", n)
	}
}

func (c *collector) printf(format string, args ...any) {
	c.lastLine = time.Now()
	fmt.Fprintf(c.out, format, args...)
}

// keep appends a line and drops the oldest beyond maxKept.
func keep(lines []string, cut bool, line string) ([]string, bool) {
	if len(lines) >= 2*maxKept {
		lines, cut = append(lines[:0:0], lines[len(lines)-maxKept:]...), true
	}
	return append(lines, line), cut
}

// parentOf returns the name of the test that a subtest belongs to, or "".
func parentOf(name string) string {
	if i := strings.LastIndexByte(name, '/'); i >= 0 {
		return name[:i]
	}
	return ""
}

// lastWords returns the last line of output that says something: of a skipped
// test, the reason.
func lastWords(lines []string) string {
	for _, l := range slices.Backward(lines) {
		s := strings.TrimSpace(l)
		if s != "" && !strings.HasPrefix(s, "--- ") && !strings.HasPrefix(s, "=== ") {
			return s
		}
	}
	return "no reason given"
}
