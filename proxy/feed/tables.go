package feed

import (
	"errors"
	"fmt"
	"sync"
	"sync/atomic"
	"time"

	"portcullis/authz"
	"portcullis/bpf/abi"
	"portcullis/identity"
	"portcullis/proxy"
)

// Flow is what the datapath has judged of a steered flow, for the flow's
// subject.
type Flow struct {
	Set  uint32           // policy set by which it was judged last
	Peer identity.Numeric // who the other end is
	Port uint16           // of the called side; a service's backend's
}

// Flows reads the datapath's judgements. An error: the flow may not go on. It is
// called from many goroutines.
type Flows interface {
	Look(proxy.Conn) (Flow, error)
	// Watch returns a look at one flow that may be repeated at little cost.
	Watch(proxy.Conn) (look func() (Flow, error))
}

// The reasons why a flow that the datapath let by is not let inside.
var (
	ErrUnknownSet = errors.New("the policy that judged the flow is not known to the proxy")
	ErrDenied     = errors.New("the policy allows nothing on this flow")
)

// Times of Tables.
const (
	// setWait is how long flows wait for the tables of a policy set, from when the
	// first of them asked. They are on their way before the kernel names the set,
	// but the next agent may take that long to begin. peerWait is the same of what
	// a set says of a peer.
	setWait  = 5 * time.Second
	peerWait = time.Second
	// linger is how long a set's tables stay after it was replaced: what was
	// judged with it just now is still being looked at.
	linger = time.Second
	// missingKept is how long it is remembered that something did not come.
	missingKept = time.Minute
)

// maxMissing bounds what is waited for. Beyond it nobody waits.
const maxMissing = 65536

// missing is something that was asked for and not known.
type missing struct {
	set   uint32
	peer  identity.Numeric
	known bool // the set is
}

// Tables are what policies say inside protocols, by policy set. It is the Judge
// of the proxy, and safe for concurrent use.
type Tables struct {
	flows Flows
	now   func() time.Time

	version atomic.Uint64 // raised after every change of what follows, under mu

	mu      sync.RWMutex
	sets    map[uint32]*table // guarded by mu
	changed chan struct{}     // guarded by mu; closed at a change

	waits   sync.Mutex
	missing map[missing]time.Time // guarded by waits: when it was asked for first
}

type table struct {
	inside *authz.Inside
	until  time.Time // zero: in force
}

// NewTables returns empty tables: they let nothing by.
func NewTables(flows Flows) *Tables {
	return &Tables{flows: flows, now: time.Now, sets: map[uint32]*table{}, changed: make(chan struct{}), missing: map[missing]time.Time{}}
}

// judged is a decision, and what it was made by.
type judged struct {
	flow     Flow
	version  uint64
	lasting  bool // the tables do not go with time alone
	decision proxy.Decision
}

// Judge implements proxy.Judge. It blocks for setWait at most, while tables may
// be on their way.
func (t *Tables) Judge(c proxy.Conn) (proxy.Decision, error) {
	x, err := t.await(c, func() (Flow, error) { return t.flows.Look(c) })
	return x.decision, err
}

// Follow implements proxy.Follower. As long as flow and tables are what they were,
// so is the decision.
func (t *Tables) Follow(c proxy.Conn) proxy.Followed {
	return &followed{tables: t, conn: c, look: t.flows.Watch(c)}
}

type followed struct {
	tables *Tables
	conn   proxy.Conn
	look   func() (Flow, error)
	last   atomic.Pointer[judged]
}

// Judge implements proxy.Followed.
func (f *followed) Judge() (proxy.Decision, error) {
	if d, same, err := f.same(); same || err != nil {
		return d, err
	}
	x, err := f.tables.await(f.conn, f.look)
	f.keep(x, err)
	return x.decision, err
}

// Peek implements proxy.Followed.
func (f *followed) Peek() (d proxy.Decision, wait bool, err error) {
	if d, same, err := f.same(); same || err != nil {
		return d, false, err
	}
	x, lacks, changed, err := f.tables.judge(f.conn, f.look)
	f.keep(x, err)
	return x.decision, changed != nil && f.tables.patience(lacks) > 0, err
}

// same returns the last decision, if it is what would be said now.
func (f *followed) same() (d proxy.Decision, same bool, err error) {
	x := f.last.Load()
	if x == nil {
		return d, false, nil
	}
	flow, err := f.look()
	if err != nil {
		return d, false, err
	}
	// After the look: since the decision was made the tables have been the same, so
	// what the look has read means what it means in them. (Before it, a number could
	// have been taken out of the tables, acknowledged and given to somebody else.)
	if flow != x.flow || f.tables.version.Load() != x.version {
		return d, false, nil
	}
	return x.decision, true, nil
}

func (f *followed) keep(x judged, err error) {
	if err == nil && x.lasting {
		f.last.Store(&x)
	}
}

