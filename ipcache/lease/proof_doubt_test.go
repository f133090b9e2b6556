package lease_test

import (
	"math"
	"testing"
	"time"

	"portcullis/ipcache/lease"
)

// What was checked before trust changed does not count after it: neither the first
// proof of a binding nor the next one, however its answer and the news cross.
func TestProofThatCrossesADoubt(t *testing.T) {
	v := live(t, proving(false))
	q := one[lease.Prove](t, v.wantProof())
	none[lease.Prove](t, v.step(lease.Doubt{}))
	out := v.msg(proofOf(q))
	none[lease.SetProved](t, out)
	none[lease.ProofAnswer](t, out) // who waits goes on waiting
	again := one[lease.Prove](t, out)
	if again.Nonce == q.Nonce {
		t.Error("it is the same question")
	}
	one[lease.SetProved](t, v.msg(proofOf(again)))

	q = one[lease.Prove](t, v.step(lease.Doubt{}))
	until := v.now.Add(ttl)
	none[lease.SetProved](t, v.step(lease.Doubt{})) // it counts a TTL more at the most, already
	out = v.msg(proofOf(q))
	none[lease.SetProved](t, out)
	one[lease.Prove](t, out)
	if e, _ := v.table.Get(ip1); e.Proved != int64(until) {
		t.Errorf("it counts %v more, want a TTL", lease.Time(e.Proved).Sub(v.now))
	}
}

// A certificate without an end to speak of is one, and not of a time gone by.
func TestProofWithoutAnEnd(t *testing.T) {
	v := live(t, proving(false))
	p := proofOf(one[lease.Prove](t, v.wantProof()))
	p.Checked.Valid = math.MaxInt64
	if s := one[lease.SetProved](t, v.msg(p)); s.Until < v.now.Add(24*time.Hour) {
		t.Errorf("proved for %v", s.Until.Sub(v.now))
	}
}

// Who refuses on and on, or proves nothing in changing ways, does not drive what was
// confirmed out of the confirmation log.
func TestRefusedProofsDoNotFloodTheLog(t *testing.T) {
	v := live(t, proving(false))
	lies := []func(*lease.Proof){
		func(p *lease.Proof) { p.Checked.Refusal = lease.ProofRelayed },
		func(p *lease.Proof) { p.Checked.Refusal = lease.ProofUntrusted },
	}
	asked, said := 0, map[string]int{}
	for i := range 240 { // a minute
		v.step(lease.Used{})
		out := append(v.wantProof(), v.wait(250*ms)...)
		v.renew(out)
		for _, q := range only[lease.Prove](out) {
			asked++
			p := proofOf(q)
			lies[i%2](&p)
			for _, l := range only[lease.VerifierLog](v.msg(p)) {
				said[l.Entry.Reason]++
			}
		}
	}
	if asked < 100 {
		t.Fatalf("asked %d times", asked)
	}
	for _, r := range []lease.ProofRefusal{lease.ProofRelayed, lease.ProofUntrusted} {
		if n := said[r.String()]; n < 1 || n > 2 {
			t.Errorf("%v: said %d times in a minute, want once or twice", r, n)
		}
	}
}

// A proof that was under way for as long as it counts is none: nobody is let go,
// and it is asked for again.
func TestProofThatCameTooLate(t *testing.T) {
	v := live(t, proving(false))
	p := proofOf(one[lease.Prove](t, v.wantProof()))
	p.Checked.Valid = 1200 * ms // as it was when it was read, and counted from the question
	v.now = v.now.Add(1300 * ms)
	out := v.msg(p)
	none[lease.SetProved](t, out)
	none[lease.ProofAnswer](t, out)
	q := one[lease.Prove](t, v.wait(250*ms))
	if a := one[lease.ProofAnswer](t, v.msg(proofOf(q))); !a.Proved {
		t.Errorf("%+v", a)
	}
}
