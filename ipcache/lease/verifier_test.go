package lease_test

import (
	"net/netip"
	"testing"
	"time"

	"portcullis/identity"
	"portcullis/ipcache"
	"portcullis/ipcache/lease"
)

// live is a verifier that has ip1 installed on an open session.
func live(t *testing.T, change func(*lease.VerifierConfig)) *verifierRig {
	t.Helper()
	v := newVerifier(t, change)
	if a := one[lease.Answer](t, v.msg(binding(v.session(ip1), 7, y1))); !a.Live {
		t.Fatalf("%+v", a)
	}
	return v
}

// renew answers the heartbeats of a step.
func (r *verifierRig) renew(out []lease.VerifierOutput) []lease.VerifierOutput {
	var all []lease.VerifierOutput
	for _, b := range only[lease.Heartbeat](out) {
		all = append(all, r.msg(lease.HeartbeatReply{Echo: b.SentAt, TTL: b.Ask})...)
	}
	return all
}

// drop loses the stream and opens another, up to Hello.
func (r *verifierRig) drop() lease.Hello {
	r.t.Helper()
	r.step(lease.OwnerGone{Owner: "o", Stream: r.stream})
	one[lease.OpenStream](r.t, r.wait(50*ms))
	return r.greet()
}

func TestDeadlineIsTheEchoPlusTTL(t *testing.T) {
	v := live(t, nil)
	out := v.wait(500 * ms)
	sent := v.now
	v.now = v.now.Add(400 * ms) // on its way
	if d := one[lease.SetDeadline](t, v.renew(out)); d.Deadline != sent.Add(ttl) {
		t.Fatalf("deadline %v after sending", d.Deadline.Sub(sent))
	}
	// An earlier deadline changes nothing; an answer to nothing ends the session.
	out = v.wait(500 * ms)
	none[lease.SetDeadline](t, v.msg(lease.HeartbeatReply{Echo: one[lease.Heartbeat](t, out).SentAt, TTL: ms}))
	one[lease.CloseOwner](t, v.msg(lease.HeartbeatReply{Echo: v.now, TTL: ttl}))
}

func TestMaxLeaseIsABound(t *testing.T) {
	v := live(t, nil)
	b := one[lease.Heartbeat](t, v.wait(500*ms))
	if d := one[lease.SetDeadline](t, v.msg(lease.HeartbeatReply{Echo: b.SentAt, TTL: time.Hour})); d.Deadline != b.SentAt.Add(lease.MaxLease) {
		t.Fatalf("%v", d.Deadline.Sub(b.SentAt))
	}
}

// What stands keeps slot and stamp; zero, deadline, switch, in this order; and
// the old index is given up.
func TestReconnect(t *testing.T) {
	v := live(t, nil)
	v.want(ip2)
	v.msg(binding(one[lease.Confirm](t, v.last), 8, y2))
	e1, _ := v.table.Get(ip1)
	h := v.drop()
	if len(h.Held) != 2 || h.Held[0].Identity != y1.Hash() || h.Held[0].Boot != bootO {
		t.Fatalf("%+v", h)
	}
	out := v.welcome(h, h.Held[1].Ref)
	ordered(t, out, isA[lease.Zero], isA[lease.SetDeadline], isA[lease.SwitchLease], isA[lease.Ack])
	s := one[lease.SwitchLease](t, out)
	if d := only[lease.SetDeadline](out)[0]; s.Lease == e1.Lease || s.Slot != e1.Slot || s.Stamp != e1.Stamp || d.Lease != s.Lease || d.Deadline != h.SentAt.Add(ttl) {
		t.Fatalf("%+v %+v", s, d)
	}
	none[lease.Install](t, out)
	if z := one[lease.SetDeadline](t, v.wait(ms)); z != (lease.SetDeadline{Lease: e1.Lease}) {
		t.Fatalf("%+v", z)
	}
	v.wait(ms)
	if err := v.table.ReleaseLease(e1.Lease); err == nil {
		t.Fatal("the old index was not given back")
	}
}

