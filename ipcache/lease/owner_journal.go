package lease

import (
	"net/netip"
	"slices"

	"portcullis/identity"
)

// journalled is a binding that the journal shows as bound.
type journalled struct {
	uid identity.UID
	gen identity.Generation
}

// replay rebuilds from the journal what keeps I1 across a restart. Deadlines
// are not in it: heartbeats are not journalled, so every grant, whatever its
// age, may have been renewed for MaxLease a moment before the end.
func (o *Owner) replay() {
	otherBoot := o.cfg.Journal == JournalOtherBoot
	missing := o.cfg.Journal == JournalMissing
	if o.cfg.Journal == JournalPresent {
		// The first record is written before anything is said to anybody:
		// a journal without one was begun, no more.
		missing = !slices.ContainsFunc(o.cfg.Records, func(r Record) bool { return r.Boot == o.cfg.Boot })
	}
	for _, r := range o.cfg.Records {
		if r.Boot != o.cfg.Boot {
			otherBoot = true
			continue
		}
		o.lastGen = max(o.lastGen, r.Generation)
		switch {
		case r.Kind == RecordWait:
			// The process before knew nothing of what was before r.At.
			o.coldUntil = later(o.coldUntil, r.At)
			o.forgetEnd(min(r.At, o.start))
		case o.cfg.Journal == JournalPresent:
			o.replayRecord(r)
		}
	}
	if otherBoot {
		// Those grants were made before this boot began: at BOOTTIME 0.
		o.coldUntil = later(o.coldUntil, Time(stretch(MaxLease)))
		o.forgetEnd(o.start)
	}
	if missing && !o.cfg.FreshRanges {
		o.coldUntil = later(o.coldUntil, o.start.Add(stretch(MaxLease)))
		o.forgetEnd(o.start)
	}
	// The next process must know of the wait, or a second crash would cut it.
	if missing || otherBoot || o.coldUntil > o.start {
		o.unsaid = append(o.unsaid, Record{Kind: RecordWait, At: o.coldUntil, Boot: o.cfg.Boot})
	}
	for _, v := range o.verifiers {
		for _, g := range v.grants {
			g.floor = o.start.Add(stretch(MaxLease))
		}
	}
}

// forgetEnd says that bindings of which nothing is remembered ended at the
// latest at that time.
func (o *Owner) forgetEnd(at Time) {
	if !o.anyForgotten || at > o.forgotten {
		o.forgotten, o.anyForgotten = at, true
	}
	for _, a := range o.ips {
		if !a.hasEnded {
			a.ended, a.hasEnded = at, true
		}
	}
}

func (o *Owner) replayRecord(r Record) {
	a := o.address(r.IP)
	switch r.Kind {
	case RecordGrant:
		v := o.book(r.Verifier)
		if o.find(v, r.VerifierBoot, r.IP, r.Generation) == nil {
			// The bound does not apply: what was granted was granted.
			o.bookGrant(v, r.VerifierBoot, r.IP, r.Generation, r.UID)
		}
	case RecordGrantEnded:
		if v := o.verifiers[r.Verifier]; v != nil {
			if g := o.find(v, r.VerifierBoot, r.IP, r.Generation); g != nil {
				g.floor = r.At
				o.drop(g, r.At)
			}
		}
		if !a.hasGone || r.At > a.gone {
			a.gone, a.hasGone = r.At, true
		}
	case RecordBound:
		if b := a.bound; b != nil && b.uid == r.UID && b.gen == r.Generation {
			return // said twice
		}
		if a.bound != nil {
			// Bound twice without an end: it was not witnessed.
			a.ended, a.hasEnded = o.start, true
		}
		a.bound = &journalled{uid: r.UID, gen: r.Generation}
	case RecordEnded:
		if a.bound != nil && a.bound.gen == r.Generation {
			a.bound = nil
		}
		if !a.hasEnded || r.At > a.ended {
			a.ended, a.hasEnded = r.At, true
		}
	}
}

