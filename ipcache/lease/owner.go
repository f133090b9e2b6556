package lease

import (
	"errors"
	"fmt"
	"net/netip"
	"time"

	"portcullis/identity"
)

// OwnerMachine is what Owner and ClassicOwner have in common.
type OwnerMachine interface {
	// Step tells the machine what happened and returns what is to be done,
	// in order. now is this node's BOOTTIME, read after the input was.
	Step(now Time, in OwnerInput) []OwnerOutput
	// Workloads returns what the owner knows of this node's workloads.
	Workloads() []WorkloadInfo
	// Sessions returns the sessions with verifiers.
	Sessions() []OwnerSession
}

// OwnerConfig is what an Owner must know. Fields without a default are required.
type OwnerConfig struct {
	Node identity.NodeName
	Boot identity.BootID // of this kernel

	// ReuseMargin is how long an IP rests between two workloads: at least
	// (1 + rho) x (Flight + one confirmation round trip). Required, > 0.
	ReuseMargin time.Duration
	// Flight is F: the longest a packet stays between leaving its workload
	// and being judged (A5). Default: a third of ReuseMargin.
	Flight time.Duration
	// Grants bounds the grant table. Full means Refused(busy); a grant is
	// never evicted (I6). Default 65,536. An eighth of it, at least 64, is the
	// most that one verifier has, counting all boots that it claims: so one
	// that lies cannot keep others from being served.
	Grants int
	// MaxWorkloads bounds the workloads. Default 4,096.
	MaxWorkloads int
	// ConfirmRate and ConfirmBurst bound the Confirms of each verifier, in
	// requests per second and requests. Defaults 5,000 and 5,000.
	ConfirmRate, ConfirmBurst int

	// Nonce returns a fresh random nonce. Required.
	Nonce func() Nonce
	// Mine tells whether this node may speak for an IP: its ranges and its
	// own addresses. Required.
	Mine func(netip.Addr) bool

	// LastGeneration is the greatest generation known to have been given in
	// this boot, from a pinned map; the journal's are taken into account.
	LastGeneration identity.Generation
	// Journal tells what is known of the process before; see JournalState.
	// Required.
	Journal JournalState
	// Records are the journal's, oldest first.
	Records []Record
	// FreshRanges states that this node's ranges were never served in this
	// boot, so a missing journal means that there was nothing to write. It
	// is never a default: wrong, it breaks I1.
	FreshRanges bool
	// Relabel is when a relabelled workload has its IPs again.
	Relabel RelabelMode
}

// JournalState tells what became of the journal of the process before.
type JournalState uint8

// The states of the journal at start.
const (
	_                JournalState = iota
	JournalPresent                // of this kernel boot, complete; without a record of this boot it counts as missing
	JournalOtherBoot              // of another boot: its grants were made before this one began
	JournalMissing                // nothing is known of what was granted in this boot
)

// WorkloadState is where a workload stands with its owner.
//
//	     Add                gate open: Journal(bound), Activate
//	none ────▶ quarantined ────────────────────────────────────▶ active
//	 ▲  ▲          │  ▲                                            │ │
//	 │  └──────────┘  └────────────────────────────────────────────┘ │
//	 │   Delete, or           Relabel;                               │
//	 │   another Add of its IP  JournalFailed(bound): undone         │
//	 │                                           another Add of its IP
//	 │                                                               ▼
//	 └────────────────────────────────────────────────────────── leaving
//	                        Delete (from active too)
//
// Adopt leads from none to active without a wait: it is no rebind.
type WorkloadState uint8

// The states of a workload.
const (
	WorkloadNone        WorkloadState = iota // not known
	WorkloadQuarantined                      // its IPs still rest, or somebody believes in their last holder
	WorkloadActive                           // it holds its IPs
	WorkloadLeaving                          // another was given one of its IPs: it must close first
)

var workloadStates = [...]string{"none", "quarantined", "active", "leaving"}

// String returns the word that the command line uses.
func (s WorkloadState) String() string { return workloadStates[s] }

