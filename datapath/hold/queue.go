package hold

import (
	"math"
	"net/netip"
	"time"

	"portcullis/bpf/abi"
	"portcullis/datapath"
)

// Record is one held packet.
type Record = datapath.HeldPacket

// Ended is a hold that ended without its packet being let go.
type Ended struct {
	Record
	Why abi.Reason // never ReasonNone
}

// Limits bound a Queue. 0 takes the default.
type Limits struct {
	PerEndpoint int           // packets per local endpoint; default 64
	PerSource   int           // packets per peer IP, at from_workload also per endpoint; default 16
	Total       int           // packets; default 4096
	Bytes       int           // of packets; default 64 MiB
	Timeout     time.Duration // from arrival at the hook; default 1 s
	// Refused is how long, from its arrival, a workload's call that its
	// peer's owner refused keeps its place; default 250 ms. See Queue.
	Refused time.Duration
}

func (l Limits) withDefaults() Limits {
	def := func(p *int, v int) {
		if *p <= 0 {
			*p = v
		}
	}
	def(&l.PerEndpoint, 64)
	def(&l.PerSource, 16)
	def(&l.Total, 4096)
	def(&l.Bytes, 64<<20)
	if l.Timeout <= 0 {
		l.Timeout = time.Second
	}
	if l.Refused <= 0 {
		l.Refused = 250 * time.Millisecond
	}
	return l
}

// Queue holds packets by the IP whose binding they wait for. Every record
// given to Add ends exactly once: by Add itself (no room), Answer, Refuse,
// Expire, DropEndpoint or DropAll; at that moment, and not before, it is given
// back to the kernel's quota.
//
// What a workload sends and its peer's owner refuses is given back later, one
// after the other: its packet is gone, its place is not yet free. A refusal
// comes within a millisecond, so a workload that calls addresses which nobody
// has would else have as many of them held in a second as agents can answer,
// and all other workloads' first contacts would wait behind. So it has
// PerEndpoint in Limits.Refused, evenly, and the kernel drops what is over.
type Queue struct {
	limits   Limits
	giveBack func(holdIndex, source uint32)

	refused  places           // whose places are given back later, the next first
	lastFree map[uint32]int64 // hold index -> when the last of them is; only of those in refused

	byIP       map[netip.Addr]*waiting
	byEndpoint map[uint32]int // packets; an entry of 0 is deleted
	bySource   map[source]int // the same
	first      *entry         // of all, oldest Add first
	last       *entry
	packets    int
	bytes      int
}

// waiting are the holds of one IP. It never is empty.
type waiting struct {
	entries []*entry   // in the order of Add: the order of the ring
	why     abi.Reason // what they are dropped for when they time out
}

type entry struct {
	rec        Record
	deadline   int64
	prev, next *entry
}

// NewQueue returns an empty queue. giveBack is called once for each hold that
// ends, with its hold index and source (datapath.ReleaseHold in the product); it must not
// fail and must not call the queue.
func NewQueue(l Limits, giveBack func(holdIndex, source uint32)) *Queue {
	return &Queue{limits: l.withDefaults(), giveBack: giveBack, byIP: map[netip.Addr]*waiting{},
		byEndpoint: map[uint32]int{}, bySource: map[source]int{}, lastFree: map[uint32]int64{}}
}

// source is whose packets share a limit: a remote address; and of what
// workloads send, each workload's calls to one address, so that one cannot use
// up another's.
type source struct {
	peer     netip.Addr
	endpoint uint32 // 0 at to_workload
}

func sourceOf(r *Record) source {
	if r.Direction == abi.DirEgress {
		return source{r.Peer, r.Endpoint}
	}
	return source{peer: r.Peer}
}

// Len returns how many packets are held.
func (q *Queue) Len() int { return q.packets }

// Waits reports whether packets wait for the IP.
func (q *Queue) Waits(ip netip.Addr) bool { return q.byIP[ip] != nil }

