package demo

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"strings"
	"sync"
	"time"

	"portcullis/agent/api"
	"portcullis/bpf/abi"
	"portcullis/chaos/lab"
	"portcullis/datapath"
)

// Step 5: faults of the verifier's agent. It has two nodes of the lease lab to
// itself and goes on beside the other steps; it is told after them.
const (
	ownerNode    = "four"
	verifierNode = "five"
	ledgerPort   = 5000
	postPort     = 6000
)

// faults is one telling of step 5.
type faults struct {
	*story    // its own; merged when it has ended
	l         *lab.Lab
	text      bytes.Buffer
	agentBack chan struct{} // closed when the killed agent has returned, or never will
	back      func()        // closes it
	done      chan struct{} // closed at the end; the story and err may be read then
	err       error

	ledger, teller, victim lab.Running
	talk                   *conversation
}

// startFaults begins step 5; it ends early with ctx.
func startFaults(ctx context.Context, l *lab.Lab) *faults {
	f := &faults{story: &story{}, l: l, agentBack: make(chan struct{}), done: make(chan struct{})}
	f.back = sync.OnceFunc(func() { close(f.agentBack) })
	f.out = &f.text
	go func() {
		defer close(f.done)
		defer f.back()
		f.err = f.run(ctx)
	}()
	return f
}

func (f *faults) run(ctx context.Context) error {
	f.say("\n5. The agent of the server's node is killed, and then stopped. Only tellers may use the ledger\n" +
		"   (agent-faults-policies.yaml); one of them talks to it all the time on one connection, a request every 100 ms.")
	var err error
	for name, to := range map[string]*lab.Running{"ledger": &f.ledger, "teller": &f.teller, "teller-2": &f.victim} {
		if *to, err = f.l.Get(name); err != nil {
			return err
		}
	}
	if err := f.l.ImportPoliciesAt(ctx, verifierNode, policyFile("agent-faults-policies.yaml")); err != nil {
		return err
	}
	addr := netip.AddrPortFrom(f.ledger.IP4(), ledgerPort)
	for _, from := range []string{"teller", "teller-2"} { // both are known to the verifier then
		if err := waitServing(ctx, f.l, from, addr); err != nil {
			return err
		}
	}
	if f.talk, err = converse(f.l, "teller", addr); err != nil {
		return err
	}
	defer f.talk.stop()
	if err := f.killed(ctx); err != nil {
		return err
	}
	return f.stopped(ctx)
}

// promise is what the verifier's kernel holds of the teller's lease, read from
// the pins: no agent is needed for it.
type promise struct {
	view   *datapath.View
	stored int64 // deadline in `leases`, CLOCK_BOOTTIME ns
}

// end is when the lease ends: deadlines are stored earlier, by as much as the
// programs' clock may be late.
func (p *promise) end() int64 { return p.stored + int64(datapath.ClockTick) }

// staleDrops counts, in the kernel, packets for workloads of the verifier's
// node whose sender's lease had ended.
func (p *promise) staleDrops() (uint64, error) {
	return p.view.Packets(datapath.CounterKey{Direction: abi.DirIngress, Verdict: abi.VerdictDrop, Reason: abi.ReasonStaleLease})
}

func (f *faults) promise() (*promise, error) {
	v, err := datapath.OpenView(f.l.PinDir(verifierNode))
	if err != nil {
		return nil, err
	}
	p := &promise{view: v}
	slot, err := v.Binding(f.teller.IP4())
	if err == nil {
		p.stored, err = v.Deadline(slot.Lease)
	}
	if err == nil && p.stored <= datapath.Now() {
		err = errors.New("the lease had ended before: there is nothing to see")
	}
	if err != nil {
		return nil, errors.Join(err, v.Close())
	}
	return p, nil
}

