package main

import (
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"os"
	"os/signal"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"time"

	"portcullis/chaos/lab"
)

// options are what the command line says.
type options struct {
	pairs  int
	slices int           // of each side in a pair
	slice  time.Duration // how long one is
	sender int           // core
	recver int           // core
}

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	context.AfterFunc(ctx, stop)
	if err := run(ctx); err != nil {
		fmt.Fprintln(os.Stderr, "throughput:", err)
		os.Exit(1)
	}
}

func run(ctx context.Context) (err error) {
	var o options
	binary := flag.String("portcullis", "bin/portcullis", "the binary to measure")
	asJSON := flag.Bool("json", false, "print JSON")
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
	path, err := filepath.Abs(*binary)
	if err != nil {
		return err
	}
	if _, err := os.Stat(path); err != nil {
		return fmt.Errorf("%w (make build)", err)
	}
	c := lab.DefaultConfig()
	c.Nodes = c.Nodes[:2]
	l, err := lab.Up(ctx, c, lab.Options{Name: "throughput", Binary: path})
	if err != nil {
		return err
	}
	defer func() {
		err = errors.Join(err, l.Down(context.WithoutCancel(ctx)), l.Close())
	}()
	f, err := newFixture(ctx, l, c.Nodes)
	if err != nil {
		return err
	}
	report := &report{Machine: machine(), LoadBefore: load()}
	for _, p := range strings.Split(*where, ",") {
		pair, ok := f.paths[p]
		if !ok {
			return fmt.Errorf("-path %q: want nodes, node", p)
		}
		for _, k := range strings.Split(*what, ",") {
			fmt.Fprintf(os.Stderr, "%s, path %s\n", k, p)
			r, err := f.measure(ctx, o, k, p, pair)
			if err != nil {
				return fmt.Errorf("%s, path %s: %w", k, p, err)
			}
			report.Results = append(report.Results, r)
		}
	}
	report.LoadAfter = load()
	if *asJSON {
		enc := json.NewEncoder(os.Stdout)
		enc.SetIndent("", "  ")
		return enc.Encode(report)
	}
	fmt.Print(report)
	return nil
}

// machine says where the numbers are from.
func machine() string {
	var u syscall.Utsname
	var release []byte
	if syscall.Uname(&u) == nil {
		for _, c := range u.Release {
			if c == 0 {
				break
			}
			release = append(release, byte(c))
		}
	}
	model := "unknown processor"
	if b, err := os.ReadFile("/proc/cpuinfo"); err == nil {
		lines := strings.Split(string(b), "\n")
		if i := slices.IndexFunc(lines, func(s string) bool { return strings.HasPrefix(s, "model name") }); i >= 0 {
			_, model, _ = strings.Cut(lines[i], ": ")
		}
	}
	return fmt.Sprintf("Linux %s, %s", release, model)
}

// load returns the machine's load averages.
func load() string {
	b, err := os.ReadFile("/proc/loadavg")
	if err != nil {
		return "unknown"
	}
	return strings.Join(strings.Fields(string(b))[:3], " ")
}
