package sim

import (
	"encoding/binary"
	"fmt"
	"math/rand/v2"
	"net/netip"
	"slices"
	"time"

	"portcullis/identity"
	"portcullis/ipcache/lease"
)

// World is one simulated cluster.
type World struct {
	rng     *rand.Rand
	verbose bool
	lines   []string
	hooks   hooks
	cover   map[Pair]int // nil: not counted

	ttl, heartbeat, margin, flight, idle time.Duration
	grants                               int
	relabels                             lease.RelabelMode
	prove                                int // proveNone and so on
	svidLife, svidLate                   time.Duration
	proofs                               []*made // all, by number
	made                                 []*made // the latest

	real    int64
	nodes   []*node
	byName  map[identity.NodeName]*node
	ips     []ipInfo
	order   []int // 0..len(ips)-1
	ipIndex map[netip.Addr]int
	byUID   map[identity.UID]*workload // the last incarnation
	byWho   map[who]*workload
	count   int
	streams []*stream
	hopped  []hop // used again by hops
	cuts    map[[2]int]bool

	lag                        int  // one delivery in so many makes its stream slow
	calmed                     bool // faults have ceased
	storeFaults, journalFaults int
	events, faults             int
	violation                  *Violation
}

type ipInfo struct {
	addr   netip.Addr
	node   *node
	recent []*workload // whoever may have packets under way, oldest first
	past   []*workload // whoever had it
}

// Violation is a broken invariant.
type Violation struct {
	Invariant string
	What      string
	Event     int
}

func (v *Violation) Error() string {
	return fmt.Sprintf("%s broken at event %d: %s", v.Invariant, v.Event, v.What)
}

// hooks let the tests of this package plant mistakes around the machines.
// All nil: the protocol as it is.
type hooks struct {
	ownerConfig func(*node, *lease.OwnerConfig)
	ownerIn     func(*agent, lease.OwnerInput) lease.OwnerInput
	ownerOut    func(*agent, lease.OwnerInput, []lease.OwnerOutput) []lease.OwnerOutput
	verifierIn  func(*agent, lease.VerifierInput) lease.VerifierInput
	verifierOut func(*agent, lease.VerifierInput, []lease.VerifierOutput) []lease.VerifierOutput
	created     func(*endpoint)
	tableStart  func(*node) uint64 // the first stamp of a process
	// noProofs: nobody asks for proofs, which other mistakes break too.
	noProofs bool
	// ignoreFailures: a failed store does not stop the step's outputs.
	ignoreFailures bool
}

// Options sizes a World.
type Options struct {
	Nodes  int  // at least 3
	IPs    int  // per node
	Events int  // random ones, before faults end
	noCalm bool // stop there, without I3
}

func newWorld(seed uint64, o Options, h hooks) *World {
	w := &World{
		rng: rand.New(rand.NewPCG(seed, 0x706f7274)), hooks: h,
		byName: map[identity.NodeName]*node{}, ipIndex: map[netip.Addr]int{},
		byUID: map[identity.UID]*workload{}, byWho: map[who]*workload{}, cuts: map[[2]int]bool{},
	}
	// TTL and MaxLease well above the margin, or mistakes hide behind it.
	w.ttl = pick(w.rng, 3*time.Second, 3*time.Second, 10*time.Second, 30*time.Second)
	w.heartbeat = w.ttl / 6
	w.margin = pick(w.rng, 10*time.Millisecond, 100*time.Millisecond, time.Second)
	w.flight = w.margin / 3
	w.idle = pick(w.rng, 5*time.Minute, 2*w.ttl, w.ttl/2)
	w.lag = pick(w.rng, 300, 100, 30, 10)
	w.grants = pick(w.rng, 0, 0, 0, 3)
	w.relabels = pick(w.rng, lease.RelabelPrompt, lease.RelabelStrict)
	w.initProofs()
	if h.noProofs {
		w.prove = proveNone
	}
	rates := []int64{894, 1000, 1117} // rho of A2 between the slowest and the fastest
	for i := range o.Nodes {
		n := &node{
			w: w, index: i, name: identity.NodeName(fmt.Sprintf("n%d", i)), rate: pick(w.rng, rates...),
			offset: w.rng.Int64N(int64(time.Hour)), boot: w.newBoot(), k: newKernel(),
			fresh: make([]lease.Time, o.Nodes), idled: map[*workload]int64{},
		}
		w.nodes = append(w.nodes, n)
		w.byName[n.name] = n
		for j := range o.IPs {
			ip := netip.AddrFrom4([4]byte{10, 0, byte(i), byte(j + 1)})
			w.ipIndex[ip] = len(w.ips)
			w.order = append(w.order, len(w.ips))
			w.ips = append(w.ips, ipInfo{addr: ip, node: n})
		}
	}
	for _, n := range w.nodes {
		n.start()
	}
	return w
}

