package fault

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"slices"
	"strings"
	"time"

	"portcullis/chaos/lab"
)

// MaxLease is the longest lease that there is: a constant of the protocol
// (docs/lease-protocol.md), stated here anew since nothing of the judged is
// believed.
const MaxLease = 60 * time.Second

// Who a fault happens to.
type Who int

const (
	// Verifier is a node that judges packets of others' workloads.
	Verifier Who = iota
	// Owner is the node whose IPs are used again.
	Owner
	// Between is the pair of them.
	Between
	// Everybody is all nodes.
	Everybody
	// Spare is a node that judges, and whose loss ends no caller.
	Spare
)

// Kind is one kind of fault.
type Kind struct {
	Name string
	Does string // a sentence for the list
	Who  Who
	// Lease is the longest lease that can have been given before it, by the
	// lab's TTL.
	Lease func(ttl time.Duration) time.Duration
	// Silent: while it lasts no lease can be renewed between the nodes.
	Silent bool
	// Impairs: while it lasts nobody promises that workloads can talk.
	Impairs bool
	// Loses: while it lasts packets can be lost without being judged.
	Loses bool
	// Lasts is how long it lasts at least and at most, by the lab's TTL; 0:
	// from the begin of the run to its end.
	Lasts func(ttl time.Duration) (least, most time.Duration)
	// Takes says what only one fault at a time can happen to, of the nodes and,
	// if it is Authority, of all. None: any number can.
	Takes []string
	// Rogue: what is made on the node meanwhile is never registered, and nothing
	// judges at its veth. What such a workload is taken for is the node's own
	// doing, until the leases on its IPs have ended.
	Rogue bool
	// Remakes: the node is lost with all that it has, and made again.
	Remakes bool
	// Waits says that its end includes a wait of MaxLease, so that few fit
	// into a run.
	Waits bool
	// Prepare changes the lab's configuration before it is made.
	Prepare func(*lab.Config)
	// Begin lets it happen to the nodes. It returns what ends it. nil: Prepare
	// is all.
	Begin func(ctx context.Context, l *lab.Lab, nodes []string) (end func(context.Context) error, err error)
}

func ttl(t time.Duration) time.Duration             { return t }
func most(time.Duration) time.Duration              { return MaxLease }
func about(ttl time.Duration) (a, b time.Duration)  { return ttl / 2, 3 * ttl }
func under(ttl time.Duration) (a, b time.Duration)  { return ttl / 4, ttl * 3 / 4 }
func longer(ttl time.Duration) (a, b time.Duration) { return ttl * 3 / 2, 3 * ttl }

// What a fault takes.
const (
	agents    = "agents"    // of the nodes
	line      = "line"      // between their agents
	cable     = "cable"     // likewise, and it may be cut while the line is disturbed
	Authority = "authority" // the trust domain, of all nodes
)

// Kinds are all faults, by name.
func Kinds() []Kind {
	kinds := slices.Concat(ofLines(), ofAgents(), ofTheRest())
	slices.SortFunc(kinds, func(a, b Kind) int { return strings.Compare(a.Name, b.Name) })
	return kinds
}

func ofLines() []Kind {
	return []Kind{
		{Name: "partition", Who: Between, Silent: true, Impairs: true, Lease: ttl, Lasts: about,
			Does:  "the agents of owner and verifier cannot talk, in neither direction",
			Takes: []string{cable}, Begin: cut((*lab.Lab).Cut, (*lab.Lab).Heal)},
		{Name: "partition-one-way", Who: Between, Silent: true, Impairs: true, Lease: ttl, Lasts: about,
			Does:  "what the owner's agent sends does not reach the verifier's",
			Takes: []string{cable}, Begin: cut((*lab.Lab).CutOneWay, (*lab.Lab).Heal)},
		{Name: "delay", Who: Between, Impairs: true, Lease: ttl, Lasts: about,
			Does:  "what the agents of owner and verifier send each other comes 50 to 250 ms later, out of its order, and now and then twice",
			Takes: []string{line}, Begin: relay(lab.Disturbance{Least: 50 * time.Millisecond, Most: 250 * time.Millisecond, Twice: 0.1})},
		{Name: "loss", Who: Between, Impairs: true, Lease: ttl, Lasts: about,
			Does:  "a third of what the agents of owner and verifier send each other is lost",
			Takes: []string{line}, Begin: relay(lab.Disturbance{Loss: 1. / 3})},
	}
}

