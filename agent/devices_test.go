package agent

import (
	"os"
	"path/filepath"
	"slices"
	"testing"

	"github.com/vishvananda/netlink"
	"go.uber.org/zap"

	"portcullis/bpf/abi"
	"portcullis/datapath"
	"portcullis/datapath/hold"
	"portcullis/datapath/netdev"
)

// device finds a device, as the watch over devices does.
func (n *node) device(name string) netdev.Device {
	n.t.Helper()
	dev, err := netdev.ByName(name)
	if err != nil {
		n.t.Fatal(err)
	}
	return dev
}

// tell hands changes to devices, and does what they ask for.
func (n *node) tell(l *loop, changes ...netdev.Change) {
	n.t.Helper()
	for _, c := range changes {
		l.devices.changed(c)
	}
	for i, s, ok := l.devices.next(); ok; i, s, ok = l.devices.next() {
		l.devices.look(n.t.Context(), i, s)
	}
}

func (n *node) guarded(l *loop, name string, ifindex uint32) bool {
	n.t.Helper()
	ok, err := l.dp.Guarded(name, ifindex)
	if err != nil {
		n.t.Fatal(err)
	}
	return ok
}

func (n *node) rename(name, to string) {
	n.t.Helper()
	link, err := netlink.LinkByName(name)
	if err == nil {
		err = netlink.LinkSetName(link, to)
	}
	if err != nil {
		n.t.Fatal(err)
	}
}

// replace removes a device and makes another with its index.
func (n *node) replace(old, name string, ifindex uint32) {
	n.t.Helper()
	n.unplug(old)
	attrs := netlink.NewLinkAttrs()
	attrs.Name, attrs.Index = name, int(ifindex)
	if err := netlink.LinkAdd(&netlink.Veth{LinkAttrs: attrs, PeerName: name + "p"}); err != nil {
		n.t.Fatal(err)
	}
}

func (n *node) pinned() (names []string) {
	n.t.Helper()
	entries, err := os.ReadDir(filepath.Join(n.cfg.PinDir, "links"))
	if err != nil && !os.IsNotExist(err) {
		n.t.Fatal(err)
	}
	for _, e := range entries {
		names = append(names, e.Name())
	}
	return names
}

// A device that has a workload's name is shut when it appears, and served by
// the same links when it is registered; others are let be.
func TestDeviceIsShutWhenItAppears(t *testing.T) {
	n := newNode(t)
	n.cfg.WorkloadDevices, n.cfg.Uplinks = []string{"wl*", "u[0-9]"}, []string{"u1"} // Validate would refuse it
	n.veth("u1")
	l := n.mustStart()
	defer n.crash(l)
	for _, name := range []string{"wl0", "u1", "other"} {
		if name != "u1" {
			n.veth(name)
		}
		n.tell(l, netdev.Change{Device: n.device(name)})
	}
	dev := n.device("wl0")
	if !n.guarded(l, "wl0", dev.Ifindex) || !slices.Equal(n.pinned(), []string{"wl0"}) || l.devicesUnregistered() != 1 {
		t.Fatalf("guarded %v, pinned %v, unregistered %d", n.guarded(l, "wl0", dev.Ifindex), n.pinned(), l.devicesUnregistered())
	}
	if eps, err := l.dp.Endpoints(); err != nil || len(eps) != 0 {
		t.Errorf("endpoints %v, %v", eps, err)
	}
	before, err := datapath.Attached(int(dev.Ifindex), true)
	if err != nil {
		t.Fatal(err)
	}
	e := n.run(l, app("wl0", "10.1.1.2"))
	if after, err := datapath.Attached(int(dev.Ifindex), true); err != nil || !slices.Equal(before, after) || len(after) != 1 {
		t.Errorf("programs before %v, after %v, %v", before, after, err)
	}
	if e.ifindex != dev.Ifindex || l.devicesUnregistered() != 0 {
		t.Errorf("endpoint on device %d, want %d; unregistered %d", e.ifindex, dev.Ifindex, l.devicesUnregistered())
	}
	// What is told of a device that was there before its registration.
	n.tell(l, netdev.Change{Device: dev}, netdev.Change{Device: dev, Gone: true})
	if l.endpoints[e.uid] != e || !n.guarded(l, "wl0", dev.Ifindex) {
		t.Error("a message that comes late ended a workload")
	}
	n.unplug("wl0")
	n.tell(l, netdev.Change{Device: dev, Gone: true})
	if l.endpoints[e.uid] != nil || len(n.pinned()) != 0 || len(l.devices.under()) != 0 {
		t.Errorf("left of a vanished device: endpoint %v, pins %v, under programs %v", l.endpoints[e.uid], n.pinned(), l.devices.under())
	}
}