func pick[T any](r *rand.Rand, of ...T) T { return of[r.IntN(len(of))] }

func (w *World) newBoot() (b identity.BootID) {
	binary.LittleEndian.PutUint64(b[:], w.rng.Uint64())
	return b
}

func (w *World) log(f string, args ...any) {
	if w.verbose {
		w.lines = append(w.lines, fmt.Sprintf("%4d %12.6f ", w.events, float64(w.real)/1e9)+fmt.Sprintf(f, args...))
	}
}

func (w *World) violate(inv, f string, args ...any) {
	if w.violation == nil {
		w.violation = &Violation{Invariant: inv, What: fmt.Sprintf(f, args...), Event: w.events}
		w.log("VIOLATION %v", w.violation)
	}
}

func (w *World) cut(a, b *node) bool {
	return w.cuts[[2]int{min(a.index, b.index), max(a.index, b.index)}]
}

// advance moves real time.
func (w *World) advance(d int64) {
	if d <= 0 {
		return
	}
	for _, n := range w.nodes {
		n.touch(w.real + d)
	}
	w.real += d
	w.check()
}

// ---- workloads --------------------------------------------------------

// newWorkload is an ADD: an endpoint, quarantined and enforced, then the wait.
func (w *World) newWorkload(ip int) {
	n := w.ips[ip].node
	w.count++
	u := &workload{node: n, ip: ip, name: fmt.Sprintf("w%d(%s)", w.count, w.ips[ip].addr), number: w.count}
	binary.BigEndian.PutUint64(u.uid[:], uint64(w.count))
	u.id = identity.New("td", "ns", fmt.Sprintf("sa%d", w.count%3), nil)
	w.enter(u)
	e := &endpoint{w: u}
	n.k.endpoints = append(n.k.endpoints, e)
	if w.hooks.created != nil {
		w.hooks.created(e)
	}
	w.log("truth: ADD %s", u.name)
	n.agent.inbox = append(n.agent.inbox, lease.Add{UID: u.uid, IPs: []netip.Addr{w.ips[ip].addr}, Identity: u.id})
}

func (w *World) enter(u *workload) {
	u.me = who{u.uid, u.id.Hash()} // once: the checks ask for it all the time
	w.byUID[u.uid], w.byWho[u.me] = u, u
	u.lastLive = slices.Repeat([]int64{-1}, len(w.nodes))
	w.ips[u.ip].past = append(w.ips[u.ip].past, u)
}

func (w *World) activated(u *workload) {
	if u.active {
		return
	}
	u.active, u.began = true, w.real
	w.ips[u.ip].recent = append(w.ips[u.ip].recent, u)
	w.log("truth: %s is active", u.name)
}

// deleteWorkload is a DEL: the gate closes, with or without an agent.
func (w *World) deleteWorkload(e *endpoint) {
	n := e.w.node
	n.endWorkload(e.w.uid)
	w.log("truth: DEL %s", e.w.name)
	if n.agent != nil {
		n.agent.inbox = append(n.agent.inbox, lease.Delete{UID: e.w.uid})
	}
}

// ---- packets ----------------------------------------------------------

// send lets a packet of u reach the kernel of node v now.
func (w *World) send(u *workload, v *node) {
	p := packet{from: u, arrival: v.clock()}
	if v.judge(p, "on arrival") {
		return
	}
	if v.agent != nil && len(v.agent.ring) < 8 {
		v.agent.ring = append(v.agent.ring, p)
	}
}

