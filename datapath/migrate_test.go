package datapath_test

import (
	"bytes"
	_ "embed"
	"errors"
	"io"
	"net/netip"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/link"
	"github.com/vishvananda/netns"
	"golang.org/x/sys/unix"

	"portcullis/bpf"
	"portcullis/bpf/abi"
	"portcullis/datapath"
)

// What a node has that runs an older version: that version's programs, and
// maps written by this frozen copy of its structures. See testdata/README.md.
//
//go:embed testdata/portcullis_old_bpfel.o
var oldObject []byte

type (
	oldEndpoint struct {
		IP4, IP6                                               abi.Addr
		Generation                                             uint64
		ID, Ifindex, State, Flags, Identity, Policy, HoldIndex uint32
		Mac                                                    [6]uint8
		Pad                                                    [2]uint8
		UID                                                    [16]uint8
		Pad2                                                   [4]uint8
	}
	oldBinding struct {
		Stamp     uint64
		Slot, Pad uint32
	}
	oldSlot struct {
		Stamp                    uint64
		IP                       abi.Addr
		Installed, Generation    uint64
		Identity, Lease, Ifindex uint32
		Evidence                 uint8
		Pad                      [3]uint8
		Pad2                     uint64
	}
	oldSlotCold struct {
		Stamp          uint64
		UID, OwnerBoot [16]uint8
		IdentityHash   [32]uint8
		Owner          [64]uint8
	}
	oldPolicyKey struct {
		Prefixlen, Set, Identity uint32
		Direction, Proto         uint8
		Port                     [2]uint8
	}
	oldPolicy struct {
		Flags, Evidence uint8
		Pad             uint16
		Rule            uint32
	}
	oldRangeKey struct {
		Prefixlen uint32
		Addr      abi.Addr
	}
	oldRange struct{ Flags, Identity uint32 }
	oldState struct {
		ReaderTick, NextStamp, NextEndpoint, NextPolicy, LastGeneration, LostEvents, ABIVersion, RangeEpoch uint64
	}
)

const (
	oldEnforceIngress, oldStrictTCP = 1, 8
	oldActive                       = 2
	oldPeerAllow, oldAllow          = 4, 1
	oldKnownHoldable                = 3
	oldLease                        = 3
)

var workloadUID = [16]uint8{7, 7, 7}

// oldAgent leaves what an agent of the older version leaves when it is killed:
// the workload's gate stands, remote4 is confirmed, 10.9.0.4 was and is revoked.
func (l *lab) oldAgent() {
	l.t.Helper()
	spec, err := ebpf.LoadCollectionSpecFromReader(bytes.NewReader(oldObject))
	l.must(err)
	for name, n := range map[string]uint32{"endpoints": 8, "hold_quota": 9, "bindings": 64, "slots": 65, "slots_cold": 65, "leases": 16,
		"policy": 64, "ranges": 16, "conntrack": 1024, "held": 1 << 20, "events": 1 << 18} {
		spec.Maps[name].MaxEntries = n
	}
	l.must(spec.Variables["mark_mask"].Set(uint32(1<<32 - 1)))
	l.must(spec.Variables["reinject_mark"].Set(uint32(0x12345678)))
	l.must(spec.Variables["turn_mark"].Set(uint32(0x87654321)))
	coll, err := ebpf.NewCollection(spec)
	l.must(err)
	defer coll.Close()
	put := func(name string, k, v any) {
		l.t.Helper()
		l.must(coll.Maps[name].Put(k, v))
	}
	put("state", uint32(0), &oldState{NextStamp: 5, NextEndpoint: 4, NextPolicy: 3, LastGeneration: 77, ABIVersion: 1, RangeEpoch: 9})
	put("leases", uint32(1), uint64(1<<64-1))
	put("leases", uint32(oldLease), uint64(datapath.Now()+int64(time.Hour)))
	for p, bits := range map[string]uint32{"10.8.0.0": 96 + 15, "fd00::": 8} {
		put("ranges", &oldRangeKey{bits, datapath.Addr(netip.MustParseAddr(p))}, &oldRange{Flags: oldKnownHoldable})
	}
	put("uplinks", uint32(l.up), uint32(0))
	put("policy", &oldPolicyKey{Prefixlen: 72, Set: 2, Identity: 1<<32 - 1, Direction: 1}, &oldPolicy{Flags: oldPeerAllow})
	put("policy", &oldPolicyKey{Prefixlen: 72, Set: 2, Identity: client, Direction: 1}, &oldPolicy{Flags: oldAllow, Rule: 7})
	put("endpoints", uint32(l.wl), &oldEndpoint{IP4: datapath.Addr(workload4), IP6: datapath.Addr(workload6), Generation: 6, ID: 3,
		Ifindex: uint32(l.wl), State: oldActive, Flags: oldEnforceIngress | oldStrictTCP, Identity: 2000, Policy: 2, HoldIndex: 1, Mac: l.mac, UID: workloadUID})
	for i, s := range []oldSlot{
		{Stamp: 1, IP: datapath.Addr(remote4), Installed: 11, Generation: 12, Identity: client, Lease: oldLease, Evidence: 2},
		{Stamp: 2, IP: datapath.Addr(workload4), Generation: 6, Identity: 2000, Lease: 1, Ifindex: uint32(l.wl), Evidence: 4},
		{Stamp: 0, IP: datapath.Addr(revoked), Generation: 12, Identity: client, Lease: oldLease, Evidence: 2},
	} {
		cold := oldSlotCold{Stamp: s.Stamp, Owner: [64]uint8{'n'}}
		if s.Ifindex != 0 {
			cold.UID = workloadUID
		}
		put("slots", uint32(i+1), &s)
		put("slots_cold", uint32(i+1), &cold)
		put("bindings", &s.IP, &oldBinding{Stamp: uint64(i + 1), Slot: uint32(i + 1)})
	}
	for _, dir := range []string{"maps", "progs", "links/wl0"} {
		l.must(os.MkdirAll(filepath.Join(l.pins, dir), 0o700))
	}
	for name, m := range coll.Maps {
		if !strings.Contains(name, ".") {
			l.must(m.Pin(filepath.Join(l.pins, "maps", name)))
		}
	}
	for name, at := range map[string]ebpf.AttachType{"from_workload": ebpf.AttachTCXIngress, "to_workload": ebpf.AttachTCXEgress} {
		l.must(coll.Programs[name].Pin(filepath.Join(l.pins, "progs", name)))
		k, err := link.AttachTCX(link.TCXOptions{Interface: l.wl, Program: coll.Programs[name], Attach: at, Anchor: link.Head()})
		l.must(err)
		l.must(k.Pin(filepath.Join(l.pins, "links", "wl0", name)))
		l.must(k.Close())
	}
}

