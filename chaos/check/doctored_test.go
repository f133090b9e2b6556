package check_test

import (
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"testing"
	"time"

	"portcullis/chaos/check"
)

// another adds a second IP that is used again, so that a history shows something
// whatever becomes of the first.
func another(h *check.History) {
	for i, at := range []int64{2 * ms, 300 * ms} {
		w := check.Workload{UID: fmt.Sprintf("more%d", i), Node: "n1", IPs: []netip.Addr{addr("10.1.1.50")}, Made: at, Asked: at, Ready: at + ms,
			Names: []check.Name{{Identity: fmt.Sprintf("sleep-v%d", i+1), Since: at, Sure: at}}}
		if i == 0 {
			w.Left, w.Gone = 200*ms, 201*ms
		}
		h.Workloads = append(h.Workloads, w)
	}
}

// rogue is a history in which the owner's agent at node is killed, and the
// workload "new" is put on the IP of "old" meanwhile, nobody being told. It comes
// to be received once, after a time.
func rogue(t *testing.T, node string, received int64, doctor func(*check.History)) *check.Result {
	t.Helper()
	h := story()
	another(h)
	h.Faults = []check.Fault{{Kind: "rogue-owner", Nodes: []string{node}, From: 3900 * ms, Began: 3910 * ms, To: 9000 * ms, Ended: 9100 * ms, Lease: time.Second, Impairs: true, Rogue: true}}
	w := &h.Workloads[2]
	w.Names, w.Asked, w.Ready, w.Quarantined = nil, 0, 0, 0
	m := first(h, "new", "udp", received)
	m.Received = []check.Receipt{{UID: "hello", At: m.Sent + ms}}
	if doctor != nil {
		doctor(h)
	}
	r, err := check.Check(h)
	if err != nil {
		t.Fatal(err)
	}
	return r
}

// What a rogue owner puts on a dead workload's IP may be taken for the dead one
// until the leases have ended, and no longer; and only there.
func TestRogueOwner(t *testing.T) {
	if r := rogue(t, "n1", 4300*ms, nil); r.Verdict != check.Held || r.Excused != 1 || r.Admitted.Impostor != 0 {
		t.Errorf("while its leases last: %s, %d excused, %v", r.Verdict, r.Excused, r.Violations)
	}
	if r := rogue(t, "n1", 5500*ms, nil); r.Verdict != check.Violated || r.Excused != 0 || r.Violations[0].Invariant != check.UnknownWorld {
		t.Errorf("when they have ended: %s, %d excused, %v", r.Verdict, r.Excused, r.Violations)
	}
	if r := rogue(t, "n2", 4300*ms, nil); r.Verdict != check.Violated || r.Excused != 0 {
		t.Errorf("another node's fault: %s, %d excused", r.Verdict, r.Excused)
	}
}

// A receipt that a busy machine noted late is no violation while the owner is away;
// when it is back, what it sent before may have been let go as the next holder's.
func TestRogueOwnerLateReceipt(t *testing.T) {
	late := func(at int64) func(*check.History) {
		return func(h *check.History) {
			for i := range h.Messages {
				if m := &h.Messages[i]; m.Sender == "new" && len(m.Received) > 0 {
					m.Received[0].At = at
				}
			}
		}
	}
	// The leases end at 4910 ms, and the owner comes back at 9000 ms.
	if r := rogue(t, "n1", 4900*ms, late(5100*ms)); r.Verdict != check.Held || r.Excused != 1 {
		t.Errorf("noted late: %s, %d excused, %v", r.Verdict, r.Excused, r.Violations)
	}
	for what, c := range map[string]struct{ sent, at int64 }{"let go when the owner was back": {4900 * ms, 9001 * ms}, "sent later": {5000 * ms, 5100 * ms}} {
		if r := rogue(t, "n1", c.sent, late(c.at)); r.Verdict != check.Violated || r.Excused != 0 {
			t.Errorf("%s: %s, %d excused, %v", what, r.Verdict, r.Excused, r.Violations)
		}
	}
}

