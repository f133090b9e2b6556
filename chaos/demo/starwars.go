package demo

import (
	"context"
	"net/netip"
	"time"

	"portcullis/agent/api"
	"portcullis/chaos/lab"
	"portcullis/docs/examples"
)

// cluster is the demo's lab: the workloads of the stale identity, with
// evidence lease those of the other steps too.
func cluster(mode string) lab.Config {
	c := parse("stale-identity.cluster.yaml")
	if mode == "lease" {
		c.Workloads = append(c.Workloads, parse("starwars.cluster.yaml").Workloads...)
		f := parse("agent-faults.cluster.yaml")
		c.Nodes, c.Workloads = append(c.Nodes, f.Nodes...), append(c.Workloads, f.Workloads...)
		c.Workloads = append(c.Workloads, insideWorkloads()...)
	}
	c.Evidence = mode
	c.TTL, c.Heartbeat = lab.DefaultTTL, lab.DefaultHeartbeat
	return c
}

func parse(name string) lab.Config {
	c, err := lab.ParseConfig(examples.Read(name))
	if err != nil {
		panic(err) // an embedded file, parsed by a test too
	}
	return c
}

func policyFile(name string) *api.PolicyFile {
	return &api.PolicyFile{Name: name, Content: examples.Read(name)}
}

// importPolicies imports a file at every node that a step may involve; the
// agents of step 5 have faults of their own meanwhile. The killed agent of step
// 3 has no part in what follows.
func (s *story) importPolicies(ctx context.Context, l *lab.Lab, name string) error {
	for _, node := range []string{clientNode, serverNode, rogueNode} {
		if node == rogueNode && s.rogueDead[l] {
			continue
		}
		if err := l.ImportPoliciesAt(ctx, node, policyFile(name)); err != nil {
			return err
		}
	}
	return nil
}

// starWars is steps 1 and 2.
func (s *story) starWars(ctx context.Context, l *lab.Lab) error {
	deathstar, err := l.Get("deathstar")
	if err != nil {
		return err
	}
	ship := func(name string, reasons ...string) error {
		from, err := l.Get(name)
		if err != nil {
			return err
		}
		a := &act{l: l, from: name, args: httpArgs("post", "http://deathstar/v1/request-landing"), judges: []string{deathstar.Spec.Node},
			flow: flowFilter{src: from.IP4(), dst: deathstar.IP4(), port: 80, proto: "TCP"}, allowed: landed, reasons: reasons}
		step, expected := "1. no policy: "+name, landed
		if len(reasons) > 0 || name == "tiefighter" && s.policy {
			step = "2. networkpolicy-L4.yaml: " + name
		}
		if len(reasons) > 0 {
			expected = expectDrop(reasons...)
		}
		s.do(Step{Name: step, Mode: "lease", Does: name + " asks the deathstar for landing", Expected: expected},
			func(st *Step) error { return a.run(ctx, st) })
		return ctx.Err()
	}

	s.say("\n1. Three nodes and the Star Wars workloads, no policy: everybody may land.")
	if err := waitServing(ctx, l, "tiefighter", netip.AddrPortFrom(deathstar.IP4(), 80)); err != nil {
		return err
	}
	for _, name := range []string{"tiefighter", "xwing"} {
		if err := ship(name); err != nil {
			return err
		}
	}
	s.say("\n2. networkpolicy-L4.yaml: only ships of the empire may use the deathstar's port 80.")
	if err := s.importPolicies(ctx, l, "networkpolicy-L4.yaml"); err != nil {
		return err
	}
	s.policy = true
	if err := ship("tiefighter"); err != nil {
		return err
	}
	return ship("xwing", "policy-denied")
}

// waitServing waits until a server that was just started listens.
func waitServing(ctx context.Context, l *lab.Lab, from string, addr netip.AddrPort) error {
	for deadline := time.Now().Add(10 * time.Second); ; {
		a, err := probe(ctx, l, from, "tcp", addr.String(), "--timeout", "1s")
		if err != nil || a.OK || time.Now().After(deadline) {
			return err
		}
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-time.After(50 * time.Millisecond):
		}
	}
}
