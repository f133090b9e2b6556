package tools

import (
	"fmt"
	"slices"
	"strings"
)

// Changes are the cells in which two matrices differ.
type Changes struct {
	Changes []Change `json:"changes"`
	// Pairs are how many cells were compared.
	Pairs int `json:"pairs"`
	// New and Gone are the workloads that only one of them has.
	New  []string `json:"new_workloads"`
	Gone []string `json:"gone_workloads"`
}

// Change is one cell.
type Change struct {
	Port   string `json:"port"`
	From   string `json:"from"`
	To     string `json:"to"`
	Before string `json:"before"` // a word, as in Trace.Verdict
	After  string `json:"after"`
	// Side is whose policies changed it: "egress", "ingress" or "both".
	Side   string `json:"side"`
	Was    string `json:"was"` // why it was so
	Reason string `json:"reason"`
}

// Compare returns what changes between two matrices of the same ports, which
// were made with reasons.
func Compare(before, after *Matrix) Changes {
	c := Changes{Changes: []Change{}, New: []string{}, Gone: []string{}}
	c.New, c.Gone = append(c.New, missing(after.Workloads, before.Workloads)...), append(c.Gone, missing(before.Workloads, after.Workloads)...)
	for _, port := range after.order {
		b, a := before.Ports[port], after.Ports[port]
		if b == nil {
			continue
		}
		for i, from := range after.Workloads {
			k := slices.Index(before.Workloads, from)
			if k < 0 {
				continue
			}
			for x, to := range after.Workloads {
				if y := slices.Index(before.Workloads, to); y >= 0 {
					c.pair(before, after, port, from, to, [2][2]int{{k, y}, {i, x}})
				}
			}
			for x, to := range after.Externals {
				if y := slices.Index(before.Externals, to); y >= 0 {
					c.one(before, after, port, from, to, viewTo, "egress", [2]byte{b.ToExternal[k][y], a.ToExternal[i][x]},
						[2]int{k*len(before.Externals) + y, i*len(after.Externals) + x})
				}
			}
		}
		for x, from := range after.Externals {
			y := slices.Index(before.Externals, from)
			for i, to := range after.Workloads {
				if k := slices.Index(before.Workloads, to); k >= 0 && y >= 0 {
					c.one(before, after, port, from, to, viewFrom, "ingress", [2]byte{b.FromExternal[y][k], a.FromExternal[x][i]},
						[2]int{y*len(before.Workloads) + k, x*len(after.Workloads) + i})
				}
			}
		}
	}
	return c
}

func missing(of, in []string) (out []string) {
	for _, x := range of {
		if !slices.Contains(in, x) {
			out = append(out, x)
		}
	}
	return out
}

// reasonAt returns why a cell is as it is.
func (m *Matrix) reasonAt(port string, view, index int) string {
	return m.reasons[m.Ports[port].why[view][index]].Text
}

// pair compares a cell between two workloads: at is row and column, before and
// after.
func (c *Changes) pair(before, after *Matrix, port, from, to string, at [2][2]int) {
	c.Pairs++
	b, a := before.Ports[port], after.Ports[port]
	cell := func(rows []string, at [2]int) byte { return rows[at[0]][at[1]] }
	was, is := cell(b.Combined, at[0]), cell(a.Combined, at[1])
	if was == is {
		return
	}
	ch := Change{Port: port, From: from, To: to, Before: verdictWords[was], After: verdictWords[is]}
	index := [2]int{at[0][0]*len(before.Workloads) + at[0][1], at[1][0]*len(after.Workloads) + at[1][1]}
	egress, ingress := cell(b.Egress, at[0]) != cell(a.Egress, at[1]), cell(b.Ingress, at[0]) != cell(a.Ingress, at[1])
	var was1, now []string
	for _, s := range []struct {
		changed bool
		view    int
		name    string
	}{{egress, viewEgress, "egress"}, {ingress, viewIngress, "ingress"}} {
		if s.changed {
			was1 = append(was1, s.name+": "+before.reasonAt(port, s.view, index[0]))
			now = append(now, s.name+": "+after.reasonAt(port, s.view, index[1]))
			ch.Side = s.name
		}
	}
	if egress && ingress {
		ch.Side = "both"
	}
	ch.Was, ch.Reason = strings.Join(was1, "; "), strings.Join(now, "; ")
	c.Changes = append(c.Changes, ch)
}

// one compares a cell that has one side.
func (c *Changes) one(before, after *Matrix, port, from, to string, view int, side string, cell [2]byte, index [2]int) {
	c.Pairs++
	if cell[0] == cell[1] {
		return
	}
	c.Changes = append(c.Changes, Change{Port: port, From: from, To: to, Before: verdictWords[cell[0]], After: verdictWords[cell[1]], Side: side,
		Was: side + ": " + before.reasonAt(port, view, index[0]), Reason: side + ": " + after.reasonAt(port, view, index[1])})
}

// Text returns the changes in words.
func (c Changes) Text() string {
	var b strings.Builder
	opened, closed := 0, 0
	port := ""
	for _, x := range c.Changes {
		if x.Port != port {
			port = x.Port
			fmt.Fprintf(&b, "%s\n", port)
		}
		switch {
		case x.After == verdictWords[Blocked]:
			closed++
		case x.Before == verdictWords[Blocked]:
			opened++
		}
		fmt.Fprintf(&b, "  %s -> %s: %s, was %s\n      was  %s\n      now  %s\n", visible(x.From), visible(x.To), x.After, x.Before, visible(x.Was), visible(x.Reason))
	}
	if len(c.New) > 0 {
		fmt.Fprintf(&b, "new workloads, not compared: %s\n", visible(list(c.New)))
	}
	if len(c.Gone) > 0 {
		fmt.Fprintf(&b, "workloads that are gone: %s\n", visible(list(c.Gone)))
	}
	fmt.Fprintf(&b, "%d of %d pairs change: %d are blocked now, %d are no more\n", len(c.Changes), c.Pairs, closed, opened)
	return b.String()
}
