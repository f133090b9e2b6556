package agent

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"time"

	"portcullis/agent/api"
	"portcullis/agent/kube"
	"portcullis/bpf/abi"
	"portcullis/datapath"
	"portcullis/ipcache/lease"
	"portcullis/observe/metrics"
	"portcullis/proxy"
)

// Metrics says where metrics and probes of health are served.
type Metrics struct {
	Address  string // ADDRESS:PORT or :PORT; empty: nowhere
	Profiles bool   // /debug/pprof/ too; Address must be of the loopback
}

func (m *Metrics) validate() (errs []error) {
	bad := func(format string, args ...any) { errs = append(errs, fmt.Errorf(format, args...)) }
	loopback := false
	if m.Address != "" {
		text := m.Address
		if text[0] == ':' {
			text = "[::]" + text
		}
		at, err := netip.ParseAddrPort(text)
		if err != nil || at.Port() == 0 {
			bad("--metrics-address %q: want ADDRESS:PORT, or :PORT for every address of the node", m.Address)
		}
		loopback = err == nil && at.Addr().IsLoopback()
	}
	if m.Profiles && !loopback {
		bad("--pprof shows the agent's memory: it needs a --metrics-address of the loopback, e.g. 127.0.0.1:4262")
	}
	return errs
}

// metricsAgain is how long the agent waits until it tries an address again that
// it could not listen on.
const metricsAgain = 10 * time.Second

// serveMetrics serves metrics until ctx ends. An address that cannot be had is an
// alarm and no more: enforcement does not hang on who looks at it.
func (l *loop) serveMetrics(ctx context.Context) error {
	if l.cfg.Metrics.Address == "" {
		return nil
	}
	server := &metrics.Server{Source: measured{l}, Instruments: l.instruments, Log: l.log, Profiles: l.cfg.Metrics.Profiles}
	for ctx.Err() == nil {
		var config net.ListenConfig
		listener, err := config.Listen(ctx, "tcp", l.cfg.Metrics.Address)
		if err == nil {
			l.alarms.clear("metrics")
			err = server.Run(ctx, listener)
		}
		if ctx.Err() != nil {
			return nil
		}
		l.alarms.raise("metrics", fmt.Sprintf("no metrics are served at %s: %v", l.cfg.Metrics.Address, err))
		select {
		case <-ctx.Done():
		case <-time.After(metricsAgain):
		}
	}
	return nil
}

// measured is what metrics are read from. Its methods are called beside the loop.
type measured struct{ l *loop }

// loopTimeout is how long a scrape or a probe waits for the loop.
const loopTimeout = 2 * time.Second

// Alive implements metrics.Source.
func (m measured) Alive(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, loopTimeout)
	defer cancel()
	if err := m.l.call(ctx, func() error { return nil }); err != nil {
		return fmt.Errorf("the agent's loop does not answer: %w", err)
	}
	return nil
}

// Ready implements metrics.Source.
func (m measured) Ready(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, loopTimeout)
	defer cancel()
	return m.l.call(ctx, func() error {
		var errs []error
		for _, p := range m.l.problems() {
			errs = append(errs, errors.New(p))
		}
		return errors.Join(errs...)
	})
}

// problems are what the agent cannot work without and does not have.
func (l *loop) problems() []string {
	s := &api.StatusResponse{}
	l.statusSources(s)
	l.statusProxy(s)
	return s.Problems
}

