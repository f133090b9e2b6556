package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"portcullis/test/bench/rig"
)

// idleReport is about connections that nothing passes on.
type idleReport struct {
	Machine     string  `json:"machine"`
	Connections int     `json:"connections"`
	Wanted      int     `json:"wanted"`
	Seconds     float64 `json:"seconds"` // to open them, one after the other, with a request each
	Before      uint64  `json:"rss_before"`
	After       uint64  `json:"rss_after"`
	Settled     uint64  `json:"rss_settled"` // some seconds later
	Slab        int64   `json:"slab"`        // of the machine, more: sockets of all four ends
	CPU         float64 `json:"cpu"`         // of a core, while they are idle
	Load        string  `json:"load_averages"`
}

// settle is how long the connections are left alone.
const settle = 10 * time.Second

// measureIdle opens connections through the proxy and leaves them.
func (f *fixture) measureIdle(ctx context.Context, o options) (_ *idleReport, err error) {
	r := &idleReport{Machine: rig.Machine(), Wanted: o.idle, Connections: min(o.idle, mostPairs())}
	c, err := startEnd(f.l, f.client["nodes"])
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, c.stop()) }()
	warm, err := startEnd(f.l, f.client["nodes"])
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, warm.stop()) }()
	way := f.ways[1]
	if _, err := warm.do(order{Load: "keep", Conns: o.conns, Millis: 500, To: way.to("keep")}); err != nil {
		return nil, err
	}
	pid, err := proxyOf(f.l, f.node)
	if err != nil {
		return nil, err
	}
	if r.Before, err = rig.RSS(pid); err != nil {
		return nil, err
	}
	slab := slabBytes()
	d, err := c.do(order{Load: "idle", Conns: r.Connections, To: way.to("keep")})
	if err != nil {
		return nil, err
	}
	r.Seconds, r.Slab = d.Seconds, slabBytes()-slab
	if r.After, err = rig.RSS(pid); err != nil {
		return nil, err
	}
	clock := rig.ProcessClock(pid)
	cpu := rig.CPU(clock)
	select {
	case <-ctx.Done():
		return nil, ctx.Err()
	case <-time.After(settle):
	}
	r.CPU = (rig.CPU(clock) - cpu).Seconds() / settle.Seconds()
	r.Settled, err = rig.RSS(pid)
	r.Load = rig.Load()
	return r, err
}

// mostPairs is how many connections a process may have through it: each takes two
// files, and some are used otherwise.
func mostPairs() int {
	var l unix.Rlimit
	if unix.Getrlimit(unix.RLIMIT_NOFILE, &l) != nil {
		return 0
	}
	return int(l.Max-200) / 2
}

func slabBytes() int64 {
	b, err := os.ReadFile("/proc/meminfo")
	if err != nil {
		return 0
	}
	for line := range strings.SplitSeq(string(b), "\n") {
		var kib int64
		if n, _ := fmt.Sscanf(line, "Slab: %d kB", &kib); n == 1 {
			return kib << 10
		}
	}
	return 0
}

func (r *idleReport) String() string {
	var b strings.Builder
	fmt.Fprintf(&b, "%s\nload averages %s\n", r.Machine, r.Load)
	if r.Connections < r.Wanted {
		fmt.Fprintf(&b, "%d of %d connections: a process here may have no more files\n", r.Connections, r.Wanted)
	}
	mib := func(n uint64) float64 { return float64(n) / (1 << 20) }
	fmt.Fprintf(&b, "%d idle connections, opened in %.1f s\n", r.Connections, r.Seconds)
	fmt.Fprintf(&b, "  the proxy's RSS: %.1f MiB before, %.1f after, %.1f later; %.2f KiB each\n", mib(r.Before), mib(r.After), mib(r.Settled),
		(float64(r.Settled)-float64(r.Before))/float64(r.Connections)/1024)
	fmt.Fprintf(&b, "  kernel's slab: %.2f KiB for each, of all four sockets\n", float64(r.Slab)/float64(r.Connections)/1024)
	fmt.Fprintf(&b, "  the proxy's CPU while idle: %.2f %% of a core\n", 100*r.CPU)
	return b.String()
}

func (r *idleReport) problem() error { return nil }
