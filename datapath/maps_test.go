package datapath_test

import (
	"errors"
	"maps"
	"net/netip"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/cilium/ebpf"

	"portcullis/bpf/abi"
	"portcullis/datapath"
)

func contents[K comparable, V any](l *lab, name string) map[K]V {
	l.t.Helper()
	out := map[K]V{}
	var k K
	var v V
	it := pinnedMap(l, name).Iterate()
	for it.Next(&k, &v) {
		out[k] = v
	}
	l.must(it.Err())
	return out
}

// What is stored into mapped memory is what the kernel has.
func TestSlotsAreStoredInPlace(t *testing.T) {
	l := newLab(t)
	d := l.open()
	stamp := d.State().ReserveStamps(1)
	want := abi.Slot{Stamp: stamp, IP: datapath.Addr(remote6), Installed: 11, Generation: 12, Identity: 13, Lease: sessionLease, Ifindex: 14, Evidence: 2}
	cold := abi.SlotCold{UID: [16]byte{1}, OwnerBoot: [16]byte{2}, IdentityHash: [32]byte{3}, Owner: [64]byte{'n'}}
	l.must(d.InstallSlot(9, want, cold))
	cold.Stamp = stamp
	var s abi.Slot
	var c abi.SlotCold
	var b abi.Binding
	l.must(pinnedMap(l, "slots").Lookup(uint32(9), &s))
	l.must(pinnedMap(l, "slots_cold").Lookup(uint32(9), &c))
	l.must(pinnedMap(l, "bindings").Lookup(&want.IP, &b))
	if s != want || c != cold || b.Slot != 9 || b.Stamp != stamp {
		t.Errorf("the kernel has %+v, %+v, %+v", s, c, b)
	}
	for i, got := range d.Slots() {
		if i != 9 || got.Slot != want || got.Cold != cold {
			t.Errorf("slot %d is %+v", i, got)
		}
	}

	l.must(d.SwitchLease(9, stamp, sessionLease+1))
	l.must(pinnedMap(l, "slots").Lookup(uint32(9), &s))
	if s.Lease != sessionLease+1 || s.Stamp != stamp {
		t.Errorf("after the switch: %+v", s)
	}
	if err := d.SwitchLease(9, stamp+1, sessionLease); !errors.Is(err, datapath.ErrStaleStamp) {
		t.Errorf("switch of another stamp: %v", err)
	}

	// Another's stamp is not zeroed, nor the entry that leads to it removed.
	l.must(d.ZeroSlot(9, stamp+1, remote6))
	l.must(pinnedMap(l, "slots").Lookup(uint32(9), &s))
	l.must(pinnedMap(l, "bindings").Lookup(&want.IP, &b))
	if s.Stamp != stamp {
		t.Error("zeroed another binding")
	}
	l.must(d.ZeroSlot(9, stamp, remote6))
	l.must(d.ZeroSlot(9, stamp, remote6)) // it may be repeated
	l.must(pinnedMap(l, "slots").Lookup(uint32(9), &s))
	if err := pinnedMap(l, "bindings").Lookup(&want.IP, &b); s.Stamp != 0 || !errors.Is(err, ebpf.ErrKeyNotExist) {
		t.Errorf("after zeroing: stamp %d, entry %v", s.Stamp, err)
	}
	for i := range d.Slots() {
		t.Errorf("slot %d is still listed", i)
	}

	for name, err := range map[string]error{
		"resting":     d.InstallSlot(9, want, cold),
		"slot 0":      d.InstallSlot(0, want, cold),
		"slot 65":     d.InstallSlot(65, want, cold),
		"stamp 0":     d.InstallSlot(1, abi.Slot{IP: want.IP}, cold),
		"no ip":       d.InstallSlot(1, abi.Slot{Stamp: 5}, cold),
		"lease 16":    d.InstallSlot(1, abi.Slot{Stamp: 5, IP: want.IP, Lease: 16}, cold),
		"zero 0":      d.ZeroSlot(0, 1, remote6),
		"switch 99":   d.SwitchLease(99, 1, 3),
		"deadline 1":  d.SetDeadline(uint32(abi.LeaseLocal), 5),
		"deadline 2":  d.SetDeadline(uint32(abi.LeaseClassic), 5),
		"deadline 16": d.SetDeadline(16, 5),
	} {
		if err == nil {
			t.Errorf("%s: accepted", name)
		}
	}
}

