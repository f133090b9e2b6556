package lease

import (
	"net/netip"
	"slices"
	"strings"
	"time"

	"portcullis/identity"
)

// GrantInfo is what status commands show of a grant.
type GrantInfo struct {
	Verifier   identity.NodeName
	IP         netip.Addr
	Generation identity.Generation
	UID        identity.UID
	Deadline   Time // by this node's clock: the verifier's lease is surely over then
	Revoked    bool // told, not yet acknowledged
}

// Grants returns every grant, sorted by IP and verifier.
func (o *Owner) Grants() []GrantInfo {
	out := make([]GrantInfo, 0, o.grants)
	for _, a := range o.ips {
		for _, g := range a.grants {
			out = append(out, GrantInfo{Verifier: g.verifier.name, IP: g.ip, Generation: g.gen, UID: g.uid, Deadline: g.deadline(), Revoked: g.revoked})
		}
	}
	slices.SortFunc(out, func(a, b GrantInfo) int {
		if c := a.IP.Compare(b.IP); c != 0 {
			return c
		}
		return strings.Compare(string(a.Verifier), string(b.Verifier))
	})
	return out
}

// GrantCount returns how many grants are outstanding.
func (o *Owner) GrantCount() int { return o.grants }

// StartupWait returns how long, at the least, no IP is bound because leases
// given before this process may run; 0: there is no such wait.
func (o *Owner) StartupWait(now Time) time.Duration {
	if o.coldUntil == 0 {
		return 0
	}
	return max(0, o.coldUntil.Add(o.cfg.ReuseMargin).Sub(now))
}

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
			Deadline: v.LeaseDeadline(p.lease), Bindings: len(v.table.OfOwner(p.name)), Waits: len(p.waits),
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
