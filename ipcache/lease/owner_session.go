package lease

import (
	"fmt"
	"net/netip"
	"slices"
	"time"

	"portcullis/identity"
)

// boundWindow is how long after a refusal the owner tells a verifier that the
// IP is held now.
const boundWindow = time.Second

// maxRefused bounds the memory of refusals per verifier. Forgetting one costs
// a Bound, and the verifier asks again by itself.
const maxRefused = 1024

func (o *Owner) book(n identity.NodeName) *book {
	v := o.verifiers[n]
	if v == nil {
		v = &book{name: n, refused: map[netip.Addr]Time{}}
		o.verifiers[n] = v
		if o.nextSweep == 0 {
			o.nextSweep = o.now.Add(sweepEvery)
		}
	}
	return v
}

// accept: the owner speaks first. Only the last nonce issued to a verifier
// counts: an older stream that is still waiting for its Hello is over.
func (o *Owner) accept(in StreamAccepted) {
	if o.streams[in.Stream] != nil {
		return
	}
	v := o.book(in.Verifier)
	if old := v.nonce; old != nil {
		delete(o.streams, old.id)
		o.emit(CloseVerifier{old.id, "a newer stream was opened"})
	}
	s := &ownerStream{id: in.Stream, v: v, state: StreamChallenged, nonce: o.cfg.Nonce()}
	o.streams[s.id], v.nonce = s, s
	o.emit(SendToVerifier{s.id, Challenge{s.nonce}})
}

func (o *Owner) receive(in FromVerifier) {
	s := o.streams[in.Stream]
	if s == nil {
		return // of an older stream: discarded (I1)
	}
	if m, ok := in.Message.(Hello); ok != (s.state == StreamChallenged) {
		o.breakStream(s, "message out of turn")
		return
	} else if ok {
		o.hello(s, m)
		return
	}
	s.seen = o.now
	switch m := in.Message.(type) {
	case Heartbeat:
		ttl := grantable(m.Ask)
		s.deadline = later(s.deadline, o.now.Add(stretch(ttl)))
		o.emit(SendToVerifier{s.id, HeartbeatReply{Echo: m.SentAt, TTL: ttl}})
	case Confirm:
		o.confirm(s, m)
	case Prove:
		o.prove(s, m)
	case Ack:
		o.ack(s, m)
	case Release:
		if g := o.find(s.v, s.boot, m.IP, m.Generation); g != nil && g.session == s {
			o.log(LogEntry{Kind: LogRelease, Peer: s.v.name, IP: g.ip, Generation: g.gen, UID: g.uid})
			o.drop(g, o.now)
		}
	default:
		o.breakStream(s, "unexpected message")
	}
}

// hello opens a session, and settles what of the verifier's grants it keeps.
func (o *Owner) hello(s *ownerStream, m Hello) {
	v := s.v
	if v.nonce != s || m.Nonce != s.nonce || m.Verifier != v.name {
		o.breakStream(s, "hello refused")
		return
	}
	v.nonce = nil
	if old := v.session; old != nil {
		o.endSession(v, "superseded")
		delete(o.streams, old.id)
		o.emit(CloseVerifier{old.id, "superseded by a newer stream"})
	}
	ttl := grantable(m.Ask)
	s.state, s.boot, s.seen = StreamOpen, m.Boot, o.now
	s.deadline = o.now.Add(stretch(ttl))
	v.session = s
	o.log(LogEntry{Kind: LogSessionUp, Peer: v.name})

	w := Welcome{Boot: o.cfg.Boot, Echo: m.SentAt, TTL: ttl}
	listed := map[*grant]bool{}
	for _, h := range m.Held {
		var g *grant
		if h.Boot == o.cfg.Boot {
			g = o.find(v, m.Boot, h.IP, h.Generation)
		}
		if o.stands(h) {
			if g == nil {
				g = o.regrant(s, h)
			} else if g.revoked {
				g = nil // refused to this verifier once: it must zero and ask again
			} else {
				o.say(g)
			}
			if g != nil {
				g.session = s
				listed[g] = true
				w.Stands = append(w.Stands, h.Ref)
				continue
			}
			g = o.find(v, m.Boot, h.IP, h.Generation)
		}
		if g != nil {
			o.freeze(g)
			g.session, g.told, g.seq = s, true, 0
			listed[g] = true
		}
		w.Revoked = append(w.Revoked, h.Ref)
	}
	// What this kernel boot of the verifier does not list, it does not hold.
	// Grants to another boot are not accounted for by this one: they expire.
	for _, g := range slices.Clone(v.grants) {
		if g.boot == m.Boot && !listed[g] {
			o.drop(g, o.now)
		}
	}
	o.emit(SendToVerifier{s.id, w})
}

// stands tells whether what a verifier holds is what is.
func (o *Owner) stands(h Held) bool {
	a := o.ips[h.IP]
	return h.Boot == o.cfg.Boot && a != nil && a.holder != nil && a.holder.state == WorkloadActive &&
		a.holder.gen == h.Generation && a.holder.hash == h.Identity && o.cfg.Mine(h.IP)
}

