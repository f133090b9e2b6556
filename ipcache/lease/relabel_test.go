package lease_test

import (
	"slices"
	"strings"
	"testing"
	"time"

	"portcullis/identity"
	"portcullis/ipcache/lease"
)

func (r *ownerRig) relabel(uid identity.UID, id identity.Identity) []lease.OwnerOutput {
	delete(r.active, uid)
	return r.step(lease.Relabel{UID: uid, Identity: id})
}

// held1 is held0 in a mode.
func held1(t *testing.T, mode lease.RelabelMode) (*ownerRig, lease.Binding) {
	t.Helper()
	r := newOwner(t, func(c *lease.OwnerConfig) { c.Relabel = mode })
	r.add(w0, y1, ip1)
	r.open(1)
	return r, r.confirm(1, ip1)
}

// Mode prompt: the former bindings are revoked, and the workload is bound under
// the new identity in the same step, in this order and in the journal too.
func TestRelabelPrompt(t *testing.T) {
	r, b := held0(t)
	r.wait(time.Second)
	out := r.relabel(w0, y2)
	at := func(what func(lease.OwnerOutput) bool) int { return slices.IndexFunc(out, what) }
	record := func(k lease.RecordKind) func(lease.OwnerOutput) bool {
		return func(o lease.OwnerOutput) bool { j, ok := o.(lease.Journal); return ok && j.Record.Kind == k }
	}
	order := []int{
		at(func(o lease.OwnerOutput) bool { _, ok := o.(lease.SendToVerifier); return ok }), // Revoke
		at(record(lease.RecordEnded)), at(record(lease.RecordBound)),
		at(func(o lease.OwnerOutput) bool { _, ok := o.(lease.Activate); return ok }),
	}
	if order[0] < 0 || !slices.IsSorted(order) {
		t.Fatalf("revoke, ended, bound, activate at %v", order)
	}
	rev := one[lease.Revoke](t, out)
	if rev.Generation != b.Binding.Generation || r.active[w0] <= rev.Generation {
		t.Fatalf("%+v, new generation %d", rev, r.active[w0])
	}
	l := slices.IndexFunc(out, func(o lease.OwnerOutput) bool {
		x, ok := o.(lease.OwnerLog)
		return ok && x.Entry.Kind == lease.LogRelabel
	})
	if l < 0 {
		t.Fatal("not in the confirmation log")
	}
	if e := out[l].(lease.OwnerLog).Entry; !e.Identity.Equal(y2) || !strings.Contains(e.Reason, "prompt") || !strings.Contains(e.Reason, y1.String()) {
		t.Fatalf("%+v", e)
	}
	// What was sent before is not taken for the new identity's: since counts
	// from the relabel.
	r.now = r.now.Add(20 * ms)
	c := r.confirm(1, ip1)
	if !c.Binding.Identity.Equal(y2) || c.Binding.Generation != r.active[w0] || c.Since != 20*ms {
		t.Fatalf("%+v", c)
	}
}

// The exception of mode prompt ends with the lease: nothing that the owner says
// after a relabel renews the former identity.
func TestRelabelPromptIsBoundedByTheLease(t *testing.T) {
	r, b := held0(t)
	r.wait(time.Second)
	before, _ := r.o.GrantDeadline("v", ip1, b.Binding.Generation)
	r.relabel(w0, y2)
	r.msg(1, lease.Heartbeat{SentAt: 1, Ask: lease.MaxLease})
	if d, ok := r.o.GrantDeadline("v", ip1, b.Binding.Generation); !ok || d != before {
		t.Fatalf("the grant on the former identity ends at %d, %v; want %d", d, ok, before)
	}
	// Nor does a new session, whether or not the agent was started anew.
	if w := r.open(2, held(b)); len(w.Stands) != 0 || len(w.Revoked) != 1 {
		t.Fatalf("%+v", w)
	}
	r.restart(false, lease.Adopt{Add: lease.Add{UID: w0, IPs: addrs(ip1), Identity: y2}})
	if w := r.open(3, held(b)); len(w.Stands) != 0 || len(w.Revoked) != 1 {
		t.Fatalf("%+v", w)
	}
	if g := r.confirm(3, ip1).Binding.Generation; g <= b.Binding.Generation {
		t.Fatalf("generation %d after %d", g, b.Binding.Generation)
	}
}

