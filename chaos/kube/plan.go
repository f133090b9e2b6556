package kube

import (
	"errors"
	"fmt"
	"io"
	"slices"
	"strings"
	"time"
)

// Options of a run.
type Options struct {
	Scenario string // ip-reuse
	Kubectl  string // the program; "kubectl" if empty
	// Kubeconfig and Context are kubectl's; empty: as kubectl finds them.
	Kubeconfig, Context string
	Namespace           string // of its own; "portcullis-chaos" if empty
	// Nodes that take part: IPs change hands on the first, the others judge.
	// None: all that have an agent that is ready, by their names.
	Nodes  []string
	Faults []string // of Faults
	Events int      // how many times an IP is to go to another identity
	// Pods bounds how many are made for that. 0: 300, and four for each event.
	Pods     int
	Parallel int // pods that come and go side by side; 0: 6
	Seed     uint64
	Limit    time.Duration // ends the run, however far it came; 0: ten minutes
	Image    string        // of the pods; empty: the agents'
	// Evidence is what the agents must run with; empty: whatever they do.
	Evidence string

	Progress io.Writer // nil: none
	History  io.Writer // gets the history; nil: nobody
}

// Fault is one kind of fault that can happen to a cluster.
type Fault struct {
	Name string
	Does string
	// silent: no lease can be renewed meanwhile.
	silent bool
	// breaks says that it needs a privileged pod on the node.
	breaks bool
	// lasts: it keeps news from a node until IPs have changed hands.
	lasts bool
}

// Faults are all of them.
func Faults() []Fault {
	return []Fault{
		{Name: "agent-kill", breaks: true, Does: "a node's agent is killed (SIGKILL), and its kubelet starts it again"},
		{Name: "agent-restart", Does: "a node's agent's pod is deleted, and its DaemonSet makes another"},
		{Name: "agent-stop", breaks: true, lasts: true, silent: true, Does: "the agent of a node that judges is stopped (SIGSTOP) until IPs have changed hands, and goes on"},
		{Name: "api-cut", breaks: true, lasts: true, Does: "nothing that a node sends reaches the API server until IPs have changed hands"},
		{Name: "partition", breaks: true, lasts: true, silent: true, Does: "the agents of two nodes cannot talk until IPs have changed hands"},
	}
}

// plan is a run that has been found sensible.
type plan struct {
	Options
	faults []Fault
}

// Check says what is wrong with the options.
func Check(o Options) error {
	_, err := newPlan(o)
	return err
}

func newPlan(o Options) (*plan, error) {
	p := &plan{Options: o}
	var errs []error
	if o.Scenario != "ip-reuse" {
		errs = append(errs, fmt.Errorf("scenario %q: in a cluster there is ip-reuse alone", o.Scenario))
	}
	for i, name := range o.Faults {
		k := slices.IndexFunc(Faults(), func(f Fault) bool { return f.Name == name })
		switch {
		case k < 0:
			var names []string
			for _, f := range Faults() {
				names = append(names, f.Name)
			}
			errs = append(errs, fmt.Errorf("there is no fault %q in a cluster; there are %s", name, strings.Join(names, ", ")))
		case slices.Contains(o.Faults[:i], name):
			errs = append(errs, fmt.Errorf("fault %s is named twice", name))
		default:
			p.faults = append(p.faults, Faults()[k])
		}
	}
	if o.Events < 1 || o.Events > 100_000 {
		errs = append(errs, fmt.Errorf("%d events: want 1 to 100000", o.Events))
	}
	if o.Parallel < 0 || o.Parallel > 24 {
		errs = append(errs, fmt.Errorf("%d pods side by side: want 1 to 24", o.Parallel))
	}
	if o.Pods < 0 {
		errs = append(errs, fmt.Errorf("at most %d pods", o.Pods))
	}
	if len(o.Nodes) == 1 {
		errs = append(errs, errors.New("one node: want the one where IPs change hands, and others that judge"))
	}
	for i, n := range o.Nodes {
		if n == "" || slices.Contains(o.Nodes[:i], n) {
			errs = append(errs, fmt.Errorf("node %q is named twice, or nothing", n))
		}
	}
	setDefault(&p.Kubectl, "kubectl")
	setDefault(&p.Namespace, "portcullis-chaos")
	setDefault(&p.Parallel, 6)
	setDefault(&p.Pods, 300+4*o.Events)
	setDefault(&p.Limit, 10*time.Minute)
	if p.Progress == nil {
		p.Progress = io.Discard
	}
	return p, errors.Join(errs...)
}

func setDefault[T comparable](p *T, v T) {
	var zero T
	if *p == zero {
		*p = v
	}
}
