package lease_test

import (
	"testing"
	"time"

	"portcullis/ipcache/lease"
)

// The tests of this file are the traces by which an explicit-state model broke
// earlier wordings of the protocol (docs/lease-protocol.md lists the
// sentences). Each drives a machine to the point where the wording went wrong.

// held0 is an owner whose w0 has ip1 and is confirmed to v on stream 1.
func held0(t *testing.T) (*ownerRig, lease.Binding) {
	t.Helper()
	r := newOwner(t, nil)
	r.add(w0, y1, ip1)
	r.open(1)
	return r, r.confirm(1, ip1)
}

const wait = ttl + ttl/4 // of an owner for a lease of one TTL

// B1: a Hello is dated by its nonce, not by its arrival. One of an older
// stream, read late, neither takes the session over nor accounts for grants.
func TestB1HelloOrderedByArrival(t *testing.T) {
	r := newOwner(t, nil)
	r.add(w0, y1, ip1)
	old := r.accept(1) // its Hello is under way when the verifier gives it up
	r.open(2)
	b := r.confirm(2, ip1)
	r.del(w0)
	r.add(w1, y2, ip1)
	if out := r.msg(1, hello(old)); len(only[lease.SendToVerifier](out)) != 0 || len(only[lease.Record](out)) != 0 {
		t.Fatalf("the late Hello changed something: %+v", out)
	}
	if r.o.StreamState(2) != lease.StreamOpen {
		t.Fatal("the late Hello closed the session")
	}
	if _, ok := r.o.GrantDeadline("v", ip1, b.Binding.Generation); !ok {
		t.Fatal("the late Hello dropped the grant")
	}
	r.activatesAfter(w1, wait+margin)
}

// B2: what a Welcome refuses stays booked until the verifier acks.
func TestB2WelcomeDropsRefusedGrants(t *testing.T) {
	r, b := held0(t)
	r.del(w0)
	r.add(w1, y2, ip1)
	r.step(lease.VerifierGone{Stream: 1}) // and the Revoke is lost
	w := r.open(2, held(b))
	if len(w.Stands) != 0 || len(w.Revoked) != 1 {
		t.Fatalf("welcome: %+v", w)
	}
	r.wait(margin)
	if len(r.active) != 0 {
		t.Fatal("bound before the refused binding was acked")
	}
	r.msg(2, lease.Ack{IP: ip1, Generation: b.Binding.Generation})
	r.activatesAfter(w1, margin)
}

// B3: a grant that moves to a new session keeps the later of both deadlines.
func TestB3TransferredGrantGetsNewSessionDeadline(t *testing.T) {
	r, b := held0(t)
	r.msg(1, lease.Heartbeat{SentAt: 2, Ask: lease.MaxLease})
	r.open(2, held(b)) // asks for the TTL
	r.del(w0)
	r.add(w1, y2, ip1)
	r.activatesAfter(w1, lease.MaxLease*5/4+margin)
}

// B4: a shorter grant does not shorten a longer one.
func TestB4OwnerDeadlineNotMax(t *testing.T) {
	r, _ := held0(t)
	r.msg(1, lease.Heartbeat{SentAt: 2, Ask: lease.MaxLease})
	r.msg(1, lease.Heartbeat{SentAt: 3, Ask: ttl})
	r.del(w0)
	r.add(w1, y2, ip1)
	r.activatesAfter(w1, lease.MaxLease*5/4+margin)
}

// B5: expiry opens the gate, but removes no grant from an open session: its
// Revoke is sent, in front of any later renewal.
func TestB5ExpiryRemovesGrantOfOpenSession(t *testing.T) {
	r, b := held0(t)
	r.wait(wait + time.Second) // the lease is over, the Binding still unread
	out := r.del(w0)
	rev := one[lease.Revoke](t, out)
	if rev.Generation != b.Binding.Generation {
		t.Fatalf("revoked %v", rev)
	}
	r.add(w1, y2, ip1)
	r.activatesAfter(w1, margin) // nobody can believe any more
	one[lease.HeartbeatReply](t, r.msg(1, lease.Heartbeat{SentAt: 4, Ask: ttl}))

	// The verifier reads Binding, Revoke, HeartbeatReply in this order.
	v := newVerifier(t, nil)
	c := v.session(ip1)
	v.msg(binding(c, 7, y1))
	v.now = v.now.Add(wait)
	v.wait(0)
	beat := one[lease.Heartbeat](t, v.wait(500*ms))
	v.msg(lease.Revoke{IP: ip1, Generation: 7, Seq: 1})
	v.msg(lease.HeartbeatReply{Echo: beat.SentAt, TTL: ttl})
	if e, ok := v.table.Get(ip1); ok {
		t.Fatalf("still installed: %+v", e)
	}
}

