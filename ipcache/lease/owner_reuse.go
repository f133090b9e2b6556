package lease

import (
	"net/netip"
	"slices"

	"portcullis/identity"
)

func (o *Owner) address(ip netip.Addr) *address {
	a := o.ips[ip]
	if a == nil {
		// Nothing is remembered of it: if anything was forgotten, it may
		// have been the end of a binding of this IP.
		a = &address{ip: ip, ended: o.forgotten, hasEnded: o.anyForgotten}
		o.ips[ip] = a
	}
	return a
}

// add takes up a workload. Its IPs may be waited for: they are looked at by
// activate, here and at every later step. An IP that another workload has is
// taken from it: the caller gave it to the newcomer, and a DEL may be missing.
func (o *Owner) add(in Add) {
	if w := o.workloads[in.UID]; w != nil {
		o.addAgain(w, in)
		return
	}
	reject := func(why string) { o.emit(Rejected{UID: in.UID, Why: why}) }
	switch {
	case o.leaving:
		reject("the agent is about to restart: try again")
		return
	case len(in.IPs) == 0:
		reject("a workload without an IP")
		return
	case len(o.workloads) >= o.cfg.MaxWorkloads:
		reject("too many workloads on this node")
		return
	}
	for i, ip := range in.IPs {
		if !ip.IsValid() || ip.Is4In6() || slices.Contains(in.IPs[:i], ip) {
			reject("invalid or repeated IP " + ip.String())
			return
		}
		if !o.cfg.Mine(ip) {
			reject(ip.String() + " lies outside this node's ranges and addresses")
			return
		}
	}
	w := &workload{Add: in, hash: in.Identity.Hash(), state: WorkloadQuarantined, added: o.now}
	for _, ip := range in.IPs {
		o.displace(ip, w)
		o.address(ip).next = w
	}
	o.workloads[in.UID] = w
	o.waiting = append(o.waiting, w)
	for _, ip := range in.IPs {
		o.log(LogEntry{Kind: LogQuarantine, IP: ip, UID: in.UID, Identity: in.Identity})
	}
}

// addAgain answers a repeated Add.
func (o *Owner) addAgain(w *workload, in Add) {
	switch {
	case !slices.Equal(w.IPs, in.IPs) || !w.Identity.Equal(in.Identity):
		o.emit(Rejected{UID: in.UID, Why: "the workload is known with other addresses or another identity: delete it first"})
	case w.state == WorkloadActive:
		o.emit(Activate{UID: w.UID, Generation: w.gen, Again: true})
	case w.state == WorkloadLeaving:
		o.emit(Rejected{UID: in.UID, Why: "another workload was given its IP"})
	}
}

// displace takes an IP from whoever has it.
func (o *Owner) displace(ip netip.Addr, by *workload) {
	a := o.address(ip)
	why := ip.String() + " was given to workload " + by.UID.String()
	if w := a.next; w != nil {
		o.forget(w)
		o.emit(CloseEndpoint{UID: w.UID, Why: why})
	}
	if w := a.holder; w != nil && w.state == WorkloadActive {
		// Its binding ends when its gate is closed: at its Delete.
		w.state = WorkloadLeaving
		o.emit(CloseEndpoint{UID: w.UID, Why: why})
	}
}

// forget removes a workload that is not bound.
func (o *Owner) forget(w *workload) {
	delete(o.workloads, w.UID)
	o.waiting = slices.DeleteFunc(o.waiting, func(x *workload) bool { return x == w })
	for _, ip := range w.IPs {
		if a := o.ips[ip]; a.next == w {
			a.next = nil
		}
	}
}

// delete ends a workload. The check is by UID: a late or repeated DEL of an
// earlier holder says nothing about the present one.
func (o *Owner) delete(uid identity.UID) {
	w := o.workloads[uid]
	switch {
	case w == nil:
	case w.state == WorkloadQuarantined:
		o.forget(w)
	default:
		delete(o.workloads, uid)
		for _, ip := range w.IPs {
			o.end(o.ips[ip], w.gen, w.UID, o.now)
		}
	}
}

