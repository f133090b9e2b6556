package kube

import (
	"bytes"
	"encoding/json"
	"net/netip"
	"slices"
	"strings"
	"testing"
	"time"

	"portcullis/chaos"
	"portcullis/chaos/check"
	"portcullis/chaos/kube/talk"
)

const ms = int64(time.Millisecond)

var (
	serverIP = netip.MustParseAddr("10.2.0.2")
	usedIP   = netip.MustParseAddr("10.1.0.9")
)

// Kernels of the tests: IPs change hands on owner, whose clock is the one of the
// history. verifier's shows 7 s less, harness's 3 s more.
const (
	ownerBoot, verifierBoot, harnessBoot = "owner-kernel", "verifier-kernel", "harness-kernel"
	behind, ahead                        = 7000 * ms, 3000 * ms
)

// script is what the pods of a run wrote down. Its times are those of owner.
type script struct {
	logs   map[string]*podLog
	order  []*podLog
	clocks *clocks
	next   map[string]uint64
	clock  map[string]int64 // what a pod's clock shows more than owner's
}

func newScript() *script {
	return &script{logs: map[string]*podLog{}, clocks: newClocks(), next: map[string]uint64{}, clock: map[string]int64{}}
}

func (s *script) write(uid string, r talk.Record) {
	p := s.logs[uid]
	r.N = uint64(len(p.records) + 1)
	for _, t := range []*int64{&r.At, &r.Sent, &r.Connected, &r.Ended, &r.Replies} {
		if *t != 0 {
			*t += s.clock[uid]
		}
	}
	p.records = append(p.records, r)
	if r.At != 0 { // it is read a moment later
		s.clocks.before(p.boot(), r.At, harnessBoot, r.At-s.clock[uid]+ahead+5*ms)
	}
}

func (s *script) pod(uid, is, node, boot string, ip netip.Addr, at int64) {
	p := &podLog{name: is + "/" + uid, uid: uid, node: node, is: is}
	s.logs[uid], s.order = p, append(s.order, p)
	if boot == verifierBoot {
		s.clock[uid] = -behind
	}
	s.write(uid, talk.Record{Kind: talk.Begins, At: at, UID: uid, Boot: boot, IPs: []netip.Addr{ip}})
	s.clocks.before(harnessBoot, at+ahead-900*ms, boot, at+s.clock[uid])
	s.write(uid, talk.Record{Kind: talk.Serves, At: at + ms})
}

func (s *script) leaves(uid string, at int64) {
	s.write(uid, talk.Record{Kind: talk.Leaves, At: at})
	s.write(uid, talk.Record{Kind: talk.Ends, At: at + ms})
}

// asks is a datagram from client to server, received and answered if it passes.
func (s *script) asks(client, server string, at int64, passes bool) {
	s.next[client]++
	id := talk.ID{UID: client, N: s.next[client]}
	from, to := netip.AddrPortFrom(s.logs[client].records[0].IPs[0], talk.ClientPort), netip.AddrPortFrom(s.logs[server].records[0].IPs[0], talk.Port)
	tried := talk.Record{Kind: talk.Tried, ID: id, Flow: id.N, Protocol: "udp", From: from, To: to, Sent: at, Ended: at + 3*ms}
	if passes {
		s.next[server]++
		reply := s.next[server]
		s.write(server, talk.Record{Kind: talk.Got, At: at + ms, ID: id, Protocol: "udp", From: from, Reply: reply, Replies: at + ms})
		s.write(client, talk.Record{Kind: talk.Replied, At: at + 2*ms, ID: talk.ID{UID: server, N: reply}, Answers: id, Protocol: "udp", From: to})
	} else {
		tried.Ended, tried.Error = at+2000*ms, "no reply in time"
	}
	s.write(client, tried)
}

func (s *script) judge(t *testing.T, faults ...*faultNote) (*check.History, *check.Result) {
	t.Helper()
	run := check.Run{Scenario: "ip-reuse", Evidence: "lease", Nodes: []string{"n1", "n2"}, Begin: 1000*ms + ahead, End: 60_000*ms + ahead, Complete: true}
	h, err := makeHistory(run, harnessBoot, s.order, faults, s.clocks)
	if err != nil {
		t.Fatal(err)
	}
	r, err := check.Check(h)
	if err != nil {
		t.Fatal(err)
	}
	return h, r
}

