package lease_test

import (
	"net/netip"
	"slices"
	"testing"
	"time"

	"portcullis/identity"
	"portcullis/ipcache/lease"
)

type addr = netip.Addr

func addrs(ips ...netip.Addr) []netip.Addr { return ips }

func TestReuse(t *testing.T) {
	r, b := held0(t)
	r.wait(time.Second)
	rev := one[lease.Revoke](t, r.del(w0))
	none[lease.Activate](t, r.add(w1, y2, ip1))
	if x := one[lease.Refused](t, r.msg(1, lease.Confirm{ID: 2, IP: ip1})); x.Reason != lease.RefusedQuarantined {
		t.Fatalf("refused: %v", x.Reason)
	}
	r.now = r.now.Add(20 * ms)
	r.msg(1, lease.Ack{IP: ip1, Generation: b.Binding.Generation, Seq: rev.Seq})
	r.wait(margin - 1)
	out := r.wait(1)
	one[lease.Activate](t, out)
	if x := one[lease.Bound](t, out); x.IP != ip1 { // refused within the last second
		t.Fatalf("bound %v", x)
	}
	if since := r.confirm(1, ip1).Since; since != margin+20*ms {
		t.Fatalf("since %v", since)
	}
}

// Without any grant the margin passes all the same, and the timer asks for it.
func TestReuseWithoutGrants(t *testing.T) {
	r := newOwner(t, nil)
	one[lease.Activate](t, r.add(w0, y1, ip1)) // never used: at once
	r.wait(time.Second)
	r.del(w0)
	if at := one[lease.OwnerTimer](t, r.add(w1, y2, ip1)).At; at != r.now.Add(margin) {
		t.Fatalf("timer in %v", at.Sub(r.now))
	}
	r.activatesAfter(w1, margin)
}

// An Ack counts only for what it answers.
func TestAckOfSomethingElse(t *testing.T) {
	r, b := held0(t)
	rev := one[lease.Revoke](t, r.del(w0))
	r.add(w1, y2, ip1)
	for _, a := range []lease.Ack{
		{IP: ip1, Generation: b.Binding.Generation, Seq: rev.Seq + 1},
		{IP: ip1, Generation: b.Binding.Generation, Seq: 0}, // nothing was in Welcome.Revoked
		{IP: ip1, Generation: b.Binding.Generation + 1, Seq: rev.Seq},
	} {
		r.msg(1, a)
		if _, ok := r.o.GrantDeadline("v", ip1, b.Binding.Generation); !ok {
			t.Fatalf("%+v was taken for the answer to %+v", a, rev)
		}
	}
	r.activatesAfter(w1, wait+margin)
}

func TestDeleteIsByUID(t *testing.T) {
	r := newOwner(t, nil)
	r.add(w0, y1, ip1)
	r.del(w0)
	r.add(w1, y2, ip1)
	r.wait(margin)
	if out := r.del(w0); len(only[lease.Record](out)) != 0 { // DEL again, late
		t.Fatalf("%+v", out)
	}
	r.open(1)
	r.confirm(1, ip1)
}

// An ADD never relies on a DEL before it: the former holder must close first.
func TestAddWithoutDelete(t *testing.T) {
	r, _ := held0(t)
	out := r.add(w1, y2, ip1)
	if c := one[lease.CloseEndpoint](t, out); c.UID != w0 {
		t.Fatalf("closes %v", c.UID)
	}
	none[lease.Revoke](t, out)
	if x := one[lease.Refused](t, r.msg(1, lease.Confirm{ID: 5, IP: ip1})); x.Reason != lease.RefusedQuarantined {
		t.Fatalf("refused: %v", x.Reason)
	}
	r.wait(10 * time.Second)
	if len(only[lease.Activate](r.tick())) > 0 || r.o.WorkloadState(w1) != lease.WorkloadQuarantined {
		t.Fatal("bound while the former holder's gate is open")
	}
	one[lease.Revoke](t, r.del(w0))
	r.activatesAfter(w1, margin) // the lease ran out meanwhile
}

func TestAddOfTwoFamilies(t *testing.T) {
	r, _ := held0(t)
	r.del(w0)
	none[lease.Activate](t, r.add(w1, y2, ip1, ip2)) // one is free, one is not
	r.activatesAfter(w1, wait+margin)
}