// StreamState is where a verifier's stream stands with the owner.
//
//	     StreamAccepted: Challenge          Hello with the last nonce: Welcome
//	none ─────────────────────────▶ challenged ────────────────────────────▶ open
//	 ▲                                  │                                     │
//	 └──────────────────────────────────┴─────────────────────────────────────┘
//	   VerifierGone; a newer stream was challenged / opened; any other message
//	   before Hello; silence
//
// What is read from a stream in state none is discarded.
type StreamState uint8

// The states of a stream.
const (
	StreamNone StreamState = iota
	StreamChallenged
	StreamOpen
)

var streamStates = [...]string{"none", "challenged", "open"}

// String returns the state's name.
func (s StreamState) String() string { return streamStates[s] }

// Owner is the authority on who holds this node's IPs. One serves all verifiers.
type Owner struct {
	cfg   OwnerConfig
	start Time
	now   Time

	// I1: until then, and a margin longer, nothing is bound, because leases
	// given before this process may run. 0: no such wait.
	coldUntil Time
	// The latest end of bindings of which nothing more is remembered.
	forgotten    Time
	anyForgotten bool

	lastGen   identity.Generation
	settled   bool // the Adopts are over
	leaving   bool
	unsaid    []Record // of the start: must be in the journal before anything else
	nextSeq   uint64
	nextSweep Time
	timer     Time // last asked for; 0: none

	workloads map[identity.UID]*workload
	waiting   []*workload // quarantined, oldest first
	ips       map[netip.Addr]*address
	verifiers map[identity.NodeName]*book
	streams   map[StreamID]*ownerStream
	grants    int // in all

	out  []OwnerOutput // of this step
	soft []Record      // of this step: to be journalled after everything else
	last []OwnerOutput // of the last step
}

type workload struct {
	Add
	hash    identity.Hash
	state   WorkloadState
	gen     identity.Generation // when active or leaving
	added   Time
	alone   Time // when bound here: nobody else had its IPs from then on; see (*Owner).since
	adopted bool
	retry   Time // not activated before: the journal failed
	prompt  bool // relabelled while it was active, and waits for nobody
}

// address is what is remembered of one of this node's IPs.
type address struct {
	ip     netip.Addr
	holder *workload // active or leaving; nil: nobody
	next   *workload // quarantined; nil: nobody

	// I1: the margin counts from the later of these two.
	ended    Time // the last binding's end (since counts from it)
	gone     Time // the last time that a grant went
	hasEnded bool
	hasGone  bool

	grants []*grant
	bound  *journalled // until settled: what the journal shows as bound
}

// grant is the owner's knowledge that a verifier may hold a lease on a binding.
//
//	Confirm,               Delete: Revoke;
//	Hello (stands)         Hello (does not stand): Welcome.Revoked
//	     ──────▶ standing ─────────────────────────▶ revoked
//	                │                                   │
//	                ▼                                   ▼
//	Release; not in Hello; deadline       Ack; Release; not in Hello; deadline
//	past and no open session              past and no open session
type grant struct {
	verifier *book
	boot     identity.BootID // of the verifier's kernel: only it can account for the grant
	ip       netip.Addr
	gen      identity.Generation
	uid      identity.UID

	// I1: the verifier's lease ends no later than floor, or, while the grant
	// stands in an open session, the later of floor and the session's
	// deadline. It never moves back.
	floor   Time
	session *ownerStream // nil: none is open
	revoked bool         // its deadline is frozen
	seq     uint64       // of the Revoke that was sent; 0: none
	told    bool         // was in Welcome.Revoked of this session
	unsaid  bool         // the journal failed: it must have it before the verifier hears more
	logged  bool         // the expiry was

	at int // index in verifier.grants
}

// deadline is when the verifier's lease on the binding is surely over.
func (g *grant) deadline() Time {
	if g.session != nil && !g.revoked {
		return later(g.floor, g.session.deadline)
	}
	return g.floor
}

