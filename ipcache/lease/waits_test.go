package lease_test

import (
	"testing"

	"portcullis/ipcache/lease"
)

// One IP too many to wait for is nobody's full map.
func TestFullWaits(t *testing.T) {
	v := newVerifier(t, func(c *lease.VerifierConfig) { c.Waits = 1 })
	v.step(lease.Want{IP: ip1, Owner: "o", Arrival: v.now})
	a := one[lease.Answer](t, v.step(lease.Want{IP: ip2, Owner: "o", Arrival: v.now}))
	if a.Live || a.IP != ip2 || a.Why != lease.UnansweredWaitsFull || a.Why.String() != "waits-full" {
		t.Fatalf("%+v, %v", a, a.Why)
	}
}
