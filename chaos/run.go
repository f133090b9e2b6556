package chaos

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"net/netip"
	"os"
	"sync"
	"time"

	"portcullis/bpf/abi"
	"portcullis/chaos/check"
	"portcullis/chaos/fault"
	"portcullis/chaos/lab"
	"portcullis/datapath"
)

// Check says what is wrong with the options.
func Check(o Options) error {
	_, err := newPlan(o)
	return err
}

// Run runs a scenario and judges it. When ctx ends, the run ends, what was seen
// until then is judged, and the lab is removed all the same. The error says that
// it could not be run, or that the harness failed; a violation is no error.
func Run(ctx context.Context, o Options) (*check.Result, error) {
	p, err := newPlan(o)
	if err != nil {
		return nil, err
	}
	if os.Geteuid() != 0 {
		return nil, errors.New("a chaos run makes network namespaces and loads programs: run it as root")
	}
	fmt.Fprintf(p.Progress, "chaos: %s, evidence %s, faults %v, %d reuses, seed %d: making the lab %s\n", p.scenario.Name, p.Evidence, p.Faults, p.Events, p.Seed, p.Lab)
	w, err := newWorld(ctx, p)
	if err != nil {
		return nil, fmt.Errorf("the lab: %w", err)
	}
	run := check.Run{Scenario: p.scenario.Name, Evidence: p.Evidence, Faults: p.Faults, Seed: p.Seed, Events: p.Events, Nodes: []string{ownerNode, verifierNode, otherNode},
		Begin: now(), Tick: tick, Settle: p.TTL + 3*time.Second}
	before, err := w.drops()
	if err != nil {
		return nil, errors.Join(err, w.down(context.WithoutCancel(ctx)))
	}
	failed := w.play(ctx)
	run.Complete = failed == nil && ctx.Err() == nil && w.enough()
	after, dropsErr := w.drops()
	run.End = now()
	fmt.Fprintf(p.Progress, "chaos: judging\n")
	downErr := w.down(context.WithoutCancel(ctx))
	h := w.rec.history(run, Rules())
	h.Drops = difference(before, after)
	for i := range h.Drops {
		h.Drops[i].Unknown = h.Drops[i].Unknown || w.lost.turn(h.Drops[i].Node) > 0 // it was made anew
	}
	if p.History != nil {
		failed = errors.Join(failed, h.Write(p.History))
	}
	r, err := check.Check(h)
	return r, errors.Join(failed, dropsErr, downErr, err)
}

// play lets everything happen at once, and returns when all of it has ended.
func (w *world) play(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, w.Limit)
	defer cancel()
	var wg sync.WaitGroup
	var mu sync.Mutex
	var errs []error
	run := func(f func(context.Context) error) {
		wg.Go(func() {
			if err := f(ctx); err != nil {
				mu.Lock()
				errs = append(errs, err)
				mu.Unlock()
				cancel() // the run is over
			}
		})
	}
	var slots sync.WaitGroup
	round := newBarrier(w.Parallel)
	for i := range w.Parallel {
		r := w.random()
		slots.Add(1)
		run(func(ctx context.Context) error {
			defer slots.Done()
			defer round.leave()
			return w.slot(ctx, i, r, round)
		})
	}
	fctx, stopFaults := context.WithCancel(ctx)
	locks := newLocks()
	for _, f := range w.faults {
		r := w.random()
		run(func(context.Context) error { return w.cause(fctx, f, r, locks) })
	}
	for _, c := range w.callers {
		r := w.random()
		run(func(context.Context) error { w.call(fctx, c, r); return nil })
	}
	run(func(context.Context) error { w.progress(fctx); return nil })
	slots.Wait()
	stopFaults()
	wg.Wait()
	return errors.Join(errs...)
}

