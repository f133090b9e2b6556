package lease

import (
	"errors"
	"net/netip"
	"time"

	"portcullis/identity"
	"portcullis/ipcache"
)

// VerifierMachine is what Verifier and ClassicVerifier have in common.
type VerifierMachine interface {
	// Step tells the machine what happened and returns what is to be done,
	// in order. now is this node's BOOTTIME, read after the input was.
	Step(now Time, in VerifierInput) []VerifierOutput
	// Sessions returns the sessions with owners, sorted by owner.
	Sessions() []VerifierSession
	// Reason tells why an IP is not confirmed now: the reason to give to a
	// packet whose hold ends.
	Reason(ip netip.Addr) (Unanswered, Refusal)
	// LeaseDeadline returns the deadline last written to a lease; 0: none.
	LeaseDeadline(lease uint32) Time
}

// VerifierConfig is what a Verifier must know. Fields without a default are required.
type VerifierConfig struct {
	Node identity.NodeName
	Boot identity.BootID // of this kernel

	TTL       time.Duration // of a lease. Required, > 0, at most MaxLease
	Heartbeat time.Duration // Required, > 0, less than TTL
	// IdleBinding is how long an unused binding is kept. Default 5 min.
	IdleBinding time.Duration
	// IdleSession is how long a session without bindings is kept. Default 5 min.
	IdleSession time.Duration
	// DeadAfter is how long an owner may leave a message unanswered before
	// the session is closed and opened anew. Default TTL/2, at least 2 heartbeats.
	DeadAfter time.Duration
	// Waits bounds the IPs that are waited for. Default 4,096.
	Waits int

	// Speaks tells whether the node may speak for the IP (its ranges and
	// addresses). Required: a hint of whom to ask grants nothing.
	Speaks func(owner identity.NodeName, ip netip.Addr) bool

	// ProofID returns the SPIFFE ID that the holder of a binding must prove; not
	// ok: it has none, and there is no proof of it. Nil: this verifier asks for
	// no proofs.
	ProofID func(identity.Binding) (id string, ok bool)
	// ProofNonce returns a fresh random nonce. Required with ProofID.
	ProofNonce func() ProofNonce
	// ProveAll: every binding is to be proved, and is asked for when it is
	// installed. Else when a packet wants it.
	ProveAll bool
}

const (
	negativeCache  = 250 * time.Millisecond
	maxNegatives   = 4096
	firstRetry     = 50 * time.Millisecond
	maxRetry       = time.Second
	storeRetry     = 200 * time.Millisecond
	maxOutstanding = 64   // heartbeats unanswered
	maxConfirms    = 8192 // unanswered, of one owner
)

// PeerState is where a verifier stands with an owner.
//
//	       something is wanted        StreamOpened            Challenge: Hello
//	idle ──────────────────────▶ opening ────────▶ challenge ────────────────▶ greeting
//	 ▲ ▲                           ▲  │                │                           │
//	 │ │                    retry  │  │ OwnerGone      │ OwnerGone, silence        │ Welcome
//	 │ │                           │  ▼                │                           ▼
//	 │ └────────────────────────  backoff ◀────────────┴───────────────────────  open
//	 │   nothing is wanted any more              OwnerGone, silence, failed       │
//	 └────────────────────────────────────────── store, message out of turn ─────┘
//	                                   no bindings for IdleSession
//
// ResetSession leads from every state to idle. Messages of any stream but the
// current one are discarded.
type PeerState uint8

// The states of an owner, as its verifier sees it.
const (
	PeerIdle PeerState = iota
	PeerBackoff
	PeerOpening
	PeerChallenge
	PeerGreeting
	PeerOpen
)

var peerStates = [...]string{"idle", "backoff", "opening", "challenge", "greeting", "open"}

// String returns the state's name.
func (s PeerState) String() string { return peerStates[s] }