// adopt takes over a workload that the kernel has held active all along.
func (o *Owner) adopt(in Adopt) {
	gen := in.Generation
	for _, ip := range in.IPs {
		if a := o.ips[ip]; gen == 0 && a != nil && a.bound != nil && a.bound.uid == in.UID {
			gen = a.bound.gen
		}
	}
	if o.settled || gen == 0 || o.workloads[in.UID] != nil || !o.adoptable(in.Add) {
		o.settle()
		o.add(in.Add)
		return
	}
	w := &workload{Add: in.Add, hash: in.Identity.Hash(), state: WorkloadActive, gen: gen, added: o.now, adopted: true}
	o.workloads[w.UID] = w
	o.lastGen = max(o.lastGen, gen)
	for _, ip := range in.IPs {
		a := o.address(ip)
		if b := a.bound; b == nil || b.uid != in.UID || b.gen != gen {
			// Its beginning was not witnessed, so neither was the end of
			// the binding before: both count as the start.
			o.unwitnessed(a)
			// Nor does the journal know of this one, whose end may go
			// unwitnessed too.
			o.unsaid = append(o.unsaid, Record{Kind: RecordBound, At: o.start, Boot: o.cfg.Boot, IP: ip, Generation: gen, UID: in.UID})
		}
		a.bound = nil
		a.holder = w
	}
}

func (o *Owner) adoptable(in Add) bool {
	for i, ip := range in.IPs {
		if !ip.IsValid() || ip.Is4In6() || slices.Contains(in.IPs[:i], ip) || !o.cfg.Mine(ip) {
			return false
		}
		if a := o.ips[ip]; a != nil && a.holder != nil {
			return false
		}
	}
	return len(in.IPs) > 0
}

func (o *Owner) unwitnessed(a *address) {
	if b := a.bound; b != nil {
		o.soft = append(o.soft, Record{Kind: RecordEnded, At: o.start, Boot: o.cfg.Boot, IP: a.ip, Generation: b.gen, UID: b.uid})
	}
	a.ended, a.hasEnded = o.start, true
}

// settle ends the time of Adopts: a journalled binding that was not adopted
// ended while no agent ran, at the start at the latest; and every grant on
// what is not held is as good as revoked.
func (o *Owner) settle() {
	if o.settled {
		return
	}
	o.settled = true
	ips := make([]netip.Addr, 0, len(o.ips))
	for ip := range o.ips {
		ips = append(ips, ip)
	}
	slices.SortFunc(ips, netip.Addr.Compare)
	for _, ip := range ips {
		a := o.ips[ip]
		if a.bound != nil {
			o.unwitnessed(a)
			a.bound = nil
		}
		for _, g := range a.grants {
			if a.holder == nil || a.holder.gen != g.gen {
				o.freeze(g)
			}
		}
	}
}

// Records returns the journal that rebuilds the present state: what a journal
// that has grown long may be replaced by.
func (o *Owner) Records() []Record {
	var out []Record
	if o.coldUntil != 0 {
		out = append(out, Record{Kind: RecordWait, At: o.coldUntil, Boot: o.cfg.Boot})
	}
	if o.anyForgotten {
		out = append(out, Record{Kind: RecordWait, At: o.forgotten, Boot: o.cfg.Boot})
	}
	ips := make([]netip.Addr, 0, len(o.ips))
	for ip := range o.ips {
		ips = append(ips, ip)
	}
	slices.SortFunc(ips, netip.Addr.Compare)
	for _, ip := range ips {
		a := o.ips[ip]
		rec := Record{Boot: o.cfg.Boot, IP: ip}
		if a.hasEnded {
			e := rec
			e.Kind, e.At = RecordEnded, a.ended
			out = append(out, e)
		}
		if b := a.bound; b != nil {
			e := rec
			e.Kind, e.At, e.Generation, e.UID = RecordBound, o.start, b.gen, b.uid
			out = append(out, e)
		}
		if a.hasGone {
			e := rec
			e.Kind, e.At = RecordGrantEnded, a.gone
			out = append(out, e)
		}
		if w := a.holder; w != nil {
			e := rec
			e.Kind, e.At, e.Generation, e.UID = RecordBound, o.now, w.gen, w.UID
			out = append(out, e)
		}
		for _, g := range a.grants {
			out = append(out, o.grantRecord(RecordGrant, g, o.now))
		}
	}
	return out
}

