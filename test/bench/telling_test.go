package bench

import (
	"errors"
	"math"
	"os"
	"testing"
	"time"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/ringbuf"

	"portcullis/bpf/abi"
)

// levels are those of --monitor-aggregation, with its default interval and flags,
// as package datapath sets them; off tells of a flow's first packet alone.
var levels = []struct {
	name   string
	change change
}{
	{"off", telling(0, 0, 0, 0)},
	{"medium", telling(0, 7, 19, 28)},
	{"none", telling(1<<uint32(abi.DirEgress)|1<<uint32(abi.DirIngress), 7, 0, 0)},
}

func telling(every, flags, interval, shift uint32) change {
	return func(spec *ebpf.CollectionSpec) error {
		var errs []error
		for name, v := range map[string]uint32{"tell_every": every, "tell_flags": flags, "tell_interval": interval, "tell_shift": shift} {
			errs = append(errs, spec.Variables[name].Set(v))
		}
		// A share for each source that is never used up.
		errs = append(errs, spec.Variables["event_cost"].Set(uint64(1)), spec.Variables["event_burst"].Set(uint64(time.Hour)))
		spec.Maps["events"].MaxEntries = 4 << 20 // as many as one run makes
		return errors.Join(errs...)
	}
}

// drained returns a function that takes out of the ring what a run has left there.
func (g *fixture) drained() func() (events int) {
	g.t.Helper()
	r, err := ringbuf.NewReader(g.coll.Maps["events"])
	if err != nil {
		g.t.Fatal(err)
	}
	g.t.Cleanup(func() { r.Close() })
	var rec ringbuf.Record
	return func() (n int) {
		r.SetDeadline(time.Unix(1, 0))
		for {
			err := r.ReadInto(&rec)
			if errors.Is(err, os.ErrDeadlineExceeded) {
				return n
			}
			if err != nil {
				g.t.Fatal(err)
			}
			n++
		}
	}
}

// TestTelling: what the benchmark measures is told of as its level says.
func TestTelling(t *testing.T) {
	for _, level := range levels {
		g := newFixture(t, 1000, level.change)
		p := families[0].paths()[0]
		g.open(p)
		drain := g.drained()
		drain()
		g.measure(g.coll.Programs[p.program], p)
		// A new interval may begin meanwhile.
		if n := drain(); level.name == "none" && n != repeat || level.name != "none" && n > 1 {
			t.Errorf("%s: %d events of %d packets", level.name, n, repeat)
		}
	}
}

// BenchmarkTelling measures an established packet at each level beside one of
// which nothing is told, of one hot flow and of 100,000 at random: ns/packet are
// medians, the ratios (x-off) medians of the rounds'. In a round all levels take
// turns; the ring is emptied between runs, so every record has room.
func BenchmarkTelling(b *testing.B) {
	b.Run("hot", func(b *testing.B) {
		p := families[0].paths()[0]
		b.ReportMetric(0, "ns/op")
		compare(b, connections, p, func(g *fixture) *ebpf.Program {
			g.open(p)
			return g.coll.Programs[p.program]
		})
	})
	b.Run("random", func(b *testing.B) {
		f := families[0]
		p := path{packet: tcp(f, f.peer, f.pod, 40000, 80), in: uplink}
		b.ReportMetric(0, "ns/op")
		compare(b, 0, p, func(g *fixture) *ebpf.Program {
			prog := g.shuffled(g.coll.Programs["to_workload"])
			for range 20 * flows / repeat {
				g.measure(prog, p)
			}
			return prog
		})
	})
}

func compare(b *testing.B, full int, p path, prepare func(*fixture) *ebpf.Program) {
	type run struct {
		g     *fixture
		prog  *ebpf.Program
		drain func() int
		ns    []float64
		ratio []float64
	}
	runs := make([]run, len(levels))
	for i, level := range levels {
		g := newFixture(b, full, level.change)
		runs[i] = run{g: g, prog: prepare(g), drain: g.drained()}
	}
	for range b.N * rounds {
		best := make([]float64, len(runs))
		for i := range best {
			best[i] = math.Inf(1)
		}
		for range chunks {
			for i := range runs {
				runs[i].drain()
				best[i] = min(best[i], runs[i].g.measure(runs[i].prog, p))
			}
		}
		for i := range runs {
			runs[i].ns, runs[i].ratio = append(runs[i].ns, best[i]), append(runs[i].ratio, best[i]/best[0])
		}
	}
	for i, level := range levels {
		b.ReportMetric(median(runs[i].ns), "ns/"+level.name)
		if i > 0 {
			b.ReportMetric(median(runs[i].ratio), level.name+"-x-off")
		}
	}
}