// await judges what look sees. It blocks as Judge does.
func (t *Tables) await(c proxy.Conn, look func() (Flow, error)) (judged, error) {
	for {
		x, lacks, changed, err := t.judge(c, look)
		if changed == nil {
			return x, err
		}
		left := t.patience(lacks)
		if left <= 0 {
			return judged{}, err
		}
		timer := time.NewTimer(left)
		select {
		case <-changed:
		case <-timer.C:
		}
		timer.Stop()
	}
}

// patience returns how long what is missing is waited for yet. However many flows
// wait for one thing, the last of them is refused when the first one is.
func (t *Tables) patience(m missing) time.Duration {
	t.waits.Lock()
	defer t.waits.Unlock()
	now := t.now()
	since, asked := t.missing[m]
	if !asked || now.Sub(since) > missingKept {
		if len(t.missing) >= maxMissing {
			return 0
		}
		since = now
		t.missing[m] = since
	}
	if m.known {
		return peerWait - now.Sub(since)
	}
	return setWait - now.Sub(since)
}

// judge judges by what is known now. On an error that more may mend, changed is
// closed when more is known.
func (t *Tables) judge(c proxy.Conn, look func() (Flow, error)) (_ judged, lacks missing, changed <-chan struct{}, err error) {
	// From before the flow is looked at until it is judged nothing is taken up, so
	// a number means here what it means in the tables: see report.Ack.
	t.mu.RLock()
	defer t.mu.RUnlock()
	flow, err := look()
	if err != nil {
		return judged{}, missing{}, nil, err
	}
	x := t.sets[flow.Set]
	if x == nil || !x.until.IsZero() && t.now().After(x.until) {
		return judged{}, missing{set: flow.Set}, t.changed, fmt.Errorf("%w (set %d)", ErrUnknownSet, flow.Set)
	}
	allowed, verdict := x.inside.Judge(c.Direction, flow.Peer, c.Protocol, flow.Port)
	if verdict.Verdict != abi.VerdictPass {
		// The kernel let it by with more than is known here, or would not any
		// more: either way nobody can say how far it goes.
		return judged{}, missing{flow.Set, flow.Peer, true}, t.changed, ErrDenied
	}
	d := proxy.Decision{Everything: allowed.Everything, Rules: allowed.Rules, Peer: proxy.Party{Identity: flow.Peer}, Epoch: flow.Set, NoNames: x.inside.NoNames}
	return judged{flow, t.version.Load(), x.until.IsZero(), d}, missing{}, nil, nil
}

// Sets returns how many sets are known, for people.
func (t *Tables) Sets() int {
	t.mu.RLock()
	defer t.mu.RUnlock()
	return len(t.sets)
}

// tell takes up a message of the agent. What cannot be judged is an error, and
// the set is not known then.
func (t *Tables) tell(m *told) error {
	var err error
	if m.Inside != nil {
		// Before the lock: it compiles expressions.
		err = m.Inside.Ready()
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	defer t.announce()
	x := t.sets[m.Set]
	switch {
	case err != nil:
		delete(t.sets, m.Set)
	case m.Inside != nil:
		t.sets[m.Set] = &table{inside: m.Inside}
	case m.Drop:
		t.retire(x)
	case m.Peer == nil || x == nil:
	case len(m.Peer.Of) == 0 && !m.Peer.Host:
		x.inside.Remove(m.Peer.Number)
	default:
		if err = x.inside.Put(m.Peer.Number, m.Peer.Of, m.Peer.Host); err != nil {
			delete(t.sets, m.Set)
		}
	}
	if err != nil {
		return fmt.Errorf("policy set %d: %w", m.Set, err)
	}
	return nil
}

// keep retires all sets but some, and forgets those that are over.
func (t *Tables) keep(some map[uint32]bool) {
	t.mu.Lock()
	defer t.mu.Unlock()
	for n, x := range t.sets {
		if !some[n] {
			t.retire(x)
		}
	}
	t.announce()
}

func (t *Tables) retire(x *table) {
	if x != nil && x.until.IsZero() {
		x.until = t.now().Add(linger)
	}
}

// announce wakes who waits, and forgets sets that are over.
func (t *Tables) announce() {
	now := t.now()
	for n, x := range t.sets {
		if !x.until.IsZero() && now.After(x.until) {
			delete(t.sets, n)
		}
	}
	t.waits.Lock()
	for m, since := range t.missing {
		// What came, and what nobody waits for any more: who asks for it again after
		// so long waits anew.
		if t.sets[m.set] != nil && !m.known || now.Sub(since) > missingKept {
			delete(t.missing, m)
		}
	}
	t.waits.Unlock()
	t.version.Add(1)
	close(t.changed)
	t.changed = make(chan struct{})
}
