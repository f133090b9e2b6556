package check_test

import (
	"bytes"
	"fmt"
	"math/rand/v2"
	"net/netip"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"

	"portcullis/chaos/check"
)

const ms = int64(time.Millisecond)

func addr(s string) netip.Addr         { return netip.MustParseAddr(s) }
func addrPort(s string) netip.AddrPort { return netip.MustParseAddrPort(s) }

// story is a sound history: sleep-v1 talks to hello-v1, goes, and sleep-v2 comes
// with its IP and is refused there.
func story() *check.History {
	name := func(n string, since int64) []check.Name {
		return []check.Name{{Identity: n, Since: since, Sure: since}}
	}
	h := &check.History{
		Run: check.Run{Scenario: "ip-reuse", Evidence: "lease", Seed: 1, Nodes: []string{"n1", "n2"}, Begin: 1, End: 10_000 * ms, Tick: 10 * time.Millisecond, Settle: time.Second, Complete: true},
		Rules: []check.Rule{
			{Identity: "hello-v1", Direction: check.Ingress, Peers: []string{"sleep-v1"}, Protocol: "tcp", Port: 5000},
			{Identity: "hello-v1", Direction: check.Ingress, Peers: []string{"sleep-v1"}, Protocol: "udp", Port: 5000},
			{Identity: "sleep-v1", Direction: check.Egress, Peers: []string{"hello-v1"}, Protocol: "tcp", Port: 5000},
			{Identity: "sleep-v1", Direction: check.Egress, Peers: []string{"hello-v1"}, Protocol: "udp", Port: 5000},
		},
		Workloads: []check.Workload{
			{UID: "hello", Name: "d/hello", Node: "n2", IPs: []netip.Addr{addr("10.1.2.2")}, Names: name("hello-v1", 2*ms), Made: ms, Asked: 2 * ms, Ready: 3 * ms},
			{UID: "old", Name: "d/old", Node: "n1", IPs: []netip.Addr{addr("10.1.1.2")}, Names: name("sleep-v1", 2*ms), Made: ms, Asked: 2 * ms, Ready: 3 * ms, Left: 4000 * ms, Gone: 4001 * ms},
			{UID: "new", Name: "d/new", Node: "n1", IPs: []netip.Addr{addr("10.1.1.2")}, Names: name("sleep-v2", 4100*ms), Made: 4050 * ms, Asked: 4100 * ms, Ready: 4200 * ms, Quarantined: 90 * time.Millisecond},
			{UID: "other", Name: "d/other", Node: "n1", IPs: []netip.Addr{addr("10.1.1.9")}, Names: name("sleep-v1", 2*ms), Made: ms, Asked: 2 * ms, Ready: 3 * ms},
		},
		Drops: []check.Drops{{Node: "n1"}, {Node: "n2", Dropped: map[string]uint64{"policy-denied": 50}}},
	}
	id := uint64(0)
	for at := 100 * ms; at < 9900*ms; at += 100 * ms {
		for _, w := range h.Workloads[1:] {
			if at < w.Ready || w.Left != 0 && at+200*ms > w.Left {
				continue
			}
			legal := w.Names[0].Identity == "sleep-v1"
			for _, protocol := range []string{"tcp", "udp"} {
				id += 2
				m := check.Message{ID: id, Flow: id, Protocol: protocol, Sender: w.UID, From: netip.AddrPortFrom(w.IPs[0], 4000), To: addrPort("10.1.2.2:5000"), Sent: at, Ended: at + 90*ms}
				if protocol == "tcp" {
					m.From = netip.AddrPortFrom(w.IPs[0], uint16(10000+id))
				}
				if legal {
					m.Ended = at + 2*ms
					m.Received = []check.Receipt{{UID: "hello", At: at + ms}}
					if protocol == "tcp" {
						m.Connected = at + ms
					}
					h.Messages = append(h.Messages, m, check.Message{ID: id + 1, Flow: id, Answers: id, Protocol: protocol, Sender: "hello", From: m.To, To: m.From, Sent: at + ms, Ended: at + 2*ms, Received: []check.Receipt{{UID: w.UID, At: at + 2*ms}}})
					continue
				}
				h.Messages = append(h.Messages, m)
			}
		}
	}
	h.Drops[1].Dropped["policy-denied"] = uint64(len(h.Messages))
	return h
}

func first(h *check.History, sender, protocol string, after int64) *check.Message {
	for i := range h.Messages {
		if m := &h.Messages[i]; m.Sender == sender && m.Protocol == protocol && m.Sent >= after {
			return m
		}
	}
	panic("no such message")
}