// A device that comes and goes leaves nothing, whenever that is told.
func TestDeviceComesAndGoes(t *testing.T) {
	n := newNode(t)
	n.cfg.WorkloadDevices = []string{"wl*"}
	l := n.mustStart()
	defer n.crash(l)
	n.veth("wl0")
	dev := n.device("wl0")
	n.unplug("wl0")
	n.tell(l, netdev.Change{Device: dev})
	n.tell(l, netdev.Change{Device: dev, Gone: true})
	n.tell(l, netdev.Change{Device: dev}, netdev.Change{Device: dev, Gone: true})
	if len(n.pinned()) != 0 || len(l.devices.under()) != 0 || len(l.devices.failed) != 0 || len(l.alarms.list()) != 0 {
		t.Errorf("pins %v, under programs %v, failed %v, alarms %v", n.pinned(), l.devices.under(), l.devices.failed, l.alarms.list())
	}
}

// A new device with the index of one that went is never taken for its
// workload (I1), whoever speaks of it first.
func TestIndexOfAnotherDevice(t *testing.T) {
	for name, come := range map[string]func(*node, *loop, uint32){
		"told": func(n *node, l *loop, ifindex uint32) {
			n.tell(l, netdev.Change{Device: netdev.Device{Name: "wl0", Ifindex: ifindex}, Gone: true}, netdev.Change{Device: n.device("wl1")})
		},
		"registered before it is told": func(n *node, l *loop, ifindex uint32) {
			if _, err := l.devices.ensure(n.t.Context(), "wl1"); err != nil {
				n.t.Fatal(err)
			}
			n.tell(l, netdev.Change{Device: netdev.Device{Name: "wl0", Ifindex: ifindex}, Gone: true}, netdev.Change{Device: n.device("wl1")})
		},
	} {
		t.Run(name, func(t *testing.T) {
			n := newNode(t)
			n.cfg.WorkloadDevices = []string{"wl*"}
			l := n.mustStart()
			defer n.crash(l)
			n.veth("wl0")
			old := n.run(l, app("wl0", "10.1.1.2"))
			n.replace("wl0", "wl1", old.ifindex)
			l.linkGone(old.ifindex) // the loop's own message
			come(n, l, old.ifindex)
			if l.endpoints[old.uid] != nil || l.byIfindex[old.ifindex] != nil {
				t.Error("the old workload is registered still")
			}
			if eps, err := l.dp.Endpoints(); err != nil || len(eps) != 0 {
				t.Errorf("the new device has the endpoint of the old one: %v, %v", eps, err)
			}
			if !n.guarded(l, "wl1", old.ifindex) {
				t.Error("the new device is not guarded")
			}
			if next := n.run(l, app("wl1", "10.1.1.2")); next.ifindex != old.ifindex {
				t.Errorf("device %d, want %d", next.ifindex, old.ifindex)
			}
			if !slices.Equal(n.pinned(), []string{"wl1"}) {
				t.Errorf("pins %v", n.pinned())
			}
		})
	}
}

// Links, endpoint and record follow a device's name; its old name may be
// another device's. So it is after a restart.
func TestRenamedDevice(t *testing.T) {
	n := newNode(t)
	n.cfg.WorkloadDevices = []string{"wl*"}
	n.veth("wl0")
	n.veth("temp")
	l := n.mustStart()
	e := n.run(l, app("wl0", "10.1.1.2"))
	// It gets its name after it appeared.
	n.tell(l, netdev.Change{Device: n.device("temp")})
	n.rename("temp", "wl1")
	n.tell(l, netdev.Change{Device: n.device("wl1")})
	if !n.guarded(l, "wl1", n.device("wl1").Ifindex) {
		t.Error("wl1 is not guarded")
	}
	n.rename("wl0", "eth9")
	n.rename("wl1", "wl0")
	n.tell(l, netdev.Change{Device: n.device("wl0")}, netdev.Change{Device: n.device("eth9")})
	second := n.device("wl0").Ifindex
	if e.ifname != "eth9" || !n.guarded(l, "eth9", e.ifindex) || !n.guarded(l, "wl0", second) {
		t.Errorf("endpoint on %s, pins %v", e.ifname, n.pinned())
	}
	n.crash(l)
	l = n.mustStart()
	if a := l.endpoints[e.uid]; a == nil || a.state != abi.EPActive || a.ifname != "eth9" || l.devicesUnregistered() != 1 {
		t.Fatalf("after a restart: %+v, unregistered %d", a, l.devicesUnregistered())
	}
	n.crash(l)
	// While no agent runs: what the watch tells first is followed.
	n.rename("eth9", "eth8")
	l = n.mustStart()
	defer n.crash(l)
	n.tell(l, netdev.Change{Device: n.device("eth8")})
	if a := l.endpoints[e.uid]; a == nil || a.ifname != "eth8" || !n.guarded(l, "eth8", e.ifindex) {
		t.Errorf("renamed while no agent ran: %+v, pins %v", a, n.pinned())
	}
}