// A Welcome that comes too late: what stands goes on living by its old lease.
func TestLateWelcome(t *testing.T) {
	v := live(t, nil)
	b := one[lease.Heartbeat](t, v.wait(500*ms))
	v.msg(lease.HeartbeatReply{Echo: b.SentAt, TTL: lease.MaxLease})
	h := v.drop()
	v.now = v.now.Add(ttl)
	out := v.welcome(h)
	none[lease.SwitchLease](t, out)
	if a := one[lease.Answer](t, v.want(ip1)); !a.Live {
		t.Fatalf("%+v", a)
	}
	out = v.renew(out)
	ordered(t, out, isA[lease.SetDeadline], isA[lease.SwitchLease])
}

func TestUnlistedStandsAreReleased(t *testing.T) {
	v := live(t, nil)
	h := v.drop()
	v.step(lease.ResetSession{Owner: "o"})
	none[lease.SendToOwner](t, v.last)
	v = live(t, func(c *lease.VerifierConfig) {
		c.Speaks = func(_ identity.NodeName, ip netip.Addr) bool { return true }
	})
	h = v.drop()
	w := lease.Welcome{Boot: bootO, Echo: h.SentAt, TTL: ttl, Stands: []lease.Ref{h.Held[0].Ref, {IP: ip2, Generation: 3, Boot: bootO}}}
	if r := one[lease.Release](t, v.msg(w)); r.IP != ip2 {
		t.Fatalf("%+v", r)
	}
}

func TestRevokeOfTheUnknownIsAcked(t *testing.T) {
	v := live(t, nil)
	out := v.msg(lease.Revoke{IP: ip1, Generation: 6, Seq: 3}) // of a former holder
	none[lease.Zero](t, out)
	if a := one[lease.Ack](t, out); a.Seq != 3 || a.Generation != 6 {
		t.Fatalf("%+v", a)
	}
}

func TestNegativeCache(t *testing.T) {
	for r, cached := range map[lease.Refusal]bool{
		lease.RefusedUnknown: true, lease.RefusedNotMine: true, lease.RefusedRateLimited: true,
		lease.RefusedQuarantined: false, lease.RefusedBusy: false,
	} {
		v := newVerifier(t, nil)
		c := v.session(ip1)
		v.msg(lease.Refused{Confirm: c.ID, IP: ip1, Reason: r})
		out := v.want(ip1)
		if asked := len(only[lease.Confirm](out)) == 1; asked == cached {
			t.Errorf("%v: asked at once %v", r, asked)
		}
	}
}

func TestOneConfirmPerIP(t *testing.T) {
	v := newVerifier(t, nil)
	v.session(ip1)
	none[lease.Confirm](t, v.want(ip1))
	one[lease.Confirm](t, v.want(ip2))
}

func TestNotAuthorised(t *testing.T) {
	for _, owner := range []identity.NodeName{"o", "else"} {
		v := newVerifier(t, func(c *lease.VerifierConfig) {
			c.Speaks = func(o identity.NodeName, ip netip.Addr) bool { return o == "else" }
		})
		b := binding(v.session(ip1), 7, y1)
		b.Binding.Owner = owner
		out := v.msg(b)
		none[lease.Install](t, out)
		one[lease.Release](t, out)
		if a := one[lease.Answer](t, out); a.Live || a.Refusal != lease.RefusedNotAuthorised {
			t.Fatalf("%+v", a)
		}
	}
}

// Two owners that may both speak for an IP claim it: neither is believed.
func TestConflictOfClaims(t *testing.T) {
	v := newVerifier(t, nil)
	v.step(lease.Want{IP: ip1, Owner: "o2", Arrival: v.now})
	v.step(lease.StreamOpened{Owner: "o2", Stream: 90})
	h := one[lease.Hello](t, v.step(lease.FromOwner{Stream: 90, Message: lease.Challenge{}}))
	c2 := one[lease.Confirm](t, v.step(lease.FromOwner{Stream: 90, Message: lease.Welcome{Boot: bootO, Echo: h.SentAt, TTL: ttl}}))
	v.step(lease.Unwant{IP: ip1}) // the hold is over; and the range has moved
	v.msg(binding(v.session(ip1), 7, y1))
	b := binding(c2, 3, y2)
	b.Binding.Owner = "o2"
	v.want(ip2)
	out := v.step(lease.FromOwner{Stream: 90, Message: b})
	none[lease.Install](t, out)
	if z := one[lease.Zero](t, out); z.IP != ip1 {
		t.Fatalf("%+v", z)
	}
	if r := only[lease.Release](out); len(r) != 2 {
		t.Fatalf("%+v", r)
	}
	// Nor is anybody asked again while a lease could run.
	v.now = v.now.Add(time.Second)
	none[lease.Confirm](t, v.want(ip1))
	if why, r := v.v.Reason(ip1); why != lease.AnsweredRefused || r != lease.RefusedConflict {
		t.Fatalf("%v %v", why, r)
	}
	none[lease.Confirm](t, v.msg(lease.Bound{IP: ip1}))
}

