package metrics

import (
	"bufio"
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"strings"
	"testing"
	"time"

	"go.uber.org/zap"
	"go.uber.org/zap/zaptest/observer"

	"portcullis/bpf/abi"
)

var update = flag.Bool("update", false, "write the table of docs/metrics.md")

const (
	docPath  = "../../docs/metrics.md"
	docBegin = "<!-- the table: go test ./observe/metrics -update -->\n"
	docEnd   = "<!-- end of the table -->\n"
)

// docs/metrics.md holds the table of Families, word for word: no metric, label or
// value is undocumented.
func TestDocument(t *testing.T) {
	text, err := os.ReadFile(docPath)
	if err != nil {
		t.Fatal(err)
	}
	before, rest, ok := strings.Cut(string(text), docBegin)
	table, after, ok2 := strings.Cut(rest, docEnd)
	if !ok || !ok2 {
		t.Fatalf("%s has no place for the table", docPath)
	}
	if table == Table() {
		return
	}
	if !*update {
		t.Fatalf("%s does not say what the list says: go test ./observe/metrics -update", docPath)
	}
	if err := os.WriteFile(docPath, []byte(before+docBegin+Table()+docEnd+after), 0o644); err != nil {
		t.Fatal(err)
	}
}

func TestFamilies(t *testing.T) {
	seen := map[string]bool{}
	for _, f := range Families {
		if seen[f.Name] {
			t.Errorf("%s stands twice", f.Name)
		}
		seen[f.Name] = true
		if !strings.HasPrefix(f.Name, "portcullis_") || f.Help == "" {
			t.Errorf("%s: want the prefix, and a help", f.Name)
		}
		if (f.Kind == Counter) != strings.HasSuffix(f.Name, "_total") {
			t.Errorf("%s is a %s", f.Name, f.Kind)
		}
		if f.Kind == Counter && f.From == "" {
			t.Errorf("%s does not say since when it counts", f.Name)
		}
		if (f.Kind == Histogram) != (len(f.Bounds) > 0) {
			t.Errorf("%s: bounds %v", f.Name, f.Bounds)
		}
		for _, l := range f.Labels {
			if (l.Values == nil) == (l.Any == "") {
				t.Errorf("%s: the label %s has values and is any, or neither", f.Name, l.Name)
			}
			if len(l.Values) > 64 {
				t.Errorf("%s: the label %s has %d values", f.Name, l.Name, len(l.Values))
			}
		}
	}
	if n := Series(); n > 1200 {
		t.Errorf("a scrape may have %d samples", n)
	}
}

// agent is a Source whose answers a test sets.
type agent struct {
	collects int
	collect  func(Emit)
	alive    error
	ready    error
}

func (a *agent) Collect(_ context.Context, emit Emit) {
	a.collects++
	if a.collect != nil {
		a.collect(emit)
	}
}
func (a *agent) Alive(context.Context) error { return a.alive }
func (a *agent) Ready(context.Context) error { return a.ready }

func serve(t *testing.T, a *agent, i *Instruments, profiles bool) (*httptest.Server, *observer.ObservedLogs) {
	core, logs := observer.New(zap.InfoLevel)
	s := &Server{Source: a, Instruments: i, Log: zap.New(core), Profiles: profiles}
	web := httptest.NewServer(s.handler(&collector{source: a, instruments: i, log: s.Log}))
	t.Cleanup(web.Close)
	return web, logs
}

func get(t *testing.T, url string) (int, string) {
	t.Helper()
	r, err := http.Get(url)
	if err != nil {
		t.Fatal(err)
	}
	defer r.Body.Close()
	b, err := io.ReadAll(r.Body)
	if err != nil {
		t.Fatal(err)
	}
	return r.StatusCode, string(b)
}

func TestScrape(t *testing.T) {
	i := New()
	i.Flow(abi.DirIngress, abi.VerdictPass, abi.EvidenceLease, true)
	i.Flow(abi.DirIngress, abi.VerdictPass, abi.EvidenceLease, false)
	i.Flow(99, 99, 99, true)
	i.Confirmation("grant")
	i.Confirmation("never heard of")
	i.Request("http", "denied")
	i.Request("gopher", "swallowed")
	i.HTTPResponse(403)
	i.HTTPResponse(0)
	i.DNSAnswer(3)
	i.DNSAnswer(-1)
	i.DNSAnswer(23)
	i.Latency("http", 3*time.Millisecond)
	i.Latency("tls", time.Second)
	i.FirstContact(300 * time.Microsecond)
	i.ReuseDelay(-time.Second)
	i.LoopWait(time.Minute)
	i.LoopStep(time.Microsecond)
	i.InsideLost(7)
	a := &agent{collect: func(emit Emit) { emit("portcullis_policies", 3) }}
	web, logs := serve(t, a, i, false)
	code, text := get(t, web.URL+"/metrics")
	if code != http.StatusOK {
		t.Fatalf("%d: %s", code, text)
	}
	for _, want := range []string{
		`portcullis_flows_total{direction="ingress",evidence="lease",verdict="pass"} 1`,
		`portcullis_flows_total{direction="ingress",evidence="not-needed",verdict="pass"} 1`,
		`portcullis_flows_total{direction="egress",evidence="none",verdict="drop"} 1`,
		`portcullis_confirmations_total{kind="grant"} 1`,
		`portcullis_confirmations_total{kind="other"} 1`,
		`portcullis_l7_requests_total{protocol="http",verdict="denied"} 1`,
		`portcullis_l7_requests_total{protocol="unknown",verdict="failed"} 1`,
		`portcullis_http_responses_total{class="4xx"} 1`,
		`portcullis_http_responses_total{class="none"} 1`,
		`portcullis_dns_answers_total{code="nxdomain"} 1`,
		`portcullis_dns_answers_total{code="none"} 1`,
		`portcullis_dns_answers_total{code="other"} 1`,
		`portcullis_l7_latency_seconds_bucket{protocol="http",le="0.005"} 1`,
		`portcullis_l7_latency_seconds_count{protocol="dns"} 0`,
		`portcullis_first_contact_seconds_bucket{le="0.0005"} 1`,
		`portcullis_reuse_delay_seconds_sum 0`,
		`portcullis_loop_wait_seconds_bucket{le="10"} 0`,
		`portcullis_loop_wait_seconds_count 1`,
		`portcullis_l7_lost_total 7`,
		`portcullis_policies 3`,
		`# TYPE portcullis_policies gauge`,
		`go_goroutines `,
		`process_open_fds `,
	} {
		if !strings.Contains(text, "\n"+want) {
			t.Errorf("the scrape has no %s", want)
		}
	}
	if logs.Len() > 0 {
		t.Errorf("logged: %v", logs.All())
	}
	unlisted(t, text)
}

