package agent

import (
	"context"
	"errors"
	"os/exec"
	"slices"
	"testing"
	"time"

	"portcullis/bpf/abi"
	"portcullis/datapath"
	"portcullis/identity"
	"portcullis/ipcache/lease"
)

// sandbox starts a process that waits to be killed.
func sandbox(t *testing.T) *exec.Cmd {
	t.Helper()
	cmd := exec.Command("sleep", "1000")
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { end(cmd) })
	return cmd
}

func end(cmd *exec.Cmd) {
	_ = cmd.Process.Kill() // fails if it ended before
	_ = cmd.Wait()
}

// watching runs the watch over processes until stop.
func watching(t *testing.T, l *loop) (stop func()) {
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() {
		done <- l.processes.run(ctx, func(uid identity.UID, p process) { l.post(func() { l.processEnded(uid, p) }) })
	}()
	return func() {
		t.Helper()
		cancel()
		if err := <-done; err != nil {
			t.Error(err)
		}
	}
}

// inboxUntil carries out what comes in until done, or ten seconds.
func inboxUntil(l *loop, done func() bool) {
	deadline := time.After(10 * time.Second)
	for !done() {
		select {
		case f := <-l.inbox:
			f()
		case <-deadline:
			return
		}
	}
}

// The end of the process that a workload was registered with ends the
// workload, and nobody else's does.
func TestWorkloadEndsWithItsProcess(t *testing.T) {
	n := newNode(t)
	l := n.mustStart()
	defer n.crash(l)
	stop := watching(t, l)
	defer stop()
	var cmds []*exec.Cmd
	var endpoints []*endpoint
	for i, ifname := range []string{"a0", "b0"} {
		n.veth(ifname)
		cmds = append(cmds, sandbox(t))
		w := app(ifname, []string{"10.1.1.2", "10.1.1.3"}[i])
		w.process.PID = cmds[i].Process.Pid
		endpoints = append(endpoints, n.run(l, w))
	}
	end(cmds[0])
	inboxUntil(l, func() bool { return len(l.endpoints) == 1 })
	if l.endpoints[endpoints[0].uid] != nil || n.inKernel(l, "a0").State != uint32(abi.EPClosed) {
		t.Error("the workload whose process ended is still there")
	}
	if l.endpoints[endpoints[1].uid] == nil || n.inKernel(l, "b0").State != uint32(abi.EPActive) {
		t.Error("the other one ended with it")
	}
	// Deregistered by somebody else first: nothing of the watch is left.
	if _, err := l.deregister(endpoints[1].uid); err != nil {
		t.Fatal(err)
	}
	if left := len(l.processes.watch); left != 0 {
		t.Errorf("%d processes are still watched", left)
	}
}

// A process that is not there, or a thread, is nobody's.
func TestRegisterRefusesEndedProcesses(t *testing.T) {
	n := newNode(t)
	n.veth("a0")
	l := n.mustStart()
	defer n.crash(l)
	cmd := sandbox(t)
	end(cmd)
	zombie := sandbox(t)
	if err := zombie.Process.Kill(); err != nil { // not waited for
		t.Fatal(err)
	}
	for name, p := range map[string]process{"ended": {PID: cmd.Process.Pid}, "zombie": {PID: zombie.Process.Pid}, "another": {PID: sandbox(t).Process.Pid, Start: 1}} {
		w := app("a0", "10.1.1.2")
		w.process = p
		var err error
		for deadline := time.Now().Add(10 * time.Second); time.Now().Before(deadline); {
			if _, err = n.register(l, w); err != nil {
				break
			}
			if _, err := l.deregister(w.uid); err != nil { // it was not dead yet
				t.Fatal(err)
			}
		}
		if !errors.Is(err, errNoProcess) || len(l.endpoints) != 0 || len(l.processes.watch) != 0 {
			t.Errorf("%s: %v, want %v and nothing left", name, err, errNoProcess)
		}
	}
}

