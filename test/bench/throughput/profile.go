package main

import (
	"fmt"
	"os"
	"path/filepath"
	"time"

	"github.com/cilium/ebpf"
	"golang.org/x/sys/unix"
)

// program is what the kernel says of one program.
type program struct {
	Name   string  `json:"name"`
	PerOp  float64 `json:"runs_per_operation"`
	NSPer  float64 `json:"ns_per_run"`
	NSOver float64 `json:"ns_per_operation"`
}

var programs = []string{"from_workload", "to_workload"}

type runs struct {
	count uint64
	time  time.Duration
}

// profile runs some slices more, with statistics of the programs on.
func (f *fixture) profile(o options, x *flow, c clocks) ([]program, error) {
	off, err := ebpf.EnableStats(unix.BPF_STATS_RUN_TIME)
	if err != nil {
		return nil, fmt.Errorf("switch on the statistics of programs: %w", err)
	}
	defer off.Close()
	before, err := f.runs()
	if err != nil {
		return nil, err
	}
	var sum sample
	for range profileSlices {
		s, err := f.slice(o, x, c)
		if err != nil {
			return nil, err
		}
		sum.add(s)
	}
	after, err := f.runs()
	if err != nil {
		return nil, err
	}
	var out []program
	for _, name := range programs {
		n, d := after[name].count-before[name].count, after[name].time-before[name].time
		p := program{Name: name, PerOp: float64(n) / float64(sum.sent)}
		if n > 0 {
			p.NSPer = float64(d) / float64(n)
		}
		p.NSOver = p.PerOp * p.NSPer
		out = append(out, p)
	}
	return out, nil
}

// runs adds up the programs of all nodes.
func (f *fixture) runs() (map[string]runs, error) {
	out := map[string]runs{}
	for _, dir := range f.pins {
		for _, name := range programs {
			path := filepath.Join(dir, "progs", name)
			if _, err := os.Stat(path); err != nil {
				return nil, err
			}
			p, err := ebpf.LoadPinnedProgram(path, nil)
			if err != nil {
				return nil, fmt.Errorf("program %s: %w", path, err)
			}
			s, err := p.Stats()
			p.Close()
			if err != nil {
				return nil, fmt.Errorf("statistics of %s: %w", path, err)
			}
			r := out[name]
			out[name] = runs{r.count + s.RunCount, r.time + s.Runtime}
		}
	}
	return out, nil
}