// B6: a slot that could not be zeroed: its lease is zeroed, the session closed,
// nothing acked, and no deadline is ever written to that lease index again.
func TestB6StoreFailsLeaseRearmed(t *testing.T) {
	v := newVerifier(t, nil)
	v.msg(binding(v.session(ip1), 7, y1))
	e, _ := v.table.Get(ip1)
	beat := one[lease.Heartbeat](t, v.wait(500*ms))
	out := v.msg(lease.Revoke{IP: ip1, Generation: 7, Seq: 1})
	ordered(t, out, isA[lease.Zero], isA[lease.Ack])
	out = v.step(lease.StoreFailed{Write: one[lease.Zero](t, out)})
	if z := one[lease.SetDeadline](t, out); z != (lease.SetDeadline{Lease: e.Lease}) {
		t.Fatalf("lease not zeroed: %+v", z)
	}
	ordered(t, out, isA[lease.SetDeadline], isA[lease.CloseOwner])
	none[lease.Ack](t, out)
	// A renewal that was under way is of an old stream.
	none[lease.SetDeadline](t, v.msg(lease.HeartbeatReply{Echo: beat.SentAt, TTL: ttl}))
	// The next Hello lists the slot; the next session has another index.
	v.step(lease.OwnerGone{Owner: "o", Stream: v.stream})
	one[lease.OpenStream](t, v.wait(50*ms))
	h := v.greet()
	if len(h.Held) != 1 {
		t.Fatalf("hello lists %+v", h.Held)
	}
	out = v.welcome(h, h.Held[0].Ref)
	ordered(t, out, isA[lease.Zero], isA[lease.SetDeadline], isA[lease.Ack])
	// It fails again and again: the index stays dead while the slot names it.
	for range 20 {
		for len(only[lease.Zero](out)) > 0 {
			out = v.step(lease.StoreFailed{Write: only[lease.Zero](out)[0]})
			none[lease.Ack](t, out)
			neverRearmed(t, out, e.Lease)
		}
		v.step(lease.OwnerGone{Owner: "o", Stream: v.stream})
		out = v.wait(time.Second)
		neverRearmed(t, out, e.Lease)
		if len(only[lease.Zero](out)) == 0 && len(only[lease.OpenStream](out)) > 0 {
			h := v.greet()
			if len(h.Held) != 1 {
				t.Fatalf("hello lists %+v", h.Held)
			}
			out = v.welcome(h, h.Held[0].Ref)
			neverRearmed(t, out, e.Lease)
		}
	}
	// At last it works: slot and index are free again.
	for range 3 {
		v.wait(time.Second)
	}
	if v.table.Len() != 0 || v.table.LeaseUsers(e.Lease) != 0 {
		t.Fatalf("%d slots, %d users of the lease", v.table.Len(), v.table.LeaseUsers(e.Lease))
	}
}

func neverRearmed(t *testing.T, out []lease.VerifierOutput, index uint32) {
	t.Helper()
	for _, s := range only[lease.SetDeadline](out) {
		if s.Lease == index && s.Deadline != 0 {
			t.Fatalf("re-armed: %+v", s)
		}
	}
}

// B7: the margin counts from the last lease's end, not from the binding's alone.
func TestB7MarginCountsFromEndOnly(t *testing.T) {
	r, b := held0(t)
	rev := one[lease.Revoke](t, r.del(w0))
	r.add(w1, y2, ip1)
	r.wait(margin) // counted from the end, it would be over
	r.msg(1, lease.Ack{IP: ip1, Generation: b.Binding.Generation, Seq: rev.Seq})
	r.activatesAfter(w1, margin)
}