// Verifier keeps what this node believes about remote IPs. One serves all owners.
type Verifier struct {
	cfg   VerifierConfig
	table *ipcache.Table
	start Time
	now   Time

	askMax    bool // this agent is about to go: ask for MaxLease
	nextID    uint64
	nextScan  Time
	timer     Time
	nextRetry Time // of failed stores; 0: none
	nextProof Time // when proofs are to be looked at; 0: never
	leastTick Time // and not before
	nextAsk   Time // when a negative answer ends that a wait is held back by; 0: none

	peers    map[identity.NodeName]*peer
	order    []*peer // by first use
	byStream map[StreamID]*peer
	waits    map[netip.Addr]*wait
	negative map[netip.Addr]negative
	uses     []use // by slot; as long as was needed so far
	leases   map[uint32]*leaseState
	proofs   map[uint32]*proof // by slot; of those that were ever wanted

	out  []VerifierOutput // of this step
	last []VerifierOutput // of the last step, to be undone should one fail
	// of the last step: what a failed SwitchLease or SetDeadline goes back to
	oldLease    map[uint32]uint32
	oldDeadline map[uint32]Time
}

// peer is an owner as its verifier sees it.
type peer struct {
	name   identity.NodeName
	state  PeerState
	stream StreamID
	boot   identity.BootID // the owner's, since Welcome
	// I1: fresh for every session, so that no deadline given on an earlier
	// one counts for a binding confirmed on this one. 0 before Welcome.
	lease     uint32
	lastLease uint32 // of the session before; 0: none
	switched  bool   // what stands names lease

	since     Time   // in this state
	pings     []Time // unanswered Hello and Heartbeats, oldest first
	nextBeat  Time
	heard     Time // last message
	retryAt   Time
	backoff   time.Duration
	confirms  map[netip.Addr]confirm
	asked     map[uint64]*proof // questions for proofs that are not answered
	unproved  []*proof          // to be asked for when there is room, or a session
	waits     []*wait
	uses      useList
	idleSince Time // 0: it has bindings or waits
	gap       Time // when the lease ran out with bindings on it; 0: it did not
}

type confirm struct {
	id   uint64
	sent Time
}

// wait is an IP for which packets are held.
type wait struct {
	ip      netip.Addr
	peer    *peer
	newest  Time // arrival of the latest packet
	refused Refusal
	full    bool
}

type negative struct {
	until  Time
	reason Refusal
}

type leaseState struct {
	deadline Time // last stored, as far as is known
	retired  bool // of no session any more: no deadline but 0 is ever stored again (I1)
	mustZero bool // a slot that names it could not be zeroed
	zeroed   bool // 0 was stored
}

// NewVerifier returns a verifier that starts now, over a table that may hold
// what was restored from the kernel. Held packets from before must have been
// discarded, and the deadlines of indices that no slot names zeroed: the next
// session to get one may install bindings before it has a deadline. Give it a VerifierTick, so that it renews what was restored.
func NewVerifier(cfg VerifierConfig, table *ipcache.Table, now Time) (*Verifier, error) {
	setDuration(&cfg.IdleBinding, 5*time.Minute)
	setDuration(&cfg.IdleSession, 5*time.Minute)
	setDuration(&cfg.DeadAfter, max(cfg.TTL/2, 2*cfg.Heartbeat))
	setDefault(&cfg.Waits, 4096)
	switch {
	case cfg.Node == "" || cfg.Speaks == nil || table == nil:
		return nil, errors.New("lease: verifier without node name, authorisation or table")
	case cfg.TTL <= 0 || cfg.TTL > MaxLease:
		return nil, errors.New("lease: TTL must be positive and at most " + MaxLease.String())
	case cfg.Heartbeat <= 0 || cfg.Heartbeat >= cfg.TTL:
		return nil, errors.New("lease: heartbeat must be positive and less than the TTL")
	case cfg.ProofID != nil && cfg.ProofNonce == nil:
		return nil, errors.New("lease: a verifier that asks for proofs needs a source of nonces")
	}
	v := &Verifier{
		cfg: cfg, table: table, start: now, now: now,
		peers:    map[identity.NodeName]*peer{},
		byStream: map[StreamID]*peer{},
		waits:    map[netip.Addr]*wait{},
		negative: map[netip.Addr]negative{},
		leases:   map[uint32]*leaseState{},
		proofs:   map[uint32]*proof{},

		oldLease: map[uint32]uint32{}, oldDeadline: map[uint32]Time{},
	}
	for _, owner := range table.Owners() {
		for _, e := range table.OfOwner(owner) {
			if e.Lease < ipcache.LeaseFirst {
				continue
			}
			if p := v.peer(owner); !e.Condemned {
				v.startUse(p, e.Slot, now)
			}
			l := v.leases[e.Lease]
			if l == nil {
				l = &leaseState{retired: true}
				v.leases[e.Lease] = l
			}
			if e.Condemned {
				l.mustZero = true
				v.nextRetry = now
			}
		}
	}
	return v, nil
}

