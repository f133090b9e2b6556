package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"regexp"
	"strconv"
	"strings"
	"time"

	"portcullis/test/bench/rig"
	"portcullis/test/e2e/cluster"
)

// Memory is what agents have with so many pods on each node, those of the
// system included. A row for each node.
type Memory struct {
	PodsPerNode int           `json:"pods_per_node"`
	Load        string        `json:"load"`
	Agents      []AgentMemory `json:"agents"`
}

// AgentMemory is in KiB. Anonymous is heap, stacks and tables of the agent's
// own; the rest of RSS is its binary and the rings it maps. Cgroup is what the
// container is charged for, without the file cache that can be dropped: with it
// the maps of the kernel.
type AgentMemory struct {
	Node      string `json:"node"`
	Endpoints int    `json:"endpoints"`
	RSS       uint64 `json:"rss_kib"`
	PSS       uint64 `json:"pss_kib"`
	Anonymous uint64 `json:"anonymous_kib"`
	Cgroup    uint64 `json:"cgroup_kib"`
}

// memory fills every node up to n pods, and reads what the agents have.
func (b *bench) memory(ctx context.Context, n int, settle time.Duration) (m Memory, err error) {
	if err := b.fill(ctx, n); err != nil {
		return m, err
	}
	select {
	case <-ctx.Done():
		return m, ctx.Err()
	case <-time.After(settle):
	}
	m = Memory{PodsPerNode: n, Load: rig.Load()}
	for _, node := range b.Nodes() {
		a, err := b.agent(ctx, node.Name)
		if err != nil {
			return m, err
		}
		m.Agents = append(m.Agents, a)
	}
	return m, nil
}

// fill starts pause pods until each node has n pods.
func (b *bench) fill(ctx context.Context, n int) error {
	for _, node := range b.Nodes() {
		name := "fill-" + node.Name
		out, err := b.Kubectl(ctx, "get", "pods", "-A", "--field-selector", "spec.nodeName="+node.Name, "-l", "app!="+name, "-o", "name")
		if err != nil {
			return err
		}
		labels := map[string]any{"app": name}
		if err := b.Apply(ctx, map[string]any{"apiVersion": "apps/v1", "kind": "Deployment", "metadata": map[string]any{"name": name, "namespace": "default"},
			"spec": map[string]any{"replicas": n - len(strings.Fields(out)), "progressDeadlineSeconds": 3600, "selector": map[string]any{"matchLabels": labels},
				"template": map[string]any{"metadata": map[string]any{"labels": labels}, "spec": map[string]any{
					"terminationGracePeriodSeconds": 1, "nodeSelector": map[string]any{"kubernetes.io/hostname": node.Name},
					"containers": []any{map[string]any{"name": "c", "image": cluster.PauseImage, "imagePullPolicy": "Never"}}}}}}); err != nil {
			return err
		}
	}
	for _, node := range b.Nodes() {
		if _, err := b.Kubectl(ctx, "rollout", "status", "deployment/fill-"+node.Name, "--timeout=30m"); err != nil {
			return err
		}
	}
	return nil
}

// agent reads one agent's memory, on its node.
func (b *bench) agent(ctx context.Context, node string) (a AgentMemory, err error) {
	a.Node = node
	var status struct{ Endpoints int }
	if err := b.status(ctx, node, &status); err != nil {
		return a, err
	}
	a.Endpoints = status.Endpoints
	text, err := b.onAgent(ctx, node, `cat /proc/$pid/smaps_rollup`)
	if err != nil {
		return a, err
	}
	fields := map[string]*uint64{"Rss": &a.RSS, "Pss": &a.PSS, "Anonymous": &a.Anonymous}
	for _, m := range regexp.MustCompile(`(?m)^(\w+): +(\d+) kB`).FindAllStringSubmatch(text, -1) {
		if f := fields[m[1]]; f != nil {
			if *f, err = strconv.ParseUint(m[2], 10, 64); err != nil {
				return a, err
			}
		}
	}
	// cgroup v1 and v2 have it under other names.
	text, err = b.onAgent(ctx, node, `
		v1=/sys/fs/cgroup/memory$(sed -n 's/^[0-9]*:memory://p' /proc/$pid/cgroup)
		v2=/sys/fs/cgroup$(sed -n 's/^0:://p' /proc/$pid/cgroup)
		if [ -e $v1/memory.usage_in_bytes ]; then cat $v1/memory.usage_in_bytes; sed -n 's/^total_inactive_file //p' $v1/memory.stat
		else cat $v2/memory.current; sed -n 's/^inactive_file //p' $v2/memory.stat; fi`)
	if err != nil {
		return a, err
	}
	var usage, inactive uint64
	if _, err := fmt.Sscan(text, &usage, &inactive); err != nil {
		return a, fmt.Errorf("memory of the agent's control group: %q: %w", text, err)
	}
	a.Cgroup = (usage - inactive) / 1024
	if a.RSS == 0 || a.PSS == 0 {
		return a, errors.New("the kernel does not tell the agent's memory")
	}
	return a, nil
}

// onAgent runs shell commands on a node, with the agent's pid in $pid.
func (b *bench) onAgent(ctx context.Context, node, commands string) (string, error) {
	return b.Exec(ctx, node, "sh", "-c", `pid=$(pgrep -o -f '^/portcullis agent') || exit 1; `+commands)
}

func (b *bench) status(ctx context.Context, node string, into any) error {
	text, err := b.Exec(ctx, node, b.program, "status", "-o", "json")
	if text == "" && err != nil { // 1 with a text: not healthy
		return err
	}
	return json.Unmarshal([]byte(text), into)
}

// Idle is what agents asked of the API server while nothing happened.
type Idle struct {
	Load    string    `json:"load"`
	Minutes float64   `json:"minutes"`
	Counts  []float64 `json:"requests"`   // of each agent, in all that time
	Per     float64   `json:"per_minute"` // and agent
}

var requestCount = regexp.MustCompile(`(\d+) requests`)

func (b *bench) idle(ctx context.Context, length time.Duration) (*Idle, error) {
	before, err := b.requests(ctx)
	if err != nil {
		return nil, err
	}
	begin := time.Now()
	select {
	case <-ctx.Done():
		return nil, ctx.Err()
	case <-time.After(length):
	}
	after, err := b.requests(ctx)
	if err != nil {
		return nil, err
	}
	r := &Idle{Load: rig.Load(), Minutes: time.Since(begin).Minutes()}
	for i := range after {
		r.Counts = append(r.Counts, after[i]-before[i])
		r.Per += r.Counts[i] / r.Minutes / float64(len(after))
	}
	return r, nil
}

// requests are those that each agent has sent since its start.
func (b *bench) requests(ctx context.Context) (counts []float64, err error) {
	for _, node := range b.Nodes() {
		var status struct {
			Sources []struct{ Name, Detail string }
		}
		if err := b.status(ctx, node.Name, &status); err != nil {
			return nil, err
		}
		for _, s := range status.Sources {
			if m := requestCount.FindStringSubmatch(s.Detail); s.Name == "kubernetes" && m != nil {
				n, err := strconv.ParseFloat(m[1], 64)
				if err != nil {
					return nil, err
				}
				counts = append(counts, n)
			}
		}
	}
	if len(counts) != len(b.Nodes()) {
		return nil, errors.New("not every agent tells its requests")
	}
	return counts, nil
}
