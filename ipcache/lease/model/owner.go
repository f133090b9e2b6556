package model

// drop forgets a grant: the verifier's lease on it is over, or was given back.
func (x *stepper) drop(o *owner, p *peer, w int) {
	if p.left[w] > 0 {
		o.gone = 0
	}
	p.grant[w], p.left[w] = grantNone, 0
}

// sweep forgets what is over and of no open session, in the journal too. Until
// then a restart takes it for what may still run.
func (x *stepper) sweep(s0 *state, v int) {
	s := *s0
	p := &s.peer[v]
	session := p.older == streamOpen || p.current == streamOpen
	for w := range x.Workloads {
		if p.left[w] == 0 && (p.grant[w] == grantExpired || p.grant[w] == grantStanding && !session) {
			p.grant[w] = grantNone
		}
	}
	if s.owner.up == 1 && s != *s0 {
		x.emit(s, "", "the owner sweeps out expired grants of v%d", v+1)
	}
}

// end ends the binding of the present workload, at the owner.
func (x *stepper) end(s *state) {
	s.owner.ended = 0
	for v := range x.Verifiers {
		p := &s.peer[v]
		if w := s.owner.holder; p.grant[w] == grantStanding {
			p.grant[w] = grantRevoked
			if p.left[w] == 0 {
				p.grant[w] = grantExpired // that lease was over before the binding was
			}
		}
	}
}

// send puts a message into the current stream. It reports whether there was room.
func (p *peer) send(m Message) bool {
	if p.current != streamOpen || p.dead == 1 {
		return true // nobody reads what is written there
	}
	return p.toVerifier.push(m)
}

// free tells whether the IP may be used: every grant on earlier bindings is
// gone, and the margin has passed since.
func (x *stepper) free(s *state) bool {
	o := &s.owner
	if o.wait > 0 {
		return false
	}
	for v := range x.Verifiers {
		if v > 0 && x.Rules.RevokesFirstOnly {
			break
		}
		p := &s.peer[v]
		for w := range x.Workloads {
			if x.Rules.WaitsForPreviousAlone && w+1 != int(o.holder) {
				continue
			}
			if w != int(o.holder) && p.left[w] > 0 && p.grant[w] != grantNone {
				return false
			}
		}
	}
	if x.Rules.NoMargin {
		return true
	}
	return o.ended >= x.Margin && (x.Rules.MarginFromEndOnly || o.gone >= x.Margin)
}

// workloads come and go.
func (x *stepper) workloads(s0 *state) {
	o := &s0.owner
	last := int(o.holder)+1 >= x.Workloads
	switch {
	case o.phase == Active && !last && o.up == 1:
		s := *s0
		s.owner.phase, s.owner.sent[o.holder] = Nobody, 0
		room := true
		for v := range x.Verifiers {
			p := &s.peer[v]
			if p.grant[o.holder] == grantStanding && (v == 0 || !x.Rules.RevokesFirstOnly) {
				room = p.send(Message{Kind: Revoke, Workload: o.holder + 1}) && room
			}
		}
		x.end(&s)
		if room {
			x.emit(s, "", "w%d goes: its gate is shut, its grants are revoked", o.holder+1)
		}
	case o.phase == Active && !last:
		s := *s0
		s.owner.phase, s.owner.sent[o.holder] = Nobody, 0
		s.owner.endDown = 1
		x.emit(s, "", "w%d goes while the owner's agent is down", o.holder+1)
	case o.phase == Nobody && !last && o.up == 1:
		s := *s0
		s.owner.phase = Quarantined
		s.owner.holder++
		x.emit(s, "", "w%d comes, quarantined", s.owner.holder+1)
	}
	if o.phase != Quarantined || o.up == 0 {
		return
	}
	if !last {
		s := *s0
		s.owner.holder++
		x.emit(s, "", "w%d takes the IP from w%d, which never had it", s.owner.holder+1, o.holder+1)
	}
	if x.free(s0) {
		x.activate(*s0)
	}
}

func (x *stepper) activate(s state) {
	s.owner.phase = Active
	for v := range x.Verifiers {
		p := &s.peer[v]
		if p.refused <= 4 && !p.send(Message{Kind: Bound}) {
			return
		}
	}
	x.emit(s, "", "w%d is activated, %d ticks after the end before, %d after the last grant", s.owner.holder+1, s.owner.ended, s.owner.gone)
}

