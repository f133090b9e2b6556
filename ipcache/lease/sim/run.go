package sim

import (
	"fmt"
	"net/netip"
	"strings"
	"time"

	"portcullis/ipcache/lease"
)

// Result is how a schedule ended.
type Result struct {
	Seed      uint64
	Events    int // inputs, faults and steps of time before faults ceased
	Faults    int
	Violation *Violation // nil: every invariant held
	Trace     string     // when asked for
}

// Run runs one schedule: Events random events with faults, then a time
// without, in which every wanted live binding must be confirmed (I3).
func Run(seed uint64, o Options, trace bool) Result {
	return run(seed, o, hooks{}, trace, nil)
}

func run(seed uint64, o Options, h hooks, trace bool, cover map[Pair]int) Result {
	w := newWorld(seed, o, h)
	w.verbose, w.cover = trace, cover
	for w.events < o.Events && w.violation == nil {
		w.event()
		for w.events == o.Events/2 && w.faults == 0 {
			w.fault(pick(w.rng, w.nodes...)) // every schedule has one; all agents run
		}
	}
	r := Result{Seed: seed, Events: w.events, Faults: w.faults}
	if w.violation == nil && !o.noCalm {
		w.ceaseFaults()
		w.converge()
		if seed%32 == 0 {
			w.converge2()
		}
	}
	r.Violation = w.violation
	r.Trace = strings.Join(w.lines, "\n")
	return r
}

// event does one random thing that is possible now.
func (w *World) event() {
	for _, n := range w.nodes {
		if n.paused > 0 {
			n.paused--
		}
	}
	for !w.try() {
	}
	w.events++
	w.check()
}

func (w *World) try() bool {
	n := pick(w.rng, w.nodes...)
	a := n.agent
	switch r := w.rng.IntN(1000); {
	case r < 430:
		return w.deliverAny()
	case r < 520:
		if !a.ready() || len(a.inbox) == 0 {
			return false
		}
		a.local()
		a.carryOn()
	case r < 600:
		return a.tickDue()
	case r < 640:
		if a == nil || n.paused > 0 || len(a.pending) == 0 {
			return false
		}
		a.carryOn()
	case r < 730:
		w.advance(w.interval())
	case r < 810:
		ip := &w.ips[w.rng.IntN(len(w.ips))]
		if len(ip.recent) == 0 || n == ip.node {
			return false
		}
		u := pick(w.rng, ip.recent...)
		if !u.active && w.real > u.ended+n.flight() {
			return false
		}
		w.send(u, n)
	case r < 870:
		if !a.ready() || len(a.ring) == 0 {
			return false
		}
		a.readRing()
		a.carryOn()
	case r < 930:
		return w.churn()
	case r < 950:
		return w.nudge(a)
	default:
		if n.agent == nil {
			n.start()
			w.log("%s: agent starts", n.name)
			return true
		}
		if r >= 980 {
			return w.fault(n)
		}
		return false
	}
	return true
}

// carryOn carries out the outputs of a step; now and then the process is
// descheduled among them.
func (a *agent) carryOn() {
	if a.n.w.rng.IntN(8) == 0 {
		a.flush(a.n.w.rng.IntN(len(a.pending) + 1))
		return
	}
	for len(a.pending) > 0 && a.n.agent == a {
		a.flush(len(a.pending))
	}
}

type hop struct {
	s       *stream
	toOwner bool
}

func (w *World) hops() []hop {
	hs := w.hopped[:0]
	keep := w.streams[:0]
	for _, s := range w.streams {
		if s.over() {
			continue
		}
		keep = append(keep, s)
		if s.v != nil && !s.dialed {
			hs = append(hs, hop{s: s})
			continue
		}
		if w.cut(s.vn, s.on) && !s.broken {
			continue
		}
		if len(s.toV) > 0 && s.v.ready() && (w.events >= s.slowV || s.ends(s.toV)) {
			hs = append(hs, hop{s: s})
		}
		if len(s.toO) > 0 && s.o.ready() && (w.events >= s.slowO || s.ends(s.toO)) {
			hs = append(hs, hop{s, true})
		}
	}
	w.streams, w.hopped = keep, hs
	return hs
}