func TestSoundHistory(t *testing.T) {
	r, err := check.Check(story())
	if err != nil {
		t.Fatal(err)
	}
	if r.Verdict != check.Held || len(r.Violations) != 0 {
		t.Error(r.Verdict, r.Violations)
	}
	if r.Attempts.Legitimate != r.Admitted.Legitimate || r.Admitted.Impostor != 0 || r.Attempts.Impostor == 0 || r.Attempts.Undecided != 0 {
		t.Errorf("%+v %+v", r.Attempts, r.Admitted)
	}
	if r.Reuses != 1 || r.ReuseDelayMS.P50 != 100 || r.QuarantineMS != 90 || r.FirstContactMS.N != 2 || r.UpperBound != 1 {
		t.Errorf("%+v", r)
	}
	if r.Availability.Attempts != r.Attempts.Legitimate || r.Availability.Rate != 1 || r.Availability.Enough {
		t.Errorf("%+v", r.Availability)
	}
}

// Each doctored history breaks one invariant, and the checker says which.
func TestDoctored(t *testing.T) {
	silence := func(h *check.History, from, to int64, nodes ...string) {
		h.Faults = append(h.Faults, check.Fault{Kind: "cut", Nodes: nodes, From: from, Began: from, To: to, Ended: to, Silent: true, Lease: time.Second, Impairs: true})
	}
	for what, c := range map[string]struct {
		doctor func(*check.History)
		want   check.Invariant
		says   string
	}{
		"an impostor's datagram is received": {func(h *check.History) {
			m := first(h, "new", "udp", 0)
			m.From = addrPort("10.1.1.2:4999")
			m.Received = []check.Receipt{{UID: "hello", At: m.Sent + ms}}
		}, check.Safety, "new (sleep-v2)"},
		"an impostor connects, and no server noted it": {func(h *check.History) {
			m := first(h, "new", "tcp", 0)
			m.Connected = m.Sent + ms
		}, check.Safety, "which no rule allows"},
		"an impostor on the former holder's 5-tuple": {func(h *check.History) {
			m := first(h, "new", "udp", 0)
			m.Received = []check.Receipt{{UID: "hello", At: m.Sent + ms}}
		}, check.NoInheritance, "on the same 5-tuple"},
		"a reply reaches the next holder": {func(h *check.History) {
			m := first(h, "old", "udp", 3700*ms)
			reply := &h.Messages[slices.IndexFunc(h.Messages, func(o check.Message) bool { return o.Answers == m.ID })]
			reply.Received = []check.Receipt{{UID: "new", At: 4300 * ms}}
		}, check.NoInheritance, "the reply of hello (hello-v1) to old"},
		"egress to who does not hold the IP any more": {func(h *check.History) {
			h.Workloads[0].Left, h.Workloads[0].Gone = 9000*ms, 9001*ms
			h.Workloads = append(h.Workloads, check.Workload{UID: "fake", Node: "n2", IPs: []netip.Addr{addr("10.1.2.2")}, Names: []check.Name{{Identity: "hello-v2", Since: 9100 * ms, Sure: 9100 * ms}}, Made: 9050 * ms, Asked: 9100 * ms, Ready: 9200 * ms})
			h.Messages = slices.DeleteFunc(h.Messages, func(m check.Message) bool { return m.Sent > 8900*ms })
			h.Messages = append(h.Messages, check.Message{ID: 1, Flow: 1, Protocol: "udp", Sender: "other", From: addrPort("10.1.1.9:7"), To: addrPort("10.1.2.2:5000"), Sent: 9300 * ms, Ended: 9400 * ms, Received: []check.Receipt{{UID: "fake", At: 9301 * ms}}})
		}, check.Safety, "received by fake (hello-v2)"},
		"a packet passes when every lease is over": {func(h *check.History) {
			silence(h, 5000*ms, 7000*ms, "n1", "n2")
			for i := range h.Messages { // nothing passes after the lease's end
				if m := &h.Messages[i]; m.Sent > 6000*ms && m.Sent < 7100*ms {
					m.Received, m.Connected = nil, 0
				}
			}
			m := first(h, "other", "tcp", 6500*ms)
			m.Connected = m.Sent + ms
		}, check.FallsShut, "after the last lease can have ended (cut)"},
		"the verifier's agent is dead": {func(h *check.History) {
			silence(h, 5000*ms, 0, "n2")
			h.Faults[0].Ended = 0
		}, check.FallsShut, "after the last lease"},
		"one who was never registered": {func(h *check.History) {
			h.Workloads = append(h.Workloads, check.Workload{UID: "stray", Node: "n1", IPs: []netip.Addr{addr("10.1.1.77")}, Made: 100 * ms})
			h.Messages = append(h.Messages, check.Message{ID: 1, Flow: 1, Protocol: "udp", Sender: "stray", From: addrPort("10.1.1.77:7"), To: addrPort("10.1.2.2:5000"), Sent: 300 * ms, Ended: 400 * ms, Received: []check.Receipt{{UID: "hello", At: 301 * ms}}})
		}, check.UnknownWorld, "stray (not registered)"},
		"fewer drops than refusals": {func(h *check.History) {
			h.Drops[1].Dropped = map[string]uint64{"policy-denied": 3, "unbound": 1}
		}, check.NothingSilent, "only 4 drops counted"},
		"legitimate traffic fails": {func(h *check.History) {
			for i := range uint64(4000) {
				h.Messages = append(h.Messages, check.Message{ID: 100_000 + i, Flow: 100_000 + i, Protocol: "udp", Sender: "other", From: addrPort("10.1.1.9:7"), To: addrPort("10.1.2.2:5000"), Sent: 300 * ms, Ended: 400 * ms})
				if i%400 != 0 {
					m := &h.Messages[len(h.Messages)-1]
					m.Received = []check.Receipt{{UID: "hello", At: 301 * ms}}
					h.Messages = append(h.Messages, check.Message{ID: 200_000 + i, Flow: m.Flow, Answers: m.ID, Protocol: "udp", Sender: "hello", From: m.To, To: m.From, Sent: 301 * ms, Ended: 302 * ms, Received: []check.Receipt{{UID: "other", At: 302 * ms}}})
				}
			}
		}, check.StaysUp, "10 of"},
		"the former identity, after a change of labels is sure": {func(h *check.History) {
			h.Workloads[3].Names = append(h.Workloads[3].Names, check.Name{Identity: "sleep-v2", Since: 9500 * ms, Sure: 9600 * ms})
			h.Messages = slices.DeleteFunc(h.Messages, func(m check.Message) bool {
				return (m.Sender == "other" || m.To.Addr() == addr("10.1.1.9")) && m.Sent > 9700*ms && m.Protocol == "udp"
			})
			h.Messages = slices.DeleteFunc(h.Messages, func(m check.Message) bool {
				return (m.Sender == "other" || m.To.Addr() == addr("10.1.1.9")) && (m.Sent > 9601*ms && m.Sent < 9750*ms || m.Answers != 0 && m.Sent > 9600*ms)
			})
		}, check.Safety, "other (sleep-v2)"},
	} {
		t.Run(what, func(t *testing.T) {
			h := story()
			c.doctor(h)
			r, err := check.Check(h)
			if err != nil {
				t.Fatal(err)
			}
			if r.Verdict != check.Violated || len(r.Violations) == 0 || r.UpperBound != 0 {
				t.Fatalf("%s %v", r.Verdict, r.Violations)
			}
			for _, v := range r.Violations {
				if v.Invariant != c.want || !strings.Contains(v.What, c.says) {
					t.Errorf("%s %s, want %s and %q", v.Invariant, v.What, c.want, c.says)
				}
				if v.IP.IsValid() && len(v.Around) == 0 {
					t.Error("nothing is told of what was around it")
				}
			}
		})
	}
}