func (x *stepper) ownerFaults(s0 *state) {
	if s0.owner.up == 0 {
		if x.JournalKept {
			x.restart(*s0, true)
		}
		if x.JournalLost {
			x.restart(*s0, false)
		}
		return
	}
	if s0.owner.crashes == 0 {
		return
	}
	s := *s0
	s.owner.up = 0
	s.owner.crashes--
	for v := range x.Verifiers {
		p := &s.peer[v]
		p.older, p.current, p.deadline, p.refused = streamNone, streamNone, 0, never
		p.abandoned, p.toOwner, p.toVerifier = queue{}, queue{}, queue{}
		p.dead = b(p.session != sessionNone)
	}
	x.emit(s, "", "the owner's agent crashes")
}

func (x *stepper) restart(s state, journal bool) {
	o := &s.owner
	o.up = 1
	wait := x.ownerWait(x.MaxLease)
	switch {
	case x.Rules.RestartWaitsTTL:
		wait = x.ownerWait(x.TTL)
	case x.Rules.RestartWaitsNothing:
		wait = 0
	}
	o.startup = wait
	for v := range x.Verifiers {
		p := &s.peer[v]
		if x.Rules.SessionInherits {
			p.deadline = wait
		}
		for w := range x.Workloads {
			x.restartGrant(o, p, w, wait, journal)
		}
	}
	if journal {
		if o.endDown == 1 {
			o.ended = 0 // it was not witnessed: it counts as the start
		}
		if x.Rules.RestartForgetsEnd {
			o.ended, o.gone = never, never
		}
	} else {
		o.wait, o.ended, o.gone = wait, 0, 0
		if wait == 0 {
			o.gone = never
		}
		o.restart = b(x.Rules.GenerationsRestart)
	}
	o.endDown = 0
	if x.Rules.AdoptsAnybody && !journal && o.phase == Nobody && int(o.holder)+1 < x.Workloads {
		t := s
		t.owner.holder++
		t.owner.phase = Active
		x.emit(t, "", "the owner's agent starts, journal: %v, and adopts w%d that it found running", journal, t.owner.holder+1)
	}
	x.emit(s, "", "the owner's agent starts, journal: %v", journal)
}

func (x *stepper) restartGrant(o *owner, p *peer, w int, wait uint8, journal bool) {
	switch {
	case p.grant[w] == grantNone:
		return
	case !journal || wait == 0:
		p.grant[w], p.left[w] = grantNone, 0
		return
	}
	p.left[w] = wait
	if o.phase != Active || w != int(o.holder) {
		p.grant[w] = grantRevoked
	}
}

// ownerReads takes the next message of a verifier.
func (x *stepper) ownerReads(s0 *state, v int) {
	p := &s0.peer[v]
	if p.session == sessionDialling && p.dead == 0 && p.current == streamNone && !p.toVerifier.has(Challenge) {
		x.accept(*s0, v)
	}
	x.sweep(s0, v)
	x.olderEnds(s0, v)
	if p.abandoned[0].Kind != 0 && p.older != streamNone {
		x.ownerReadsFrom(*s0, v, true)
	}
	if p.toOwner[0].Kind != 0 && p.current != streamNone && p.dead == 0 {
		x.ownerReadsFrom(*s0, v, false)
	}
}

// olderEnds: the owner learns that a stream is over, or finds it silent.
func (x *stepper) olderEnds(s0 *state, v int) {
	if s0.peer[v].older == streamNone {
		return
	}
	s := *s0
	s.peer[v].older, s.peer[v].abandoned = streamNone, queue{}
	x.emit(s, "", "the owner learns that the stream which v%d gave up is over", v+1)
}

// accept: the owner speaks first. Of an older stream that has not said Hello
// the nonce counts no more.
func (x *stepper) accept(s state, v int) {
	p := &s.peer[v]
	if p.older == streamChallenged && !x.Rules.HelloByArrival {
		p.older, p.abandoned = streamNone, queue{}
	}
	p.current = streamChallenged
	if p.toVerifier.push(Message{Kind: Challenge}) {
		x.emit(s, "", "the owner accepts a stream of v%d: Challenge", v+1)
	}
}

