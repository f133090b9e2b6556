package agent

import (
	"errors"
	"slices"
	"testing"
	"time"

	"github.com/vishvananda/netlink"

	"portcullis/bpf/abi"
	"portcullis/ipcache/lease"
)

// Only the host side of a workload's veth is a workload's device: the programs
// on an uplink would cut the node off, and make whoever sends in by it the
// workload.
func TestRegisterRefusesOtherDevices(t *testing.T) {
	n := newNode(t)
	n.veth("up0")
	bridge := &netlink.Bridge{LinkAttrs: netlink.NewLinkAttrs()}
	bridge.Name = "br0"
	if err := netlink.LinkAdd(bridge); err != nil {
		t.Fatal(err)
	}
	n.cfg.Uplinks = []string{"up0"}
	l := n.mustStart()
	defer n.crash(l)
	for _, ifname := range []string{"up0", "lo", "br0", "nothing"} {
		if _, err := n.register(l, app(ifname, "10.1.1.2")); !errors.Is(err, errNoDevice) {
			t.Errorf("%s: %v, want %v", ifname, err, errNoDevice)
		}
	}
	if len(l.endpoints) != 0 {
		t.Error("something is left of them")
	}
}

// The UID under which the node holds its own addresses is nobody else's: its
// deregistration would end the node's binding.
func TestRegisterRefusesTheNodesUID(t *testing.T) {
	n := newNode(t)
	n.veth("a0")
	l := n.mustStart()
	defer n.crash(l)
	w := app("a0", "10.1.1.2")
	w.uid = nodeUID(n.cfg.Node, n.cfg.NodeIPs[0])
	if _, err := n.register(l, w); !errors.Is(err, errConflict) {
		t.Errorf("%v, want %v", err, errConflict)
	}
}

// A journal that could not be written is begun anew as soon as that is
// possible: then what waited for it goes on.
func TestJournalIsMended(t *testing.T) {
	n := newNode(t)
	n.veth("a0")
	l := n.mustStart()
	defer l.close() // of which the journal's part fails
	if err := l.journal.Close(); err != nil {
		t.Fatal(err)
	}
	e, err := n.register(l, app("a0", "10.1.1.2"))
	if err != nil {
		t.Fatal(err)
	}
	alarmed := func() bool {
		return slices.ContainsFunc(l.alarms.list(), func(a alarm) bool { return a.name == "journal" })
	}
	tickUntil(l, alarmed)
	if e.state != abi.EPQuarantined || n.inKernel(l, "a0").State != uint32(abi.EPQuarantined) || !alarmed() {
		t.Fatalf("without a journal: state %v, alarm %v; want quarantined, with an alarm", e.state, alarmed())
	}
	l.retry()
	tickUntil(l, func() bool { return e.state == abi.EPActive })
	if e.state != abi.EPActive || alarmed() {
		t.Errorf("with a journal again: state %v, alarm %v", e.state, alarmed())
	}
}

// tickUntil lets time pass for the loop until done, or ten seconds.
func tickUntil(l *loop, done func() bool) {
	for deadline := time.Now().Add(10 * time.Second); !done() && time.Now().Before(deadline); time.Sleep(time.Millisecond) {
		l.tick()
	}
}

// Whoever registers was given the IP: its holder's gate closes before the
// newcomer's opens, and a deregistration that comes late changes nothing.
func TestIPGivenTwice(t *testing.T) {
	n := newNode(t)
	n.veth("a0")
	n.veth("b0")
	l := n.mustStart()
	defer n.crash(l)
	first := n.run(l, app("a0", "10.1.1.2"))
	second, err := n.register(l, app("b0", "10.1.1.2"))
	if err != nil {
		t.Fatal(err)
	}
	if ep := n.inKernel(l, "a0"); ep.State != uint32(abi.EPClosed) || second.state != abi.EPQuarantined {
		t.Errorf("holder's state %d, newcomer's %v; want closed and quarantined", ep.State, second.state)
	}
	tickUntil(l, func() bool { return second.state == abi.EPActive })
	if existed, err := l.deregister(first.uid); existed || err != nil {
		t.Errorf("the first one is registered still: %v, %v", existed, err)
	}
	entry, ok := l.table.Get(second.ips[0])
	if second.state != abi.EPActive || l.byIP[second.ips[0]] != second || !ok || entry.Binding.UID != second.uid {
		t.Errorf("the newcomer is %v, binding %v", second.state, entry.Binding)
	}
}

