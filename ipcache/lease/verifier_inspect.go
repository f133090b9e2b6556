package lease

import (
	"slices"

	"portcullis/identity"
)

// VerifierSession is what status commands show of a session with an owner.
type VerifierSession struct {
	Owner    identity.NodeName
	Stream   StreamID // 0: none
	State    PeerState
	Boot     identity.BootID // of the owner, when open
	Lease    uint32          // index; 0: none
	Deadline Time            // of the lease, by this node's clock
	Bindings int
	Waits    int
}

// Sessions implements VerifierMachine.
func (v *Verifier) Sessions() []VerifierSession {
	out := make([]VerifierSession, 0, len(v.order))
	for _, p := range v.order {
		out = append(out, VerifierSession{
			Owner: p.name, Stream: p.stream, State: p.state, Boot: p.boot, Lease: p.lease,
			Deadline: v.LeaseDeadline(p.lease), Bindings: v.table.CountOf(p.name), Waits: len(p.waits),
		})
	}
	slices.SortFunc(out, func(a, b VerifierSession) int {
		if a.Owner < b.Owner {
			return -1
		}
		return 1
	})
	return out
}

// PeerState returns where this verifier stands with an owner.
func (v *Verifier) PeerState(owner identity.NodeName) PeerState {
	if p := v.peers[owner]; p != nil {
		return p.state
	}
	return PeerIdle
}

// StreamPeer returns the owner whose current stream this is; "": of nobody.
func (v *Verifier) StreamPeer(id StreamID) identity.NodeName {
	if p := v.byStream[id]; p != nil {
		return p.name
	}
	return ""
}
