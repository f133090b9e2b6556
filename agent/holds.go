package agent

import (
	"errors"
	"net/netip"

	"go.uber.org/zap"

	"portcullis/bpf/abi"
	"portcullis/datapath"
	"portcullis/datapath/hold"
	"portcullis/identity"
	"portcullis/ipcache/lease"
	"portcullis/observe/flow"
)

// held takes a packet from the ring: keep it, and ask its peer's owner. A copy
// of one that passed under audit goes the same way, up to where the packet
// would be sent or counted as dropped: both were done with it.
func (l *loop) held(r hold.Record) {
	if !r.Passed {
		l.heldTotal++
	}
	e := l.byEndpointID[r.Endpoint]
	if e == nil || e.state != abi.EPActive || lease.Time(r.Arrival) <= e.relabelled {
		// Its endpoint ended, waits, or became another's, since the kernel
		// copied it.
		l.dp.ReleaseHold(r.HoldIndex, r.Source)
		l.countDrops(hold.Ended{Record: r, Why: abi.ReasonQuarantined})
		return
	}
	_, dropped := l.holds.Add(r)
	if dropped != nil {
		l.countDrops(*dropped)
		return
	}
	if r.Reason == abi.ReasonEvidenceTooWeak {
		l.wantProof(r)
		return
	}
	// Asked for each packet, not only the first: the arrival times matter to
	// the verifier machine, which de-duplicates.
	l.stepVerifier(lease.Want{IP: r.Peer, Owner: l.nodeOf(r.Peer), Arrival: lease.Time(r.Arrival)})
}

// answer ends the wait for an IP as the verifier machine says.
func (l *loop) answer(a lease.Answer) {
	if a.Live {
		inject, drop := l.holds.Answer(a.IP, int64(a.NotBefore))
		for _, r := range inject {
			l.inject(r)
		}
		l.endHolds(drop, nil)
		return
	}
	why := unansweredReason(a.Why, a.Refusal)
	switch a.Why {
	case lease.UnansweredMapFull:
		if l.unrecorded() || l.unkept {
			why = abi.ReasonRefused // by this agent, see install: no map is full
			break
		}
		l.alarms.raise("map-full", l.noRoom(l.nodeOf(a.IP)))
	case lease.UnansweredWaitsFull:
		l.alarms.raise("waits-full", "so many addresses are waited for at a time that no further one is asked for: find who calls them in the flow records (reason hold-overflow)")
	}
	drop, _ := l.holds.Refuse(a.IP, int64(a.Asked), why)
	l.endHolds(drop, nil)
}

// unansweredReason maps why there is no binding to its one drop reason.
func unansweredReason(why lease.Unanswered, refusal lease.Refusal) abi.Reason {
	switch why {
	case lease.AnsweredRefused:
		if refusal == lease.RefusedConflict {
			return abi.ReasonConflict
		}
		return abi.ReasonRefused
	case lease.UnansweredNoOwner:
		return abi.ReasonUnbound
	case lease.UnansweredNoSession:
		return abi.ReasonOwnerUnreachable
	case lease.UnansweredMapFull:
		return abi.ReasonMapFull
	case lease.UnansweredWaitsFull:
		return abi.ReasonHoldOverflow
	case lease.UnansweredStale:
		return abi.ReasonStaleLease
	}
	return abi.ReasonHoldTimeout
}

// inject sends a held packet back to the hook that held it, where it is judged
// again. A failure is a drop: the packet is not sent any other way. ErrDropped
// is the program's own verdict, which it has counted, or else a full queue of
// the device, which nobody has: the two cannot be told apart here, so they have
// a count of their own (I6). Of a packet that is turned round the kernel does
// not tell: it counts as re-injected, whatever the program says then.
func (l *loop) inject(r hold.Record) {
	if r.Passed {
		return
	}
	l.heldTimes.put(&r, l.now().Sub(lease.Time(r.Arrival))) // the event may come before Inject returns
	err := l.injector.Inject(r)
	if errors.Is(err, hold.ErrDropped) {
		l.notTaken++
		return
	}
	if err != nil {
		l.log.Warn("re-inject a held packet", zap.Stringer("peer", r.Peer), zap.Error(err))
		l.countDrops(hold.Ended{Record: r, Why: abi.ReasonHoldTimeout})
		return
	}
	l.reinjected++
	l.instruments.FirstContact(l.now().Sub(lease.Time(r.Arrival)))
}

// endHolds accounts for holds that ended in a drop, and tells the verifier
// machine of whom nobody waits for any more.
func (l *loop) endHolds(drop []hold.Ended, gone []netip.Addr) {
	l.countDrops(drop...)
	for _, ip := range gone {
		l.stepVerifier(lease.Unwant{IP: ip})
	}
}

// expireHolds ends the holds whose time is over. The reason is decided now:
// without a session in force the owner could not be reached.
func (l *loop) expireHolds(now lease.Time) {
	drop, gone := l.holds.Expire(int64(now))
	for i := range drop {
		if drop[i].Reason == abi.ReasonEvidenceTooWeak {
			drop[i].Why = l.unprovedReason(drop[i].Peer)
			continue
		}
		if drop[i].Why != abi.ReasonHoldTimeout {
			continue
		}
		drop[i].Why = unansweredReason(l.verifier.Reason(drop[i].Peer))
	}
	l.endHolds(drop, gone)
}

// countDrops counts drops that user space decided and publishes their flow
// records (I6).
func (l *loop) countDrops(drops ...hold.Ended) {
	for _, d := range drops {
		if d.Passed {
			continue
		}
		l.heldDropped++
		l.dp.CountDrop(d.Direction, d.Why)
		ev := abi.Event{Time: uint64(l.now()), Src: datapath.Addr(d.Peer), Dst: datapath.Addr(d.Local),
			Sport: d.Sport, Dport: d.Dport, Ifindex: d.Ifindex, Endpoint: d.Endpoint, Len: uint32(len(d.Packet)),
			Proto: d.Proto, Direction: uint8(d.Direction), Verdict: uint8(abi.VerdictDrop), Reason: uint8(d.Why)}
		if e := l.byEndpointID[d.Endpoint]; e != nil {
			ev.DstIdentity = uint32(e.numeric)
		}
		ev.IcmpType = flow.EchoOf(d.Proto, d.Sport, d.Dport) // of ICMP only echoes are held
		ev.SrcIdentity = uint32(identity.NumUnknown)
		if d.Direction == abi.DirEgress {
			ev.Src, ev.Dst = ev.Dst, ev.Src
			ev.SrcIdentity, ev.DstIdentity = ev.DstIdentity, ev.SrcIdentity
		}
		rec := flow.FromEvent(ev, l.resolver())
		rec.Held = max(0, l.now().Sub(lease.Time(d.Arrival)))
		l.monitors.publish(rec)
	}
}