// B7b: the margin follows the start-up wait too.
func TestB7bColdWaitWithoutDrain(t *testing.T) {
	r, _ := held0(t)
	r.del(w0)
	r.restart(true)
	r.add(w1, y2, ip1)
	r.activatesAfter(w1, lease.MaxLease*5/4+margin)
}

// B8, B9: after a restart a journalled grant holds as long as a lease given a
// moment before may, whatever its age and whatever was granted then.
func TestB8JournalRestartTTL(t *testing.T) {
	r, _ := held0(t)
	r.msg(1, lease.Heartbeat{SentAt: 2, Ask: lease.MaxLease})
	r.del(w0)
	r.restart(false)
	r.add(w1, y2, ip1)
	r.activatesAfter(w1, lease.MaxLease*5/4+margin)
}

func TestB9JournalRestartDeadlineOfGrant(t *testing.T) {
	r, b := held0(t)
	for range 40 { // heartbeats are not journalled
		r.wait(ttl)
		r.msg(1, lease.Heartbeat{SentAt: 2, Ask: ttl})
	}
	r.restart(false) // and w0's DEL came meanwhile
	r.add(w1, y2, ip1)
	if d, ok := r.o.GrantDeadline("v", ip1, b.Binding.Generation); !ok || d < r.now.Add(lease.MaxLease*5/4) {
		t.Fatalf("deadline %v, %v", d, ok)
	}
	r.activatesAfter(w1, lease.MaxLease*5/4+margin)
}

// B10: a restart does not forget when the previous binding ended.
func TestB10RestartForgetsPreviousEnd(t *testing.T) {
	r := newOwner(t, nil)
	r.add(w0, y1, ip1)
	r.wait(time.Second)
	r.del(w0)
	r.add(w1, y2, ip1)
	r.wait(10 * ms)
	r.restart(false)
	r.add(w1, y2, ip1)
	r.activatesAfter(w1, margin-10*ms)
	r.open(1)
	if b := r.confirm(1, ip1); b.Since != margin {
		t.Fatalf("since %v, want %v", b.Since, margin)
	}

	// An end that nobody witnessed counts as the start.
	r.wait(time.Second)
	r.restart(false)
	r.add(w2, y1, ip1)
	long := lease.MaxLease*5/4 + margin // the grant of w1 was journalled
	r.activatesAfter(w2, long)
	r.open(2)
	if b := r.confirm(2, ip1); b.Since != long {
		t.Fatalf("since %v after an end that was not witnessed, want %v", b.Since, long)
	}
}

// While no agent ran, somebody who was never registered sent under a free IP.
// The last end that is known lies before that: it is the coming of the new
// workload that says since when nobody else can have sent.
func TestSomebodyUnknownBefore(t *testing.T) {
	r, _ := held0(t)
	r.del(w0)
	r.wait(2 * lease.MaxLease)
	r.restart(false)
	r.wait(10 * time.Second)
	one[lease.Activate](t, r.add(w1, y2, ip1)) // nothing to wait for
	r.wait(5 * ms)
	r.open(1)
	if b := r.confirm(1, ip1); b.Since != margin+5*ms {
		t.Fatalf("since %v, want %v", b.Since, margin+5*ms)
	}

	// Who waits for the IP has had it to itself meanwhile.
	r.del(w1)
	r.add(w2, y1, ip1)
	r.wait(margin + lease.MaxLease*2)
	r.open(2)
	if b := r.confirm(2, ip1); b.Since != margin+lease.MaxLease*2 {
		t.Fatalf("since %v, want %v", b.Since, margin+lease.MaxLease*2)
	}

	// An agent finds again who was there before it, and says so.
	r.del(w2)
	r.wait(2 * lease.MaxLease)
	r.restart(false)
	r.step(lease.Add{UID: w0, IPs: addrs(ip1), Identity: y2, HeldSince: r.now.Add(-3 * time.Second)})
	r.wait(lease.MaxLease * 2)
	r.open(3)
	if b := r.confirm(3, ip1); b.Since != 3*time.Second+lease.MaxLease*2 {
		t.Fatalf("since %v, want %v", b.Since, 3*time.Second+lease.MaxLease*2)
	}
}

