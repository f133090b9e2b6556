package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"strconv"
	"strings"
	"time"

	"portcullis/test/bench/rig"
	"portcullis/test/e2e/cluster"
)

// Whole is what all of the installation took over a time.
type Whole struct {
	Load        string  `json:"load"`
	PodsPerNode int     `json:"pods_per_node"`
	Seconds     float64 `json:"seconds"`
	Started     int     `json:"pods_started,omitempty"` // and removed meanwhile
	Requests    int     `json:"requests,omitempty"`     // that went through proxies meanwhile
	Parts       []Part  `json:"parts"`
}

// Part is a process. Own is its heap, stacks and tables, at the end of the time; the
// rest of its memory is the binary, which the processes of a node share, and maps
// and rings of the kernel.
type Part struct {
	Node string  `json:"node"`
	Name string  `json:"name"` // agent, proxy, issuer, relay
	RSS  uint64  `json:"rss_kib"`
	PSS  uint64  `json:"pss_kib"`
	Own  uint64  `json:"own_kib"`
	CPU  float64 `json:"cpu_percent"` // of one core
}

// cgroups mounts a cgroup2 where agents' containers see it, which is how a node that
// has none lets them tell processes.
func (b *bench) cgroups(ctx context.Context) error {
	for _, n := range b.Nodes() {
		if _, err := b.Exec(ctx, n.Name, "busybox", "sh", "-c", "mkdir -p /run/portcullis/cgroup2 && busybox mount -t cgroup2 none /run/portcullis/cgroup2"); err != nil {
			return err
		}
	}
	return nil
}

const (
	crowdNamespaces = 20
	landings        = "landings" // app of the servers that rules inside HTTP stand before
)

// crowd applies n policies, each with a peer of its own. Of each crowdNamespaces one
// is in the namespace of the pods that are measured: by turns it selects the server
// of the changes, and the pods that are started.
func (b *bench) crowd(ctx context.Context, n int) error {
	var objects []any
	for i := range crowdNamespaces - 1 {
		objects = append(objects, map[string]any{"apiVersion": "v1", "kind": "Namespace", "metadata": map[string]any{"name": "crowd" + strconv.Itoa(i)}})
	}
	if err := b.Apply(ctx, objects...); err != nil {
		return err
	}
	objects = nil
	for i := range n {
		namespace, app := "crowd"+strconv.Itoa(i%crowdNamespaces-1), "app"+strconv.Itoa(i)
		if i%crowdNamespaces == 0 {
			namespace, app = "default", []string{"server", "pair"}[i/crowdNamespaces%2]
		}
		objects = append(objects, networkPolicy(namespace, "crowd"+strconv.Itoa(i), app, "friend"+strconv.Itoa(i)))
	}
	for part := range slices.Chunk(objects, 200) {
		if err := b.Apply(ctx, part...); err != nil {
			return err
		}
	}
	return nil
}

// landings are servers and clients that proxies stand between, on every node that
// has an agent.
func (b *bench) landings(ctx context.Context) error {
	out, err := b.Kubectl(ctx, "get", "nodes", "-l", agentLabel+"="+agentHere, "-o", "name")
	if err != nil {
		return err
	}
	rule := []any{map[string]any{"method": "POST", "path": "/v1/request-landing"}}
	objects := []any{map[string]any{"apiVersion": "cilium.io/v2", "kind": "CiliumNetworkPolicy", "metadata": map[string]any{"name": landings, "namespace": "default"},
		"spec": map[string]any{"endpointSelector": map[string]any{"matchLabels": map[string]any{"app": landings}}, "ingress": []any{map[string]any{
			"fromEndpoints": []any{map[string]any{"matchLabels": map[string]any{"app": "ship"}}},
			"toPorts":       []any{map[string]any{"ports": []any{map[string]any{"port": "80", "protocol": "TCP"}}, "rules": map[string]any{"http": rule}}}}}}}}
	there, err := b.Kubectl(ctx, "get", "pods", "-l", "app="+landings, "-o", "name")
	if err != nil {
		return err
	}
	for line := range strings.FieldsSeq(out) {
		n := strings.TrimPrefix(line, "node/")
		if slices.Contains(strings.Fields(there), "pod/deathstar-"+n) {
			continue
		}
		objects = append(objects, pod("deathstar-"+n, n, landings, cluster.ProbeImage, "deathstar"), pod("ship-"+n, n, "ship", cluster.ProbeImage, "sleep"))
	}
	if err := b.Apply(ctx, objects...); err != nil {
		return err
	}
	_, err = b.Kubectl(ctx, "wait", "--for=condition=Ready", "pods", "-l", "app in (ship,"+landings+")", "--timeout=5m")
	return err
}

// wholes measures the installation at rest, and while pods come and go and requests
// go through the proxies.
func (b *bench) wholes(ctx context.Context, span time.Duration, r *Report, say func(string, ...any)) (err error) {
	if err := b.landings(ctx); err != nil {
		return err
	}
	if r.Alarms, err = b.alarms(ctx); err != nil {
		return err
	}
	say("at rest")
	r.Rest, err = b.spend(ctx, func(ctx context.Context, _ *Whole) error {
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-time.After(span):
			return nil
		}
	})
	if err != nil {
		return err
	}
	say("under churn")
	r.Churn, err = b.spend(ctx, func(ctx context.Context, w *Whole) error { return b.churn(ctx, span, w) })
	return err
}

// alarms are those of all agents.
func (b *bench) alarms(ctx context.Context) (all []string, err error) {
	for _, n := range b.Nodes() {
		var status struct {
			Alarms []struct{ Name, Text string }
		}
		if err := b.status(ctx, n.Name, &status); err != nil {
			return nil, err
		}
		for _, a := range status.Alarms {
			all = append(all, n.Name+" "+a.Name+": "+a.Text)
		}
	}
	return all, nil
}

