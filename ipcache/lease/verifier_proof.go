package lease

import (
	"slices"
	"strings"
	"time"

	"portcullis/identity"
	"portcullis/ipcache"
)

const (
	// maxProofs bounds the questions for proofs that one owner has not answered.
	maxProofs = 64
	// proofRetry is how long after a refusal the owner is asked again.
	proofRetry = 250 * time.Millisecond
	// leastProof is the least that a proof must have left, to be of use: far more
	// than the tick by which the kernel's deadlines are early.
	leastProof = time.Second
	// proofTick is the least time between two turns of looking at all proofs.
	proofTick = 50 * time.Millisecond
	// proofSilence is how long one reason of refusals is not said again of a binding.
	proofSilence = time.Minute
)

// MaxProof is the longest that one proof counts: some certificates have an end
// that no clock can be set to.
const MaxProof = 365 * 24 * time.Hour

// proofState is where a binding stands with its proof.
//
//	         WantProof, Install (ProveAll)       room, session open: Prove
//	none ─────────────────────────────▶ wanted ──────────────────────────▶ asked
//	                                     ▲  ▲                              │  │
//	              refused: proofRetry is │  │ session ended                │  │ Proof
//	              over and somebody waits│  └──────────────────────────────┘  ▼
//	                                   rests ◀───────────────────────────  rests
//	                                         ProofRefused, Proof that is      until half of what
//	                                         none, no answer                  is left is over
//
// What is proved is proved in every state, until the deadline that the kernel
// has; the state says what is done about the next proof. All of it ends with the
// installation.
type proofState uint8

const (
	proofRests proofState = iota
	proofWanted
	proofAsked
)

// proof is one installation's. It begins when a proof is wanted for the first
// time and ends with the slot.
type proof struct {
	peer   *peer
	slot   uint32
	stamp  uint64
	ip     addr
	state  proofState
	over   bool // the installation has ended: an answer counts for nothing
	queued bool // in peer.unproved
	// doubted: what proofs rest on has changed since it was asked for, and the
	// answer may have been checked before.
	doubted bool

	until  Time // as it stands in the kernel; 0: not proved
	next   Time // when it is asked for by itself, while it rests; 0: it is not
	newest Time // arrival of the latest packet that waits; 0: none does
	waits  bool
	reason ProofRefusal // of the last refusal
	said   uint32       // reasons that were written down, by bit, and
	silent Time         // until when they are not again

	id    uint64
	nonce ProofNonce
	want  string // SPIFFE ID
	sent  Time
}

// proofOf returns the proof of a binding, begun if need be; nil if this verifier
// asks for none.
func (v *Verifier) proofOf(e ipcache.Entry) *proof {
	if p := v.proofs[e.Slot]; p != nil && p.stamp == e.Stamp {
		return p
	}
	if v.cfg.ProofID == nil || e.Lease < ipcache.LeaseFirst || e.Condemned {
		return nil
	}
	p := &proof{peer: v.peer(e.Binding.Owner), slot: e.Slot, stamp: e.Stamp, ip: e.Binding.IP, until: Time(e.Proved)}
	v.proofs[e.Slot] = p
	return p
}

// endProof: the slot's installation is over.
func (v *Verifier) endProof(slot uint32) {
	if p := v.proofs[slot]; p != nil {
		p.over = true
		delete(v.proofs, slot)
	}
}

// proved tells whether it stands, and for a while.
func (v *Verifier) proved(p *proof) bool { return p.until > v.now.Add(leastProof/4) }

// wantProof: a packet is held until the binding is proved.
func (v *Verifier) wantProof(in WantProof) {
	e, ok := v.table.Get(in.IP)
	if !ok || in.Stamp != 0 && e.Stamp != in.Stamp {
		// The packet was judged under a binding that is no more (I4).
		v.emit(ProofAnswer{IP: in.IP, Stamp: in.Stamp, Gone: true})
		return
	}
	p := v.proofOf(e)
	if p == nil {
		v.emit(ProofAnswer{IP: in.IP, Stamp: e.Stamp, Asked: later(v.now, in.Arrival) + 1})
		return
	}
	v.touch(e.Slot)
	p.newest, p.waits = later(p.newest, in.Arrival), true
	if v.proved(p) {
		v.answerProof(p)
		return
	}
	if p.state == proofRests && (p.reason == 0 || v.now >= p.next) {
		v.askProof(p)
		return
	}
	v.proofDue(p.next)
}

