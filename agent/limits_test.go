package agent

import (
	"strings"
	"testing"

	"portcullis/bpf/abi"
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
		rows[p.Name] = p.Capacity
	}
	for name, capacity := range map[string]uint64{"sessions": 2, "grants": 5, "bindings": 64, "conntrack": 64, "held": 4096, "held-endpoint": 64, "fragments": 64} {
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
	if text := l.alarmText("map-pressure"); !strings.Contains(text, "sessions has 2 of 2") {
		t.Errorf("alarm map-pressure: %q", text)
	}
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
	} {
		c := valid()
		tc.set(&c)
		if err := c.Validate(); err == nil || !strings.Contains(err.Error(), tc.want) {
			t.Errorf("want %s refused, got %v", tc.want, err)
		}
	}
}