// A restart goes on with devices that nobody registered yet, and removes what
// those left that are gone.
func TestRestartKeepsUnregisteredDevices(t *testing.T) {
	n := newNode(t)
	n.cfg.WorkloadDevices = []string{"wl*"}
	n.veth("wl0")
	n.veth("wl1")
	l := n.mustStart()
	n.tell(l, netdev.Change{Device: n.device("wl0")}, netdev.Change{Device: n.device("wl1")})
	ifindex := n.device("wl0").Ifindex
	n.crash(l)
	n.unplug("wl1")
	l = n.mustStart()
	if !n.guarded(l, "wl0", ifindex) || !slices.Equal(n.pinned(), []string{"wl0"}) || l.devicesUnregistered() != 1 {
		t.Fatalf("pins %v, unregistered %d", n.pinned(), l.devicesUnregistered())
	}
	// It goes before the watch begins.
	n.unplug("wl0")
	l.devices.sweep()
	n.tell(l)
	if len(n.pinned()) != 0 || len(l.devices.under()) != 0 {
		t.Errorf("pins %v, under programs %v", n.pinned(), l.devices.under())
	}
	n.veth("wl0")
	n.tell(l, netdev.Change{Device: n.device("wl0")})
	n.crash(l)
	if err := Cleanup(t.Context(), n.cfg, zap.NewNop()); err != nil {
		t.Fatal(err)
	}
	if at, err := datapath.Attached(int(n.device("wl0").Ifindex), true); err != nil || len(at) != 0 {
		t.Errorf("after the cleanup: %v, %v", at, err)
	}
}

// A device that cannot be put under programs is down, and tried again.
func TestDeviceThatCannotBeGuarded(t *testing.T) {
	n := newNode(t)
	n.cfg.WorkloadDevices = []string{"wl*"}
	n.veth("wl0")
	l := n.mustStart()
	defer n.crash(l)
	link, err := netlink.LinkByName("wl0")
	if err == nil {
		err = netlink.LinkSetUp(link)
	}
	inTheWay := filepath.Join(n.cfg.PinDir, "links", "wl0")
	if err == nil {
		err = os.MkdirAll(filepath.Dir(inTheWay), 0o700)
	}
	if err == nil {
		err = os.Symlink("nowhere", inTheWay) // where the directory of its links should be
	}
	if err != nil {
		t.Fatal(err)
	}
	alarmed := func() bool {
		return slices.ContainsFunc(l.alarms.list(), func(a alarm) bool { return a.name == "attach" })
	}
	n.tell(l, netdev.Change{Device: n.device("wl0")})
	if n.device("wl0").Up || !alarmed() || len(l.devices.under()) != 0 {
		t.Fatalf("up %v, alarm %v, under programs %v", n.device("wl0").Up, alarmed(), l.devices.under())
	}
	if err := os.RemoveAll(inTheWay); err != nil {
		t.Fatal(err)
	}
	l.devices.retry(t.Context())
	if !n.guarded(l, "wl0", n.device("wl0").Ifindex) || alarmed() {
		t.Errorf("guarded %v, alarm %v", n.guarded(l, "wl0", n.device("wl0").Ifindex), alarmed())
	}
	// Guarded in spite of a failure, and registered: there is nothing to try again.
	l.devices.failed[n.device("wl0").Ifindex] = "wl0"
	e := n.run(l, app("wl0", "10.1.1.2"))
	l.devices.retry(t.Context())
	if l.endpoints[e.uid] != e {
		t.Error("to try again ended a workload")
	}
}

// A held packet that is not taken back is counted, whoever did not take it.
func TestHeldPacketNotTakenBack(t *testing.T) {
	n := newNode(t)
	n.veth("a0")
	l := n.mustStart()
	defer n.crash(l)
	for _, name := range []string{"a0", "a0p"} {
		link, err := netlink.LinkByName(name)
		if err == nil {
			err = netlink.LinkSetUp(link)
		}
		if err != nil {
			t.Fatal(err)
		}
	}
	ifindex, err := l.devices.ensure(t.Context(), "a0")
	if err != nil {
		t.Fatal(err)
	}
	packet := append(make([]byte, 12), 0x08, 0x00, 0x45, 0, 0, 20, 0, 0, 0, 0, 64, 17, 0, 0, 10, 1, 1, 3, 10, 1, 1, 2)
	l.inject(hold.Record{Packet: packet})
	if l.notTaken != 0 || l.heldDropped != 1 {
		t.Errorf("to no device: not taken %d, dropped %d; want 0, 1", l.notTaken, l.heldDropped)
	}
	l.inject(hold.Record{Direction: abi.DirIngress, Ifindex: ifindex, Packet: packet}) // no endpoint: the programs drop it
	if l.notTaken != 1 || l.heldDropped != 1 || l.reinjected != 0 {
		t.Errorf("dropped by the programs: not taken %d, dropped %d, re-injected %d; want 1, 1, 0", l.notTaken, l.heldDropped, l.reinjected)
	}
}