// book is the owner's account of one verifier.
type book struct {
	name    identity.NodeName
	nonce   *ownerStream // the stream whose nonce was issued last, until used
	session *ownerStream // open; nil: none
	grants  []*grant
	refused map[netip.Addr]Time
	allowAt Time // rate limit (GCRA): theoretical arrival time
	// refused by the rate limit since the last sweep, and the last IP of them
	limited   int
	limitedIP netip.Addr
	// Until then the sweep need not look at the grants: it is the next deadline
	// of one that no open session renews, or of an Ack. 0: it is not known.
	nextPast Time
}

type ownerStream struct {
	id    StreamID
	v     *book
	state StreamState
	nonce Nonce
	// of an open one
	boot     identity.BootID
	deadline Time // I1: of every standing grant of the session; never moves back
	seen     Time
}

// NewOwner returns an owner that starts now. Give it the Adopts first, then an
// OwnerTick, so that it asks for its timer.
func NewOwner(cfg OwnerConfig, now Time) (*Owner, error) {
	if cfg.Flight == 0 {
		cfg.Flight = cfg.ReuseMargin / 3
	}
	setDefault(&cfg.Grants, 65_536)
	setDefault(&cfg.MaxWorkloads, 4_096)
	setDefault(&cfg.ConfirmRate, 5_000)
	setDefault(&cfg.ConfirmBurst, 5_000)
	switch {
	case cfg.Node == "":
		return nil, errors.New("lease: owner without a node name")
	case cfg.Nonce == nil || cfg.Mine == nil:
		return nil, errors.New("lease: owner without nonce source or authorisation")
	case cfg.ReuseMargin <= 0:
		return nil, errors.New("lease: reuse margin must be positive")
	case stretch(cfg.Flight) > cfg.ReuseMargin:
		return nil, fmt.Errorf("lease: reuse margin %v is less than 1.25 x the flight bound %v", cfg.ReuseMargin, cfg.Flight)
	case cfg.Journal < JournalPresent || cfg.Journal > JournalMissing:
		return nil, errors.New("lease: what became of the journal must be said")
	case cfg.Relabel > RelabelStrict:
		return nil, errors.New("lease: unknown relabel mode")
	}
	o := &Owner{
		cfg: cfg, start: now, now: now, lastGen: cfg.LastGeneration,
		workloads: map[identity.UID]*workload{},
		ips:       map[netip.Addr]*address{},
		verifiers: map[identity.NodeName]*book{},
		streams:   map[StreamID]*ownerStream{},
	}
	o.replay()
	o.cfg.Records = nil
	return o, nil
}

func setDefault(p *int, v int) {
	if *p == 0 {
		*p = v
	}
}

// Step implements OwnerMachine.
func (o *Owner) Step(now Time, in OwnerInput) []OwnerOutput {
	o.now = later(o.now, now) // a clock that went back must not shorten a wait
	o.out, o.soft = nil, nil
	if _, ok := in.(Adopt); !ok {
		o.settle()
		for _, r := range o.unsaid {
			o.emit(Journal{r})
		}
		o.unsaid = nil
	}
	switch in := in.(type) {
	case StreamAccepted:
		o.accept(in)
	case FromVerifier:
		o.receive(in)
	case VerifierGone:
		o.closed(in.Stream)
	case Add:
		o.add(in)
	case Adopt:
		o.adopt(in)
	case Delete:
		o.delete(in.UID)
	case Relabel:
		o.relabel(in)
	case Leave:
		o.leave()
	case JournalFailed:
		o.journalFailed(in.Record)
	case OwnerTick:
		// The work is below.
	}
	if o.settled {
		o.activate()
		o.sweep()
	}
	o.sayEnds()
	o.setTimer()
	o.last = o.out
	return o.out
}

func (o *Owner) emit(out OwnerOutput) { o.out = append(o.out, out) }

func (o *Owner) log(e LogEntry) { o.emit(OwnerLog{e}) }

// setTimer asks for the next tick, when it is not asked for already.
func (o *Owner) setTimer() {
	at := o.nextSweep
	for _, w := range o.waiting {
		if t, ok := o.openAt(w); ok && !o.leaving && (at == 0 || t < at) {
			at = t
		}
	}
	if at == 0 || at == o.timer && at > o.now {
		return
	}
	o.timer = at
	o.emit(OwnerTimer{at})
}
