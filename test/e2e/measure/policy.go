package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"strings"
	"time"

	"portcullis/test/bench/rig"
	"portcullis/test/e2e/cluster"
)

// Policy is how long it takes from a call of `kubectl apply` until a policy
// decides over new flows, in ms: by the time at which the first datagram was
// sent that came out otherwise.
type Policy struct {
	Load        string `json:"load"`
	PodsPerNode int    `json:"pods_per_node"`
	// From the start of kubectl, and from its end, when the API server has
	// accepted the policy; the latter may be below 0.
	FromStart rig.Quantiles `json:"from_start"`
	FromEnd   rig.Quantiles `json:"from_end"`
	Kubectl   rig.Quantiles `json:"kubectl"` // how long kubectl itself ran
	// Passing are changes that no policy made; few, or the machine was too busy
	// for this measurement.
	Passing int `json:"passing"`
}

const probeInterval = 5 * time.Millisecond

// policies changes one policy again and again, so that a client on another node
// may call a server or may not.
func (b *bench) policies(ctx context.Context, n int) (*Policy, error) {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	if err := b.Apply(ctx, pod("server", "n1", "server", cluster.ProbeImage, "serve", "-udp", "80"), pod("client", "n2", "client", cluster.ProbeImage, "sleep")); err != nil {
		return nil, err
	}
	if _, err := b.Kubectl(ctx, "wait", "--for=condition=Ready", "pod/server", "pod/client", "--timeout=10m"); err != nil {
		return nil, err
	}
	ip, err := b.Kubectl(ctx, "get", "pod", "server", "-o", "jsonpath={.status.podIP}")
	if err != nil {
		return nil, err
	}
	cmd := b.KubectlCommand(ctx, "exec", "client", "--", "/probe", "changes", "-for", "2h", "-interval", probeInterval.String(), "-timeout", "2s", ip+":80")
	out, err := cmd.StdoutPipe()
	if err != nil {
		return nil, err
	}
	if err := cmd.Start(); err != nil {
		return nil, err
	}
	defer func() { cancel(); _ = cmd.Wait() }() // killed
	d := json.NewDecoder(out)
	var now change
	if err := d.Decode(&now); err != nil || !now.OK {
		return nil, errors.Join(errors.New("the client does not reach the server at first"), err)
	}
	p := &Policy{Load: rig.Load()}
	pods, err := b.Kubectl(ctx, "get", "pods", "-A", "--field-selector", "spec.nodeName=n1", "-o", "name")
	if err != nil {
		return nil, err
	}
	p.PodsPerNode = len(strings.Fields(pods))
	var fromStart, fromEnd, took []float64
	for i := range n {
		begin := time.Now()
		if err := b.policy(ctx, i%2 == 1); err != nil {
			return nil, err
		}
		end := time.Now()
		// What began before the policy was none of its doing: the machine stood
		// still for a moment.
		for ok := i%2 == 1; ; p.Passing++ {
			// A change that is hidden in one of these is never told.
			late := time.AfterFunc(2*time.Minute, cancel)
			err := d.Decode(&now)
			late.Stop()
			if err != nil {
				return nil, fmt.Errorf("change %d was not seen: %w", i, err)
			}
			if now.OK == ok && now.At >= begin.UnixNano() {
				break
			}
		}
		at := time.Unix(0, now.At)
		fromStart, fromEnd = append(fromStart, ms(at.Sub(begin))), append(fromEnd, ms(at.Sub(end)))
		took = append(took, ms(end.Sub(begin)))
	}
	p.Load += ", at the end " + rig.Load()
	p.FromStart, p.FromEnd, p.Kubectl = rig.Summarize(fromStart), rig.Summarize(fromEnd), rig.Summarize(took)
	return p, nil
}

// change is a line of `probe changes`.
type change struct {
	At int64
	OK bool
}

func ms(d time.Duration) float64 { return float64(d) / 1e6 }

// policy applies the policy: only friends may call the server, and the client
// is one, or not.
func (b *bench) policy(ctx context.Context, friend bool) error {
	who := "nobody"
	if friend {
		who = "client"
	}
	selector := func(app string) any { return map[string]any{"matchLabels": map[string]any{"app": app}} }
	text, err := json.Marshal(map[string]any{"apiVersion": "networking.k8s.io/v1", "kind": "NetworkPolicy", "metadata": map[string]any{"name": "friends", "namespace": "default"},
		"spec": map[string]any{"podSelector": selector("server"), "ingress": []any{map[string]any{"from": []any{map[string]any{"podSelector": selector(who)}}}}}})
	if err != nil {
		return err
	}
	cmd := b.KubectlCommand(ctx, "apply", "-f", "-")
	cmd.Stdin = bytes.NewReader(text)
	if out, err := cmd.CombinedOutput(); err != nil {
		return fmt.Errorf("kubectl apply: %w: %s", err, out)
	}
	return nil
}
