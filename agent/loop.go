package agent

import (
	"context"
	"errors"
	"net/netip"
	"sync/atomic"
	"time"

	"go.uber.org/zap"

	"portcullis/authz"
	"portcullis/datapath"
	"portcullis/datapath/hold"
	"portcullis/identity"
	"portcullis/identity/svid"
	"portcullis/ipcache"
	"portcullis/ipcache/journal"
	"portcullis/ipcache/lease"
	"portcullis/ipcache/session"
	"portcullis/observe/audit"
	"portcullis/observe/hubble"
	"portcullis/observe/metrics"
	"portcullis/proxy/feed"
)

// inboxSize bounds what may wait for the loop. Senders block when it is full:
// the session's streams and the rings then fill, and both fail shut.
const inboxSize = 256

var (
	errStopped  = errors.New("the agent is stopping")
	errNotFound = errors.New("there is no such thing")
)

// loop is the agent's state and its only writer. Fields without a remark are
// touched by the goroutine of run alone.
type loop struct {
	cfg Config
	log *zap.Logger // safe for concurrent use

	inbox   chan func()      // control: API, sessions, link watch
	ring    chan hold.Record // held packets; apart, so that a storm of them cannot keep a revocation waiting
	stopped chan struct{}    // closed when the loop has ended

	dp        *datapath.Datapath
	injector  *hold.Injector
	transport *session.Transport // set before run, safe for concurrent use
	source    *svid.Source       // set before run, safe for concurrent use
	// workloadSVIDs and trust are set before run, and safe for concurrent use.
	workloadSVIDs svid.Workloads // nil: nothing gives workloads' own SVIDs
	trust         *svid.Bundles
	journal       *journal.Journal
	unwritten     bool // the journal could not be written
	unkept        bool // what lies beside it could not be
	unlogged      bool // alarmAudit has told of the confirmation log
	store         *store
	storeKept     int        // bytes that the store had when it was rewritten last
	processes     *processes // safe for concurrent use
	devices       *devices   // set before run; what the loop calls of it is safe for concurrent use
	// tunnels are uplinks that came after the start, by their indices.
	tunnels  map[uint32]struct{}
	audit    *audit.Log // safe for concurrent use
	signer   *lateSigner
	coverage coverage // count is called by the reader of events

	proofs       *proofs           // nil: this agent has nothing to do with proofs
	template     identity.Template // of the SPIFFE IDs of workloads
	toldRefusals toldRefusals      // of proofs that others asked for

	peerSessions map[identity.NodeName]*audit.Session // by certificate, of streams that are up

	owner    lease.OwnerMachine
	grants   grantBook // of the owner; nil in mode classic
	verifier lease.VerifierMachine
	// watchLease is the lease index of mode watch; 0 in others.
	watchLease uint32
	table      *ipcache.Table
	ids        *identity.Allocator
	repo       *authz.Repository
	sets       *authz.Sets // of repo's policies: one for each endpoint
	holds      *hold.Queue

	endpoints       map[identity.UID]*endpoint
	byIP            map[netip.Addr]*endpoint // active ones
	byEndpointID    map[uint32]*endpoint
	bySubject       map[*authz.Subject]*endpoint
	byIfindex       map[uint32]*endpoint // until the device is gone, ended ones too
	holdIndexes     *indexes
	retryActivation map[identity.UID]identity.Generation
	retryClose      map[identity.UID]bool // gates that could not be closed
	leaving         bool                  // this agent is about to be replaced
	retryPolicies   bool                  // policies could not be applied to all that they touch
	nodeUIDs        map[identity.UID]netip.Addr
	numerics        map[uint64]identity.Numeric // stamp -> the number that its slot speaks of
	policyFiles     map[authz.Ref]importedFile  // of groups and namespaces, too
	groups          map[authz.Ref]*authz.Group
	spaces          map[authz.Ref]*authz.NamespaceObject
	services        map[authz.Ref]*authz.ServiceObject
	slices          map[authz.Ref]*authz.SliceObject
	steered         steered
	servicesSet     bool // the kernel has their addresses, as services and ranges are
	regions         regions
	learnt          learntNames

	topology    atomic.Pointer[topology] // the loop alone stores it; never nil
	retryRanges bool                     // the kernel does not know all of topology's ranges
	cluster     cluster                  // set before run, nil without one
	known       known                    // of the cluster

	installedAt map[uint64]lease.Time // stamp -> when

	// Until the adoption is over: what was registered with the agent before.
	stored      map[identity.UID]workload
	created     map[identity.UID]time.Time
	pendingAdds []lease.Add // quarantined then: they wait anew

	// Inputs being worked on, the first, and waiting for their turn.
	ownerInputs    []lease.OwnerInput
	verifierInputs []lease.VerifierInput
	ownerTimer     lease.Time // 0: none
	verifierTimer  lease.Time

	heldTotal, reinjected, heldDropped uint64
	boundBefore                        bool       // an agent of this boot bound an IP before this one's start
	lostBefore                         lostTotals // at the start those of earlier agents
	notTaken                           uint64     // re-injected, and dropped on the way: see inject

	names         *directory     // safe for concurrent use
	monitors      *monitors      // safe for concurrent use
	callers       *callers       // nil: which process has a connection is not known; set before run
	heldTimes     heldTimes      // safe for concurrent use
	events        *hubble.Events // safe for concurrent use; nil in tests: none are kept
	feed          *feed.Server   // what the proxy must know; safe for concurrent use; nil: --proxy=false
	steering      bool           // flows are steered into the proxy where policies ask for it
	proxyWanted   chan struct{}  // closed with steering
	proxyServed   *served        // nil until steering
	proxyFull     uint64         // connections that it had no room for, when alarmProxy last looked
	proxyRestarts atomic.Uint64
	alarms        *alarms  // safe for concurrent use
	telling       *telling // of what Events of Kubernetes are made; nil in some tests
	instruments   *metrics.Instruments
	started       time.Time
	boot          identity.BootID

	unheard map[identity.Numeric]uint64 // numbers on their way out, by what the proxy must hear first: see dropNumbers
}