// askProof asks the owner, or notes that it is to be asked.
func (v *Verifier) askProof(p *proof) {
	o := p.peer
	p.state, p.doubted = proofWanted, false
	if o.state != PeerOpen || len(o.asked) >= maxProofs {
		v.queueProof(p)
		return
	}
	e, ok := v.table.Slot(p.slot)
	if !ok || e.Stamp != p.stamp || e.Condemned {
		return
	}
	if e.Binding.Identity.Equal(identity.Identity{}) {
		v.queueProof(p) // restored: who it is, is being asked
		return
	}
	want, ok := v.cfg.ProofID(e.Binding)
	if !ok {
		p.state, p.sent = proofRests, v.now+1
		v.refuseProof(p, ProofWrongID, Certificate{})
		return
	}
	v.nextID++
	p.state, p.id, p.nonce, p.want, p.sent = proofAsked, v.nextID, v.cfg.ProofNonce(), want, v.now
	o.asked[p.id] = p
	v.proofDue(p.sent.Add(v.cfg.DeadAfter))
	v.emit(SendToOwner{o.stream, Prove{ID: p.id, IP: p.ip, Generation: e.Binding.Generation, UID: e.Binding.UID, SPIFFEID: want, Nonce: p.nonce}})
}

func (v *Verifier) queueProof(p *proof) {
	if p.queued {
		return
	}
	o := p.peer
	if len(o.unproved) == cap(o.unproved) {
		// An owner that answers nothing can take back and bind on and on: those
		// that are over make room, before there is more of it.
		o.unproved = slices.DeleteFunc(o.unproved, func(p *proof) bool { return p.over })
		if 2*len(o.unproved) >= cap(o.unproved) {
			o.unproved = slices.Grow(o.unproved, len(o.unproved)+1)
		}
	}
	p.queued = true
	o.unproved = append(o.unproved, p)
}

// askQueued asks for what could not be asked for before.
func (v *Verifier) askQueued(o *peer) {
	queued := o.unproved
	o.unproved = nil
	for _, p := range queued {
		p.queued = false
		if !p.over && p.state == proofWanted {
			v.askProof(p)
		}
	}
}

// proofAnswered finds the question that an answer is to; nil: there is none.
func (v *Verifier) proofAnswered(o *peer, id uint64) *proof {
	p := o.asked[id]
	delete(o.asked, id)
	return p
}

// proofReceived judges a proof. Certificate and signature are checked; here it is
// seen whether it is the answer to what was asked, and for the present binding.
func (v *Verifier) proofReceived(o *peer, m Proof) {
	p := v.proofAnswered(o, m.ID)
	if p == nil {
		// Of another time: a proof is good for one question.
		v.log(LogEntry{Kind: LogProofRefusal, Peer: o.name, IP: m.IP, Generation: m.Generation, UID: m.UID, Reason: ProofNonceReplayed.String(), Certificate: m.Checked.Certificate})
		v.closePeer(o, "a proof that answers no question")
		return
	}
	e, ok := v.table.Slot(p.slot)
	if p.over || !ok || e.Stamp != p.stamp || e.Condemned {
		v.askQueued(o)
		return // the binding ended meanwhile
	}
	if p.doubted {
		v.askProof(p)
		v.askQueued(o)
		return
	}
	p.state = proofRests
	// Counted from when it was asked for: the certificate's life was looked
	// at later.
	until := p.sent.Add(min(m.Checked.Valid, MaxProof))
	r := judgeProof(p, e, m)
	if r == 0 && until <= v.now.Add(leastProof/4) {
		r = ProofTimeout // under way, or unread, for as long as it counts
	}
	if r != 0 {
		v.refuseProof(p, r, m.Checked.Certificate)
	} else {
		v.setProved(p, until)
		p.reason, p.next = 0, v.now.Add(max(p.until.Sub(v.now)/2, leastProof/2))
		v.proofDue(p.next)
		accepted := v.proofEntry(LogProof, p, e, "", m.Checked.Certificate)
		accepted.Evidence = identity.EvidenceSVID
		v.log(accepted)
		v.answerProof(p)
	}
	v.askQueued(o)
}

