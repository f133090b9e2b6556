package main

import (
	"bufio"
	"context"
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"time"

	"portcullis/test/bench/rig"
	"portcullis/test/e2e/cluster"
)

// Pods are started by twos at a time, one on a node with an agent and one on a
// node without, so that both bear the same noise.
const (
	agentNode, bareNode = "n2", "n3"
	agentLabel          = "agent" // of nodes that are to have one,
	agentHere           = "here"  // with this value
)

// Start is how long the runtime takes to make a pod's sandbox, network and all:
// by its log, from the kubelet's call to the answer. In ms.
type Start struct {
	Load    string        `json:"load"`
	With    rig.Quantiles `json:"with"`
	Without rig.Quantiles `json:"without"`
	// Added is with less without, pair by pair; its quantiles are not those of a
	// single cost, as each side has noise of its own.
	Added rig.Quantiles `json:"added"`
}

func (b *bench) starts(ctx context.Context, n int) (*Start, error) {
	// An agent without a journal gives no address away for up to 75 s, and the
	// first pod of a node has its files to load.
	if err := b.pair(ctx, "warm"); err != nil {
		return nil, err
	}
	s := &Start{Load: rig.Load()}
	for i := range n {
		if err := b.pair(ctx, fmt.Sprintf("p%d", i)); err != nil {
			return nil, err
		}
	}
	s.Load += ", at the end " + rig.Load()
	with, err := b.sandboxes(agentNode)
	if err != nil {
		return nil, err
	}
	without, err := b.sandboxes(bareNode)
	if err != nil {
		return nil, err
	}
	var a, w, d []float64
	for i := range n {
		x, okX := with[fmt.Sprintf("p%d-%s", i, agentNode)]
		y, okY := without[fmt.Sprintf("p%d-%s", i, bareNode)]
		if !okX || !okY {
			return nil, fmt.Errorf("pair %d is not in the runtime's logs", i)
		}
		a, w, d = append(a, x), append(w, y), append(d, x-y)
	}
	s.With, s.Without, s.Added = rig.Summarize(a), rig.Summarize(w), rig.Summarize(d)
	return s, nil
}

// pair starts two pods at a time, waits until both run, and removes them.
func (b *bench) pair(ctx context.Context, name string) error {
	var pods []any
	for _, node := range []string{agentNode, bareNode} {
		pods = append(pods, pod(name+"-"+node, node, "pair", cluster.PauseImage))
	}
	if err := b.Apply(ctx, pods...); err != nil {
		return err
	}
	if _, err := b.Kubectl(ctx, "wait", "--for=condition=Ready", "pods", "-l", "app=pair", "--timeout=5m"); err != nil {
		return err
	}
	_, err := b.Kubectl(ctx, "delete", "pods", "-l", "app=pair", "--wait=true", "--grace-period=1")
	return err
}

func pod(name, node, app, image string, args ...string) map[string]any {
	return map[string]any{"apiVersion": "v1", "kind": "Pod", "metadata": map[string]any{"name": name, "namespace": "default", "labels": map[string]any{"app": app}},
		"spec": map[string]any{"terminationGracePeriodSeconds": 1, "nodeSelector": map[string]any{"kubernetes.io/hostname": node},
			"containers": []any{map[string]any{"name": "c", "image": image, "imagePullPolicy": "Never", "args": args}}}}
}

var sandboxLine = regexp.MustCompile(`^time="([^"]+)" level=(\w+) msg="RunPodSandbox for &PodSandboxMetadata\{Name:([^,]+),[^}]*\}( returns sandbox id|")`)

// sandboxes returns by pod how many ms its sandbox took. A pod whose sandbox
// had to be tried again counts from the first try.
func (b *bench) sandboxes(node string) (map[string]float64, error) {
	f, err := os.Open(filepath.Join(b.Dir(), "log", node, "containerd.log"))
	if err != nil {
		return nil, err
	}
	defer f.Close()
	begun, took := map[string]time.Time{}, map[string]float64{}
	lines := bufio.NewScanner(f)
	lines.Buffer(nil, 1<<20)
	for lines.Scan() {
		m := sandboxLine.FindStringSubmatch(lines.Text())
		if m == nil {
			continue
		}
		at, err := time.Parse(time.RFC3339Nano, m[1])
		if err != nil {
			return nil, err
		}
		switch _, known := begun[m[3]]; {
		case m[4] != `"`:
			took[m[3]] = float64(at.Sub(begun[m[3]])) / 1e6
		case !known:
			begun[m[3]] = at
		}
	}
	return took, lines.Err()
}
