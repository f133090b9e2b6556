package main

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"net"
	"net/http"
	"net/netip"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	"portcullis/agent/api"
	"portcullis/chaos/lab"
)

const (
	patience    = 2 * time.Minute
	metricsPort = 4262
	window      = "10s" // what Grafana would put for $__rate_interval
)

var (
	program   = flag.String("portcullis", "bin/portcullis", "the agent's binary")
	directory = flag.String("monitoring", "deploy/monitoring", "directory of rules and dashboard")
	examples  = flag.String("examples", "docs/examples", "directory of the example policies")
	write     = flag.String("write", "", "Markdown file to write the result into, between its markers")
)

func main() {
	flag.Parse()
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	report, err := run(ctx)
	if err == nil {
		fmt.Print(report)
		err = publish(report)
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, "prometheus:", err)
		os.Exit(1)
	}
}

func run(ctx context.Context) (report string, err error) {
	for _, tool := range []string{"prometheus", "promtool"} {
		if _, err := exec.LookPath(tool); err != nil {
			return "", fmt.Errorf("there is no %s: `apt-get install prometheus` brings both; its service need not run", tool)
		}
	}
	rules := filepath.Join(*directory, "prometheus-rules.yaml")
	for _, args := range [][]string{{"check", "rules", rules}, {"test", "rules", filepath.Join(*directory, "prometheus-rules-test.yaml")}} {
		if out, err := exec.CommandContext(ctx, "promtool", args...).CombinedOutput(); err != nil {
			return "", fmt.Errorf("promtool %s: %w\n%s", strings.Join(args, " "), err, out)
		}
	}
	queries, err := dashboard(filepath.Join(*directory, "grafana-dashboard.json"))
	if err != nil {
		return "", err
	}
	w, err := newWorld(ctx)
	if err != nil {
		return "", err
	}
	defer func() {
		// Also when ctx has ended: nothing may be left.
		err = errors.Join(err, w.Down(context.WithoutCancel(ctx)), w.Close())
	}()
	ctx, cancel := context.WithCancel(ctx)
	traffic := make(chan struct{})
	go func() { defer close(traffic); w.talk(ctx) }()
	defer func() { cancel(); <-traffic }()
	p, err := w.startPrometheus(ctx, rules)
	if err != nil {
		return "", err
	}
	defer func() { err = errors.Join(err, p.stop()) }()
	return w.judge(ctx, p, queries)
}

// query is one query of the dashboard.
type query struct{ panel, expr string }

// dashboard reads the queries, with what Grafana would put for its variables.
func dashboard(path string) (out []query, err error) {
	b, err := os.ReadFile(path)
	if err != nil {
		return nil, err
	}
	var d struct {
		Panels []struct {
			Title   string
			Targets []struct{ Expr string }
		}
	}
	if err := json.Unmarshal(b, &d); err != nil {
		return nil, fmt.Errorf("%s: %w", path, err)
	}
	fill := strings.NewReplacer("$__rate_interval", window, "$node", ".*")
	for _, p := range d.Panels {
		for _, t := range p.Targets {
			out = append(out, query{p.Title, fill.Replace(t.Expr)})
		}
	}
	if len(out) == 0 {
		return nil, fmt.Errorf("%s has no queries", path)
	}
	return out, nil
}

// world is the lab.
type world struct {
	*lab.Lab
	first   string // the node where Prometheus runs
	targets []string
}

func newWorld(ctx context.Context) (*world, error) {
	binary, err := filepath.Abs(*program)
	if err != nil {
		return nil, err
	}
	if _, err := os.Stat(binary); err != nil {
		return nil, fmt.Errorf("no binary: `make build` first: %w", err)
	}
	c, err := lab.LoadConfig(filepath.Join(*examples, "starwars.cluster.yaml"))
	if err != nil {
		return nil, err
	}
	c.TTL, c.Heartbeat = 10*time.Second, time.Second
	c.AgentFlags = append(c.AgentFlags, fmt.Sprintf("--metrics-address=:%d", metricsPort))
	policy, err := os.ReadFile(filepath.Join(*examples, "networkpolicy-L7.yaml"))
	if err != nil {
		return nil, err
	}
	l, err := lab.Up(ctx, c, lab.Options{Name: fmt.Sprintf("prom%d", os.Getpid()), Binary: binary, Progress: os.Stderr})
	if err != nil {
		return nil, err
	}
	w := &world{Lab: l, first: c.Nodes[0].Name}
	status, err := l.Status(ctx)
	if err == nil {
		for _, n := range status.Nodes {
			for _, ip := range n.IPs {
				if ip.Is4() {
					w.targets = append(w.targets, netip.AddrPortFrom(ip, metricsPort).String())
				}
			}
		}
		err = l.ImportPolicies(ctx, &api.PolicyFile{Name: "networkpolicy-L7.yaml", Content: policy})
	}
	if err != nil {
		return nil, errors.Join(err, l.Down(context.WithoutCancel(ctx)), l.Close())
	}
	return w, nil
}