// killed is the first half: SIGKILL, an impostor, and the return.
func (f *faults) killed(ctx context.Context) error {
	if err := f.l.KillAgent(ctx, verifierNode); err != nil {
		return err
	}
	began := datapath.Now()
	p, err := f.promise()
	if err != nil {
		return err
	}
	defer p.view.Close()

	// The owner lives: it gives the other teller's IP to somebody else when it
	// may.
	if _, err := f.l.Delete(ctx, f.victim.Spec.FullName()); err != nil {
		return err
	}
	clerk := lab.Workload{Name: "clerk", Node: ownerNode, IPs: f.victim.IPs, Labels: map[string]string{"app": "clerk"}}
	impostor, err := f.l.Run(ctx, clerk, lab.RunOptions{NoWait: true})
	if err != nil {
		return err
	}
	knock := f.knock(impostor)
	defer knock.stop()

	f.do(Step{Name: "5. killed: until the lease ends", Mode: "lease", Expected: "answered until the lease ends, then " + expectDrop("stale-lease"),
		Does: "the agent is killed (SIGKILL); what is in the kernel goes on judging, and its deadline stands"},
		func(st *Step) error { return f.untilTheEnd(ctx, p, began, st) })
	if err := waitActive(ctx, f.l, impostor); err != nil {
		return err
	}
	active := datapath.Now()
	if err := waitFor(ctx, "the impostor's calls", func() bool { return knock.since(active) >= 5 }); err != nil {
		return err
	}
	return f.returned(ctx, p, knock, impostor, active)
}

func (f *faults) untilTheEnd(ctx context.Context, p *promise, began int64, st *Step) error {
	before, err := p.staleDrops()
	if err != nil {
		return err
	}
	var after uint64
	if err := waitFor(ctx, "drops after the lease's end", func() bool {
		after, err = p.staleDrops()
		return err != nil || after > before && datapath.Now() > p.end()+int64(time.Second)
	}); err != nil {
		return err
	}
	if err != nil {
		return err
	}
	st.Reason = abi.ReasonStaleLease.String()
	first, firstAnswered := f.talk.count(began, p.end()-int64(time.Second))
	late, lateAnswered := f.talk.count(p.end(), datapath.Now())
	left := time.Duration(p.end() - began)
	st.Observed = fmt.Sprintf("%d of %d requests answered in the first %.1f of the %.1f s that were left of the lease, %d of %d after its end", firstAnswered, first, (left - time.Second).Seconds(), left.Seconds(), lateAnswered, late)
	st.Detail = fmt.Sprintf("pinned counters of node %s: %d packets dropped (%s), with no agent", verifierNode, after-before, st.Reason)
	st.OK = first > 0 && firstAnswered == first && late > 0 && lateAnswered == 0
	return nil
}

// returned brings the agent back and looks at what became of the connection,
// and of the impostor.
func (f *faults) returned(ctx context.Context, p *promise, knock *knocking, impostor lab.Running, active int64) error {
	f.do(Step{Name: "5. killed: the return", Mode: "lease", Expected: answered + ", on the same connection",
		Does: "the agent is started again"},
		func(st *Step) error {
			dead := f.talk.answersSince(p.end())
			if err := f.l.StartAgent(ctx, verifierNode); err != nil {
				return err
			}
			f.back()
			if err := f.resumes(ctx, datapath.Now()); err != nil {
				return err
			}
			st.Observed, st.OK = answered+", on the same connection", dead == 0
			return nil
		})
	f.back()
	w, err := watchNode(ctx, f.l, verifierNode, &api.MonitorRequest{Prefixes: []string{impostor.IP4().String()}, Verdicts: []string{"drop"}})
	if err != nil {
		return err
	}
	defer w.stop()
	f.do(Step{Name: "5. killed: an impostor", Mode: "lease", Expected: "never admitted (policy-denied by the returned agent)",
		Does: "since the kill a clerk has the IP of a teller that died meanwhile, and calls again and again"},
		func(st *Step) error {
			e := find([]*watch{w}, 5*time.Second, func(e *api.FlowEvent) bool {
				return e.GetSource().GetIp() == impostor.IP4().String() && e.GetDestination().GetPort() == ledgerPort && e.GetReason() == "policy-denied"
			})
			knock.stop()
			if e != nil {
				st.Reason, st.Detail = e.GetReason(), describe(e)
			}
			all, admitted := knock.tries()
			st.Observed = fmt.Sprintf("%d of %d calls admitted, %d of them with its own node's blessing", admitted, all, knock.since(active))
			st.OK = admitted == 0 && st.Reason == "policy-denied"
			return nil
		})
	return ctx.Err()
}

// resumes waits until a request is answered that was not by then.
func (f *faults) resumes(ctx context.Context, since int64) error {
	return waitFor(ctx, "an answer on the open connection", func() bool { return f.talk.answersSince(since) > 0 })
}

