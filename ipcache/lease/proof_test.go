package lease_test

import (
	"net/netip"
	"testing"
	"time"

	"portcullis/identity"
	"portcullis/ipcache/lease"
)

const y1ID = "spiffe://td/ns/ns/sa/y1"

func proving(all bool) func(*lease.VerifierConfig) {
	var n byte
	return func(c *lease.VerifierConfig) {
		c.ProveAll = all
		c.ProofID = func(b identity.Binding) (string, bool) { return b.Identity.SPIFFEID(), true }
		c.ProofNonce = func() lease.ProofNonce { n++; return lease.ProofNonce{n} }
	}
}

// wantProof holds a packet that needs ip1 proved.
func (r *verifierRig) wantProof() []lease.VerifierOutput {
	e, _ := r.table.Get(ip1)
	return r.step(lease.WantProof{IP: ip1, Stamp: e.Stamp, Arrival: r.now})
}

func proofOf(q lease.Prove) lease.Proof {
	p := lease.Proof{ID: q.ID, IP: q.IP, Generation: q.Generation, UID: q.UID, SPIFFEID: q.SPIFFEID, Nonce: q.Nonce}
	p.Checked = lease.Checked{Certificate: lease.Certificate{SPIFFEID: q.SPIFFEID, Serial: "c0ffee", Issuer: "CN=ca"}, Valid: time.Hour}
	return p
}

// proved is a verifier with ip1 installed and proved.
func proved(t *testing.T) *verifierRig {
	t.Helper()
	v := live(t, proving(false))
	q := one[lease.Prove](t, v.wantProof())
	one[lease.SetProved](t, v.msg(proofOf(q)))
	return v
}

func TestProofRaisesTheEvidence(t *testing.T) {
	v := live(t, proving(false))
	out := v.wantProof()
	q := one[lease.Prove](t, out)
	if q.IP != ip1 || q.Generation != 7 || q.SPIFFEID != y1ID || q.UID != (identity.UID{7}) {
		t.Fatalf("%+v", q)
	}
	none[lease.Prove](t, v.wantProof()) // asked once is enough
	sent := v.now
	v.now = v.now.Add(40 * ms)
	out = v.msg(proofOf(q))
	ordered(t, out, isA[lease.SetProved], isA[lease.ProofAnswer]) // the store before who relies on it
	e, _ := v.table.Get(ip1)
	if s := one[lease.SetProved](t, out); s.Until != sent.Add(time.Hour) || s.Slot != e.Slot || s.Stamp != e.Stamp {
		t.Errorf("%+v: want the certificate's life from the question on", s)
	}
	if a := one[lease.ProofAnswer](t, out); !a.Proved || a.Stamp != e.Stamp {
		t.Errorf("%+v", a)
	}
	if l := one[lease.VerifierLog](t, out).Entry; l.Kind != lease.LogProof || l.Certificate.Serial != "c0ffee" || l.Evidence != identity.EvidenceSVID {
		t.Errorf("%+v", l)
	}
	if e.EvidenceAt(int64(v.now)) != identity.EvidenceSVID || e.EvidenceAt(int64(sent.Add(time.Hour))) != identity.EvidenceLease {
		t.Error("the table says something else")
	}
	// Who comes later is let go at once.
	out = v.wantProof()
	none[lease.Prove](t, out)
	if a := one[lease.ProofAnswer](t, out); !a.Proved {
		t.Errorf("%+v", a)
	}
}