func (w *World) deliverAny() bool {
	hs := w.hops()
	if len(hs) == 0 {
		return false
	}
	w.hop(pick(w.rng, hs...))
	return true
}

func (w *World) hop(h hop) {
	s := h.s
	if !s.dialed {
		s.dial()
		return
	}
	if !w.calmed && w.rng.IntN(w.lag) == 0 {
		s.slow() // any message may take any time
	}
	a := s.v
	if h.toOwner {
		a = s.o
	}
	s.deliver(h.toOwner)
	a.carryOn()
}

func (a *agent) tickDue() bool {
	if !a.ready() {
		return false
	}
	now := a.n.clock()
	switch {
	case a.oTimer != 0 && a.oTimer <= now:
		a.oTimer = 0
		a.stepOwner(lease.OwnerTick{})
	case a.vTimer != 0 && a.vTimer <= now:
		a.vTimer = 0
		a.stepVerifier(lease.VerifierTick{})
	default:
		return false
	}
	a.carryOn()
	return true
}

// interval is how long until the next event: mostly nothing much, sometimes
// just up to where something changes.
func (w *World) interval() int64 {
	us, ms := int64(time.Microsecond), int64(time.Millisecond)
	switch r := w.rng.IntN(100); {
	case r < 35:
		return w.rng.Int64N(200 * us)
	case r < 50:
		return w.rng.Int64N(2 * ms)
	case r < 62:
		return w.rng.Int64N(int64(w.margin))
	case r < 82:
		return max(0, w.nextChange()-w.real+w.rng.Int64N(3)-1)
	case r < 90:
		return w.rng.Int64N(int64(w.heartbeat))
	case r < 96:
		return w.rng.Int64N(int64(w.ttl))
	case r < 99:
		return w.rng.Int64N(3 * int64(w.ttl))
	default:
		return w.rng.Int64N(2 * int64(lease.MaxLease))
	}
}

// nextChange is when the next timer, deadline or flight ends.
func (w *World) nextChange() int64 {
	at := w.real + int64(lease.MaxLease)
	sooner := func(t int64) {
		if t > w.real && t < at {
			at = t
		}
	}
	for _, n := range w.nodes {
		for _, d := range n.k.leases {
			if d != 0 {
				sooner(n.when(d))
			}
		}
		if a := n.agent; a != nil {
			for _, t := range []lease.Time{a.oTimer, a.vTimer} {
				if t != 0 {
					sooner(n.when(t) + 1)
				}
			}
		}
	}
	for i := range w.ips {
		for _, u := range w.ips[i].recent {
			if !u.active {
				sooner(u.ended + int64(w.flight))
			}
		}
	}
	return at
}

// churn adds, deletes and replaces workloads, with DELs late, doubled, missing.
func (w *World) churn() bool {
	i := w.rng.IntN(len(w.ips))
	ip := &w.ips[i]
	var have *endpoint
	for _, e := range ip.node.k.endpoints {
		if e.w.ip == i {
			have = e
		}
	}
	switch r := w.rng.IntN(100); {
	case have == nil && ip.node.agent != nil && r < 80:
		w.newWorkload(i)
	case have != nil && r < 40:
		w.deleteWorkload(have)
	case have != nil && r < 46 && ip.node.agent != nil:
		w.newWorkload(i) // ADD without a DEL before
	case r < 49 && ip.node.agent != nil && have != nil:
		ip.node.agent.inbox = append(ip.node.agent.inbox, relabel{have.w.uid})
	case r < 50 && ip.node.agent != nil && len(ip.past) > 0:
		u := ip.past[w.rng.IntN(len(ip.past))] // of whoever had it
		ip.node.agent.inbox = append(ip.node.agent.inbox, relabel{u.uid})
	case r < 53 && ip.node.agent != nil && len(ip.past) > 1:
		old := ip.past[w.rng.IntN(len(ip.past)-1)]
		if ip.node.k.endpoint(old.uid) != nil {
			return false
		}
		ip.node.agent.inbox = append(ip.node.agent.inbox, lease.Delete{UID: old.uid}) // DEL again
	case r < 55 && ip.node.agent != nil && have != nil:
		ip.node.agent.inbox = append(ip.node.agent.inbox, lease.Add{UID: have.w.uid, IPs: addrs(ip), Identity: have.w.id})
	default:
		return false
	}
	return true
}

