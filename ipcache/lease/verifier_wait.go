package lease

import (
	"net/netip"
	"slices"
	"time"

	"portcullis/ipcache"
)

// want: a packet is held for the IP.
func (v *Verifier) want(in Want) {
	owner := in.Owner
	if e, ok := v.table.Get(in.IP); ok {
		if e.Lease < ipcache.LeaseFirst {
			v.emit(Answer{IP: in.IP, Live: true}) // local: no lease, no earlier holder's packets
			return
		}
		owner = e.Binding.Owner
		if v.live(e) {
			v.touch(e.Slot)
			v.emit(Answer{IP: in.IP, Live: true, NotBefore: v.uses[e.Slot].notBefore})
			return
		}
	}
	if owner == "" || owner == v.cfg.Node {
		v.emit(Answer{IP: in.IP, Asked: v.now, Why: UnansweredNoOwner})
		return
	}
	w := v.waits[in.IP]
	if w == nil {
		if len(v.waits) >= v.cfg.Waits {
			v.emit(Answer{IP: in.IP, Asked: v.now, Why: UnansweredWaitsFull})
			return
		}
		p := v.peer(owner)
		w = &wait{ip: in.IP, peer: p}
		v.waits[in.IP] = w
		p.waits = append(p.waits, w)
		// Somebody waits: do not sit out a long backoff.
		if soon := v.now.Add(firstRetry); p.state == PeerBackoff && p.retryAt > soon {
			p.retryAt = soon
		}
	}
	w.newest = later(w.newest, in.Arrival)
	v.ask(w)
}

// unwant: nobody waits for the IP, nor for a proof of its binding.
func (v *Verifier) unwant(ip netip.Addr) {
	if w := v.waits[ip]; w != nil {
		v.unwait(w)
	}
	if e, ok := v.table.Get(ip); ok {
		if p := v.proofs[e.Slot]; p != nil && p.stamp == e.Stamp {
			p.waits, p.newest = false, 0
		}
	}
}

func (v *Verifier) unwait(w *wait) {
	delete(v.waits, w.ip)
	w.peer.waits = slices.DeleteFunc(w.peer.waits, func(x *wait) bool { return x == w })
}

// ask moves a wait on, if anything can be done for it now.
func (v *Verifier) ask(w *wait) {
	p := w.peer
	if p.state != PeerOpen {
		return // tick opens the session
	}
	if e, ok := v.table.Get(w.ip); ok && e.Binding.Owner == p.name {
		// The slot is there, its lease is not: only a heartbeat helps.
		if len(p.pings) == 0 {
			v.beat(p, v.cfg.TTL)
		}
		return
	}
	if _, asked := p.confirms[w.ip]; asked {
		return // asked once is enough
	}
	if n, ok := v.negative[w.ip]; ok {
		if v.now < n.until {
			if v.nextAsk == 0 || n.until < v.nextAsk {
				v.nextAsk = n.until
			}
			return // held, and asked again at its end or at Bound
		}
		delete(v.negative, w.ip)
	}
	v.confirm(p, w.ip)
}

func (v *Verifier) confirm(p *peer, ip netip.Addr) {
	if p.state != PeerOpen {
		return
	}
	if len(p.confirms) >= maxConfirms {
		// Its waits have come and gone: it answers heartbeats alone.
		v.closePeer(p, "confirms are not answered")
		return
	}
	v.nextID++
	p.confirms[ip] = confirm{id: v.nextID, sent: v.now}
	v.emit(SendToOwner{p.stream, Confirm{ID: v.nextID, IP: ip}})
}

// answer ends the wait of an IP whose slot and lease are live.
func (v *Verifier) answer(e ipcache.Entry) {
	w := v.waits[e.Binding.IP]
	if w == nil || !v.live(e) {
		return
	}
	v.touch(e.Slot)
	v.emit(Answer{IP: w.ip, Live: true, NotBefore: v.uses[e.Slot].notBefore})
	v.unwait(w)
}

// refuse ends the holds that arrived before the Confirm was sent. Later ones
// stay, and are asked again: the refusal was made before they were.
func (v *Verifier) refuse(ip netip.Addr, asked Time, why Unanswered, r Refusal) {
	w := v.waits[ip]
	if w == nil {
		return
	}
	w.refused, w.full = r, why == UnansweredMapFull
	v.emit(Answer{IP: ip, Asked: asked, Why: why, Refusal: r})
	if w.newest <= asked {
		v.unwait(w)
		return
	}
	if why != UnansweredMapFull {
		v.ask(w)
	}
}

func (v *Verifier) remember(ip netip.Addr, r Refusal, d time.Duration) {
	if len(v.negative) >= maxNegatives {
		for ip, n := range v.negative {
			if v.now >= n.until {
				delete(v.negative, ip)
			}
		}
		if len(v.negative) >= maxNegatives {
			return // it may be forgotten: the owner is asked once more
		}
	}
	v.negative[ip] = negative{until: v.now.Add(d), reason: r}
}

// ProofReason returns why the binding of an IP is not proved; 0: it is, or is
// being asked for.
func (v *Verifier) ProofReason(ip netip.Addr) ProofRefusal {
	if e, ok := v.table.Get(ip); ok {
		if p := v.proofs[e.Slot]; p != nil && p.stamp == e.Stamp && !v.proved(p) {
			return p.reason
		}
	}
	return 0
}

// Reason implements VerifierMachine.
func (v *Verifier) Reason(ip netip.Addr) (Unanswered, Refusal) {
	w := v.waits[ip]
	switch {
	case w != nil && w.peer.state != PeerOpen:
		return UnansweredNoSession, 0
	case w != nil && w.full:
		return UnansweredMapFull, 0
	case w != nil && w.refused != 0:
		return AnsweredRefused, w.refused
	}
	if n, ok := v.negative[ip]; ok && v.now < n.until {
		return AnsweredRefused, n.reason
	}
	return UnansweredTimeout, 0
}
