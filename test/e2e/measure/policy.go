package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"path/filepath"
	"strings"
	"time"

	"portcullis/test/bench/rig"
	"portcullis/test/e2e/cluster"
)

// Policy is how long it takes from a call of `kubectl apply`, or a request to the
// API server, until a policy decides over new flows, in ms: by the time at which the
// first datagram was sent that came out otherwise.
type Policy struct {
	Load        string `json:"load"`
	PodsPerNode int    `json:"pods_per_node"`
	// From the start of kubectl or of the request, and from its end, when the API
	// server has accepted the policy; the latter may be below 0.
	FromStart rig.Quantiles `json:"from_start"`
	FromEnd   rig.Quantiles `json:"from_end"`
	Call      rig.Quantiles `json:"call"` // how long kubectl or the request itself took
	// Passing are changes that no policy made; few, or the machine was too busy
	// for this measurement.
	Passing int `json:"passing"`
}

const probeInterval = 5 * time.Millisecond

// policies changes one policy again and again, so that a client on another node
// may call a server or may not: by kubectl, and by requests.
func (b *bench) policies(ctx context.Context, n int, r *Report, say func(string, ...any)) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	if err := b.Apply(ctx, pod("server", "n1", "server", cluster.ProbeImage, "serve", "-udp", "80"), pod("client", "n2", "client", cluster.ProbeImage, "sleep")); err != nil {
		return err
	}
	if _, err := b.Kubectl(ctx, "wait", "--for=condition=Ready", "pod/server", "pod/client", "--timeout=10m"); err != nil {
		return err
	}
	ip, err := b.Kubectl(ctx, "get", "pod", "server", "-o", "jsonpath={.status.podIP}")
	if err != nil {
		return err
	}
	api, err := b.api(ctx)
	if err != nil {
		return err
	}
	// Where other policies select the server, too, it takes this one to be called.
	text, err := friends(true)
	if err != nil {
		return err
	}
	if err := b.byKubectl(ctx, text); err != nil {
		return err
	}
	cmd := b.KubectlCommand(ctx, "exec", "client", "--", "/probe", "changes", "-for", "2h", "-interval", probeInterval.String(), "-timeout", "2s", ip+":80")
	out, err := cmd.StdoutPipe()
	if err != nil {
		return err
	}
	if err := cmd.Start(); err != nil {
		return err
	}
	defer func() { cancel(); _ = cmd.Wait() }() // killed
	w := &watcher{d: json.NewDecoder(out), cancel: cancel}
	if err := w.d.Decode(&w.now); err != nil || !w.now.OK {
		return errors.Join(errors.New("the client does not reach the server at first"), err)
	}
	say("%d changes of a policy by kubectl", n)
	if r.Policy, err = b.changes(ctx, n, w, b.byKubectl); err != nil {
		return err
	}
	say("%d changes of a policy by requests", n)
	r.PolicyAPI, err = b.changes(ctx, n, w, api)
	return err
}

// watcher hears when the client's flows begin and cease to pass.
type watcher struct {
	d      *json.Decoder
	now    change
	cancel context.CancelFunc // ends the client
}

