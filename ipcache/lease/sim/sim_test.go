package sim

import (
	"flag"
	"runtime"
	"sync"
	"sync/atomic"
	"testing"
)

var (
	seedFlag = flag.Uint64("sim.seed", 0, "run this schedule alone, and print what happens")
	runsFlag = flag.Int("sim.schedules", 10_000, "how many schedules to run")
	fromFlag = flag.Uint64("sim.from", 1, "the first seed")
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
	cover := map[Pair]int{}
	var mu sync.Mutex
	var events, faults, quiet atomic.Int64
	parallel(schedules, func(seeds func() (uint64, bool)) {
		mine := map[Pair]int{}
		for seed, ok := seeds(); ok; seed, ok = seeds() {
			r := run(seed, options, hooks{}, false, mine)
			events.Add(int64(r.Events))
			faults.Add(int64(r.Faults))
			if r.Faults == 0 {
				quiet.Add(1)
			}
			if r.Violation != nil {
				t.Errorf("%v\n\treplay: go test ./ipcache/lease/sim -run TestSchedules -v -sim.seed=%d", r, seed)
			}
		}
		mu.Lock()
		defer mu.Unlock()
		for p, n := range mine {
			cover[p] += n
		}
	})
	t.Logf("%d schedules of %d events, %d faults", schedules, options.Events, faults.Load())
	if n := quiet.Load(); n > 0 {
		t.Errorf("%d schedules without a fault", n)
	}
	if e := events.Load(); !t.Failed() && e < int64(schedules)*200 {
		t.Errorf("%d events in %d schedules", e, schedules)
	}
	if schedules >= 10_000 {
		checkCoverage(t, cover)
	}
}

// TestPastSeeds: schedules that once failed.
func TestPastSeeds(t *testing.T) {
	for _, seed := range []uint64{
		26112229630, 26112249872, // given back as idle just before the end: the check took that for a loss
	} {
		if r := Run(seed, options, false); r.Violation != nil {
			t.Error(r)
		}
	}
}

// parallel runs work on every core; it hands out seeds.
func parallel(n int, work func(seeds func() (uint64, bool))) {
	var next atomic.Uint64
	var wg sync.WaitGroup
	for range runtime.GOMAXPROCS(0) {
		wg.Add(1)
		go func() {
			defer wg.Done()
			work(func() (uint64, bool) {
				i := next.Add(1) - 1
				return *fromFlag + i, i < uint64(n)
			})
		}()
	}
	wg.Wait()
}