var revoked, stranger = netip.MustParseAddr("10.9.0.4"), netip.MustParseAddr("10.9.0.3")

// adopted checks what must have come over from oldAgent.
func (l *lab) adopted(d *datapath.Datapath) {
	l.t.Helper()
	eps, err := d.Endpoints()
	l.must(err)
	if ep := eps["wl0"]; len(eps) != 1 || ep.ID != 3 || ep.State != uint32(abi.EPActive) || ep.Mac != l.mac || ep.Policy != 2 || ep.Generation != 6 ||
		ep.Flags != oldEnforceIngress|oldStrictTCP || ep.UID != workloadUID || ep.HoldIndex != 1 || datapath.AddrFrom(ep.IP6) != workload6 || ep.Identity != 2000 {
		l.t.Errorf("adopted endpoints %+v", eps)
	}
	var stamps []uint64
	for i, s := range d.Slots() {
		stamps = append(stamps, s.Stamp)
		if i == 1 && (datapath.AddrFrom(s.IP) != remote4 || s.Identity != client || s.Lease != oldLease || s.Cold.Owner[0] != 'n' || s.Installed != 11 || s.Generation != 12) {
			l.t.Errorf("slot 1 is %+v", s)
		}
		if i == 2 && (s.Cold.UID != workloadUID || s.Ifindex != uint32(l.wl) || s.Evidence != uint8(abi.EvidenceLocal)) {
			l.t.Errorf("slot 2 is %+v", s)
		}
	}
	if !slices.Equal(stamps, []uint64{1, 2}) {
		l.t.Errorf("stamps in force: %v, want 1 and 2", stamps)
	}
	if got := d.PolicySets(); len(got) != 1 || got[2] != 2 {
		l.t.Errorf("policy sets %v", got)
	}
	var s abi.State
	l.must(pinnedMap(l, "state").Lookup(uint32(0), &s))
	if s.ABIVersion != uint64(abi.ABIVersion) || s.NextStamp != 5 || s.NextEndpoint != 4 || s.NextPolicy != 3 || s.LastGeneration != 77 || s.RangeEpoch < 9 {
		l.t.Errorf("state %+v", s)
	}
	entries, err := os.ReadDir(l.pins)
	l.must(err)
	var names []string
	for _, e := range entries {
		names = append(names, e.Name())
	}
	if !slices.Equal(names, []string{"hooks", "links", "maps", "progs"}) {
		l.t.Errorf("pins: %v", names)
	}
	in, err := os.ReadDir(filepath.Join(l.pins, "maps"))
	l.must(err)
	spec, err := ebpf.LoadCollectionSpecFromReader(bytes.NewReader(bpf.Object))
	l.must(err)
	n := 0
	for name := range spec.Maps {
		if !strings.Contains(name, ".") {
			n++
		}
	}
	if len(in) != n+1 { // and the records' layout
		l.t.Errorf("%d pinned maps, want %d: %v", len(in)-1, n, in)
	}
}

