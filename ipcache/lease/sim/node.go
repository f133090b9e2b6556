package sim

import (
	"encoding/binary"
	"net/netip"
	"time"

	"portcullis/identity"
	"portcullis/ipcache"
	"portcullis/ipcache/lease"
)

type node struct {
	w      *World
	index  int
	name   identity.NodeName
	rate   int64 // of its clock, in thousandths
	offset int64
	boot   identity.BootID
	k      kernel
	agent  *agent // nil: down
	paused int    // actions left

	journal     []lease.Record
	journalLost bool
	served      bool // an agent ran in this boot
	rebooted    bool

	// fresh[o] is the latest deadline that owner o's answers allow (I2).
	fresh []lease.Time
	// idled is when this agent last gave the binding back because nothing used it.
	idled map[*workload]int64
	proof *made // of the message that the agent works on; nil: it is none
}

// agent is one process.
type agent struct {
	n     *node
	owner *lease.Owner
	ver   *lease.Verifier
	table *ipcache.Table

	inbox   []any      // lease.OwnerInput, lease.VerifierInput or relabel, made on this node
	pending []any      // outputs of the step in progress
	decided lease.Time // when the verifier's was
	oTimer  lease.Time
	vTimer  lease.Time

	streams    map[lease.StreamID]*stream
	nextStream lease.StreamID

	ring []packet         // held, not read yet
	held map[int][]packet // by IP
	cold bool             // nothing but Adopts so far
	note bool             // of a hook
}

func (n *node) clock() lease.Time { return n.at(n.w.real) }

func (n *node) at(real int64) lease.Time { return lease.Time(n.offset + real*n.rate/1000) }

// when is the real time of a reading of this node's clock.
func (n *node) when(t lease.Time) int64 { return (int64(t) - n.offset) * 1000 / n.rate }

// flight is F by this node's clock, in real time.
func (n *node) flight() int64 { return int64(n.w.flight) * 1000 / n.rate }

// start starts a process over what its predecessor left.
func (n *node) start() {
	w := n.w
	a := &agent{n: n, streams: map[lease.StreamID]*stream{}, held: map[int][]packet{}, cold: true}
	var err error
	if a.owner, err = lease.NewOwner(n.ownerConfig(), n.clock()); err != nil {
		panic(err)
	}
	a.table = n.restore()
	cfg := lease.VerifierConfig{
		Node: n.name, Boot: n.boot, TTL: w.ttl, Heartbeat: w.heartbeat, IdleBinding: w.idle, IdleSession: w.idle,
		Speaks: func(o identity.NodeName, ip netip.Addr) bool { return w.ips[w.ipIndex[ip]].node.name == o },
	}
	n.proofConfig(&cfg)
	if a.ver, err = lease.NewVerifier(cfg, a.table, n.clock()); err != nil {
		panic(err)
	}
	n.agent = a
	a.adopt()
	for a.cold {
		a.local() // the adoption comes before the loop
		a.flush(len(a.pending))
		if n.agent != a {
			return
		}
	}
}

// ownerConfig says what became of the journal.
func (n *node) ownerConfig() lease.OwnerConfig {
	w := n.w
	cfg := lease.OwnerConfig{
		Node: n.name, Boot: n.boot, ReuseMargin: w.margin, Flight: w.flight, Grants: w.grants, Relabel: w.relabels,
		Nonce:          func() (x lease.Nonce) { binary.LittleEndian.PutUint64(x[:], w.rng.Uint64()); return },
		Mine:           func(ip netip.Addr) bool { return w.ips[w.ipIndex[ip]].node == n },
		LastGeneration: n.k.lastGen,
		Journal:        lease.JournalPresent,
		Records:        n.journal,
	}
	switch {
	case !n.served && !n.rebooted:
		cfg.Journal, cfg.FreshRanges = lease.JournalMissing, true
	case n.journalLost:
		cfg.Journal, cfg.Records = lease.JournalMissing, nil
	case n.rebooted && !n.served:
		cfg.Journal = lease.JournalOtherBoot
	}
	if n.journalLost {
		n.journal = nil
	}
	n.journalLost, n.served = false, true
	if w.hooks.ownerConfig != nil {
		w.hooks.ownerConfig(n, &cfg)
	}
	return cfg
}

// restore rebuilds the table from the kernel's maps.
func (n *node) restore() *ipcache.Table {
	next := n.k.nextStamp
	if n.w.hooks.tableStart != nil {
		next = n.w.hooks.tableStart(n)
	}
	table, err := ipcache.New(ipcache.Config{
		Slots: kernelSlots, Leases: kernelLeases, NextStamp: next,
		Reserve: func(limit uint64) error { n.k.nextStamp = limit; return nil },
	})
	if err != nil {
		panic(err)
	}
	for i, s := range n.k.slots {
		if s.stamp == 0 {
			continue
		}
		if err := table.Restore(ipcache.Entry{
			Slot: uint32(i), Stamp: s.stamp, Lease: s.lease, OwnerBoot: s.boot, Hash: s.hash, Evidence: identity.EvidenceLease, Proved: int64(s.proved),
			Binding:   identity.Binding{IP: n.w.ips[s.ip].addr, Generation: s.gen, UID: s.uid, Owner: s.owner.name},
			Condemned: n.k.binding[s.ip] != uint32(i),
		}); err != nil {
			panic(err)
		}
	}
	for i := range n.k.leases {
		if table.LeaseUsers(uint32(i)) == 0 {
			n.k.leases[i] = 0 // or the next session would live by it
		}
	}
	return table
}

