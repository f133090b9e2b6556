package sim

import (
	"crypto/sha256"
	"errors"
	"flag"
	"fmt"
	"io/fs"
	"os"
	"runtime"
	"runtime/debug"
	"sync"
	"sync/atomic"
	"testing"
)

var (
	seedFlag = flag.Uint64("sim.seed", 0, "run this schedule alone, and print what happens")
	runsFlag = flag.Int("sim.schedules", 10_000, "how many schedules to run")
	fromFlag = flag.Uint64("sim.from", 1, "the first seed")

	resumeFlag = flag.String("sim.resume", "", "a file that keeps count, so that an interrupted run of the same build goes on")
)

var options = Options{Nodes: 3, IPs: 2, Events: 400}

// TestSchedules runs the protocol as it is.
func TestSchedules(t *testing.T) {
	if *seedFlag != 0 {
		r := Run(*seedFlag, options, true)
		t.Log("\n" + r.Trace)
		if r.Violation != nil {
			t.Fatal(r)
		}
		t.Log(r)
		return
	}
	schedules := *runsFlag
	if testing.Short() {
		schedules = min(schedules, 300)
	}
	debug.SetGCPercent(400) // schedules are short-lived garbage
	before := resume(t, *resumeFlag)
	if before >= schedules {
		t.Logf("%d schedules are done already: remove %s to begin anew", before, *resumeFlag)
		return
	}
	c := campaign{cover: map[Pair]int{}}
	const part = 2_000
	for done := before; done < schedules; {
		n := min(part, schedules-done)
		c.run(t, *fromFlag+uint64(done), n)
		done += n
		if schedules > 10*part {
			fmt.Fprintf(os.Stderr, "%d of %d schedules, %d faults, failed: %v\n", done, schedules, c.faults.Load(), t.Failed())
		}
		if !t.Failed() {
			keep(t, *resumeFlag, done)
		}
	}
	ran := schedules - before
	t.Logf("%d schedules of %d events, %d faults", ran, options.Events, c.faults.Load())
	if n := c.quiet.Load(); n > 0 {
		t.Errorf("%d schedules without a fault", n)
	}
	if e := c.events.Load(); !t.Failed() && e < int64(ran)*200 {
		t.Errorf("%d events in %d schedules", e, ran)
	}
	if ran >= 10_000 {
		checkCoverage(t, c.cover)
	}
}

// campaign is what many schedules came to.
type campaign struct {
	events, faults, quiet atomic.Int64

	mu    sync.Mutex
	cover map[Pair]int
}

// run runs n schedules from this seed on, on every core.
func (c *campaign) run(t *testing.T, from uint64, n int) {
	parallel(from, n, func(seeds func() (uint64, bool)) {
		mine := map[Pair]int{}
		for seed, ok := seeds(); ok; seed, ok = seeds() {
			r := run(seed, options, hooks{}, false, mine)
			c.events.Add(int64(r.Events))
			c.faults.Add(int64(r.Faults))
			if r.Faults == 0 {
				c.quiet.Add(1)
			}
			if r.Violation != nil {
				t.Errorf("%v\n\treplay: go test ./ipcache/lease/sim -run TestSchedules -v -sim.seed=%d", r, seed)
			}
		}
		c.mu.Lock()
		defer c.mu.Unlock()
		for p, n := range mine {
			c.cover[p] += n
		}
	})
}

// resume returns how many schedules this very program has run before, by the
// file. What another build ran does not count.
func resume(t *testing.T, file string) int {
	if file == "" {
		return 0
	}
	text, err := os.ReadFile(file)
	if errors.Is(err, fs.ErrNotExist) {
		return 0
	} else if err != nil {
		t.Fatal(err)
	}
	var sum string
	var from uint64
	var done int
	if _, err := fmt.Sscanf(string(text), "%s %d %d", &sum, &from, &done); err != nil || sum != program(t) || from != *fromFlag {
		return 0
	}
	return done
}

func keep(t *testing.T, file string, done int) {
	if file == "" {
		return
	}
	if err := os.WriteFile(file, fmt.Appendf(nil, "%s %d %d\n", program(t), *fromFlag, done), 0o644); err != nil {
		t.Fatal(err)
	}
}

// program is a digest of the running program.
var program = func() func(*testing.T) string {
	var sum string
	return func(t *testing.T) string {
		if sum != "" {
			return sum
		}
		self, err := os.Executable()
		if err != nil {
			t.Fatal(err)
		}
		text, err := os.ReadFile(self)
		if err != nil {
			t.Fatal(err)
		}
		sum = fmt.Sprintf("%x", sha256.Sum256(text))
		return sum
	}
}()

// TestPastSeeds: schedules that once failed.
func TestPastSeeds(t *testing.T) {
	for _, seed := range []uint64{
		43548,          // descheduled between the decision that a proof stands and what follows: it had ended meanwhile
		109274, 109741, // given back, for a store that failed, while a Confirm was out
		59530,               // a new process had left the deadlines of the former one's sessions
		16199, 35968, 42904, // a proof that was unread for as long as it counted was taken for one
		496661,                   // asked again for, while a journal failed: an active workload was put back
		26112229630, 26112249872, // given back as idle just before the end: the check took that for a loss
	} {
		if r := Run(seed, options, false); r.Violation != nil {
			t.Error(r)
		}
	}
}

// parallel runs work on every core; it hands out seeds.
func parallel(from uint64, n int, work func(seeds func() (uint64, bool))) {
	var next atomic.Uint64
	var wg sync.WaitGroup
	for range runtime.GOMAXPROCS(0) {
		wg.Add(1)
		go func() {
			defer wg.Done()
			work(func() (uint64, bool) {
				i := next.Add(1) - 1
				return from + i, i < uint64(n)
			})
		}()
	}
	wg.Wait()
}