func TestProofsThatAreNone(t *testing.T) {
	for _, test := range []struct {
		name   string
		change func(*lease.Proof)
		want   lease.ProofRefusal
	}{
		{"relayed", func(p *lease.Proof) { p.Checked.Refusal = lease.ProofRelayed }, lease.ProofRelayed},
		{"expired", func(p *lease.Proof) { p.Checked.Refusal = lease.ProofExpired }, lease.ProofExpired},
		{"about to expire", func(p *lease.Proof) { p.Checked.Valid = 10 * ms }, lease.ProofExpired},
		{"not yet valid", func(p *lease.Proof) { p.Checked.Refusal = lease.ProofNotYetValid }, lease.ProofNotYetValid},
		{"untrusted", func(p *lease.Proof) { p.Checked.Refusal = lease.ProofUntrusted }, lease.ProofUntrusted},
		{"a replayed nonce", func(p *lease.Proof) { p.Nonce[0] ^= 1 }, lease.ProofNonceReplayed},
		{"a stale generation", func(p *lease.Proof) { p.Generation = 6 }, lease.ProofStaleGeneration},
		{"another workload's", func(p *lease.Proof) { p.UID[1] ^= 1 }, lease.ProofStaleGeneration},
		{"another address", func(p *lease.Proof) { p.IP = ip2 }, lease.ProofStaleGeneration},
		{"another trust domain", func(p *lease.Proof) { p.Checked.SPIFFEID = "spiffe://dt/ns/ns/sa/y1" }, lease.ProofWrongTrustDomain},
		{"another service account", func(p *lease.Proof) { p.Checked.SPIFFEID = "spiffe://td/ns/ns/sa/y2" }, lease.ProofWrongID},
		{"a claimed ID", func(p *lease.Proof) { p.SPIFFEID = "spiffe://td/ns/ns/sa/y2" }, lease.ProofWrongID},
	} {
		t.Run(test.name, func(t *testing.T) {
			v := live(t, proving(false))
			p := proofOf(one[lease.Prove](t, v.wantProof()))
			v.now = v.now.Add(ms)
			test.change(&p)
			out := v.msg(p)
			none[lease.SetProved](t, out)
			if l := one[lease.VerifierLog](t, out).Entry; l.Kind != lease.LogProofRefusal || l.Reason != test.want.String() {
				t.Errorf("%+v, want %v", l, test.want)
			}
			if a := one[lease.ProofAnswer](t, out); a.Proved || a.Asked != v.now-lease.Time(ms) {
				t.Errorf("%+v", a)
			}
			// The packet came in the moment of the question, so it is asked for again.
			q := one[lease.Prove](t, v.wait(250*ms))
			out = v.msg(proofOf(q))
			if a := one[lease.ProofAnswer](t, out); !a.Proved {
				t.Errorf("the honest answer after it: %+v", a)
			}
		})
	}
}

func TestProofRefused(t *testing.T) {
	v := live(t, proving(false))
	v.wantProof()
	// A workload whose SVID is not there yet: who waits goes on waiting.
	q := one[lease.Prove](t, v.last)
	v.now = v.now.Add(ms)
	none[lease.ProofAnswer](t, v.msg(lease.ProofRefused{ID: q.ID, IP: ip1, Reason: lease.ProofNoSVID}))
	if v.v.ProofReason(ip1) != lease.ProofNoSVID {
		t.Error(v.v.ProofReason(ip1))
	}
	v.wantProof()
	none[lease.Prove](t, v.last)
	q = one[lease.Prove](t, v.wait(250*ms))
	// A word that does not pass: those that came before the question are dropped.
	v.now = v.now.Add(ms)
	out := v.msg(lease.ProofRefused{ID: q.ID, IP: ip1, Reason: lease.ProofNoWorkload})
	if a := one[lease.ProofAnswer](t, out); a.Proved || a.Asked != v.now-lease.Time(ms) {
		t.Errorf("%+v", a)
	}
	none[lease.Prove](t, v.wait(time.Second)) // nobody waits
	one[lease.CloseOwner](t, v.msg(lease.ProofRefused{ID: 4711, IP: ip1, Reason: lease.ProofNoSVID}))
}

// A proof is good for one question: what is said again ends the session.
func TestReplayedProofEndsTheSession(t *testing.T) {
	v := live(t, proving(false))
	p := proofOf(one[lease.Prove](t, v.wantProof()))
	v.msg(p)
	out := v.msg(p)
	one[lease.CloseOwner](t, out)
	if l := only[lease.VerifierLog](out)[0].Entry; l.Reason != lease.ProofNonceReplayed.String() || l.Certificate.Serial == "" {
		t.Errorf("%+v", l)
	}
}

// A session ends, another begins: what was proved counts a TTL more, which stands
// in the kernel before the slot is put on the new lease; and is asked for at once.
func TestProofAfterReconnect(t *testing.T) {
	for _, refuses := range []bool{false, true} {
		v := proved(t)
		none[lease.SetProved](t, v.step(lease.OwnerGone{Owner: "o", Stream: v.stream}))
		one[lease.OpenStream](t, v.wait(50*ms))
		out := v.welcome(v.greet())
		ordered(t, out, isA[lease.SetDeadline], isA[lease.SetProved], isA[lease.SwitchLease], isA[lease.Prove])
		if s := one[lease.SetProved](t, out); s.Until != v.now.Add(ttl) {
			t.Errorf("%v more", s.Until.Sub(v.now))
		}
		q := one[lease.Prove](t, out)
		if !refuses {
			if s := one[lease.SetProved](t, v.msg(proofOf(q))); s.Until != v.now.Add(time.Hour) {
				t.Errorf("%v more", s.Until.Sub(v.now))
			}
			continue
		}
		// It came back with its lease only.
		out = v.msg(lease.ProofRefused{ID: q.ID, IP: ip1, Reason: lease.ProofExpired})
		if s := one[lease.SetProved](t, out); s.Until != 0 {
			t.Errorf("%+v", s)
		}
		if l := only[lease.VerifierLog](out); l[len(l)-1].Entry.Kind != lease.LogWeakening || l[len(l)-1].Entry.Reason != "proof-expired" {
			t.Errorf("%+v", l)
		}
	}
}