// end ends the binding of an IP: its grants are revoked at once, its rest begins.
func (o *Owner) end(a *address, gen identity.Generation, uid identity.UID, at Time) {
	a.holder = nil
	a.ended, a.hasEnded = at, true
	for _, g := range a.grants {
		if g.gen == gen && !g.revoked {
			o.revoke(g)
		}
	}
	// A lost record costs only time: an end that the journal does not show
	// counts as the start of the next process.
	o.soft = append(o.soft, Record{Kind: RecordEnded, At: at, Boot: o.cfg.Boot, IP: a.ip, Generation: gen, UID: uid})
	if o.nextSweep == 0 {
		o.nextSweep = o.now.Add(sweepEvery)
	}
}

// openAt is when the workload may have its IPs, if nothing shortens the wait
// before; ok is false while another workload still has one.
//
// I1: every lease on the earlier bindings is acknowledged, released or past
// its deadline; and then, as after the end itself and after the start-up wait,
// ReuseMargin passes, so that packets under way are gone.
func (o *Owner) openAt(w *workload) (Time, bool) {
	t := w.retry
	if w.prompt {
		// It had its IPs, free of everybody's leases but those on itself:
		// the exception to I1 that mode prompt is.
		return t, true
	}
	if cold := o.coldUntil; cold != 0 {
		if w.HeldSince != 0 {
			// Leases on whoever had the IPs before were granted before then.
			cold = min(cold, w.HeldSince.Add(stretch(MaxLease)))
		}
		t = later(t, cold.Add(o.cfg.ReuseMargin))
	}
	for _, ip := range w.IPs {
		a := o.ips[ip]
		if a.holder != nil {
			return 0, false
		}
		if a.hasEnded {
			t = later(t, a.ended.Add(o.cfg.ReuseMargin))
		}
		if a.hasGone {
			t = later(t, a.gone.Add(o.cfg.ReuseMargin))
		}
		for _, g := range a.grants {
			t = later(t, g.deadline().Add(o.cfg.ReuseMargin))
		}
	}
	return t, true
}

// activate binds every workload whose IPs are free.
func (o *Owner) activate() {
	if o.leaving {
		return // what is bound while this agent goes could not be revoked
	}
	for _, w := range slices.Clone(o.waiting) {
		if t, ok := o.openAt(w); !ok || o.now < t {
			continue
		}
		o.bind(w)
	}
}

func (o *Owner) bind(w *workload) {
	w.gen = o.nextGeneration()
	w.alone = w.added
	if w.HeldSince != 0 {
		w.alone = min(w.alone, w.HeldSince)
	}
	// Its own first packets are later by ReuseMargin than what counts as
	// another's: the Binding is under way for a while, too.
	w.alone = min(w.alone, o.now.Add(-o.cfg.ReuseMargin))
	for _, ip := range w.IPs {
		o.emit(Journal{Record{Kind: RecordBound, At: o.now, Boot: o.cfg.Boot, IP: ip, Generation: w.gen, UID: w.UID}})
	}
	w.state = WorkloadActive
	o.waiting = slices.DeleteFunc(o.waiting, func(x *workload) bool { return x == w })
	for _, ip := range w.IPs {
		a := o.ips[ip]
		a.holder, a.next = w, nil
		o.log(LogEntry{Kind: LogActivation, IP: ip, Generation: w.gen, UID: w.UID, Identity: w.Identity, Duration: o.now.Sub(w.added)})
	}
	o.emit(Activate{UID: w.UID, Generation: w.gen})
	for _, ip := range w.IPs {
		o.pushBound(ip)
	}
}

// pushBound tells whoever was refused lately.
func (o *Owner) pushBound(ip netip.Addr) {
	ids := make([]StreamID, 0, len(o.streams))
	for id, s := range o.streams {
		if t, ok := s.v.refused[ip]; ok && s.state == StreamOpen && o.now <= t.Add(boundWindow) {
			ids = append(ids, id)
		}
	}
	slices.Sort(ids)
	for _, id := range ids {
		delete(o.streams[id].v.refused, ip)
		o.emit(SendToVerifier{id, Bound{IP: ip}})
	}
}

// nextGeneration is BOOTTIME, so that it stays unique in a boot even when
// nothing is known of the generations before.
func (o *Owner) nextGeneration() identity.Generation {
	o.lastGen = max(o.lastGen+1, identity.Generation(max(o.now, 0)))
	return o.lastGen
}
