package main

import (
	"context"
	"errors"
	"net/netip"

	"portcullis/agent/api"
	"portcullis/chaos/lab"
	"portcullis/test/bench/rig"
)

// Both directions are under policy that depends on the peer, so that every
// packet needs evidence at both of its ends.
const policies = `
apiVersion: cilium.io/v2
kind: CiliumNetworkPolicy
metadata: {name: server}
spec:
  endpointSelector: {matchLabels: {io.cilium.k8s.policy.serviceaccount: server}}
  ingress:
  - fromEndpoints: [{matchLabels: {io.cilium.k8s.policy.serviceaccount: client}}]
    toPorts: [{ports: [{port: "5000", protocol: ANY}]}]
---
apiVersion: cilium.io/v2
kind: CiliumNetworkPolicy
metadata: {name: client}
spec:
  endpointSelector: {matchLabels: {io.cilium.k8s.policy.serviceaccount: client}}
  egress:
  - toEndpoints: [{matchLabels: {io.cilium.k8s.policy.serviceaccount: server}}]
    toPorts: [{ports: [{port: "5000", protocol: ANY}]}]
`

const port = 5000

// ends are two workloads that talk.
type ends struct {
	client, server string // full names
	address        netip.AddrPort
}

// sides are the same traffic with programs and policy, and without.
type sides struct{ with, without ends }

type fixture struct {
	l      *lab.Lab
	paths  map[string]sides
	agents []int    // pids
	pins   []string // directories
}

// newFixture brings up clients and servers: of each path one pair of workloads
// that the agents know, and one of which they do not.
func newFixture(ctx context.Context, l *lab.Lab, nodes []lab.Node) (*fixture, error) {
	f := &fixture{l: l, paths: map[string]sides{}}
	if err := l.ImportPolicies(ctx, &api.PolicyFile{Name: "throughput", Content: []byte(policies)}); err != nil {
		return nil, err
	}
	client, server := nodes[0].Name, nodes[1].Name
	for path, clientNode := range map[string]string{"nodes": client, "node": server} {
		var s sides
		for _, side := range []struct {
			suffix string
			bare   bool
			ends   *ends
		}{{"with", false, &s.with}, {"without", true, &s.without}} {
			o := lab.RunOptions{Unregistered: side.bare}
			name := path + "-" + side.suffix
			c, err := l.Run(ctx, lab.Workload{Name: "client-" + name, Node: clientNode, ServiceAccount: "client"}, o)
			if err != nil {
				return nil, err
			}
			srv, err := l.Run(ctx, lab.Workload{Name: "server-" + name, Node: server, ServiceAccount: "server"}, o)
			if err != nil {
				return nil, err
			}
			*side.ends = ends{client: c.Spec.FullName(), server: srv.Spec.FullName(), address: netip.AddrPortFrom(srv.IP4(), port)}
		}
		f.paths[path] = s
	}
	st, err := l.Status(ctx)
	if err != nil {
		return nil, err
	}
	for _, n := range st.Nodes {
		f.agents = append(f.agents, n.PID)
		f.pins = append(f.pins, l.PinDir(n.Name))
	}
	if len(f.agents) != len(nodes) {
		return nil, errors.New("an agent is missing")
	}
	return f, nil
}

// drops returns how many packets the programs of all nodes have dropped.
func (f *fixture) drops(ctx context.Context) (n uint64, err error) {
	st, err := f.l.Status(ctx)
	if err != nil {
		return 0, err
	}
	for _, node := range st.Nodes {
		s, err := rig.AgentStatus(ctx, f.l, node.Name)
		if err != nil {
			return 0, err
		}
		for _, packets := range rig.Drops(s) {
			n += packets
		}
	}
	return n, nil
}
