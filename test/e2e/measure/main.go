// Command measure makes a real Kubernetes cluster of three nodes on this
// machine, with Portcullis, and measures what an agent costs there: its memory
// at 30 and 100 pods per node, what it asks the API server when nothing
// happens, what it adds to the start of a pod, and how long a policy takes from
// `kubectl apply` until it is enforced. It needs root.
//
//	go run ./test/e2e/measure
//	go run ./test/e2e/measure -everything -pods 30 -idle 0
//
// With -everything the relay, metrics, processes and rules inside HTTP are on, a
// thousand policies are there, and the memory and CPU time of the whole
// installation are measured, at rest and while pods come and go.
//
// It prints JSON with the machine's load beside each result; it never fails for
// being slow.
package main

import (
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"portcullis/test/bench/rig"
	"portcullis/test/e2e/cluster"
)

// Report is everything that was measured.
type Report struct {
	Machine   string   `json:"machine"`
	Policies  int      `json:"policies"` // that are there beside those measured
	Alarms    []string `json:"alarms,omitempty"`
	Start     *Start   `json:"start,omitempty"`
	Memory    []Memory `json:"memory,omitempty"`
	Rest      *Whole   `json:"rest,omitempty"`
	Churn     *Whole   `json:"churn,omitempty"`
	Requests  *Idle    `json:"requests,omitempty"`
	Policy    *Policy  `json:"policy,omitempty"`     // by kubectl
	PolicyAPI *Policy  `json:"policy_api,omitempty"` // by a request to the API server
}

var (
	pairs     = flag.Int("pairs", 60, "pods that are started on each of two nodes, one with and one without Portcullis; 0: not measured")
	samples   = flag.Int("policies", 60, "changes of a policy; 0: not measured")
	densities = flag.String("pods", "30,100", "pods per node at which memory is read, those of the system included; rising")
	idle      = flag.Duration("idle", 5*time.Minute, "how long the requests of idle agents are counted")
	settle    = flag.Duration("settle", time.Minute, "how long agents rest before their memory is read")
	whole     = flag.Bool("everything", false, "relay, metrics, processes and rules inside HTTP are on, -present policies are there, and all of the installation is measured")
	present   = flag.Int("present", 1000, "with -everything: policies that are there")
	span      = flag.Duration("span", 3*time.Minute, "with -everything: for how long the installation is measured at rest, and under churn; 0: not measured")
	name      = flag.String("name", "", "of the cluster; empty: one of its own")
)

func main() {
	cluster.Reexec()
	flag.Parse()
	rig.Main("measure", run)
}

// bench is a cluster under measurement.
type bench struct {
	*cluster.Cluster
	program string // the product's binary, as nodes see it
}

func run(ctx context.Context) (err error) {
	root, err := cluster.ModuleRoot(ctx)
	if err != nil {
		return err
	}
	if err := cluster.Install(ctx, os.Stderr); err != nil {
		return err
	}
	parts, err := cluster.Build(ctx, root, os.Stderr)
	if err != nil {
		return err
	}
	dir, err := os.MkdirTemp("", "portcullis-measure")
	if err != nil {
		return err
	}
	defer os.RemoveAll(dir)
	base, image, err := cluster.Images(ctx, root, dir, parts)
	if err != nil {
		return err
	}
	if *name == "" {
		*name = "measure-" + strconv.Itoa(os.Getpid())
	}
	c, err := cluster.Up(ctx, cluster.Config{Name: *name, Parts: parts, Images: []string{base, image}, Owned: true, Log: os.Stderr})
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, c.Down()) }()
	b := &bench{c, filepath.Join(dir, "portcullis")}
	r := &Report{Machine: rig.Machine()}
	err = b.measure(ctx, r)
	enc := json.NewEncoder(os.Stdout) // what there is, also of a run that ended early
	enc.SetIndent("", "  ")
	return errors.Join(err, enc.Encode(r))
}

func (b *bench) measure(ctx context.Context, r *Report) error {
	say := func(format string, args ...any) {
		fmt.Fprintf(os.Stderr, "%s  load %s  %s\n", time.Now().UTC().Format(time.TimeOnly), rig.Load(), fmt.Sprintf(format, args...))
	}
	if err := b.install(ctx, *pairs > 0); err != nil {
		return err
	}
	if *whole {
		say("%d policies", *present)
		if err := errors.Join(b.crowd(ctx, *present), b.landings(ctx)); err != nil {
			return err
		}
		r.Policies = *present
	}
	if *pairs > 0 {
		say("%d pairs of pods", *pairs)
		start, err := b.starts(ctx, *pairs)
		if err != nil {
			return err
		}
		r.Start = start
		if err := b.everywhere(ctx); err != nil {
			return err
		}
	}
	for text := range strings.SplitSeq(*densities, ",") {
		n, err := strconv.Atoi(text)
		if err != nil {
			return fmt.Errorf("-pods: %w", err)
		}
		say("%d pods per node", n)
		m, err := b.memory(ctx, n, *settle)
		if err != nil {
			return err
		}
		r.Memory = append(r.Memory, m)
	}
	if *whole && *span > 0 {
		if err := b.wholes(ctx, *span, r, say); err != nil {
			return err
		}
	}
	if *idle > 0 {
		say("requests of idle agents")
		requests, err := b.idle(ctx, *idle)
		if err != nil {
			return err
		}
		r.Requests = requests
	}
	if *samples > 0 {
		if err := b.policies(ctx, *samples, r, say); err != nil {
			return err
		}
	}
	say("done")
	return nil
}

// install installs. The agents leave one node out where a node without them is
// wanted.
func (b *bench) install(ctx context.Context, withoutOne bool) error {
	for _, n := range b.Nodes() {
		if withoutOne && n.Name == bareNode {
			continue
		}
		if _, err := b.Kubectl(ctx, "label", "node", n.Name, agentLabel+"="+agentHere); err != nil {
			return err
		}
	}
	args := []string{b.program, "install", "--kubeconfig=" + filepath.Join(b.Dir(), "pki", "admin.kubeconfig"), "--timeout=10m", "--set", "agent.nodeSelector." + agentLabel + "=" + agentHere}
	if *whole {
		if err := b.cgroups(ctx); err != nil {
			return err
		}
		for _, v := range []string{"hubble.listen.enabled=true", "relay.enabled=true", "metrics.enabled=true", "config.processes=true"} {
			args = append(args, "--set", v)
		}
	}
	cmd := b.WorldCommand(ctx, args...)
	cmd.Stdout, cmd.Stderr = os.Stderr, os.Stderr
	return cmd.Run()
}

// everywhere lets the agents onto the node that was left out.
func (b *bench) everywhere(ctx context.Context) error {
	if _, err := b.Kubectl(ctx, "label", "--overwrite", "node", bareNode, agentLabel+"="+agentHere); err != nil {
		return err
	}
	what := []string{"deployment/portcullis-issuer", "daemonset/portcullis-agent"}
	if *whole {
		what = append(what, "deployment/portcullis-relay")
	}
	for _, w := range what {
		if _, err := b.Kubectl(ctx, "-n", "portcullis", "rollout", "status", w, "--timeout=5m"); err != nil {
			return err
		}
	}
	return nil
}
