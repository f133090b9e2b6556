package agent

import (
	"net/netip"
	"testing"
	"time"

	"portcullis/bpf/abi"
	"portcullis/datapath"
	"portcullis/datapath/hold"
	"portcullis/observe/flow"
)

// A reader that lags loses what is over its queue, and is told how many; the
// agent and other readers do not wait for it.
func TestMonitorLag(t *testing.T) {
	const lost = 1000
	m := newMonitors(0)
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
	m := newMonitors(0)
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

// What nobody listened to is kept for who asks later, what was lost before it
// came here included.
func TestFlowsAreKept(t *testing.T) {
	l := &loop{monitors: newMonitors(3)}
	l.cfg.Node = "n1"
	if l.monitors.empty() {
		t.Fatal("records are for nobody")
	}
	for i := range 4 {
		l.monitors.publish(flow.Record{BootTime: uint64(i)})
	}
	l.keepLost(7, flow.LostKernel)
	l.keepLost(0, flow.LostKernel)
	buf := make([]flow.Record, 5)
	n, _, lost := l.monitors.ring.Read(0, buf)
	if n != 3 || lost != 2 || buf[0].BootTime != 2 || buf[1].BootTime != 3 {
		t.Fatalf("%d kept, %d lost: %+v", n, lost, buf[:n])
	}
	if r := buf[2]; r.Lost == nil || *r.Lost != (flow.Lost{Count: 7, Where: flow.LostKernel}) || r.Node != "n1" || r.Time.IsZero() {
		t.Errorf("of what the kernel lost: %+v", r)
	}
}

// The time for which a packet was held is told to the event about it, once, and
// packets of which no event comes do not pile up.
func TestHeldTimes(t *testing.T) {
	local, peer := netip.MustParseAddr("10.1.0.3"), netip.MustParseAddr("10.2.0.2")
	for _, direction := range []abi.Direction{abi.DirIngress, abi.DirEgress} {
		var h heldTimes
		ev := abi.Event{Src: datapath.Addr(local), Dst: datapath.Addr(peer), Sport: 4000, Dport: 80, Proto: 6, Endpoint: 24, Direction: uint8(direction)}
		if direction == abi.DirIngress {
			ev.Src, ev.Dst = ev.Dst, ev.Src
		}
		r := hold.Record{Local: local, Peer: peer, Sport: 4000, Dport: 80, Proto: 6, Endpoint: 24, Direction: direction}
		h.put(&r, time.Millisecond)
		other := ev
		other.Sport++
		if d := h.take(&other); d != 0 {
			t.Errorf("%v: another packet was held %v", direction, d)
		}
		if d := h.take(&ev); d != time.Millisecond {
			t.Errorf("%v: held %v", direction, d)
		}
		if d := h.take(&ev); d != 0 {
			t.Errorf("%v: told twice", direction)
		}
		for i := range 5 * heldGeneration {
			r.Endpoint = uint32(i)
			h.put(&r, 1)
		}
		if n := len(h.now) + len(h.last); n > 2*heldGeneration {
			t.Errorf("%d packets are remembered", n)
		}
	}
}