func TestAddRejected(t *testing.T) {
	r := newOwner(t, func(c *lease.OwnerConfig) { c.MaxWorkloads = 1 })
	one[lease.Rejected](t, r.add(w0, y1, netip.MustParseAddr("192.0.2.1")))
	one[lease.Rejected](t, r.add(w0, y1))
	one[lease.Rejected](t, r.add(w0, y1, ip1, ip1))
	one[lease.Activate](t, r.add(w0, y1, ip1))
	one[lease.Activate](t, r.add(w0, y1, ip1)) // again: said again
	one[lease.Rejected](t, r.add(w0, y2, ip1))
	one[lease.Rejected](t, r.add(w1, y1, ip2)) // the bound
	r.del(w0)
	r.step(lease.Leave{})
	one[lease.Rejected](t, r.add(w1, y1, ip2))
}

func TestRefusals(t *testing.T) {
	r := newOwner(t, func(c *lease.OwnerConfig) { c.Grants, c.ConfirmRate, c.ConfirmBurst = 1, 10, 4 })
	r.add(w0, y1, ip1, ip2)
	r.open(1)
	refused := func(ip string, want lease.Refusal) {
		t.Helper()
		if x := one[lease.Refused](t, r.msg(1, lease.Confirm{ID: 1, IP: netip.MustParseAddr(ip)})); x.Reason != want {
			t.Fatalf("%s: %v, want %v", ip, x.Reason, want)
		}
	}
	refused("192.0.2.1", lease.RefusedNotMine)
	refused("10.0.0.9", lease.RefusedUnknown)
	r.confirm(1, ip1)
	refused("10.0.0.2", lease.RefusedBusy) // the grant table is full: nothing is evicted
	refused("10.0.0.2", lease.RefusedRateLimited)
	r.wait(100 * ms)
	r.confirm(1, ip1) // a grant that is there takes no room
}

func TestBusyDuringStartUp(t *testing.T) {
	r, _ := held0(t)
	r.restart(true)
	r.add(w1, y2, ip2)
	r.open(2)
	if x := one[lease.Refused](t, r.msg(2, lease.Confirm{ID: 1, IP: ip2})); x.Reason != lease.RefusedBusy {
		t.Fatalf("refused: %v", x.Reason)
	}
}

// The start-up wait survives a second crash, although a journal is there then.
func TestStartUpWaitIsJournalled(t *testing.T) {
	r, _ := held0(t)
	r.restart(true)
	r.wait(10 * time.Second)
	r.restart(false)
	r.add(w1, y2, ip1)
	r.activatesAfter(w1, lease.MaxLease*5/4-10*time.Second+margin)
}

// A journal that was begun and not written to is a missing one.
func TestEmptyJournalIsMissing(t *testing.T) {
	r, _ := held0(t)
	r.journal = nil
	r.restart(false)
	r.add(w1, y2, ip1)
	r.activatesAfter(w1, lease.MaxLease*5/4+margin)
}

// After a reboot of the host the grants of before hold until BOOTTIME says
// that they cannot any more.
func TestOtherBoot(t *testing.T) {
	r, _ := held0(t)
	r.cfg.Boot = identity.BootID{'n'}
	r.cfg.Journal, r.cfg.Records, r.cfg.FreshRanges = lease.JournalOtherBoot, r.journal, false
	r.now = lease.Time(20 * time.Second)
	r.start()
	r.tick()
	r.add(w1, y2, ip1)
	r.activatesAfter(w1, lease.MaxLease*5/4-20*time.Second+margin)

	// What the verifier holds of the old boot does not stand, whatever its generation.
	w := r.open(7, lease.Held{Ref: lease.Ref{IP: ip1, Generation: r.active[w1], Boot: bootO}, Identity: y2.Hash()})
	if len(w.Stands) != 0 || len(w.Revoked) != 1 {
		t.Fatalf("welcome %+v", w)
	}
}

func TestAdopt(t *testing.T) {
	r, b := held0(t)
	gen := r.active[w0]
	ad := lease.Adopt{Add: lease.Add{UID: w0, IPs: addrs(ip1), Identity: y1}, Generation: gen}
	r.restart(false, ad)
	if w := r.open(2, held(b)); len(w.Stands) != 1 || len(w.Revoked) != 0 {
		t.Fatalf("welcome %+v", w)
	}
	if got := r.confirm(2, ip1); got.Binding.Generation != gen {
		t.Fatalf("generation %d, was %d", got.Binding.Generation, gen)
	}
	// Generation 0: the journal knows it.
	ad.Generation = 0
	r.restart(false, ad)
	if s := r.o.WorkloadState(w0); s != lease.WorkloadActive {
		t.Fatalf("state %v", s)
	}
	// The journal is gone: the pinned map still proves it; its end is journalled anew.
	ad.Generation = gen
	r.restart(true, ad)
	if w := r.open(3, held(b)); len(w.Stands) != 1 {
		t.Fatalf("welcome %+v", w)
	}
	r.wait(2 * lease.MaxLease)
	r.restart(false) // and it ended meanwhile
	r.add(w1, y2, ip1)
	r.wait(lease.MaxLease*5/4 + margin)
	r.open(4)
	if since := r.confirm(4, ip1).Since; since > lease.MaxLease*5/4+margin {
		t.Fatalf("since %v: an end that nobody saw is older than the start", since)
	}
}