func setDuration(p *time.Duration, d time.Duration) {
	if *p == 0 {
		*p = d
	}
}

// Step implements VerifierMachine.
func (v *Verifier) Step(now Time, in VerifierInput) []VerifierOutput {
	v.wake(now)
	v.now = later(v.now, now)
	last := v.last
	v.out = nil
	if f, ok := in.(StoreFailed); ok {
		v.storeFailed(last, f.Write)
	} else {
		v.committed(last)
		clear(v.oldLease)
		clear(v.oldDeadline)
		v.step(in)
	}
	v.tick()
	v.setTimer()
	v.last = v.out
	return v.out
}

// wake: time that this agent slept through is not silence of its owners, whose
// answers may be waiting to be read.
func (v *Verifier) wake(now Time) {
	if now.Sub(v.now) < v.cfg.DeadAfter/2 {
		return
	}
	for _, p := range v.order {
		p.heard, p.since = now, now
	}
}

func (v *Verifier) step(in VerifierInput) {
	switch in := in.(type) {
	case Want:
		v.want(in)
	case Unwant:
		v.unwant(in.IP)
	case StreamOpened:
		v.opened(in)
	case FromOwner:
		if p := v.byStream[in.Stream]; p != nil {
			v.receive(p, in.Message)
		}
	case OwnerGone:
		v.gone(in)
	case Used:
		for _, ip := range in.IPs {
			if e, ok := v.table.Get(ip); ok {
				v.touch(e.Slot)
			}
		}
	case WantProof:
		v.wantProof(in)
	case Doubt:
		v.doubtAll()
	case AskMax:
		v.askMax = true
		for _, p := range v.order {
			if p.state == PeerOpen {
				v.beat(p, MaxLease)
			}
		}
	case ResetSession:
		v.reset(in.Owner)
	case VerifierTick:
		// The work is in tick.
	}
}

func (v *Verifier) emit(out VerifierOutput) { v.out = append(v.out, out) }

func (v *Verifier) log(e LogEntry) { v.emit(VerifierLog{e}) }

func (v *Verifier) peer(n identity.NodeName) *peer {
	p := v.peers[n]
	if p == nil {
		p = &peer{name: n, confirms: map[netip.Addr]confirm{}, asked: map[uint64]*proof{}}
		v.peers[n] = p
		v.order = append(v.order, p)
	}
	return p
}

func (v *Verifier) setState(p *peer, s PeerState) { p.state, p.since = s, v.now }

// live tells whether the entry's lease runs.
func (v *Verifier) live(e ipcache.Entry) bool { return v.LeaseDeadline(e.Lease) > v.now }

// LeaseDeadline implements VerifierMachine.
func (v *Verifier) LeaseDeadline(lease uint32) Time {
	if l := v.leases[lease]; l != nil {
		return l.deadline
	}
	return 0
}

// ---- time -------------------------------------------------------------

