package datapath_test

import (
	"errors"
	"os"
	"path/filepath"
	"slices"
	"testing"

	"github.com/cilium/ebpf/link"
	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netns"

	"portcullis/bpf/abi"
	"portcullis/datapath"
)

// A device with the programs and without an endpoint is shut, both ways; the
// endpoint opens it without another attachment.
func TestAttachedIsShut(t *testing.T) {
	l := newLab(t)
	d := l.open()
	server, peer := l.udp(l.workload, workload4, 5000), l.udp(l.remote, remote4, 6000)
	l.send(peer, workload4, 5000, "judged by nobody")
	l.receive(server, "judged by nobody")
	l.must(d.Attach("wl0", uint32(l.wl)))
	l.send(peer, workload4, 5000, "in")
	l.send(server, remote4, 6000, "out")
	for _, dir := range []abi.Direction{abi.DirIngress, abi.DirEgress} {
		l.eventually("a drop: no endpoint, "+dir.String(), func() bool { return dropped(l, d, dir, abi.ReasonNoEndpoint) > 0 })
	}
	l.nothing(server)
	l.nothing(peer)
	if eps, err := d.Endpoints(); err != nil || len(eps) != 0 {
		t.Errorf("endpoints %v, %v", eps, err)
	}
	told := func() bool {
		t.Helper()
		pins, err := datapath.InspectPins(l.pins)
		l.must(err)
		return len(pins.Devices) == 1 && pins.Devices[0].Endpoint
	}
	if told() {
		t.Error("the pins tell of an endpoint")
	}
	before := onHook(l)
	l.serve(d)
	if !told() {
		t.Error("the pins do not tell of the endpoint")
	}
	l.confirm(d, 1, remote4)
	l.send(peer, workload4, 5000, "now")
	l.receive(server, "now")
	if after := onHook(l); !slices.Equal(before, after) {
		t.Errorf("the links of the hook were %v, and are %v", before, after)
	}
}

// onHook returns the links at the workload's device, in one direction.
func onHook(l *lab) (ids []link.ID) {
	l.t.Helper()
	at, err := link.QueryPrograms(link.QueryOptions{Target: l.wl, Attach: 47}) // BPF_TCX_EGRESS
	l.must(err)
	for _, p := range at.Programs {
		id, _ := p.LinkID()
		ids = append(ids, id)
	}
	return ids
}

// The links of a renamed device follow its name, so that a new device may have
// the old one; devices may also change names with each other.
func TestMoveLinks(t *testing.T) {
	l := newLab(t)
	d := l.open()
	l.serve(d)
	rename := func(ifindex int, to string) {
		t.Helper()
		dev, err := netlink.LinkByIndex(ifindex)
		l.must(err)
		l.must(netlink.LinkSetName(dev, to))
	}
	guarded := func(name string, ifindex int) {
		t.Helper()
		if ok, err := d.Guarded(name, uint32(ifindex)); err != nil || !ok {
			t.Errorf("%s, device %d: guarded %v, %v", name, ifindex, ok, err)
		}
	}
	rename(l.wl, "wl9")
	for range 2 { // it may be repeated
		l.must(d.MoveLinks(uint32(l.wl), "wl0", "wl9"))
	}
	guarded("wl9", l.wl)
	// Here nobody moved the links before another device had the name.
	rename(l.wl, "wl8")
	second := l.veth2("wl9")
	l.must(d.Attach("wl9", uint32(second)))
	guarded("wl8", l.wl)
	guarded("wl9", second)
	// A swap, of which one half is told first.
	rename(l.wl, "tmp")
	rename(second, "wl8")
	rename(l.wl, "wl9")
	l.must(d.MoveLinks(uint32(l.wl), "wl8", "wl9"))
	guarded("wl9", l.wl)
	guarded("wl8", second)
	if err := d.MoveLinks(uint32(l.wl), "wl8", "wl7"); err == nil {
		t.Error("another device's links were moved")
	}
	if live, dead, err := d.Links(); err != nil || len(dead) != 0 || live[uint32(l.wl)] != "wl9" || live[uint32(second)] != "wl8" || len(live) != 2 {
		t.Errorf("links %v, dead %v, %v", live, dead, err)
	}
	// Dead links give way to those of a living device.
	dev, err := netlink.LinkByIndex(second)
	l.must(err)
	l.must(netlink.LinkDel(dev))
	rename(l.wl, "wl8")
	l.must(d.MoveLinks(uint32(l.wl), "wl9", "wl8"))
	guarded("wl8", l.wl)
}

// A device that was renamed keeps its gate, whatever becomes of a new device
// with its former name: its links are still pinned under that.
func TestRenamedDeviceKeepsItsGate(t *testing.T) {
	l := newLab(t)
	d := l.open()
	l.serve(d)
	old, err := netlink.LinkByName("wl0")
	l.must(err)
	l.must(netlink.LinkSetDown(old))
	l.must(netlink.LinkSetName(old, "former"))
	l.must(netlink.LinkSetUp(old))
	second := l.veth2("wl0")
	l.must(d.Attach("wl0", uint32(second)))
	for name, ifindex := range map[string]int{"former": l.wl, "wl0": second} {
		if ok, err := d.Guarded(name, uint32(ifindex)); err != nil || !ok {
			t.Errorf("%s: guarded %v, %v", name, ok, err)
		}
	}
	if n := len(onHook(l)); n != 1 {
		t.Errorf("the renamed device has %d programs", n)
	}
	// A restart finds the renamed device by its links.
	l.must(d.Close())
	d = l.open()
	if eps, err := d.Endpoints(); err != nil || len(eps) != 1 || int(eps["former"].Ifindex) != l.wl {
		t.Errorf("adopted %v, %v", eps, err)
	}
}

