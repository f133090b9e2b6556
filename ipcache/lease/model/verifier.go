package model

// mayFail tells whether faults and choices are this verifier's, too.
func (x *stepper) mayFail(v int) bool { return v == 0 || !x.FirstAlone }

// streams: a verifier opens one where it has none, gives one up that may live.
func (x *stepper) streams(s0 *state, v int) {
	p := &s0.peer[v]
	if p.up == 0 {
		return
	}
	if p.session == sessionNone || p.dead == 1 {
		if s0.owner.up == 1 {
			s := *s0
			x.retire(&s.peer[v])
			s.peer[v].session = sessionDialling
			x.emit(s, "", "v%d opens a stream", v+1)
		}
		return
	}
	if p.breaks > 0 && p.current != streamNone {
		s := *s0
		s.peer[v].breaks--
		x.retire(&s.peer[v])
		x.emit(s, "", "v%d gives up its stream, of which %d messages are unread", v+1, p.toOwner.len())
	}
}

func (q *queue) len() (n int) {
	for n < queueLen && q[n].Kind != 0 {
		n++
	}
	return n
}

// retire ends the verifier's side of its session. What it sent may still be
// read, until the owner learns better; what was sent to it is not read.
func (x *stepper) retire(p *peer) {
	if p.session == sessionNone && x.Rules.KeepsDeadlines {
		return // a new process: there is nothing but what the former one left
	}
	if p.dead == 1 {
		p.current = streamNone
	}
	if p.current != streamNone {
		p.older, p.abandoned = p.current, p.toOwner
	}
	p.current, p.toOwner, p.toVerifier, p.dead = streamNone, queue{}, queue{}, 0
	p.session, p.asked = sessionNone, 0
	if x.Rules.SameLease {
		return
	}
	if p.slot != 0 && p.onSession == 1 {
		p.slotLease, p.onSession = p.lease, 0
	}
	p.lease = 0
}

func (x *stepper) verifierFaults(s0 *state, v int) {
	p := &s0.peer[v]
	defer func() { x.kind = ofOneOwner }()
	if p.up == 0 {
		x.kind = ofItsNext
		s := *s0
		s.peer[v].up = 1
		s.peer[v].since = x.Flight // whatever came until now is not let go
		if !x.Rules.RingWithoutSince {
			s.peer[v].release() // the ring is emptied at the start
		}
		x.emit(s, "", "v%d's agent starts", v+1)
		return
	}
	if p.crashes == 0 {
		return
	}
	x.kind = ofTheVerifier
	s := *s0
	q := &s.peer[v]
	q.crashes--
	q.up = 0
	lease := q.lease
	x.retire(q)
	if x.Rules.KeepsDeadlines && q.slot == 0 {
		q.lease = lease // the next session gets this index
	}
	q.negative = 0
	if q.heldAt != heldInRing {
		q.release()
	}
	x.emit(s, "", "v%d's agent crashes; the kernel's maps stay", v+1)
}

// verifierSends is what a verifier says of itself.
func (x *stepper) verifierSends(s0 *state, v int) {
	p := &s0.peer[v]
	if p.up == 0 {
		return
	}
	if x.Releases && x.mayFail(v) && p.slot != 0 && (p.session == sessionNone || p.dead == 1) {
		s := *s0
		s.peer[v].zero()
		x.emit(s, "", "v%d zeroes w%d; the next Hello does not list it", v+1, p.slot)
	}
	if p.condemned == 1 && !x.Rules.StoreFailureIgnored {
		s := *s0
		s.peer[v].zero()
		x.emit(s, "", "v%d tries again, and zeroes w%d", v+1, p.slot)
	}
	if p.session != sessionOpen || p.dead == 1 {
		return
	}
	if x.ManyHeartbeats || !p.toOwner.has(Heartbeat) && !p.toVerifier.has(HeartbeatReply) {
		for most := range 1 + b(x.AskMaxLease && x.mayFail(v)) {
			s := *s0
			left := x.TTL
			if most == 1 {
				left = x.MaxLease
			}
			if s.peer[v].toOwner.push(Message{Kind: Heartbeat, Stands: most, Left: left}) {
				x.emit(s, "", "v%d sends Heartbeat, asks for %d ticks", v+1, left)
			}
		}
	}
	if x.Releases && x.mayFail(v) && p.slot != 0 && (p.asked == 0 || x.Rules.ReleaseWhileConfirmed) {
		s := *s0
		s.peer[v].zero()
		if s.peer[v].toOwner.push(Message{Kind: Release, Workload: p.slot}) {
			x.emit(s, "", "v%d zeroes w%d, sends Release", v+1, p.slot)
		}
	}
	if p.asked == 0 && p.negative == 0 && (p.held == 0 && x.Contacts || p.held != 0 && p.heldAt == heldByAgent && p.slot == 0) {
		s := *s0
		s.peer[v].asked = 1
		if s.peer[v].toOwner.push(Message{Kind: Confirm}) {
			x.emit(s, "", "v%d sends Confirm", v+1)
		}
	}
}

