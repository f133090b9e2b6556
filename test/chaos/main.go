package main

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"

	"portcullis/chaos/check"
)

type options struct {
	binary   string
	dir      string
	evidence []string
	faults   []string
	long     bool
	page     string
	found    string
}

// lanes are how many labs are at work side by side: most of a cell is waiting.
const lanes = 2

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	context.AfterFunc(ctx, stop)
	var o options
	var evidence, faults string
	flag.StringVar(&o.binary, "portcullis", "bin/portcullis", "the binary that is judged")
	flag.StringVar(&o.dir, "dir", "out/chaos", "where the results of runs are kept: what is there is not run again")
	flag.StringVar(&evidence, "evidence", "lease,svid,classic", "kinds of evidence, with commas")
	flag.StringVar(&faults, "faults", "", "only cells with one of these faults, with commas; none: those without")
	flag.BoolVar(&o.long, "long", false, "instead of every fault: 5000 reuses without a fault and under a partition")
	flag.StringVar(&o.page, "write", "", "file that gets the tables, as Markdown; empty: standard output")
	flag.StringVar(&o.found, "found", "", "instead of every fault: the commands of this page, which must come to what it says")
	flag.Parse()
	o.evidence = strings.Split(evidence, ",")
	if faults != "" {
		o.faults = strings.Split(faults, ",")
	}
	if err := run(ctx, o); err != nil {
		fmt.Fprintln(os.Stderr, "chaos:", err)
		os.Exit(1)
	}
}

func run(ctx context.Context, o options) error {
	if o.found != "" {
		return tryFound(ctx, o.binary, o.found)
	}
	all := cells(o.evidence)
	if o.long {
		all = longCells(o.evidence)
	}
	all = only(all, o.faults)
	if len(all) == 0 {
		return errors.New("there is no such cell")
	}
	judged, err := os.ReadFile(o.binary)
	if err != nil {
		return fmt.Errorf("%w (make build makes it)", err)
	}
	sum := sha256.Sum256(judged)
	k := &keeper{options: o, dir: filepath.Join(o.dir, hex.EncodeToString(sum[:6])), total: len(all)}
	if o.long {
		k.dir = filepath.Join(k.dir, "long")
	}
	if err := os.MkdirAll(k.dir, 0o755); err != nil {
		return err
	}
	fmt.Fprintf(os.Stderr, "chaos: %d cells; results in %s; Ctrl-C ends it, and the next time it goes on from there\n", len(all), k.dir)
	results, err := k.all(ctx, all)
	text, failed := page(all, results, o.long)
	if o.page == "" || ctx.Err() != nil {
		fmt.Print(text)
	} else if err := os.WriteFile(o.page, []byte(text), 0o644); err != nil {
		return err
	}
	if failed > 0 {
		err = errors.Join(err, fmt.Errorf("%d runs were violated that must hold, or held where the harness must see violations", failed))
	}
	return errors.Join(err, ctx.Err())
}

// keeper runs what has not been run.
type keeper struct {
	options
	dir   string
	total int

	mu   sync.Mutex
	done int // guarded by mu
}

// all runs the cells, in lanes. Its error is of those that came to no end.
func (k *keeper) all(ctx context.Context, cells []Cell) ([][]*check.Result, error) {
	results := make([][]*check.Result, len(cells))
	var slow, quick []int // those that spend their time waiting, and the others
	for i, c := range cells {
		if c.Waits {
			slow = append(slow, i)
		} else {
			quick = append(quick, i)
		}
	}
	var mu sync.Mutex
	next := func(lane int) (i int, ok bool) {
		mu.Lock()
		defer mu.Unlock()
		from := &slow // of the last lane first: two that wait are not side by side
		if lane < lanes-1 && len(quick) > 0 || len(slow) == 0 {
			from = &quick
		}
		if len(*from) == 0 || ctx.Err() != nil {
			return 0, false
		}
		i, *from = (*from)[0], (*from)[1:]
		return i, true
	}
	errs := make([]error, lanes)
	var wg sync.WaitGroup
	for lane := range lanes {
		wg.Go(func() {
			for i, ok := next(lane); ok; i, ok = next(lane) {
				var err error
				if results[i], err = k.cell(ctx, cells[i], lane); err != nil && ctx.Err() == nil {
					errs[lane] = errors.Join(errs[lane], fmt.Errorf("%s: %w", cells[i], err))
				}
			}
		})
	}
	wg.Wait()
	return results, errors.Join(errs...)
}

// cell returns the results of all its runs. Those that come to no end are tried
// again the next time.
func (k *keeper) cell(ctx context.Context, c Cell, lane int) (out []*check.Result, err error) {
	begin := time.Now()
	n, events := c.runs()
	for i := range n {
		file := filepath.Join(k.dir, fmt.Sprintf("%s-%d.json", c.name(), i+1))
		r, err := read(file)
		if err != nil {
			if r, err = k.judge(ctx, c, events, uint64(i+1), lane, file); err != nil {
				return out, err
			}
		}
		out = append(out, r)
	}
	k.mu.Lock()
	defer k.mu.Unlock()
	k.done++
	fmt.Fprintf(os.Stderr, "chaos: %3d/%d  %-60s %s, %.0f s\n", k.done, k.total, c, verdict(out), time.Since(begin).Seconds())
	return out, nil
}

func read(file string) (*check.Result, error) {
	b, err := os.ReadFile(file)
	if err != nil {
		return nil, err
	}
	r := &check.Result{}
	return r, json.Unmarshal(b, r)
}

func (k *keeper) judge(ctx context.Context, c Cell, events int, seed uint64, lane int, file string) (*check.Result, error) {
	args := []string{"chaos", "run", c.Scenario, "--evidence", c.Evidence, "--events", strconv.Itoa(events),
		"--seed", strconv.FormatUint(seed, 10), "--lab", fmt.Sprintf("chaos%d-%d", os.Getpid(), lane), "-o", "json"}
	if len(c.Faults) > 0 {
		args = append(args, "--fault", strings.Join(c.Faults, ","))
	}
	if c.Parallel > 0 {
		args = append(args, "--parallel", strconv.Itoa(c.Parallel))
	}
	r, out, err := chaosRun(ctx, k.binary, args)
	if err != nil {
		return nil, err
	}
	if r.Verdict == check.Interrupted {
		return nil, fmt.Errorf("portcullis %s: it did not come to its end", strings.Join(args, " "))
	}
	// Written in one step: half a file would be taken for a run.
	if err := os.WriteFile(file+".new", out, 0o644); err != nil {
		return nil, err
	}
	return r, os.Rename(file+".new", file)
}

// chaosRun runs a command of portcullis whose output is a result, and returns it
// read and as it is. A status that is not 0 is no error where there is a result.
func chaosRun(ctx context.Context, binary string, args []string) (*check.Result, []byte, error) {
	cmd := exec.Command(binary, args...)
	var out, log bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &log
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true} // Ctrl-C is ours to pass on
	if err := cmd.Start(); err != nil {
		return nil, nil, err
	}
	stop := context.AfterFunc(ctx, func() { cmd.Process.Signal(syscall.SIGTERM) })
	failed := cmd.Wait()
	stop()
	r := &check.Result{}
	if err := json.Unmarshal(out.Bytes(), r); err != nil {
		return nil, nil, fmt.Errorf("portcullis %s: %w\n%s", strings.Join(args, " "), errors.Join(failed, err), tail(log.String()))
	}
	return r, out.Bytes(), nil
}

func tail(s string) string {
	lines := strings.Split(strings.TrimSpace(s), "\n")
	return strings.Join(lines[max(0, len(lines)-5):], "\n")
}
