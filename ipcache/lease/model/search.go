package model

import (
	"fmt"
	"hash/maphash"
	"strings"
)

// Result is how a search ended.
type Result struct {
	Broken string   // the invariant that is broken; "" if none was found
	Trace  []string // of a broken one: what leads to it, one line for each action
	States int      // found
	Depth  int      // the longest of the shortest ways to them
	Whole  bool     // every state that can be reached was found
}

// String is one line, and the trace.
func (r Result) String() string {
	switch {
	case r.Broken != "":
		return fmt.Sprintf("broken after %d states: %s\n%s", r.States, r.Broken, strings.Join(r.Trace, "\n"))
	case r.Whole:
		return fmt.Sprintf("holds in the whole space: %d states, depth %d", r.States, r.Depth)
	}
	return fmt.Sprintf("holds as far as was searched: %d states, complete to depth %d", r.States, r.Depth)
}

// Explore visits the states that can be reached, breadth first, until one
// breaks an invariant or stop says so. stop gets the number of states found so
// far, every few thousand; nil: never.
func Explore(c Config, stop func(states int) bool) Result {
	if c.Owners == 2 {
		x := &pairStepper{one: stepper{Config: c}}
		first := pair{initial(c), initial(c)}
		return explore(&graph[pair]{expand: x.next, name: func() { x.one.named = true }, hash: x.fingerprint}, first, stop)
	}
	x := &stepper{Config: c}
	g := &graph[state]{expand: x.next, name: func() { x.named = true }, hash: x.fingerprint}
	if c.NeverStuck {
		g.admitted = func(s *state) bool {
			return s.owner.phase == Active && int(s.owner.holder) == c.Workloads-1 && s.peer[0].live(c.Workloads-1)
		}
	}
	return explore(g, initial(c), stop)
}

func explore[S comparable](g *graph[S], first S, stop func(states int) bool) Result {
	g.first, g.seed, g.table = first, maphash.MakeSeed(), make([]uint32, 1<<12)
	g.add(&first, 0)
	level, depth := []S{first}, 0
	var above []S
	for from := 0; len(level) > 0; depth++ {
		above = above[:0]
		for i := range level {
			if at := from + i; at&0xfff == 0 && stop != nil && stop(len(g.print)) {
				return Result{States: len(g.print), Depth: depth}
			}
			for _, n := range g.expand(&level[i]) {
				if n.broken != "" {
					return Result{Broken: n.broken, Trace: g.trace(uint32(from+i), n), States: len(g.print), Depth: depth}
				}
				to, fresh := g.add(&n.state, uint32(from+i))
				if fresh {
					above = append(above, n.state)
				}
				if g.admitted != nil {
					g.edges = append(g.edges, edge{uint32(from + i), to})
				}
			}
			if g.admitted != nil && g.admitted(&level[i]) {
				g.goal = append(g.goal, uint32(from+i))
			}
		}
		from += len(level)
		level, above = above, level
	}
	r := Result{States: len(g.print), Depth: depth - 1, Whole: true}
	if g.admitted != nil {
		if at, stuck := g.stuck(); stuck {
			r.Broken = "I3: the last workload can never be admitted again"
			r.Trace = g.trace(at, successorOf[S]{action: "stuck"})
		}
	}
	return r
}

func initial(c Config) state {
	s := state{owner: owner{up: 1, phase: Active, ended: never, gone: never, crashes: c.OwnerCrashes}}
	for w := range c.Workloads {
		s.owner.sent[w] = c.Flight + 1
	}
	for v := range c.Verifiers {
		p := &s.peer[v]
		p.up, p.refused = 1, never
		for w := range c.Workloads {
			p.lastLive[w] = c.Flight + 1
		}
		if v == 0 || !c.FirstAlone {
			p.breaks, p.crashes = c.StreamBreaks, c.VerifierCrashes
		}
	}
	x := stepper{Config: c}
	x.forget(&s)
	return s
}