// regrant makes a grant of what a verifier holds and the books do not show:
// the journal was lost, or the grant expired while there was no session. Its
// lease may run as long as any given before this process began. Nil: no room,
// so the verifier must let go of it.
func (o *Owner) regrant(s *ownerStream, h Held) *grant {
	g := o.newGrant(s.v, s.boot, h.IP, o.ips[h.IP].holder)
	if g != nil {
		g.floor = o.start.Add(stretch(MaxLease))
	}
	return g
}

func (o *Owner) confirm(s *ownerStream, m Confirm) {
	refuse := func(r Refusal) { o.refuse(s, m.ID, m.IP, r) }
	if !o.allow(s.v) {
		refuse(RefusedRateLimited)
		return
	}
	if !o.cfg.Mine(m.IP) {
		refuse(RefusedNotMine)
		return
	}
	a := o.ips[m.IP]
	switch {
	case a == nil || a.holder == nil && a.next == nil:
		refuse(RefusedUnknown)
		return
	case a.holder == nil && o.now < o.coldUntil:
		refuse(RefusedBusy)
		return
	case a.holder == nil || a.holder.state != WorkloadActive:
		refuse(RefusedQuarantined)
		return
	}
	w := a.holder
	g := o.find(s.v, s.boot, m.IP, w.gen)
	if g == nil {
		g = o.newGrant(s.v, s.boot, m.IP, w)
	} else if g.revoked {
		g = nil // the verifier has not let go of it yet
	}
	if g == nil {
		refuse(RefusedBusy)
		return
	}
	o.say(g)
	g.session = s
	delete(s.v.refused, m.IP)
	o.emit(SendToVerifier{s.id, Binding{
		Confirm: m.ID,
		Binding: identity.Binding{IP: m.IP, Generation: w.gen, UID: w.UID, Identity: w.Identity, Owner: o.cfg.Node, Ports: w.Ports},
		Since:   o.since(a, w),
		Flight:  o.cfg.Flight,
	}})
}

// since is how long ago anybody else may have had the IP: below 0 if nobody did.
// The end of the last binding is one such time. It is not the only one: while no
// agent ran, or before this one knew of it, a workload that was never registered
// may have sent under the IP, and what it sent may be held by a verifier (I1). It
// was gone when this workload came, for whom the IP was taken.
func (o *Owner) since(a *address, w *workload) time.Duration {
	switch {
	case a.hasEnded && a.ended > w.alone:
		return o.now.Sub(a.ended)
	case w.alone > 0:
		return o.now.Sub(w.alone)
	case a.hasEnded:
		return o.now.Sub(a.ended)
	}
	return -1
}

func (o *Owner) refuse(s *ownerStream, confirm uint64, ip netip.Addr, r Refusal) {
	o.rememberRefusal(s.v, ip)
	if r == RefusedRateLimited {
		// One line a second: the limit would be none if each cost a line.
		s.v.limited++
		s.v.limitedIP = ip
	} else {
		o.log(LogEntry{Kind: LogRefusal, Peer: s.v.name, IP: ip, Reason: r.String()})
	}
	o.emit(SendToVerifier{s.id, Refused{Confirm: confirm, IP: ip, Reason: r}})
}

// rememberRefusal has the verifier told when the IP is bound soon.
func (o *Owner) rememberRefusal(v *book, ip netip.Addr) {
	if len(v.refused) < maxRefused {
		v.refused[ip] = o.now
	}
}

// allow is the rate limit.
func (o *Owner) allow(v *book) bool {
	step := time.Second / time.Duration(o.cfg.ConfirmRate)
	v.allowAt = later(v.allowAt, o.now)
	if v.allowAt.Sub(o.now) > step*time.Duration(o.cfg.ConfirmBurst-1) {
		return false
	}
	v.allowAt = v.allowAt.Add(step)
	return true
}

// sayLimited logs what the rate limit refused since the last time (I6).
func (o *Owner) sayLimited(v *book) {
	if v.limited > 0 {
		o.log(LogEntry{Kind: LogRefusal, Peer: v.name, IP: v.limitedIP, Reason: fmt.Sprintf("%v: %d confirms, the last of this IP", RefusedRateLimited, v.limited)})
		v.limited = 0
	}
}

// ack: the verifier's kernel has let go. Only the answer to what was said on
// this session counts.
func (o *Owner) ack(s *ownerStream, m Ack) {
	g := o.find(s.v, s.boot, m.IP, m.Generation)
	if g == nil || g.session != s || !g.revoked || g.seq != m.Seq || m.Seq == 0 && !g.told {
		return
	}
	o.log(LogEntry{Kind: LogAcked, Peer: s.v.name, IP: g.ip, Generation: g.gen, UID: g.uid})
	o.drop(g, o.now)
}

// breakStream ends a stream from this side.
func (o *Owner) breakStream(s *ownerStream, why string) {
	o.emit(CloseVerifier{s.id, why})
	o.closed(s.id)
}