// B11: since is shortened by the drift that clocks may have.
func TestB11SinceWithoutDrift(t *testing.T) {
	v := newVerifier(t, nil)
	c := v.session(ip1)
	v.now = v.now.Add(10 * ms)
	b := binding(c, 7, y1)
	b.Since = 5 * time.Second
	a := one[lease.Answer](t, v.msg(b))
	if want := v.now.Add(-4*time.Second + flight); !a.Live || a.NotBefore != want {
		t.Fatalf("answer %+v, want not-before %v", a, want)
	}
}

// B12: a packet that is read from the ring after the installation is subject
// to the same bound.
func TestB12RingReadAfterInstall(t *testing.T) {
	v := newVerifier(t, nil)
	c := v.session(ip1)
	b := binding(c, 7, y1)
	b.Since = margin
	first := one[lease.Answer](t, v.msg(b))
	v.now = v.now.Add(time.Second)
	late := one[lease.Answer](t, v.step(lease.Want{IP: ip1, Owner: "o", Arrival: v.now.Add(-1200 * ms)}))
	if !late.Live || late.NotBefore != first.NotBefore {
		t.Fatalf("late %+v, first %+v", late, first)
	}
}

// B13: installation and answer are one step, and nothing that ends the binding
// lies between; after a Revoke nothing is answered as live.
func TestB13ReinjectionNotAtomic(t *testing.T) {
	v := newVerifier(t, nil)
	c := v.session(ip1)
	out := v.msg(binding(c, 7, y1))
	ordered(t, out, isA[lease.Install], isA[lease.Answer])
	none[lease.Zero](t, out)
	out = v.msg(lease.Revoke{IP: ip1, Generation: 7, Seq: 1})
	ordered(t, out, isA[lease.Zero], isA[lease.Ack])
	out = v.want(ip1)
	none[lease.Answer](t, out)
	one[lease.Confirm](t, out)
}

// B14: generations go on after the journal was lost, so that what a verifier
// holds of w0 cannot be taken for w1's.
func TestB14GenerationRestartsAfterJournalLoss(t *testing.T) {
	r, b := held0(t)
	r.wait(wait)
	r.del(w0)
	r.add(w1, y1, ip1) // of the same identity, so that only the generation tells
	r.wait(margin)
	gen := r.active[w1]
	r.cfg.LastGeneration = gen
	r.restart(true, lease.Adopt{Add: lease.Add{UID: w1, IPs: addrs(ip1), Identity: y1}, Generation: gen})
	if w := r.open(2, held(b)); len(w.Stands) != 0 || len(w.Revoked) != 1 {
		t.Fatalf("welcome: %+v", w)
	}
	r.del(w1)
	r.add(w2, y1, ip1)
	r.wait(2 * lease.MaxLease)
	if g := r.active[w2]; g <= gen || gen <= b.Binding.Generation {
		t.Fatalf("generations %d, %d, %d do not grow", b.Binding.Generation, gen, g)
	}
}

// B15: a packet sent right after the activation is not taken for the former
// holder's: not F but the whole margin was once subtracted.
func TestB15SinceMinusWholeMargin(t *testing.T) {
	const rtt = flight
	v := newVerifier(t, nil)
	sent := v.now
	c := v.session(ip1) // the packet is held
	v.now = v.now.Add(rtt)
	b := binding(c, 7, y1)
	b.Since = margin + rtt // the owner answers at the last moment, its clock slow
	a := one[lease.Answer](t, v.msg(b))
	if sent <= a.NotBefore {
		t.Fatalf("sent at %v, dropped up to %v", sent, a.NotBefore)
	}
}

// B16: a Refused ends only what arrived before its Confirm was sent.
func TestB16RefusedDropsLateJoiners(t *testing.T) {
	v := newVerifier(t, nil)
	c := v.session(ip1)
	asked := v.now
	v.now = v.now.Add(ms)
	v.want(ip1)
	out := v.msg(lease.Refused{Confirm: c.ID, IP: ip1, Reason: lease.RefusedQuarantined})
	if a := one[lease.Answer](t, out); a.Live || a.Asked != asked || a.Refusal != lease.RefusedQuarantined {
		t.Fatalf("answer %+v", a)
	}
	again := one[lease.Confirm](t, out) // the later packet asks again
	a := one[lease.Answer](t, v.msg(binding(again, 7, y2)))
	if !a.Live {
		t.Fatalf("answer %+v", a)
	}
}

