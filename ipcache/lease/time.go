package lease

import "time"

// stretch returns d x (1 + rho), rounded up: how long an owner must wait so
// that d has passed on any verifier's clock (A2).
func stretch(d time.Duration) time.Duration {
	return d + (d*RhoNum+RhoDen-1)/RhoDen
}

// shrink returns d / (1 + rho), rounded down: how much has surely passed on
// this clock when d has passed on another (A2).
func shrink(d time.Duration) time.Duration {
	return d * RhoDen / (RhoDen + RhoNum)
}

// later is the later-of rule: an owner's deadline never moves back.
func later(a, b Time) Time { return max(a, b) }

// grantable is what an owner grants when asked for a TTL.
func grantable(ask time.Duration) time.Duration { return min(max(ask, 0), MaxLease) }