func ofAgents() []Kind {
	return []Kind{
		{Name: "kill-verifier", Who: Verifier, Silent: true, Impairs: true, Lease: ttl, Lasts: about,
			Does:  "the verifier's agent is killed (SIGKILL) and started again",
			Takes: []string{agents}, Begin: kill(nil)},
		{Name: "kill-owner", Who: Owner, Silent: true, Impairs: true, Lease: ttl, Lasts: about,
			Does:  "the owner's agent is killed (SIGKILL) and started again with its journal",
			Takes: []string{agents}, Begin: kill(nil)},
		{Name: "owner-without-journal", Who: Owner, Silent: true, Impairs: true, Lease: ttl, Lasts: about, Waits: true,
			Does:  "the owner's agent is killed, its journal removed, and it is started again: it waits for the end of every lease that can be",
			Takes: []string{agents}, Begin: kill(func(l *lab.Lab, node string) error { return os.RemoveAll(l.JournalDir(node)) })},
		{Name: "stop-verifier", Who: Verifier, Silent: true, Impairs: true, Lease: ttl, Lasts: longer,
			Does:  "the verifier's agent is stopped (SIGSTOP) for longer than a lease, and goes on",
			Takes: []string{agents}, Begin: pause},
		{Name: "stop-owner", Who: Owner, Silent: true, Impairs: true, Lease: ttl, Lasts: longer,
			Does:  "the owner's agent is stopped (SIGSTOP) for longer than a lease, and goes on",
			Takes: []string{agents}, Begin: pause},
		{Name: "stop-short", Who: Everybody, Impairs: true, Lease: ttl, Lasts: under,
			Does:  "every agent is stopped (SIGSTOP) for less than a lease, and goes on",
			Takes: []string{agents}, Begin: pause},
		{Name: "starve", Who: Everybody, Impairs: true, Lease: ttl, Lasts: longer,
			Does:  "every agent gets a tenth of the processor, in pieces",
			Takes: []string{agents}, Begin: starve},
		{Name: "rogue-owner", Who: Owner, Silent: true, Impairs: true, Lease: ttl, Lasts: longer, Rogue: true,
			Does:  "the owner's agent is killed, and workloads are put on dead ones' IPs behind its back, with nothing that judges at their veths",
			Takes: []string{agents}, Begin: kill(nil)},
		{Name: "lost-verifier", Who: Spare, Silent: true, Impairs: true, Loses: true, Lease: ttl, Lasts: under, Waits: true, Remakes: true,
			Does:  "a verifier's node is lost, with its namespace, its workloads and all that its agent kept, and made again",
			Takes: []string{agents, line, cable}, Begin: lose},
		{Name: "lost-owner", Who: Owner, Silent: true, Impairs: true, Loses: true, Lease: ttl, Lasts: under, Waits: true, Remakes: true,
			Does:  "the owner's node is lost, with its namespace, its workloads and all that its agent kept, and made again: it waits for the end of every lease that can be",
			Takes: []string{agents, line, cable}, Begin: lose},
		{Name: "upgrade-verifier", Who: Verifier, Silent: true, Impairs: true, Lease: most, Lasts: under,
			Does:  "the verifier's agent is stopped as for an upgrade (SIGTERM, with hand-over) and started again",
			Takes: []string{agents}, Begin: upgrade},
		{Name: "upgrade-owner", Who: Owner, Silent: true, Impairs: true, Lease: most, Lasts: under,
			Does:  "the owner's agent is stopped as for an upgrade and started again",
			Takes: []string{agents}, Begin: upgrade},
	}
}

func ofTheRest() []Kind {
	return []Kind{
		{Name: "workload-api-gone", Who: Everybody, Impairs: true, Lease: ttl, Lasts: longer,
			Does:  "the trust domain is killed, so that nobody gets an SVID, and started again",
			Takes: []string{Authority}, Begin: authorityGone},
		{Name: "svid-expiry", Who: Everybody, Impairs: true, Lease: ttl, Lasts: longer,
			Does:    "SVIDs live for 4 s, and the trust domain is killed for longer than that",
			Prepare: func(c *lab.Config) { c.SVIDTTL = 4 * time.Second },
			Takes:   []string{Authority}, Begin: authorityGone},
		{Name: "bundle-swap", Who: Everybody, Impairs: true, Lease: ttl, Lasts: under,
			Does:  "the trust domain gets new keys at a stroke",
			Takes: []string{Authority}, Begin: swap},
		{Name: "maps-full", Who: Everybody, Impairs: true, Lease: ttl,
			Does: "tables of bindings, connections and grants are so small that they are full",
			Prepare: func(c *lab.Config) {
				c.AgentFlags = append(c.AgentFlags, "--bindings=16", "--conntrack=256", "--grants=16")
			}},
		{Name: "rings-full", Who: Everybody, Impairs: true, Lease: ttl,
			Does: "the rings of held packets and of events are so small that they are full",
			Prepare: func(c *lab.Config) {
				c.AgentFlags = append(c.AgentFlags, "--held-bytes=131072", "--event-bytes=4096", "--hold-total=4")
			}},
	}
}