func TestFullMaps(t *testing.T) {
	table, err := ipcache.New(ipcache.Config{Slots: 2, Leases: 4, NextStamp: 1})
	if err != nil {
		t.Fatal(err)
	}
	v := newVerifierOver(t, table, nil)
	v.msg(binding(v.session(ip1), 7, y1))
	out := v.msg(binding(one[lease.Confirm](t, v.want(ip2)), 8, y2))
	none[lease.Install](t, out)
	one[lease.Release](t, out)
	if a := one[lease.Answer](t, out); a.Live || a.Why != lease.UnansweredMapFull {
		t.Fatalf("%+v", a)
	}
	// No lease index for a second session: it is closed, and says why.
	one[lease.OpenStream](t, v.step(lease.Want{IP: ip2, Owner: "o2", Arrival: v.now}))
	v.step(lease.StreamOpened{Owner: "o2", Stream: 9})
	h := one[lease.Hello](t, v.step(lease.FromOwner{Stream: 9, Message: lease.Challenge{}}))
	out = v.step(lease.FromOwner{Stream: 9, Message: lease.Welcome{Boot: bootO, Echo: h.SentAt, TTL: ttl}})
	one[lease.CloseOwner](t, out)
	if a := one[lease.Answer](t, out); a.Why != lease.UnansweredMapFull {
		t.Fatalf("%+v", a)
	}
}

func TestFailedInstall(t *testing.T) {
	v := newVerifier(t, nil)
	out := v.msg(binding(v.session(ip1), 7, y1))
	out = v.step(lease.StoreFailed{Write: one[lease.Install](t, out)})
	ordered(t, out, isA[lease.Zero], isA[lease.Release], isA[lease.Answer])
	if a := one[lease.Answer](t, out); a.Live || a.Why != lease.UnansweredMapFull {
		t.Fatalf("%+v", a)
	}
	v.wait(ms)
	if v.table.Len() != 0 || v.v.PeerState("o") != lease.PeerOpen {
		t.Fatalf("%d slots, %v", v.table.Len(), v.v.PeerState("o"))
	}
}

func TestFailedSwitchAndDeadline(t *testing.T) {
	v := live(t, nil)
	e, _ := v.table.Get(ip1)
	out := v.welcome(v.drop())
	out = v.step(lease.StoreFailed{Write: one[lease.SwitchLease](t, out)})
	one[lease.CloseOwner](t, out)
	if now, _ := v.table.Get(ip1); now.Lease != e.Lease {
		t.Fatalf("the table says lease %d, the kernel %d", now.Lease, e.Lease)
	}
	one[lease.OpenStream](t, v.wait(50*ms))
	out = v.welcome(v.greet())
	out = v.step(lease.StoreFailed{Write: only[lease.SetDeadline](out)[0]})
	one[lease.CloseOwner](t, out)
	if now, _ := v.table.Get(ip1); now.Lease != e.Lease || v.v.LeaseDeadline(e.Lease) == 0 {
		t.Fatalf("%+v", now)
	}
}

func TestIdleBinding(t *testing.T) {
	v := live(t, func(c *lease.VerifierConfig) { c.IdleBinding, c.IdleSession = 2*time.Second, 3*time.Second })
	var out []lease.VerifierOutput
	for range 30 { // in use
		out = v.wait(100 * ms)
		v.step(lease.Used{IPs: addrs(ip1, ip2)})
		none[lease.Zero](t, out)
		v.renew(out)
	}
	var released, closed bool
	for range 60 {
		out = v.wait(100 * ms)
		if len(only[lease.Release](out)) > 0 {
			ordered(t, out, isA[lease.Zero], isA[lease.Release])
			released = true
		}
		if len(only[lease.CloseOwner](out)) > 0 {
			closed = true
			break
		}
		v.renew(out)
	}
	if !released || !closed || v.v.PeerState("o") != lease.PeerIdle {
		t.Fatalf("released %v, closed %v, %v", released, closed, v.v.PeerState("o"))
	}
	// And it stays idle until something is wanted.
	for range 20 {
		none[lease.OpenStream](t, v.wait(time.Second))
	}
	one[lease.OpenStream](t, v.want(ip1))
}

