package lease

import (
	"net/netip"
	"slices"
	"time"

	"portcullis/identity"
	"portcullis/ipcache"
)

func (v *Verifier) open(p *peer) {
	v.setState(p, PeerOpening)
	v.emit(OpenStream{p.name})
}

func (v *Verifier) opened(in StreamOpened) {
	p := v.peers[in.Owner]
	if p == nil || p.state != PeerOpening {
		v.emit(CloseOwner{in.Stream, "not asked for"})
		return
	}
	p.stream = in.Stream
	v.byStream[p.stream] = p
	v.setState(p, PeerChallenge)
}

func (v *Verifier) gone(in OwnerGone) {
	p := v.peers[in.Owner]
	switch {
	case p == nil:
	case in.Stream == 0 && p.state == PeerOpening:
		v.retire(p, in.Why)
	case in.Stream != 0 && p.stream == in.Stream:
		v.retire(p, in.Why)
	}
}

// closePeer ends the session from this side.
func (v *Verifier) closePeer(p *peer, why string) {
	if p.stream != 0 {
		v.emit(CloseOwner{p.stream, why})
	}
	v.retire(p, why)
}

// retire forgets the session, not what was confirmed on it: slots stand until
// the deadline of the lease that they name, which no session writes any more.
func (v *Verifier) retire(p *peer, why string) {
	if p.state == PeerOpen {
		v.log(LogEntry{Kind: LogSessionDown, Peer: p.name, Reason: why})
		p.backoff = 0
	}
	delete(v.byStream, p.stream)
	if p.lease != 0 {
		v.leases[p.lease].retired = true
		p.lastLease = p.lease
	}
	p.stream, p.lease, p.switched = 0, 0, false
	p.pings, p.idleSince = nil, 0
	clear(p.confirms)
	v.proofsLost(p)
	p.backoff = min(max(2*p.backoff, firstRetry), maxRetry, v.cfg.TTL/4)
	p.retryAt = v.now.Add(p.backoff)
	v.setState(p, PeerBackoff)
}

// reset forgets an owner altogether.
func (v *Verifier) reset(owner identity.NodeName) {
	p := v.peers[owner]
	if p == nil {
		return
	}
	for _, e := range v.table.OfOwner(owner) {
		if !e.Condemned && e.Lease >= ipcache.LeaseFirst {
			v.zero(e, "session reset")
		}
	}
	if p.state == PeerOpening {
		return // nothing to close yet; what comes is fresh
	}
	v.closePeer(p, "reset")
	p.backoff, p.retryAt, p.gap, p.lastLease = 0, v.now, 0, 0
	v.setState(p, PeerIdle)
}

// beat asks to renew the session.
func (v *Verifier) beat(p *peer, ask time.Duration) {
	if v.askMax {
		ask = MaxLease
	}
	if len(p.pings) < maxOutstanding {
		p.pings = append(p.pings, v.now)
		v.emit(SendToOwner{p.stream, Heartbeat{SentAt: v.now, Ask: ask}})
	}
	p.nextBeat = v.now.Add(v.cfg.Heartbeat)
}

func (v *Verifier) receive(p *peer, m Message) {
	p.heard = v.now
	if c, ok := m.(Challenge); ok && p.state == PeerChallenge {
		v.hello(p, c)
		return
	}
	if w, ok := m.(Welcome); ok && p.state == PeerGreeting {
		v.welcome(p, w)
		return
	}
	if p.state != PeerOpen {
		v.closePeer(p, "message out of turn")
		return
	}
	switch m := m.(type) {
	case Binding:
		v.binding(p, m)
	case Refused:
		v.refused(p, m)
	case Proof:
		v.proofReceived(p, m)
	case ProofRefused:
		v.proofRefused(p, m)
	case Bound:
		if v.negative[m.IP].reason != RefusedConflict && v.cfg.Speaks(p.name, m.IP) {
			delete(v.negative, m.IP)
		}
		if w := v.waits[m.IP]; w != nil && w.peer == p {
			v.ask(w)
		}
	case HeartbeatReply:
		v.renewed(p, m.Echo, m.TTL)
	case Revoke:
		v.revoke(p, m)
	case Going:
		v.beat(p, MaxLease)
	default:
		v.closePeer(p, "unexpected message")
	}
}

// hello lists whatever the kernel may still believe, slots that could not be
// zeroed included: what is not listed, the owner takes as gone.
func (v *Verifier) hello(p *peer, c Challenge) {
	h := Hello{Nonce: c.Nonce, Verifier: v.cfg.Node, Boot: v.cfg.Boot, SentAt: v.now, Ask: v.cfg.TTL}
	if v.askMax {
		h.Ask = MaxLease
	}
	for _, e := range v.table.OfOwner(p.name) {
		if e.Lease >= ipcache.LeaseFirst {
			h.Held = append(h.Held, Held{Ref: ref(e), Identity: e.Hash})
		}
	}
	p.pings = []Time{v.now}
	v.setState(p, PeerGreeting)
	v.emit(SendToOwner{p.stream, h})
}

