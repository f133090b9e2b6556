package main

import (
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"portcullis/chaos/check"
)

// judged is a program in the place of the one that is judged: its n-th run comes
// to the n-th of these results, nil: to none, and all that follow to the last.
func judged(t *testing.T, results ...*check.Result) (program string, calls func() int) {
	t.Helper()
	dir := t.TempDir()
	script := "#!/bin/sh\necho run >>" + dir + "/calls\nn=$(wc -l <" + dir + "/calls)\n[ $n -gt " + fmt.Sprint(len(results)) + " ] && n=" + fmt.Sprint(len(results)) +
		"\n[ -e " + dir + "/$n ] || { echo the machine is busy >&2; exit 1; }\ncat " + dir + "/$n\n"
	program = filepath.Join(dir, "portcullis")
	write := func(name string, content []byte) {
		if err := os.WriteFile(filepath.Join(dir, name), content, 0o755); err != nil {
			t.Fatal(err)
		}
	}
	write("portcullis", []byte(script))
	for i, r := range results {
		if r == nil {
			continue
		}
		b, err := json.Marshal(r)
		if err != nil {
			t.Fatal(err)
		}
		write(fmt.Sprint(i+1), b)
	}
	return program, func() int {
		b, _ := os.ReadFile(filepath.Join(dir, "calls"))
		return strings.Count(string(b), "\n")
	}
}

func result(verdict string, complete bool, violations uint64) *check.Result {
	r := &check.Result{Run: check.Run{Complete: complete}, Reuses: 7, Verdict: verdict}
	if violations > 0 {
		r.ViolationCount = map[check.Invariant]uint64{check.Safety: violations}
	}
	return r
}

// A run that came to its end is kept and not made again; one that did not is made
// again, at once and the next time; and the same binary finds what is kept.
func TestKeeper(t *testing.T) {
	held, cut := result(check.Held, true, 0), result(check.Interrupted, false, 0)
	violated, cutViolated := result(check.Violated, true, 2), result(check.Violated, false, 2)
	for what, c := range map[string]struct {
		evidence string
		comes    []*check.Result
		fails    string
		first    int // runs that were made
		then     int // when it is started again
		page     string
	}{
		"at its end":           {"lease", []*check.Result{held}, "", 1, 1, "held, <"},
		"cut short once":       {"lease", []*check.Result{cut, held}, "", 2, 2, "held, <"},
		"no result once":       {"lease", []*check.Result{nil, held}, "", 2, 2, "held, <"},
		"never at its end":     {"lease", []*check.Result{nil}, "inconclusive: it came to no end in 3 tries", 3, 6, "no run came to its end"},
		"violated":             {"lease", []*check.Result{violated}, "1 runs were violated", 1, 1, "**I1: 2**"},
		"violated, cut short":  {"lease", []*check.Result{cutViolated}, "1 runs were violated", 1, 2, "**I1: 2**; 1 of 1 runs were not at their end"},
		"classic":              {"classic", []*check.Result{violated}, "", 1, 1, "**I1: 2**"},
		"classic, cut short":   {"classic", []*check.Result{cutViolated, violated}, "", 2, 2, "**I1: 2**"},
		"classic, always so":   {"classic", []*check.Result{cutViolated}, "came to no end in 3 tries", 3, 6, "no run came to its end"},
		"said why it does not": {"lease", []*check.Result{nil}, "the machine is busy", 3, 6, "no run came to its end"},
	} {
		t.Run(what, func(t *testing.T) {
			program, calls := judged(t, c.comes...)
			o := options{binary: program, dir: t.TempDir(), evidence: []string{c.evidence}, faults: []string{"starve"}, page: filepath.Join(t.TempDir(), "page.md"), commit: "c0ffee"}
			for _, want := range []int{c.first, c.then} {
				err := run(t.Context(), o)
				if (err == nil) != (c.fails == "") || err != nil && !strings.Contains(err.Error(), c.fails) {
					t.Errorf("%v, want %q", err, c.fails)
				}
				if got := calls(); got != want {
					t.Errorf("%d runs were made, want %d", got, want)
				}
				text, err := os.ReadFile(o.page)
				if err != nil || !strings.Contains(string(text), c.page) || !strings.Contains(string(text), "commit c0ffee, binary ") {
					t.Errorf("want %q, %v in\n%s", c.page, err, text)
				}
			}
		})
	}
}