func TestDeadlines(t *testing.T) {
	l := newLab(t)
	d := l.open()
	deadline := func(i uint32) uint64 {
		var v abi.Lease
		l.must(pinnedMap(l, "leases").Lookup(i, &v))
		return v.Deadline
	}
	if deadline(uint32(abi.LeaseNone)) != 0 || deadline(uint32(abi.LeaseLocal)) != 1<<64-1 || deadline(uint32(abi.LeaseClassic)) != 0 {
		t.Error("the reserved leases are wrong")
	}
	at := d.Now() + int64(time.Hour)
	l.must(d.SetDeadline(sessionLease, at))
	if got := deadline(sessionLease); got != uint64(at)-uint64(10*time.Millisecond) || d.Deadline(sessionLease) != got {
		t.Errorf("stored %d for %d: not one tick early", got, at)
	}
	for _, v := range []int64{0, -5, 1} {
		l.must(d.SetDeadline(sessionLease, v))
		if got := deadline(sessionLease); got != 0 {
			t.Errorf("deadline %d is stored as %d", v, got)
		}
	}

	// The programs see it at once: a flow of a minute ago ends, and begins
	// again under a new deadline.
	l.serve(d)
	l.confirm(d, 1, remote4)
	server, peer := l.udp(l.workload, workload4, 5000), l.udp(l.remote, remote4, 6000)
	l.send(peer, workload4, 5000, "one")
	l.receive(server, "one")
	l.must(d.SetDeadline(sessionLease, 0))
	l.send(peer, workload4, 5000, "two")
	l.eventually("a drop after the lease's end", func() bool { return dropped(l, d, abi.DirIngress, abi.ReasonStaleLease) == 1 })
	l.nothing(server)
	l.must(d.SetDeadline(sessionLease, at))
	l.send(peer, workload4, 5000, "three")
	l.receive(server, "three")

	// Mode classic gives its lease index no end; leaving it takes that back.
	l.must(d.Close())
	cfg := l.config()
	cfg.Classic = true
	c, err := datapath.Open(cfg)
	l.must(err)
	if deadline(uint32(abi.LeaseClassic)) != 1<<64-1 {
		t.Error("mode classic has no lease")
	}
	l.must(c.Close())
	l.open()
	if deadline(uint32(abi.LeaseClassic)) != 0 {
		t.Error("mode classic's lease outlived it")
	}
}

