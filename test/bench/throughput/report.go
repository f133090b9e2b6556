package main

import (
	"fmt"
	"slices"
	"strings"
)

// noisy is the spread of the rates without programs from which on the CPU is
// the number to read.
const noisy = 0.10

type pair struct{ with, without sample }

// spread of the pairs.
type spread struct {
	Median float64 `json:"median"`
	Min    float64 `json:"min"`
	Max    float64 `json:"max"`
}

func spreadOf(x []float64) spread {
	slices.Sort(x)
	return spread{Median: x[len(x)/2], Min: x[0], Max: x[len(x)-1]}
}

// relative is how far the extremes lie apart, by the median.
func (s spread) relative() float64 { return (s.Max - s.Min) / s.Median }

func (s spread) String() string { return fmt.Sprintf("%.3f (%.3f to %.3f)", s.Median, s.Min, s.Max) }

type result struct {
	Traffic     string    `json:"traffic"`
	Path        string    `json:"path"`
	Unit        string    `json:"unit"`
	Pairs       int       `json:"pairs"`
	With        spread    `json:"with_per_s"`
	Without     spread    `json:"without_per_s"`
	Ratio       spread    `json:"ratio"`
	CPUWith     spread    `json:"cpu_with_ns"` // per operation
	CPUWithout  spread    `json:"cpu_without_ns"`
	CPURatio    spread    `json:"cpu_ratio"`            // without/with, so that it reads as Ratio does
	AgentsCPU   spread    `json:"agents_cpu_ns"`        // of all agents, per operation, with programs
	Lost        float64   `json:"lost"`                 // part of what was sent, with programs, that did not arrive
	LostWithout float64   `json:"lost_without"`         // the same without
	Noise       float64   `json:"spread_without"`       // (max - min) / median of the rates without programs
	Read        string    `json:"read"`                 // "ratio" or "cpu_ratio": see noisy
	Target      float64   `json:"target"`               // for the median of Read
	Drops       uint64    `json:"dropped_by_programs"`  // by any program of the lab
	Programs    []program `json:"programs"`             // with statistics on
	LoadBefore  string    `json:"load_averages_before"` // of 1, 5, 15 minutes
	LoadAfter   string    `json:"load_averages_after"`
	pairs       []pair
}

func (r *result) summarize() {
	var with, without, ratio, cpuWith, cpuWithout, cpuRatio, agents []float64
	var sumWith, sumWithout sample
	for _, p := range r.pairs {
		with, without, ratio = append(with, p.with.rate()), append(without, p.without.rate()), append(ratio, p.with.rate()/p.without.rate())
		cpuWith, cpuWithout, cpuRatio = append(cpuWith, p.with.cpu()), append(cpuWithout, p.without.cpu()), append(cpuRatio, p.without.cpu()/p.with.cpu())
		agents = append(agents, p.with.agentsCPU())
		sumWith.add(p.with)
		sumWithout.add(p.without)
	}
	r.Pairs = len(r.pairs)
	r.With, r.Without, r.Ratio = spreadOf(with), spreadOf(without), spreadOf(ratio)
	r.CPUWith, r.CPUWithout, r.CPURatio = spreadOf(cpuWith), spreadOf(cpuWithout), spreadOf(cpuRatio)
	r.AgentsCPU = spreadOf(agents)
	r.Lost = 1 - float64(sumWith.received)/float64(sumWith.sent)
	r.LostWithout = 1 - float64(sumWithout.received)/float64(sumWithout.sent)
	r.Noise, r.Read = r.Without.relative(), "ratio"
	if r.Noise > noisy {
		r.Read = "cpu_ratio"
	}
}

// counts is the ratio to read.
func (r *result) counts() spread {
	if r.Read == "ratio" {
		return r.Ratio
	}
	return r.CPURatio
}

func (r *result) String() string {
	scale, unit, cpuScale, cpuUnit := 1.0, r.Unit+"/s", 1.0, "ns per "+strings.TrimSuffix(r.Unit, "s")
	if r.Unit == "bytes" {
		scale, unit, cpuScale, cpuUnit = 1e-9, "GB/s", 1<<20/1e3, "us per MiB"
	}
	num := func(s spread, by float64) string {
		return fmt.Sprintf("%.5g (%.5g to %.5g)", s.Median*by, s.Min*by, s.Max*by)
	}
	var b strings.Builder
	fmt.Fprintf(&b, "%s, path %s: %d pairs, load averages %s before, %s after\n", r.Traffic, r.Path, r.Pairs, r.LoadBefore, r.LoadAfter)
	fmt.Fprintf(&b, "  rate   with %s   without %s %s\n", num(r.With, scale), num(r.Without, scale), unit)
	fmt.Fprintf(&b, "         ratio %v   spread without programs %.0f %%\n", r.Ratio, 100*r.Noise)
	fmt.Fprintf(&b, "  cpu    with %s   without %s %s\n", num(r.CPUWith, cpuScale), num(r.CPUWithout, cpuScale), cpuUnit)
	fmt.Fprintf(&b, "         without/with %v   agents besides: %s\n", r.CPURatio, num(r.AgentsCPU, cpuScale))
	fmt.Fprintf(&b, "  lost   with %.4f   without %.4f   dropped by programs %d\n", r.Lost, r.LostWithout, r.Drops)
	for _, p := range r.Programs {
		if r.Unit == "bytes" {
			fmt.Fprintf(&b, "  %-14s %.2f runs per MiB x %.0f ns\n", p.Name, p.PerOp*(1<<20), p.NSPer)
			continue
		}
		fmt.Fprintf(&b, "  %-14s %.2f runs x %.0f ns = %.0f %s\n", p.Name, p.PerOp, p.NSPer, p.NSOver, cpuUnit)
	}
	verdict := "reached"
	if r.counts().Median < r.Target {
		verdict = "MISSED"
	}
	fmt.Fprintf(&b, "  target %.2f %s by %s: %.3f\n", r.Target, verdict, r.Read, r.counts().Median)
	return b.String()
}

type report struct {
	Machine    string    `json:"machine"`
	LoadBefore string    `json:"load_averages_before"`
	LoadAfter  string    `json:"load_averages_after"`
	Results    []*result `json:"results"`
}

func (r *report) String() string {
	var b strings.Builder
	fmt.Fprintf(&b, "%s\nload averages %s before, %s after (1, 5, 15 minutes)\n\n", r.Machine, r.LoadBefore, r.LoadAfter)
	for _, x := range r.Results {
		fmt.Fprintf(&b, "%v\n", x)
	}
	return b.String()
}