// reuse is a script in which an IP goes from sleep-v1 to sleep-v2.
func reuse(admitted bool) *script {
	s := newScript()
	s.pod("server", chaos.HelloV1, "n2", verifierBoot, serverIP, 2000*ms)
	s.pod("first", chaos.SleepV1, "n1", ownerBoot, usedIP, 3000*ms)
	s.asks("first", "server", 3100*ms, true)
	s.leaves("first", 5000*ms)
	s.pod("second", chaos.SleepV2, "n1", ownerBoot, usedIP, 6000*ms)
	s.asks("second", "server", 6100*ms, admitted)
	s.leaves("second", 9000*ms)
	s.leaves("server", 50_000*ms)
	return s
}

// What the pods of two kernels wrote down becomes one history, whose rightful
// messages pass and whose impostor is seen.
func TestHistory(t *testing.T) {
	h, r := reuse(false).judge(t)
	if r.Verdict != check.Held || r.Reuses != 1 || r.Attempts.Legitimate != 1 || r.Admitted.Legitimate != 1 || r.Attempts.Impostor != 1 || r.Admitted.Impostor != 0 {
		t.Errorf("%+v", r)
	}
	if len(h.Messages) != 3 || h.Run.Target != "kubernetes" || h.Run.Tick > 30*time.Millisecond {
		t.Errorf("%d messages, %+v", len(h.Messages), h.Run)
	}
	if m := h.Messages[0]; m.Sent != 3100*ms || len(m.Received) != 1 || m.Received[0].UID != "server" || m.Received[0].At < 3100*ms || m.Received[0].At > 3103*ms {
		t.Errorf("%+v", m)
	}
	if m := h.Messages[2]; m.Answers != 1 || m.Sender != "server" || m.Flow != 1 || len(m.Received) != 1 || m.Received[0].UID != "first" {
		t.Errorf("%+v", m)
	}
	_, r = reuse(true).judge(t)
	if r.Verdict != check.Violated || r.Admitted.Impostor != 1 || r.ViolationCount[check.NoInheritance] == 0 {
		t.Errorf("%+v", r)
	}
}

// A pod that was killed and could not tell what it sent is judged by what was
// received of it.
func TestKilledSender(t *testing.T) {
	s := reuse(true)
	second := s.logs["second"]
	second.records = slices.DeleteFunc(second.records, func(r talk.Record) bool { return r.Kind != talk.Begins && r.Kind != talk.Serves })
	_, r := s.judge(t)
	if r.Verdict != check.Violated || r.Admitted.Impostor != 1 {
		t.Errorf("%+v", r)
	}
}

// A reply that somebody else received is not passed over.
func TestStrayReply(t *testing.T) {
	s := reuse(false)
	s.write("second", talk.Record{Kind: talk.Replied, At: 8000 * ms, ID: talk.ID{UID: "server", N: 1}, Answers: talk.ID{UID: "first", N: 1}, Protocol: "udp"})
	_, r := s.judge(t)
	if r.Verdict != check.Violated || r.ViolationCount[check.NoInheritance] != 1 {
		t.Errorf("%+v", r)
	}
}

// A fault's times come from several clocks, and are put in favour of the judged.
func TestFault(t *testing.T) {
	f := &faultNote{fault: Fault{Name: "partition", silent: true}, places: [][]string{{"n1", "n2"}}, lease: time.Second}
	f.add(span{stamp{ownerBoot, 4000 * ms}, stamp{ownerBoot, 4001 * ms}, stamp{ownerBoot, 20_000 * ms}, stamp{ownerBoot, 20_001 * ms}})
	f.add(span{stamp{verifierBoot, 4010*ms - behind}, stamp{verifierBoot, 4020*ms - behind}, stamp{verifierBoot, 19_000*ms - behind}, stamp{verifierBoot, 19_001*ms - behind}})
	f.add(span{}) // nothing came of it there
	h, r := reuse(false).judge(t, f)
	if len(h.Faults) != 1 || r.Verdict != check.Held {
		t.Fatalf("%+v", h.Faults)
	}
	near := func(got, want int64) bool { return got >= want-5*ms && got <= want+5*ms }
	if g := h.Faults[0]; !near(g.From, 4000*ms) || !near(g.Began, 4020*ms) || !near(g.To, 19_000*ms) || !near(g.Ended, 20_001*ms) || !g.Silent {
		t.Errorf("%+v", g)
	}
	// Who is received after the last lease can have ended is seen.
	s := reuse(false)
	s.pod("third", chaos.SleepV1, "n1", ownerBoot, netip.MustParseAddr("10.1.0.10"), 10_000*ms)
	s.asks("third", "server", 12_000*ms, true)
	s.leaves("third", 13_000*ms)
	if _, r = s.judge(t, f); r.ViolationCount[check.FallsShut] == 0 {
		t.Errorf("%+v", r)
	}
}

