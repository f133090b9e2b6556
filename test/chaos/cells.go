package main

import (
	"fmt"
	"slices"
	"strings"

	"portcullis/chaos/fault"
)

// Cell is one place in the table.
type Cell struct {
	Scenario string
	Faults   []string
	Evidence string
	Events   int // reuses, at least
	Parallel int // IPs that change hands side by side; 0: as the scenario has it
	Waits    bool
}

// chunk is how many reuses one run of a long cell has.
const chunk = 500

func (c Cell) name() string {
	return strings.Join(append([]string{c.Scenario, c.Evidence}, c.Faults...), "_")
}

// seeds is how many seeds show that the harness can see what goes wrong.
const seeds = 6

// mustViolate tells of the cell that proves that: what is believed until somebody
// says otherwise, while nobody can.
func (c Cell) mustViolate() bool {
	return c.Evidence == "classic" && slices.Equal(c.Faults, []string{"partition"})
}

// hopeless tells of a cell in which nobody ever comes up: what classic believes of
// every workload everywhere does not fit into tables that are full.
func (c Cell) hopeless() bool {
	return c.Evidence == "classic" && slices.Contains(c.Faults, "maps-full")
}

// runs are how often the cell is run, and with how many reuses each time.
func (c Cell) runs() (n, events int) {
	if c.mustViolate() && c.Events <= chunk {
		return seeds, (c.Events + seeds - 1) / seeds
	}
	if c.Events <= chunk {
		return 1, c.Events
	}
	return (c.Events + chunk - 1) / chunk, chunk
}

// combined are faults that are at work at once.
var combined = [][]string{
	{"partition", "kill-verifier"},
	{"delay", "loss", "upgrade-owner"},
	{"partition-one-way", "maps-full"},
	{"kill-owner", "workload-api-gone", "stop-short"},
}

// cells are those of the short table: every fault alone, some combined, every
// scenario without a fault.
func cells(evidence []string) (out []Cell) {
	var of []Cell
	of = append(of, Cell{Scenario: "ip-reuse", Events: 200})
	for _, s := range []string{"relabel", "storm", "late", "upgrade", "owner-restart", "mixed"} {
		of = append(of, Cell{Scenario: s, Events: 200})
	}
	for _, k := range fault.Kinds() {
		c := Cell{Scenario: "ip-reuse", Faults: []string{k.Name}, Events: 200, Parallel: 24, Waits: k.Waits}
		if k.Waits {
			c.Events = 20
		}
		if k.Name == "partition" {
			c.Parallel = 100
		}
		of = append(of, c)
	}
	for _, f := range combined {
		of = append(of, Cell{Scenario: "mixed", Faults: f, Events: 200, Parallel: 24})
	}
	for _, c := range of {
		for _, e := range evidence {
			c := c
			if c.Evidence = e; c.hopeless() {
				continue
			}
			if c.mustViolate() {
				c.Parallel = 24 // a hundred side by side are so slow on small machines that few IPs change hands within the fault
			}
			out = append(out, c)
		}
	}
	return out
}

// longCells are the plain and the partition cell, with many reuses.
func longCells(evidence []string) (out []Cell) {
	for _, faults := range [][]string{nil, {"partition"}} {
		for _, e := range evidence {
			out = append(out, Cell{Scenario: "ip-reuse", Faults: faults, Evidence: e, Events: 5000, Parallel: 24})
		}
	}
	return out
}

// only keeps the cells that have one of the faults ("none": cells without).
func only(cells []Cell, faults []string) []Cell {
	if len(faults) == 0 {
		return cells
	}
	return slices.DeleteFunc(cells, func(c Cell) bool {
		if len(c.Faults) == 0 {
			return !slices.Contains(faults, "none")
		}
		return !slices.ContainsFunc(c.Faults, func(f string) bool { return slices.Contains(faults, f) })
	})
}

func (c Cell) String() string {
	faults := strings.Join(c.Faults, ", ")
	if faults == "" {
		faults = "no fault"
	}
	return fmt.Sprintf("%s, %s, evidence %s", c.Scenario, faults, c.Evidence)
}