// What the harness cannot tell from what is right is no violation.
func TestInFavour(t *testing.T) {
	for what, doctor := range map[string]func(*check.History){
		"the lease may have lasted to a tick after it": func(h *check.History) {
			h.Faults = []check.Fault{{Kind: "cut", Nodes: []string{"n1", "n2"}, From: 4990 * ms, Began: 5000 * ms, To: 6050 * ms, Ended: 6060 * ms, Silent: true, Lease: time.Second, Impairs: true}}
		},
		"a label that is being changed": func(h *check.History) {
			h.Workloads[3].Names = append(h.Workloads[3].Names, check.Name{Identity: "sleep-v2", Since: 9500 * ms, Sure: 9999 * ms})
		},
		"losses in an impaired window": func(h *check.History) {
			h.Faults = []check.Fault{{Kind: "stopped", Nodes: []string{"n2"}, From: 5000 * ms, Began: 5000 * ms, To: 6000 * ms, Ended: 6000 * ms, Impairs: true}}
			for i := range h.Messages {
				if m := &h.Messages[i]; m.Sent >= 5000*ms && m.Sent < 6900*ms {
					m.Received, m.Connected = nil, 0
				}
			}
		},
		"a few losses of few attempts": func(h *check.History) {
			m := first(h, "other", "tcp", 5000*ms)
			m.Received, m.Connected = nil, 0
		},
		"a node whose counters are gone": func(h *check.History) {
			h.Drops[1] = check.Drops{Node: "n2", Unknown: true}
		},
		"refused where packets can be lost": func(h *check.History) {
			h.Faults = []check.Fault{{Kind: "loss", From: 1, Began: 1, Loses: true}}
			h.Drops[1].Dropped = nil
		},
		"no rule for the endpoint": func(h *check.History) {
			h.Messages = append(h.Messages, check.Message{ID: 1, Flow: 1, Protocol: "tcp", Sender: "hello", From: addrPort("10.1.2.2:9"), To: addrPort("10.1.1.2:80"), Sent: 5000 * ms, Ended: 5001 * ms, Connected: 5001 * ms})
		},
	} {
		h := story()
		doctor(h)
		r, err := check.Check(h)
		if err != nil || r.Verdict != check.Held {
			t.Errorf("%s: %v %+v", what, err, r)
		}
	}
	h := story()
	h.Run.Complete = false
	if r, err := check.Check(h); err != nil || r.Verdict != check.Interrupted {
		t.Error(err, r)
	}
}

