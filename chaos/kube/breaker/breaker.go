package breaker

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"portcullis/chaos/kube/talk"
)

// Options say what is broken, and for how long.
type Options struct {
	// Cut are TCP ends to which nothing is sent any more: no packet to such an
	// address and port, and, of AgentPort, none from it either.
	Cut []netip.AddrPort
	// Signal is sent to the node's agent: 0 for none. After SIGSTOP, SIGCONT
	// follows at the end.
	Signal unix.Signal
	// After is how long it waits first, so that those who watch the pod have seen
	// it run before they can see nothing any more.
	After time.Duration
	For   time.Duration // it lasts; at most MaxFor
}

const (
	// AgentPort is where agents listen.
	AgentPort = 4260
	// MaxFor bounds how long something stays broken.
	MaxFor = 10 * time.Minute
	// prefCut is before the main table, and after the one of local addresses.
	prefCut = 4260
)

// Run breaks what o says, waits, and restores it: also when ctx ends first. What
// could not be broken wholly is restored at once.
func Run(ctx context.Context, o Options, out io.Writer) error {
	if o.For < 0 || o.For > MaxFor || o.After < 0 || o.After > MaxFor || len(o.Cut) == 0 && o.Signal == 0 {
		return fmt.Errorf("want something to break, for at most %v", MaxFor)
	}
	boot, err := talk.Boot()
	if err != nil {
		return err
	}
	if !talk.Sleep(ctx, o.After) {
		return ctx.Err()
	}
	w := talk.NewWriter(out)
	w.Write(talk.Record{Kind: talk.Breaking, At: talk.Now(), Boot: boot})
	restore, err := o.begin()
	if err != nil {
		return errors.Join(err, restore(), w.Err())
	}
	w.Write(talk.Record{Kind: talk.Broken, At: talk.Now()})
	talk.Sleep(ctx, o.For)
	w.Write(talk.Record{Kind: talk.Restoring, At: talk.Now()})
	if err := restore(); err != nil {
		return errors.Join(err, w.Err())
	}
	w.Write(talk.Record{Kind: talk.Restored, At: talk.Now()})
	return w.Err()
}

// begin returns what ends it, never nil.
func (o Options) begin() (restore func() error, err error) {
	var undo []func() error
	restore = func() error {
		var errs []error
		for _, f := range undo {
			errs = append(errs, f())
		}
		return errors.Join(errs...)
	}
	for _, r := range rules(o.Cut) {
		// One of an earlier fault that was killed (and so could not restore) goes
		// with this one.
		if err := netlink.RuleAdd(r); err != nil && !errors.Is(err, unix.EEXIST) {
			return restore, fmt.Errorf("cut %v: %w", r.Dst, err)
		}
		undo = append(undo, func() error { return netlink.RuleDel(r) })
	}
	if o.Signal == 0 {
		return restore, nil
	}
	pids, err := agents("/proc")
	if err != nil {
		return restore, err
	}
	if len(pids) == 0 {
		return restore, errors.New("no agent runs on this node, or its processes cannot be seen from here")
	}
	for _, pid := range pids {
		// By a descriptor, so that nobody is continued who got its number later.
		fd, err := unix.PidfdOpen(pid, 0)
		if err != nil {
			return restore, fmt.Errorf("agent %d: %w", pid, err)
		}
		undo = append(undo, func() error { return unix.Close(fd) })
		if err := unix.PidfdSendSignal(fd, o.Signal, nil, 0); err != nil {
			return restore, fmt.Errorf("signal agent %d: %w", pid, err)
		}
		if o.Signal == unix.SIGSTOP {
			undo = slices.Insert(undo, 0, func() error {
				if err := unix.PidfdSendSignal(fd, unix.SIGCONT, nil, 0); err != nil && !errors.Is(err, unix.ESRCH) {
					return fmt.Errorf("continue agent %d: %w", pid, err)
				}
				return nil
			})
		}
	}
	return restore, nil
}

// rules drop, in silence, what the node itself sends. A change of rules ends the
// kernel's cached routes, also those of open sockets. Packets of pods are none
// of the node's own, and pass.
func rules(ends []netip.AddrPort) (out []*netlink.Rule) {
	for _, e := range ends {
		port := netlink.NewRulePortRange(e.Port(), e.Port())
		for _, from := range []bool{false, true} {
			if from && e.Port() != AgentPort {
				continue
			}
			r := netlink.NewRule()
			r.Family, r.Priority, r.Type, r.IPProto = unix.AF_INET, prefCut, unix.RTN_BLACKHOLE, unix.IPPROTO_TCP
			if e.Addr().Is6() {
				r.Family = unix.AF_INET6
			}
			bits := e.Addr().BitLen()
			r.Dst = &net.IPNet{IP: e.Addr().AsSlice(), Mask: net.CIDRMask(bits, bits)}
			if from {
				r.Sport = port
			} else {
				r.Dport = port
			}
			out = append(out, r)
		}
	}
	return out
}

// agents are the processes of this node's agent: of a program called portcullis,
// with the argument agent.
func agents(proc string) (pids []int, err error) {
	entries, err := os.ReadDir(proc)
	if err != nil {
		return nil, err
	}
	for _, e := range entries {
		pid, err := strconv.Atoi(e.Name())
		if err != nil {
			continue
		}
		line, err := os.ReadFile(filepath.Join(proc, e.Name(), "cmdline"))
		if err != nil {
			continue // it has ended
		}
		args := bytes.Split(line, []byte{0})
		if len(args) > 1 && filepath.Base(string(args[0])) == "portcullis" && string(args[1]) == "agent" {
			pids = append(pids, pid)
		}
	}
	return pids, nil
}
