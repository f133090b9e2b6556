package main

import (
	"os"
	"slices"
	"strings"
	"testing"

	"portcullis/chaos"
	"portcullis/chaos/check"
	"portcullis/chaos/fault"
)

// Every fault and every scenario is in the table, and every cell can be run.
func TestCells(t *testing.T) {
	all := append(cells([]string{"lease", "svid", "classic"}), longCells([]string{"lease"})...)
	names := map[string]bool{}
	for _, c := range all[:len(all)-2] {
		if names[c.name()] {
			t.Errorf("two cells %s", c.name())
		}
		names[c.name()] = true
	}
	for _, c := range all {
		n, events := c.runs()
		if n*events < c.Events {
			t.Errorf("%s: %d runs of %d reuses", c, n, events)
		}
		if err := chaos.Check(chaos.Options{Scenario: c.Scenario, Evidence: c.Evidence, Faults: c.Faults, Events: events, Parallel: c.Parallel}); err != nil {
			t.Errorf("%s: %v", c, err)
		}
		for _, f := range c.Faults {
			k, err := fault.Find(f)
			if least := 200; err != nil || !k.Waits && c.Events < least || c.Events < 20 {
				t.Errorf("%s: %d reuses, %v", c, c.Events, err)
			}
		}
	}
	for _, k := range fault.Kinds() {
		if !slices.ContainsFunc(all, func(c Cell) bool { return len(c.Faults) == 1 && c.Faults[0] == k.Name }) {
			t.Errorf("fault %s is not in the table", k.Name)
		}
	}
	for _, s := range chaos.Scenarios() {
		if !slices.ContainsFunc(all, func(c Cell) bool { return c.Scenario == s.Name && len(c.Faults) == 0 }) {
			t.Errorf("scenario %s is not in the table", s.Name)
		}
	}
	if some := only(all, []string{"none"}); len(some) == 0 || slices.ContainsFunc(some, func(c Cell) bool { return len(c.Faults) > 0 }) {
		t.Errorf("without a fault: %v", some)
	}
}

// The page adds up, names what was violated, and says what did not run.
func TestPage(t *testing.T) {
	of := []Cell{{Scenario: "ip-reuse", Evidence: "lease"}, {Scenario: "ip-reuse", Evidence: "lease", Faults: []string{"loss"}}, {Scenario: "ip-reuse", Evidence: "classic"}}
	held := &check.Result{Reuses: 100, Attempts: check.Counts{Legitimate: 10, Impostor: 7}, Admitted: check.Counts{Legitimate: 9}, Availability: check.Availability{Attempts: 4000, Failed: 4}, Run: check.Run{Complete: true}, Verdict: check.Held}
	broken := &check.Result{Run: check.Run{Complete: true}, Reuses: 5, Attempts: check.Counts{Impostor: 3}, Admitted: check.Counts{Impostor: 2}, ViolationCount: map[check.Invariant]uint64{check.Safety: 2}, StaleWindowMS: 40, Verdict: check.Violated}
	text, failed := page(of, [][]*check.Result{{held, held, held}, nil, {broken}}, false, "binary 1")
	for _, want := range []string{"| 300 | 0 of 21 | 27 of 30 | 99.900 % of 12000 |", "| all | | 5 | 2 of 3 |", "held, < 0.01", "no run came to its end", "(binary 1)", "| 2 of 3 |", "**I1: 2**; taken for another for up to 40 ms"} {
		if !strings.Contains(text, want) {
			t.Errorf("want %q in\n%s", want, text)
		}
	}
	if failed != 0 {
		t.Errorf("a violation of classic counts as a failure")
	}
	blind := []Cell{{Scenario: "ip-reuse", Evidence: "classic", Faults: []string{"partition"}, Events: 200}}
	if text, failed := page(blind, [][]*check.Result{{broken, held, held}}, false, "binary 1"); failed != 1 || !strings.Contains(text, "in 1 of 3 seeds") {
		t.Errorf("a harness that sees one of three: %d failed\n%s", failed, text)
	}
	if _, failed := page(blind, [][]*check.Result{{broken, broken, held}}, false, "binary 1"); failed != 0 {
		t.Errorf("%d failed though most seeds violated", failed)
	}
	of[0].Evidence = "svid"
	if _, failed := page(of[:1], [][]*check.Result{{held, broken}}, false, "binary 1"); failed != 1 {
		t.Errorf("%d runs failed, want 1", failed)
	}
}

// The page of what was found has commands that can be run, and both outcomes.
func TestFound(t *testing.T) {
	text, err := os.ReadFile("../../docs/chaos-found.md")
	if err != nil {
		t.Fatal(err)
	}
	all, err := readFound(string(text))
	if err != nil {
		t.Fatal(err)
	}
	wants := map[string]int{}
	for _, f := range all {
		wants[f.want]++
		if !slices.Contains(f.args, "--seed") || !slices.Contains(f.args, "--evidence") {
			t.Errorf("%v: it does not say its seed or its evidence", f.args)
		}
		if classic := slices.Contains(f.args, "classic"); classic != (f.want == check.Violated) {
			t.Errorf("%v: %s is expected", f.args, f.want)
		}
	}
	if wants[check.Held] == 0 || wants[check.Violated] == 0 {
		t.Errorf("%v", wants)
	}
	for _, bad := range []string{"", "```\n```", "```\nportcullis chaos run mixed\n```", "```\nportcullis chaos run mixed # fine\n```", "```\nrm -rf / # held\n```"} {
		if all, err := readFound(bad); err == nil {
			t.Errorf("%q: %v", bad, all)
		}
	}
}
