package main

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"flag"
	"fmt"
	"os"
	"os/signal"
	"path/filepath"
	"strings"
	"sync"
	"syscall"

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
	commit   string
}

// lanes are how many labs are at work side by side: most of a cell is waiting.
const lanes = 2

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	context.AfterFunc(ctx, stop)
	var o options
	var evidence, faults string
	flag.StringVar(&o.binary, "portcullis", "bin/portcullis", "the binary that is judged (`make chaos` builds it without the state of the checkout, so that it stays the same)")
	flag.StringVar(&o.dir, "dir", "out/chaos", "where the results of runs are kept: what is there is not run again")
	flag.StringVar(&evidence, "evidence", "lease,svid,classic", "kinds of evidence, with commas")
	flag.StringVar(&faults, "faults", "", "only cells with one of these faults, with commas; none: those without")
	flag.BoolVar(&o.long, "long", false, "instead of every fault: 5000 reuses without a fault and under a partition")
	flag.StringVar(&o.page, "write", "", "file that gets the tables, as Markdown; empty: standard output")
	flag.StringVar(&o.commit, "commit", "", "of what the binary is, for the page")
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
	id := hex.EncodeToString(sum[:6])
	k := &keeper{options: o, dir: filepath.Join(o.dir, id), total: len(all)}
	if o.long {
		k.dir = filepath.Join(k.dir, "long")
	}
	if err := os.MkdirAll(k.dir, 0o755); err != nil {
		return err
	}
	fmt.Fprintf(os.Stderr, "chaos: %d cells; results in %s; Ctrl-C ends it, and the next time it goes on from there\n", len(all), k.dir)
	results, err := k.all(ctx, all)
	build := "binary " + id
	if o.commit != "" {
		build = "commit " + o.commit + ", " + build
	}
	text, failed := page(all, results, o.long, build)
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