// slot is the life of the workloads on one address of each family.
func (w *world) slot(ctx context.Context, i int, r *rand.Rand, round *barrier) error {
	ips := []netip.Addr{netip.AddrFrom4([4]byte{10, 1, 1, byte(i + 1)}), netip.MustParseAddr(fmt.Sprintf("fd00:1::1:%x", i+1))}
	is := []string{SleepV1, SleepV2}[r.IntN(2)]
	for first := true; ctx.Err() == nil && !w.enough(); first = false {
		if w.scenario.storm {
			round.wait(ctx)
		}
		spec := lab.Workload{Namespace: "default", Name: fmt.Sprintf("w%d-%d", i, w.counter.Add(1)), Node: ownerNode, Labels: map[string]string{"is": is}, IPs: ips}
		turn := w.lost.turn(ownerNode)
		came, err := w.life(ctx, spec, is, i, r)
		if err != nil && ctx.Err() == nil {
			if !w.lost.since(ownerNode, turn) {
				return fmt.Errorf("workload %s: %w", spec.FullName(), err)
			}
			sleep(ctx, 50*time.Millisecond) // its node is not there
		}
		if came == absent {
			continue
		}
		if came == registered && !first {
			w.reused.Add(1)
		}
		is = map[string]string{SleepV1: SleepV2, SleepV2: SleepV1}[is]
	}
	return nil
}

// enough: so many IPs were used again as were asked for, and everything that was
// to break has broken, and was mended, at least once.
func (w *world) enough() bool {
	return int(w.reused.Load()) >= w.Events && int(w.mended.Load()) >= len(w.faults)
}

// presence is what came of a workload.
type presence int

const (
	absent     presence = iota // its node's agent did not take it, which is no error of the run
	imposed                    // it was put there by a rogue owner
	registered                 // it was active
)

// life is one workload's.
func (w *world) life(ctx context.Context, spec lab.Workload, is string, slot int, r *rand.Rand) (came presence, err error) {
	x, err := w.prepare(ctx, spec, is)
	if err != nil {
		return absent, err
	}
	w.target(slot, x.run.IPs)
	if w.rogue.Load() {
		return imposed, w.impose(ctx, x, r)
	}
	if w.scenario.late {
		sleep(ctx, between(r, 0, 100*time.Millisecond))
	}
	if err := w.register(ctx, x); err != nil {
		if ctx.Err() == nil {
			sleep(ctx, 50*time.Millisecond) // its agent is not there
		}
		return absent, w.leave(x)
	}
	// It speaks as soon as it is enforced: in its quarantine, too.
	if err := w.open(ctx, x); err != nil {
		return absent, errors.Join(err, w.leave(x))
	}
	stop := w.speaking(ctx, x)
	if w.scenario.late {
		w.tell(ctx, slot) // of those who had its IPs before
	}
	if err := w.activate(ctx, x); err == nil {
		came = registered
		if w.scenario.late {
			_ = w.registration(ctx, x, lab.RunOptions{NoWait: true}) // once more, and nothing changes
			if x.untold = r.IntN(2) == 0; x.untold {
				w.owe(slot, x)
			}
		}
		w.live(ctx, x, r)
	}
	return came, stop()
}

// impose lets a workload live that no agent was told of.
func (w *world) impose(ctx context.Context, x *present, r *rand.Rand) error {
	if err := w.open(ctx, x); err != nil {
		return errors.Join(err, w.leave(x))
	}
	stop := w.speaking(ctx, x)
	sleep(ctx, between(r, w.scenario.least, w.scenario.most))
	return stop()
}

// speaking lets a workload speak until it is told to leave.
func (w *world) speaking(ctx context.Context, x *present) (leave func() error) {
	ctx, cancel := context.WithCancel(ctx)
	var traffic sync.WaitGroup
	r := w.random()
	traffic.Go(func() { w.speak(ctx, x, r) })
	return func() error {
		cancel()
		err := w.leave(x)
		traffic.Wait()
		return err
	}
}

// live lets the workload be.
func (w *world) live(ctx context.Context, x *present, r *rand.Rand) {
	d := between(r, w.scenario.least, w.scenario.most)
	if !w.scenario.relabels {
		sleep(ctx, d)
		return
	}
	sleep(ctx, d/2)
	to := []string{SleepV1, SleepV2, neither}[r.IntN(3)]
	if err := w.relabel(ctx, x, to); err == nil {
		sleep(ctx, d/2)
	}
}

