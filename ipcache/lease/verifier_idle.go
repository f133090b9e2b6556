package lease

import (
	"time"

	"portcullis/ipcache"
)

// Giving back is spread out: so much in one step, then a pause. A step holds up
// everything else that the machine is to do, and what it says must fit into the
// queue of a stream.
const (
	scanMost  = 256
	scanPause = 50 * time.Millisecond
)

// use is when the binding in a slot was last of use. Only standing bindings of
// sessions have one; those of one owner are in a list, so that whoever looks
// for idle ones looks at nothing else:
//
//	peer.uses.first ──▶ slot 7 ◀──▶ slot 3 ◀──▶ slot 9 ◀── peer.uses.last
//	      least recently used                   most recently used
type use struct {
	peer          *peer  // in whose list; nil: there is no use
	before, after uint32 // slots; 0: none
	notBefore     Time   // packets that arrived until then may be of the holder before
	last          Time   // grows along the list
}

type useList struct{ first, last uint32 }

// startUse notes a new binding in a slot.
func (v *Verifier) startUse(p *peer, slot uint32, notBefore Time) {
	v.endUse(slot)
	for int(slot) >= len(v.uses) {
		v.uses = append(v.uses, use{})
	}
	v.uses[slot] = use{notBefore: notBefore, last: v.now}
	v.link(p, slot)
}

// touch notes that the binding in a slot is of use now.
func (v *Verifier) touch(slot uint32) {
	if p := v.unlink(slot); p != nil {
		v.uses[slot].last = v.now
		v.link(p, slot)
	}
}

// endUse notes that the slot's binding does not stand any more.
func (v *Verifier) endUse(slot uint32) {
	v.unlink(slot)
	v.endProof(slot)
}

func (v *Verifier) link(p *peer, slot uint32) {
	u := &v.uses[slot]
	u.peer, u.before, u.after = p, p.uses.last, 0
	if u.before == 0 {
		p.uses.first = slot
	} else {
		v.uses[u.before].after = slot
	}
	p.uses.last = slot
}

// unlink returns in whose list the slot was; nil: in none.
func (v *Verifier) unlink(slot uint32) *peer {
	if int(slot) >= len(v.uses) || v.uses[slot].peer == nil {
		return nil
	}
	u := &v.uses[slot]
	p := u.peer
	if u.before == 0 {
		p.uses.first = u.after
	} else {
		v.uses[u.before].after = u.after
	}
	if u.after == 0 {
		p.uses.last = u.before
	} else {
		v.uses[u.after].before = u.before
	}
	u.peer = nil
	return p
}

// scan gives back what nobody has used for IdleBinding, the longest unused
// first. It looks at no more than it gives back, and reports whether it is
// through.
func (v *Verifier) scan() bool {
	left := scanMost
	for _, p := range v.order {
		if p.state == PeerChallenge || p.state == PeerGreeting {
			continue // Hello may list it: wait for Welcome
		}
		for slot := p.uses.first; slot != 0 && v.now >= v.uses[slot].last.Add(v.cfg.IdleBinding); slot = p.uses.first {
			if left == 0 {
				return false
			}
			left--
			e, ok := v.table.Slot(slot)
			if !ok {
				v.endUse(slot)
				continue
			}
			// A grant that is still being asked for is not given back (I1):
			// the Binding would arrive after it.
			_, asked := p.confirms[e.Binding.IP]
			if asked || v.waits[e.Binding.IP] != nil || v.proofWaited(slot) {
				v.touch(slot) // somebody wants it
				continue
			}
			v.zero(e, "idle")
			v.release(p, e)
		}
	}
	return true
}

func (v *Verifier) release(p *peer, e ipcache.Entry) {
	if p.state != PeerOpen || e.OwnerBoot != p.boot {
		return // the next Hello does not list it
	}
	if _, asked := p.confirms[e.Binding.IP]; asked {
		// I1: its Binding is on its way, and what the owner reads after the
		// Confirm would take that grant too. The answer settles it.
		return
	}
	v.log(LogEntry{Kind: LogRelease, Peer: p.name, IP: e.Binding.IP, Generation: e.Binding.Generation, UID: e.Binding.UID})
	v.emit(SendToOwner{p.stream, Release{IP: e.Binding.IP, Generation: e.Binding.Generation}})
}
