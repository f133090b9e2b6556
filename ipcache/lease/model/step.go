package model

import "fmt"

// successorOf is a state that one action leads to.
type successorOf[S comparable] struct {
	state  S
	kind   uint8
	action string // "" unless asked for
	broken string // the invariant that is broken in it, or by the action
}

type successor = successorOf[state]

// The kinds of actions, as far as two owners are told apart by them.
const (
	ofOneOwner    uint8 = iota
	ofEverybody         // time passes
	ofTheVerifier       // its process ends
	ofItsNext           // and begins
)

// stepper computes successors.
type stepper struct {
	Config
	named bool // actions are to be named
	kind  uint8
	out   []successor
}

// next returns what can come after a state. The slice is used again.
func (x *stepper) next(s *state) []successor {
	x.out = x.out[:0]
	x.kind = ofEverybody
	x.tick(*s)
	x.kind = ofOneOwner
	x.workloads(s)
	x.ownerFaults(s)
	for v := range x.Verifiers {
		if s.owner.up == 1 {
			x.ownerReads(s, v)
		}
		x.streams(s, v)
		x.verifierFaults(s, v)
		x.verifierSends(s, v)
		x.verifierReads(*s, v)
		x.packets(s, v)
	}
	return x.out
}

// emit adds a successor, after a look at the invariants.
func (x *stepper) emit(s state, broken, format string, args ...any) {
	for v := range x.Verifiers {
		if b := x.check(&s, v); broken == "" {
			broken = b
		}
	}
	x.forget(&s)
	action := ""
	if x.named || broken != "" {
		action = fmt.Sprintf(format, args...)
	}
	x.out = append(x.out, successor{s, x.kind, action, broken})
}

// mayArrive: a packet that w truly sent can reach a verifier's kernel now.
func (x *stepper) mayArrive(s *state, w int) bool {
	o := &s.owner
	if o.phase == Active && int(o.holder) == w {
		return true
	}
	return (w < int(o.holder) || w == int(o.holder) && o.phase == Nobody) && o.sent[w] <= x.Flight
}

// check is I1: no packet of one workload may arrive while it would be admitted
// as another's; and what was let out to one may not arrive at another.
func (x *stepper) check(s *state, v int) (broken string) {
	p := &s.peer[v]
	if p.anyLive() {
		as := int(p.slot) - 1
		for w := range x.Workloads {
			if w != as && x.mayArrive(s, w) {
				broken = fmt.Sprintf("I1: v%d admits as w%d, and a packet of w%d can arrive now", v+1, as+1, w+1)
			}
		}
		p.lastLive[as] = 0
	}
	if !x.Egress || broken != "" {
		return broken
	}
	for w := range x.Workloads {
		if s.owner.phase == Active && w < int(s.owner.holder) && p.lastLive[w] <= x.Flight {
			return fmt.Sprintf("I1, egress: w%d is active, and a packet that v%d let out to w%d %d ticks ago can arrive",
				s.owner.holder+1, v+1, w+1, p.lastLive[w])
		}
	}
	return ""
}

// forget puts to one value what makes no difference.
func (x *stepper) forget(s *state) {
	o := &s.owner
	if !x.Held {
		o.ended = min(o.ended, x.Margin)
	}
	o.gone = min(o.gone, x.Margin)
	for v := range x.Verifiers {
		p := &s.peer[v]
		for w := range x.Workloads {
			if o.up == 1 && o.crashes == 0 && p.grant[w] == grantExpired {
				p.grant[w] = grantNone
			}
		}
		if !x.Egress {
			p.lastLive = [maxWorkloads]uint8{}
		}
		if !x.Held {
			p.since, p.refused, p.negative = 0, never, 0
			p.asked = min(p.asked, 1)
		}
		if p.slot == 0 {
			p.since = 0
		}
	}
}

func b(v bool) uint8 {
	if v {
		return 1
	}
	return 0
}

// tick lets one unit of time pass everywhere.
func (x *stepper) tick(s state) {
	o := &s.owner
	more(&o.ended, never)
	more(&o.gone, never)
	less(&o.startup)
	if o.wait > 0 {
		o.wait--
		if o.wait == 0 && !x.Rules.NoMarginAfterWait {
			o.gone = 0
		}
	}
	for w := range x.Workloads {
		more(&o.sent[w], x.Flight+1)
	}
	for v := range x.Verifiers {
		x.tickPeer(o, &s.peer[v])
	}
	x.emit(s, "", "tick")
}

func (x *stepper) tickPeer(o *owner, p *peer) {
	for w := range x.Workloads {
		if p.left[w] == 0 {
			continue
		}
		p.left[w]--
		if p.left[w] > 0 || o.up == 0 {
			continue
		}
		if p.grant[w] == grantRevoked || p.grant[w] == grantStanding && x.Rules.ExpiryDrops {
			p.grant[w], o.gone = grantExpired, 0
		}
	}
	less(&p.deadline)
	more(&p.refused, never)
	for _, q := range []*queue{&p.abandoned, &p.toOwner, &p.toVerifier} {
		for i := range q {
			if !x.Rules.DeadlineFromReceipt {
				less(&q[i].Left)
			}
		}
	}
	less(&p.lease)
	less(&p.slotLease)
	less(&p.negative)
	if p.asked > 0 {
		more(&p.asked, never)
	}
	if p.slot != 0 && p.since < never-1 {
		p.since++
	}
	for w := range x.Workloads {
		more(&p.lastLive[w], x.Flight+1)
	}
	if p.held != 0 {
		if p.heldAge >= x.Hold && p.heldAt != heldLetGo {
			p.release()
		} else {
			more(&p.heldAge, never)
		}
	}
}