func TestGoingAndAskMax(t *testing.T) {
	v := live(t, nil)
	if b := one[lease.Heartbeat](t, v.msg(lease.Going{})); b.Ask != lease.MaxLease {
		t.Fatalf("%+v", b)
	}
	if b := one[lease.Heartbeat](t, v.wait(500*ms)); b.Ask != ttl {
		t.Fatalf("%+v", b)
	}
	for _, out := range [][]lease.VerifierOutput{v.step(lease.AskMax{}), v.wait(500 * ms)} {
		if b := one[lease.Heartbeat](t, out); b.Ask != lease.MaxLease {
			t.Fatalf("%+v", b)
		}
	}
	if h := v.drop(); h.Ask != lease.MaxLease {
		t.Fatalf("%+v", h)
	}
}

func TestSilenceIsNoticed(t *testing.T) {
	v := live(t, nil)
	one[lease.Heartbeat](t, v.wait(500*ms))
	for range 10 {
		if v.v.PeerState("o") != lease.PeerOpen {
			break
		}
		v.wait(200 * ms)
	}
	if s := v.v.PeerState("o"); s != lease.PeerBackoff {
		t.Fatalf("%v", s)
	}
	// But time that the agent itself slept through is not silence.
	v = live(t, nil)
	one[lease.Heartbeat](t, v.wait(500*ms))
	v.wait(time.Hour)
	if s := v.v.PeerState("o"); s != lease.PeerOpen {
		t.Fatalf("%v", s)
	}
}

func TestUnreachable(t *testing.T) {
	v := newVerifier(t, nil)
	one[lease.OpenStream](t, v.want(ip1))
	v.step(lease.OwnerGone{Owner: "o", Why: "refused"})
	if why, _ := v.v.Reason(ip1); why != lease.UnansweredNoSession {
		t.Fatalf("%v", why)
	}
	tries := 0
	for range 100 { // 10 s: it is tried again, ever more rarely
		if len(only[lease.OpenStream](v.wait(100*ms))) > 0 {
			tries++
			v.step(lease.OwnerGone{Owner: "o", Why: "refused"})
		}
	}
	if tries < 10 || tries > 30 {
		t.Fatalf("%d tries", tries)
	}
	v.step(lease.Unwant{IP: ip1})
	for range 20 {
		none[lease.OpenStream](t, v.wait(time.Second))
	}
	if a := one[lease.Answer](t, v.step(lease.Want{IP: ip1})); a.Live || a.Why != lease.UnansweredNoOwner {
		t.Fatalf("%+v", a)
	}
}

func TestLocalIsLive(t *testing.T) {
	v := newVerifier(t, nil)
	if _, err := v.table.Install(identity.Binding{IP: ip1, Owner: "v"}, ipcache.LeaseLocal, identity.EvidenceLocal, bootV); err != nil {
		t.Fatal(err)
	}
	if a := one[lease.Answer](t, v.want(ip1)); !a.Live {
		t.Fatalf("%+v", a)
	}
}

// After a restart everything is rebuilt from the maps: Hello lists it, no lease
// is believed in, and identities are learnt anew.
func TestRestart(t *testing.T) {
	table, err := ipcache.New(ipcache.Config{Slots: 8, Leases: 8, NextStamp: 10})
	if err != nil {
		t.Fatal(err)
	}
	b := identity.Binding{IP: ip1, Generation: 7, UID: identity.UID{7}, Owner: "o"}
	if err := table.Restore(ipcache.Entry{Slot: 3, Stamp: 9, Lease: 5, Binding: b, Hash: y1.Hash(), OwnerBoot: bootO}); err != nil {
		t.Fatal(err)
	}
	v := newVerifierOver(t, table, nil)
	one[lease.OpenStream](t, v.wait(0))
	h := v.greet()
	if len(h.Held) != 1 || h.Held[0].Identity != y1.Hash() {
		t.Fatalf("%+v", h)
	}
	out := v.welcome(h)
	s := one[lease.SwitchLease](t, out)
	if s.Slot != 3 || s.Stamp != 9 || s.Lease == 5 {
		t.Fatalf("%+v", s)
	}
	c := one[lease.Confirm](t, out)
	b.Identity = y1
	out = v.msg(lease.Binding{Confirm: c.ID, Binding: b, Since: -1})
	none[lease.Install](t, out)
	if l := one[lease.Learned](t, out); l.Slot != 3 || l.Stamp != 9 || !l.Binding.Identity.Equal(y1) {
		t.Fatalf("%+v", l)
	}
}