func (x *stepper) ownerReadsFrom(s state, v int, older bool) {
	p := &s.peer[v]
	o := &s.owner
	stream, q, name := &p.current, &p.toOwner, ""
	if older {
		stream, q, name = &p.older, &p.abandoned, "older stream: "
	}
	m := q.pop()
	if m.Kind == Hello {
		x.hello(s, v, older, m)
		return
	}
	if *stream != streamOpen {
		return
	}
	ok := true
	switch m.Kind {
	case Confirm:
		ok = x.confirm(&s, v)
	case Heartbeat:
		ask := x.TTL
		if m.Stands == 1 {
			ask = x.MaxLease
		}
		x.renew(p, x.ownerWait(ask))
		ok = p.send(Message{Kind: HeartbeatReply, Stands: m.Stands, Left: m.Left})
	case Release:
		x.drop(o, p, int(m.Workload)-1)
	case Ack:
		x.ack(&s, v, int(m.Workload)-1)
	}
	if ok {
		x.emit(s, "", "%sthe owner reads %v of v%d; its leases run for %d ticks", name, m, v+1, p.deadline)
	}
}

func (x *stepper) renew(p *peer, wait uint8) {
	if x.Rules.DeadlineMovesBack || wait > p.deadline {
		p.deadline = wait
	}
	for w := range x.Workloads {
		if p.grant[w] == grantStanding && (x.Rules.DeadlineMovesBack || p.deadline > p.left[w]) {
			p.left[w] = p.deadline
		}
	}
}

func (x *stepper) ack(s *state, v, w int) {
	for u := range x.Verifiers {
		if u != v && !x.Rules.OneAckSuffices {
			continue
		}
		for r := range x.Workloads {
			if g := s.peer[u].grant[r]; (r == w || x.Rules.AckByAddress) && (g == grantRevoked || g == grantExpired) {
				x.drop(&s.owner, &s.peer[u], r)
			}
		}
	}
}

func (x *stepper) confirm(s *state, v int) bool {
	p, o := &s.peer[v], &s.owner
	if o.phase != Active {
		p.refused = 0
		return p.send(Message{Kind: Refused, Stands: uint8(o.phase)})
	}
	w := int(o.holder)
	p.grant[w] = grantStanding
	p.left[w] = max(p.left[w], p.deadline)
	since := uint8(noPrevious)
	if x.Held && o.ended < never {
		since = x.quarters(o.ended)
	}
	return p.send(Message{Kind: Binding, Workload: o.holder + 1, Since: since})
}

// hello opens a session, and settles what of the grants the verifier keeps.
func (x *stepper) hello(s state, v int, older bool, m Message) {
	p := &s.peer[v]
	if older {
		if p.older != streamChallenged {
			return
		}
		p.older = streamOpen
		if p.current != streamNone { // B1 alone gets here
			p.current, p.dead, p.toOwner, p.toVerifier = streamNone, 1, queue{}, queue{}
		}
	} else {
		p.current = streamOpen
		if p.older == streamOpen && !x.Rules.ReadsOlder {
			p.older, p.abandoned = streamNone, queue{}
		}
	}
	wait := x.ownerWait(x.TTL)
	if x.Rules.SessionInherits {
		wait = max(wait, p.deadline)
	}
	p.deadline = wait
	welcome := Message{Kind: Welcome, Workload: m.Workload, Left: m.Left}
	for w := range x.Workloads {
		welcome.Stands |= b(x.settle(&s, p, w, int(m.Workload) == w+1))
	}
	if p.send(welcome) {
		x.emit(s, "", "the owner reads %v of v%d, answers %v", m, v+1, welcome)
	}
}

// settle decides on one grant at a Hello; it reports whether what is listed
// stands.
func (x *stepper) settle(s *state, p *peer, w int, listed bool) bool {
	o := &s.owner
	stands := o.phase == Active && (int(o.holder) == w || o.restart == 1)
	if x.Rules.ForgetOnHello {
		p.grant[w], p.left[w] = grantNone, 0
	}
	switch {
	case !listed:
		x.drop(o, p, w)
	case stands:
		if p.grant[w] != grantStanding {
			p.grant[w], p.left[w] = grantStanding, o.startup
		}
		if x.Rules.TransferResets || p.deadline > p.left[w] {
			p.left[w] = p.deadline
		}
		return true
	case x.Rules.WelcomeDropsRefused:
		x.drop(o, p, w)
	case p.grant[w] == grantStanding:
		if p.grant[w] = grantRevoked; p.left[w] == 0 {
			p.grant[w] = grantExpired
		}
	}
	return false
}