func TestFullMaps(t *testing.T) {
	l := newLab(t)
	cfg := l.config()
	cfg.Bindings, cfg.Policy, cfg.Ranges, cfg.Endpoints = 2, 4, 2, 1
	d, err := datapath.Open(cfg)
	l.must(err)
	t.Cleanup(func() { l.must(d.Close()) })

	ip := func(i byte) netip.Addr { return netip.AddrFrom4([4]byte{10, 9, 0, i}) }
	l.confirm(d, 1, ip(1))
	stamp2 := l.confirm(d, 2, ip(2))
	l.must(d.ZeroSlot(2, stamp2, netip.Addr{})) // its entry stays
	rested := func(install func() error) error {
		for deadline := time.Now().Add(10 * time.Second); ; time.Sleep(20 * time.Millisecond) {
			if err := install(); err == nil || !strings.Contains(err.Error(), "emptied") || time.Now().After(deadline) {
				return err
			}
		}
	}
	err = rested(func() error {
		return d.InstallSlot(2, abi.Slot{Stamp: 50, IP: datapath.Addr(ip(3))}, abi.SlotCold{})
	})
	if !errors.Is(err, datapath.ErrMapFull) || strings.Contains(err.Error(), "emptied") {
		t.Errorf("a third binding: %v", err)
	}
	var s abi.Slot
	l.must(pinnedMap(l, "slots").Lookup(uint32(2), &s))
	if s.Stamp != 0 {
		t.Error("the slot of a binding that was not installed has a stamp")
	}
	l.must(rested(func() error { // an IP that has an entry needs no room
		return d.InstallSlot(2, abi.Slot{Stamp: 60, IP: datapath.Addr(ip(2))}, abi.SlotCold{})
	}))

	entry := func(set uint32, port byte, flags uint8) map[abi.PolicyKey]abi.Policy {
		return map[abi.PolicyKey]abi.Policy{{Prefixlen: 96, Set: set, Identity: 5, Proto: 6, Port: [2]byte{0, port}}: {Flags: flags}}
	}
	l.must(d.PutPolicy(1, entry(1, 1, 1)))
	l.must(d.PutPolicy(1, entry(1, 2, 1)))
	before := contents[abi.PolicyKey, abi.Policy](l, "policy")
	tooMuch := entry(1, 1, 2) // replaces one, and adds three
	for i := range byte(3) {
		maps.Copy(tooMuch, entry(1, 10+i, 1))
	}
	if err := d.PutPolicy(1, tooMuch); !errors.Is(err, datapath.ErrMapFull) {
		t.Errorf("too much policy: %v", err)
	}
	if after := contents[abi.PolicyKey, abi.Policy](l, "policy"); !maps.Equal(before, after) {
		t.Errorf("a failed PutPolicy left %v, had %v", after, before)
	}
	if err := d.PutPolicy(2, entry(3, 1, 1)); err == nil {
		t.Error("an entry of another set was taken")
	}
	if err := d.PutPolicy(2, map[abi.PolicyKey]abi.Policy{{Prefixlen: 72, Set: 2, Identity: 5}: {Flags: uint8(abi.PolicyAllow | abi.PolicyL7)}}); err == nil {
		t.Error("rules inside a protocol were accepted, which no program obeys")
	}
	if err := d.PutPolicy(0, nil); err == nil {
		t.Error("set 0 was taken")
	}
	// A set that is to be removed makes room at once when there is none.
	l.must(d.PutPolicy(2, entry(2, 1, 1)))
	l.must(d.DeletePolicySet(1))
	if len(contents[abi.PolicyKey, abi.Policy](l, "policy")) != 3 {
		t.Error("the old set was removed while a program may still read it")
	}
	three := maps.Clone(entry(3, 1, 1))
	maps.Copy(three, entry(3, 2, 1))
	maps.Copy(three, entry(3, 3, 1))
	l.must(d.PutPolicy(3, three))
	if got := d.PolicySets(); !maps.Equal(got, map[uint32]int{2: 1, 3: 3}) {
		t.Errorf("sets %v", got)
	}
	l.must(d.DeletePolicy(slices.Collect(maps.Keys(entry(3, 1, 1)))))
	l.must(d.DeletePolicy(slices.Collect(maps.Keys(entry(3, 1, 1)))))
	if got := d.PolicySets(); !maps.Equal(got, map[uint32]int{2: 1, 3: 2}) || len(contents[abi.PolicyKey, abi.Policy](l, "policy")) != 3 {
		t.Errorf("sets %v", got)
	}
}

func TestRangesAndUplinks(t *testing.T) {
	l := newLab(t)
	d := l.open()
	known := abi.Range{Flags: uint32(abi.RangeKnown | abi.RangeHoldable)}
	p := netip.MustParsePrefix
	epoch := func() uint64 {
		var s abi.State
		l.must(pinnedMap(l, "state").Lookup(uint32(0), &s))
		return s.RangeEpoch
	}
	for _, want := range []map[netip.Prefix]abi.Range{
		{p("10.8.0.0/24"): known, p("fd08::/64"): known, p("0.0.0.0/0"): {Identity: 2}},
		{p("10.8.0.0/24"): known, p("10.9.0.0/24"): known, p("0.0.0.0/0"): {Identity: 300}},
		{p("10.8.0.0/24"): {Identity: 301}, p("0.0.0.0/0"): known},
		{p("10.8.0.7/24"): {Identity: 301}}, // not masked by the caller
		{},
	} {
		for again := range 2 { // it may be repeated
			before := epoch()
			l.must(d.SetRanges(want))
			got := map[netip.Prefix]abi.Range{}
			for k, v := range contents[abi.RangeKey, abi.Range](l, "ranges") {
				a, bits := datapath.AddrFrom(k.Addr), int(k.Prefixlen)
				if !a.IsValid() {
					a = netip.IPv6Unspecified()
				}
				if a.Is4() {
					bits -= 96
				}
				got[netip.PrefixFrom(a, bits)] = v
			}
			masked := map[netip.Prefix]abi.Range{}
			for k, v := range want {
				masked[k.Masked()] = v
			}
			for _, root := range []string{"0.0.0.0/0", "::/0"} {
				if _, ok := masked[p(root)]; !ok {
					masked[p(root)] = abi.Range{Identity: uint32(abi.IDWorld)}
				}
			}
			if !maps.Equal(got, masked) {
				t.Errorf("ranges %v, want %v", got, masked)
			}
			if again == 0 && epoch() <= before {
				t.Error("flows judged by range are not judged again")
			}
			if there, err := d.Ranges(); err != nil || !maps.Equal(there, masked) {
				t.Errorf("read as %v (%v), want %v", there, err, masked)
			}
		}
	}
	l.must(d.SetRanges(map[netip.Prefix]abi.Range{p("10.9.0.0/24"): known}))
	before := epoch()
	l.confirm(d, 1, remote4)
	if epoch() != before {
		t.Error("a binding in a known range makes flows be judged again")
	}
	l.confirm(d, 2, remote6)
	if epoch() == before {
		t.Error("flows that took a floating IP for its range's are not judged again")
	}
	if err := d.SetRanges(map[netip.Prefix]abi.Range{{}: known}); err == nil {
		t.Error("no prefix was taken for a range")
	}

	for _, want := range [][]int{{l.up}, {l.up, l.wl}, {l.wl}, {}} {
		l.must(d.SetUplinks(want))
		var got []int
		for k := range contents[uint32, abi.Uplink](l, "uplinks") {
			got = append(got, int(k))
		}
		slices.Sort(got)
		slices.Sort(want)
		if !slices.Equal(got, want) {
			t.Errorf("uplinks %v, want %v", got, want)
		}
	}
	if err := d.SetUplinks([]int{0}); err == nil {
		t.Error("uplink 0 was taken")
	}
}

