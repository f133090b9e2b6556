package lease_test

import (
	"slices"
	"testing"
	"time"

	"portcullis/ipcache/lease"
)

// What was not journalled is not said, and tried again.
func TestJournalBeforeTheWord(t *testing.T) {
	r := newOwner(t, nil)
	out := r.add(w0, y1, ip1)
	bound := slices.IndexFunc(out, func(o lease.OwnerOutput) bool {
		j, ok := o.(lease.Journal)
		return ok && j.Record.Kind == lease.RecordBound
	})
	act := slices.IndexFunc(out, func(o lease.OwnerOutput) bool { _, ok := o.(lease.Activate); return ok })
	if bound < 0 || bound > act {
		t.Fatalf("bound at %d, activate at %d", bound, act)
	}
	// The journal fails: not active, tried again, with a new generation.
	gen := out[act].(lease.Activate).Generation
	r.step(lease.JournalFailed(out[bound].(lease.Journal)))
	if s := r.o.WorkloadState(w0); s != lease.WorkloadQuarantined {
		t.Fatalf("state %v", s)
	}
	delete(r.active, w0)
	r.wait(time.Second)
	if g := r.active[w0]; g <= gen {
		t.Fatalf("generation %d after %d", g, gen)
	}

	r.open(1)
	out = r.msg(1, lease.Confirm{ID: 1, IP: ip1})
	grant := out[0].(lease.Journal)
	if grant.Record.Kind != lease.RecordGrant {
		t.Fatalf("first is %+v", out[0])
	}
	// The grant is not journalled, so the Binding was not sent: it is refused,
	// and nobody's; the session goes on.
	for i := range uint64(3) {
		out = r.step(lease.JournalFailed(grant))
		none[lease.CloseVerifier](t, out)
		none[lease.Journal](t, out)
		if m := one[lease.Refused](t, out); m.Reason != lease.RefusedBusy || m.IP != ip1 || m.Confirm != 1+i {
			t.Fatalf("%+v", m)
		}
		if e := one[lease.OwnerLog](t, out).Entry; e.Kind != lease.LogRefusal {
			t.Fatalf("%+v", e)
		}
		if s := r.o.StreamState(1); s != lease.StreamOpen || r.o.GrantCount() != 0 {
			t.Fatalf("stream %v, %d grants", s, r.o.GrantCount())
		}
		one[lease.HeartbeatReply](t, r.msg(1, lease.Heartbeat{SentAt: 1, Ask: time.Second}))
		out = r.msg(1, lease.Confirm{ID: 2 + i, IP: ip1})
		one[lease.Binding](t, out)
		grant = out[0].(lease.Journal)
	}
	// This time it is written: it stands, and its end is revoked.
	if n := r.o.GrantCount(); n != 1 {
		t.Fatalf("%d grants", n)
	}
	one[lease.Revoke](t, r.del(w0))
}

// A Bound whose workload could not be journalled as bound is not said, and no
// stream ends for it; it is said when the workload is.
func TestJournalFailsBeforeBound(t *testing.T) {
	r := newOwner(t, nil)
	r.add(w0, y1, ip1)
	r.open(1)
	r.del(w0)
	out := r.add(w1, y1, ip1)
	one[lease.Refused](t, r.msg(1, lease.Confirm{ID: 1, IP: ip1}))
	for range 100 {
		if out = r.wait(10 * time.Millisecond); len(only[lease.Activate](out)) == 1 {
			break
		}
	}
	one[lease.Bound](t, out)
	bound := one[lease.Journal](t, out)
	out = r.step(lease.JournalFailed(bound))
	none[lease.CloseVerifier](t, out)
	for _, l := range only[lease.OwnerLog](out) {
		t.Errorf("told of what did not happen: %+v", l)
	}
	if r.o.StreamState(1) != lease.StreamOpen || r.o.WorkloadState(w1) != lease.WorkloadQuarantined {
		t.Fatalf("stream %v, workload %v", r.o.StreamState(1), r.o.WorkloadState(w1))
	}
	for range 100 {
		if out = r.wait(10 * time.Millisecond); len(only[lease.Activate](out)) == 1 {
			break
		}
	}
	one[lease.Bound](t, out)
}

// Who asks again for a workload that is active gets the answer, and the workload
// goes on, whatever else could not be journalled in that step: here, the adoption
// of two workloads by an agent whose journal is lost and fails again.
// (Simulation, seed 496661.)
func TestJournalFailsBeforeActivateAgain(t *testing.T) {
	for nth := range 3 {
		r, _ := held0(t)
		gen := r.active[w0]
		adopt := lease.Adopt{Add: lease.Add{UID: w0, IPs: addrs(ip1), Identity: y1}, Generation: gen}
		also := lease.Adopt{Add: lease.Add{UID: w1, IPs: addrs(ip2), Identity: y2}, Generation: gen + 1}
		r.now = r.now.Add(time.Second)
		r.cfg.Journal, r.cfg.Records, r.cfg.FreshRanges, r.journal = lease.JournalMissing, nil, false, nil
		r.start()
		r.step(adopt)
		r.step(also)
		out := r.add(w0, y1, ip1)
		records := only[lease.Journal](out)
		if len(records) != 3 { // the wait, and both that were not journalled
			t.Fatalf("journalled %+v", records)
		}
		out = r.step(lease.JournalFailed(records[nth]))
		if again := one[lease.Activate](t, out); again.UID != w0 || again.Generation != gen || !again.Again {
			t.Errorf("record %d: %+v", nth, again)
		}
		if s := r.o.WorkloadState(w0); s != lease.WorkloadActive {
			t.Fatalf("record %d: state %v", nth, s)
		}
		r.open(2)
		if c := r.confirm(2, ip1); c.Binding.Generation != gen {
			t.Errorf("record %d: confirmed %+v", nth, c)
		}
	}
}

// A grant whose record was lost is journalled before the verifier hears of it
// again, also when it stands in the books already.
func TestLostGrantIsJournalledLater(t *testing.T) {
	r, b := held0(t)
	gen := r.active[w0]
	r.restart(true, lease.Adopt{Add: lease.Add{UID: w0, IPs: addrs(ip1), Identity: y1}, Generation: gen})
	out := r.msg(2, hello(r.accept(2), held(b)))
	r.step(lease.JournalFailed{Record: one[lease.Record](t, out)})
	out = r.msg(3, hello(r.accept(3), held(b)))
	if rec := one[lease.Record](t, out); rec.Kind != lease.RecordGrant {
		t.Fatalf("%+v", rec)
	}
	if _, ok := out[len(out)-1].(lease.Journal); ok {
		t.Fatal("journalled after the Welcome")
	}
	none[lease.Record](t, r.msg(3, lease.Confirm{ID: 1, IP: ip1}))
}