// Clocks between which nothing passed are not taken for related.
func TestClocks(t *testing.T) {
	c := newClocks()
	c.before("a", 100, "b", 50)
	if r, err := c.relate("a", "a", "b"); err == nil {
		t.Errorf("%+v", r)
	}
	c.before("b", 70, "a", 130)
	c.before("b", 70, "a", 180)
	r, err := c.relate("a", "a", "b")
	if err != nil || r.time(stamp{"b", 50}) != 105 || r.early(stamp{"b", 50}) != 100 || r.late(stamp{"b", 50}) != 110 || r.time(stamp{"a", 9}) != 9 || r.time(stamp{"b", 0}) != 0 || r.doubt("a", "b") != 5 {
		t.Errorf("%+v, %v", r, err)
	}
	c.before("a", 5000*ms, "b", 1)
	if _, err := c.relate("a", "b"); err == nil {
		t.Error("a contradiction of seconds is taken")
	}
}

// What was not measured is absent from the result, and nothing else is.
func TestUnmeasured(t *testing.T) {
	h, r := reuse(false).judge(t)
	b, err := json.Marshal(r)
	if err != nil {
		t.Fatal(err)
	}
	var fields map[string]any
	if err := json.Unmarshal(b, &fields); err != nil {
		t.Fatal(err)
	}
	for _, name := range unmeasured {
		if _, there := fields[name]; there {
			t.Errorf("%s is there: %s", name, b)
		}
	}
	for _, name := range []string{"scenario", "evidence", "faults", "seed", "attempts", "admitted", "reuses", "first_contact_ms", "stale_window_ms", "availability", "violations", "verdict", "target", "unmeasured"} {
		if _, there := fields[name]; !there {
			t.Errorf("%s is absent: %s", name, b)
		}
	}
	// The page says so too, and how to run it again.
	var page bytes.Buffer
	if err := chaos.Page(&page, []chaos.Judged{{History: h, Result: r}}); err != nil {
		t.Fatal(err)
	}
	for _, want := range []string{"--target kubernetes", "not measured", usedIP.String()} {
		if !strings.Contains(page.String(), want) {
			t.Errorf("the page lacks %q", want)
		}
	}
}

// A run that put nothing to the test is not held.
func TestShort(t *testing.T) {
	p := &plan{Options: Options{Events: 5, Pods: 50}, faults: []Fault{{Name: "partition", lasts: true}}}
	_, r := reuse(false).judge(t)
	for _, c := range []struct {
		lost                 []string
		reused, made, turned int
		says                 string
	}{{nil, 5, 20, 1, ""}, {[]string{"pod x"}, 5, 20, 1, "pod x"}, {nil, 0, 50, 1, "too late"}, {nil, 4, 50, 1, "too late"}, {nil, 4, 20, 1, ""}, {nil, 5, 20, 0, "while it lasted"}} {
		if got := short(p, r, c.lost, c.reused, c.made, c.turned); (got == "") != (c.says == "") || !strings.Contains(got, c.says) {
			t.Errorf("%+v: %q", c, got)
		}
	}
	r.Attempts.Impostor = 0
	if short(p, r, nil, 5, 20, 1) == "" {
		t.Error("a run without an impostor shows something")
	}
	s := reuse(false)
	run := check.Run{Nodes: []string{"n1", "n2"}, Begin: 1000*ms + ahead, End: 60_000*ms + ahead, Complete: true, Short: "no IP came again"}
	h, err := makeHistory(run, harnessBoot, s.order, nil, s.clocks)
	if err != nil {
		t.Fatal(err)
	}
	if r, err := check.Check(h); err != nil || r.Verdict != check.Inconclusive {
		t.Errorf("%+v, %v", r, err)
	}
}