// judgeProof returns why a proof does not prove the binding, 0 if it does.
func judgeProof(p *proof, e ipcache.Entry, m Proof) ProofRefusal {
	c := m.Checked
	switch {
	case c.Refusal != 0:
		return c.Refusal
	case m.Nonce != p.nonce:
		return ProofNonceReplayed
	case m.IP != p.ip || m.Generation != e.Binding.Generation || m.UID != e.Binding.UID:
		return ProofStaleGeneration
	case trustDomain(c.SPIFFEID) != trustDomain(p.want):
		return ProofWrongTrustDomain
	case c.SPIFFEID != p.want || m.SPIFFEID != p.want:
		return ProofWrongID
	case c.Valid < leastProof:
		return ProofExpired
	}
	return 0
}

func trustDomain(id string) string {
	td, _, _ := strings.Cut(strings.TrimPrefix(id, "spiffe://"), "/")
	return td
}

// proofRefused: the owner has none to give.
func (v *Verifier) proofRefused(o *peer, m ProofRefused) {
	p := v.proofAnswered(o, m.ID)
	if p == nil {
		v.closePeer(o, "a refusal of a proof that was not asked for")
		return
	}
	if !p.over {
		p.state = proofRests
		v.refuseProof(p, m.Reason, Certificate{})
	}
	v.askQueued(o)
}

// refuseProof notes that there is no proof. What was proved before is not any
// more, but for a refusal that passes: then it counts to its end.
func (v *Verifier) refuseProof(p *proof, r ProofRefusal, c Certificate) {
	e, ok := v.table.Slot(p.slot)
	if !ok || e.Stamp != p.stamp {
		return
	}
	if v.sayRefusal(p, r) {
		v.log(v.proofEntry(LogProofRefusal, p, e, r.String(), c))
	}
	p.reason, p.next = r, v.now.Add(proofRetry)
	if !r.passing() && p.until != 0 {
		v.weaken(p, r.String())
	}
	if p.waits && !r.passing() {
		v.emit(ProofAnswer{IP: p.ip, Stamp: p.stamp, Asked: p.sent})
		p.waits = p.newest >= p.sent
	}
	if p.waits || p.until != 0 {
		v.proofDue(p.next)
	}
}

// sayRefusal tells whether to write a refusal down: each reason once in a while, and
// not four times a second. The owner chooses them, and the log has an end.
func (v *Verifier) sayRefusal(p *proof, r ProofRefusal) bool {
	if v.now >= p.silent {
		p.said, p.silent = 0, v.now.Add(proofSilence)
	}
	known := p.said&(1<<r) != 0
	p.said |= 1 << r
	return !known
}

func (v *Verifier) proofEntry(k LogKind, p *proof, e ipcache.Entry, why string, c Certificate) LogEntry {
	return LogEntry{Kind: k, Peer: p.peer.name, IP: p.ip, Generation: e.Binding.Generation, UID: e.Binding.UID, Identity: e.Binding.Identity,
		Evidence: e.EvidenceAt(int64(v.now)), Reason: why, Certificate: c}
}

// answerProof ends the wait for a proof that stands.
func (v *Verifier) answerProof(p *proof) {
	if !p.waits {
		return
	}
	p.waits, p.newest = false, 0
	v.emit(ProofAnswer{IP: p.ip, Stamp: p.stamp, Proved: true, NotBefore: v.uses[p.slot].notBefore})
}

// setProved stores until when the binding counts as proved.
func (v *Verifier) setProved(p *proof, until Time) {
	p.until = until
	v.table.SetProved(p.slot, int64(until))
	v.emit(SetProved{Slot: p.slot, Stamp: p.stamp, Until: until})
}

// weaken takes a proof back.
func (v *Verifier) weaken(p *proof, why string) {
	v.setProved(p, 0)
	if e, ok := v.table.Slot(p.slot); ok {
		v.log(v.proofEntry(LogWeakening, p, e, why, Certificate{}))
	}
}

// capProof has what was proved count a TTL more at the most.
func (v *Verifier) capProof(e ipcache.Entry) {
	most := v.now.Add(v.cfg.TTL)
	if Time(e.Proved) <= most {
		return
	}
	if p := v.proofs[e.Slot]; p != nil && p.stamp == e.Stamp {
		p.until = most
	}
	v.table.SetProved(e.Slot, int64(most))
	v.emit(SetProved{Slot: e.Slot, Stamp: e.Stamp, Until: most})
}

