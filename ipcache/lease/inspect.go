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
