package chaos

import (
	"errors"
	"fmt"
	"io"
	"slices"
	"strings"
	"time"

	"portcullis/chaos/check"
	"portcullis/chaos/fault"
)

// Scenario is what the workloads do.
type Scenario struct {
	Name string
	Does string
	// parallel is how many IPs change hands side by side.
	parallel int
	// life is how long a workload lives, at least and at most.
	least, most time.Duration
	relabels    bool // workloads change their labels in their lives
	storm       bool // all go and come at the same time
	late        bool // registrations come late, and twice
	// faults are what breaks in it, whatever else the run is to break.
	faults []string
}

// Scenarios are all scenarios.
func Scenarios() []Scenario {
	return []Scenario{
		{Name: "ip-reuse", Does: "workloads live for a quarter of a second, and the next on the same IP has another identity", parallel: 8, least: 150 * time.Millisecond, most: 400 * time.Millisecond},
		{Name: "relabel", Does: "workloads change their labels, and with them their identity, while they live", parallel: 6, least: 400 * time.Millisecond, most: 800 * time.Millisecond, relabels: true},
		{Name: "storm", Does: "all workloads go and come back on each other's IPs at the same time, as in a mass restart", parallel: 24, least: 600 * time.Millisecond, most: 600 * time.Millisecond, storm: true},
		{Name: "late", Does: "workloads are registered late, twice, and deregistered after their successor came", parallel: 8, least: 150 * time.Millisecond, most: 400 * time.Millisecond, late: true},
		{Name: "upgrade", Does: "as ip-reuse, while the agents of owner and verifier are upgraded again and again (faults upgrade-owner and upgrade-verifier)", parallel: 8, least: 150 * time.Millisecond, most: 400 * time.Millisecond, faults: []string{"upgrade-owner", "upgrade-verifier"}},
		{Name: "owner-restart", Does: "as ip-reuse, while the owner's agent crashes and comes back with its journal (fault kill-owner)", parallel: 8, least: 150 * time.Millisecond, most: 400 * time.Millisecond, faults: []string{"kill-owner"}},
		{Name: "mixed", Does: "relabel and late together, with lives of any length", parallel: 8, least: 100 * time.Millisecond, most: 900 * time.Millisecond, relabels: true, late: true},
	}
}

// Options of a run.
type Options struct {
	Scenario string
	Evidence string   // lease, svid, or classic
	Faults   []string // of package fault
	Events   int      // how many times an IP is to be used again
	Seed     uint64
	TTL      time.Duration // of leases; 0: 1 s
	Parallel int           // how many IPs change hands side by side; 0: as the scenario has it
	// Limit ends the run, however far it came. 0: ten minutes.
	Limit time.Duration

	Lab      string    // name of the lab; "chaos" if empty
	Binary   string    // of the agents; this one if empty
	Progress io.Writer // a line each second, and what is done; nil: none
	History  io.Writer // gets the history; nil: nobody
}

// plan is a run that has been found sensible.
type plan struct {
	Options
	scenario Scenario
	faults   []fault.Kind
}

func newPlan(o Options) (*plan, error) {
	p := &plan{Options: o}
	var errs []error
	i := slices.IndexFunc(Scenarios(), func(s Scenario) bool { return s.Name == o.Scenario })
	if i < 0 {
		var names []string
		for _, s := range Scenarios() {
			names = append(names, s.Name)
		}
		errs = append(errs, fmt.Errorf("there is no scenario %q; there are %s", o.Scenario, strings.Join(names, ", ")))
	} else {
		p.scenario = Scenarios()[i]
	}
	p.Faults = slices.Clone(o.Faults)
	for _, name := range p.scenario.faults {
		if !slices.Contains(p.Faults, name) {
			p.Faults = append(p.Faults, name)
		}
	}
	for _, name := range p.Faults {
		k, err := fault.Find(name)
		if err == nil && slices.ContainsFunc(p.faults, func(f fault.Kind) bool { return f.Name == name }) {
			err = fmt.Errorf("fault %s is named twice", name)
		}
		errs = append(errs, err)
		p.faults = append(p.faults, k)
	}
	if o.Evidence != "lease" && o.Evidence != "svid" && o.Evidence != "classic" {
		errs = append(errs, fmt.Errorf("evidence %q: want lease, svid or classic", o.Evidence))
	}
	if o.Events < 1 || o.Events > 1_000_000 {
		errs = append(errs, fmt.Errorf("%d events: want 1 to 1000000", o.Events))
	}
	if o.Parallel < 0 || o.Parallel > 200 {
		errs = append(errs, fmt.Errorf("%d IPs side by side: want 1 to 200", o.Parallel))
	}
	setDefault(&p.TTL, time.Second)
	setDefault(&p.Limit, 10*time.Minute)
	setDefault(&p.Lab, "chaos")
	setDefault(&p.Parallel, p.scenario.parallel)
	if p.TTL < 500*time.Millisecond || p.TTL > fault.MaxLease {
		errs = append(errs, fmt.Errorf("a TTL of %v: want 500ms to %v", p.TTL, fault.MaxLease))
	}
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

// The identities, by the value of the label `is`. Workloads on IPs that change
// hands are SleepV1 or SleepV2; HelloV1 and HelloV2 admit the sleep of their
// version alone, and Caller may call SleepV1 alone.
const (
	SleepV1 = "sleep-v1"
	SleepV2 = "sleep-v2"
	HelloV1 = "hello-v1"
	HelloV2 = "hello-v2"
	Caller  = "caller"
	neither = "sleep-v3" // of a workload that is allowed nowhere
)

// Policies are what the agents are given; Rules are the same, as the checker
// reads them. TestRulesArePolicies holds one against the other.
const Policies = `apiVersion: networking.k8s.io/v1
kind: NetworkPolicy
metadata: {name: hello-v1}
spec:
  podSelector: {matchLabels: {is: hello-v1}}
  ingress:
  - from: [{podSelector: {matchLabels: {is: sleep-v1}}}]
    ports: [{port: 5000, protocol: TCP}, {port: 5000, protocol: UDP}]
---
apiVersion: networking.k8s.io/v1
kind: NetworkPolicy
metadata: {name: hello-v2}
spec:
  podSelector: {matchLabels: {is: hello-v2}}
  ingress:
  - from: [{podSelector: {matchLabels: {is: sleep-v2}}}]
    ports: [{port: 5000, protocol: TCP}, {port: 5000, protocol: UDP}]
---
apiVersion: networking.k8s.io/v1
kind: NetworkPolicy
metadata: {name: caller}
spec:
  podSelector: {matchLabels: {is: caller}}
  policyTypes: [Egress]
  egress:
  - to: [{podSelector: {matchLabels: {is: sleep-v1}}}]
    ports: [{port: 5000, protocol: TCP}, {port: 5000, protocol: UDP}]
`

// Rules are Policies as the checker reads them.
func Rules() (out []check.Rule) {
	for _, r := range []check.Rule{
		{Identity: HelloV1, Direction: check.Ingress, Peers: []string{SleepV1}},
		{Identity: HelloV2, Direction: check.Ingress, Peers: []string{SleepV2}},
		{Identity: Caller, Direction: check.Egress, Peers: []string{SleepV1}},
	} {
		for _, protocol := range []string{"tcp", "udp"} {
			r.Protocol, r.Port = protocol, ServicePort
			out = append(out, r)
		}
	}
	return out
}
