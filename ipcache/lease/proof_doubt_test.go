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
