package agent

import (
	"testing"

	"portcullis/observe/flow"
)

// A reader that lags loses what is over its queue, and is told how many; the
// agent and other readers do not wait for it.
func TestMonitorLag(t *testing.T) {
	const lost = 1000
	m := newMonitors()
	all := func(*flow.Record) bool { return true }
	slow, none := m.subscribe(all), m.subscribe(func(*flow.Record) bool { return false })
	for range monitorQueue + lost {
		m.publish(flow.Record{})
	}
	if n := m.takeLost(slow); n != lost || len(slow.records) != monitorQueue {
		t.Errorf("%d lost, %d wait; want %d and %d", n, len(slow.records), lost, monitorQueue)
	}
	if n := m.takeLost(slow); n != 0 {
		t.Errorf("told %d a second time", n)
	}
	if n := m.takeLost(none); n != 0 {
		t.Errorf("a reader of nothing lost %d", n)
	}
}

// Whoever may open the local API's socket cannot fill the agent's memory with
// monitors that nobody reads.
func TestMonitorsAreBounded(t *testing.T) {
	m := newMonitors()
	all := func(*flow.Record) bool { return true }
	var first *monitor
	for range maxMonitors {
		first = m.subscribe(all)
	}
	if first == nil || m.subscribe(all) != nil {
		t.Fatalf("the last of %d: %v; one more was taken", maxMonitors, first)
	}
	m.unsubscribe(first)
	if m.subscribe(all) == nil {
		t.Error("no room after one has ended")
	}
}
