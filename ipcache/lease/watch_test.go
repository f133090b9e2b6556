package lease_test

import (
	"testing"
	"time"

	"portcullis/identity"
	"portcullis/ipcache"
	"portcullis/ipcache/lease"
)

// Mode watch: what was told is believed for a bound after the last proof that it
// was all, under a lease index of its own.
func TestWatch(t *testing.T) {
	table, err := ipcache.New(ipcache.Config{Slots: 8, Leases: 8, NextStamp: 1})
	if err != nil {
		t.Fatal(err)
	}
	cfg := lease.VerifierConfig{Node: "v", Speaks: func(n identity.NodeName, _ addr) bool { return n == "o" }}
	const bound = time.Minute
	v, err := lease.NewWatchVerifier(cfg, table, bound)
	if err != nil {
		t.Fatal(err)
	}
	index := v.Lease()
	if index < ipcache.LeaseFirst {
		t.Fatalf("lease index %d", index)
	}
	now := lease.Time(time.Hour)
	b := identity.Binding{IP: ip1, Generation: 1, UID: w0, Identity: y1, Owner: "o"}
	i := one[lease.Install](t, v.Step(now, lease.Told{Binding: b}))
	if i.Lease != index || i.Evidence != identity.EvidenceWatch {
		t.Fatalf("%+v", i)
	}
	// Told, and not proved.
	none[lease.Answer](t, v.Step(now, lease.Want{IP: ip1, Owner: "o", Arrival: now}))
	if why, _ := v.Reason(ip1); why != lease.UnansweredStale {
		t.Errorf("unanswered for %v", why)
	}
	out := v.Step(now, lease.Proved{At: now.Add(-time.Second)})
	if d := one[lease.SetDeadline](t, out); d.Lease != index || d.Deadline != now.Add(bound-time.Second) || v.LeaseDeadline(index) != d.Deadline {
		t.Errorf("%+v", d)
	}
	if a := one[lease.Answer](t, out); !a.Live || a.IP != ip1 {
		t.Errorf("%+v", a)
	}
	if a := one[lease.Answer](t, v.Step(now, lease.Want{IP: ip1, Owner: "o", Arrival: now})); !a.Live {
		t.Errorf("%+v", a)
	}
	// An older proof moves nothing back.
	none[lease.SetDeadline](t, v.Step(now, lease.Proved{At: now.Add(-30 * time.Second)}))
	// One that is not there yet: until somebody tells.
	none[lease.Answer](t, v.Step(now, lease.Want{IP: ip2, Owner: "o", Arrival: now}))
	if why, _ := v.Reason(ip2); why != lease.UnansweredTimeout {
		t.Errorf("unanswered for %v", why)
	}
	b2 := b
	b2.IP, b2.UID = ip2, w1
	if a := one[lease.Answer](t, v.Step(now, lease.Told{Binding: b2})); !a.Live || a.IP != ip2 {
		t.Errorf("%+v", a)
	}
	// The bound passes.
	now = now.Add(bound)
	none[lease.Answer](t, v.Step(now, lease.Want{IP: ip1, Owner: "o", Arrival: now}))
	// What is over goes before the deadline moves; if that fails it does not.
	z := one[lease.Zero](t, v.Step(now, lease.Untold{IP: ip1, UID: w0}))
	v.Step(now, lease.StoreFailed{Write: z})
	outs := v.Step(now, lease.Proved{At: now})
	if len(outs) < 2 || outs[0] != lease.VerifierOutput(z) {
		t.Fatalf("%+v", outs)
	}
	one[lease.SetDeadline](t, outs)
	v.Step(now, lease.StoreFailed{Write: z})
	if v.LeaseDeadline(index) != 0 {
		t.Error("a deadline that was not written counts")
	}
	outs = v.Step(now, lease.Proved{At: now})
	one[lease.Zero](t, outs)
	one[lease.SetDeadline](t, outs)
	v.Step(now, lease.VerifierTick{})
	if n := table.LeaseUsers(index); n != 1 {
		t.Errorf("%d entries name the lease", n)
	}
	// Another's word counts nothing.
	b2.Owner, b2.IP = "p", ip1
	none[lease.Install](t, v.Step(now, lease.Told{Binding: b2}))

	// A restart takes the index over.
	again, err := lease.NewWatchVerifier(cfg, table, bound)
	if err != nil || again.Lease() != index {
		t.Errorf("index %d instead of %d: %v", again.Lease(), index, err)
	}
	if _, err := lease.NewWatchVerifier(cfg, table, 0); err == nil {
		t.Error("no bound")
	}
}