// A node that is upgraded: every packet that was right passes, and none that
// was wrong, before, during and after.
func TestUpgradeFromAnOlderObject(t *testing.T) {
	for name, change := range map[string]func(*datapath.Config){
		"same sizes": func(*datapath.Config) {},
		"larger": func(c *datapath.Config) {
			c.Bindings, c.Conntrack, c.Endpoints, c.Leases, c.Policy, c.Ranges, c.HeldBytes = 128, 4096, 16, 32, 128, 32, 1<<21
		},
		"smaller": func(c *datapath.Config) {
			c.Bindings, c.Conntrack, c.Endpoints, c.Leases, c.Policy, c.Ranges, c.HeldBytes = 8, 64, 2, 5, 8, 4, 1<<19
		},
	} {
		t.Run(name, func(t *testing.T) {
			l := newLab(t)
			l.oldAgent()
			x := l.traffic()
			x.during(func() {})
			cfg := l.config()
			change(&cfg)
			before := programID(l, "to_workload")
			var d *datapath.Datapath
			n := x.during(func() {
				var err error
				d, err = datapath.Open(cfg)
				l.must(err)
			})
			t.Cleanup(func() { l.must(d.Close()) })
			if n < 3 {
				t.Errorf("only %d rounds of packets during the change", n)
			}
			t.Logf("%d rounds of packets during the change", n)
			if programID(l, "to_workload") == before {
				t.Error("the old program is still attached")
			}
			l.adopted(d)
			x.during(func() {})
			if bad := dropped(l, d, abi.DirIngress, abi.ReasonUnbound); bad < 2 {
				t.Errorf("%d drops of who is not bound", bad)
			}
			// It is this agent's word that counts now.
			l.must(d.ZeroSlot(1, 1, remote4))
			l.send(x.friend, workload4, 5000, "after the revocation")
			l.eventually("a drop after the revocation", func() bool { return dropped(l, d, abi.DirIngress, abi.ReasonUnbound) > 4 })
			l.nothing(x.server)
		})
	}
}

// An agent with other sizes of what belongs to endpoints: their part of a table is
// elsewhere, or the table is the same and cut otherwise, and flows go on.
func TestOtherSizes(t *testing.T) {
	l := newLab(t)
	d := l.open() // 8 endpoints with 64 datagrams
	l.serve(d)
	l.confirm(d, 1, remote4)
	x := l.traffic()
	big := strings.Repeat("fragment", 300)
	for _, n := range []struct{ endpoints, fragments, others int }{
		{8, 256, 16}, {8, 8, 8}, {17, 32, 64}, {35, 16, 64}, {2, 192, 4}, {8, 64, 16}} {
		l.must(d.Close())
		cfg := l.config()
		cfg.Endpoints, cfg.FragmentsPerEndpoint, cfg.Ranges, cfg.Sources, cfg.Policy = n.endpoints, n.fragments, n.others, n.others, n.others
		x.during(func() {
			var err error
			d, err = datapath.Open(cfg)
			l.must(err)
		})
		if got := pinnedMap(l, "fragments").MaxEntries(); got != uint32((n.endpoints+1)*n.fragments) {
			t.Errorf("%+v: room for %d datagrams", n, got)
		}
		x.during(func() {})
		l.send(x.friend, workload4, 5000, big)
		l.receive(x.server, big)
		ps, err := d.Pressure()
		l.must(err)
		for _, p := range ps {
			if want, ok := map[string]int{"endpoints": n.endpoints, "fragments": n.fragments, "ranges": n.others, "sources": n.others, "policy": n.others}[p.Name]; ok && p.Capacity != uint64(want) {
				t.Errorf("%+v: %+v", n, p)
			}
		}
	}
	l.must(d.Close())
}

