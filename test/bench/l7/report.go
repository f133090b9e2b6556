package main

import (
	"fmt"
	"slices"
	"strings"
)

// The targets: of the rate of direct, with kept connections, and of its p99 at
// the same pace.
const (
	target, floor = 0.5, 0.35
	targetP99     = 1.5
)

// spread of the rounds.
type spread struct {
	Median float64 `json:"median"`
	Min    float64 `json:"min"`
	Max    float64 `json:"max"`
}

func spreadOf(x []float64) spread {
	slices.Sort(x)
	return spread{Median: x[len(x)/2], Min: x[0], Max: x[len(x)-1]}
}

func (s spread) String() string { return fmt.Sprintf("%.2f (%.2f to %.2f)", s.Median, s.Min, s.Max) }

// ofWay is what one way did.
type ofWay struct {
	Way      string `json:"way"`
	Rate     spread `json:"per_s"`
	Ratio    spread `json:"ratio"`     // to direct's rate
	P50      spread `json:"p50_us"`    // of the rounds
	P99      spread `json:"p99_us"`    // of the rounds
	P99Ratio spread `json:"p99_ratio"` // to direct's
	CPU      spread `json:"cpu_us"`    // of the proxy, per request
	Ends     spread `json:"ends_us"`   // CPU of client and server, per request
	CPURatio spread `json:"cpu_ratio"` // direct's CPU of all by that of this way: reads as Ratio does
	Agents   spread `json:"agents_us"` // CPU of all agents, per request
	Failed   int    `json:"failed"`
}

// result is of one load on one path.
type result struct {
	Load       string  `json:"load"`
	Path       string  `json:"path"`
	Rate       float64 `json:"rate,omitempty"` // asked for, of paced
	Rounds     int     `json:"rounds"`
	Ways       []ofWay `json:"ways"`
	LoadBefore string  `json:"load_averages_before"` // of 1, 5, 15 minutes
	LoadAfter  string  `json:"load_averages_after"`

	rounds map[string][]sample
}

func (r *result) summarize(ways []way) {
	direct := r.rounds[ways[0].name]
	for _, w := range ways {
		var rate, ratio, p50, p99, p99Ratio, cpu, agents, ends, cpuRatio []float64
		x := ofWay{Way: w.name}
		for i, s := range r.rounds[w.name] {
			rate, ratio = append(rate, s.rate()), append(ratio, s.rate()/direct[i].rate())
			p50, p99, p99Ratio = append(p50, s.P50), append(p99, s.P99), append(p99Ratio, s.P99/direct[i].P99)
			cpu, agents = append(cpu, 1e6*s.proxy/float64(s.Requests)), append(agents, 1e6*s.agents/float64(s.Requests))
			ends, cpuRatio = append(ends, 1e6*s.ends/float64(s.Requests)), append(cpuRatio, direct[i].cpu()/s.cpu())
			x.Failed += s.Failed
		}
		x.Rate, x.Ratio, x.P50, x.P99, x.P99Ratio = spreadOf(rate), spreadOf(ratio), spreadOf(p50), spreadOf(p99), spreadOf(p99Ratio)
		x.CPU, x.Agents, x.Ends, x.CPURatio = spreadOf(cpu), spreadOf(agents), spreadOf(ends), spreadOf(cpuRatio)
		r.Ways = append(r.Ways, x)
	}
}

func (r *result) String() string {
	var b strings.Builder
	fmt.Fprintf(&b, "%s, path %s: %d rounds, load averages %s before, %s after\n", r.Load, r.Path, r.Rounds, r.LoadBefore, r.LoadAfter)
	if r.Rate > 0 {
		fmt.Fprintf(&b, "  %.0f requests a second asked for\n", r.Rate)
	}
	fmt.Fprintf(&b, "  %-11s %7s  %-20s  %-20s %7s %7s  %-20s %6s %6s %6s %6s\n", "", "per s", "of direct", "by CPU", "p50 us", "p99 us", "p99 by direct's", "proxy", "ends", "agents", "failed")
	for _, w := range r.Ways {
		fmt.Fprintf(&b, "  %-11s %7.0f  %-20v  %-20v %7.0f %7.0f  %-20v %6.1f %6.1f %6.1f %6d\n", w.Way, w.Rate.Median, w.Ratio, w.CPURatio, w.P50.Median, w.P99.Median,
			w.P99Ratio, w.CPU.Median, w.Ends.Median, w.Agents.Median, w.Failed)
	}
	if len(r.Ways) > 1 {
		own := r.Ways[1]
		switch r.Load {
		case "keep":
			fmt.Fprintf(&b, "  target %.2f of direct's rate (at least %.2f): %s\n", target, floor, reached(own.Ratio.Median >= target))
		case "paced":
			fmt.Fprintf(&b, "  target p99 %.1f times direct's: %s\n", targetP99, reached(own.P99Ratio.Median <= targetP99))
		}
	}
	return b.String()
}

func reached(yes bool) string {
	if yes {
		return "reached"
	}
	return "MISSED"
}

type requestReport struct {
	Machine    string    `json:"machine"`
	Others     []string  `json:"others"`
	LoadBefore string    `json:"load_averages_before"`
	LoadAfter  string    `json:"load_averages_after"`
	Results    []*result `json:"results"`
}

func (r *requestReport) String() string {
	var b strings.Builder
	fmt.Fprintf(&b, "%s\n%s\nload averages %s before, %s after (1, 5, 15 minutes)\n\n", r.Machine, strings.Join(r.Others, "; "), r.LoadBefore, r.LoadAfter)
	for _, x := range r.Results {
		fmt.Fprintf(&b, "%v\n", x)
	}
	return b.String()
}

// problem is what has nothing to do with time.
func (r *requestReport) problem() error {
	for _, x := range r.Results {
		for _, w := range x.Ways {
			if w.Way == "portcullis" && w.Failed > 0 {
				return fmt.Errorf("%s, path %s: %d requests through the proxy failed", x.Load, x.Path, w.Failed)
			}
		}
	}
	return nil
}