// adopt tells the owner of the endpoints in the pinned map: the active ones
// are adopted, the others wait.
func (a *agent) adopt() {
	var later []any
	for _, e := range a.n.k.endpoints {
		add := lease.Add{UID: e.w.uid, IPs: []netip.Addr{a.n.w.ips[e.w.ip].addr}, Identity: e.w.id}
		if !e.active {
			later = append(later, add)
			continue
		}
		gen := e.gen
		if a.n.w.rng.IntN(4) == 0 && journalled(a.n.journal, e) {
			gen = 0 // as a node's own addresses: by the journal
		}
		a.inbox = append(a.inbox, lease.Adopt{Add: add, Generation: gen})
	}
	a.inbox = append(a.inbox, later...)
	a.inbox = append(a.inbox, lease.OwnerTick{}, lease.VerifierTick{})
}

func journalled(rs []lease.Record, e *endpoint) bool {
	for _, r := range rs {
		if r.Kind == lease.RecordBound && r.UID == e.w.uid && r.Generation == e.gen && r.Boot == e.w.node.boot {
			return true
		}
	}
	return false
}

// local takes the next input of this node's own.
func (a *agent) local() {
	in := a.inbox[0]
	a.inbox = a.inbox[1:]
	switch in := in.(type) {
	case relabel:
		a.relabel(in)
	case lease.OwnerInput:
		if _, ok := in.(lease.Adopt); !ok {
			a.cold = false
		}
		a.stepOwner(in)
	case lease.VerifierInput:
		a.stepVerifier(in)
	}
}

func (a *agent) stepOwner(in lease.OwnerInput) {
	h := a.n.w.hooks
	if h.ownerIn != nil {
		if in = h.ownerIn(a, in); in == nil {
			return
		}
	}
	a.n.w.coverOwner(a, in)
	if a.n.w.verbose {
		a.n.w.log("%s owner <- %T%+v", a.n.name, in, in)
	}
	out := a.owner.Step(a.n.clock(), in)
	if h.ownerOut != nil {
		out = h.ownerOut(a, in, out)
	}
	for _, o := range out {
		a.pending = append(a.pending, o)
	}
}

func (a *agent) stepVerifier(in lease.VerifierInput) {
	h := a.n.w.hooks
	if h.verifierIn != nil {
		if in = h.verifierIn(a, in); in == nil {
			return
		}
	}
	a.n.w.coverVerifier(a, in)
	if a.n.w.verbose {
		a.n.w.log("%s verifier <- %T%+v", a.n.name, in, in)
	}
	a.n.proof = nil
	if f, ok := in.(lease.FromOwner); ok {
		if p, ok := f.Message.(lease.Proof); ok {
			a.n.proof = a.n.w.madeOf(p)
		}
	}
	a.decided = a.n.clock()
	out := a.ver.Step(a.decided, in)
	if h.verifierOut != nil {
		out = h.verifierOut(a, in, out)
	}
	for _, o := range out {
		a.pending = append(a.pending, o)
	}
}

// flush carries out the next outputs, checking after each that changes
// anything, and at the end: the machine's own books changed with the step.
func (a *agent) flush(count int) {
	checked := false
	for ; count > 0 && len(a.pending) > 0 && a.n.agent == a; count-- {
		out := a.pending[0]
		a.pending = a.pending[1:]
		a.do(out)
		checked = false
		switch out.(type) {
		case lease.OwnerLog, lease.OwnerTimer, lease.VerifierLog, lease.VerifierTimer, lease.Learned:
		default:
			a.n.w.check()
			checked = true
		}
	}
	if !checked {
		a.n.w.check()
	}
}

func (a *agent) do(out any) {
	w := a.n.w
	if w.verbose {
		w.log("  %s -> %T%+v", a.n.name, out, out)
	}
	switch out := out.(type) {
	case lease.OwnerOutput:
		a.doOwner(out)
	case lease.Write:
		if w.storeFaults > 0 && w.rng.IntN(8) == 0 {
			w.storeFaults--
			w.log("  %s: that store fails", a.n.name)
			if w.hooks.ignoreFailures {
				return
			}
			a.pending = nil
			if i, ok := out.(lease.Install); ok && w.rng.IntN(2) == 0 {
				// Half done: the slot is written, its binding is not.
				a.n.write(i)
				delete(a.n.k.binding, w.ipIndex[i.Binding.IP])
			}
			a.stepVerifier(lease.StoreFailed{Write: out})
			return
		}
		a.n.write(out)
	case lease.VerifierOutput:
		a.doVerifier(out)
	}
}

