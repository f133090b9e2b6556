package lease_test

import (
	"net/netip"
	"testing"
	"time"

	"portcullis/ipcache/lease"
)

// A workload that had its IPs long before the agent came owes the start-up
// wait only for what others may have been granted before it had them.
func TestStartUpWaitOfWhoWasThere(t *testing.T) {
	const longest = lease.MaxLease * 5 / 4
	for name, c := range map[string]struct{ held, wait time.Duration }{
		"longer than any lease": {longest, margin},
		"for ever":              {50 * time.Minute, margin},
		"for a while":           {20 * time.Second, longest - 20*time.Second + margin},
		"from now on":           {0, longest + margin},
	} {
		t.Run(name, func(t *testing.T) {
			r, _ := held0(t)
			r.restart(true)
			r.step(lease.Add{UID: w1, IPs: []netip.Addr{ip1}, Identity: y2, HeldSince: r.now.Add(-c.held)})
			r.activatesAfter(w1, c.wait)
		})
	}
}
