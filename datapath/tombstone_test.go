package datapath_test

import (
	"errors"
	"net/netip"
	"os"
	"path/filepath"
	"testing"

	"portcullis/bpf/abi"
	"portcullis/datapath"
	"portcullis/identity"
)

// shutIn checks that nothing passes the workload's gate any more.
func (l *lab) shutIn(x *traffic) {
	l.t.Helper()
	l.send(x.friend, workload4, 5000, "to the dead")
	l.send(x.caller, stranger, 6001, "from the dead")
	// veth delivers within the send: what passed would be there.
	l.nothing(x.server)
	l.nothing(x.called)
}

// A workload ends while no agent runs: its gate is shut from then on, and stays
// so when an agent returns. The next holder of its IP is not touched.
func TestTombstone(t *testing.T) {
	l := newLab(t)
	l.must(datapath.Tombstone(l.pins, workload4, workloadUID)) // no pins: nothing to do
	d, err := datapath.Open(l.config())
	l.must(err)
	ep := l.serve(d)
	ep.UID = workloadUID
	l.must(d.SetEndpoint(ep))
	l.confirm(d, 1, remote4)
	for i, ip := range []netip.Addr{workload4, workload6} {
		l.must(d.InstallSlot(uint32(2+i), abi.Slot{Stamp: d.State().ReserveStamps(1), IP: datapath.Addr(ip), Lease: uint32(abi.LeaseLocal), Ifindex: uint32(l.wl),
			Evidence: uint8(abi.EvidenceLocal)}, abi.SlotCold{UID: workloadUID}))
	}
	x := l.traffic()
	x.during(func() {})
	if err := datapath.Tombstone(l.pins, workload4, workloadUID); !errors.Is(err, datapath.ErrInUse) {
		t.Errorf("while an agent runs: %v", err)
	}
	x.during(func() { l.must(d.Close()) })

	x.during(func() {
		for _, other := range []struct {
			ip  netip.Addr
			uid identity.UID
		}{{workload4, identity.UID{9}}, {remote4, workloadUID}, {netip.MustParseAddr("10.8.0.99"), workloadUID}} {
			l.must(datapath.Tombstone(l.pins, other.ip, other.uid)) // not its: nothing to do
		}
		l.must(datapath.TombstoneDevice(l.pins, workload4, workloadUID, uint32(l.wl)+1)) // nor behind another device
		l.must(datapath.TombstoneDevice(l.pins, netip.Addr{}, workloadUID, uint32(l.wl)+1))
		l.must(datapath.TombstoneDevice(l.pins, netip.Addr{}, identity.UID{9}, uint32(l.wl)))
		if err := datapath.TombstoneDevice(l.pins, netip.Addr{}, workloadUID, 0); err == nil {
			t.Error("a tombstone for neither an IP nor a device was accepted")
		}
		if err := datapath.Tombstone(l.pins, workload4, identity.UID{}); err == nil {
			t.Error("a tombstone without a UID was accepted")
		}
	})

	l.must(datapath.TombstoneDevice(l.pins, netip.Addr{}, workloadUID, uint32(l.wl))) // whatever IPs it has
	l.shutIn(x)
	l.must(datapath.Tombstone(l.pins, workload4, workloadUID)) // it may be repeated
	d = l.open()
	if n := dropped(l, d, abi.DirIngress, abi.ReasonNoEndpoint); n == 0 {
		t.Error("no drop was counted at the closed gate")
	}
	eps, err := d.Endpoints()
	l.must(err)
	if eps["wl0"].State != uint32(abi.EPClosed) || eps["wl0"].UID != workloadUID {
		t.Errorf("the agent finds %+v", eps)
	}
	for i, s := range d.Slots() {
		if datapath.AddrFrom(s.IP) != remote4 {
			t.Errorf("slot %d of %v is still in force", i, datapath.AddrFrom(s.IP))
		}
	}
	for _, ip := range []netip.Addr{workload4, workload6} {
		key := datapath.Addr(ip)
		if err := pinnedMap(l, "bindings").Lookup(&key, &abi.Binding{}); err == nil {
			t.Errorf("%v still leads to a slot", ip)
		}
	}
	l.shutIn(x)
}

