package model

import "hash/maphash"

// pair is two owners, each of an IP with workloads of its own, and one verifier:
// one clock, one process, one array of leases.
type pair [2]state

type pairStepper struct {
	one  stepper
	each [2][]successor
	out  []successorOf[pair]
}

// next returns what can come after a state: time passes for both, the verifier
// ends and begins for both, and all else happens with one owner.
func (x *pairStepper) next(s *pair) []successorOf[pair] {
	x.out = x.out[:0]
	for i := range s {
		x.each[i] = append(x.each[i][:0], x.one.next(&s[i])...)
		for j := range x.each[i] {
			if n := &x.each[i][j]; n.kind == ofOneOwner {
				t := *s
				t[i] = n.state
				x.emit(s, &t, n, name[i])
			}
		}
	}
	for j := range x.each[0] {
		if n := &x.each[0][j]; n.kind != ofOneOwner {
			x.both(s, n)
		}
	}
	return x.out
}

var name = [2]string{"owner 1: ", "owner 2: "}

// both has the other owner's half do the same.
func (x *pairStepper) both(s *pair, n *successor) {
	for i := range x.each[1] {
		m := &x.each[1][i]
		if m.kind != n.kind {
			continue
		}
		if n.broken == "" {
			n.broken = m.broken
		}
		x.emit(s, &pair{n.state, m.state}, n, "")
		return
	}
}

func (x *pairStepper) emit(from, s *pair, n *successor, who string) {
	broken := n.broken
	if x.one.Rules.FreesNamedLease {
		if b := x.lend(from, s); broken == "" {
			broken = b
		}
	}
	action := n.action
	if action != "tick" && (x.one.named || broken != "") {
		action = who + action
	}
	x.out = append(x.out, successorOf[pair]{*s, n.kind, action, broken})
}

// lend is the mistake: the index of a past session whose lease is over goes to
// the next session, with either owner, though a slot names it.
func (x *pairStepper) lend(from, s *pair) (broken string) {
	for i := range s {
		p, other := &s[i].peer[0], &s[1-i].peer[0]
		opens := other.session == sessionOpen && from[1-i].peer[0].session == sessionGreeting
		if opens && p.slot != 0 && p.onSession == 0 && p.slotLease == 0 {
			p.borrows = 1
		}
		if p.borrows == 1 && p.onSession == 0 {
			p.slotLease = other.lease
			if b := x.one.check(&s[i], 0); broken == "" {
				broken = b
			}
		}
	}
	return broken
}

// fingerprint is the same for two states that differ in which owner is which.
func (x *pairStepper) fingerprint(seed maphash.Seed, s *pair) uint64 {
	return either(x.one.fingerprint(seed, &s[0]), x.one.fingerprint(seed, &s[1]))
}
