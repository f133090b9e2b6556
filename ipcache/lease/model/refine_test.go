package model

import (
	"flag"
	"fmt"
	"maps"
	"math/rand/v2"
	"slices"
	"strings"
	"testing"
	"time"

	"portcullis/identity"
	"portcullis/ipcache/lease"
)

// view is what can be seen of a state, of the model's and of the machines'.
type view struct {
	Up, Holder uint8
	Phase      Phase
	Peer       [maxVerifiers]peerView
}

type peerView struct {
	Up, Older, Current uint8
	Session            uint8 // with a stream whose other end is gone: 0, noticed or not
	Slot, Live, Lease  uint8 // Live: ticks for which the slot's lease runs
	Left               [maxWorkloads]uint8
	Revoked            [maxWorkloads]bool // of those with time left
	Deadline           uint8              // of an open stream
	Abandoned, In, Out [queueLen + 1]Message
}

// seen is the view of a state of the model.
func (x *stepper) seen(s *state) (v view) {
	v.Up, v.Holder, v.Phase = s.owner.up, s.owner.holder, s.owner.phase
	for i := range x.Verifiers {
		p := &s.peer[i]
		q := &v.Peer[i]
		q.Up, q.Older, q.Current = p.up, p.older, p.current
		q.Slot, q.Lease, q.Left = p.slot, p.lease, p.left
		q.Session = p.session
		if p.dead == 1 {
			q.Session, q.Lease = 0, 0
		}
		switch {
		case p.slot == 0:
		case p.onSession == 1:
			q.Live = p.lease
		default:
			q.Live = p.slotLease
		}
		for w := range x.Workloads {
			q.Revoked[w] = p.left[w] > 0 && p.grant[w] == grantRevoked
		}
		if s.owner.up == 0 {
			q.Left, q.Revoked = [maxWorkloads]uint8{}, [maxWorkloads]bool{}
		}
		if p.older == streamOpen || p.current == streamOpen {
			q.Deadline = p.deadline
		}
		for j := range queueLen {
			q.Abandoned[j], q.Out[j], q.In[j] = p.abandoned[j], p.toOwner[j], p.toVerifier[j]
			q.In[j].Since = 0
			if q.In[j].Kind == Refused {
				q.In[j].Stands = 0
			}
		}
		if p.older == streamNone {
			q.Abandoned = [queueLen + 1]Message{}
		}
	}
	return v
}

func ticksUntil(t, now lease.Time, tick time.Duration) uint8 {
	if t <= now {
		return 0
	}
	return uint8((t.Sub(now) + tick - 1) / tick)
}

// view is that of the machines.
func (m *machines) view() (v view) {
	v.Up, v.Holder = b(m.owner != nil), uint8(m.workload)
	switch {
	case m.present && m.active:
		v.Phase = Active
	case m.present:
		v.Phase = Quarantined
	}
	for i, n := range m.verifier {
		m.viewPeer(&v.Peer[i], n)
	}
	return v
}

func (m *machines) viewPeer(q *peerView, n *machineV) {
	now := m.verifierNow()
	q.Up = b(n.v != nil)
	for _, s := range n.slots {
		if q.Slot != 0 {
			m.t.Fatal("two slots of one IP")
		}
		q.Slot, q.Live = uint8(m.gens[s.Binding.Generation]+1), ticksUntil(n.leases[s.Lease], now, tickVerifier)
	}
	if n.v != nil {
		for _, s := range n.v.Sessions() {
			switch s.State {
			case lease.PeerChallenge:
				q.Session = sessionDialling
			case lease.PeerGreeting:
				q.Session = sessionGreeting
			case lease.PeerOpen:
				q.Session = sessionOpen
			}
			if s.Lease != 0 {
				q.Lease = ticksUntil(n.leases[s.Lease], now, tickVerifier)
			}
		}
	}
	if w := n.now; w != nil {
		if w.dead {
			q.Session, q.Lease = 0, 0
		}
		m.queue(&q.Out, w.toOwner, now)
		m.queue(&q.In, w.toVerifier, now)
	}
	if m.owner == nil {
		return
	}
	if n.now != nil && n.now.accepted && !n.now.dead {
		q.Current = uint8(m.owner.StreamState(n.now.id))
	}
	if n.older != nil {
		if q.Older = uint8(m.owner.StreamState(n.older.id)); q.Older != streamNone {
			m.queue(&q.Abandoned, n.older.toOwner, now)
		}
	}
	for _, s := range m.owner.Sessions() {
		if s.Verifier == n.name && s.State == lease.StreamOpen {
			q.Deadline = ticksUntil(s.Deadline, m.ownerNow(), tickOwner)
		}
	}
	for _, g := range m.owner.Grants() {
		if w := m.gens[g.Generation]; g.Verifier == n.name {
			q.Left[w] = ticksUntil(g.Deadline, m.ownerNow(), tickOwner)
			q.Revoked[w] = g.Revoked && q.Left[w] > 0
		}
	}
}