// Find returns the kind of that name.
func Find(name string) (Kind, error) {
	var names []string
	for _, k := range Kinds() {
		if k.Name == name {
			return k, nil
		}
		names = append(names, k.Name)
	}
	return Kind{}, fmt.Errorf("there is no fault %q; there are %s", name, strings.Join(names, ", "))
}

type end = func(context.Context) error

// ended is one end for all of them. All are tried.
func ended(ends []end) end {
	return func(ctx context.Context) error {
		var errs []error
		for _, e := range ends {
			errs = append(errs, e(ctx))
		}
		return errors.Join(errs...)
	}
}

// each begins a fault at every node. What has begun when one fails is ended.
func each(ctx context.Context, nodes []string, begin func(node string) (end, error)) (end, error) {
	var ends []end
	for _, n := range nodes {
		e, err := begin(n)
		if err != nil {
			return nil, errors.Join(err, ended(ends)(context.WithoutCancel(ctx)))
		}
		ends = append(ends, e)
	}
	return ended(ends), nil
}

func cut(begin, heal func(l *lab.Lab, ctx context.Context, a, b string) error) func(context.Context, *lab.Lab, []string) (end, error) {
	return func(ctx context.Context, l *lab.Lab, nodes []string) (end, error) {
		if err := begin(l, ctx, nodes[0], nodes[1]); err != nil {
			return nil, errors.Join(err, heal(l, context.WithoutCancel(ctx), nodes[0], nodes[1]))
		}
		return func(ctx context.Context) error { return heal(l, ctx, nodes[0], nodes[1]) }, nil
	}
}

// relay disturbs what two agents send each other.
func relay(d lab.Disturbance) func(context.Context, *lab.Lab, []string) (end, error) {
	return func(_ context.Context, l *lab.Lab, nodes []string) (end, error) {
		d := d
		d.Seed = rand.Uint64()
		stop, err := l.Relay(nodes[0], nodes[1], d)
		return func(context.Context) error { return stop() }, err
	}
}

// lose takes a whole node away.
func lose(ctx context.Context, l *lab.Lab, nodes []string) (end, error) {
	return each(ctx, nodes, func(node string) (end, error) {
		if err := l.LoseNode(node); err != nil {
			return nil, err
		}
		return func(ctx context.Context) error { return l.RemakeNode(ctx, node) }, nil
	})
}

func kill(meanwhile func(l *lab.Lab, node string) error) func(context.Context, *lab.Lab, []string) (end, error) {
	return func(ctx context.Context, l *lab.Lab, nodes []string) (end, error) {
		return each(ctx, nodes, func(node string) (end, error) {
			if err := l.KillAgent(ctx, node); err != nil {
				return nil, err
			}
			return func(ctx context.Context) error {
				var err error
				if meanwhile != nil {
					err = meanwhile(l, node)
				}
				return errors.Join(err, l.StartAgent(ctx, node))
			}, nil
		})
	}
}

func upgrade(ctx context.Context, l *lab.Lab, nodes []string) (end, error) {
	return each(ctx, nodes, func(node string) (end, error) {
		if err := l.StopAgent(ctx, node); err != nil {
			return nil, err
		}
		return func(ctx context.Context) error { return l.StartAgent(ctx, node) }, nil
	})
}

func pause(ctx context.Context, l *lab.Lab, nodes []string) (end, error) {
	return each(ctx, nodes, func(node string) (end, error) {
		if err := l.PauseAgent(ctx, node); err != nil {
			return nil, err
		}
		return func(ctx context.Context) error { return l.ResumeAgent(ctx, node) }, nil
	})
}

// starve lets agents run for 10 ms of each 100.
func starve(ctx context.Context, l *lab.Lab, nodes []string) (end, error) {
	ctx, cancel := context.WithCancel(ctx)
	done := make(chan error, 1)
	go func() {
		var errs []error
		for ctx.Err() == nil {
			e, err := pause(ctx, l, nodes)
			sleep(ctx, 90*time.Millisecond)
			if err == nil {
				err = e(context.WithoutCancel(ctx))
			}
			if err != nil && ctx.Err() == nil {
				errs = append(errs, err)
				break
			}
			sleep(ctx, 10*time.Millisecond)
		}
		done <- errors.Join(errs...)
	}()
	return func(context.Context) error {
		cancel()
		return <-done
	}, nil
}

func authorityGone(ctx context.Context, l *lab.Lab, _ []string) (end, error) {
	if err := l.KillAuthority(ctx); err != nil {
		return nil, err
	}
	return l.StartAuthority, nil
}

func swap(ctx context.Context, l *lab.Lab, _ []string) (end, error) {
	if err := l.ReplaceAuthority(ctx); err != nil {
		return nil, err
	}
	return func(context.Context) error { return nil }, nil
}

func sleep(ctx context.Context, d time.Duration) {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-t.C:
	case <-ctx.Done():
	}
}