type importedFile struct {
	name string
	at   time.Time
}

// grantBook is what an owner that gives leases can tell of them.
type grantBook interface {
	Grants() []lease.GrantInfo
	GrantCount() int
	StartupWait(lease.Time) time.Duration
}

// retryInterval is how often activations that failed are tried again.
const retryInterval = time.Second

// run carries out whatever comes in, one thing after the other, until ctx
// ends.
func (l *loop) run(ctx context.Context) error {
	defer close(l.stopped)
	timer := time.NewTimer(0)
	defer timer.Stop()
	retry := time.NewTicker(retryInterval)
	defer retry.Stop()
	for {
		timer.Reset(l.untilNext())
		select {
		case <-ctx.Done():
			return nil
		case f := <-l.inbox:
			l.timed(f)
		case r := <-l.ring:
			l.timed(func() { l.held(r) })
		case <-timer.C:
			l.timed(l.tick)
		case <-retry.C:
			l.timed(l.retry)
		}
		// After what waits already, for one look at all sets serves many changes.
		if l.steered.behind && len(l.inbox) == 0 {
			l.steerServices(nil)
		}
	}
}

func (l *loop) timed(step func()) {
	began := time.Now()
	step()
	l.instruments.LoopStep(time.Since(began))
}

// retry does again what failed.
func (l *loop) retry() {
	for uid, generation := range l.retryActivation {
		l.activate(uid, generation)
	}
	for uid := range l.retryClose {
		l.closeEndpoint(uid)
	}
	l.expireNames()
	l.storeNames()
	l.dropNumbers()
	l.retryCluster()
	if l.retryPolicies && l.applyPolicies() == nil {
		l.retryPolicies = false
		l.alarms.clear("policy-not-applied")
	}
	l.followSteered()
	l.alarmWatch()
	l.alarmSnapshot()
	l.alarmNotices()
	l.alarmSVID()
	l.alarmWorkloadSVIDs()
	l.alarmAudit()
	l.recordCoverage(time.Now(), false)
	l.alarms.expire()
	l.tellQuarantines()
	l.tellStanding(time.Now())
	l.compactJournal()
	l.forgetStrangers()
	l.retryKept()
}

// now is the node's CLOCK_BOOTTIME. A message's time is read after the
// message, and a send's before it: both are read in the loop.
func (l *loop) now() lease.Time { return lease.Time(l.dp.Now()) }

// wall turns a reading of CLOCK_BOOTTIME into the wall clock, for people.
func (l *loop) wall(boottime uint64) time.Time {
	return time.Now().Add(time.Duration(int64(boottime) - l.dp.Now()))
}

// untilNext returns how long nothing is due.
func (l *loop) untilNext() time.Duration {
	next := lease.Time(0)
	earlier := func(t lease.Time) {
		if t != 0 && (next == 0 || t < next) {
			next = t
		}
	}
	earlier(l.ownerTimer)
	earlier(l.verifierTimer)
	if at, ok := l.holds.Next(); ok {
		earlier(lease.Time(at))
	}
	if next == 0 {
		return time.Hour
	}
	return max(0, next.Sub(l.now()))
}

func (l *loop) tick() {
	now := l.now()
	if l.ownerTimer != 0 && l.ownerTimer <= now {
		l.ownerTimer = 0
		l.stepOwner(lease.OwnerTick{})
	}
	if l.verifierTimer != 0 && l.verifierTimer <= now {
		l.verifierTimer = 0
		l.stepVerifier(lease.VerifierTick{})
	}
	l.expireHolds(now)
}

// post has the loop run f; it blocks while the inbox is full, and forgets f
// when the loop has ended. Safe for concurrent use; never call it from the loop.
func (l *loop) post(f func()) {
	select {
	case l.inbox <- l.waiting(f):
	case <-l.stopped:
	}
}

// waiting notes how long f waited for its turn, when it comes.
func (l *loop) waiting(f func()) func() {
	asked := time.Now()
	return func() {
		l.instruments.LoopWait(time.Since(asked))
		f()
	}
}

// call has the loop run f and returns f's error. When ctx ends first, f may
// still run. Safe for concurrent use; never call it from the loop.
func (l *loop) call(ctx context.Context, f func() error) error {
	done := make(chan error, 1)
	select {
	case l.inbox <- l.waiting(func() { done <- f() }):
	case <-l.stopped:
		return errStopped
	case <-ctx.Done():
		return ctx.Err()
	}
	select {
	case err := <-done:
		return err
	case <-l.stopped:
		return errStopped
	case <-ctx.Done():
		return ctx.Err()
	}
}

// nodeOf returns the node that speaks for the IP, "" for none. It is a hint of
// whom to ask; it grants nothing.
func (l *loop) nodeOf(ip netip.Addr) identity.NodeName { return l.topology.Load().owner(ip) }