func (a *agent) doOwner(out lease.OwnerOutput) {
	w := a.n.w
	switch out := out.(type) {
	case lease.SendToVerifier:
		if s := a.streams[out.Stream]; s != nil && s.o == a {
			s.send(&s.toV, out.Message)
			switch m := out.Message.(type) {
			case lease.HeartbeatReply:
				s.vn.renew(a.n, m.Echo.Add(m.TTL))
			case lease.Welcome:
				s.vn.renew(a.n, m.Echo.Add(m.TTL))
			}
		}
	case lease.MakeProof:
		a.makeProof(out)
	case lease.CloseVerifier:
		if s := a.streams[out.Stream]; s != nil && s.o == a {
			s.closeBy(a)
		}
	case lease.Activate:
		if e := a.n.k.endpoint(out.UID); e != nil {
			e.active, e.gen = true, out.Generation
			a.n.k.lastGen = max(a.n.k.lastGen, out.Generation)
			w.activated(e.w)
		}
	case lease.CloseEndpoint:
		a.n.endWorkload(out.UID)
		a.inbox = append(a.inbox, lease.Delete{UID: out.UID})
	case lease.Journal:
		if w.journalFaults > 0 && w.rng.IntN(6) == 0 {
			w.journalFaults--
			w.log("  %s: the journal fails", a.n.name)
			a.pending = nil
			a.stepOwner(lease.JournalFailed(out))
			return
		}
		a.n.journal = append(a.n.journal, out.Record)
	case lease.OwnerTimer:
		a.oTimer = out.At
	}
}

func (a *agent) doVerifier(out lease.VerifierOutput) {
	w := a.n.w
	switch out := out.(type) {
	case lease.OpenStream:
		w.streams = append(w.streams, &stream{w: w, v: a, vn: a.n, on: w.byName[out.Owner]})
	case lease.CloseOwner:
		if s := a.streams[out.Stream]; s != nil && s.v == a {
			s.closeBy(a)
		}
	case lease.SendToOwner:
		if s := a.streams[out.Stream]; s != nil && s.v == a {
			s.send(&s.toO, out.Message)
		}
		if m, ok := out.Message.(lease.Prove); ok {
			a.n.noteAsked(m)
		}
	case lease.ProofAnswer:
		a.proofAnswered(out)
	case lease.Answer:
		a.answered(w.ipIndex[out.IP], out)
	case lease.VerifierTimer:
		a.vTimer = out.At
	case lease.VerifierLog:
		if u := w.byUID[out.Entry.UID]; u != nil && out.Entry.Kind == lease.LogRevocation && out.Entry.Reason == "idle" {
			a.n.idled[u] = w.real
		}
	}
}

func (n *node) renew(o *node, d lease.Time) { n.fresh[o.index] = max(n.fresh[o.index], d) }

// answered is the hold table's part: check, re-inject, in one critical section
// with the installation.
func (a *agent) answered(ip int, out lease.Answer) {
	var stay []packet
	for _, p := range a.held[ip] {
		switch {
		case out.Live && p.arrival > out.NotBefore:
			a.n.judge(p, reinjected)
		case !out.Live && p.arrival > out.Asked:
			stay = append(stay, p)
		}
	}
	if len(stay) == 0 {
		delete(a.held, ip)
		return
	}
	a.held[ip] = stay
}

// endWorkload closes the gate of an endpoint.
func (n *node) endWorkload(uid identity.UID) {
	e := n.k.endpoint(uid)
	if e == nil {
		return
	}
	n.k.remove(uid)
	if e.w.active {
		e.w.active, e.w.ended = false, n.w.real
		n.w.log("truth: %s ends", e.w.name)
	}
}

// crash ends the agent's process.
func (n *node) crash() {
	a := n.agent
	n.agent = nil
	for _, s := range n.w.streams {
		if s.v == a || s.o == a {
			s.cut(a)
		}
	}
}

// reboot loses everything but what is on disk.
func (n *node) reboot(journalKept bool) {
	if n.agent != nil {
		n.crash()
	}
	for _, e := range append([]*endpoint(nil), n.k.endpoints...) {
		n.endWorkload(e.w.uid)
	}
	n.touch(n.w.real)
	n.k = newKernel()
	n.boot = n.w.newBoot()
	n.offset = -n.w.real * n.rate / 1000
	n.rebooted, n.served = true, false
	n.journalLost = !journalKept
	for i := range n.fresh {
		n.fresh[i] = 0
	}
}

// touch notes until when this kernel let packets out, up to real time t.
func (n *node) touch(t int64) {
	for i := range n.k.slots {
		s := &n.k.slots[i]
		if !n.live(s) {
			continue
		}
		if u := s.of; u != nil {
			u.lastLive[n.index] = max(u.lastLive[n.index], min(t, n.when(n.k.leases[s.lease])))
		}
	}
}

const holdFor = lease.Time(time.Second)

// expireHolds drops what was held for too long.
func (a *agent) expireHolds() {
	for _, ip := range a.n.w.order {
		ps := a.held[ip]
		if len(ps) == 0 || a.n.clock() < ps[len(ps)-1].arrival+holdFor {
			continue
		}
		delete(a.held, ip)
		a.inbox = append(a.inbox, lease.Unwant{IP: a.n.w.ips[ip].addr})
	}
}
