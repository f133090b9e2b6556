package agent

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"go.uber.org/zap"

	"portcullis/bpf/abi"
	"portcullis/datapath"
	"portcullis/datapath/netdev"
	"portcullis/observe/flow"
	"portcullis/observe/metrics"
	proc "portcullis/observe/process" // process is a word of this package
)

// Callers are the settings of who is seen to have a connection.
type Callers struct {
	// See: flow records tell which process opened or accepted the connection.
	See bool
	// Arguments of processes are recorded too. They may hold secrets.
	Arguments bool
	// Cgroup is a directory in a cgroup2; who is in it and below it is seen. "":
	// all processes of the node.
	Cgroup string
}

func (c *Callers) validate() (errs []error) {
	if c.Cgroup != "" && !filepath.IsAbs(c.Cgroup) {
		errs = append(errs, fmt.Errorf("--process-cgroup %q: want an absolute path", c.Cgroup))
	}
	if !c.See && (c.Arguments || c.Cgroup != "") {
		errs = append(errs, errors.New("--process-arguments and --process-cgroup without --processes: nothing of processes is recorded"))
	}
	return errs
}

// callers know which process has a connection. It is evidence for people: no
// verdict rests on it, and without it all goes on. Safe for concurrent use; nil:
// nobody knows.
type callers struct {
	kernel *datapath.Processes
	table  *proc.Table
	alarm  callersAlarm
}

// callersAlarm is the alarm processes: of what cannot be seen for as long as the
// agent runs, and of what just fails. Used by one goroutine at a time.
type callersAlarm struct {
	alarms  *alarms
	lacking []string // that lasts
	failing bool
}

// lacks tells of what lasts.
func (a *callersAlarm) lacks(text string) {
	a.lacking = append(a.lacking, text)
	a.stand()
}

func (a *callersAlarm) stand() { a.alarms.raise("processes", strings.Join(a.lacking, "; ")) }

func (a *callersAlarm) fails(err error) {
	a.failing = true
	a.alarms.raise("processes", strings.Join(append(slices.Clone(a.lacking), fmt.Sprintf("flow records do not tell of processes: %v", err)), "; "))
}

// works ends what failed; what is lacking stands.
func (a *callersAlarm) works() {
	if !a.failing {
		return
	}
	if a.failing = false; len(a.lacking) > 0 {
		a.stand()
		return
	}
	a.alarms.clear("processes")
}

// openCallers begins to look at processes. A node where that cannot be seen is
// told of by an alarm.
func (l *loop) openCallers() {
	if !l.cfg.Callers.See || l.monitors.ring == nil {
		return
	}
	kernel, err := datapath.OpenProcesses(datapath.ProcessConfig{Cgroup: l.cfg.Callers.Cgroup, Arguments: l.cfg.Callers.Arguments})
	if err != nil {
		l.alarms.raise("processes", fmt.Sprintf("flow records do not tell of processes: %v", err))
		l.log.Warn("flow records do not tell of processes", zap.Error(err))
		return
	}
	c := &callers{kernel: kernel, alarm: callersAlarm{alarms: l.alarms}}
	if missing := kernel.Missing(); len(missing) > 0 {
		c.alarm.lacks("flow records do not tell " + strings.Join(missing, ", nor "))
	}
	c.table = proc.New(proc.Options{Node: string(l.cfg.Node), Wall: l.wall, Arguments: l.cfg.Callers.Arguments,
		Namespace: func(pid uint32) (uint64, int, bool) {
			cookie, number, err := netdev.NamespaceOf(pid)
			return cookie, number, err == nil
		},
		Behind: func(endpoint uint32) (int, bool) {
			number, err := netdev.NamespaceBehind(l.names.Endpoint(endpoint).Ifindex)
			return number, err == nil
		},
		CatchUp: func() { _ = c.kernel.Read(c.table.Note) }}) // an error comes to watchCallers, too
	l.callers = c
}

// watchCallers looks at who has which socket, and then notes what the kernel
// tells as soon as it does, for a process may end at once. It returns when ctx
// ends.
func (l *loop) watchCallers(ctx context.Context) error {
	if l.callers == nil {
		return nil
	}
	if err := l.callers.kernel.Scan(l.callers.table.Note); err != nil {
		l.callers.alarm.lacks(fmt.Sprintf("flow records do not tell of processes whose connections began before the agent: %v", err))
	}
	for {
		err := l.callers.kernel.Wait(ctx)
		if ctx.Err() != nil {
			return ctx.Err()
		}
		if err == nil {
			err = l.callers.kernel.Read(l.callers.table.Note)
		}
		if err == nil {
			l.callers.alarm.works()
			continue
		}
		l.callers.alarm.fails(err)
		select {
		case <-time.After(time.Second):
		case <-ctx.Done():
		}
	}
}

func (l *loop) closeCallers() error {
	if l.callers == nil {
		return nil
	}
	return l.callers.kernel.Close()
}

// calledBy returns the process at the judging endpoint's side of an event, after
// all that the kernel told before that event was heard. It reads files: not to be
// called by the loop.
func (c *callers) calledBy() func(*abi.Event) *flow.Process {
	if c == nil {
		return nil
	}
	return c.table.Of
}

// known does so with what was heard already.
func (c *callers) known() func(*abi.Event) *flow.Process {
	if c == nil {
		return nil
	}
	return c.table.Known
}

// ofRequest returns the process at the endpoint's side of a flow of the proxy's.
func (c *callers) ofRequest(r *flow.Record) *flow.Process {
	if c == nil {
		return nil
	}
	local, peer := r.Local(), r.Peer()
	return c.table.OfRequest(r.Endpoint, netip.AddrPortFrom(local.IP, local.Port), netip.AddrPortFrom(peer.IP, peer.Port), r.Protocol, r.Direction)
}

// collect gives the numbers of /metrics; zeros where nobody looks.
func (c *callers) collect(emit metrics.Emit) {
	var known, gone, lost uint64
	if c != nil {
		known, gone = c.table.Counts()
		lost = c.kernel.Lost()
	}
	emit("portcullis_processes_total", float64(known-gone), "whole")
	emit("portcullis_processes_total", float64(gone), "ended")
	emit("portcullis_process_events_lost_total", float64(lost))
}
