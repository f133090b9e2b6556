package agent

import (
	"maps"
	"testing"
	"time"

	"portcullis/bpf/abi"
	"portcullis/observe/audit"
)

// A flow counts once at each endpoint that admits it, by what was known of its
// other side; what did not pass, and replies, count nothing.
func TestCoverage(t *testing.T) {
	start := time.Unix(1000, 0)
	c := coverage{since: start}
	event := func(v abi.Verdict, s abi.FlowState, e abi.Evidence, flags abi.EventFlag) {
		c.count(&abi.Event{Verdict: uint8(v), State: uint8(s), Evidence: uint8(e), Flags: uint8(flags)})
	}
	event(abi.VerdictPass, abi.FlowNew, abi.EvidenceSvid, 0)
	event(abi.VerdictPass, abi.FlowNew, abi.EvidenceSvid, abi.EventReinjected)
	event(abi.VerdictPass, abi.FlowReply, abi.EvidenceSvid, 0)
	event(abi.VerdictPass, abi.FlowEstablished, abi.EvidenceSvid, abi.EventLater) // it goes on
	event(abi.VerdictAudit, abi.FlowEstablished, abi.EvidenceSvid, abi.EventLater)
	event(abi.VerdictPass, abi.FlowNew, abi.EvidenceLease, 0)
	event(abi.VerdictPass, abi.FlowNew, abi.EvidenceLease, abi.EventNoEvidence)
	event(abi.VerdictDrop, abi.FlowNew, abi.EvidenceLease, 0)
	event(abi.VerdictHold, abi.FlowNew, abi.EvidenceNone, 0)
	event(abi.VerdictAudit, abi.FlowNew, abi.EvidenceLease, 0)
	event(abi.VerdictPass, abi.FlowNew, abi.EvidenceMax, 0) // of no program of ours

	got := c.take(start.Add(time.Minute), 7)
	want := map[string]uint64{"svid": 2, "lease": 1, audit.FlowsNeedless: 1, audit.FlowsAudited: 1}
	if !maps.Equal(got.Flows, want) || got.Seconds != 60 || got.Lost != 7 {
		t.Errorf("%+v, want %v", got, want)
	}
	if got = c.take(start.Add(90*time.Second), 9); len(got.Flows) != 0 || got.Seconds != 30 || got.Lost != 2 {
		t.Errorf("the second time: %+v", got)
	}
}