// tick does what time asks for. It runs at the end of every step.
func (v *Verifier) tick() {
	for _, p := range v.order {
		v.tickPeer(p)
	}
	if v.nextAsk != 0 && v.now >= v.nextAsk {
		v.nextAsk = 0
		for _, p := range v.order {
			for _, w := range p.waits {
				v.ask(w)
			}
		}
	}
	if v.now >= v.nextScan {
		if v.scan() {
			v.nextScan = v.now.Add(min(v.cfg.IdleBinding/8, 10*time.Second))
		} else {
			v.nextScan = v.now.Add(scanPause)
		}
	}
	if v.nextRetry != 0 && v.now >= v.nextRetry {
		v.retryStores()
	}
	v.tickProofs()
	v.clearLeases()
}

func (v *Verifier) tickPeer(p *peer) {
	wanted := len(p.waits) > 0 || v.holds(p)
	if d, ok := v.gapAt(p); ok && v.now >= d {
		p.gap = later(d, 1)
		v.log(LogEntry{Kind: LogRenewalGap, Peer: p.name, Reason: "the lease ran out"})
	}
	switch p.state {
	case PeerIdle:
		if wanted {
			v.open(p)
		}
	case PeerBackoff:
		if !wanted {
			v.setState(p, PeerIdle)
		} else if v.now >= p.retryAt {
			v.open(p)
		}
	case PeerOpening:
		// The transport answers, see StreamOpened.
	case PeerChallenge, PeerGreeting:
		if v.now >= p.since.Add(v.cfg.DeadAfter) {
			v.closePeer(p, "no answer")
		}
	case PeerOpen:
		v.tickOpen(p, wanted)
	}
}

// gapAt is when the lease that this owner's bindings live by runs out; not ok
// when there are none, or that was noted already.
func (v *Verifier) gapAt(p *peer) (Time, bool) {
	l := p.lease
	if l == 0 || !p.switched {
		l = p.lastLease
	}
	return v.LeaseDeadline(l), p.gap == 0 && l != 0 && v.leases[l] != nil && v.table.LeaseUsers(l) > 0
}

func (v *Verifier) tickOpen(p *peer, wanted bool) {
	if len(p.pings) > 0 && v.now >= later(p.pings[0], p.heard).Add(v.cfg.DeadAfter) {
		v.closePeer(p, "no answer")
		return
	}
	switch {
	case wanted || len(p.confirms) > 0:
		p.idleSince = 0
	case p.idleSince == 0:
		p.idleSince = v.now
	case v.now >= p.idleSince.Add(v.cfg.IdleSession):
		v.closePeer(p, "idle")
		v.setState(p, PeerIdle)
		return
	}
	if v.now >= p.nextBeat {
		v.beat(p, v.cfg.TTL)
	}
}

// holds tells whether any slot of this owner is in use, or could not be zeroed:
// then the owner is to be told by a Hello.
func (v *Verifier) holds(p *peer) bool {
	return v.table.Holds(p.name) || v.nextRetry != 0 && v.table.CountOf(p.name) > 0
}

// setTimer asks for the next tick, when it is not asked for already.
func (v *Verifier) setTimer() {
	at := v.nextScan
	sooner := func(t Time) {
		if t != 0 && t < at {
			at = t
		}
	}
	sooner(v.nextRetry)
	sooner(v.nextAsk)
	sooner(v.nextProof)
	for _, p := range v.order {
		if d, ok := v.gapAt(p); ok {
			sooner(d)
		}
		switch p.state {
		case PeerBackoff:
			sooner(p.retryAt)
		case PeerChallenge, PeerGreeting:
			sooner(p.since.Add(v.cfg.DeadAfter))
		case PeerOpen:
			sooner(p.nextBeat)
			if len(p.pings) > 0 {
				sooner(later(p.pings[0], p.heard).Add(v.cfg.DeadAfter))
			}
			if p.idleSince != 0 {
				sooner(p.idleSince.Add(v.cfg.IdleSession))
			}
		}
	}
	at = later(at, v.now+1)
	if at == v.timer {
		return
	}
	v.timer = at
	v.emit(VerifierTimer{at})
}
