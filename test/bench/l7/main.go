package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"os"
	"slices"
	"strings"
	"time"

	"portcullis/chaos/lab"
	"portcullis/test/bench/rig"
)

func main() {
	if len(os.Args) == 2 && os.Args[1] == endArgument {
		if err := runEnd(); err != nil {
			fmt.Fprintln(os.Stderr, "l7 end:", err)
			os.Exit(1)
		}
		return
	}
	rig.Main("l7", run)
}

// report is what a measurement found.
type report interface {
	fmt.Stringer
	problem() error
}

func run(ctx context.Context) error {
	o, flags, err := parse()
	if err != nil {
		return err
	}
	what := flag.Arg(0)
	if what == "requests" && len(o.others) > 0 {
		if err := install(ctx); err != nil {
			return err
		}
	}
	c := lab.DefaultConfig()
	c.Nodes = c.Nodes[:2]
	if o.flags != "" {
		c.AgentFlags = strings.Fields(o.flags)
	}
	return flags.InLab(ctx, "bench-l7-"+what, c, func(l *lab.Lab) error {
		r, err := measure(ctx, l, c.Nodes, o, what)
		if err != nil {
			return err
		}
		return errors.Join(flags.Print(r), r.problem())
	})
}

func measure(ctx context.Context, l *lab.Lab, nodes []lab.Node, o options, what string) (_ report, err error) {
	if what == "names" {
		return measureNames(ctx, l, nodes, o)
	}
	if what == "idle" {
		o.others = nil
	}
	f, err := newFixture(ctx, l, nodes, o.others)
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, f.close()) }()
	if what == "idle" {
		return f.measureIdle(ctx, o)
	}
	return f.measureRequests(ctx, o)
}

func parse() (o options, flags *rig.Flags, err error) {
	flags = rig.AddFlags()
	loads := flag.String("load", "keep,paced,conn,grpc", "requests: which loads")
	paths := flag.String("path", "nodes,node", "requests: between nodes, within one node")
	with := flag.String("with", strings.Join(others, ","), "requests: proxies to compare with; none if empty")
	flag.IntVar(&o.rounds, "rounds", 7, "requests: turns of each way")
	flag.DurationVar(&o.slice, "slice", time.Second, "requests: how long a turn is")
	flag.IntVar(&o.conns, "conns", 32, "requests: connections, or calls, at a time")
	flag.Float64Var(&o.pace, "pace", 0.1, "requests: the pace of paced, by the rate of direct")
	flag.StringVar(&o.flags, "agent-flags", "", "further flags of the agents")
	flag.IntVar(&o.idle, "idle", 10_000, "idle: how many connections")
	flag.IntVar(&o.names, "names", 2000, "names: how many")
	flag.Parse()
	for _, list := range []struct {
		from string
		to   *[]string
		of   []string
	}{{*loads, &o.loads, []string{"keep", "paced", "conn", "grpc"}}, {*paths, &o.paths, []string{"nodes", "node"}}, {*with, &o.others, others}} {
		if list.from == "" {
			continue
		}
		*list.to = strings.Split(list.from, ",")
		for _, x := range *list.to {
			if !slices.Contains(list.of, x) {
				return o, nil, fmt.Errorf("%q: want some of %s", x, strings.Join(list.of, ", "))
			}
		}
	}
	switch {
	case flag.NArg() != 1 || !slices.Contains([]string{"requests", "idle", "names"}, flag.Arg(0)):
		return o, nil, errors.New("say `requests`, `idle` or `names`, after the flags")
	case o.rounds < 1 || o.slice <= 0 || o.conns < 1 || o.pace <= 0 || o.idle < 1 || o.names < 1:
		return o, nil, errors.New("want numbers above 0")
	}
	return o, flags, nil
}