// talk has workloads call the deathstar until ctx ends: a request that is allowed,
// one that is denied, and one from a workload that may not call at all. What
// became of them is what the metrics say.
func (w *world) talk(ctx context.Context) {
	deathstar, err := w.Get("deathstar")
	if err != nil {
		return
	}
	call := func(from, method, path string) {
		_ = w.InWorkload(from, func() error {
			dialer := net.Dialer{Timeout: time.Second}
			conn, err := dialer.DialContext(ctx, "tcp4", netip.AddrPortFrom(deathstar.IP4(), 80).String())
			if err != nil {
				return err
			}
			client := http.Client{Timeout: 5 * time.Second, Transport: &http.Transport{DisableKeepAlives: true,
				DialContext: func(context.Context, string, string) (net.Conn, error) { return conn, nil }}}
			r, err := http.NewRequestWithContext(ctx, method, "http://deathstar"+path, nil)
			if err != nil {
				return err
			}
			answer, err := client.Do(r)
			if err == nil {
				answer.Body.Close()
			}
			return err
		})
	}
	for tick := time.NewTicker(200 * time.Millisecond); ; {
		select {
		case <-ctx.Done():
			tick.Stop()
			return
		case <-tick.C:
			call("tiefighter", http.MethodPost, "/v1/request-landing")
			call("tiefighter", http.MethodPut, "/v1/exhaust-port")
			call("xwing", http.MethodPost, "/v1/request-landing")
		}
	}
}

// judge waits until everything was scraped a few times, and asks every question.
func (w *world) judge(ctx context.Context, p *prometheus, queries []query) (string, error) {
	if err := p.until(ctx, "every agent is scraped", func() error { return p.has(ctx, "count(up == 1)", float64(len(w.targets))) }); err != nil {
		return "", err
	}
	if err := p.until(ctx, "requests and drops are counted", func() error {
		return errors.Join(p.atLeast(ctx, `sum(increase(portcullis_l7_requests_total{verdict="denied"}[1m]))`, 1),
			p.atLeast(ctx, `sum(increase(portcullis_drops_total{reason="policy-denied"}[1m]))`, 1))
	}); err != nil {
		return "", err
	}
	var errs []error
	series := 0
	for _, q := range queries {
		n := 0
		err := p.until(ctx, q.panel, func() (err error) {
			if n, err = p.count(ctx, q.expr); err == nil && n == 0 {
				err = errors.New("no series")
			}
			return err
		})
		if err != nil {
			errs = append(errs, fmt.Errorf("panel %q: %s: %w", q.panel, q.expr, err))
		}
		series += n
	}
	rules, err := p.rules(ctx)
	if err != nil || errors.Join(errs...) != nil {
		return "", errors.Join(append(errs, err)...)
	}
	scrape, err := p.value(ctx, "max(scrape_duration_seconds)")
	samples, err2 := p.value(ctx, "max(scrape_samples_scraped)")
	if err := errors.Join(err, err2); err != nil {
		return "", err
	}
	last := w.first // whose agent is killed: not Prometheus's own node
	if status, err := w.Status(ctx); err == nil {
		last = status.Nodes[len(status.Nodes)-1].Name
	}
	if err := w.KillAgent(ctx, last); err != nil {
		return "", err
	}
	if err := p.until(ctx, "the alert on a killed agent", func() error {
		return p.atLeast(ctx, `count(ALERTS{alertname="PortcullisAgentDown"})`, 1)
	}); err != nil {
		return "", err
	}
	return fmt.Sprintf("Prometheus %s, three agents, a scrape a second: %d of %d queries of the dashboard answered, with %d series; %d of %d rules evaluated without an error; "+
		"`PortcullisAgentDown` came when an agent was killed. The longest scrape took %.0f ms, the greatest had %.0f samples.\n",
		p.version, len(queries), len(queries), series, rules, rules, scrape*1e3, samples), nil
}

// publish writes the report into the document, between its markers.
func publish(report string) error {
	if *write == "" {
		return nil
	}
	const begin, end = "<!-- make prometheus -->\n", "<!-- end of make prometheus -->\n"
	text, err := os.ReadFile(*write)
	if err != nil {
		return err
	}
	before, rest, ok := strings.Cut(string(text), begin)
	_, after, ok2 := strings.Cut(rest, end)
	if !ok || !ok2 {
		return fmt.Errorf("%s has no place for the result", *write)
	}
	return os.WriteFile(*write, []byte(before+begin+cmp.Or(report, "\n")+end+after), 0o644)
}