// journalFailed undoes what the failed record and its successors in the last
// step were to bring about: none of it was done.
//
// A session that stands goes on standing: what could not be granted is refused
// as busy. Only where a message is missing that the verifier cannot do without
// does the stream end.
func (o *Owner) journalFailed(r Record) {
	i := slices.IndexFunc(o.last, func(out OwnerOutput) bool { j, ok := out.(Journal); return ok && j.Record == r })
	if i < 0 {
		return
	}
	o.timer = 0 // a timer may have been dropped
	undone := map[Ref]bool{}
	for _, out := range o.last[i:] {
		if out, ok := out.(SendToVerifier); ok {
			if b, ok := out.Message.(Binding); ok {
				undone[Ref{IP: b.Binding.IP, Generation: b.Binding.Generation}] = true
			}
		}
	}
	for _, out := range o.last[i:] {
		switch out := out.(type) {
		case SendToVerifier:
			if s := o.streams[out.Stream]; s != nil {
				o.unsent(s, out.Message)
			}
		case Activate:
			if out.Again {
				o.emit(out) // it is active, and the record was about something else
			} else {
				o.deactivate(out)
			}
		case OwnerLog:
			e := out.Entry
			if e.Kind == LogActivation || e.Kind == LogGrant && undone[Ref{IP: e.IP, Generation: e.Generation}] {
				continue // it did not happen
			}
			o.emit(out)
		case CloseVerifier, CloseEndpoint, Rejected:
			o.emit(out)
		case Journal:
			// What the record was to precede was not done, and a lost end
			// costs only time; but what belongs to the start is said again.
			r := out.Record
			if r.Kind == RecordWait || r.Kind == RecordBound && o.holds(r) {
				o.unsaid = append(o.unsaid, r)
			}
			if r.Kind == RecordGrant {
				// It stays in the books, and goes with the session; but see unsent.
				if v := o.verifiers[r.Verifier]; v != nil {
					if g := o.find(v, r.VerifierBoot, r.IP, r.Generation); g != nil {
						g.unsaid = true
					}
				}
			}
		case OwnerTimer:
			// Asked for again, see setTimer.
		}
	}
}

// unsent: this was not sent, since a record before it could not be journalled.
func (o *Owner) unsent(s *ownerStream, m Message) {
	switch m := m.(type) {
	case Binding:
		// What the verifier held when this session began was journalled before
		// its Welcome, or is not in the books any more. So a grant that the
		// journal lacks is this Confirm's, and the verifier never heard of it.
		if g := o.find(s.v, s.boot, m.Binding.IP, m.Binding.Generation); g != nil && g.unsaid {
			o.unbook(g)
		}
		o.refuse(s, m.Confirm, m.Binding.IP, RefusedBusy)
	case Bound:
		o.rememberRefusal(s.v, m.IP) // the IP is not bound; the verifier waits for nothing
	default:
		// The stream is in order or it is nothing: a Revoke or a Welcome may
		// be missing from it.
		o.breakStream(s, "the journal failed")
	}
}

// holds tells whether the record's binding was in force before this process.
func (o *Owner) holds(r Record) bool {
	w := o.workloads[r.UID]
	return w != nil && w.state != WorkloadQuarantined && w.gen == r.Generation && w.adopted
}

// deactivate puts back a workload whose Activate was dropped.
func (o *Owner) deactivate(out Activate) {
	w := o.workloads[out.UID]
	if w == nil || w.state != WorkloadActive || w.gen != out.Generation {
		return
	}
	w.state, w.gen = WorkloadQuarantined, 0
	w.retry = o.now.Add(sweepEvery)
	o.waiting = append(o.waiting, w)
	for _, ip := range w.IPs {
		a := o.ips[ip]
		a.holder, a.next = nil, w
	}
}
