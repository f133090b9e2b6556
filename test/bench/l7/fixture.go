package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"strconv"
	"time"

	"portcullis/agent/api"
	"portcullis/chaos/lab"
	"portcullis/test/bench/rig"
)

// The server's ports: 8080 and 9080 are allowed wholly, 8081 and 9081 as far as
// rules inside HTTP go.
const policies = `
apiVersion: cilium.io/v2
kind: CiliumNetworkPolicy
metadata: {name: server}
spec:
  endpointSelector: {matchLabels: {app: server}}
  ingress:
  - fromEndpoints: [{matchLabels: {app: client}}, {matchLabels: {app: middle}}]
    toPorts:
    - ports: [{port: "8080", protocol: TCP}, {port: "9080", protocol: TCP}]
  - fromEndpoints: [{matchLabels: {app: client}}]
    toPorts:
    - ports: [{port: "8081", protocol: TCP}, {port: "9081", protocol: TCP}]
      rules:
        http:
        - {method: GET, path: "/v1/request-.*"}
        - {method: POST, path: "/grpc.health.v1.Health/.*"}
---
apiVersion: cilium.io/v2
kind: CiliumNetworkPolicy
metadata: {name: middle}
spec:
  endpointSelector: {matchLabels: {app: middle}}
  ingress:
  - fromEndpoints: [{matchLabels: {app: client}}]
    toPorts: [{ports: [{port: "8080", protocol: TCP}, {port: "9080", protocol: TCP}]}]
`

// way is one of those that are compared.
type way struct {
	name string
	at   netip.Addr
	more uint16 // to the port
	pid  int    // of the proxy; 0: none, or portcullis's
}

// to is where a client calls.
func (w way) to(load string) string {
	port := uint16(8080)
	if load == "grpc" {
		port = 9080
	}
	return netip.AddrPortFrom(w.at, port+w.more).String()
}

type fixture struct {
	l      *lab.Lab
	node   string // the server's
	client map[string]string
	server *end
	ways   []way
	stops  []func() error
}

// workload brings one up, whose label says what it is.
func workload(ctx context.Context, l *lab.Lab, name, app, node string) (lab.Running, error) {
	return l.Run(ctx, lab.Workload{Name: name, Node: node, ServiceAccount: app, Labels: map[string]string{"app": app}}, lab.RunOptions{})
}

// newFixture brings up clients, the server and the proxies to compare with.
func newFixture(ctx context.Context, l *lab.Lab, nodes []lab.Node, with []string) (f *fixture, err error) {
	f = &fixture{l: l, node: nodes[1].Name, client: map[string]string{}}
	defer func() {
		if err != nil {
			err = errors.Join(err, f.close())
		}
	}()
	if err := l.ImportPolicies(ctx, &api.PolicyFile{Name: "l7", Content: []byte(policies)}); err != nil {
		return f, err
	}
	for path, node := range map[string]string{"nodes": nodes[0].Name, "node": nodes[1].Name} {
		r, err := workload(ctx, l, "client-"+path, "client", node)
		if err != nil {
			return f, err
		}
		f.client[path] = r.Spec.FullName()
	}
	server, err := workload(ctx, l, "server", "server", f.node)
	if err != nil {
		return f, err
	}
	if f.server, err = startEnd(l, server.Spec.FullName()); err != nil {
		return f, err
	}
	f.stops = append(f.stops, f.server.stop)
	ip := server.IP4()
	at := func(port uint16) string { return netip.AddrPortFrom(ip, port).String() }
	if _, err := f.server.do(order{Listen: []string{at(8080), at(8081)}, GRPC: []string{at(9080), at(9081)}}); err != nil {
		return f, err
	}
	f.ways = []way{{name: "direct", at: ip}, {name: "portcullis", at: ip, more: 1}}
	if err := f.awaitProxy(ctx); err != nil {
		return f, err
	}
	return f, f.addOthers(ctx, ip, with)
}

// awaitProxy waits until the agent has started its proxy.
func (f *fixture) awaitProxy(ctx context.Context) error {
	c, err := startEnd(f.l, f.client["nodes"])
	if err != nil {
		return err
	}
	for deadline := time.Now().Add(30 * time.Second); ; time.Sleep(50 * time.Millisecond) {
		if _, err = c.do(order{Load: "keep", Conns: 1, Millis: 1, To: f.ways[1].to("keep")}); err == nil || ctx.Err() != nil || time.Now().After(deadline) {
			return errors.Join(err, ctx.Err(), c.stop())
		}
	}
}

func (f *fixture) addOthers(ctx context.Context, server netip.Addr, with []string) error {
	for _, name := range with {
		r, err := workload(ctx, f.l, name, "middle", f.node)
		if err != nil {
			return err
		}
		dir, err := os.MkdirTemp("", "portcullis-bench-")
		if err != nil {
			return err
		}
		f.stops = append(f.stops, func() error { return os.RemoveAll(dir) })
		// Their workers are no longer root.
		if err := os.Chmod(dir, 0o755); err != nil {
			return err
		}
		stop, pid, err := startOther(ctx, f.l, name, r.Spec.FullName(), r.IP4(), server, dir)
		if err != nil {
			return err
		}
		f.stops = append(f.stops, stop)
		f.ways = append(f.ways, way{name: name, at: r.IP4(), pid: pid})
	}
	return nil
}

func (f *fixture) close() (err error) {
	for i := len(f.stops) - 1; i >= 0; i-- {
		err = errors.Join(err, f.stops[i]())
	}
	return err
}

// clocks are the CPU clocks of a way's proxy.
func (f *fixture) clocks(w way) ([]int32, error) {
	pid := w.pid
	switch w.name {
	case "direct":
		return nil, nil
	case "portcullis":
		var err error
		if pid, err = proxyOf(f.l, f.node); err != nil {
			return nil, err
		}
	}
	var out []int32
	for _, p := range family(pid) {
		out = append(out, rig.ProcessClock(p))
	}
	return out, nil
}

// proxyOf returns the process of a node's proxy, which its agent has started.
func proxyOf(l *lab.Lab, node string) (int, error) {
	for deadline := time.Now().Add(patience); time.Now().Before(deadline); time.Sleep(50 * time.Millisecond) {
		all, err := filepath.Glob("/proc/[0-9]*/cmdline")
		if err != nil {
			return 0, err
		}
		for _, at := range all {
			b, err := os.ReadFile(at)
			if err != nil {
				continue // it has ended
			}
			args := bytes.Split(b, []byte{0})
			if len(args) > 3 && string(args[1]) == "proxy" && string(args[3]) == l.PinDir(node) {
				return strconv.Atoi(filepath.Base(filepath.Dir(at)))
			}
		}
	}
	return 0, fmt.Errorf("node %s has no proxy", node)
}

// agents are the CPU clocks of all agents.
func (f *fixture) agents(ctx context.Context) (out []int32, err error) {
	st, err := f.l.Status(ctx)
	if err != nil {
		return nil, err
	}
	for _, n := range st.Nodes {
		out = append(out, rig.ProcessClock(n.PID))
	}
	return out, nil
}
