package agent

import (
	"net/netip"
	"strings"
	"testing"
	"time"

	"portcullis/bpf/abi"
	"portcullis/ipcache"
	"portcullis/ipcache/lease"
)

func (l *loop) alarmText(name string) string {
	for _, a := range l.alarms.list() {
		if a.name == name {
			return a.text
		}
	}
	return ""
}

// What is nearly full, and what was dropped because something was, is an alarm
// (I6); what an earlier agent dropped is not this one's.
func TestLimitsRaiseAlarms(t *testing.T) {
	n := newNode(t)
	n.cfg.Sessions, n.cfg.Grants = 2, 5
	l := n.mustStart()
	n.cfg.FragmentsPerEndpoint, n.cfg.Endpoints, n.cfg.RangeEntries, n.cfg.SourceEntries, n.cfg.ServiceEntries, n.cfg.L7ServiceEntries, n.cfg.NamesPerEndpoint = 32, 7, 100, 9, 11, 13, 14
	l.dp.CountDrop(abi.DirEgress, abi.ReasonHoldOverflow)
	n.crash(l)
	l = n.mustStart()
	defer n.crash(l)
	rows := map[string]uint64{}
	limits, err := l.pressure()
	if err != nil {
		t.Fatal(err)
	}
	for _, p := range limits {
		if rows[p.Name] = p.Capacity; sizedBy[p.Name] == "" {
			t.Errorf("which flag sizes %s?", p.Name)
		}
	}
	for name, capacity := range map[string]uint64{"sessions": 2, "grants": 5, "bindings": 64, "conntrack": 64, "held": 4096, "held-endpoint": 64,
		"fragments": 32, "endpoints": 7, "ranges": 100, "sources": 9, "services": 11, "l7-services": 13, "names": 14} {
		if rows[name] != capacity {
			t.Errorf("%s has room for %d, want %d", name, rows[name], capacity)
		}
	}
	l.alarmLimits()
	if all := l.alarms.list(); len(all) != 0 {
		t.Fatalf("alarms at the start: %v", all)
	}
	for name, reason := range map[string]abi.Reason{"hold-overflow": abi.ReasonHoldOverflow, "map-full": abi.ReasonMapFull} {
		for range 3 {
			l.dp.CountDrop(abi.DirIngress, reason)
		}
		l.alarmLimits()
		if text := l.alarmText(name); !strings.HasPrefix(text, "3 packets") {
			t.Errorf("alarm %s: %q", name, text)
		}
	}
	if text := l.alarmText("map-pressure"); text != "" {
		t.Errorf("alarm map-pressure: %s", text)
	}
	for range 2 {
		if _, err := l.table.AcquireLease(); err != nil {
			t.Fatal(err)
		}
	}
	if _, err := l.table.AcquireLease(); err == nil {
		t.Error("a third session has a lease index")
	}
	l.alarmLimits()
	if text := l.alarmText("map-pressure"); !strings.Contains(text, "sessions has 2 of 2 (--sessions)") {
		t.Errorf("alarm map-pressure: %q", text)
	}
	l.answer(lease.Answer{IP: netip.MustParseAddr("10.2.0.1"), Why: lease.UnansweredMapFull})
	if text := l.alarmText("map-full"); !strings.Contains(text, "raise --sessions") {
		t.Errorf("no lease index is left: %q", text)
	}
	if err := l.table.ReleaseLease(ipcache.LeaseFirst); err != nil {
		t.Fatal(err)
	}
	l.answer(lease.Answer{IP: netip.MustParseAddr("10.2.0.1"), Why: lease.UnansweredMapFull})
	if text := l.alarmText("map-full"); !strings.Contains(text, "raise --bindings") {
		t.Errorf("no slot is left: %q", text)
	}
}

// A smaller number of workloads than there are is refused at the start, in words
// that say what to do; with room again they stand as before.
func TestRestartWithOtherEndpoints(t *testing.T) {
	n := newNode(t)
	n.cfg.Endpoints = 2
	for _, name := range []string{"a", "b", "c"} {
		n.veth(name)
	}
	l := n.mustStart()
	n.run(l, app("a", "10.1.1.1"))
	b := n.run(l, app("b", "10.1.1.2"))
	if _, err := n.register(l, app("c", "10.1.1.3")); err == nil {
		t.Error("a third workload of two is registered")
	}
	n.crash(l)
	n.cfg.Endpoints = 1
	if l, err := n.start(); err == nil || !strings.Contains(err.Error(), "--endpoints") {
		t.Errorf("room for one workload, and there are two: %v", err)
		if err == nil {
			n.crash(l)
		}
	}
	n.cfg.Endpoints, n.cfg.FragmentsPerEndpoint = 3, 8
	l = n.mustStart()
	defer n.crash(l)
	if ep := n.inKernel(l, "b"); ep.State != uint32(abi.EPActive) || ep.ID != b.id {
		t.Errorf("after the restart: %+v", ep)
	}
	n.run(l, app("c", "10.1.1.3"))
}

func TestValidateSizes(t *testing.T) {
	for _, tc := range []struct {
		want string
		set  func(*Config)
	}{
		{"--grants 0", func(c *Config) { c.Grants = 0 }},
		{"--sessions -1", func(c *Config) { c.Sessions = -1 }},
		{"--sessions 1048574", func(c *Config) { c.Sessions = maxSessions + 1 }},
		{"--held-bytes 65536", func(c *Config) { c.HeldBytes = 64 << 10 }},
		{"--event-bytes 5000", func(c *Config) { c.EventBytes = 5000 }},
		{"--endpoints 65536", func(c *Config) { c.Endpoints = maxEndpoints + 1 }},
		{"--endpoints 0", func(c *Config) { c.Endpoints = 0 }},
		{"no room for --endpoints 1024", func(c *Config) { c.EndpointMarkMask = 0x3ff0 }},
		{"--fragments-per-endpoint 12", func(c *Config) { c.FragmentsPerEndpoint = 12 }},
		{"--fragments-per-endpoint 0", func(c *Config) { c.FragmentsPerEndpoint = 0 }},
		{"want at most 8184 with --endpoints 1024", func(c *Config) { c.FragmentsPerEndpoint = 8192 }},
		{"--range-entries 0", func(c *Config) { c.RangeEntries = 0 }},
		{"--source-entries -1", func(c *Config) { c.SourceEntries = -1 }},
		{"--service-entries 0", func(c *Config) { c.ServiceEntries = 0 }},
		{"--l7-service-entries 0", func(c *Config) { c.L7ServiceEntries = 0 }},
		{"--names-per-endpoint 0", func(c *Config) { c.NamesPerEndpoint = 0 }},
		{"--proxy-connections 0", func(c *Config) { c.ProxyConnections = 0 }},
		{"--monitor-aggregation-interval 1ms", func(c *Config) { c.AggregationInterval = time.Millisecond }},
		{"--monitor-aggregation-interval 48h", func(c *Config) { c.AggregationInterval = 48 * time.Hour }},
		{"--events-per-source -1", func(c *Config) { c.EventsPerSource = -1 }},
	} {
		c := valid()
		tc.set(&c)
		if err := c.Validate(); err == nil || !strings.Contains(err.Error(), tc.want) {
			t.Errorf("want %s refused, got %v", tc.want, err)
		}
	}
}
