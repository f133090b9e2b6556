package chaos

import (
	"bytes"
	"net/netip"
	"strings"
	"testing"
	"time"

	"portcullis/chaos/check"
)

// The page shows holders, faults and what passed wrongly, and needs nothing
// from elsewhere, whatever names there are.
func TestPage(t *testing.T) {
	const ms = int64(time.Millisecond)
	ip := []netip.Addr{netip.MustParseAddr("10.1.1.1"), netip.MustParseAddr("fd00:1::1")}
	h := &check.History{
		Run:   check.Run{Scenario: "ip-reuse", Evidence: "classic", Faults: []string{"partition"}, Seed: 7, Nodes: []string{"owner", "verifier"}, Begin: 1, End: 1000 * ms, Tick: 1, Complete: true},
		Rules: Rules(),
		Workloads: []check.Workload{
			{UID: "s", Name: "d/hello", Node: "verifier", IPs: []netip.Addr{netip.MustParseAddr("10.2.0.1")}, Names: []check.Name{{Identity: HelloV1, Since: 1, Sure: 1}}, Made: 1, Asked: 1, Ready: 1},
			{UID: "a", Name: "d/<script>", Node: "owner", IPs: ip, Names: []check.Name{{Identity: SleepV1, Since: 1, Sure: 1}}, Made: 1, Asked: 1, Ready: 2 * ms, Left: 300 * ms, Gone: 310 * ms},
			{UID: "b", Name: "d/b", Node: "owner", IPs: ip, Names: []check.Name{{Identity: SleepV2, Since: 320 * ms, Sure: 320 * ms}}, Made: 320 * ms, Asked: 320 * ms, Ready: 400 * ms},
		},
		Messages: []check.Message{
			{ID: 1, Flow: 1, Protocol: "tcp", Sender: "a", From: netip.AddrPortFrom(ip[0], 9), To: netip.MustParseAddrPort("10.2.0.1:5000"), Sent: 100 * ms, Ended: 101 * ms, Connected: 101 * ms},
			{ID: 2, Flow: 2, Protocol: "tcp", Sender: "b", From: netip.AddrPortFrom(ip[0], 10), To: netip.MustParseAddrPort("10.2.0.1:5000"), Sent: 500 * ms, Ended: 501 * ms, Connected: 501 * ms},
		},
		Faults: []check.Fault{{Kind: "partition", Nodes: []string{"owner", "verifier"}, From: 50 * ms, Began: 51 * ms}},
	}
	r, err := check.Check(h)
	if err != nil {
		t.Fatal(err)
	}
	var out bytes.Buffer
	if err := Page(&out, []Judged{{h, r}, {h, r}}); err != nil {
		t.Fatal(err)
	}
	page := out.String()
	for _, want := range []string{`<text x="2"`, "10.1.1.1", `class="bad"`, `class="ok"`, `class="v1"`, `class="v2"`, `class="wait"`, `class="bar"`, "d/&lt;script&gt;", `<span class="violated">violated</span>`, `id="run2"`,
		"portcullis chaos run ip-reuse --evidence classic --seed 7 --events 1 --fault partition"} {
		if !strings.Contains(page, want) {
			t.Errorf("the page lacks %q", want)
		}
	}
	for _, never := range []string{"<script", "http://", "https://", "NaN", "Inf"} {
		if strings.Contains(page, never) {
			t.Errorf("the page has %q", never)
		}
	}
}
