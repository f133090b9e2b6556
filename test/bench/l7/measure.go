package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"slices"
	"time"

	"portcullis/test/bench/rig"
)

// options are the command line's.
type options struct {
	rounds int
	slice  time.Duration
	conns  int
	pace   float64 // of the rate of direct
	loads  []string
	paths  []string
	others []string
	flags  string // of agents
	idle   int
	names  int
}

// sample is what one way did in one round.
type sample struct {
	done
	proxy, agents, ends float64 // CPU seconds; ends: of client and server
}

// cpu is what a request cost client, server and proxy together, in seconds.
func (s sample) cpu() float64 { return (s.proxy + s.ends) / float64(s.Requests) }

func (s sample) rate() float64 { return float64(s.Requests-s.Failed) / s.Seconds }

// measureRequests runs the rounds of every load on every path.
func (f *fixture) measureRequests(ctx context.Context, o options) (*requestReport, error) {
	r := &requestReport{Machine: rig.Machine(), LoadBefore: rig.Load()}
	for _, name := range o.others {
		r.Others = append(r.Others, version(name))
	}
	for _, path := range o.paths {
		for _, load := range o.loads {
			fmt.Fprintf(os.Stderr, "%s, path %s\n", load, path)
			x, err := f.measureLoad(ctx, o, path, load)
			if err != nil {
				return nil, fmt.Errorf("%s, path %s: %w", load, path, err)
			}
			r.Results = append(r.Results, x)
		}
	}
	r.LoadAfter = rig.Load()
	return r, nil
}

// measureLoad runs the rounds of one load on one path: in each, every way has a
// turn, and none is always the first.
func (f *fixture) measureLoad(ctx context.Context, o options, path, load string) (_ *result, err error) {
	r := &result{Load: load, Path: path, Rounds: o.rounds, LoadBefore: rig.Load(), rounds: map[string][]sample{}}
	clients := map[string]*end{}
	defer func() {
		for _, c := range clients {
			err = errors.Join(err, c.stop())
		}
	}()
	for _, w := range f.ways {
		if clients[w.name], err = startEnd(f.l, f.client[path]); err != nil {
			return nil, err
		}
	}
	agents, err := f.agents(ctx)
	if err != nil {
		return nil, err
	}
	what := order{Load: load, Conns: o.conns, Millis: int(o.slice / time.Millisecond)}
	if load == "paced" {
		what.Load = "keep"
		if what.Rate, err = f.pace(clients["direct"], o, what); err != nil {
			return nil, err
		}
		r.Rate = what.Rate
	}
	for round := range o.rounds {
		turns := slices.Clone(f.ways)
		for i := range turns {
			turns[i] = f.ways[(i+round)%len(turns)]
		}
		for _, w := range turns {
			if err := ctx.Err(); err != nil {
				return nil, err
			}
			s, err := f.turn(clients[w.name], w, what, agents, round == 0)
			if err != nil {
				return nil, fmt.Errorf("%s: %w", w.name, err)
			}
			r.rounds[w.name] = append(r.rounds[w.name], s)
		}
	}
	r.LoadAfter = rig.Load()
	r.summarize(f.ways)
	return r, nil
}

// pace is so much of the rate of direct.
func (f *fixture) pace(c *end, o options, what order) (float64, error) {
	what.To = f.ways[0].to(what.Load)
	d, err := c.do(what)
	return o.pace * float64(d.Requests) / d.Seconds, err
}

// turn is one slice of one way.
func (f *fixture) turn(c *end, w way, what order, agents []int32, first bool) (s sample, err error) {
	what.To = w.to(what.Load)
	if first { // caches, connections, heaps: not measured
		warm := what
		warm.Millis = min(what.Millis, 200)
		if _, err := c.do(warm); err != nil {
			return s, err
		}
	}
	clocks, err := f.clocks(w)
	if err != nil {
		return s, err
	}
	ends := []int32{rig.ProcessClock(c.cmd.Process.Pid), rig.ProcessClock(f.server.cmd.Process.Pid)}
	proxy, others, both := rig.CPU(clocks...), rig.CPU(agents...), rig.CPU(ends...)
	if s.done, err = c.do(what); err != nil {
		return s, err
	}
	if s.Requests == 0 {
		return s, errors.New("nothing was answered")
	}
	s.proxy, s.agents, s.ends = (rig.CPU(clocks...) - proxy).Seconds(), (rig.CPU(agents...) - others).Seconds(), (rig.CPU(ends...) - both).Seconds()
	return s, nil
}
