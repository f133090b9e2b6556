// Command measure makes a real Kubernetes cluster of three nodes on this
// machine, with Portcullis, and measures what an agent costs there: its memory
// at 30 and 100 pods per node, what it asks the API server when nothing
// happens, what it adds to the start of a pod, and how long a policy takes from
// `kubectl apply` until it is enforced. It needs root.
//
//	go run ./test/e2e/measure
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
	Machine  string   `json:"machine"`
	Start    *Start   `json:"start,omitempty"`
	Memory   []Memory `json:"memory,omitempty"`
	Policy   *Policy  `json:"policy,omitempty"`
	Requests *Idle    `json:"requests,omitempty"`
}

var (
	pairs     = flag.Int("pairs", 60, "pods that are started on each of two nodes, one with and one without Portcullis; 0: not measured")
	samples   = flag.Int("policies", 60, "changes of a policy; 0: not measured")
	densities = flag.String("pods", "30,100", "pods per node at which memory is read, those of the system included; rising")
	idle      = flag.Duration("idle", 5*time.Minute, "how long the requests of idle agents are counted")
	settle    = flag.Duration("settle", time.Minute, "how long agents rest before their memory is read")
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
	err = b.measure(ctx, root, r)
	enc := json.NewEncoder(os.Stdout) // what there is, also of a run that ended early
	enc.SetIndent("", "  ")
	return errors.Join(err, enc.Encode(r))
}

func (b *bench) measure(ctx context.Context, root string, r *Report) error {
	say := func(format string, args ...any) {
		fmt.Fprintf(os.Stderr, "%s  load %s  %s\n", time.Now().UTC().Format(time.TimeOnly), rig.Load(), fmt.Sprintf(format, args...))
	}
	if err := b.install(ctx, root, *pairs > 0); err != nil {
		return err
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
	if *idle > 0 {
		say("requests of idle agents")
		requests, err := b.idle(ctx, *idle)
		if err != nil {
			return err
		}
		r.Requests = requests
	}
	if *samples > 0 {
		say("%d changes of a policy", *samples)
		p, err := b.policies(ctx, *samples)
		if err != nil {
			return err
		}
		r.Policy = p
	}
	say("done")
	return nil
}

// install applies deploy/. The agents leave one node out where a node without
// them is wanted.
func (b *bench) install(ctx context.Context, root string, withoutOne bool) error {
	if withoutOne {
		if _, err := b.Kubectl(ctx, "label", "node", bareNode, bareLabel+"=yes"); err != nil {
			return err
		}
	}
	if _, err := b.Kubectl(ctx, "apply", "-f", filepath.Join(root, "deploy")); err != nil {
		return err
	}
	if withoutOne {
		if _, err := b.Kubectl(ctx, "-n", "portcullis", "patch", "daemonset", "portcullis-agent", "--type=merge", "-p", notOnBare(true)); err != nil {
			return err
		}
	}
	return b.ready(ctx)
}

// everywhere lets the agents onto the node that was left out.
func (b *bench) everywhere(ctx context.Context) error {
	if _, err := b.Kubectl(ctx, "label", "node", bareNode, bareLabel+"-"); err != nil {
		return err
	}
	return b.ready(ctx)
}

func (b *bench) ready(ctx context.Context) error {
	for _, what := range []string{"deployment/portcullis-issuer", "daemonset/portcullis-agent"} {
		if _, err := b.Kubectl(ctx, "-n", "portcullis", "rollout", "status", what, "--timeout=5m"); err != nil {
			return err
		}
	}
	return nil
}