// It works on another version's pins, and wherever an upgrade was cut off: also
// between two devices, when some programs judge by maps that are pinned nowhere.
func TestTombstoneInAnUpgrade(t *testing.T) {
	for _, tc := range []struct {
		name string
		most int
		drop bool
	}{{"old pins", 0, false}, {"maps_new", 10, false}, {"maps_ready", -1, false}, {"replaced maps are unpinned", -1, true}} {
		t.Run(tc.name, func(t *testing.T) {
			l := newLab(t)
			l.oldAgent()
			cfg := l.config()
			cfg.Bindings, cfg.Endpoints = 128, 16
			if tc.most < 0 {
				all := stepsUntil(l, cfg, "commit")
				l.must(datapath.Remove(l.pins))
				l.oldAgent()
				tc.most = all
			}
			x := l.traffic()
			before := programID(l, "to_workload")
			_, err := datapath.OpenUntil(cfg, tc.most)
			l.must(err)
			if tc.drop {
				// As the next start does, which is cut off too.
				_, err := datapath.OpenUntil(cfg, 0)
				l.must(err)
			}
			x.during(func() {})
			if programID(l, "to_workload") != before {
				t.Fatal("the programs were replaced: nothing is tested")
			}
			l.must(datapath.Tombstone(l.pins, workload4, workloadUID))
			l.shutIn(x)
			d, err := datapath.Open(cfg)
			l.must(err)
			t.Cleanup(func() { l.must(d.Close()) })
			l.shutIn(x)
			eps, err := d.Endpoints()
			l.must(err)
			if eps["wl0"].State != uint32(abi.EPClosed) {
				t.Errorf("the agent finds %+v", eps)
			}
			for i, s := range d.Slots() {
				if datapath.AddrFrom(s.IP) != remote4 {
					t.Errorf("slot %d of %v is still in force", i, datapath.AddrFrom(s.IP))
				}
			}
		})
	}
}

// stepsUntil is how many steps Open takes up to one of that name.
func stepsUntil(l *lab, cfg datapath.Config, name string) int {
	l.t.Helper()
	all, err := datapath.OpenUntil(cfg, 1<<30)
	l.must(err)
	for i, s := range all {
		if s == name {
			return i + 1
		}
	}
	l.t.Fatalf("no step %s in %v", name, all)
	return 0
}

// Enforcement ends when it is asked for: nothing is left, whatever state the
// pins are in.
func TestRemove(t *testing.T) {
	for _, name := range []string{"", "pin map policy", "commit", "swap wl0", "drop maps"} {
		t.Run("after "+name, func(t *testing.T) {
			l := newLab(t)
			l.oldAgent()
			cfg := l.config()
			cfg.Bindings = 128
			if name != "" {
				n := stepsUntil(l, cfg, name)
				l.must(datapath.Remove(l.pins))
				l.oldAgent()
				_, err := datapath.OpenUntil(cfg, n)
				l.must(err)
			}
			server, unknown := l.udp(l.workload, workload4, 5000), l.udp(l.remote, stranger, 6000)
			l.send(unknown, workload4, 5000, "judged")
			l.nothing(server)
			l.must(datapath.Remove(l.pins))
			l.must(datapath.Remove(l.pins)) // it may be repeated
			l.send(unknown, workload4, 5000, "nobody judges any more")
			l.receive(server, "nobody judges any more")
			if _, err := os.Stat(l.pins); !errors.Is(err, os.ErrNotExist) {
				t.Errorf("the directory is still there: %v", err)
			}
		})
	}
	if err := datapath.Remove(filepath.Join(t.TempDir(), "none")); err != nil {
		t.Errorf("no directory: %v", err)
	}
	if dir := t.TempDir(); datapath.Remove(dir) == nil {
		t.Error("a directory that is not in a bpffs was removed")
	}
}