// relabel changes the workload's labels. Until it has returned both identities
// may be believed; and where a verifier was not reached, the former until the
// end of its lease.
func (w *world) relabel(ctx context.Context, x *present, to string) error {
	c, err := w.lab.Client(x.run.Spec.Node)
	if err != nil {
		return err
	}
	since := now()
	w.rec.set(func() {
		x.note.Names = append(x.note.Names, check.Name{Identity: to, Since: since, Sure: 1<<63 - 1})
	})
	name := &x.note.Names[len(x.note.Names)-1]
	err = relabelCall(ctx, c, x.run.UID.String(), to)
	// With an error it is not known whether it happened: both stay possible.
	if err == nil {
		sure := now() + int64(w.longestLease()) + int64(tick)
		w.rec.set(func() { name.Sure = sure })
	}
	return err
}

// longestLease is the longest that can have been given in this run.
func (w *world) longestLease() time.Duration {
	d := w.TTL
	for _, f := range w.faults {
		d = max(d, f.Lease(w.TTL))
	}
	return d
}

// speak is what a workload that comes and goes says: to who may hear it, and to
// who may not.
func (w *world) speak(ctx context.Context, x *present, r *rand.Rand) {
	var wg sync.WaitGroup
	defer wg.Wait()
	busy := make(chan struct{}, 12) // attempts under way
	for first := true; ctx.Err() == nil; first = false {
		for _, s := range w.serving() {
			ip, from := pick(s.ips, r), netip.Addr{}
			for _, own := range x.run.IPs {
				if own.Is4() == ip.Is4() {
					from = own
				}
			}
			to := netip.AddrPortFrom(ip, ServicePort)
			attempt := func(f func()) {
				select {
				case busy <- struct{}{}:
					wg.Go(func() { defer func() { <-busy }(); f() })
				default:
				}
			}
			attempt(func() { x.udp(from, to) })
			if first { // a conversation as long as its life
				wg.Go(func() { x.tcp(ctx, from, to, 30*time.Millisecond) })
			} else {
				attempt(func() { x.tcp(ctx, from, to, 0) })
			}
		}
		if !sleep(ctx, between(r, 10*time.Millisecond, 40*time.Millisecond)) {
			return
		}
	}
}

func pick(ips []netip.Addr, r *rand.Rand) netip.Addr { return ips[r.IntN(len(ips))] }

// call is what a workload with a policy of its own for what it sends does: it
// calls the IPs that change hands.
func (w *world) call(ctx context.Context, c *standing, r *rand.Rand) {
	var wg sync.WaitGroup
	defer wg.Wait()
	busy := make(chan struct{}, 48)
	for sleep(ctx, between(r, 5*time.Millisecond, 15*time.Millisecond)) {
		ip, ok := w.anyTarget(r)
		if !ok {
			continue
		}
		from := c.ips[0]
		if c.ips[0].Is4() != ip.Is4() {
			from = c.ips[1]
		}
		to := netip.AddrPortFrom(ip, ServicePort)
		select {
		case busy <- struct{}{}:
		default:
			continue
		}
		switch r.IntN(3) {
		case 0:
			wg.Go(func() { defer func() { <-busy }(); c.udp(from, to) })
		case 1:
			wg.Go(func() { defer func() { <-busy }(); c.tcp(ctx, from, to, 0) })
		default:
			wg.Go(func() {
				defer func() { <-busy }()
				ctx, cancel := context.WithTimeout(ctx, 2*time.Second)
				defer cancel()
				c.tcp(ctx, from, to, 30*time.Millisecond)
			})
		}
	}
}

func (w *world) target(slot int, ips []netip.Addr) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.targets[slot] = ips
}

func (w *world) anyTarget(r *rand.Rand) (netip.Addr, bool) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if len(w.targets) < w.Parallel {
		return netip.Addr{}, false
	}
	return pick(w.targets[r.IntN(w.Parallel)], r), true
}

// cause lets one kind of fault happen, again and again.
func (w *world) cause(ctx context.Context, k fault.Kind, r *rand.Rand, locks *locks) error {
	if k.Begin == nil { // it is in the lab's configuration
		f := w.rec.begins(check.Fault{Kind: k.Name, Impairs: k.Impairs, Loses: k.Loses}, w.TTL)
		w.rec.began(f)
		w.mended.Add(1)
		<-ctx.Done()
		return nil
	}
	for first := true; sleep(ctx, w.pause(k, first, r)); first = false {
		nodes := map[fault.Who][][]string{
			fault.Verifier: {{verifierNode}, {otherNode}}, fault.Owner: {{ownerNode}},
			fault.Between: {{ownerNode, verifierNode}, {ownerNode, otherNode}}, fault.Everybody: {{ownerNode, verifierNode, otherNode}},
			fault.Spare: {{otherNode}},
		}[k.Who]
		if err := w.happen(ctx, k, nodes[r.IntN(len(nodes))], r, locks); err != nil {
			return fmt.Errorf("fault %s: %w", k.Name, err)
		}
		if first && ctx.Err() == nil {
			sleep(ctx, w.TTL) // to see what comes after
			w.mended.Add(1)
		}
	}
	return nil
}