// Add holds a packet. ask reports that it is the only one of its IP, so that
// nobody has asked for the IP yet. When a limit is reached the packet ends at
// once (hold-overflow), those that wait already keep their place: a storm
// never pushes out an earlier first contact. dropped is nil otherwise.
func (q *Queue) Add(rec Record) (ask bool, dropped *Ended) {
	w := q.byIP[rec.Peer]
	if q.packets >= q.limits.Total || q.bytes+len(rec.Packet) > q.limits.Bytes ||
		q.byEndpoint[rec.Endpoint] >= q.limits.PerEndpoint ||
		q.bySource[sourceOf(&rec)] >= q.limits.PerSource {
		q.giveBack(rec.HoldIndex, rec.Source)
		return false, &Ended{Record: rec, Why: abi.ReasonHoldOverflow}
	}
	if w == nil {
		w = &waiting{why: abi.ReasonHoldTimeout}
		q.byIP[rec.Peer] = w
	}
	e := &entry{rec: rec, deadline: rec.Arrival + int64(q.limits.Timeout), prev: q.last}
	if q.last != nil {
		q.last.next = e
	} else {
		q.first = e
	}
	q.last = e
	w.entries = append(w.entries, e)
	q.packets++
	q.bytes += len(rec.Packet)
	q.byEndpoint[rec.Endpoint]++
	q.bySource[sourceOf(&rec)]++
	return len(w.entries) == 1, nil
}

// Answer ends the holds of an IP whose slot and lease are live, but for those that
// wait for a proof. inject are the
// packets that arrived after notBefore, in their order; they are to be sent
// before anything else is done for this IP. drop are the others: the previous
// holder of the IP may have sent them (generation-changed).
func (q *Queue) Answer(ip netip.Addr, notBefore int64) (inject []Record, drop []Ended) {
	return q.release(ip, func(r *Record) bool { return !weak(r) }, func(r *Record) bool {
		return r.Arrival > notBefore // equal is not later: the safe side is to drop
	})
}

// weak tells whether the packet waits for a proof: its peer was known when it
// came, and not well enough.
func weak(r *Record) bool { return r.Reason == abi.ReasonEvidenceTooWeak }

// Proved ends the holds of an IP that wait for a proof, now that its binding under
// this stamp has one. inject are those that were judged under this stamp, and of
// those without one what arrived after notBefore. They are to be sent before
// anything else is done for this IP. drop are the others (generation-changed).
func (q *Queue) Proved(ip netip.Addr, stamp uint64, notBefore int64) (inject []Record, drop []Ended) {
	return q.release(ip, weak, func(r *Record) bool {
		return r.Stamp == stamp || r.Stamp == 0 && r.Arrival > notBefore
	})
}

// release ends those holds of an IP that are meant, and tells which of them are to
// go on.
func (q *Queue) release(ip netip.Addr, meant, on func(*Record) bool) (inject []Record, drop []Ended) {
	w := q.byIP[ip]
	if w == nil {
		return nil, nil
	}
	kept := w.entries[:0]
	for _, e := range w.entries {
		if !meant(&e.rec) {
			kept = append(kept, e)
			continue
		}
		q.end(e)
		q.freePlace(&e.rec)
		if on(&e.rec) {
			inject = append(inject, e.rec)
		} else {
			drop = append(drop, Ended{Record: e.rec, Why: abi.ReasonGenerationChanged})
		}
	}
	clear(w.entries[len(kept):])
	if w.entries = kept; len(kept) == 0 {
		delete(q.byIP, ip)
	}
	return inject, drop
}

// Unproved ends the holds of an IP that wait for a proof and arrived before
// arrivedBefore: there is none (evidence-too-weak). With gone, the binding that
// they were judged under is no more: those of this stamp end, whenever they came
// (generation-changed).
func (q *Queue) Unproved(ip netip.Addr, stamp uint64, arrivedBefore int64, gone bool) (drop []Ended) {
	w := q.byIP[ip]
	if w == nil {
		return nil
	}
	if gone {
		return q.filter(ip, w, abi.ReasonGenerationChanged, q.freePlace, func(r *Record) bool { return weak(r) && r.Stamp == stamp })
	}
	return q.filter(ip, w, abi.ReasonEvidenceTooWeak, q.keepPlace, func(r *Record) bool { return weak(r) && r.Arrival < arrivedBefore })
}

// Refuse ends the holds of an IP that arrived before arrivedBefore, for the
// reason given. What workloads sent keeps its place a while (see Queue). remaining reports that later ones stay held: they are to be
// asked for again. If they time out, it is for this reason.
func (q *Queue) Refuse(ip netip.Addr, arrivedBefore int64, why abi.Reason) (drop []Ended, remaining bool) {
	why = aReason(why)
	w := q.byIP[ip]
	if w == nil {
		return nil, false
	}
	w.why = why
	drop = q.filter(ip, w, why, q.keepPlace, func(r *Record) bool { return !weak(r) && r.Arrival < arrivedBefore })
	return drop, q.byIP[ip] != nil
}