func TestSweepConntrack(t *testing.T) {
	l := newLab(t)
	d := l.open()
	ep := l.serve(d)
	stamp := l.confirm(d, 1, remote4)
	server, peer := l.udp(l.workload, workload4, 5000), l.udp(l.remote, remote4, 6000)
	l.send(peer, workload4, 5000, "one")
	l.receive(server, "one")
	sweep := func(after time.Duration) datapath.SweepStats {
		t.Helper()
		s, err := d.SweepConntrack(d.Now() + int64(after))
		l.must(err)
		return s
	}
	flows := func() int { return len(contents[abi.CTKey, [104]byte](l, "conntrack")) }

	if s := sweep(0); s.Entries != 1 || !slices.Equal(s.Used, []netip.Addr{remote4}) || s.Expired+s.Dead+s.Failed != 0 {
		t.Errorf("first sweep: %+v", s)
	}
	l.eventually("idle", func() bool { s := sweep(0); return s.Entries == 1 && len(s.Used) == 0 })
	l.send(peer, workload4, 5000, "two")
	l.receive(server, "two")
	if s := sweep(0); !slices.Equal(s.Used, []netip.Addr{remote4}) {
		t.Errorf("used again: %+v", s)
	}
	// A silent flow that lives needs its binding: it is told from time to time.
	l.eventually("idle again", func() bool { return len(sweep(0).Used) == 0 })
	if s := sweep(11 * time.Second); !slices.Equal(s.Used, []netip.Addr{remote4}) {
		t.Errorf("silent: %+v", s)
	}
	if s := sweep(59 * time.Second); s.Expired != 0 || flows() != 1 {
		t.Errorf("before its lifetime: %+v", s)
	}
	// A reply makes it live longer.
	l.send(server, remote4, 6000, "reply")
	l.receive(peer, "reply")
	if s := sweep(179 * time.Second); s.Expired != 0 || flows() != 1 {
		t.Errorf("before its lifetime with replies: %+v", s)
	}
	if s := sweep(181 * time.Second); s.Expired != 1 || flows() != 0 {
		t.Errorf("after its lifetime: %+v", s)
	}

	// A revoked binding's flow stays for a minute, and is no use of anything.
	l.send(peer, workload4, 5000, "three")
	l.receive(server, "three")
	l.send(server, remote4, 6000, "reply")
	l.receive(peer, "reply")
	l.must(d.ZeroSlot(1, stamp, remote4))
	if s := sweep(0); len(s.Used) != 0 || s.Dead != 0 {
		t.Errorf("revoked: %+v", s)
	}
	if s := sweep(61 * time.Second); s.Dead != 1 || flows() != 0 {
		t.Errorf("revoked a minute ago: %+v", s)
	}

	// An ended endpoint's goes soon.
	l.confirm(d, 2, remote4)
	l.send(peer, workload4, 5000, "four")
	l.receive(server, "four")
	ep.ID = d.State().NextEndpointID()
	l.must(d.SetEndpoint(ep))
	if s := sweep(11 * time.Second); s.Dead != 1 || flows() != 0 {
		t.Errorf("endpoint ended: %+v", s)
	}
}