// readRing hands the oldest held packet to the agent.
func (a *agent) readRing() {
	p := a.ring[0]
	a.ring = a.ring[1:]
	a.held[p.from.ip] = append(a.held[p.from.ip], p)
	i := a.n.w.ips[p.from.ip]
	a.stepVerifier(lease.Want{IP: i.addr, Owner: i.node.name, Arrival: p.arrival})
}

// ---- invariants -------------------------------------------------------

// check looks at the whole state, as packets of every kind would find it now.
func (w *World) check() {
	if w.violation != nil {
		return
	}
	for i := range w.ips {
		w.prune(&w.ips[i])
	}
	for _, v := range w.nodes {
		for i := range v.k.slots {
			if s := &v.k.slots[i]; v.live(s) {
				w.checkSlot(v, s)
			}
		}
		for _, f := range v.k.flows {
			if s := &v.k.slots[f.slot]; s.stamp == f.stamp && s.who() != f.who {
				w.violate("I4", "%s: a flow made for one workload has the stamp of another", v.name)
			}
		}
	}
	for i := range w.ips {
		w.checkEgress(&w.ips[i])
	}
}

// prune forgets workloads whose packets are gone everywhere.
func (w *World) prune(ip *ipInfo) {
	for len(ip.recent) > 0 && !ip.recent[0].active && w.real > ip.recent[0].ended+2*int64(w.flight) {
		ip.recent = ip.recent[1:]
	}
}

func (w *World) checkSlot(v *node, s *kslot) {
	// I1: no packet of another workload may arrive while the slot admits.
	for _, u := range w.ips[s.ip].recent {
		if u != s.of && (u.active || w.real <= u.ended+v.flight()) && !w.excused(u, s.who()) {
			w.violate("I1", "%s admits %s as %s, and a packet of %s (active %v) can arrive now",
				v.name, w.ips[s.ip].addr, w.name(s.who()), u.name, u.active)
		}
	}
	// I2: the deadline rests on an answer of the owner, counted from the
	// time at which this node asked.
	w.checkProved(v, s)
	d := v.k.leases[s.lease]
	if d > v.fresh[s.owner.index] {
		w.violate("I2", "%s believes in %s until %d, its evidence ends at %d", v.name, w.name(s.who()), d, v.fresh[s.owner.index])
	}
	// I1, the owner's promise: it waits at least that long. Its books must
	// say so at every moment, not only when the IP is reused.
	if a := s.owner.agent; a != nil && !a.cold && s.owner.boot == s.boot {
		g, ok := a.owner.GrantDeadline(v.name, w.ips[s.ip].addr, s.gen)
		if !ok || s.owner.when(g) < v.when(d)-2 {
			w.violate("I1", "%s believes in %s for %v more, and %s's books say %v (known %v)", v.name, w.name(s.who()),
				time.Duration(v.when(d)-w.real), s.owner.name, time.Duration(s.owner.when(g)-w.real), ok)
		}
	}
	if s.of != nil {
		s.of.lastLive[v.index] = w.real
	}
}

// checkEgress is I1 for packets to the IP: whoever is active must not get
// what was let out towards the workload before.
func (w *World) checkEgress(ip *ipInfo) {
	flight := ip.node.flight()
	for _, u := range ip.recent {
		if !u.active {
			continue
		}
		for _, old := range ip.past {
			if old == u || w.excusedFor(u, old) {
				continue
			}
			for _, v := range w.nodes {
				t := old.lastLive[v.index]
				if t < 0 {
					continue
				}
				if w.real <= t+flight {
					w.violate("I1", "egress: %s is active, and a packet that %s let out to %s %v ago can arrive",
						u.name, v.name, old.name, time.Duration(w.real-t))
				} else if w.real > t+int64(time.Minute) && !old.active {
					old.lastLive[v.index] = -1
				}
			}
		}
	}
	if len(ip.past) > 4 {
		ip.past = ip.past[len(ip.past)-4:]
	}
}

func (w *World) name(x who) string {
	if u := w.byWho[x]; u != nil {
		return u.name
	}
	return x.uid.String() + " as " + x.hash.String()
}