// verifierReads takes the next message of the owner.
func (x *stepper) verifierReads(s state, v int) {
	p := &s.peer[v]
	if p.up == 0 || p.dead == 1 || p.toVerifier[0].Kind == 0 {
		return
	}
	before := s
	m := p.toVerifier.pop()
	ok, broken := true, ""
	switch m.Kind {
	case Challenge:
		p.session = sessionGreeting
		ok = p.toOwner.push(Message{Kind: Hello, Workload: p.slot, Left: x.TTL})
	case Welcome:
		ok = x.welcome(p, m)
	case HeartbeatReply:
		x.renewed(p, m.Left)
	case Revoke:
		if x.StoreFails && p.slot == m.Workload {
			x.storeFails(before, v, m)
		}
		if p.slot == m.Workload {
			p.zero()
		}
		ok = p.toOwner.push(Message{Kind: Ack, Workload: m.Workload})
	case Binding:
		broken = x.install(&s, v, m)
	case Refused:
		broken = x.refused(&s, v, m)
	case Bound:
		p.negative = 0
	}
	if ok {
		x.emit(s, broken, "v%d reads %v; w%d in its slot, lease %d ticks", v+1, m, p.slot, p.lease)
	}
}

// welcome: zero what does not stand, then write the deadline, then switch.
func (x *stepper) welcome(p *peer, m Message) bool {
	refused := m.Workload != 0 && m.Stands == 0
	if p.slot != 0 && (refused || p.slot != m.Workload || p.condemned == 1) {
		p.zero()
	}
	p.session = sessionOpen
	x.renewed(p, m.Left)
	if m.Left == 0 && !p.toOwner.push(Message{Kind: Heartbeat, Left: x.TTL}) {
		return false // it came too late, and there is no room to ask again
	}
	if refused && !x.Rules.WelcomeDropsRefused {
		return p.toOwner.push(Message{Kind: Ack, Workload: m.Workload})
	}
	return true
}

func (x *stepper) renewed(p *peer, left uint8) {
	if left <= p.lease {
		return
	}
	p.lease = left
	if p.slot != 0 && (p.condemned == 0 || x.Rules.StoreFailureIgnored) {
		p.onSession, p.slotLease = 1, 0
	}
}

// storeFails: the stamp could not be zeroed. The lease is, the session ends,
// and no session ever writes that lease again.
func (x *stepper) storeFails(s state, v int, m Message) {
	p := &s.peer[v]
	p.toVerifier.pop()
	p.condemned = 1
	if x.Rules.StoreFailureIgnored {
		p.lease, p.slotLease = 0, 0
	} else {
		x.retire(p)
		p.slotLease = 0
	}
	x.emit(s, "", "v%d reads %v: the store fails; lease zeroed, no ack", v+1, m)
}

// install is what a Binding brings. It reports a breach of I3.
func (x *stepper) install(s *state, v int, m Message) string {
	p := &s.peer[v]
	asked := p.asked
	p.asked, p.negative = 0, 0
	if p.slot == m.Workload && p.condemned == 0 {
		return "" // it stands: nothing is written
	}
	p.zero()
	p.slot, p.onSession = m.Workload, 1
	p.since = x.sinceTicks(m.Since)
	if !x.StaysUp || p.held == 0 || p.heldAt != heldByAgent || !x.sends(s, p.held) {
		return ""
	}
	switch {
	case x.tooOld(p) && asked <= x.RoundTrip+1:
		return "I3: a packet of the present holder is dropped as the former one's"
	case x.Rules.BindingEndsWait && p.lease == 0:
		return "I3: the packet is let go on a lease that has no deadline yet, and dropped"
	}
	return ""
}

// sends tells whether the workload, from 1, is active.
func (x *stepper) sends(s *state, w uint8) bool {
	return s.owner.phase == Active && s.owner.holder+1 == w
}

// refused ends the wait of what was held when the question was sent.
func (x *stepper) refused(s *state, v int, m Message) (broken string) {
	p := &s.peer[v]
	if p.held != 0 && p.heldAt == heldByAgent {
		late := p.heldAge+1 < p.asked
		if !late || x.Rules.RefusedDropsLate {
			if x.StaysUp && x.sends(s, p.held) {
				broken = "I3: a packet of the present holder is dropped by a refusal from before its binding"
			}
			p.release()
		}
	}
	p.asked = 0
	if m.Stands == uint8(Nobody) {
		p.negative = 2
	}
	return broken
}