// replaceElsewhere moves the workload's device to another network namespace,
// where it keeps its index, and makes another of its name and index here.
func (l *lab) replaceElsewhere() {
	l.t.Helper()
	other, err := netns.New()
	l.must(err)
	l.t.Cleanup(func() { other.Close() })
	l.must(netns.Set(l.node))
	dev, err := netlink.LinkByName("wl0")
	l.must(err)
	l.must(netlink.LinkSetNsFd(dev, int(other)))
	l.in(other, func() {
		if moved, err := netlink.LinkByName("wl0"); err != nil || moved.Attrs().Index != l.wl {
			l.t.Fatalf("the device did not keep its index: %v, %v", moved, err)
		}
	})
	attrs := netlink.NewLinkAttrs()
	attrs.Name, attrs.Index = "wl0", l.wl
	l.must(netlink.LinkAdd(&netlink.Veth{LinkAttrs: attrs, PeerName: "wl0p"}))
}

// A device that went to another network namespace keeps index and links there.
// Here its name and index may be another device's, which is not guarded by them.
func TestDeviceMovedAway(t *testing.T) {
	l := newLab(t)
	d := l.open()
	l.must(d.Attach("wl0", uint32(l.wl)))
	l.replaceElsewhere()
	if ok, err := d.Guarded("wl0", uint32(l.wl)); err != nil || ok {
		t.Errorf("guarded by another device's links: %v, %v", ok, err)
	}
	for range 2 { // also when nobody has heard of the former one's end
		l.must(d.Attach("wl0", uint32(l.wl)))
		l.must(d.Detach("wl0", uint32(l.wl)+1000)) // a former one's end, which comes late
		if ok, err := d.Guarded("wl0", uint32(l.wl)); err != nil || !ok {
			t.Errorf("guarded %v, %v", ok, err)
		}
		l.must(d.Detach("wl0", uint32(l.wl)))
	}
}

// The same while no agent runs: the next one finds the links dead, and gives the
// new device neither them nor the former one's endpoint (I1).
func TestDeviceMovedAwayMeanwhile(t *testing.T) {
	l := newLab(t)
	d := l.open()
	ep := l.serve(d)
	l.must(d.Close())
	l.replaceElsewhere()
	d = l.open()
	if eps, err := d.Endpoints(); err != nil || len(eps) != 0 {
		t.Errorf("adopted %v, %v", eps, err)
	}
	if live, _, err := d.Links(); err != nil || len(live) != 0 {
		t.Errorf("links %v, %v", live, err)
	}
	if err := pinnedMap(l, "endpoints").Lookup(ep.Ifindex, &ep); err == nil {
		t.Error("the element is still there")
	}
	l.must(d.Attach("wl0", uint32(l.wl)))
	if ok, err := d.Guarded("wl0", uint32(l.wl)); err != nil || !ok {
		t.Errorf("guarded %v, %v", ok, err)
	}
}

// When the second program cannot be attached the device must not be left with
// one: it is taken down.
func TestAttachFailsShut(t *testing.T) {
	l := newLab(t)
	d := l.open()
	l.must(os.MkdirAll(filepath.Join(l.pins, "links", "wl0", "to_workload"), 0o700)) // where the pin should go
	if err := d.Attach("wl0", uint32(l.wl)); err == nil {
		t.Fatal("Attach succeeded")
	}
	dev, err := netlink.LinkByName("wl0")
	l.must(err)
	if dev.Attrs().Flags&1 != 0 { // net.FlagUp
		t.Error("the device is up, without its programs")
	}
	// A second try works.
	l.must(d.Attach("wl0", uint32(l.wl)))
	if err := d.Attach("wl0", uint32(l.wl)+1000); err == nil {
		t.Error("attached to a device that was replaced")
	}
	if err := d.Attach("nosuch", 1); !errors.Is(err, datapath.ErrNoDevice) {
		t.Errorf("no device: %v", err)
	}
}

// A device without an endpoint is shut; what is left of one that is gone is
// removed, and nothing of the next one with its name.
func TestRemoveEndpoint(t *testing.T) {
	l := newLab(t)
	d := l.open()
	ep := l.serve(d)
	l.confirm(d, 1, remote4)
	server, peer := l.udp(l.workload, workload4, 5000), l.udp(l.remote, remote4, 6000)
	l.send(peer, workload4, 5000, "before")
	l.receive(server, "before")

	l.must(d.RemoveEndpoint(ep.Ifindex))
	l.send(peer, workload4, 5000, "after")
	l.send(server, remote4, 6000, "after")
	for _, dir := range []abi.Direction{abi.DirIngress, abi.DirEgress} {
		l.eventually("a drop: "+dir.String(), func() bool { return dropped(l, d, dir, abi.ReasonNoEndpoint) > 0 })
	}
	l.nothing(server)
	l.nothing(peer)

	dev, err := netlink.LinkByName("wl0")
	l.must(err)
	l.must(netlink.LinkDel(dev))
	if live, dead, err := d.Links(); err != nil || len(live) != 0 || !slices.Equal(dead, []string{"wl0"}) {
		t.Errorf("links %v, dead %v, %v", live, dead, err)
	}
	for range 2 { // it may be repeated
		l.must(d.RemoveEndpoint(ep.Ifindex))
		l.must(d.Detach("wl0", ep.Ifindex))
	}
	if _, err := os.Stat(filepath.Join(l.pins, "links", "wl0")); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("the links are still pinned: %v", err)
	}
	if err := pinnedMap(l, "endpoints").Lookup(ep.Ifindex, &ep); err == nil {
		t.Error("the element is still there")
	}
}