// Nobody answers: the proof goes when its time is over, and not before.
func TestProofRunsOut(t *testing.T) {
	v := proved(t)
	out := v.step(lease.Doubt{})
	if s := one[lease.SetProved](t, out); s.Until != v.now.Add(ttl) {
		t.Errorf("%v more", s.Until.Sub(v.now))
	}
	one[lease.Prove](t, out)
	var weak bool
	for end := v.now.Add(ttl); v.now < end.Add(-100*ms); {
		out := v.wait(100 * ms)
		v.renew(out)
		for _, l := range only[lease.VerifierLog](out) {
			weak = weak || l.Entry.Kind == lease.LogWeakening
		}
	}
	if weak {
		t.Fatal("weakened before its time")
	}
	out = v.wait(200 * ms)
	if s := one[lease.SetProved](t, out); s.Until != 0 {
		t.Errorf("%+v", s)
	}
}

// Of a binding that has ended no proof counts, and who waits under its stamp is
// told so.
func TestProofOfAnEndedBinding(t *testing.T) {
	v := live(t, proving(false))
	e, _ := v.table.Get(ip1)
	q := one[lease.Prove](t, v.wantProof())
	one[lease.Zero](t, v.msg(lease.Revoke{IP: ip1, Generation: 7, Seq: 1}))
	out := v.msg(proofOf(q))
	none[lease.SetProved](t, out)
	none[lease.CloseOwner](t, out)
	if a := one[lease.ProofAnswer](t, v.step(lease.WantProof{IP: ip1, Stamp: e.Stamp, Arrival: v.now})); !a.Gone {
		t.Errorf("%+v", a)
	}
}

// Half of what is left before a proof ends, the next one is asked for.
func TestProofIsRenewed(t *testing.T) {
	v := proved(t)
	asked := 0
	for range 4500 {
		out := v.wait(500 * ms)
		v.renew(out)
		v.step(lease.Used{IPs: []netip.Addr{ip1}})
		for _, q := range only[lease.Prove](out) {
			asked++
			v.msg(proofOf(q))
		}
	}
	if asked < 1 || asked > 3 {
		t.Errorf("asked %d times in 37 minutes, of certificates of an hour", asked)
	}
}

func TestProveAll(t *testing.T) {
	v := newVerifier(t, proving(true))
	out := v.msg(binding(v.session(ip1), 7, y1))
	ordered(t, out, isA[lease.Install], isA[lease.Prove])
}

func TestNoProofsAskedFor(t *testing.T) {
	v := live(t, nil)
	out := v.wantProof()
	none[lease.Prove](t, out)
	if a := one[lease.ProofAnswer](t, out); a.Proved || a.Asked <= v.now {
		t.Errorf("%+v", a)
	}
}

// ---- owner -------------------------------------------------------------

func TestOwnerProves(t *testing.T) {
	r, b := held0(t)
	q := lease.Prove{ID: 1, IP: ip1, Generation: b.Binding.Generation, UID: w0, SPIFFEID: y1ID}
	m := one[lease.MakeProof](t, r.msg(1, q))
	if m.Prove != q || m.Stream != 1 || m.Verifier != "v" || !m.Identity.Equal(b.Binding.Identity) {
		t.Errorf("%+v", m)
	}
	refused := func(change func(*lease.Prove), want lease.ProofRefusal) {
		t.Helper()
		bad := q
		change(&bad)
		out := r.msg(1, bad)
		none[lease.MakeProof](t, out)
		if got := one[lease.ProofRefused](t, out); got.Reason != want || got.ID != q.ID {
			t.Errorf("%+v, want %v", got, want)
		}
		if l := one[lease.OwnerLog](t, out).Entry; l.Kind != lease.LogProofRefusal || l.Reason != want.String() {
			t.Errorf("%+v", l)
		}
	}
	refused(func(q *lease.Prove) { q.Generation++ }, lease.ProofStaleGeneration)
	refused(func(q *lease.Prove) { q.UID = w1 }, lease.ProofNoWorkload)
	refused(func(q *lease.Prove) { q.IP = ip2 }, lease.ProofNoWorkload)
	r.del(w0)
	refused(func(*lease.Prove) {}, lease.ProofNoWorkload)
}
