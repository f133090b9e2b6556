package agent

import (
	"net/netip"
	"testing"
	"time"

	"portcullis/agent/kube"
	"portcullis/bpf/abi"
	"portcullis/datapath"
	"portcullis/identity"
	"portcullis/ipcache"
)

// TestModeWatch: what the API server tells is believed under a deadline that
// moves with proofs only; the kernel has it, over a restart too, and another mode
// believes nothing of it.
func TestModeWatch(t *testing.T) {
	n := newNode(t)
	first := n.inCluster()
	n.cfg.Evidence, n.cfg.WatchFreshness = ModeWatch, time.Hour
	l := n.mustStart()
	index := l.watchLease
	pod := func(ip, name string) (netip.Addr, *kube.Pod) {
		p := podOf(identity.NewUID(), name, map[string]string{"app": name})
		p.Node = "n2"
		return netip.MustParseAddr(ip), p
	}
	inRange, a := pod("10.1.2.7", "a")
	floating, b := pod("198.51.100.7", "b")
	elsewhere, c := pod("10.1.1.99", "c") // in this node's range: n2 cannot say that
	told := with(first, func(p *kube.Picture) { p.Remote = map[netip.Addr]*kube.Pod{inRange: a, floating: b, elsewhere: c} })
	slot := func(ip netip.Addr) (abi.Slot, bool) {
		for _, s := range l.dp.Slots() {
			if s.Stamp != 0 && datapath.AddrFrom(s.IP) == ip {
				return s.Slot, true
			}
		}
		return abi.Slot{}, false
	}
	l.take(told)
	for _, ip := range []netip.Addr{inRange, floating, netip.MustParseAddr("192.0.2.2")} {
		s, ok := slot(ip)
		if !ok || s.Lease != index || index < ipcache.LeaseFirst || s.Evidence != uint8(identity.EvidenceWatch) {
			t.Errorf("%s: %v %+v, want lease %d", ip, ok, s, index)
		}
	}
	if _, ok := slot(elsewhere); ok {
		t.Error("an IP of this node's range is believed of another node's pod")
	}
	if d := l.dp.Deadline(index); d != 0 {
		t.Errorf("a deadline of %d without a proof", d)
	}
	l.alarmWatch()
	if !raised(l, "watch") {
		t.Error("nobody is told that nothing is proved")
	}
	at := l.now().Add(-time.Minute)
	l.take(with(told, func(p *kube.Picture) { p.Fresh = int64(at) }))
	if d, want := l.dp.Deadline(index), uint64(at.Add(time.Hour)); d > want || d < want-uint64(time.Second) {
		t.Errorf("deadline %d, want %d at most", d, want)
	}
	l.alarmWatch()
	if raised(l, "watch") {
		t.Error("an alarm that is over")
	}
	for _, m := range l.listBindings(map[netip.Addr]bool{inRange: true}) {
		if m.Mode != "watch" || m.Evidence != "watch" || m.Remaining.AsDuration() < 50*time.Minute {
			t.Errorf("listed as %+v", m)
		}
	}
	// A pod that went, another on its IP, and a snapshot, which says nothing of IPs.
	_, d := pod("10.1.2.7", "d")
	l.take(with(first, func(p *kube.Picture) { p.Remote = map[netip.Addr]*kube.Pod{inRange: d} }))
	if e, ok := l.table.Get(inRange); !ok || e.Binding.UID != d.UID {
		t.Errorf("the new pod on an IP: %+v", e)
	}
	if _, ok := slot(floating); ok {
		t.Error("a pod that went is believed")
	}
	l.take(with(first, func(p *kube.Picture) { p.Listed = false }))
	if _, ok := slot(inRange); !ok {
		t.Error("a snapshot ends what is believed")
	}
	// This node's own workload with a floating IP.
	n.veth("a0")
	n.run(l, app("a0", "198.51.100.9"))

	deadline := l.dp.Deadline(index)
	n.crash(l)
	l = n.mustStart()
	if _, ok := slot(inRange); !ok || l.watchLease != index || l.dp.Deadline(index) != deadline {
		t.Errorf("after a restart: %v, index %d, deadline %d, want %d and %d", ok, l.watchLease, l.dp.Deadline(index), index, deadline)
	}
	n.crash(l)
	n.cfg.Evidence = ModeLease
	l = n.mustStart()
	defer n.crash(l)
	if _, ok := slot(inRange); ok {
		t.Error("mode lease goes on with what mode watch believed")
	}
	if d := l.dp.Deadline(index); d != 0 {
		t.Errorf("a deadline of %d is left to the next session", d)
	}
}