// changes changes the policy n times by one of the ways.
func (b *bench) changes(ctx context.Context, n int, w *watcher, apply func(context.Context, []byte) error) (*Policy, error) {
	p := &Policy{Load: rig.Load()}
	pods, err := b.Kubectl(ctx, "get", "pods", "-A", "--field-selector", "spec.nodeName=n1", "-o", "name")
	if err != nil {
		return nil, err
	}
	p.PodsPerNode = len(strings.Fields(pods))
	var fromStart, fromEnd, took []float64
	for i := range n {
		ok := !w.now.OK
		text, err := friends(ok)
		if err != nil {
			return nil, err
		}
		begin := time.Now()
		if err := apply(ctx, text); err != nil {
			return nil, err
		}
		end := time.Now()
		// What began before the policy was none of its doing: the machine stood
		// still for a moment.
		for ; ; p.Passing++ {
			// A change that is hidden in one of these is never told.
			late := time.AfterFunc(2*time.Minute, w.cancel)
			err := w.d.Decode(&w.now)
			late.Stop()
			if err != nil {
				return nil, fmt.Errorf("change %d was not seen: %w", i, err)
			}
			if w.now.OK == ok && w.now.At >= begin.UnixNano() {
				break
			}
		}
		at := time.Unix(0, w.now.At)
		fromStart, fromEnd = append(fromStart, ms(at.Sub(begin))), append(fromEnd, ms(at.Sub(end)))
		took = append(took, ms(end.Sub(begin)))
	}
	p.Load += ", at the end " + rig.Load()
	p.FromStart, p.FromEnd, p.Call = rig.Summarize(fromStart), rig.Summarize(fromEnd), rig.Summarize(took)
	return p, nil
}

// change is a line of `probe changes`.
type change struct {
	At int64
	OK bool
}

func ms(d time.Duration) float64 { return float64(d) / 1e6 }

// friends is the policy: only friends may call the server, and the client is one,
// or not.
func friends(friend bool) ([]byte, error) {
	who := "nobody"
	if friend {
		who = "client"
	}
	return json.Marshal(networkPolicy("default", "friends", "server", who))
}

func networkPolicy(namespace, name, server, client string) map[string]any {
	selector := func(app string) any { return map[string]any{"matchLabels": map[string]any{"app": app}} }
	return map[string]any{"apiVersion": "networking.k8s.io/v1", "kind": "NetworkPolicy", "metadata": map[string]any{"name": name, "namespace": namespace},
		"spec": map[string]any{"podSelector": selector(server), "ingress": []any{map[string]any{"from": []any{map[string]any{"podSelector": selector(client)}}}}}}
}

func (b *bench) byKubectl(ctx context.Context, text []byte) error {
	cmd := b.KubectlCommand(ctx, "apply", "-f", "-")
	cmd.Stdin = bytes.NewReader(text)
	if out, err := cmd.CombinedOutput(); err != nil {
		return fmt.Errorf("kubectl apply: %w: %s", err, out)
	}
	return nil
}

// api returns what applies the policy by a request of its own, on a connection that
// is open already.
func (b *bench) api(ctx context.Context) (func(context.Context, []byte) error, error) {
	socket := filepath.Join(b.Dir(), "measure-api.sock")
	cmd := b.KubectlCommand(ctx, "proxy", "--unix-socket="+socket)
	if err := cmd.Start(); err != nil {
		return nil, err
	}
	context.AfterFunc(ctx, func() { _ = cmd.Wait() }) // killed
	client := &http.Client{Transport: &http.Transport{DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
		return (&net.Dialer{}).DialContext(ctx, "unix", socket)
	}}}
	do := func(ctx context.Context, method, path, kind string, body []byte) error {
		req, err := http.NewRequestWithContext(ctx, method, "http://localhost"+path, bytes.NewReader(body))
		if err != nil {
			return err
		}
		req.Header.Set("Content-Type", kind)
		res, err := client.Do(req)
		if err != nil {
			return err
		}
		defer res.Body.Close()
		text, err := io.ReadAll(res.Body)
		if err == nil && res.StatusCode >= 300 {
			err = fmt.Errorf("%s %s: %s: %s", method, path, res.Status, text)
		}
		return err
	}
	var err error
	for deadline := time.Now().Add(time.Minute); time.Now().Before(deadline); time.Sleep(100 * time.Millisecond) {
		if err = do(ctx, http.MethodGet, "/readyz", "", nil); err == nil {
			break
		}
	}
	return func(ctx context.Context, text []byte) error {
		return do(ctx, http.MethodPatch, "/apis/networking.k8s.io/v1/namespaces/default/networkpolicies/friends?fieldManager=measure&force=true", "application/apply-patch+yaml", text)
	}, err
}
