package agent

import (
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"testing"
	"time"

	"portcullis/authz/l7"
	"portcullis/bpf/abi"
	"portcullis/observe/flow"
	"portcullis/proxy"
)

// A request is told with both identities, rule, verdict and latency; query strings
// and values of headers only where this agent was told to, whatever its proxy says.
func TestInsideRecord(t *testing.T) {
	n := newNode(t)
	n.veth("a0")
	n.veth("a1")
	l := n.mustStart()
	defer func() { n.crash(l) }()
	a, b := n.run(l, app("a0", "10.1.1.2")), n.run(l, app("a1", "10.1.1.3"))
	r := &proxy.Record{
		Time: time.Unix(1790000000, 0), Parser: l7.ParserHTTP, Verdict: proxy.Denied, Reason: "no rule allows it", Rule: "Test/default/p rule 1",
		Conn:    proxy.Conn{Direction: abi.DirEgress, Protocol: 6, Client: netip.AddrPortFrom(a.ips[0], 4711), Server: netip.AddrPortFrom(b.ips[0], 80)},
		Subject: proxy.Party{Identity: a.numeric}, Peer: proxy.Party{Identity: b.numeric},
		HTTP: &proxy.HTTPRecord{Version: "1.1", Method: "PUT", Path: "/v1/x?token=secret", Host: "a1", Status: 403, Latency: 2 * time.Millisecond,
			Header: [][2]string{{"User-Agent", "curl"}, {"Authorization", "secret"}}},
	}
	for _, c := range []struct {
		queries bool
		headers []string
		path    string
		shown   []string
	}{
		{false, nil, "/v1/x", nil},
		{true, nil, "/v1/x?token=secret", nil},
		{false, []string{"user-agent"}, "/v1/x", []string{"User-Agent: curl"}},
	} {
		l.cfg.Records = Records{Queries: c.queries, Headers: c.headers}
		got := l.insideRecord(r)
		x := got.L7
		if x.Path != c.path || !slices.Equal(x.Header, c.shown) {
			t.Errorf("queries %v, headers %v: path %q, header %q", c.queries, c.headers, x.Path, x.Header)
		}
		if got.Verdict != abi.VerdictDrop || got.Reason != abi.ReasonPolicyDenied || x.Method != "PUT" || x.Status != 403 || x.Latency != 2*time.Millisecond ||
			x.Rule != r.Rule || x.Reason != r.Reason || !got.Is(flow.TypeL7) {
			t.Errorf("told as %+v, %+v", got, x)
		}
		for _, end := range []struct {
			told flow.End
			of   *endpoint
		}{{got.Source, a}, {got.Dest, b}} {
			if end.told.Workload != end.of.fullName() || end.told.Identity != end.of.numeric || end.told.Endpoint != end.of.id || len(end.told.Labels) == 0 {
				t.Errorf("an end is told as %+v, want %s, %d", end.told, end.of.fullName(), end.of.numeric)
			}
		}
	}
	query := &proxy.Record{Parser: l7.ParserDNS, Verdict: proxy.Forwarded, Conn: r.Conn, Subject: r.Subject, Peer: r.Peer,
		DNS: &proxy.DNSRecord{Name: "a.example.", Type: 1, Addresses: []netip.Addr{netip.MustParseAddr("192.0.2.1")}, TTL: 30 * time.Second}}
	got := l.insideRecord(query)
	want := fmt.Sprintf("-> Request dns from %d (default/a0 [%s]) to %d (default/a1 [%s]), identity %d->%d, verdict Forwarded DNS Query: a.example. A => 192.0.2.1 TTL 30.0s",
		a.id, strings.Join(got.Source.Labels, " "), b.id, strings.Join(got.Dest.Labels, " "), a.numeric, b.numeric)
	if line := (flow.Formatter{}).Line(&got); line != want {
		t.Errorf("a query is told as\n%s\nwant\n%s", line, want)
	}
}

// The proxy is told what it is to record, and what refused names are answered.
func TestProxyRecords(t *testing.T) {
	var none Records
	if args := none.args(); len(args) > 0 {
		t.Errorf("of itself: %q", args)
	}
	all := Records{Queries: true, Headers: []string{"User-Agent", "X-Id"}, NXDomain: true}
	want := []string{"--record-queries", "--record-header", "User-Agent", "--record-header", "X-Id", "--dns-nxdomain"}
	if args := all.args(); !slices.Equal(args, want) {
		t.Errorf("%q, want %q", args, want)
	}
	c := Default()
	if c.Records.Headers = []string{"User-Agent", "X Id", "a:b", ""}; len(c.Records.validate()) != 3 || !strings.Contains(fmt.Sprint(c.Validate()), `--record-header "X Id"`) {
		t.Errorf("names of headers: %v", c.Records.validate())
	}
}