// queue abstracts what is under way. Bound and Going are not of the model here.
func (m *machines) queue(to *[queueLen + 1]Message, from []lease.Message, now lease.Time) {
	i := 0
	for _, x := range from {
		a, ok := m.message(x, now)
		if !ok {
			continue
		}
		if i >= queueLen {
			m.over = "more is under way than the model has room for"
			return
		}
		to[i] = a
		i++
	}
}

func (m *machines) message(x lease.Message, now lease.Time) (Message, bool) {
	of := func(g identity.Generation) uint8 { return uint8(m.gens[g] + 1) }
	switch x := x.(type) {
	case lease.Challenge:
		return Message{Kind: Challenge}, true
	case lease.Hello:
		h := Message{Kind: Hello, Left: ticksUntil(x.SentAt.Add(x.Ask), now, tickVerifier)}
		if len(x.Held) > 0 {
			h.Workload = of(x.Held[0].Generation)
		}
		return h, true
	case lease.Welcome:
		w := Message{Kind: Welcome, Left: ticksUntil(x.Echo.Add(x.TTL), now, tickVerifier)}
		for _, r := range x.Revoked {
			w.Workload = of(r.Generation)
		}
		for _, r := range x.Stands {
			w.Workload, w.Stands = of(r.Generation), 1
		}
		return w, true
	case lease.Confirm:
		return Message{Kind: Confirm}, true
	case lease.Binding:
		return Message{Kind: Binding, Workload: of(x.Binding.Generation)}, true
	case lease.Refused:
		return Message{Kind: Refused}, true
	case lease.Heartbeat:
		return Message{Kind: Heartbeat, Stands: b(x.Ask == lease.MaxLease), Left: ticksUntil(x.SentAt.Add(x.Ask), now, tickVerifier)}, true
	case lease.HeartbeatReply:
		return Message{Kind: HeartbeatReply, Stands: b(x.TTL == lease.MaxLease), Left: ticksUntil(x.Echo.Add(x.TTL), now, tickVerifier)}, true
	case lease.Revoke:
		return Message{Kind: Revoke, Workload: of(x.Generation)}, true
	case lease.Ack:
		return Message{Kind: Ack, Workload: of(x.Generation)}, true
	case lease.Release:
		return Message{Kind: Release, Workload: of(x.Generation)}, true
	}
	return Message{}, false
}

// follow returns the states of the model that look as the machines do, in at
// most one action from one of these and then what a verifier says and an owner
// does unasked. Time passes by a tick alone.
func (x *stepper) follow(from map[state]bool, to *view, tick bool) map[state]bool {
	found, level := map[state]bool{}, map[state]bool{}
	consider := func(s *state) {
		switch v := x.seen(s); {
		case v == *to:
			found[*s] = true
			level[*s] = true
		case x.leads(&v, to):
			level[*s] = true
		}
	}
	for s := range from {
		if !tick {
			consider(&s)
		}
		for _, n := range x.next(&s) {
			if (n.action == "tick") == tick {
				consider(&n.state)
			}
		}
	}
	for range 3 {
		last := level
		level = map[state]bool{}
		for s := range last {
			for v := range x.Verifiers {
				x.out = x.out[:0]
				x.verifierSends(&s, v)
				x.olderEnds(&s, v)
				x.sweep(&s, v)
				if v == 0 {
					x.workloads(&s)
				}
				for _, n := range x.out {
					if !found[n.state] {
						consider(&n.state)
					}
				}
			}
		}
	}
	return found
}

// leads tells whether more messages, and an activation, may be all that is
// missing.
func (x *stepper) leads(v, to *view) bool {
	for i := range x.Verifiers {
		a, b := &v.Peer[i], &to.Peer[i]
		for j := range queueLen {
			if a.Out[j].Kind != 0 && a.Out[j] != b.Out[j] || a.In[j].Kind != 0 && a.In[j] != b.In[j] {
				return false
			}
		}
		if a.Session != b.Session || a.Left != b.Left {
			return false
		}
		if same := a.Slot == b.Slot && a.Live == b.Live; !same && !(x.Releases && b.Slot == 0) {
			return false
		}
	}
	return v.Holder == to.Holder && v.Up == to.Up
}

