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
	// setWait is how long a flow waits for the tables of its policy set. They are
	// on their way before the kernel names the set.
	setWait = time.Second
	// linger is how long a set's tables stay after it was replaced: what was
	// judged with it just now is still being looked at.
	linger = time.Second
)

// Tables are what policies say inside protocols, by policy set. It is the Judge
// of the proxy, and safe for concurrent use.
type Tables struct {
	flows Flows
	now   func() time.Time

	version atomic.Uint64 // raised after every change of what follows

	mu      sync.RWMutex
	sets    map[uint32]*table // guarded by mu
	changed chan struct{}     // guarded by mu; closed at a change
}

type table struct {
	inside *authz.Inside
	until  time.Time // zero: in force
}

// NewTables returns empty tables: they let nothing by.
func NewTables(flows Flows) *Tables {
	return &Tables{flows: flows, now: time.Now, sets: map[uint32]*table{}, changed: make(chan struct{})}
}

// Judge implements proxy.Judge. It blocks for a second at most, while tables may
// be on their way.
func (t *Tables) Judge(c proxy.Conn) (proxy.Decision, error) {
	return t.await(c, func() (Flow, error) { return t.flows.Look(c) })
}

// judged is a decision, and what it was made by.
type judged struct {
	flow     Flow
	version  uint64
	decision proxy.Decision
}

// Follow implements proxy.Follower. As long as flow and tables are what they were,
// so is the decision.
func (t *Tables) Follow(c proxy.Conn) func() (proxy.Decision, error) {
	look := t.flows.Watch(c)
	var last atomic.Pointer[judged]
	return func() (proxy.Decision, error) {
		version := t.version.Load() // before anything that it says is read
		flow, err := look()
		if err != nil {
			return proxy.Decision{}, err
		}
		if x := last.Load(); x != nil && x.flow == flow && x.version == version {
			return x.decision, nil
		}
		d, err := t.await(c, func() (Flow, error) { flow, err = look(); return flow, err })
		if err == nil && t.inForce(flow.Set) {
			last.Store(&judged{flow, version, d})
		}
		return d, err
	}
}

// inForce reports whether a set has tables that will not go with time alone.
func (t *Tables) inForce(set uint32) bool {
	t.mu.RLock()
	defer t.mu.RUnlock()
	x := t.sets[set]
	return x != nil && x.until.IsZero()
}

// await judges what look sees. It blocks as Judge does.
func (t *Tables) await(c proxy.Conn, look func() (Flow, error)) (proxy.Decision, error) {
	var timeout <-chan time.Time
	for {
		flow, err := look()
		if err != nil {
			return proxy.Decision{}, err
		}
		d, changed, err := t.judge(c, flow)
		if err == nil {
			return d, nil
		}
		if timeout == nil {
			timer := time.NewTimer(setWait)
			defer timer.Stop()
			timeout = timer.C
		}
		select {
		case <-changed:
		case <-timeout:
			return proxy.Decision{}, err
		}
	}
}

// judge judges by what is known now; changed is closed when more is.
func (t *Tables) judge(c proxy.Conn, flow Flow) (_ proxy.Decision, changed <-chan struct{}, err error) {
	t.mu.RLock()
	defer t.mu.RUnlock()
	x := t.sets[flow.Set]
	if x == nil || !x.until.IsZero() && t.now().After(x.until) {
		return proxy.Decision{}, t.changed, fmt.Errorf("%w (set %d)", ErrUnknownSet, flow.Set)
	}
	allowed, verdict := x.inside.Judge(c.Direction, flow.Peer, c.Protocol, flow.Port)
	if verdict.Verdict != abi.VerdictPass {
		// The kernel let it by with more than is known here, or would not any
		// more: either way nobody can say how far it goes.
		return proxy.Decision{}, t.changed, ErrDenied
	}
	return proxy.Decision{Everything: allowed.Everything, Rules: allowed.Rules, Peer: proxy.Party{Identity: flow.Peer}, Epoch: flow.Set, NoNames: x.inside.NoNames}, nil, nil
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
	t.version.Add(1)
	close(t.changed)
	t.changed = make(chan struct{})
}