// pause is how long nothing happens before a fault: after one whose end includes a
// wait for every lease that can be, until that is over, or nobody would ever get
// an IP again.
func (w *world) pause(k fault.Kind, first bool, r *rand.Rand) time.Duration {
	d := between(r, w.TTL/2, 2*w.TTL)
	if k.Waits && !first {
		d += fault.MaxLease + fault.MaxLease/4 + 10*w.TTL
	}
	return d
}

func (w *world) happen(ctx context.Context, k fault.Kind, nodes []string, r *rand.Rand, locks *locks) error {
	release := locks.take(k.Takes, nodes)
	defer release()
	if ctx.Err() != nil {
		return nil
	}
	said := check.Fault{Kind: k.Name, Nodes: nodes, Silent: k.Silent, Impairs: k.Impairs, Loses: k.Loses, Rogue: k.Rogue, Lease: k.Lease(w.TTL)}
	if k.Who == fault.Everybody {
		said.Nodes = nil
	}
	f := w.rec.begins(said, w.TTL)
	if k.Remakes {
		if err := w.lose(nodes); err != nil {
			return err
		}
	}
	end, err := k.Begin(ctx, w.lab, nodes)
	if err != nil {
		w.rec.forget(f)
		return err
	}
	w.rec.began(f)
	if k.Rogue {
		w.rogue.Store(true)
	}
	least, most := k.Lasts(w.TTL)
	sleep(ctx, between(r, least, most))
	if k.Rogue {
		w.rogue.Store(false)
	}
	w.rec.set(func() { f.To = now() })
	err = end(context.WithoutCancel(ctx))
	if err == nil && k.Remakes {
		err = w.found(context.WithoutCancel(ctx), nodes)
	}
	w.rec.set(func() { f.Ended = now() })
	return err
}

// progress says each second how far it is.
func (w *world) progress(ctx context.Context) {
	begin := time.Now()
	for sleep(ctx, time.Second) {
		messages, received, faults := w.rec.counts()
		fmt.Fprintf(w.Progress, "chaos: %3ds  %d of %d reuses, %d messages, %d received, %d faults at work\n",
			int(time.Since(begin).Seconds()), w.reused.Load(), w.Events, messages, received, faults)
	}
}

// drops reads what the nodes have counted, from the pinned maps: no agent is
// asked.
func (w *world) drops() (out []check.Drops, err error) {
	for _, n := range []string{ownerNode, verifierNode, otherNode} {
		v, err := datapath.OpenView(w.lab.PinDir(n))
		if err != nil {
			return nil, fmt.Errorf("the counters of node %s: %w", n, err)
		}
		d := check.Drops{Node: n, Dropped: map[string]uint64{}}
		for direction := range abi.DirMax {
			for reason := range abi.ReasonMax {
				// What is held and then refused was counted as held: the
				// rest of its story is the agent's.
				for verdict, name := range map[abi.Verdict]string{abi.VerdictDrop: reason.String(), abi.VerdictHold: "held"} {
					packets, perr := v.Packets(datapath.CounterKey{Direction: direction, Verdict: verdict, Reason: reason})
					err = errors.Join(err, perr)
					if packets > 0 {
						d.Dropped[name] += packets
					}
				}
			}
		}
		if err = errors.Join(err, v.Close()); err != nil {
			return nil, err
		}
		out = append(out, d)
	}
	return out, nil
}

func difference(before, after []check.Drops) (out []check.Drops) {
	for i, d := range after {
		x := check.Drops{Node: d.Node, Dropped: map[string]uint64{}}
		for reason, n := range d.Dropped {
			if n < before[i].Dropped[reason] {
				x.Unknown = true // they began anew
			} else if n -= before[i].Dropped[reason]; n > 0 {
				x.Dropped[reason] = n
			}
		}
		out = append(out, x)
	}
	return out
}