// An upgrade that is cut off anywhere leaves a gate that judges rightly, and
// the next start completes it.
func TestUpgradeIsCutOff(t *testing.T) {
	l := newLab(t)
	cfg := l.config()
	cfg.Conntrack, cfg.Bindings = 2048, 128
	l.oldAgent()
	all, err := datapath.OpenUntil(cfg, 1<<30)
	l.must(err)
	cut := map[int]bool{0: true}
	for i, name := range all {
		// Of steps that are alike, the first and the last.
		kind := func(s string) string { return strings.Join(strings.Fields(s)[:1], "") }
		if i+1 == len(all) || kind(all[i+1]) != kind(name) || i == 0 || kind(all[i-1]) != kind(name) {
			cut[i+1] = true
		}
	}
	t.Logf("%d steps: %v", len(all), all)
	for n := range len(all) + 1 {
		if !cut[n] {
			continue
		}
		name := "nothing done"
		if n > 0 {
			name = "after " + all[n-1]
		}
		t.Run(name, func(t *testing.T) {
			runtime.LockOSThread() // the thread ends with the subtest
			l.must(netns.Set(l.node))
			l := &lab{t: t, node: l.node, workload: l.workload, remote: l.remote, wl: l.wl, up: l.up, mac: l.mac, pins: l.pins}
			l.must(datapath.Remove(l.pins))
			l.oldAgent()
			x := l.traffic()
			defer x.close()
			x.during(func() {
				_, err := datapath.OpenUntil(cfg, n)
				l.must(err)
			})
			x.during(func() {
				// Cut off again on the way of recovering, somewhere else.
				_, err := datapath.OpenUntil(cfg, (n*7)%len(all))
				l.must(err)
			})
			var d *datapath.Datapath
			x.during(func() {
				var err error
				d, err = datapath.Open(cfg)
				l.must(err)
			})
			l.adopted(d)
			l.must(d.Close())
			x.during(func() {})
		})
	}
}

// TestMissingSegments: a gap of the gate shows in what TCP sends again; else the
// tests that say that there was none would say nothing.
func TestMissingSegments(t *testing.T) {
	l := newLab(t)
	d := l.open()
	ep := l.serve(d)
	l.confirm(d, 1, remote4)
	x := l.traffic()
	shut := ep
	shut.State = uint32(abi.EPClosed)
	l.must(d.SetEndpoint(shut))
	_, err := x.client.Write([]byte("lost"))
	l.must(err)
	l.eventually("it is sent again", func() bool { return tcpInfo(t, x.client.(syscall.Conn)).Total_retrans > 0 })
	l.must(d.SetEndpoint(ep))
	_, err = io.ReadFull(x.accepted, make([]byte, 4))
	l.must(err)
	if x.missing() < 1 {
		t.Error("nothing is missing")
	}
}

// What does not fit is refused before anything is changed.
func TestUpgradeThatDoesNotFit(t *testing.T) {
	l := newLab(t)
	l.oldAgent()
	x := l.traffic()
	for name, change := range map[string]func(*datapath.Config){
		"ranges": func(c *datapath.Config) { c.Ranges = 1 },
		"policy": func(c *datapath.Config) { c.Policy = 1 },
	} {
		cfg := l.config()
		change(&cfg)
		x.during(func() {
			if _, err := datapath.Open(cfg); !errors.Is(err, datapath.ErrMapFull) {
				t.Errorf("%s: %v", name, err)
			}
		})
	}
	if _, err := os.Stat(filepath.Join(l.pins, "maps_new")); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("half-made maps are left: %v", err)
	}
	var s oldState
	state := pinnedMap(l, "state")
	l.must(state.Lookup(uint32(0), &s))
	s.ABIVersion = uint64(abi.ABIVersion) + 1
	l.must(state.Put(uint32(0), &s))
	var layout *datapath.LayoutError
	if _, err := datapath.Open(l.config()); !errors.As(err, &layout) || !errors.Is(err, datapath.ErrPins) || !strings.Contains(err.Error(), "newer") {
		t.Errorf("a newer agent's pins: %v", err)
	}
	x.during(func() {})
	s.ABIVersion = 1
	l.must(state.Put(uint32(0), &s))
	l.adopted(l.open())
}

// Whoever adds a map says what an upgrade does with it.
func TestEveryMapHasAnUpgrade(t *testing.T) {
	spec, err := ebpf.LoadCollectionSpecFromReader(bytes.NewReader(bpf.Object))
	if err != nil {
		t.Fatal(err)
	}
	known := append(datapath.Carried(), datapath.Afresh()...)
	for name := range spec.Maps {
		if !strings.Contains(name, ".") && !slices.Contains(known, name) {
			t.Errorf("map %s is neither carried over nor made afresh", name)
		}
	}
}

// A directory has one agent; the lock goes with it.
func TestOnlyOneAgent(t *testing.T) {
	l := newLab(t)
	d, err := datapath.Open(l.config())
	l.must(err)
	if _, err := datapath.Open(l.config()); !errors.Is(err, datapath.ErrInUse) {
		t.Errorf("a second agent: %v", err)
	}
	if err := datapath.Remove(l.pins); !errors.Is(err, datapath.ErrInUse) {
		t.Errorf("removal while an agent runs: %v", err)
	}
	l.must(d.Close())
	l.must(unix.Access(l.pins, unix.F_OK))
	l.open()
}