// walk lets the machines do random things; the model must be able to follow.
func walk(t *testing.T, cfg Config, seed uint64, length int, change func(*machines), met map[string]int) (steps int, lost string) {
	rng := rand.New(rand.NewPCG(seed, 0x6d6f64))
	m := newMachines(t, cfg, rng, change, met)
	x := &stepper{Config: cfg, named: true}
	states := map[state]bool{initial(cfg): true}
	var history []string
	for steps < length {
		was := m.view()
		what := m.do()
		if what == "" {
			continue
		}
		steps++
		is := m.view()
		if m.over != "" {
			met["over: "+m.over]++
			return steps, ""
		}
		met[what]++
		history = append(history, what)
		now := x.follow(states, &is, what == "tick")
		if len(now) == 0 {
			return steps, fmt.Sprintf("seed %d: the model cannot follow the machines:\n%s\nfrom\t%+v\nto\t%+v", seed, strings.Join(history, "\n"), was, is)
		}
		states = now
	}
	return steps, ""
}

func refineConfig() Config {
	return base("machines", workloads(3), askMax, ownerCrash, func(c *Config) {
		c.Egress, c.ManyHeartbeats, c.StoreFails = false, true, true
		c.StreamBreaks, c.VerifierCrashes, c.OwnerCrashes = 255, 255, 255
	})
}

var walksFlag = flag.Int("model.walks", 1_000, "random walks of the machines that the model is to follow")

// TestMachinesRefine: whatever the machines of package lease do, the model can
// do. So what was searched of the model holds of them.
func TestMachinesRefine(t *testing.T) {
	met := map[string]int{}
	steps := 0
	walks := *walksFlag
	if testing.Short() {
		walks = min(walks, 50)
	}
	for seed := range uint64(walks) {
		cfg := refineConfig()
		if seed%2 == 1 {
			twoVerifiers(&cfg)
			cfg.FirstAlone = false
		}
		cfg.Releases = seed%4 > 1
		n, lost := walk(t, cfg, seed, 150, nil, met)
		steps += n
		if lost != "" {
			t.Fatal(lost)
		}
	}
	t.Logf("%d steps followed", steps)
	for _, what := range slices.Sorted(maps.Keys(met)) {
		t.Logf("%7d %s", met[what], what)
	}
	if walks < 1000 {
		return
	}
	if met["a store fails"] == 0 {
		t.Error("no store ever failed")
	}
	for _, k := range kinds[Challenge:] {
		seen := false
		for what := range met {
			seen = seen || strings.Contains(what, "lease."+k)
		}
		if !seen {
			t.Errorf("nobody ever read a %s", k)
		}
	}
}

// TestDriftIsSeen: the model cannot follow the machines once either of them
// has another rule.
func TestDriftIsSeen(t *testing.T) {
	drifts := []struct {
		name     string
		rules    func(*Rules)
		machines func(*machines)
	}{
		{"the machines have half the margin", nil, func(m *machines) { m.margin /= 2; m.cfg.Flight = 0 }},
		{"WelcomeDropsRefused", func(r *Rules) { r.WelcomeDropsRefused = true }, nil},
		{"TransferResets", func(r *Rules) { r.TransferResets = true }, nil},
		{"DeadlineMovesBack", func(r *Rules) { r.DeadlineMovesBack = true }, nil},
		{"RestartWaitsTTL", func(r *Rules) { r.RestartWaitsTTL = true }, nil},
		{"RestartWaitsNothing", func(r *Rules) { r.RestartWaitsNothing = true }, nil},
		{"ForgetOnHello", func(r *Rules) { r.ForgetOnHello = true }, nil},
		{"NoDrift", func(r *Rules) { r.NoDrift = true }, nil},
		{"SessionInherits", func(r *Rules) { r.SessionInherits = true }, nil},
		{"OneAckSuffices", func(r *Rules) { r.OneAckSuffices = true }, nil},
		{"RevokesFirstOnly", func(r *Rules) { r.RevokesFirstOnly = true }, nil},
		{"DeadlineFromReceipt", func(r *Rules) { r.DeadlineFromReceipt = true }, nil},
		{"SameLease", func(r *Rules) { r.SameLease = true }, nil},
	}
	for _, d := range drifts {
		found := false
		for seed := uint64(1); seed <= 4_000 && !found; seed++ {
			cfg := refineConfig()
			twoVerifiers(&cfg)
			cfg.FirstAlone = false
			if d.rules != nil {
				d.rules(&cfg.Rules)
			}
			_, lost := walk(t, cfg, seed, 150, d.machines, map[string]int{})
			if found = lost != ""; found {
				t.Logf("%s: seen in walk %d", d.name, seed)
			}
		}
		if !found {
			t.Errorf("%s: the model follows in 4,000 walks", d.name)
		}
	}
}