// Collect implements metrics.Source. What the kernel counts is read even when the
// loop does not answer.
func (m measured) Collect(ctx context.Context, emit metrics.Emit) {
	l := m.l
	emit("portcullis_build_info", 1, Version(), string(l.cfg.Evidence))
	emit("portcullis_start_time_seconds", float64(l.started.UnixMilli())/1000)
	m.packets(emit)
	m.tables(emit)
	m.inside(emit)
	alarms := l.alarms.list()
	for _, a := range alarms {
		emit("portcullis_alarm", 1, a.name)
	}
	emit("portcullis_alarms", float64(len(alarms)))
	readers, lost := l.monitors.counts()
	emit("portcullis_observers", float64(readers))
	emit("portcullis_observer_lost_total", float64(lost))
	m.told(emit)
	if _, err := l.source.GetX509SVID(); err == nil {
		_, end := l.source.Life()
		emit("portcullis_svid_expiry_timestamp_seconds", float64(end.Unix()))
	}

	ctx, cancel := context.WithTimeout(ctx, loopTimeout)
	defer cancel()
	// The samples come by a channel: the loop may get to it when nobody waits.
	type sample struct {
		name   string
		value  float64
		labels []string
	}
	got := make(chan []sample, 1)
	err := l.call(ctx, func() error {
		var out []sample
		l.measure(func(name string, value float64, labels ...string) { out = append(out, sample{name, value, labels}) })
		got <- out
		return nil
	})
	emit("portcullis_agent_answering", truth(err == nil))
	if err == nil {
		for _, s := range <-got {
			emit(s.name, s.value, s.labels...)
		}
	}
}

// told tells of Events of Kubernetes; nobody tells any: all are 0.
func (m measured) told(emit metrics.Emit) {
	var c kube.EventCounts
	if m.l.cfg.teller != nil {
		c = m.l.cfg.teller.Counts()
	}
	emit("portcullis_kubernetes_events_total", float64(c.Created), "created")
	emit("portcullis_kubernetes_events_total", float64(c.Updated), "counted")
	for _, why := range kube.EventLosses {
		emit("portcullis_kubernetes_events_lost_total", float64(c.Lost[why]), why)
	}
}

func truth(b bool) float64 {
	if b {
		return 1
	}
	return 0
}

func (m measured) packets(emit metrics.Emit) {
	dp := m.l.dp
	emit("portcullis_events_lost_total", float64(dp.State().LostEvents()))
	emit("portcullis_events_limited_total", float64(dp.State().LimitedEvents()))
	m.l.callers.collect(emit)
	emit("portcullis_held_packets", float64(dp.Outstanding(0)))
	counters, err := dp.KernelCounters()
	if err != nil {
		m.l.alarms.raise("metrics", fmt.Sprintf("the counters are not known: %v", err))
		return
	}
	for k, c := range counters {
		labels := []string{k.Direction.String(), k.Verdict.String(), k.Reason.String()}
		emit("portcullis_packets_total", float64(c.Packets), labels...)
		emit("portcullis_bytes_total", float64(c.Bytes), labels...)
	}
	// Also what never happened: else the first drop for a reason is no increase.
	// The kernel's count outlives this process and the agent's does not, so the
	// sum of both would fall, which Prometheus would take for a new beginning.
	decided := dp.DecidedDrops()
	for d := range abi.DirMax {
		for r := abi.ReasonNone + 1; r < abi.ReasonMax; r++ {
			k := datapath.CounterKey{Direction: d, Verdict: abi.VerdictDrop, Reason: r}
			emit("portcullis_drops_total", float64(counters[k].Packets), d.String(), r.String(), "kernel")
			emit("portcullis_drops_total", float64(decided[k]), d.String(), r.String(), "agent")
		}
	}
}

func (m measured) tables(emit metrics.Emit) {
	tables, err := m.l.dp.Pressure()
	if err != nil {
		m.l.alarms.raise("metrics", fmt.Sprintf("the fill of the maps is not known: %v", err))
		return
	}
	for _, t := range tables {
		emit("portcullis_table_entries", float64(t.Used), t.Name)
		emit("portcullis_table_capacity", float64(t.Capacity), t.Name)
	}
}

