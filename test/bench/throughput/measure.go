package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"portcullis/test/bench/rig"
)

// profileSlices are run with the kernel's statistics on.
const profileSlices = 5

// sample is what some slices of one side did.
type sample struct {
	sent, received int64
	wall           time.Duration
	sender, recver time.Duration // CPU
	softirq        time.Duration // CPU of the softirq threads of both cores
	agents         time.Duration // CPU
}

func (s *sample) add(o sample) {
	s.sent += o.sent
	s.received += o.received
	s.wall += o.wall
	s.sender += o.sender
	s.recver += o.recver
	s.softirq += o.softirq
	s.agents += o.agents
}

func (s sample) rate() float64 { return float64(s.received) / s.wall.Seconds() }

// cpu returns nanoseconds per operation, of sender and receiver.
func (s sample) cpu() float64 {
	return float64(s.sender+s.softirq)/float64(s.sent) + float64(s.recver)/float64(s.received)
}

func (s sample) agentsCPU() float64 { return float64(s.agents) / float64(s.received) }

// measure runs the pairs of one kind of traffic on one path.
func (f *fixture) measure(ctx context.Context, o options, k, path string, s sides) (r *result, err error) {
	r = &result{Traffic: k, Path: path, Unit: kinds[k].unit, Target: kinds[k].target, LoadBefore: rig.Load()}
	before, err := f.drops(ctx)
	if err != nil {
		return nil, err
	}
	with, err := kinds[k].open(f.l, s.with, o.recver)
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, with.stop()) }()
	without, err := kinds[k].open(f.l, s.without, o.recver)
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, without.stop()) }()
	clocks, err := f.clocks(o)
	if err != nil {
		return nil, err
	}
	// Caches, route lookups, TCP's windows: not measured.
	for _, side := range []*flow{with, without} {
		if _, err := f.slice(o, side, clocks); err != nil {
			return nil, err
		}
	}
	for p := range o.pairs {
		var one pair
		for i := range o.slices {
			turns := []struct {
				flow *flow
				sum  *sample
			}{{with, &one.with}, {without, &one.without}}
			if (p+i)%2 == 1 {
				turns[0], turns[1] = turns[1], turns[0]
			}
			for _, t := range turns {
				if err := ctx.Err(); err != nil {
					return nil, err
				}
				got, err := f.slice(o, t.flow, clocks)
				if err != nil {
					return nil, err
				}
				t.sum.add(got)
			}
		}
		if one.with.received == 0 || one.without.received == 0 {
			return nil, errors.New("nothing arrives")
		}
		r.pairs = append(r.pairs, one)
	}
	if r.Programs, err = f.profile(o, with, clocks); err != nil {
		return nil, err
	}
	after, err := f.drops(ctx)
	if err != nil {
		return nil, err
	}
	r.Drops, r.LoadAfter = after-before, rig.Load()
	r.summarize()
	return r, nil
}

// slice lets one side send for a while, and waits until all has arrived.
func (f *fixture) slice(o options, x *flow, c clocks) (s sample, err error) {
	recver := rig.ThreadClock(x.tid)
	before, beforeRecver, beforeSoftirq, beforeAgents := x.received.Load(), rig.CPU(recver), rig.CPU(c.softirq...), rig.CPU(c.agents...)
	err = f.l.InWorkload(x.client, func() error {
		if err := pin(o.sender); err != nil {
			return err
		}
		self := rig.ThreadClock(unix.Gettid())
		begin, cpu := time.Now(), rig.CPU(self)
		for s.wall < o.slice {
			for range x.batch {
				n, err := x.send()
				if err != nil {
					return err
				}
				s.sent += int64(n)
			}
			s.wall = time.Since(begin)
		}
		s.sender = rig.CPU(self) - cpu
		return nil
	})
	if err != nil {
		return s, err
	}
	x.drain(before + s.sent)
	s.received = x.received.Load() - before
	s.recver, s.softirq, s.agents = rig.CPU(recver)-beforeRecver, rig.CPU(c.softirq...)-beforeSoftirq, rig.CPU(c.agents...)-beforeAgents
	return s, nil
}

// drain waits until the receiver has what was sent, or gets no more of it:
// datagrams may be lost.
func (f *flow) drain(want int64) {
	last, since := f.received.Load(), time.Now()
	for last < want && time.Since(since) < wake {
		time.Sleep(time.Millisecond)
		if n := f.received.Load(); n != last {
			last, since = n, time.Now()
		}
	}
}

// clocks are CPU clocks of other threads.
type clocks struct{ softirq, agents []int32 }

func (f *fixture) clocks(o options) (c clocks, err error) {
	for _, pid := range f.agents {
		c.agents = append(c.agents, rig.ProcessClock(pid))
	}
	names, err := filepath.Glob("/proc/[0-9]*/comm")
	if err != nil {
		return c, err
	}
	for _, name := range names {
		b, err := os.ReadFile(name)
		core, ok := strings.CutPrefix(strings.TrimSpace(string(b)), "ksoftirqd/")
		if err != nil || !ok || core != strconv.Itoa(o.sender) && core != strconv.Itoa(o.recver) {
			continue
		}
		pid, err := strconv.Atoi(strings.Split(name, "/")[2])
		if err != nil {
			return c, err
		}
		c.softirq = append(c.softirq, rig.ProcessClock(pid))
	}
	if len(c.softirq) == 0 {
		// In a container the host's threads cannot be seen.
		fmt.Fprintln(os.Stderr, "throughput: softirq threads are not visible here; their CPU is not counted")
	}
	return c, nil
}