// B17: during the negative cache packets are held, not dropped, and asked for
// again at its end, or at Bound.
func TestB17NegativeCacheDrops(t *testing.T) {
	for _, bound := range []bool{true, false} {
		v := newVerifier(t, nil)
		c := v.session(ip1)
		v.msg(lease.Refused{Confirm: c.ID, IP: ip1, Reason: lease.RefusedUnknown})
		v.now = v.now.Add(ms)
		out := v.want(ip1)
		none[lease.Answer](t, out)
		none[lease.Confirm](t, out)
		if why, r := v.v.Reason(ip1); why != lease.UnansweredTimeout && r != lease.RefusedUnknown {
			t.Fatalf("reason %v %v", why, r)
		}
		if bound {
			out = v.msg(lease.Bound{IP: ip1})
		} else {
			none[lease.Confirm](t, v.wait(248*ms))
			out = v.wait(ms)
		}
		again := one[lease.Confirm](t, out)
		if a := one[lease.Answer](t, v.msg(binding(again, 7, y2))); !a.Live {
			t.Fatalf("answer %+v", a)
		}
	}
}

// B18: a held packet waits until slot and lease are live.
func TestB18BindingBeforeFirstHeartbeat(t *testing.T) {
	v := newVerifier(t, nil)
	one[lease.OpenStream](t, v.want(ip1))
	h := v.greet()
	v.now = v.now.Add(ttl) // Welcome was under way for as long as the lease
	out := v.welcome(h)
	none[lease.SetDeadline](t, out)
	beat, c := one[lease.Heartbeat](t, out), one[lease.Confirm](t, out)
	out = v.msg(binding(c, 7, y1))
	one[lease.Install](t, out)
	none[lease.Answer](t, out)
	out = v.msg(lease.HeartbeatReply{Echo: beat.SentAt, TTL: ttl})
	ordered(t, out, isA[lease.SetDeadline], isA[lease.Answer])
	if a := one[lease.Answer](t, out); !a.Live {
		t.Fatalf("answer %+v", a)
	}
}

// F2: nothing is given back while it is being asked for.
func TestF2ReleaseWhileConfirmOutstanding(t *testing.T) {
	v := newVerifier(t, nil)
	c := v.session(ip1)
	v.step(lease.Unwant{IP: ip1})
	none[lease.Release](t, v.last)
	out := v.msg(binding(c, 7, y1)) // nobody waits for it any more
	none[lease.Install](t, out)
	one[lease.Release](t, out)
}

// F3: what is read from an older stream is discarded.
func TestF3OwnerReadsOlderStream(t *testing.T) {
	r, b := held0(t)
	r.open(2, held(b))
	for _, m := range []lease.Message{
		lease.Confirm{ID: 9, IP: ip1}, lease.Heartbeat{SentAt: 1, Ask: ttl},
		lease.Release{IP: ip1, Generation: b.Binding.Generation}, lease.Ack{IP: ip1, Generation: b.Binding.Generation},
	} {
		if out := r.msg(1, m); len(only[lease.SendToVerifier](out)) != 0 {
			t.Fatalf("%T of an older stream: %+v", m, out)
		}
	}
	if _, ok := r.o.GrantDeadline("v", ip1, b.Binding.Generation); !ok {
		t.Fatal("the grant is gone")
	}
}

// F4: what the pinned map does not show as active is not adopted: it waits.
func TestF4AdoptionWithoutPinnedProof(t *testing.T) {
	r, _ := held0(t)
	r.del(w0)
	r.add(w1, y2, ip1)
	r.restart(false)
	// Not the first input any more, and never active: an Add in all but name.
	r.step(lease.Adopt{Add: lease.Add{UID: w1, IPs: addrs(ip1), Identity: y2}, Generation: 9})
	if s := r.o.WorkloadState(w1); s != lease.WorkloadQuarantined {
		t.Fatalf("state %v", s)
	}
	r.activatesAfter(w1, lease.MaxLease*5/4+margin)
}