// inside tells of the proxy.
func (m measured) inside(emit metrics.Emit) {
	wanted := false
	select {
	case <-m.l.proxyWanted:
		wanted = true
	default:
	}
	emit("portcullis_proxy_wanted", truth(wanted))
	emit("portcullis_proxy_restarts_total", float64(m.l.proxyRestarts.Load()))
	if m.l.feed == nil {
		emit("portcullis_proxy_up", 0)
		return
	}
	s := m.l.feed.Status()
	emit("portcullis_proxy_up", truth(s.Connected))
	if s.Connected {
		emit("portcullis_proxy_connections", float64(s.Stats.Connections))
	}
	emit("portcullis_proxy_requests_total", float64(s.Stats.Requests), "judged")
	emit("portcullis_proxy_requests_total", float64(s.Stats.Denied), "denied")
	emit("portcullis_proxy_requests_total", float64(s.Stats.Malformed), "malformed")
	emit("portcullis_proxy_connections_total", float64(s.Stats.Accepted), "accepted")
	emit("portcullis_proxy_connections_total", float64(s.Stats.Refused), "refused")
	emit("portcullis_proxy_connections_total", float64(s.Stats.Full), "full")
}

// countInside counts what the proxy judged.
func (l *loop) countInside(r *proxy.Record) {
	what := insideL7(r)
	protocol := what.Protocol
	l.instruments.Request(protocol, what.Verdict)
	if r.Verdict == proxy.Forwarded {
		l.instruments.Latency(protocol, what.Latency)
	}
	if r.HTTP != nil {
		l.instruments.HTTPResponse(what.Status)
	}
	if r.DNS != nil {
		l.instruments.DNSAnswer(what.Code)
	}
}

// measure tells what the loop alone knows. Its cost grows with the bindings, the
// sessions and the endpoints, like that of status.
func (l *loop) measure(emit metrics.Emit) {
	now := l.now()
	emit("portcullis_healthy", truth(len(l.problems()) == 0))
	emit("portcullis_held_packets_total", float64(l.reinjected), "reinjected")
	emit("portcullis_held_packets_total", float64(l.heldDropped), "dropped")
	emit("portcullis_held_packets_total", float64(l.notTaken), "not-taken")
	emit("portcullis_devices_unregistered", float64(l.devicesUnregistered()))
	emit("portcullis_policies", float64(len(l.repo.List())))
	for _, t := range l.ownPressure() {
		emit("portcullis_table_entries", float64(t.Used), t.Name)
		emit("portcullis_table_capacity", float64(t.Capacity), t.Name)
	}
	if l.grants != nil {
		emit("portcullis_leases_granted", float64(l.grants.GrantCount()))
		emit("portcullis_startup_wait_seconds", max(0, l.grants.StartupWait(now)).Seconds())
	}
	var bindings [abi.EvidenceMax]int
	for e := range l.table.All() {
		if n := e.EvidenceAt(int64(now)); e.Binding.Owner != l.cfg.Node && !e.Condemned && int(n) < len(bindings) {
			bindings[n]++
		}
	}
	for e, n := range bindings {
		emit("portcullis_bindings", float64(n), abi.Evidence(e).String())
	}
	states := map[string]int{}
	for _, e := range l.endpoints {
		switch e.state {
		case abi.EPActive:
			states["active"]++
		case abi.EPQuarantined:
			states["quarantined"]++
		default:
			states["other"]++
		}
	}
	for _, s := range []string{"active", "quarantined", "other"} {
		emit("portcullis_endpoints", float64(states[s]), s)
	}
	l.measureSessions(now, emit)
}

func (l *loop) measureSessions(now lease.Time, emit metrics.Emit) {
	type kind struct{ role, state string }
	counts := map[kind]int{}
	for _, o := range l.owner.Sessions() {
		if o.State == lease.StreamOpen {
			counts[kind{"owner", "up"}]++
		} else {
			counts[kind{"owner", "connecting"}]++
		}
	}
	least := time.Duration(-1)
	for _, v := range l.verifier.Sessions() {
		state, _ := verifierState(v, now)
		counts[kind{"verifier", state}]++
		if v.Bindings > 0 && v.Deadline != 0 {
			if left := max(0, v.Deadline.Sub(now)); least < 0 || left < least {
				least = left
			}
		}
	}
	for _, role := range []string{"owner", "verifier"} {
		for _, state := range []string{"up", "connecting", "down"} {
			emit("portcullis_sessions", float64(counts[kind{role, state}]), role, state)
		}
	}
	if least >= 0 {
		emit("portcullis_lease_remaining_seconds", least.Seconds())
	}
}