// stopped is the second half: SIGSTOP, and the exact time of the last packet
// that was let through.
func (f *faults) stopped(ctx context.Context) error {
	w, err := watchNode(ctx, f.l, verifierNode, &api.MonitorRequest{Prefixes: []string{f.teller.IP4().String()},
		Verdicts: []string{"pass"}, Directions: []string{"ingress"}, Protocols: []string{"UDP"}, Ports: []uint32{postPort}})
	if err != nil {
		return err
	}
	defer w.stop()
	post, err := startPost(f.l, f.teller, f.ledger)
	if err != nil {
		return err
	}
	defer post.stop()
	if err := waitFor(ctx, "letters at the ledger", func() bool { return post.last(0) > 0 }); err != nil {
		return err
	}
	if err := f.l.PauseAgent(ctx, verifierNode); err != nil {
		return err
	}
	paused := datapath.Now()
	p, err := f.promise()
	if err != nil {
		return errors.Join(err, f.l.ResumeAgent(ctx, verifierNode))
	}
	defer p.view.Close()
	f.do(Step{Name: "5. stopped: the last packet", Mode: "lease", Expected: "none later than the deadline in `leases` (stale-lease)",
		Does: "the agent is stopped (SIGSTOP) while the teller sends 500 UDP packets a second, each a flow of its own"},
		func(st *Step) error { return f.lastPacket(ctx, p, w, post, paused, st) })
	f.do(Step{Name: "5. stopped: the return", Mode: "lease", Expected: answered + ", on the same connection",
		Does: "the agent goes on (SIGCONT)"},
		func(st *Step) error {
			if err := f.resumes(ctx, datapath.Now()); err != nil {
				return err
			}
			st.Observed, st.OK = answered+", on the same connection", true
			return nil
		})
	return ctx.Err()
}

// lastPacket lets the agent go on when the lease is long over, and reads from
// the ring what the kernel wrote meanwhile: the time of each verdict.
func (f *faults) lastPacket(ctx context.Context, p *promise, w *watch, post *post, paused int64, st *Step) error {
	resume := sync.OnceValue(func() error { return f.l.ResumeAgent(context.WithoutCancel(ctx), verifierNode) })
	defer resume()
	lostBefore, err := p.view.LostEvents()
	if err != nil {
		return err
	}
	if err := waitFor(ctx, "the lease's end", func() bool { return datapath.Now() > p.end()+int64(time.Second) }); err != nil {
		return err
	}
	drops, err := p.staleDrops()
	if err != nil {
		return err
	}
	resumed := datapath.Now()
	if err := resume(); err != nil {
		return err
	}
	// The ring is read in order: with the first packet of the time after it,
	// all before are there.
	if find([]*watch{w}, 10*time.Second, func(e *api.FlowEvent) bool { return int64(e.GetBootTime()) > resumed }) == nil {
		return errors.New("no packet is let through after the return")
	}
	lost, err := p.view.LostEvents()
	if err != nil {
		return err
	}
	passed, last := w.between(paused, resumed)
	arrived := post.last(resumed)
	st.Reason = abi.ReasonStaleLease.String()
	st.Observed = fmt.Sprintf("the last of %d verdicts to pass came %v before the deadline", passed, time.Duration(p.stored-last).Round(10*time.Microsecond))
	st.Detail = fmt.Sprintf("stamped by the network stack behind the gate: the last packet arrived %v before the lease's end\nevents lost %d; pinned counters: %d drops (%s)",
		time.Duration(p.end()-arrived).Round(10*time.Microsecond), lost-lostBefore+w.lostEvents(), drops, st.Reason)
	st.OK = passed > 100 && last <= p.stored && arrived <= p.end() && lost == lostBefore && w.lostEvents() == 0 && drops > 0
	return nil
}

// waitFor polls until ok, at most 15 s.
func waitFor(ctx context.Context, what string, ok func() bool) error {
	for deadline := time.Now().Add(15 * time.Second); !ok(); {
		if time.Now().After(deadline) {
			return fmt.Errorf("waited in vain for %s", what)
		}
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-time.After(10 * time.Millisecond):
		}
	}
	return nil
}

// merge waits for the end of step 5 and tells it after the others.
func (s *story) merge(f *faults) error {
	<-f.done
	s.say("%s", strings.TrimSuffix(f.text.String(), "\n"))
	s.report.Steps = append(s.report.Steps, f.report.Steps...)
	return f.err
}

// dialIn connects from a workload's namespace.
func dialIn(l *lab.Lab, from string, addr netip.AddrPort, timeout time.Duration) (c net.Conn, err error) {
	err = l.InWorkload(from, func() (err error) { c, err = net.DialTimeout("tcp", addr.String(), timeout); return err })
	return c, err
}
