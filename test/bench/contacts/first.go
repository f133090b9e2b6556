package main

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"strings"
	"sync"
	"time"

	"portcullis/agent/api"
	"portcullis/chaos/lab"
	"portcullis/chaos/lab/probe"
	"portcullis/test/bench/rig"
)

const policyFirst = `
apiVersion: cilium.io/v2
kind: CiliumNetworkPolicy
metadata: {name: server}
spec:
  endpointSelector: {matchLabels: {io.cilium.k8s.policy.serviceaccount: server}}
  ingress:
  - fromEndpoints: [{matchLabels: {io.cilium.k8s.policy.serviceaccount: client}}]
    toPorts: [{ports: [{port: "5000", protocol: TCP}]}]
`

// batch clients are made before they are measured, so that making and removing
// namespaces does not disturb the measuring.
const batch = 50

// contacts are connects to one server, in milliseconds.
type contacts struct {
	With        rig.Quantiles `json:"with_ms"`    // programs and policy
	Without     rig.Quantiles `json:"without_ms"` // no program on either veth
	AddedP50    float64       `json:"added_p50_ms"`
	AddedP99    float64       `json:"added_p99_ms"` // difference of the two p99
	Retransmits uint32        `json:"syn_retransmits"`
	Failed      int           `json:"failed"`
	Errors      []string      `json:"errors,omitempty"`
}

type firstResult struct {
	Warm contacts `json:"warm"`
	Cold contacts `json:"cold"`
}

func (r *firstResult) problem() error {
	var errs []error
	for _, c := range []contacts{r.Warm, r.Cold} {
		if c.Failed > 0 || c.Retransmits > 0 {
			errs = append(errs, fmt.Errorf("%d connects failed, %d SYN retransmits: %s", c.Failed, c.Retransmits, strings.Join(c.Errors, "; ")))
		}
	}
	return errors.Join(errs...)
}

func (r *firstResult) String() string {
	var b strings.Builder
	for _, x := range []struct {
		name string
		c    contacts
	}{{"warm session", r.Warm}, {"cold session", r.Cold}} {
		fmt.Fprintf(&b, "first contacts, %s (ms of a TCP connect)\n  with     %v\n  without  %v\n  added    p50 %.3f   p99 %.3f   SYN retransmits %d   failed %d\n",
			x.name, x.c.With, x.c.Without, x.c.AddedP50, x.c.AddedP99, x.c.Retransmits, x.c.Failed)
	}
	return b.String()
}

func firstContacts(ctx context.Context, l *lab.Lab, warm, cold int) (*firstResult, error) {
	serve := []string{"portcullis", "probe", "helloworld"}
	server, err := l.Run(ctx, lab.Workload{Name: "server", Node: "two", ServiceAccount: "server", Command: serve}, lab.RunOptions{})
	if err != nil {
		return nil, err
	}
	bare, err := l.Run(ctx, lab.Workload{Name: "bare", Node: "two", Command: serve}, lab.RunOptions{Unregistered: true})
	if err != nil {
		return nil, err
	}
	if err := l.ImportPolicies(ctx, &api.PolicyFile{Name: "first", Content: []byte(policyFirst)}); err != nil {
		return nil, err
	}
	f := &first{l: l, server: netip.AddrPortFrom(server.IP4(), 5000), bare: netip.AddrPortFrom(bare.IP4(), 5000)}
	if err := f.warmUp(ctx); err != nil {
		return nil, err
	}
	var r firstResult
	if r.Warm, err = f.measure(ctx, warm, func() error { return nil }); err != nil {
		return nil, err
	}
	c, err := l.Client("two")
	if err != nil {
		return nil, err
	}
	r.Cold, err = f.measure(ctx, cold, func() error {
		_, err := c.ResetSession(ctx, &api.ResetSessionRequest{Peer: "one"})
		return err
	})
	return &r, err
}

type first struct {
	l            *lab.Lab
	server, bare netip.AddrPort
	made         int
}

// client makes a client on a fresh IP, without a process.
func (f *first) client(ctx context.Context, name string, unregistered bool) (string, error) {
	r, err := f.l.Run(ctx, lab.Workload{Name: name, Node: "one", ServiceAccount: "client"}, lab.RunOptions{Unregistered: unregistered})
	return r.Spec.FullName(), err
}

func (f *first) connect(from string, to netip.AddrPort) (c probe.Connect, err error) {
	err = f.l.InWorkload(from, func() error { c = probe.TCPConnect(to, 0, 5*time.Second); return nil })
	return c, err
}

// warmUp waits for the servers, and opens the session.
func (f *first) warmUp(ctx context.Context) error {
	with, err := f.client(ctx, "warm-with", false)
	if err != nil {
		return err
	}
	without, err := f.client(ctx, "warm-without", true)
	if err != nil {
		return err
	}
	for deadline := time.Now().Add(15 * time.Second); ; {
		a, err := f.connect(with, f.server)
		if err != nil {
			return err
		}
		b, err := f.connect(without, f.bare)
		if err != nil {
			return err
		}
		if a.OK && b.OK {
			return nil
		}
		if time.Now().After(deadline) || ctx.Err() != nil {
			return fmt.Errorf("the servers do not answer: with programs %q, without %q", a.Error, b.Error)
		}
		time.Sleep(50 * time.Millisecond)
	}
}

// measure makes n contacts of each kind, in turns; before is done before each
// one with programs.
func (f *first) measure(ctx context.Context, n int, before func() error) (out contacts, err error) {
	var with, without []float64
	for len(with) < n && err == nil {
		size := min(batch, n-len(with))
		var names []string
		if names, err = f.makeBatch(ctx, size); err == nil {
			for i := 0; i < size && err == nil; i++ {
				var a, b probe.Connect
				if err = before(); err != nil {
					break
				}
				if a, err = f.connect(names[2*i], f.server); err != nil {
					break
				}
				if b, err = f.connect(names[2*i+1], f.bare); err != nil {
					break
				}
				with, without = append(with, a.ConnectUS/1e3), append(without, b.ConnectUS/1e3)
				out.Retransmits += a.TotalRetr
				if !a.OK {
					out.Failed++
					out.Errors = append(out.Errors, a.Error)
				}
				err = ctx.Err()
			}
		}
		for _, name := range names {
			if name != "" {
				_, derr := f.l.Delete(context.WithoutCancel(ctx), name)
				err = errors.Join(err, derr)
			}
		}
		fmt.Fprintf(os.Stderr, "%d of %d contacts\n", len(with), n)
	}
	out.With, out.Without = rig.Summarize(with), rig.Summarize(without)
	out.AddedP50, out.AddedP99 = out.With.P50-out.Without.P50, out.With.P99-out.Without.P99
	return out, err
}

// makeBatch makes clients in pairs: registered, not registered.
func (f *first) makeBatch(ctx context.Context, size int) ([]string, error) {
	names, errs := make([]string, 2*size), make([]error, 2*size)
	var wg sync.WaitGroup
	for k := range 4 {
		base := f.made
		wg.Go(func() {
			for i := k; i < 2*size; i += 4 {
				names[i], errs[i] = f.client(ctx, fmt.Sprintf("c%d", base+i), i%2 == 1)
			}
		})
	}
	wg.Wait()
	f.made += 2 * size
	// What making them has stirred up in the kernel should have settled.
	time.Sleep(300 * time.Millisecond)
	return names, errors.Join(errs...)
}