// Note sets what the holds of an IP are dropped for if they time out, for
// instance owner-unreachable while no session can be made.
func (q *Queue) Note(ip netip.Addr, why abi.Reason) {
	if w := q.byIP[ip]; w != nil {
		w.why = aReason(why)
	}
}

// Expire ends the holds whose time is over at now (CLOCK_BOOTTIME ns), and
// gives back the places whose time is. gone are the IPs for which nobody waits
// any more.
func (q *Queue) Expire(now int64) (drop []Ended, gone []netip.Addr) {
	for len(q.refused) > 0 && q.refused[0].free <= now {
		q.freeNext()
	}
	for q.first != nil && q.first.deadline <= now {
		e := q.first
		w := q.byIP[e.rec.Peer]
		// The oldest of all is the oldest of its IP.
		w.entries[0] = nil
		w.entries = w.entries[1:]
		q.end(e)
		q.freePlace(&e.rec)
		drop = append(drop, Ended{Record: e.rec, Why: w.why})
		if len(w.entries) == 0 {
			delete(q.byIP, e.rec.Peer)
			gone = append(gone, e.rec.Peer)
		}
	}
	return drop, gone
}

// Next returns when Expire is to be called (CLOCK_BOOTTIME ns); ok is false
// when nothing is held and no place kept.
func (q *Queue) Next() (at int64, ok bool) {
	if q.first != nil {
		at, ok = q.first.deadline, true
	}
	if len(q.refused) > 0 && (!ok || q.refused[0].free < at) {
		at, ok = q.refused[0].free, true
	}
	return at, ok
}

// DropEndpoint ends all holds of an endpoint that is going away. gone are the
// IPs for which nobody waits any more.
func (q *Queue) DropEndpoint(id uint32, why abi.Reason) (drop []Ended, gone []netip.Addr) {
	why = aReason(why)
	for ip, w := range q.byIP {
		d := q.filter(ip, w, why, q.freePlace, func(r *Record) bool { return r.Endpoint == id })
		if len(d) > 0 && q.byIP[ip] == nil {
			gone = append(gone, ip)
		}
		drop = append(drop, d...)
	}
	return drop, gone
}

// DropAll ends every hold and frees every place, at the end of the agent.
func (q *Queue) DropAll(why abi.Reason) []Ended {
	why = aReason(why)
	drop, _ := q.Expire(math.MaxInt64)
	for i := range drop {
		drop[i].Why = why
	}
	return drop
}

// filter ends those holds of one IP for which end is true; place does with
// their places what is to be done.
func (q *Queue) filter(ip netip.Addr, w *waiting, why abi.Reason, place func(*Record), end func(*Record) bool) (drop []Ended) {
	kept := make([]*entry, 0, len(w.entries))
	for _, e := range w.entries {
		if end(&e.rec) {
			q.end(e)
			place(&e.rec)
			drop = append(drop, Ended{Record: e.rec, Why: why})
		} else {
			kept = append(kept, e)
		}
	}
	if w.entries = kept; len(kept) == 0 {
		delete(q.byIP, ip)
	}
	return drop
}

// end takes an entry off the books, but for its IP's list and its place.
func (q *Queue) end(e *entry) {
	if e.prev != nil {
		e.prev.next = e.next
	} else {
		q.first = e.next
	}
	if e.next != nil {
		e.next.prev = e.prev
	} else {
		q.last = e.prev
	}
	e.prev, e.next = nil, nil
	q.packets--
	q.bytes -= len(e.rec.Packet)
	if q.byEndpoint[e.rec.Endpoint]--; q.byEndpoint[e.rec.Endpoint] == 0 {
		delete(q.byEndpoint, e.rec.Endpoint)
	}
	s := sourceOf(&e.rec)
	if q.bySource[s]--; q.bySource[s] == 0 {
		delete(q.bySource, s)
	}
}

// aReason keeps a drop from having none (I6).
func aReason(why abi.Reason) abi.Reason {
	if why == abi.ReasonNone || why >= abi.ReasonMax {
		return abi.ReasonHoldTimeout
	}
	return why
}