// Sweeps while packets go to and fro, over entries whose time seems over: a
// packet that comes with the removal does not lose its flow. TCP is strict here:
// a flow without its entry would be over.
func TestSweepWhileFlowsLive(t *testing.T) {
	l := newLab(t)
	d := l.open()
	l.serve(d)
	l.confirm(d, 1, remote4)
	x := l.traffic()
	x.during(func() {
		for range 300 {
			// Lifetimes are counted from the last packet, up to now: nothing is over.
			s, err := d.SweepConntrack(d.Now() + int64(9*time.Second))
			l.must(err)
			if s.Expired+s.Dead+s.Failed != 0 {
				t.Fatalf("swept %+v", s)
			}
		}
	})
}

func TestEventsAndCounters(t *testing.T) {
	l := newLab(t)
	d := l.open()
	ep := l.serve(d)
	stamp := l.confirm(d, 1, remote4)
	events := l.events(d)
	server, peer := l.udp(l.workload, workload4, 5000), l.udp(l.remote, remote4, 6000)
	l.send(peer, workload4, 5000, "one")
	l.receive(server, "one")
	stranger := l.udp(l.remote, netip.MustParseAddr("10.9.0.3"), 6000)
	l.send(stranger, workload4, 5000, "two")
	find := func(src netip.Addr) abi.Event {
		for {
			select {
			case ev := <-events:
				if datapath.AddrFrom(ev.Src) == src {
					return ev
				}
			case <-time.After(patience):
				t.Fatal("no event")
			}
		}
	}
	ev := find(remote4)
	if ev.Verdict != uint8(abi.VerdictPass) || ev.Stamp != stamp || ev.SrcIdentity != client || ev.DstIdentity != 2000 || ev.Endpoint != ep.ID ||
		ev.Sport != 6000 || ev.Dport != 5000 || ev.Proto != 17 || ev.Generation != 5 || ev.Evidence != uint8(abi.EvidenceLease) || ev.Rule != 7 ||
		ev.Direction != uint8(abi.DirIngress) || ev.Time == 0 || int64(ev.Time) > d.Now() {
		t.Errorf("event %+v", ev)
	}
	if ev := find(netip.MustParseAddr("10.9.0.3")); ev.Verdict != uint8(abi.VerdictDrop) || ev.Reason != uint8(abi.ReasonUnbound) {
		t.Errorf("event %+v", ev)
	}
	unbound := datapath.CounterKey{Direction: abi.DirIngress, Verdict: abi.VerdictDrop, Reason: abi.ReasonUnbound}
	before := counters(l, d)[unbound]
	if before.Packets != 1 || before.Bytes == 0 {
		t.Errorf("counted %+v", before)
	}
	d.CountDrop(abi.DirIngress, abi.ReasonUnbound)
	d.CountDrop(9, 99) // nothing is dropped uncounted
	if got := counters(l, d)[unbound]; got.Packets != 2 || got.Bytes != before.Bytes {
		t.Errorf("counted %+v", got)
	}
	if dropped(l, d, abi.DirIngress, abi.ReasonMalformed) != 1 {
		t.Error("a drop was not counted")
	}
}

func TestMarksChangeWithThePrograms(t *testing.T) {
	l := newLab(t)
	cfg := l.config()
	cfg.MarkMask = 0xffff0000
	seen := map[uint32]bool{0: true}
	for range 3 {
		d, err := datapath.Open(cfg)
		l.must(err)
		a, b := d.Marks()
		l.must(d.Close())
		for _, m := range []uint32{a, b} {
			if seen[m] || m&^cfg.MarkMask != 0 {
				t.Errorf("mark %#x", m)
			}
			seen[m] = true
		}
	}
	cfg.MarkMask = 0xff
	if _, err := datapath.Open(cfg); err == nil {
		t.Error("a mark that can be guessed was accepted")
	}
}
