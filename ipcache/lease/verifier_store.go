package lease

import (
	"maps"
	"net/netip"
	"slices"

	"portcullis/ipcache"
)

type addr = netip.Addr

// zero ends an installation: 0 into its stamp. The slot is given back when the
// store is known to have been done, see committed.
func (v *Verifier) zero(e ipcache.Entry, why string) {
	if !e.Condemned {
		v.log(LogEntry{Kind: LogRevocation, Peer: e.Binding.Owner, IP: e.Binding.IP, Generation: e.Binding.Generation, UID: e.Binding.UID, Reason: why})
	}
	v.table.Condemn(e.Slot)
	v.endUse(e.Slot)
	v.emit(Zero{IP: e.Binding.IP, Slot: e.Slot, Stamp: e.Stamp})
}

// committed takes note that these outputs were carried out.
func (v *Verifier) committed(outs []VerifierOutput) {
	for _, out := range outs {
		switch out := out.(type) {
		case Zero:
			if e, ok := v.table.Slot(out.Slot); ok && e.Stamp == out.Stamp && e.Condemned {
				v.table.Free(out.Slot)
			}
		case SetDeadline:
			if l := v.leases[out.Lease]; l != nil {
				l.zeroed = out.Deadline == 0
				l.mustZero = l.mustZero && !l.zeroed
			}
		}
	}
}

// clearLeases gives back the indices of past sessions, once no slot names
// them and 0 is stored. An index with a slot that could not be zeroed is never
// given a deadline again, because a session never takes up an index in use.
func (v *Verifier) clearLeases() {
	var over []uint32
	for i, l := range v.leases {
		if l.retired && v.table.LeaseUsers(i) == 0 {
			over = append(over, i)
		}
	}
	slices.Sort(over)
	for _, i := range over {
		l := v.leases[i]
		if !l.zeroed {
			// Not at once again after a failure: retryStores does it.
			if !l.mustZero && !v.emitted(i) {
				v.store(i, 0)
			}
			continue
		}
		if v.table.ReleaseLease(i) != nil {
			continue
		}
		delete(v.leases, i)
		for _, p := range v.order {
			if p.lastLease == i {
				p.lastLease = 0
			}
		}
	}
}

// emitted tells whether this step stores 0 into the lease already.
func (v *Verifier) emitted(lease uint32) bool {
	return slices.Contains(v.out, VerifierOutput(SetDeadline{Lease: lease}))
}

// retryStores does again what failed, from what is wanted now.
func (v *Verifier) retryStores() {
	v.nextRetry = 0
	for _, i := range slices.Sorted(maps.Keys(v.leases)) {
		if v.leases[i].mustZero && !v.emitted(i) {
			v.store(i, 0)
		}
	}
	for _, owner := range v.table.Owners() {
		for _, e := range v.table.CondemnedOf(owner) {
			if e.Lease >= ipcache.LeaseFirst && !v.zeroing(e) {
				v.zero(e, "")
			}
		}
	}
}

// zeroing tells whether this step zeroes the entry already.
func (v *Verifier) zeroing(e ipcache.Entry) bool {
	return slices.Contains(v.out, VerifierOutput(Zero{IP: e.Binding.IP, Slot: e.Slot, Stamp: e.Stamp}))
}

// storeFailed: the kernel does not say what the table says. What was done is
// noted, what was not is undone, and every session that missed a message or a
// store is closed: the next Hello tells the owner what is held in truth.
func (v *Verifier) storeFailed(outs []VerifierOutput, w Write) {
	i := slices.IndexFunc(outs, func(o VerifierOutput) bool { x, ok := o.(Write); return ok && sameWrite(x, w) })
	if i < 0 {
		return
	}
	v.committed(outs[:i])
	v.nextRetry = v.now.Add(storeRetry)
	v.timer = 0
	for k, out := range outs[i:] {
		v.undo(out, k == 0)
	}
	clear(v.oldLease)
	clear(v.oldDeadline)
}

func sameWrite(a, b Write) bool {
	switch a := a.(type) {
	case Install:
		b, ok := b.(Install)
		return ok && a.Stamp == b.Stamp
	default:
		if _, ok := b.(Install); ok {
			return false
		}
		return a == b
	}
}