// Mode strict: the workload waits as a newcomer on its own IP would.
func TestRelabelStrict(t *testing.T) {
	r, b := held1(t, lease.RelabelStrict)
	r.wait(time.Second)
	out := r.relabel(w0, y2)
	none[lease.Activate](t, out)
	rev := one[lease.Revoke](t, out)
	if x := one[lease.Refused](t, r.msg(1, lease.Confirm{ID: 2, IP: ip1})); x.Reason != lease.RefusedQuarantined {
		t.Fatalf("refused: %v", x.Reason)
	}
	r.now = r.now.Add(time.Second)
	none[lease.Activate](t, r.tick()) // not while the lease may run
	r.msg(1, lease.Ack{IP: ip1, Generation: b.Binding.Generation, Seq: rev.Seq})
	r.activatesAfter(w0, margin)
	if c := r.confirm(1, ip1); !c.Binding.Identity.Equal(y2) {
		t.Fatalf("%+v", c)
	}
}

// Of a workload that waits, only what it waits as is changed.
func TestRelabelOfAQuarantinedOne(t *testing.T) {
	for _, mode := range []lease.RelabelMode{lease.RelabelPrompt, lease.RelabelStrict} {
		r, _ := held1(t, mode)
		r.del(w0)
		r.add(w1, y1, ip1)
		out := r.relabel(w1, y2)
		none[lease.Activate](t, out)
		none[lease.Revoke](t, out)
		none[lease.Activate](t, r.wait(time.Second))
		r.wait(lease.MaxLease)
		if c := r.confirm(1, ip1); c.Binding.UID != w1 || !c.Binding.Identity.Equal(y2) {
			t.Fatalf("%v: %+v", mode, c)
		}
	}
}

func TestRelabelRejected(t *testing.T) {
	r, _ := held0(t)
	one[lease.Rejected](t, r.relabel(w2, y2))
	r.add(w1, y2, ip1) // w0 is leaving
	one[lease.Rejected](t, r.relabel(w0, y2))
	if s := r.o.WorkloadState(w0); s != lease.WorkloadLeaving {
		t.Fatalf("state %v", s)
	}
}

// The journal fails in the middle: the workload waits, and is tried again,
// whichever record it was.
func TestRelabelWithoutAJournal(t *testing.T) {
	for nth := range 2 {
		r, b := held0(t)
		gen := r.active[w0]
		out := r.relabel(w0, y2)
		rec := only[lease.Record](out)[nth]
		r.step(lease.JournalFailed{Record: rec})
		if s := r.o.WorkloadState(w0); s != lease.WorkloadQuarantined {
			t.Fatalf("record %d: state %v", nth, s)
		}
		delete(r.active, w0)
		r.activatesAfter(w0, time.Second)
		if r.active[w0] <= gen {
			t.Fatalf("record %d: generation %d after %d", nth, r.active[w0], gen)
		}
		if w := r.open(2, held(b)); len(w.Stands) != 0 {
			t.Fatalf("record %d: the former identity stands: %+v", nth, w)
		}
	}
}

// A crash after the relabel was journalled: the new identity is adopted, the
// former one's end is known.
func TestRelabelSurvivesARestart(t *testing.T) {
	r, _ := held0(t)
	r.wait(time.Second)
	r.relabel(w0, y2)
	gen := r.active[w0]
	r.now = r.now.Add(time.Second)
	r.restart(false, lease.Adopt{Add: lease.Add{UID: w0, IPs: addrs(ip1), Identity: y2}})
	r.open(2)
	if c := r.confirm(2, ip1); c.Binding.Generation != gen || c.Since != time.Second {
		t.Fatalf("%+v, want generation %d and since 1s", c, gen)
	}
}
