package lease

import "testing"

// An owner that answers nothing, and takes back and binds on and on, does not fill
// this node's memory with questions that it will never be asked.
func TestUnaskedProofsAreBounded(t *testing.T) {
	v, o := &Verifier{proofs: map[uint32]*proof{}}, &peer{}
	const live = 100
	for slot := range uint32(live) {
		v.proofs[slot] = &proof{peer: o, slot: slot}
		v.queueProof(v.proofs[slot])
	}
	for range 20000 {
		v.endProof(7)
		v.proofs[7] = &proof{peer: o, slot: 7}
		v.queueProof(v.proofs[7])
	}
	if n := len(o.unproved); n > 4*live {
		t.Errorf("%d questions wait, of %d bindings", n, live)
	}
	there := map[*proof]bool{}
	for _, p := range o.unproved {
		there[p] = true
	}
	for slot, p := range v.proofs {
		if !there[p] {
			t.Errorf("slot %d waits for nothing", slot)
		}
	}
}