// doubt has a proof made anew: the former counts a TTL more at the most, and one
// that is on its way not at all.
func (v *Verifier) doubt(p *proof) {
	p.doubted = p.state == proofAsked
	if p.until == 0 {
		return
	}
	if e, ok := v.table.Slot(p.slot); ok && e.Stamp == p.stamp {
		v.capProof(e)
	}
	if p.state != proofAsked {
		v.askProof(p)
	}
}

// doubtAll: what made proofs count has changed.
func (v *Verifier) doubtAll() {
	for _, o := range v.order {
		v.doubtOf(o)
	}
}

func (v *Verifier) doubtOf(o *peer) {
	for _, e := range v.table.OfOwner(o.name) {
		if p := v.proofs[e.Slot]; p != nil && p.stamp == e.Stamp {
			v.doubt(p)
		}
	}
}

// proofsLost: the session with the owner has ended, and with it every question.
// What was proved is so to the end of the lease; the next session begins with
// proofs of its own, see proofsAgain.
func (v *Verifier) proofsLost(o *peer) {
	for _, p := range o.asked {
		p.state = proofWanted
	}
	clear(o.asked)
	for _, p := range o.unproved {
		p.queued = false
	}
	o.unproved = nil
}

// proofsAgain: a proof is good for the session in which it was made. What stands
// was as good a moment ago, on a lease of the session before; it counts no longer
// than such a lease could run, and is asked for at once.
func (v *Verifier) proofsAgain(o *peer) {
	for _, e := range v.table.OfOwner(o.name) {
		if e.Condemned || e.Lease < ipcache.LeaseFirst {
			continue
		}
		if p := v.proofs[e.Slot]; p == nil && e.Proved == 0 && !v.cfg.ProveAll {
			continue
		}
		p := v.proofOf(e)
		switch {
		case p == nil: // no longer asked for, by this agent
			if e.Proved != 0 {
				v.table.SetProved(e.Slot, 0)
				v.emit(SetProved{Slot: e.Slot, Stamp: e.Stamp})
			}
		case p.until != 0:
			v.doubt(p)
		case p.waits || v.cfg.ProveAll || p.state == proofWanted:
			v.askProof(p)
		}
	}
}

// ---- time -------------------------------------------------------------

// proofDue has tickProofs look at that time.
func (v *Verifier) proofDue(at Time) {
	if at == 0 {
		return
	}
	// All proofs are looked at in one turn: not more often than that.
	if at = later(at, v.leastTick); v.nextProof == 0 || at < v.nextProof {
		v.nextProof = at
	}
}

// tickProofs asks anew for what will not count much longer, if it is of use to
// anybody, and gives up on owners that do not answer.
func (v *Verifier) tickProofs() {
	if v.nextProof == 0 || v.now < v.nextProof {
		return
	}
	v.nextProof, v.leastTick = 0, v.now.Add(proofTick)
	var due []uint32
	for slot, p := range v.proofs {
		if at := p.due(v.cfg.DeadAfter); at != 0 && v.now >= at {
			due = append(due, slot)
		} else {
			v.proofDue(at)
		}
	}
	slices.Sort(due)
	for _, slot := range due {
		v.tickProof(v.proofs[slot])
	}
}

// due is when the proof is to be looked at, 0: never.
func (p *proof) due(deadAfter time.Duration) (at Time) {
	sooner := func(t Time) {
		if t != 0 && (at == 0 || t < at) {
			at = t
		}
	}
	sooner(p.until)
	switch {
	case p.state == proofAsked:
		sooner(p.sent.Add(deadAfter))
	case p.state == proofRests && (p.until != 0 || p.waits):
		sooner(p.next)
	}
	return at
}

func (v *Verifier) tickProof(p *proof) {
	if p.until != 0 && p.until <= v.now {
		v.weaken(p, ProofExpired.String())
	}
	switch {
	case p.state == proofAsked && v.now >= p.sent.Add(v.cfg.DeadAfter):
		// The id stays known, so that a late answer is no replay; it is counted
		// among those that are not answered.
		p.peer.asked[p.id] = &proof{over: true}
		p.state = proofRests
		v.refuseProof(p, ProofTimeout, Certificate{})
	case p.state == proofRests && p.next != 0 && v.now >= p.next && (p.until != 0 || p.waits):
		v.askProof(p)
	}
	v.proofDue(p.due(v.cfg.DeadAfter))
}

// proofWaited tells whether packets wait for a proof of what is in the slot.
func (v *Verifier) proofWaited(slot uint32) bool {
	p := v.proofs[slot]
	return p != nil && p.waits
}