func ref(e ipcache.Entry) Ref {
	return Ref{IP: e.Binding.IP, Generation: e.Binding.Generation, Boot: e.OwnerBoot}
}

// welcome opens the session. The order is what keeps I1: first zero what does
// not stand, then write the deadline of the new lease, then switch to it.
func (v *Verifier) welcome(p *peer, m Welcome) {
	if len(p.pings) == 0 || m.Echo != p.pings[0] {
		v.closePeer(p, "welcome does not answer hello")
		return
	}
	// What stands, as far as it is not found below. Up to MaxHeld bindings: no
	// more is copied here than must be.
	stands := make(map[Ref]bool, len(m.Stands))
	for _, r := range m.Stands {
		stands[r] = v.cfg.Speaks(p.name, r.IP)
	}
	var unknown []netip.Addr
	for _, e := range v.table.OfOwner(p.name) {
		if e.Lease < ipcache.LeaseFirst {
			continue
		}
		r := ref(e)
		switch {
		case stands[r] && !e.Condemned:
			delete(stands, r)
			if e.Binding.Identity.Equal(identity.Identity{}) {
				unknown = append(unknown, e.Binding.IP)
			}
		default:
			v.zero(e, "does not stand")
		}
	}
	lease, err := v.table.AcquireLease()
	if err != nil {
		v.closePeer(p, err.Error())
		for _, w := range slices.Clone(p.waits) {
			v.refuse(w.ip, v.now, UnansweredMapFull, 0)
		}
		return
	}
	v.leases[lease] = &leaseState{}
	p.lease, p.boot = lease, m.Boot
	v.setState(p, PeerOpen)
	p.backoff = 0
	v.log(LogEntry{Kind: LogSessionUp, Peer: p.name})
	p.nextBeat = v.now.Add(v.cfg.Heartbeat)
	v.renewed(p, m.Echo, m.TTL)
	if !p.switched {
		v.beat(p, v.cfg.TTL) // the answer came too late
	}
	for _, r := range m.Revoked {
		v.emit(SendToOwner{p.stream, Ack{IP: r.IP, Generation: r.Generation}})
	}
	for _, r := range m.Stands {
		if _, missing := stands[r]; missing {
			v.emit(SendToOwner{p.stream, Release{IP: r.IP, Generation: r.Generation}})
		}
	}
	for _, ip := range unknown {
		v.confirm(p, ip) // to learn whom it speaks of
	}
	v.proofsAgain(p)
	for _, w := range slices.Clone(p.waits) {
		v.ask(w)
	}
}

// renewed moves the lease's deadline: the *echoed send time* + TTL, because
// the owner counts from its reply, which came after (I1).
func (v *Verifier) renewed(p *peer, echo Time, ttl time.Duration) {
	i := slices.Index(p.pings, echo)
	if i < 0 {
		v.closePeer(p, "reply to no heartbeat")
		return
	}
	p.pings = p.pings[i+1:]
	l := v.leases[p.lease]
	d := echo.Add(grantable(ttl))
	if d <= l.deadline || d <= v.now {
		return
	}
	v.store(p.lease, d)
	if !p.switched {
		v.switchAll(p)
	}
	if p.gap != 0 {
		v.log(LogEntry{Kind: LogRenewalGap, Peer: p.name, Reason: "renewed", Duration: v.now.Sub(p.gap)})
		p.gap = 0
	}
	for _, w := range slices.Clone(p.waits) {
		if e, ok := v.table.Get(w.ip); ok && e.Lease == p.lease {
			v.answer(e)
		}
	}
}

// switchAll makes what stands name the session's lease, which has its deadline
// by now. Until then the slots live by the lease of the session before, for
// which the owner waits as well.
func (v *Verifier) switchAll(p *peer) {
	p.switched = true
	all := v.table.OfOwner(p.name)
	v.out = slices.Grow(v.out, len(all))
	for _, e := range all {
		if e.Condemned || e.Lease < ipcache.LeaseFirst || e.Lease == p.lease {
			continue
		}
		v.capProof(e) // before it: on the new lease the proof is one of the session before
		v.oldLease[e.Slot] = e.Lease
		v.table.SetLease(e.Slot, p.lease)
		v.emit(SwitchLease{Slot: e.Slot, Stamp: e.Stamp, Lease: p.lease})
	}
}

// store writes a deadline.
func (v *Verifier) store(lease uint32, d Time) {
	l := v.leases[lease]
	if _, ok := v.oldDeadline[lease]; !ok {
		v.oldDeadline[lease] = l.deadline
	}
	l.deadline = d
	v.emit(SetDeadline{Lease: lease, Deadline: d})
}

