package lease_test

import (
	"testing"

	"portcullis/ipcache/lease"
)

// A full grant table refuses the next confirmation as busy: no grant makes room
// for another. One that is given back does.
func TestGrantTableIsBounded(t *testing.T) {
	r := newOwner(t, func(c *lease.OwnerConfig) { c.Grants = 1 })
	r.add(w0, y1, ip1)
	r.add(w1, y2, ip2)
	r.open(1)
	held := one[lease.Binding](t, r.msg(1, lease.Confirm{ID: 1, IP: ip1}))
	for id := range uint64(1000) {
		out := r.msg(1, lease.Confirm{ID: 2 + id, IP: ip2})
		none[lease.Journal](t, out)
		if no := one[lease.Refused](t, out); no.Reason != lease.RefusedBusy {
			t.Fatalf("refused: %v", no.Reason)
		}
	}
	if r.o.GrantCount() != 1 {
		t.Fatalf("%d grants", r.o.GrantCount())
	}
	r.msg(1, lease.Release{IP: ip1, Generation: held.Binding.Generation})
	one[lease.Binding](t, r.msg(1, lease.Confirm{ID: 5000, IP: ip2}))
}