// Another kernel boot of the verifier accounts for nothing of the former.
func TestVerifierReboot(t *testing.T) {
	r, _ := held0(t)
	h := hello(r.accept(2))
	h.Boot = identity.BootID{'x'}
	one[lease.Welcome](t, r.msg(2, h))
	r.del(w0)
	r.add(w1, y2, ip1)
	r.activatesAfter(w1, wait+margin)
}

func TestHelloRefused(t *testing.T) {
	r, b := held0(t)
	bad := []func(*lease.Hello){
		func(h *lease.Hello) { h.Nonce[0]++ },
		func(h *lease.Hello) { h.Verifier = "w" },
	}
	for i, f := range bad {
		s := lease.StreamID(10 + i)
		h := hello(r.accept(s))
		f(&h)
		out := r.msg(s, h)
		if c := one[lease.CloseVerifier](t, out); c.Stream != s {
			t.Fatalf("closes %d", c.Stream)
		}
		none[lease.Welcome](t, out)
		if _, ok := r.o.GrantDeadline("v", ip1, b.Binding.Generation); !ok || r.o.StreamState(1) != lease.StreamOpen {
			t.Fatal("it changed something")
		}
	}
}

// Only the last nonce counts, and opening a stream closes the one before it
// that has not said Hello; the session stays until the new one says it.
func TestNewestStream(t *testing.T) {
	r, _ := held0(t)
	r.accept(2)
	if c := one[lease.CloseVerifier](t, r.step(lease.StreamAccepted{Stream: 3, Verifier: "v"})); c.Stream != 2 {
		t.Fatalf("closes %d", c.Stream)
	}
	one[lease.HeartbeatReply](t, r.msg(1, lease.Heartbeat{SentAt: 1, Ask: ttl}))
}

func TestNotListedIsGone(t *testing.T) {
	r, b := held0(t)
	r.open(2) // lists nothing
	if _, ok := r.o.GrantDeadline("v", ip1, b.Binding.Generation); ok {
		t.Fatal("the grant is still booked")
	}
	r.del(w0)
	r.add(w1, y2, ip1)
	r.activatesAfter(w1, margin)
}

func TestWrongIdentityDoesNotStand(t *testing.T) {
	r, b := held0(t)
	h := held(b)
	h.Identity = y2.Hash()
	if w := r.open(2, h); len(w.Revoked) != 1 || len(w.Stands) != 0 {
		t.Fatalf("welcome %+v", w)
	}
	if x := one[lease.Refused](t, r.msg(2, lease.Confirm{ID: 1, IP: ip1})); x.Reason != lease.RefusedBusy {
		t.Fatalf("refused: %v", x.Reason) // it has not let go yet
	}
	r.msg(2, lease.Ack{IP: ip1, Generation: b.Binding.Generation})
	r.confirm(2, ip1)
}

func TestMaxLease(t *testing.T) {
	r, _ := held0(t)
	x := one[lease.HeartbeatReply](t, r.msg(1, lease.Heartbeat{SentAt: 5, Ask: time.Hour}))
	if x.TTL != lease.MaxLease || x.Echo != 5 {
		t.Fatalf("%+v", x)
	}
	if x := one[lease.HeartbeatReply](t, r.msg(1, lease.Heartbeat{SentAt: 6, Ask: -time.Hour})); x.TTL != 0 {
		t.Fatalf("%+v", x)
	}
	r.del(w0)
	r.add(w1, y2, ip1)
	r.activatesAfter(w1, lease.MaxLease*5/4+margin)
}

func TestLeave(t *testing.T) {
	r, _ := held0(t)
	r.accept(2) // challenged only: not told
	if s := one[lease.SendToVerifier](t, r.step(lease.Leave{})); s.Stream != 1 {
		t.Fatalf("%+v", s)
	}
	r.del(w0)
	if len(only[lease.Activate](r.wait(time.Hour))) > 0 {
		t.Fatal("bound while leaving")
	}
}