// graph is what is kept of the states: a fingerprint of 64 bits and from which
// state each was found. Two states with one fingerprint count as one: for 10^8
// states the chance that there are any is about 3 in 10,000.
type graph[S comparable] struct {
	expand   func(*S) []successorOf[S]
	name     func() // from now on actions have names
	hash     func(maphash.Seed, *S) uint64
	admitted func(*S) bool // nil: NeverStuck is not asked for

	first S
	seed  maphash.Seed
	print []uint64
	from  []uint32
	table []uint32 // open addressing: index into print + 1
	edges []edge   // for NeverStuck
	goal  []uint32
}

type edge struct{ from, to uint32 }

// fingerprint is the same for two states that differ in which verifier is
// which.
func (c *Config) fingerprint(seed maphash.Seed, s *state) uint64 {
	h := maphash.Comparable(seed, s.owner)
	a := maphash.Comparable(seed, s.peer[0])
	if c.Verifiers == 1 {
		return h ^ a*0x9e3779b97f4a7c15
	}
	b := maphash.Comparable(seed, s.peer[1])
	if c.FirstAlone {
		b *= 3
	}
	return h ^ either(a, b)
}

// either is a hash of two, whichever is first.
func either(a, b uint64) uint64 {
	return (a+b)*0x9e3779b97f4a7c15 ^ (a*b)>>1*0xc2b2ae3d27d4eb4f
}

// add returns the state's index, and whether it is new.
func (g *graph[S]) add(s *S, from uint32) (uint32, bool) {
	if 2*len(g.print) >= len(g.table) {
		g.grow()
	}
	h := g.hash(g.seed, s)
	i := g.place(h)
	if g.table[i] != 0 {
		return g.table[i] - 1, false
	}
	g.print, g.from = append(g.print, h), append(g.from, from)
	g.table[i] = uint32(len(g.print))
	return g.table[i] - 1, true
}

func (g *graph[S]) place(h uint64) uint64 {
	mask := uint64(len(g.table) - 1)
	i := h & mask
	for g.table[i] != 0 && g.print[g.table[i]-1] != h {
		i = (i + 1) & mask
	}
	return i
}

func (g *graph[S]) grow() {
	g.table = make([]uint32, 2*len(g.table))
	for i, h := range g.print {
		g.table[g.place(h)] = uint32(i + 1)
	}
}

// trace walks the way to a state again, and names its actions.
func (g *graph[S]) trace(to uint32, last successorOf[S]) []string {
	var way []uint32
	for ; to != 0; to = g.from[to] {
		way = append(way, to)
	}
	g.name()
	s := g.first
	var lines []string
	ticks := 0
	say := func(action string) {
		if action == "tick" {
			ticks++
			return
		}
		lines = append(lines, fmt.Sprintf("\t%2d  t=%-2d  %s", len(lines)+1, ticks, action))
	}
	for i := len(way) - 1; i >= 0; i-- {
		for _, n := range g.expand(&s) {
			if g.hash(g.seed, &n.state) == g.print[way[i]] {
				s = n.state
				say(n.action)
				break
			}
		}
	}
	say(last.action + "  ==> " + last.broken)
	return lines
}

// stuck looks for a state from which no such state can be reached.
func (g *graph[S]) stuck() (uint32, bool) {
	begin := make([]uint32, len(g.print)+1) // of the edges that lead to each
	for _, e := range g.edges {
		begin[e.to+1]++
	}
	for i := range g.print {
		begin[i+1] += begin[i]
	}
	back, at := make([]uint32, len(g.edges)), append([]uint32(nil), begin...)
	for _, e := range g.edges {
		back[at[e.to]] = e.from
		at[e.to]++
	}
	good := make([]bool, len(g.print))
	open := g.goal
	for len(open) > 0 {
		i := open[len(open)-1]
		open = open[:len(open)-1]
		if good[i] {
			continue
		}
		good[i] = true
		open = append(open, back[begin[i]:begin[i+1]]...)
	}
	for i := range good {
		if !good[i] {
			return uint32(i), true
		}
	}
	return 0, false
}
