package model

import "fmt"

func (p *peer) release() { p.held, p.heldAge, p.heldAt = 0, 0, 0 }

// admitted reports the breach of I1 if a packet of that sender is judged now.
func (p *peer) admitted(sender uint8) string {
	if p.anyLive() && p.slot != sender {
		return fmt.Sprintf("I1: a held packet of w%d is re-injected and admitted as w%d", sender, p.slot)
	}
	return ""
}

// packets are held, one at a time; those that are judged on arrival need no
// action, see check.
func (x *stepper) packets(s0 *state, v int) {
	p := &s0.peer[v]
	if x.Held && p.held == 0 && !p.anyLive() {
		x.arrive(s0, v)
	}
	if p.held == 0 {
		return
	}
	s := *s0
	q := &s.peer[v]
	switch {
	case p.heldAt == heldLetGo:
		broken := q.admitted(q.held)
		q.release()
		x.emit(s, broken, "the packet that v%d let go is sent", v+1)
	case p.up == 0:
	case p.heldAt == heldInRing && !p.anyLive():
		q.heldAt = heldByAgent
		x.emit(s, "", "v%d's agent takes the packet of w%d from the ring", v+1, p.held)
	case !p.anyLive():
	case x.tooOld(p) && (p.heldAt == heldByAgent || !x.Rules.RingWithoutSince):
		q.release()
		x.emit(s, "", "v%d drops the packet of w%d: it may be the former holder's", v+1, p.held)
	case p.heldAt == heldByAgent && x.Rules.LateReinjection:
		q.heldAt = heldLetGo
		x.emit(s, "", "v%d lets the packet of w%d go, and has not sent it", v+1, p.held)
	default:
		broken := q.admitted(q.held)
		q.release()
		x.emit(s, broken, "v%d re-injects the packet of w%d", v+1, p.held)
	}
}

func (x *stepper) arrive(s0 *state, v int) {
	for w := range x.Workloads {
		if !x.mayArrive(s0, w) {
			continue
		}
		s := *s0
		p := &s.peer[v]
		broken := ""
		if p.negative > 0 && x.Rules.NegativeDrops {
			if x.StaysUp && x.sends(&s, uint8(w+1)) {
				broken = "I3: the first packet of the present holder is dropped by the memory of a refusal"
			}
		} else {
			p.held, p.heldAge, p.heldAt = uint8(w+1), 0, heldInRing
		}
		x.emit(s, broken, "a packet of w%d reaches v%d, and is held", w+1, v+1)
	}
}
