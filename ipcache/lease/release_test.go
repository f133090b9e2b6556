package lease_test

import (
	"testing"
	"time"

	"portcullis/identity"
	"portcullis/ipcache"
	"portcullis/ipcache/lease"
)

// F2: nor after a failed store. A new process asks whom the slot speaks of, and
// the store of its proof's end fails: were the binding given back, the owner would
// take back the grant whose Binding is on its way, which is then installed.
func TestF2ReleaseAfterAFailedStore(t *testing.T) {
	table, err := ipcache.New(ipcache.Config{Slots: 8, Leases: 8, NextStamp: 10})
	if err != nil {
		t.Fatal(err)
	}
	b := identity.Binding{IP: ip1, Generation: 7, UID: identity.UID{7}, Owner: "o"}
	proved := lease.Time(2 * time.Hour).Add(time.Hour) // an hour more, by the rig's clock
	if err := table.Restore(ipcache.Entry{Slot: 3, Stamp: 9, Lease: 5, Proved: int64(proved), Binding: b, Hash: y1.Hash(), OwnerBoot: bootO}); err != nil {
		t.Fatal(err)
	}
	v := newVerifierOver(t, table, nil)
	one[lease.OpenStream](t, v.wait(0))
	out := v.welcome(v.greet())
	c := one[lease.Confirm](t, out)
	all := only[lease.SetProved](out) // cut to what counts in the new session, then taken back: nobody asks for proofs
	out = v.step(lease.StoreFailed{Write: all[len(all)-1]})
	one[lease.Zero](t, out)
	none[lease.Release](t, out)
	none[lease.Release](t, v.wait(ms))
	// The answer settles it: who waits gets the binding, and else it goes back.
	v.want(ip1)
	none[lease.Confirm](t, v.last)
	out = v.msg(binding(c, 7, y1))
	none[lease.Release](t, out)
	if i := one[lease.Install](t, out); i.Binding.Generation != 7 || i.Stamp == 9 {
		t.Fatalf("%+v", i)
	}
}