func TestResetSession(t *testing.T) {
	v := live(t, nil)
	out := v.step(lease.ResetSession{Owner: "o"})
	ordered(t, out, isA[lease.Zero], isA[lease.CloseOwner])
	if h := func() lease.Hello { one[lease.OpenStream](t, v.want(ip1)); return v.greet() }(); len(h.Held) != 0 {
		t.Fatalf("%+v", h)
	}
}

func TestOutOfTurnVerifier(t *testing.T) {
	all := []lease.Message{
		lease.Challenge{}, lease.Welcome{}, lease.Binding{}, lease.Refused{}, lease.HeartbeatReply{}, lease.Revoke{},
		lease.Going{}, lease.Bound{}, lease.Announce{},
	}
	for _, m := range all {
		v := newVerifier(t, nil)
		v.want(ip1)
		v.stream++
		v.step(lease.StreamOpened{Owner: "o", Stream: v.stream})
		if _, ok := m.(lease.Challenge); !ok {
			one[lease.CloseOwner](t, v.msg(m))
		}
		v = newVerifier(t, nil)
		v.want(ip1)
		v.greet()
		one[lease.CloseOwner](t, v.msg(m)) // Welcome included: it does not answer this Hello
	}
	for _, m := range []lease.Message{lease.Challenge{}, lease.Welcome{}, lease.Binding{}, lease.Refused{}, lease.Announce{}} {
		v := live(t, nil)
		out := v.msg(m)
		one[lease.CloseOwner](t, out)
		none[lease.Install](t, out)
		if v.v.PeerState("o") != lease.PeerBackoff {
			t.Errorf("%T: %v", m, v.v.PeerState("o"))
		}
	}
	v := newVerifier(t, nil)
	one[lease.CloseOwner](t, v.step(lease.StreamOpened{Owner: "o", Stream: 5}))
	v.want(ip1)
	if s := v.greet(); len(s.Held) != 0 {
		t.Fatal("held")
	}
	one[lease.CloseOwner](t, v.step(lease.StreamOpened{Owner: "o", Stream: 6}))
}

func TestRenewalGapIsLogged(t *testing.T) {
	v := live(t, nil)
	out := v.wait(500 * ms)
	v.now = v.now.Add(ttl) // the agent was asleep, and so is the answer
	gap := one[lease.VerifierLog](t, v.step(lease.VerifierTick{}))
	if gap.Entry.Kind != lease.LogRenewalGap {
		t.Fatalf("%+v", gap)
	}
	v.renew(out)
	out = v.renew(v.wait(500 * ms))
	for _, l := range only[lease.VerifierLog](out) {
		if l.Entry.Kind == lease.LogRenewalGap && l.Entry.Duration > 0 {
			return
		}
	}
	t.Fatalf("no end of the gap in\n%s", dump(out))
}

func TestVerifierConfig(t *testing.T) {
	table, _ := ipcache.New(ipcache.Config{Slots: 8, Leases: 8, NextStamp: 1})
	speaks := func(identity.NodeName, netip.Addr) bool { return true }
	for name, c := range map[string]lease.VerifierConfig{
		"no name":          {TTL: ttl, Heartbeat: ms, Speaks: speaks},
		"no authorisation": {Node: "v", TTL: ttl, Heartbeat: ms},
		"TTL too long":     {Node: "v", TTL: lease.MaxLease + 1, Heartbeat: ms, Speaks: speaks},
		"heartbeat >= TTL": {Node: "v", TTL: ttl, Heartbeat: ttl, Speaks: speaks},
	} {
		if _, err := lease.NewVerifier(c, table, 1); err == nil {
			t.Errorf("%s: accepted", name)
		}
	}
}
