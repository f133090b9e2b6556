package sim

import (
	"time"

	"portcullis/ipcache/lease"
)

func (w *World) ceaseFaults() {
	w.log("faults cease")
	w.calmed = true
	w.storeFaults, w.journalFaults = 0, 0
	clear(w.cuts)
	for _, s := range w.streams {
		s.slowV, s.slowO = 0, 0
	}
	for _, n := range w.nodes {
		n.paused = 0
		if n.agent == nil {
			n.start()
		}
	}
}

// converge gives the agents twice the TTL, and wants every live binding
// everywhere. Each that was live at the beginning must be confirmed (I3).
func (w *World) converge() {
	w.drain() // ADDs and DELs that were on their way
	begin := w.real
	live := map[int]*workload{}
	for i := range w.ips {
		for _, u := range w.ips[i].recent {
			if u.active {
				live[i] = u
			}
		}
	}
	w.calm(w.real + 2*int64(w.ttl)*1000/894)
	for _, i := range w.order {
		for _, v := range w.nodes {
			// An idle one may be gone again. What is believed gets no packet
			// here, so its last use may be from long before.
			if idled, ok := v.idled[live[i]]; ok && idled >= begin {
				continue
			}
			if u := live[i]; u != nil && u.active && u.node != v && w.grants == 0 && !v.believes(u) &&
				(w.idle > 2*w.ttl || u.lastLive[v.index] < begin) {
				w.violate("I3", "%s has not confirmed %s after 2 x TTL without faults", v.name, u.name)
			}
		}
	}
	if w.prove != proveNone {
		w.calm(w.real + int64(time.Second))
		w.wantProofs()
		w.drain()
		w.provedAll()
	}
}

// converge2 gives the owners as long as the longest wait takes: then nobody
// is quarantined any more.
func (w *World) converge2() {
	long := lease.MaxLease + lease.MaxLease/4 + w.margin
	w.calm(w.real + int64(long)*1000/894 + int64(w.margin))
	for _, n := range w.nodes {
		for _, e := range n.k.endpoints {
			if !e.active {
				w.violate("I3", "%s is still quarantined", e.w.name)
			}
		}
	}
}

func (n *node) believes(u *workload) bool {
	for i := range n.k.slots {
		if s := &n.k.slots[i]; s.of == u && n.live(s) {
			return true
		}
	}
	return false
}

// calm lets everything happen as it should until then.
func (w *World) calm(until int64) {
	period := int64(w.ttl / 8)
	next := w.real
	for w.violation == nil && w.real < until {
		if w.real >= next {
			next = w.real + period
			w.sendAll()
		}
		w.drain()
		t := min(w.nextChange(), next, until)
		w.advance(max(t-w.real, 1))
	}
}

// sendAll sends a packet wherever a live binding is not believed in yet.
func (w *World) sendAll() {
	for i := range w.ips {
		for _, u := range w.ips[i].recent {
			for _, v := range w.nodes {
				if u.active && v != u.node && !v.believes(u) {
					w.send(u, v)
				}
			}
		}
	}
	if w.prove != proveNone {
		w.wantProofs()
	}
	for _, n := range w.nodes {
		n.agent.expireHolds()
	}
}

// drain does whatever can be done without time passing.
func (w *World) drain() {
	for budget := 20_000; ; budget-- {
		if budget == 0 {
			w.violate("I3", "the agents never come to rest")
			return
		}
		did := false
		for _, n := range w.nodes {
			a := n.agent
			switch {
			case len(a.pending) > 0:
				a.flush(len(a.pending))
			case len(a.inbox) > 0:
				a.local()
			case len(a.ring) > 0:
				a.readRing()
			case a.tickDue():
			default:
				continue
			}
			did = true
		}
		if hs := w.hops(); len(hs) > 0 {
			w.hop(hs[0])
			did = true
		}
		if !did || w.violation != nil {
			return
		}
	}
}