// It may be taken for the dead one alone: not for an identity that nobody had on
// this IP, nor for one of whom no lease can have stood any more.
func TestRogueOwnerIsNotTakenForAnybody(t *testing.T) {
	for what, doctor := range map[string]func(*check.History){
		"the dead one was allowed nothing either": func(h *check.History) {
			h.Workloads[1].Names[0].Identity = "sleep-v3"
			h.Messages = slices.DeleteFunc(h.Messages, func(m check.Message) bool {
				return m.Sender == "old" || m.To.Addr() == addr("10.1.1.2") || m.Sender == "new" && len(m.Received) == 0
			})
		},
		"the dead one had been gone for longer than a lease": func(h *check.History) {
			h.Workloads[1].Left, h.Workloads[1].Gone = 2500*ms, 2501*ms
			h.Messages = slices.DeleteFunc(h.Messages, func(m check.Message) bool {
				return (m.Sender == "old" || m.To.Addr() == addr("10.1.1.2")) && m.Sent > 2400*ms
			})
		},
		"a reply to somebody else reaches it": func(h *check.History) {
			m := first(h, "other", "udp", 4300*ms)
			reply := &h.Messages[slices.IndexFunc(h.Messages, func(o check.Message) bool { return o.Answers == m.ID })]
			reply.Received = []check.Receipt{{UID: "new", At: reply.Sent + ms}}
		},
	} {
		r := rogue(t, "n1", 4300*ms, doctor)
		if r.Verdict != check.Violated || len(r.Violations) != 1 {
			t.Errorf("%s: %s, %d excused, %v", what, r.Verdict, r.Excused, r.Violations)
		}
	}
	// What was meant for the dead one may reach it while the leases last.
	r := rogue(t, "n1", 4300*ms, func(h *check.History) {
		m := first(h, "old", "udp", 3700*ms)
		reply := &h.Messages[slices.IndexFunc(h.Messages, func(o check.Message) bool { return o.Answers == m.ID })]
		reply.Received = []check.Receipt{{UID: "new", At: 4300 * ms}}
	})
	if r.Verdict != check.Held || r.Excused != 2 {
		t.Errorf("a reply to the dead one: %s, %d excused, %v", r.Verdict, r.Excused, r.Violations)
	}
}

// A few attempts are proof against availability where nearly all of them fail.
func TestPlainUnavailability(t *testing.T) {
	failing := func(n, of int) *check.Result {
		h := story()
		for i := range of {
			m := check.Message{ID: uint64(100_000 + i), Flow: uint64(100_000 + i), Protocol: "tcp", Sender: "other", From: netip.AddrPortFrom(addr("10.1.1.9"), uint16(20000+i)), To: addrPort("10.1.2.2:5000"), Sent: 300 * ms, Ended: 400 * ms}
			if i >= n {
				m.Connected = 301 * ms
			}
			h.Messages = append(h.Messages, m)
		}
		r, err := check.Check(h)
		if err != nil {
			t.Fatal(err)
		}
		return r
	}
	if r := failing(300, 300); r.Verdict != check.Violated || r.ViolationCount[check.StaysUp] != 1 || r.Availability.Enough {
		t.Errorf("nothing passed: %s, %+v", r.Verdict, r.Availability)
	}
	if r := failing(10, 300); r.Verdict != check.Held {
		t.Errorf("ten of few were lost: %s, %+v", r.Verdict, r.Availability)
	}
}

// Drops of one node do not make up for those of another that says nothing.
func TestOneNodeIsSilent(t *testing.T) {
	h := story()
	h.Drops = []check.Drops{{Node: "n1", Dropped: map[string]uint64{"quarantined": 10_000}}, {Node: "n2"}}
	r, err := check.Check(h)
	if err != nil || r.Verdict != check.Violated || r.ViolationCount[check.NothingSilent] != 1 || !strings.Contains(r.Violations[0].What, "at node n2, and only 0 drops") {
		t.Errorf("%v %+v", err, r)
	}
	// It does not matter that the sender is gone before it ceases to wait.
	h.Workloads[2].Left = 9950 * ms
	for i := range h.Messages {
		if m := &h.Messages[i]; m.Sender == "new" {
			m.Ended = 9960 * ms
		}
	}
	if r, err := check.Check(h); err != nil || r.ViolationCount[check.NothingSilent] != 1 {
		t.Errorf("%v %+v", err, r)
	}
	// Who is isolated himself may have been refused at home.
	h.Rules = append(h.Rules, check.Rule{Identity: "sleep-v2", Direction: check.Egress, Peers: []string{"hello-v2"}, Protocol: "tcp", Port: 5000})
	if r, err := check.Check(h); err != nil || r.Verdict != check.Held {
		t.Errorf("%v %+v", err, r)
	}
	// And of a node whose counters are lost nothing is said, but of the others.
	h = story()
	h.Drops = []check.Drops{{Node: "n1", Unknown: true}, {Node: "n2"}}
	if r, err := check.Check(h); err != nil || r.ViolationCount[check.NothingSilent] != 1 {
		t.Errorf("%v %+v", err, r)
	}
}

// A history in which nobody tried, or no IP was used again, holds nothing.
func TestNothingWasPutToTheTest(t *testing.T) {
	for what, doctor := range map[string]func(*check.History){
		"no impostor": func(h *check.History) {
			h.Messages = slices.DeleteFunc(h.Messages, func(m check.Message) bool { return m.Sender == "new" })
		},
		"no reuse": func(h *check.History) {
			h.Workloads[2].IPs = []netip.Addr{addr("10.1.1.3")}
			for i := range h.Messages {
				if m := &h.Messages[i]; m.Sender == "new" {
					m.From = netip.AddrPortFrom(addr("10.1.1.3"), m.From.Port())
				}
			}
		},
	} {
		h := story()
		doctor(h)
		if r, err := check.Check(h); err != nil || r.Verdict != check.Inconclusive || r.Short == "" {
			t.Errorf("%s: %v %+v", what, err, r)
		}
	}
}
