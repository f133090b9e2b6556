package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"os"
	"strings"
	"time"

	"portcullis/chaos/lab"
	"portcullis/test/bench/rig"
)

// options are what the command line says.
type options struct {
	pairs  int
	slices int           // of each side in a pair
	slice  time.Duration // how long one is
	sender int           // core
	recver int           // core
}

func main() { rig.Main("throughput", run) }

func run(ctx context.Context) error {
	var o options
	flags := rig.AddFlags()
	what := flag.String("traffic", "connections,udp,stream", "which kinds")
	where := flag.String("path", "nodes,node", "between nodes, within one node")
	cores := flag.String("cores", "0,1", "core of the sender, core of the receiver")
	flag.IntVar(&o.pairs, "pairs", 11, "pairs of each measurement")
	flag.IntVar(&o.slices, "slices", 10, "slices of each side of a pair")
	flag.DurationVar(&o.slice, "slice", 100*time.Millisecond, "how long one is")
	flag.Parse()
	if _, err := fmt.Sscanf(*cores, "%d,%d", &o.sender, &o.recver); err != nil {
		return fmt.Errorf("-cores %q: want two numbers", *cores)
	}
	if o.pairs < 1 || o.slices < 1 || o.slice <= 0 {
		return errors.New("-pairs, -slices and -slice: want more than 0")
	}
	for _, w := range strings.Split(*what, ",") {
		if kinds[w] == nil {
			return fmt.Errorf("-traffic %q: want connections, udp, stream", w)
		}
	}
	c := lab.DefaultConfig()
	c.Nodes = c.Nodes[:2]
	return flags.InLab(ctx, "throughput", c, func(l *lab.Lab) error {
		f, err := newFixture(ctx, l, c.Nodes)
		if err != nil {
			return err
		}
		report, err := f.measureAll(ctx, o, strings.Split(*where, ","), strings.Split(*what, ","))
		if err != nil {
			return err
		}
		return flags.Print(report)
	})
}

// measureAll measures each kind of traffic on each path.
func (f *fixture) measureAll(ctx context.Context, o options, paths, traffic []string) (*report, error) {
	report := &report{Machine: rig.Machine(), LoadBefore: rig.Load()}
	for _, p := range paths {
		pair, ok := f.paths[p]
		if !ok {
			return nil, fmt.Errorf("-path %q: want nodes, node", p)
		}
		for _, k := range traffic {
			fmt.Fprintf(os.Stderr, "%s, path %s\n", k, p)
			r, err := f.measure(ctx, o, k, p, pair)
			if err != nil {
				return nil, fmt.Errorf("%s, path %s: %w", k, p, err)
			}
			report.Results = append(report.Results, r)
		}
	}
	report.LoadAfter = rig.Load()
	return report, nil
}
