package agent

import (
	"net/netip"

	"portcullis/bpf/abi"
	"portcullis/identity"
)

// What a node without an agent of its own is to the others.
//
//	                       nobody asks      the kernel says
//	claimed by one node    ask that one     hold
//	claimed by two         nobody           conflict
//	node is unmanaged      nobody           unmanaged; during a migration it has
//	                                        the reserved identity unmanaged
//	node is gone           nobody           unbound
//
// That a node is unmanaged its operator says, by a label of the Node object. One
// that has no label and whose agent cannot be reached is no such node: its
// addresses stay owner-unreachable, or cutting an agent off would change who its
// workloads are taken for.

// class is why nobody speaks for a prefix that is known.
type class uint8

const (
	ownerless class = iota
	disputed
	unmanaged
)

// classify notes the prefixes for which nobody speaks for another reason than
// that their node is gone. It is the last step of newTopology.
func (t *topology) classify(nodes map[identity.NodeName]bool) {
	t.classes = map[netip.Prefix]class{}
	for _, d := range t.disputes {
		t.classes[d.prefix] = disputed
	}
	for p, n := range t.claims {
		if nodes[n] {
			t.claims[p] = ""
			t.classes[p] = unmanaged
		}
	}
	for n := range nodes {
		delete(t.peers, n) // it is not spoken with, either
	}
}

// known are the ranges whose IPs need a binding (I5), and those for whose there
// is somebody to ask. migration: nodes without agents are let in as unmanaged.
func (t *topology) known(migration bool) map[netip.Prefix]abi.Range {
	out := map[netip.Prefix]abi.Range{}
	for p, n := range t.claims {
		r := abi.Range{Flags: uint32(abi.RangeKnown)}
		switch {
		case n != "" && n != t.node:
			r.Flags |= uint32(abi.RangeHoldable)
		case t.classes[p] == disputed:
			r.Flags |= uint32(abi.RangeConflict)
		case t.classes[p] == unmanaged && migration:
			// Known by the range, as a block of the world is; but no block that
			// a policy names reaches into it, see datapath.FoldRanges.
			r = abi.Range{Identity: uint32(identity.NumUnmanaged)}
		case t.classes[p] == unmanaged:
			r.Flags |= uint32(abi.RangeUnmanaged)
		}
		out[p] = r
	}
	return out
}