// An agent that comes back watches again, and only over the same process.
func TestProcessIsWatchedAfterARestart(t *testing.T) {
	n := newNode(t)
	n.veth("a0")
	l := n.mustStart()
	cmd := sandbox(t)
	w := app("a0", "10.1.1.2")
	w.process.PID = cmd.Process.Pid
	e := n.run(l, w)
	started := e.process
	n.crash(l)

	l = n.mustStart()
	defer n.crash(l)
	stop := watching(t, l)
	defer stop()
	adopted := l.endpoints[e.uid]
	if adopted == nil || adopted.state != abi.EPActive || adopted.process != started || started.Start == 0 {
		t.Fatalf("adopted: %+v, want process %+v", adopted, started)
	}
	end(cmd)
	inboxUntil(l, func() bool { return len(l.endpoints) == 0 })
	if ep := n.inKernel(l, "a0"); ep.State != uint32(abi.EPClosed) {
		t.Errorf("state %d, want closed", ep.State)
	}
}

// A workload that ended while no agent ran, in any of the ways that there are:
// the agent that comes back knows before it says anything to anybody, ends its
// binding in the journal, and revokes what was granted on it.
func TestWorkloadEndsWhileNoAgentRuns(t *testing.T) {
	for name, ends := range map[string]func(*node, *exec.Cmd, *endpoint){
		"device gone": func(n *node, _ *exec.Cmd, _ *endpoint) { n.unplug("a0") },
		"tombstone": func(n *node, _ *exec.Cmd, e *endpoint) {
			if err := datapath.Tombstone(n.cfg.PinDir, e.ips[0], e.uid); err != nil {
				n.t.Fatal(err)
			}
		},
		"process ended": func(_ *node, cmd *exec.Cmd, _ *endpoint) { end(cmd) },
		"process ended, its number given again": func(n *node, _ *exec.Cmd, e *endpoint) {
			// As far as the agent can tell: the record names another start.
			e.process.Start--
			if err := (&store{workloads: n.cfg.JournalDir + "/workloads", boot: n.boot}).putWorkload(e); err != nil {
				n.t.Fatal(err)
			}
		},
	} {
		t.Run(name, func(t *testing.T) {
			n := newNode(t)
			n.veth("a0")
			n.veth("b0")
			l := n.mustStart()
			cmd := sandbox(t)
			w := app("a0", "10.1.1.2")
			w.process.PID = cmd.Process.Pid
			e := n.run(l, w)
			v := &verifier{n: n, boot: identity.BootID{'v'}}
			v.greet(l)
			b := v.confirm(e.ips[0])
			held := v.held(b)
			n.boot = l.boot
			n.crash(l)
			ends(n, cmd, e)

			l = n.mustStart()
			defer n.crash(l)
			n.connect(l)
			if len(l.endpoints) != 0 || len(l.processes.watch) != 0 {
				t.Error("it was taken over")
			}
			if _, ok := l.table.Get(b.IP); ok {
				t.Error("its local binding stands")
			}
			l.begin()
			ended := slices.ContainsFunc(l.owner.(*lease.Owner).Records(), func(r lease.Record) bool {
				return r.Kind == lease.RecordEnded && r.IP == b.IP
			})
			if !ended {
				t.Error("the journal does not know of its end")
			}
			// Its IP's next holder waits for the lease, and for no more.
			newcomer, err := n.register(l, app("b0", "10.1.1.2"))
			if err != nil {
				t.Fatal(err)
			}
			if l.tick(); newcomer.state != abi.EPQuarantined {
				t.Error("the IP was given away while a lease on its former holder may run")
			}
			if w := v.greet(l, held); len(w.Stands) != 0 || len(w.Revoked) != 1 {
				t.Errorf("%+v, want it revoked", w)
			}
			v.message(lease.Ack{IP: b.IP, Generation: b.Generation})
			tickUntil(l, func() bool { return newcomer.state == abi.EPActive })
			if newcomer.state != abi.EPActive {
				t.Errorf("the newcomer is %v after the lease ended", newcomer.state)
			}
		})
	}
}