// spend measures what the installation takes while do runs.
func (b *bench) spend(ctx context.Context, do func(context.Context, *Whole) error) (*Whole, error) {
	w := &Whole{Load: rig.Load()}
	pods, err := b.Kubectl(ctx, "get", "pods", "-A", "--field-selector", "spec.nodeName=n1", "-o", "name")
	if err != nil {
		return nil, err
	}
	w.PodsPerNode = len(strings.Fields(pods))
	before, err := b.parts(ctx)
	if err != nil {
		return nil, err
	}
	begin := time.Now()
	if err := do(ctx, w); err != nil {
		return nil, err
	}
	after, err := b.parts(ctx)
	if err != nil {
		return nil, err
	}
	w.Seconds = time.Since(begin).Seconds()
	for _, a := range after {
		i := slices.IndexFunc(before, func(o part) bool { return o.key == a.key })
		if i < 0 {
			return nil, fmt.Errorf("%s of %s began meanwhile: this is no measurement", a.Name, a.Node)
		}
		a.CPU = (a.ticks - before[i].ticks) / ticksPerSecond / w.Seconds * 100
		w.Parts = append(w.Parts, a.Part)
	}
	w.Load += ", at the end " + rig.Load()
	return w, nil
}

const ticksPerSecond = 100 // of /proc/PID/stat, on every architecture

// part is a process, and what it has used so far.
type part struct {
	Part
	key   string
	ticks float64
}

// parts finds every process of the product on the nodes: name, pid, ticks in user
// space and in the kernel, and its memory.
func (b *bench) parts(ctx context.Context) (all []part, err error) {
	const script = `for pid in $(pgrep -f '^/portcullis (agent|proxy|issuer|relay)|^/proc/self/exe proxy'); do
		name=$(tr '\0' ' ' </proc/$pid/cmdline | cut -d' ' -f2)
		echo $name $pid $(sed 's/.*) //' /proc/$pid/stat | cut -d' ' -f12,13) $(sed -n 's/^\(Rss\|Pss\|Anonymous\): *\([0-9]*\) kB/\2/p' /proc/$pid/smaps_rollup)
	done`
	for _, n := range b.Nodes() {
		out, err := b.Exec(ctx, n.Name, "sh", "-c", script)
		if err != nil {
			return nil, err
		}
		for line := range strings.Lines(out) {
			p := part{Part: Part{Node: n.Name}}
			var pid string
			var user, system float64
			if _, err := fmt.Sscan(line, &p.Name, &pid, &user, &system, &p.RSS, &p.PSS, &p.Own); err != nil {
				return nil, fmt.Errorf("a process on %s: %q: %w", n.Name, line, err)
			}
			p.key, p.ticks = n.Name+" "+p.Name+" "+pid, user+system
			all = append(all, p)
		}
	}
	if len(all) == 0 {
		return nil, errors.New("no process of the product is found on the nodes")
	}
	slices.SortFunc(all, func(a, b part) int { return strings.Compare(a.Name+a.Node, b.Name+b.Node) })
	return all, nil
}

const churnBatch = 4 // pods on each node at a time

// churn starts and removes pods on every node for a time, while ships land.
func (b *bench) churn(ctx context.Context, span time.Duration, w *Whole) error {
	end := time.Now().Add(span)
	wait, err := b.ships(ctx, span)
	if err != nil {
		return err
	}
	for i := 0; time.Now().Before(end); i++ {
		var list []any
		for _, n := range b.Nodes() {
			for k := range churnBatch {
				list = append(list, pod(fmt.Sprintf("churn-%d-%s-%d", i, n.Name, k), n.Name, "pair", cluster.PauseImage))
			}
		}
		if err := b.Apply(ctx, list...); err != nil {
			return err
		}
		if _, err := b.Kubectl(ctx, "wait", "--for=condition=Ready", "pods", "-l", "app=pair", "--timeout=5m"); err != nil {
			return err
		}
		if _, err := b.Kubectl(ctx, "delete", "pods", "-l", "app=pair", "--wait=true", "--grace-period=1"); err != nil {
			return err
		}
		w.Started += len(list)
	}
	w.Requests, err = wait()
	return err
}

// ships ask to land, each at a server of another node and a new connection every
// 100 ms. wait returns how many landed; all must.
func (b *bench) ships(ctx context.Context, span time.Duration) (wait func() (int, error), err error) {
	type ship struct{ Tried, OK int }
	var ships []*ship
	nodes := b.Nodes()
	results := make(chan error, len(nodes))
	for i, n := range nodes {
		to := nodes[(i+1)%len(nodes)].Name
		ip, err := b.Kubectl(ctx, "get", "pod", "deathstar-"+to, "-o", "jsonpath={.status.podIP}")
		if err != nil {
			return nil, err
		}
		s := &ship{}
		ships = append(ships, s)
		go func() {
			out, err := b.Kubectl(ctx, "exec", "ship-"+n.Name, "--", "/probe", "hammer", "-for", span.String(), "-interval", "100ms", "-timeout", "20s", "http/"+ip+":80")
			results <- errors.Join(err, json.Unmarshal([]byte(out), s))
		}()
	}
	return func() (n int, err error) {
		for range ships {
			err = errors.Join(err, <-results)
		}
		for _, s := range ships {
			n += s.OK
			if s.OK != s.Tried {
				err = errors.Join(err, fmt.Errorf("%d of %d ships landed", s.OK, s.Tried))
			}
		}
		return n, err
	}, nil
}
