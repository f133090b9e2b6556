package agent

import (
	"fmt"
	"sync/atomic"
	"time"

	"portcullis/bpf/abi"
	"portcullis/observe/audit"
)

// coverageEvery is how often the confirmation log is told on what evidence flows
// were admitted.
const coverageEvery = time.Minute

// coverage counts admitted flows by the evidence of the peer's binding. count is
// called by the reader of events, the rest by the loop.
type coverage struct {
	byEvidence [abi.EvidenceMax]atomic.Uint64
	needless   atomic.Uint64 // the verdict is the same whoever the peer is
	audited    atomic.Uint64 // policy would have dropped it

	since time.Time // of the counts; touched by the loop alone
	lost  uint64    // events that were lost, or not told, before them; the same
}

// count takes an event of the datapath: a flow's first packet that passes, once
// at each endpoint that judges it.
func (c *coverage) count(ev *abi.Event) {
	switch {
	case abi.FlowState(ev.State) == abi.FlowReply || ev.Flags&uint8(abi.EventLater) != 0:
	case abi.Verdict(ev.Verdict) == abi.VerdictAudit:
		c.audited.Add(1)
	case abi.Verdict(ev.Verdict) != abi.VerdictPass && abi.Verdict(ev.Verdict) != abi.VerdictSteer:
	case ev.Flags&uint8(abi.EventNoEvidence) != 0:
		c.needless.Add(1)
	case int(ev.Evidence) < len(c.byEvidence):
		c.byEvidence[ev.Evidence].Add(1)
	}
}

// take returns the counts since the last time, and begins anew. lost is how many
// events have been lost in all.
func (c *coverage) take(now time.Time, lost uint64) audit.Coverage {
	out := audit.Coverage{Flows: map[string]uint64{}, Seconds: now.Sub(c.since).Seconds(), Lost: lost - min(lost, c.lost)}
	c.since, c.lost = now, lost
	add := func(name string, n *atomic.Uint64) {
		if v := n.Swap(0); v > 0 {
			out.Flows[name] = v
		}
	}
	for e := range c.byEvidence {
		add(abi.Evidence(e).String(), &c.byEvidence[e])
	}
	add(audit.FlowsNeedless, &c.needless)
	add(audit.FlowsAudited, &c.audited)
	return out
}

// recordCoverage puts the counts into the confirmation log when it is time, and
// at the end; of a time without flows nothing.
func (l *loop) recordCoverage(now time.Time, end bool) {
	if !end && now.Sub(l.coverage.since) < coverageEvery {
		return
	}
	counts := l.coverage.take(now, l.dp.State().LostEvents()+l.dp.State().LimitedEvents())
	if len(counts.Flows) == 0 && counts.Lost == 0 {
		return
	}
	if err := l.audit.AppendCoverage(counts); err != nil {
		l.alarms.raise("confirmation-log", fmt.Sprintf("a line of the confirmation log is lost: %v", err))
	}
}