func (v *Verifier) binding(p *peer, m Binding) {
	b := m.Binding
	c, ok := p.confirms[b.IP]
	if !ok || c.id != m.Confirm {
		v.closePeer(p, "binding answers no confirm")
		return
	}
	delete(p.confirms, b.IP)
	e, have := v.table.Get(b.IP)
	same := have && e.Binding.Owner == p.name && e.OwnerBoot == p.boot && e.Binding.Generation == b.Generation
	switch {
	case b.Owner != p.name || !v.cfg.Speaks(p.name, b.IP):
		v.giveBack(p, b)
		v.deny(b.IP, c.sent, RefusedNotAuthorised, negativeCache)
		return
	case have && e.Binding.Owner != p.name:
		v.conflict(p, e, b, c.sent)
		return
	case same && e.Hash == b.Identity.Hash():
		if e.Binding.Identity.Equal(identity.Identity{}) {
			v.table.SetBinding(e.Slot, b)
			v.emit(Learned{Slot: e.Slot, Stamp: e.Stamp, Binding: b})
			v.askQueued(p)
		}
		v.answer(e)
		return
	case have:
		// The owner says something else than what stands; the newer counts.
		v.zero(e, "replaced")
		if !same {
			v.release(p, e)
		}
	case v.waits[b.IP] == nil:
		v.giveBack(p, b) // nobody waits for it: not installed
		return
	}
	v.install(p, b, c, m)
}

func (v *Verifier) install(p *peer, b identity.Binding, c confirm, m Binding) {
	e, err := v.table.Install(b, p.lease, identity.EvidenceLease, p.boot)
	if err != nil {
		v.giveBack(p, b)
		v.refuse(b.IP, c.sent, UnansweredMapFull, 0)
		return
	}
	notBefore := Time(0)
	if m.Since >= 0 {
		// now was read after the message: what has passed since the end is
		// at least Since by the slowest of clocks. Until F later, packets of
		// the holder before may have arrived (I1).
		notBefore = v.now.Add(grantable(m.Flight) - shrink(m.Since))
	}
	v.startUse(p, e.Slot, notBefore)
	delete(v.negative, b.IP)
	v.emit(Install{Stamp: e.Stamp, Slot: e.Slot, Lease: e.Lease, Binding: b, OwnerBoot: e.OwnerBoot, Evidence: e.Evidence})
	v.log(LogEntry{Kind: LogConfirmed, Peer: p.name, IP: b.IP, Generation: b.Generation, UID: b.UID, Identity: b.Identity, Evidence: e.Evidence})
	if !v.live(e) && len(p.pings) == 0 {
		v.beat(p, v.cfg.TTL) // a held packet waits until slot and lease are live
	}
	v.answer(e)
	if v.cfg.ProveAll {
		if q := v.proofOf(e); q != nil {
			v.askProof(q)
		}
	}
}

// giveBack tells the owner that its grant is not used.
func (v *Verifier) giveBack(p *peer, b identity.Binding) {
	v.log(LogEntry{Kind: LogRelease, Peer: p.name, IP: b.IP, Generation: b.Generation, UID: b.UID})
	v.emit(SendToOwner{p.stream, Release{IP: b.IP, Generation: b.Generation}})
}

// conflict: two owners that may both speak for the IP claim it. Neither is
// believed for as long as any lease could run.
func (v *Verifier) conflict(p *peer, e ipcache.Entry, b identity.Binding, asked Time) {
	v.giveBack(p, b)
	if e.Lease >= ipcache.LeaseFirst {
		v.zero(e, "conflict")
		v.release(v.peer(e.Binding.Owner), e)
	}
	v.log(LogEntry{Kind: LogRefusal, Peer: e.Binding.Owner, IP: b.IP, Generation: e.Binding.Generation, UID: e.Binding.UID, Reason: RefusedConflict.String()})
	v.deny(b.IP, asked, RefusedConflict, MaxLease)
}

func (v *Verifier) deny(ip addr, asked Time, r Refusal, d time.Duration) {
	v.remember(ip, r, d)
	v.log(LogEntry{Kind: LogRefusal, IP: ip, Reason: r.String()})
	v.refuse(ip, asked, AnsweredRefused, r)
}

func (v *Verifier) refused(p *peer, m Refused) {
	c, ok := p.confirms[m.IP]
	if !ok || c.id != m.Confirm {
		v.closePeer(p, "refusal answers no confirm")
		return
	}
	delete(p.confirms, m.IP)
	if m.Reason != RefusedQuarantined && m.Reason != RefusedBusy {
		v.remember(m.IP, m.Reason, negativeCache)
	}
	v.log(LogEntry{Kind: LogRefusal, Peer: p.name, IP: m.IP, Reason: m.Reason.String()})
	v.refuse(m.IP, c.sent, AnsweredRefused, m.Reason)
}

// revoke: zero, then ack. The check is by generation: a revoke of a former
// holder says nothing about the present one.
func (v *Verifier) revoke(p *peer, m Revoke) {
	is := func(e ipcache.Entry) bool {
		return e.Lease >= ipcache.LeaseFirst && e.Binding.Owner == p.name && e.Binding.IP == m.IP && e.Binding.Generation == m.Generation && e.OwnerBoot == p.boot
	}
	if e, ok := v.table.Get(m.IP); ok && is(e) {
		v.zero(e, "revoked")
	} else if v.nextRetry != 0 {
		// It may be among those that could not be zeroed before.
		for _, e := range v.table.CondemnedOf(p.name) {
			if is(e) {
				v.zero(e, "revoked")
			}
		}
	}
	v.emit(SendToOwner{p.stream, Ack(m)})
}
