package lease

import (
	"net/netip"
	"slices"
	"strings"
	"time"

	"portcullis/identity"
)

// WorkloadInfo is what status commands show of a workload.
type WorkloadInfo struct {
	Add
	State      WorkloadState
	Generation identity.Generation
	Since      Time // added
	OpensAt    Time // when quarantined: at the latest, as far as is known; 0: not bounded
	Leases     int  // when quarantined: grants that it waits for
}

// Workloads implements OwnerMachine: sorted by UID.
func (o *Owner) Workloads() []WorkloadInfo {
	out := make([]WorkloadInfo, 0, len(o.workloads))
	for _, w := range o.workloads {
		i := WorkloadInfo{Add: w.Add, State: w.state, Generation: w.gen, Since: w.added}
		if w.state == WorkloadQuarantined {
			i.OpensAt, _ = o.openAt(w)
			for _, ip := range w.IPs {
				for _, g := range o.ips[ip].grants {
					if o.now < g.deadline() {
						i.Leases++
					}
				}
			}
		}
		out = append(out, i)
	}
	slices.SortFunc(out, func(a, b WorkloadInfo) int { return slices.Compare(a.UID[:], b.UID[:]) })
	return out
}

// OwnerSession is what status commands show of a session with a verifier.
type OwnerSession struct {
	Stream   StreamID
	Verifier identity.NodeName
	State    StreamState
	Deadline Time // of the leases given on it, by this node's clock
	Grants   int
}

// Sessions implements OwnerMachine: sorted by stream.
func (o *Owner) Sessions() []OwnerSession {
	out := make([]OwnerSession, 0, len(o.streams))
	for _, s := range o.streams {
		i := OwnerSession{Stream: s.id, Verifier: s.v.name, State: s.state, Deadline: s.deadline}
		if s.state == StreamOpen {
			i.Grants = len(s.v.grants)
		}
		out = append(out, i)
	}
	slices.SortFunc(out, func(a, b OwnerSession) int { return int(a.Stream) - int(b.Stream) })
	return out
}

// StreamState returns where a stream stands.
func (o *Owner) StreamState(id StreamID) StreamState {
	if s := o.streams[id]; s != nil {
		return s.state
	}
	return StreamNone
}

// WorkloadState returns where a workload stands.
func (o *Owner) WorkloadState(uid identity.UID) WorkloadState {
	if w := o.workloads[uid]; w != nil {
		return w.state
	}
	return WorkloadNone
}

// GrantDeadline returns when, by this node's clock, the verifier's lease on a
// binding is surely over, and whether there is such a grant. During the
// start-up wait every binding has one, whether or not its grant is known.
func (o *Owner) GrantDeadline(verifier identity.NodeName, ip netip.Addr, gen identity.Generation) (Time, bool) {
	d, ok := o.coldUntil, o.now < o.coldUntil
	if a := o.ips[ip]; a != nil {
		for _, g := range a.grants {
			if g.verifier.name == verifier && g.gen == gen {
				d, ok = later(d, g.deadline()), true
			}
		}
	}
	return d, ok
}

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
