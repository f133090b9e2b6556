package tools

import (
	"portcullis/bpf/abi"
)

// Matrix is who may call whom, at each of some ports.
type Matrix struct {
	Workloads []string          `json:"workloads"` // "ns/name"
	Externals []string          `json:"externals"`
	Ports     map[string]*Table `json:"ports"` // by Port.String

	order   []string // of the ports
	reasons []Reason // none unless they were asked for; 0: none
}

// Table is a Matrix at one port. Rows are sources, columns are destinations, one
// character for each. FromExternal has a row for each external, ToExternal a
// column.
type Table struct {
	Ingress      []string `json:"ingress"` // by the destination's policies alone
	Egress       []string `json:"egress"`  // by the source's alone
	Combined     []string `json:"combined"`
	FromExternal []string `json:"from_external"`
	ToExternal   []string `json:"to_external"`

	why [views][]uint32 // by row and column; nil unless asked for
}

// The views of a table that have reasons of their own.
const (
	viewIngress = iota
	viewEgress
	viewFrom
	viewTo
	views
)

// MatrixOptions are what a matrix is asked for.
type MatrixOptions struct {
	Ports     []Port
	Externals []Party
	// Reasons: keep why each cell is as it is.
	Reasons bool
	// Progress, if not nil, is told after each port how many are done.
	Progress func(done int)
}

// Matrix judges every pair of workloads, and every workload with every
// external.
func (j *Judge) Matrix(o MatrixOptions) *Matrix {
	m := &Matrix{Workloads: make([]string, len(j.world.Workloads)), Externals: make([]string, len(o.Externals)), Ports: map[string]*Table{}}
	parties := make([]Party, len(j.world.Workloads))
	for i := range parties {
		parties[i] = j.world.WorkloadParty(i)
		m.Workloads[i] = parties[i].Title
	}
	for i, x := range o.Externals {
		m.Externals[i] = x.Title
	}
	for n, port := range o.Ports {
		g := &grid{Judge: j, port: port, reasons: o.Reasons, seen: map[[2]uint32]cell{}}
		t := &Table{}
		t.Ingress, t.why[viewIngress] = g.rows(parties, parties, abi.DirIngress)
		t.Egress, t.why[viewEgress] = g.rows(parties, parties, abi.DirEgress)
		t.FromExternal, t.why[viewFrom] = g.rows(o.Externals, parties, abi.DirIngress)
		t.ToExternal, t.why[viewTo] = g.rows(parties, o.Externals, abi.DirEgress)
		t.Combined = make([]string, len(parties))
		row := make([]byte, len(parties))
		for i := range parties {
			for k := range parties {
				row[k] = both(t.Egress[i][k], t.Ingress[i][k])
			}
			t.Combined[i] = string(row)
		}
		m.Ports[port.String()] = t
		m.order = append(m.order, port.String())
		if o.Progress != nil {
			o.Progress(n + 1)
		}
	}
	m.reasons = j.reasons
	return m
}

// cell is what one side says.
type cell struct {
	char byte
	why  uint32
}

// grid judges one port. What policies do not tell apart is judged once.
type grid struct {
	*Judge
	port    Port
	reasons bool
	seen    map[[2]uint32]cell // of one direction, by subject and peer
}

func (g *grid) rows(from, to []Party, dir abi.Direction) ([]string, []uint32) {
	clear(g.seen)
	out := make([]string, len(from))
	var why []uint32
	if g.reasons {
		why = make([]uint32, 0, len(from)*len(to))
	}
	row := make([]byte, len(to))
	for i, a := range from {
		for k, b := range to {
			c := g.side(a, b, dir)
			row[k] = c.char
			if g.reasons {
				why = append(why, c.why)
			}
		}
		out[i] = string(row)
	}
	return out, why
}

// side judges a flow by the policies of the source (egress) or the destination
// (ingress) alone.
func (j *Judge) side(from, to Party, dir abi.Direction, port Port, known map[[2]uint32]cell, reasons bool) cell {
	own, other := from, to
	if dir == abi.DirIngress {
		own, other = to, from
	}
	if own.Workload < 0 || j.world.Workloads[own.Workload].Peer {
		return cell{char: NotJudged}
	}
	number, ok := port.at(j.called(to))
	if !ok {
		return cell{char: NotJudged}
	}
	s := j.subject(own.Workload)
	worst := cell{}
	for _, n := range j.numbersFor(own.Workload, other, j.six(from, to, port.Proto)) {
		key := [2]uint32{uint32(s.index), uint32(n)}
		c, ok := known[key]
		if !ok {
			d := j.decide(s, dir, n, port.Proto, number)
			c.char = character(d)
			if reasons {
				c.why = j.why(s, dir, d)
			}
			if known != nil {
				known[key] = c
			}
		}
		if worst.char == 0 || both(c.char, worst.char) == c.char {
			worst = c
		}
	}
	return worst
}

func (g *grid) side(from, to Party, dir abi.Direction) cell {
	known := g.seen
	if g.port.Name != "" {
		known = nil // its number differs from workload to workload
	}
	return g.Judge.side(from, to, dir, g.port, known, g.reasons)
}

// called returns the workload that is called; nil: it is none.
func (j *Judge) called(to Party) *Workload {
	if to.Workload < 0 {
		return nil
	}
	return &j.world.Workloads[to.Workload]
}