func TestOutOfTurnOwner(t *testing.T) {
	for _, m := range []lease.Message{lease.Confirm{IP: ip1}, lease.Heartbeat{}, lease.Ack{}, lease.Release{}, lease.Challenge{}} {
		r := newOwner(t, nil)
		r.accept(1)
		one[lease.CloseVerifier](t, r.msg(1, m))
		if s := r.o.StreamState(1); s != lease.StreamNone {
			t.Errorf("%T before Hello: %v", m, s)
		}
	}
	for _, m := range []lease.Message{lease.Hello{Verifier: "v"}, lease.Welcome{}, lease.Going{}} {
		r, _ := held0(t)
		one[lease.CloseVerifier](t, r.msg(1, m))
	}
	r, _ := held0(t)
	if out := r.step(lease.StreamAccepted{Stream: 1, Verifier: "v"}); len(only[lease.SendToVerifier](out)) > 0 {
		t.Error("a stream was accepted twice")
	}
}

// A Revoke goes out before the end is journalled: a lost record costs time only.
func TestRevokeBeforeEndRecord(t *testing.T) {
	r, _ := held0(t)
	out := r.del(w0)
	var kinds []string
	for _, o := range out {
		switch o := o.(type) {
		case lease.SendToVerifier:
			kinds = append(kinds, "revoke")
		case lease.Journal:
			kinds = append(kinds, "journal")
			if o.Record.Kind != lease.RecordEnded {
				t.Fatalf("%+v", o)
			}
		}
	}
	if !slices.Equal(kinds, []string{"revoke", "journal"}) {
		t.Fatal(kinds)
	}
}

// Records rebuild the state that the whole journal would.
func TestRecords(t *testing.T) {
	r, b := held0(t)
	r.add(w1, y2, ip2)
	r.wait(time.Second)
	r.del(w1)
	for _, records := range [][]lease.Record{r.journal, r.o.Records()} {
		x := newOwner(t, func(c *lease.OwnerConfig) {
			c.Journal, c.Records, c.FreshRanges = lease.JournalPresent, records, false
		})
		x.now = r.now.Add(20 * ms)
		x.start()
		x.step(lease.Adopt{Add: lease.Add{UID: w0, IPs: addrs(ip1), Identity: y1}})
		if s := x.o.WorkloadState(w0); s != lease.WorkloadActive {
			t.Fatalf("state %v", s)
		}
		if w := x.open(1, held(b)); len(w.Stands) != 1 {
			t.Fatalf("welcome %+v", w)
		}
		x.add(w2, y1, ip2)
		x.activatesAfter(w2, margin-20*ms)
	}
}

func TestOwnerForgets(t *testing.T) {
	r, _ := held0(t)
	r.del(w0)
	r.step(lease.VerifierGone{Stream: 1})
	for range 400 {
		r.wait(time.Second)
	}
	if n := len(r.o.Records()); n > 2 {
		t.Fatalf("%d records of nothing", n)
	}
	// The end is forgotten, but not that there was one.
	r.add(w1, y2, ip1)
	r.open(2)
	if b := r.confirm(2, ip1); b.Since <= 0 {
		t.Fatalf("since %v", b.Since)
	}
}

func TestSilentSessionEnds(t *testing.T) {
	r, _ := held0(t)
	r.wait(wait + lease.MaxLease)
	if r.o.StreamState(1) != lease.StreamOpen {
		t.Fatal("closed too early")
	}
	one[lease.CloseVerifier](t, r.wait(2*time.Second))
}

func TestOwnerConfig(t *testing.T) {
	good := newOwner(t, nil).cfg
	for name, f := range map[string]func(*lease.OwnerConfig){
		"no name":              func(c *lease.OwnerConfig) { c.Node = "" },
		"no nonce":             func(c *lease.OwnerConfig) { c.Nonce = nil },
		"no authorisation":     func(c *lease.OwnerConfig) { c.Mine = nil },
		"no margin":            func(c *lease.OwnerConfig) { c.ReuseMargin = 0 },
		"flight beyond margin": func(c *lease.OwnerConfig) { c.Flight = c.ReuseMargin },
		"journal unknown":      func(c *lease.OwnerConfig) { c.Journal = 0 },
	} {
		c := good
		f(&c)
		if _, err := lease.NewOwner(c, 1); err == nil {
			t.Errorf("%s: accepted", name)
		}
	}
}

func TestOwnerInfo(t *testing.T) {
	r, _ := held0(t)
	r.del(w0)
	r.add(w1, y2, ip1)
	i := r.o.Workloads()
	if len(i) != 1 || i[0].State != lease.WorkloadQuarantined || i[0].Leases != 1 || i[0].OpensAt != r.now.Add(wait+margin) {
		t.Fatalf("%+v", i)
	}
	if s := r.o.Sessions(); len(s) != 1 || s[0].Verifier != "v" || s[0].Grants != 1 {
		t.Fatalf("%+v", s)
	}
}