// unlisted reports what a scrape has that is not in Families.
func unlisted(t *testing.T, text string) {
	t.Helper()
	lines := bufio.NewScanner(strings.NewReader(text))
	for lines.Scan() {
		name, ok := strings.CutPrefix(lines.Text(), "# TYPE ")
		if !ok || strings.HasPrefix(name, "go_") || strings.HasPrefix(name, "process_") {
			continue
		}
		name, kind, _ := strings.Cut(name, " ")
		if f, ok := family(name); !ok || string(f.Kind) != kind {
			t.Errorf("the scrape has %s, a %s, which the list does not have", name, kind)
		}
	}
}

// What is not in the list, or has a label that the list does not know, is not
// served, and is said.
func TestUnlistedIsRefused(t *testing.T) {
	a := &agent{collect: func(emit Emit) {
		emit("portcullis_secrets", 1)
		emit("portcullis_endpoints", 1, "default/xwing")
		emit("portcullis_endpoints", 1)
		emit("portcullis_endpoints", 2, "active")
	}}
	web, logs := serve(t, a, New(), false)
	code, text := get(t, web.URL+"/metrics")
	if code != http.StatusOK || !strings.Contains(text, `portcullis_endpoints{state="active"} 2`) {
		t.Errorf("%d: what is in the list is not served", code)
	}
	if strings.Contains(text, "secrets") || strings.Contains(text, "xwing") {
		t.Error("something that is not in the list is served")
	}
	if logs.Len() != 3 {
		t.Errorf("%d lines in the log, want 3: %v", logs.Len(), logs.All())
	}
}

// However often somebody scrapes, the agent is asked once a second.
func TestScrapesShare(t *testing.T) {
	a := &agent{}
	c := &collector{source: a, instruments: New(), log: zap.NewNop()}
	s := &Server{Source: a, Instruments: c.instruments, Log: c.log}
	web := httptest.NewServer(s.handler(c))
	t.Cleanup(web.Close)
	get(t, web.URL+"/metrics")
	c.mu.Lock()
	c.at = time.Now().Add(time.Hour) // it is not a second later, however slow this machine is
	c.mu.Unlock()
	for range 5 {
		get(t, web.URL+"/metrics")
	}
	if a.collects != 1 {
		t.Errorf("asked %d times", a.collects)
	}
	c.mu.Lock()
	c.at = time.Time{}
	c.mu.Unlock()
	if get(t, web.URL+"/metrics"); a.collects != 2 {
		t.Errorf("asked %d times after a second", a.collects)
	}
}

func TestProbes(t *testing.T) {
	a := &agent{}
	web, _ := serve(t, a, New(), false)
	expect := func(path string, wantCode int, wantText string) {
		t.Helper()
		if code, text := get(t, web.URL+path); code != wantCode || !strings.Contains(text, wantText) {
			t.Errorf("%s: %d %q, want %d %q", path, code, text, wantCode, wantText)
		}
	}
	expect("/healthz", 200, "ok")
	expect("/readyz", 200, "ok")
	a.ready = errors.New("no SVID")
	expect("/healthz", 200, "ok")
	expect("/readyz", 503, "no SVID")
	a.alive = errors.New("the loop does not answer")
	expect("/healthz", 503, "the loop does not answer")
	expect("/debug/pprof/", 404, "")
	expect("/", 404, "")

	web, _ = serve(t, a, New(), true)
	expect("/debug/pprof/", 200, "goroutine")
}

// Run ends with its context, and asks the Source no more.
func TestRunEnds(t *testing.T) {
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	a := &agent{}
	ctx, cancel := context.WithCancel(t.Context())
	ended := make(chan error, 1)
	go func() { ended <- (&Server{Source: a, Instruments: New(), Log: zap.NewNop()}).Run(ctx, listener) }()
	if code, _ := get(t, fmt.Sprintf("http://%s/healthz", listener.Addr())); code != 200 {
		t.Errorf("%d", code)
	}
	cancel()
	if err := <-ended; err != nil {
		t.Error(err)
	}
}

func TestNilCountsNothing(t *testing.T) {
	var i *Instruments
	i.Flow(0, 0, 0, true)
	i.Confirmation("grant")
	i.Request("http", "denied")
	i.HTTPResponse(200)
	i.DNSAnswer(0)
	i.Latency("http", 1)
	i.FirstContact(1)
	i.ReuseDelay(1)
	i.LoopWait(1)
	i.LoopStep(1)
	i.InsideLost(1)
}