// undo takes back one output that was not carried out; failed tells that it
// was tried, so the kernel may hold a part of it.
func (v *Verifier) undo(out VerifierOutput, failed bool) {
	switch out := out.(type) {
	case Install:
		e, ok := v.table.Slot(out.Slot)
		if !ok || e.Stamp != out.Stamp {
			return
		}
		v.hold(e.Binding.IP)
		if failed {
			// Most likely a full map: the slot may be written, the
			// session is sound.
			v.zero(e, "store failed")
			v.release(v.peer(e.Binding.Owner), e)
			v.refuse(e.Binding.IP, v.now, UnansweredMapFull, 0)
			return
		}
		v.table.Free(out.Slot)
		v.endUse(out.Slot)
		v.closeOwner(e.Lease, "store failed")
	case Zero:
		// Not zeroed, so nobody may be told that it is; and its lease must
		// never run again while the slot names it (I1).
		if e, ok := v.table.Slot(out.Slot); ok && e.Stamp == out.Stamp {
			v.poison(e.Lease)
		}
	case SwitchLease:
		if e, ok := v.table.Slot(out.Slot); ok && e.Stamp == out.Stamp {
			v.closeOwner(e.Lease, "store failed")
			if old, ok := v.oldLease[out.Slot]; ok {
				v.table.SetLease(out.Slot, old)
			}
		}
	case SetProved:
		v.undoProved(out, failed)
	case ProofAnswer:
		v.undoProofAnswer(out)
	case SetDeadline:
		if l := v.leases[out.Lease]; l != nil {
			l.deadline = v.oldDeadline[out.Lease]
			l.zeroed = false
			l.mustZero = l.mustZero || failed || out.Deadline == 0
			v.closeOwner(out.Lease, "store failed")
		}
	case SendToOwner:
		if p := v.byStream[out.Stream]; p != nil {
			v.closePeer(p, "store failed")
		}
	case Answer:
		if out.Live {
			v.hold(out.IP)
		} else {
			v.emit(out)
		}
	case OpenStream, CloseOwner, VerifierLog, Learned:
		v.emit(out)
	case VerifierTimer:
		// Asked for again, see setTimer.
	}
}

// poison ends a lease for good: 0 now, and no session writes it again.
func (v *Verifier) poison(lease uint32) {
	l := v.leases[lease]
	if l == nil {
		return
	}
	l.retired, l.mustZero = true, true
	if !v.emitted(lease) {
		v.store(lease, 0)
	}
	v.closeOwner(lease, "store failed")
}

// closeOwner closes the session whose lease this is.
func (v *Verifier) closeOwner(lease uint32, why string) {
	for _, p := range v.order {
		if p.lease == lease && lease != 0 {
			v.closePeer(p, why)
		}
	}
}

// hold waits again for an IP whose answer was dropped.
func (v *Verifier) hold(ip addr) {
	e, ok := v.table.Get(ip)
	if !ok || v.waits[ip] != nil {
		return
	}
	p := v.peer(e.Binding.Owner)
	w := &wait{ip: ip, peer: p, newest: v.now}
	v.waits[ip] = w
	p.waits = append(p.waits, w)
}

// undoProved: the kernel may believe a proof that was taken back, or not have one
// that was made. A store that was tried and failed costs the binding, which is
// asked for anew; one that was not come to is made now.
func (v *Verifier) undoProved(out SetProved, failed bool) {
	e, ok := v.table.Slot(out.Slot)
	if !ok || e.Stamp != out.Stamp || e.Condemned {
		return
	}
	if !failed {
		v.emit(out)
		return
	}
	v.zero(e, "store failed")
	v.release(v.peer(e.Binding.Owner), e)
}

// undoProofAnswer: who was to be let go waits again, or is dropped all the same.
func (v *Verifier) undoProofAnswer(out ProofAnswer) {
	e, ok := v.table.Get(out.IP)
	p := v.proofs[e.Slot]
	if !out.Proved || !ok || p == nil || p.stamp != out.Stamp {
		out.Proved, out.Gone = false, out.Gone || out.Proved
		v.emit(out)
		return
	}
	p.waits, p.newest = true, v.now
	v.proofDue(v.now + 1)
	if v.proved(p) {
		v.answerProof(p)
	}
}