// A newcomer that is rejected takes nothing from the IP's holder, neither when
// it comes nor when it goes.
func TestRejectedNewcomerTakesNothing(t *testing.T) {
	n := newNode(t)
	n.veth("a0")
	n.veth("b0")
	l := n.mustStart()
	defer n.crash(l)
	holder := n.run(l, app("a0", "10.1.1.2"))
	l.stepOwner(lease.Leave{}) // from now on nothing is taken up
	newcomer, err := n.register(l, app("b0", "10.1.1.2"))
	if err != nil || newcomer.detail == "" {
		t.Fatalf("%v, detail %q; want a rejection", err, newcomer.detail)
	}
	intact := func() {
		t.Helper()
		entry, ok := l.table.Get(holder.ips[0])
		if n.inKernel(l, "a0").State != uint32(abi.EPActive) || !ok || entry.Binding.UID != holder.uid || l.byIP[holder.ips[0]] != holder {
			t.Errorf("the holder is %v, the binding %v", holder.state, entry.Binding)
		}
	}
	intact()
	if _, err := l.deregister(newcomer.uid); err != nil {
		t.Fatal(err)
	}
	intact()
}

// A workload's end closes its gate before anybody else can have its IP, and
// leaves nothing behind when its device goes.
func TestDeregister(t *testing.T) {
	n := newNode(t)
	n.veth("a0")
	n.veth("b0")
	l := n.mustStart()
	defer n.crash(l)
	first := n.run(l, app("a0", "10.1.1.2"))
	released := l.now()
	if existed, err := l.deregister(first.uid); !existed || err != nil {
		t.Fatal(existed, err)
	}
	if ep := n.inKernel(l, "a0"); ep.State != uint32(abi.EPClosed) {
		t.Errorf("the gate is not closed: state %d", ep.State)
	}
	second := n.run(l, app("b0", "10.1.1.2"))
	if second.id == first.id || second.generation <= first.generation {
		t.Errorf("endpoint %d, generation %d after endpoint %d, generation %d", second.id, second.generation, first.id, first.generation)
	}
	n.unplug("a0")
	l.linkGone(first.ifindex)
	if l.endpoints[second.uid] == nil || l.byIP[second.ips[0]] != second {
		t.Error("the end of the first one's device ended the second one")
	}
	if users := l.ids.Users(first.numeric); users != 0 {
		t.Errorf("%d users of a number that nobody has", users)
	}
	// The number rests, with what policy says of it, and then it is free.
	l.dropNumbers()
	if _, ok := l.ids.Lookup(first.numeric); !ok && int64(l.now()-released) < int64(numberRest) {
		t.Error("its number is free at once")
	}
	l.ids.Acquire(first.identity)
	l.ids.Release(first.numeric, int64(l.now())-int64(numberRest))
	l.dropNumbers()
	if _, ok := l.ids.Lookup(first.numeric); ok {
		t.Error("its number still names it")
	}
}

// A workload that is registered again, behind another device, is not ended by
// the end of the first device, nor by anything else that was left to do for its
// first registration.
func TestRegisteredAgain(t *testing.T) {
	n := newNode(t)
	n.veth("a0")
	n.veth("b0")
	l := n.mustStart()
	defer n.crash(l)
	first := n.run(l, app("a0", "10.1.1.2"))
	l.retryClose[first.uid] = true // its gate could not be closed at once
	if existed, err := l.deregister(first.uid); !existed || err != nil {
		t.Fatal(existed, err)
	}
	w := app("b0", "10.1.1.3")
	w.uid = first.uid
	second := n.run(l, w)
	l.retry()
	n.unplug("a0")
	l.linkGone(first.ifindex)
	if ep := n.inKernel(l, "b0"); l.endpoints[second.uid] != second || ep.State != uint32(abi.EPActive) {
		t.Errorf("it ended with what its first registration left: state %d", ep.State)
	}
	if l.byIfindex[first.ifindex] != nil {
		t.Error("the first device's programs are kept")
	}
}