func addrs(ip *ipInfo) []netip.Addr { return []netip.Addr{ip.addr} }

// nudge is what happens to an agent beside packets and workloads.
func (w *World) nudge(a *agent) bool {
	if a == nil {
		return false
	}
	if w.rng.IntN(4) == 0 {
		return w.wantProof(a)
	}
	o := pick(w.rng, w.nodes...)
	if o == a.n {
		return false
	}
	switch r := w.rng.IntN(100); {
	case r < 30:
		a.expireHolds()
	case r < 60:
		u := lease.Used{}
		for _, ip := range w.ips {
			if ip.node != a.n && w.rng.IntN(2) == 0 {
				u.IPs = append(u.IPs, ip.addr)
			}
		}
		a.inbox = append(a.inbox, u)
	case r < 85:
		// An egress contact: nothing is held, the binding is wanted.
		ip := pick(w.rng, w.ips...)
		if ip.node == a.n {
			return false
		}
		a.inbox = append(a.inbox, lease.Want{IP: ip.addr, Owner: ip.node.name, Arrival: a.n.clock()})
	case r < 88:
		a.inbox = append(a.inbox, lease.ResetSession{Owner: o.name})
	case r < 92:
		a.inbox = append(a.inbox, lease.AskMax{})
	case r < 96:
		a.inbox = append(a.inbox, lease.Doubt{})
	default:
		a.inbox = append(a.inbox, lease.OwnerTick{}, lease.VerifierTick{})
	}
	return true
}

func (w *World) fault(n *node) bool {
	a := n.agent
	switch r := w.rng.IntN(100); {
	case r < 10:
		if len(w.streams) == 0 {
			return false
		}
		s := pick(w.rng, w.streams...)
		s.slow()
		w.log("fault: what is under way on a stream %s -> %s is late", s.vn.name, s.on.name)
	case r < 36:
		if len(w.streams) == 0 {
			return false
		}
		s := pick(w.rng, w.streams...)
		for _, o := range w.streams { // rather one with a binding under way
			if !o.broken && o.binds() && w.rng.IntN(3) != 0 {
				s = o
			}
		}
		if s.broken || !s.dialed {
			return false
		}
		s.break_()
		w.log("fault: a stream %s -> %s breaks", s.vn.name, s.on.name)
	case r < 46:
		o := pick(w.rng, w.nodes...)
		k := [2]int{min(n.index, o.index), max(n.index, o.index)}
		if o == n {
			return false
		}
		w.cuts[k] = !w.cuts[k]
		w.log("fault: %s and %s cut: %v", n.name, o.name, w.cuts[k])
	case r < 62:
		n.journalLost = w.rng.IntN(4) == 0
		w.log("fault: %s crashes, journal lost: %v", n.name, n.journalLost)
		n.crash()
	case r < 74:
		n.paused = w.rng.IntN(40)
		w.log("fault: %s pauses", n.name)
	case r < 82:
		// A planned restart: ask for MaxLease, say so, then go.
		a.inbox = append(a.inbox, lease.Leave{}, lease.AskMax{})
		w.log("fault: %s is about to restart", n.name)
		w.quick(w.rng.IntN(40))
		if n.agent == a {
			n.crash()
			n.start()
		}
	case r < 90:
		w.storeFaults++
	case r < 96:
		w.journalFaults++
	case r < 98:
		kept := w.rng.IntN(2) == 0
		w.log("fault: host %s reboots, journal kept: %v", n.name, kept)
		n.reboot(kept)
	default:
		return false
	}
	w.faults++
	return true
}

// quick lets the agents talk for a few events.
func (w *World) quick(events int) {
	for range events {
		if n := pick(w.rng, w.nodes...); n.agent.ready() && len(n.agent.inbox) > 0 {
			n.agent.local()
			n.agent.carryOn()
			continue
		}
		w.deliverAny()
	}
}

// String is a report of one line, and how to see more.
func (r Result) String() string {
	if r.Violation == nil {
		return fmt.Sprintf("seed %d: %d events, %d faults, all invariants held", r.Seed, r.Events, r.Faults)
	}
	return fmt.Sprintf("seed %d: %v", r.Seed, r.Violation)
}