// A history that contradicts itself is the harness's fault, and is not judged.
func TestUnsound(t *testing.T) {
	for says, doctor := range map[string]func(*check.History){
		"was held by old and new at the same time": func(h *check.History) { h.Workloads[1].Left, h.Workloads[1].Gone = 0, 0 },
		"two workloads":                 func(h *check.History) { h.Workloads = append(h.Workloads, h.Workloads[0]) },
		"two messages":                  func(h *check.History) { h.Messages = append(h.Messages, h.Messages[0]) },
		"its times run back":            func(h *check.History) { h.Workloads[0].Ready = 1 },
		"is not an IP of its sender":    func(h *check.History) { h.Messages[0].From = addrPort("10.9.9.9:1") },
		"which is not in the history":   func(h *check.History) { h.Messages[0].Sender = "nobody" },
		"when its sender":               func(h *check.History) { h.Messages[0].Sent = 1 },
		"received before it was sent":   func(h *check.History) { h.Messages[0].Received[0].At = 5 },
		`which is not one of the run's`: func(h *check.History) { h.Workloads[0].Node = "n3" },
		`fault x was at node "n9"`: func(h *check.History) {
			h.Faults = []check.Fault{{Kind: "x", Nodes: []string{"n9"}, From: 5, Began: 5}}
		},
		`drops of node "n9"`:             func(h *check.History) { h.Drops[0].Node = "n9" },
		"which it cannot":                func(h *check.History) { h.Messages[1].Answers = 77 },
		"make no sense":                  func(h *check.History) { h.Faults = []check.Fault{{Kind: "x", From: 5, Began: 3}} },
		"a rule of identity":             func(h *check.History) { h.Rules[0].Direction = "up" },
		"and names if it was registered": func(h *check.History) { h.Workloads[0].Names = nil },
		"want begin <= end":              func(h *check.History) { h.Run.Tick = 0 },
	} {
		h := story()
		doctor(h)
		if r, err := check.Check(h); err == nil || !strings.Contains(err.Error(), says) {
			t.Errorf("want %q: %v %+v", says, err, r)
		}
	}
}

// Whatever the message: if its receipt is moved to somebody whom no rule allows,
// the checker sees it.
func TestEveryWrongReceiptIsSeen(t *testing.T) {
	rnd := rand.New(rand.NewPCG(7, 7))
	for range 300 {
		h := story()
		m := &h.Messages[rnd.IntN(len(h.Messages))]
		for m.Sender != "new" {
			m = &h.Messages[rnd.IntN(len(h.Messages))]
		}
		m.Received = []check.Receipt{{UID: "hello", At: m.Sent + 1 + rnd.Int64N(50*ms)}}
		if r, err := check.Check(h); err != nil || r.Admitted.Impostor != 1 || r.Verdict != check.Violated || r.StaleWindowMS <= 0 {
			t.Fatal(err, r, *m)
		}
	}
}

func TestReadWrite(t *testing.T) {
	h := story()
	h.Faults = []check.Fault{{Kind: "cut", Nodes: []string{"n1", "n2"}, From: 1, Began: 2, Silent: true, Lease: time.Second}}
	var b bytes.Buffer
	if err := h.Write(&b); err != nil {
		t.Fatal(err)
	}
	text := b.String()
	got, err := check.Read(&b)
	if diff := cmp.Diff(h, got, cmpopts.EquateComparable(netip.Addr{}, netip.AddrPort{}), cmpopts.EquateEmpty()); err != nil || diff != "" {
		t.Fatal(err, diff)
	}
	lines := strings.SplitAfter(text, "\n")
	for what, bad := range map[string]string{
		"empty":         "",
		"no run first":  strings.Join(lines[1:], ""),
		"twice":         text + lines[0],
		"cut short":     text[:len(text)-20],
		"unknown field": text + `{"rule": {"port": 1, "hole": true}}`,
		"says nothing":  text + "{}\n",
	} {
		if _, err := check.Read(strings.NewReader(bad)); err == nil {
			t.Errorf("%s: was read", what)
		}
	}
}

func ExampleCheck() {
	r, err := check.Check(story())
	fmt.Println(r.Verdict, r.Reuses, err)
	// Output: held 1 <nil>
}
