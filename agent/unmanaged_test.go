package agent

import (
	"fmt"
	"net/netip"
	"slices"
	"testing"

	"portcullis/agent/kube"
	"portcullis/bpf/abi"
	"portcullis/identity"
)

// TestUnmanagedNodes: of a node that its label says to have no agent nobody is
// asked; its addresses are refused as such, or with --migration have the identity
// unmanaged, and never one of the world's blocks. A node without the label stays
// one that has to be asked, whether it answers or not.
func TestUnmanagedNodes(t *testing.T) {
	for _, migration := range []bool{false, true} {
		t.Run(fmt.Sprint("migration ", migration), func(t *testing.T) {
			n := newNode(t)
			first := n.inCluster()
			n.cfg.Migration = migration
			want := abi.Range{Flags: uint32(abi.RangeKnown | abi.RangeUnmanaged)}
			if migration {
				want = abi.Range{Identity: uint32(identity.NumUnmanaged)}
			}
			l := n.mustStart()
			holdable := abi.Range{Flags: uint32(abi.RangeKnown | abi.RangeHoldable)}
			are := func(what string, want abi.Range) {
				t.Helper()
				for _, p := range []string{"10.1.2.0/24", "192.0.2.2/32"} {
					if r, ok := n.rangeInKernel(l, p); !ok || r != want {
						t.Errorf("%s: %s is %+v in the kernel (%v), want %+v", what, p, r, ok, want)
					}
				}
			}
			are("without a label", holdable)
			labelled := with(first, func(p *kube.Picture) { p.Nodes = slices.Clone(p.Nodes); p.Nodes[1].Unmanaged = true })
			n.importPolicy(l, "apiVersion: networking.k8s.io/v1\nkind: NetworkPolicy\nmetadata: {name: block, namespace: default}\n"+
				"spec: {podSelector: {}, policyTypes: [Ingress], ingress: [{from: [{ipBlock: {cidr: 10.1.2.0/25}}, {ipBlock: {cidr: 10.0.0.0/8}}]}]}\n")
			l.take(labelled)
			are("labelled", want)
			if r, ok := n.rangeInKernel(l, "10.1.2.0/25"); ok {
				t.Errorf("a block of the world's reaches into its range: %+v", r)
			}
			if _, peer := l.topology.Load().peers["n2"]; peer || l.nodeOf(netip.MustParseAddr("10.1.2.5")) != "" {
				t.Error("it is asked")
			}
			if raised(l, "migration") != migration {
				t.Errorf("alarm migration: %v", !migration)
			}
			// The next agent, that is told otherwise, lets nobody pass meanwhile.
			n.crash(l)
			n.clusterOf(labelled)
			n.cfg.Migration = false
			l = n.mustStart()
			are("after a restart without --migration", abi.Range{Flags: uint32(abi.RangeKnown | abi.RangeUnmanaged)})
			l.take(first)
			are("its agent has come", holdable)
			// A label does not end a dispute.
			l.take(with(labelled, func(p *kube.Picture) {
				p.Nodes = append(slices.Clone(p.Nodes), aNode("n3", "192.0.2.2", "10.1.2.0/24"))
			}))
			are("and claimed by another", abi.Range{Flags: uint32(abi.RangeKnown | abi.RangeConflict)})
			l.take(with(first, func(p *kube.Picture) { p.Nodes = slices.Clone(p.Nodes); p.Nodes[0].Unmanaged = true }))
			if !raised(l, "node-unmanaged") {
				t.Error("nobody is told that this node is labelled")
			}
			n.crash(l)
		})
	}
}