// closed: a stream is over.
func (o *Owner) closed(id StreamID) {
	s := o.streams[id]
	if s == nil {
		return
	}
	delete(o.streams, id)
	if s.v.nonce == s {
		s.v.nonce = nil
	}
	if s.v.session == s {
		o.endSession(s.v, "stream closed")
	}
}

// endSession leaves every grant of the session with the deadline that its
// leases may have, even by replies that the verifier has yet to read.
func (o *Owner) endSession(v *book, why string) {
	for _, g := range v.grants {
		if g.session == v.session {
			g.floor = g.deadline()
			g.session, g.seq, g.told = nil, 0, false
		}
	}
	v.session, v.nextPast = nil, 0
	o.log(LogEntry{Kind: LogSessionDown, Peer: v.name, Reason: why})
}

// leave: every verifier is asked to ask for MaxLease before this agent goes.
func (o *Owner) leave() {
	o.leaving = true
	ids := make([]StreamID, 0, len(o.streams))
	for id, s := range o.streams {
		if s.state == StreamOpen {
			ids = append(ids, id)
		}
	}
	slices.Sort(ids)
	for _, id := range ids {
		o.emit(SendToVerifier{id, Going{}})
	}
}

// ---- grants -----------------------------------------------------------

func (o *Owner) find(v *book, boot identity.BootID, ip netip.Addr, gen identity.Generation) *grant {
	a := o.ips[ip]
	if a == nil {
		return nil
	}
	for _, g := range a.grants {
		if g.verifier == v && g.boot == boot && g.gen == gen {
			return g
		}
	}
	return nil
}

// newGrant books and journals a grant of an active binding, before anything
// is said to the verifier. Nil: the table, or the verifier's part, is full.
func (o *Owner) newGrant(v *book, boot identity.BootID, ip netip.Addr, w *workload) *grant {
	if o.grants >= o.cfg.Grants || len(v.grants) >= max(o.cfg.Grants/8, 64) {
		return nil
	}
	g := o.bookGrant(v, boot, ip, w.gen, w.UID)
	g.unsaid = true
	o.say(g)
	o.log(LogEntry{Kind: LogGrant, Peer: v.name, IP: ip, Generation: w.gen, UID: w.UID, Identity: w.Identity, Evidence: identity.EvidenceLease})
	return g
}

// say journals a grant that the journal does not have.
func (o *Owner) say(g *grant) {
	if g.unsaid {
		g.unsaid = false
		o.emit(Journal{o.grantRecord(RecordGrant, g, o.now)})
	}
}

func (o *Owner) bookGrant(v *book, boot identity.BootID, ip netip.Addr, gen identity.Generation, uid identity.UID) *grant {
	g := &grant{verifier: v, boot: boot, ip: ip, gen: gen, uid: uid, at: len(v.grants)}
	a := o.address(ip)
	a.grants = append(a.grants, g)
	v.grants = append(v.grants, g)
	v.nextPast = 0
	o.grants++
	return g
}

// freeze ends a grant's renewals: its deadline stays what it is.
func (o *Owner) freeze(g *grant) {
	if !g.revoked {
		g.floor = g.deadline()
		g.revoked = true
		g.verifier.nextPast = 0
	}
}

// revoke freezes a grant and, where there is a session, says so. It is said
// even when the lease is past, see sweepVerifier.
func (o *Owner) revoke(g *grant) {
	o.freeze(g)
	o.log(LogEntry{Kind: LogRevocation, Peer: g.verifier.name, IP: g.ip, Generation: g.gen, UID: g.uid})
	if g.session != nil {
		o.nextSeq++
		g.seq, g.told = o.nextSeq, false
		o.emit(SendToVerifier{g.session.id, Revoke{IP: g.ip, Generation: g.gen, Seq: g.seq}})
	}
}

// drop forgets a grant. at is when the verifier's lease was surely over.
func (o *Owner) drop(g *grant, at Time) {
	a := o.ips[g.ip]
	o.unbook(g)
	// A lease that had run out before the verifier said so ended then.
	at = min(at, later(g.deadline(), 0))
	if !a.hasGone || at > a.gone {
		a.gone, a.hasGone = at, true
	}
	o.soft = append(o.soft, o.grantRecord(RecordGrantEnded, g, at))
}

// unbook takes a grant out of the books as if it had never been there: the
// verifier knows nothing of it, or no more.
func (o *Owner) unbook(g *grant) {
	a := o.ips[g.ip]
	a.grants = slices.DeleteFunc(a.grants, func(x *grant) bool { return x == g })
	v := g.verifier
	end := len(v.grants) - 1
	v.grants[g.at] = v.grants[end]
	v.grants[g.at].at = g.at
	v.grants = v.grants[:end]
	o.grants--
}

func (o *Owner) grantRecord(k RecordKind, g *grant, at Time) Record {
	return Record{Kind: k, At: at, Boot: o.cfg.Boot, Verifier: g.verifier.name, VerifierBoot: g.boot, IP: g.ip, Generation: g.gen, UID: g.uid}
}
