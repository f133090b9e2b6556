package main

import (
	"fmt"
	"maps"
	"runtime"
	"slices"
	"strings"

	"golang.org/x/sys/unix"

	"portcullis/chaos/check"
)

// sums are the results of a cell's runs, added up. Durations are the worst.
type sums struct {
	runs, reuses           uint64
	attempts, admitted     check.Counts
	excused                uint64
	open, failed           uint64 // attempts with nothing in their way
	first, wait            check.Quantiles
	stale                  float64
	violated, violatedRuns uint64
	incomplete             uint64 // runs
	by                     map[check.Invariant]uint64
}

func sum(results []*check.Result) (s sums) {
	s.by = map[check.Invariant]uint64{}
	worst := func(to *check.Quantiles, q check.Quantiles) {
		to.N += q.N
		to.P50, to.P99, to.Max = max(to.P50, q.P50), max(to.P99, q.P99), max(to.Max, q.Max)
	}
	for _, r := range results {
		s.runs++
		s.reuses += r.Reuses
		s.attempts.Legitimate += r.Attempts.Legitimate
		s.attempts.Impostor += r.Attempts.Impostor
		s.admitted.Legitimate += r.Admitted.Legitimate
		s.admitted.Impostor += r.Admitted.Impostor
		s.excused += r.Excused
		s.open += r.Availability.Attempts
		s.failed += r.Availability.Failed
		worst(&s.first, r.FirstContactMS)
		worst(&s.wait, r.ReuseDelayMS)
		s.stale = max(s.stale, r.StaleWindowMS)
		for i, n := range r.ViolationCount {
			s.violated += n
			s.by[i] += n
		}
		if r.Verdict == check.Violated {
			s.violatedRuns++
		}
		if !r.Complete {
			s.incomplete++
		}
	}
	return s
}

func verdict(results []*check.Result) string {
	s := sum(results)
	text := fmt.Sprintf("%d reuses, %d of %d impostors' attempts admitted", s.reuses, s.admitted.Impostor, s.attempts.Impostor)
	if s.violated == 0 {
		return "held: " + text
	}
	return fmt.Sprintf("VIOLATED (%s): %s", s.invariants(), text)
}

func (s sums) invariants() string {
	var out []string
	for _, i := range slices.Sorted(maps.Keys(s.by)) {
		out = append(out, fmt.Sprintf("%s: %d", i, s.by[i]))
	}
	return strings.Join(out, ", ")
}

func (s sums) outcome() string {
	switch {
	case s.violated > 0:
		return "**" + s.invariants() + "**"
	case s.reuses > 0:
		return fmt.Sprintf("held, < %.2g", min(1, 3/float64(s.reuses)))
	}
	return "held"
}

func (s sums) availability() string {
	if s.open == 0 {
		return "-"
	}
	few := ""
	if s.open < 3000 {
		few = " (few)"
	}
	return fmt.Sprintf("%.3f %% of %d%s", 100*(1-float64(s.failed)/float64(s.open)), s.open, few)
}

// page is docs/chaos-results.md. failed counts the runs that violated, of those
// that must not, and the cells that did not where they must.
// build names what was judged.
func page(cells []Cell, results [][]*check.Result, long bool, build string) (text string, failed uint64) {
	var b strings.Builder
	command := "make chaos"
	if long {
		command = "make chaos-long"
	}
	fmt.Fprintf(&b, "# What chaos runs came to\n\nMade by `%s` (%s), on Linux %s, %d processors. What is run, and how it is judged: [chaos.md](chaos.md).\n\n", command, build, release(), runtime.NumCPU())
	b.WriteString(`Each row is one run of the lab (three agents, real packets) or several. *Impostors* are attempts that no policy allows, by who truly
tried: admitted must be 0. *Legitimate* attempts may fail while a fault stands in their way; *reachable* counts those with nothing
in their way, and a row with few of them (less than 3000) says little alone: their sum is in the last row. Times are p50 / p99 in milliseconds: of the first answer between two workloads, and from a registration on a used IP
until the workload is active. *Held* comes with the 95 % upper bound of violations by reuse (3/n); else the invariants that were violated, and how often.
Evidence classic is the cache that is believed until it hears otherwise, beside them so that one sees that the harness can see; with maps-full
it is not run, for what it believes of all workloads does not fit, and nobody ever comes up.
`)
	if runtime.NumCPU() <= 2 {
		b.WriteString("With so few processors the harness takes its part of them; times are those of a busy machine.\n")
	}
	for _, evidence := range order(cells) {
		fmt.Fprintf(&b, "\n## Evidence %s\n\n| scenario | faults | reuses | impostors | legitimate | reachable | first contact | wait for an IP | outcome |\n|---|---|--:|--:|--:|--:|--:|--:|---|\n", evidence)
		var of []*check.Result
		for i, c := range cells {
			if c.Evidence != evidence {
				continue
			}
			of = append(of, results[i]...)
			faults := strings.Join(c.Faults, ", ")
			if faults == "" {
				faults = "none"
			}
			if len(results[i]) == 0 {
				fmt.Fprintf(&b, "| %s | %s | | | | | | | no run came to its end |\n", c.Scenario, faults)
				continue
			}
			s := sum(results[i])
			if evidence != "classic" {
				failed += s.violatedRuns
			}
			outcome := s.outcome()
			if n, _ := c.runs(); len(results[i]) < n {
				outcome += fmt.Sprintf("; %d of %d runs came to no end", n-len(results[i]), n)
			}
			if s.incomplete > 0 {
				outcome += fmt.Sprintf("; %d of %d runs were not at their end", s.incomplete, s.runs)
			}
			if s.excused > 0 {
				outcome += fmt.Sprintf("; %d messages within the rogue's leases", s.excused)
			}
			if c.mustViolate() {
				outcome += fmt.Sprintf("; in %d of %d seeds", s.violatedRuns, s.runs)
				if s.violatedRuns*2 < s.runs { // a harness that does not see it proves nothing
					failed++
				}
			}
			if s.stale > 0 {
				outcome += fmt.Sprintf("; taken for another for up to %.0f ms", s.stale)
			}
			fmt.Fprintf(&b, "| %s | %s | %d | %d of %d | %d of %d | %s | %.1f / %.0f | %.0f / %.0f | %s |\n", c.Scenario, faults, s.reuses,
				s.admitted.Impostor, s.attempts.Impostor, s.admitted.Legitimate, s.attempts.Legitimate, s.availability(),
				s.first.P50, s.first.P99, s.wait.P50, s.wait.P99, outcome)
		}
		s := sum(of)
		fmt.Fprintf(&b, "| all | | %d | %d of %d | %d of %d | %s | | | %s |\n", s.reuses, s.admitted.Impostor, s.attempts.Impostor,
			s.admitted.Legitimate, s.attempts.Legitimate, s.availability(), s.outcome())
	}
	return b.String(), failed
}

func order(cells []Cell) (out []string) {
	for _, c := range cells {
		if !slices.Contains(out, c.Evidence) {
			out = append(out, c.Evidence)
		}
	}
	return out
}

func release() string {
	var u unix.Utsname
	if err := unix.Uname(&u); err != nil {
		return "of an unknown version"
	}
	version, _, _ := strings.Cut(unix.ByteSliceToString(u.Release[:]), "-")
	return version
}
