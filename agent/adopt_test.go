package agent

import (
	"net/netip"
	"os"
	"slices"
	"strings"
	"testing"
	"time"

	"portcullis/authz"
	"portcullis/bpf/abi"
	"portcullis/identity"
	"portcullis/ipcache/lease"
)

// A restart with nothing changed: the endpoint stays active, under its policy
// and with its generation.
func TestRestartKeepsEndpoints(t *testing.T) {
	n := newNode(t)
	n.veth("a0")
	l := n.mustStart()
	e := n.run(l, app("a0", "10.1.1.2"))
	n.importPolicy(l, denyAll)
	before := n.inKernel(l, "a0")
	n.crash(l)

	l = n.mustStart()
	defer n.crash(l)
	after := n.inKernel(l, "a0")
	if after.Policy == before.Policy {
		t.Error("the policy was not compiled anew")
	}
	if after.Policy = before.Policy; after != before {
		t.Errorf("the endpoint changed: %+v, was %+v", after, before)
	}
	if l.endpoints[e.uid] == nil || l.endpoints[e.uid].generation != e.generation {
		t.Error("the agent does not know its workload any more")
	}
}

// A workload that is under policy in the kernel is not opened because the
// files of its policies are gone (I2): not by the start, not by the one after
// it, and not by a change of somebody's ports; by a policy that is imported.
func TestLostPoliciesDoNotOpen(t *testing.T) {
	n := newNode(t)
	n.veth("a0")
	l := n.mustStart()
	n.run(l, app("a0", "10.1.1.2"))
	n.importPolicy(l, denyAll)
	n.crash(l)
	if err := os.RemoveAll(n.cfg.StateDir); err != nil {
		t.Fatal(err)
	}
	enforced := func(l *loop) bool {
		ep := n.inKernel(l, "a0")
		return ep.State == uint32(abi.EPActive) && ep.Flags&uint32(abi.EPEnforceIngress) != 0
	}
	lost := func(l *loop) bool {
		return slices.ContainsFunc(l.alarms.list(), func(a alarm) bool { return a.name == "policies-lost" })
	}
	for range 2 {
		l = n.mustStart()
		if !enforced(l) {
			t.Fatal("opened by a start")
		}
		if err := l.applyPolicies(); err != nil || !enforced(l) {
			t.Fatalf("opened by a compilation (%v)", err)
		}
		if !lost(l) {
			t.Error("no alarm")
		}
		n.crash(l)
	}
	l = n.mustStart()
	defer n.crash(l)
	n.importPolicy(l, strings.Replace(denyAll, "podSelector: {}", "podSelector: {matchLabels: {app: nobody}}", 1))
	if !enforced(l) || !lost(l) {
		t.Errorf("with another workload's policy back: enforced %v, alarm %v", enforced(l), lost(l))
	}
	n.importPolicy(l, denyAll) // under the same name
	if !enforced(l) || lost(l) {
		t.Errorf("with its policy back: enforced %v, alarm %v", enforced(l), lost(l))
	}
	if err := l.deletePolicies([]authz.Ref{l.repo.List()[0].Ref}); err != nil {
		t.Fatal(err)
	}
	if enforced(l) {
		t.Error("under policy after the last one was deleted")
	}
}

// An operator who says that policy is never enforced gets that, for lost
// policies too, and an alarm with it.
func TestLostPoliciesAreNotEnforcedUnderNever(t *testing.T) {
	for name, never := range map[string]func(*Config){
		"everywhere":       func(c *Config) { c.Enforce = authz.EnforceNever },
		"in its namespace": func(c *Config) { c.EnforceIn = map[string]authz.Enforcement{"default": authz.EnforceNever} },
	} {
		t.Run(name, func(t *testing.T) {
			n := newNode(t)
			n.veth("a0")
			l := n.mustStart()
			n.run(l, app("a0", "10.1.1.2"))
			n.importPolicy(l, denyAll)
			n.crash(l)
			if err := os.RemoveAll(n.cfg.StateDir); err != nil {
				t.Fatal(err)
			}
			never(&n.cfg)
			l = n.mustStart()
			defer n.crash(l)
			if ep := n.inKernel(l, "a0"); ep.State != uint32(abi.EPActive) || ep.Flags&enforceFlags != 0 {
				t.Errorf("state %d, flags %#x; want active and not under policy", ep.State, ep.Flags)
			}
			if !slices.ContainsFunc(l.alarms.list(), func(a alarm) bool { return a.name == "policies-lost" }) {
				t.Error("no alarm")
			}
		})
	}
}

// An endpoint that is not registered any more is shut, and its binding ends.
func TestUnregisteredEndpointIsShut(t *testing.T) {
	n := newNode(t)
	n.veth("a0")
	l := n.mustStart()
	e := n.run(l, app("a0", "10.1.1.2"))
	if err := l.store.deleteWorkload(e.uid); err != nil {
		t.Fatal(err)
	}
	n.crash(l)
	l = n.mustStart()
	defer n.crash(l)
	if ep := n.inKernel(l, "a0"); ep.State != uint32(abi.EPClosed) {
		t.Errorf("state %d, want closed", ep.State)
	}
	if _, ok := l.table.Get(e.ips[0]); ok {
		t.Error("its binding stands")
	}
}

// A workload whose device vanished after the adoption, before devices are
// watched, ends.
func TestDeviceVanishesBeforeTheWatch(t *testing.T) {
	n := newNode(t)
	n.veth("a0")
	l := n.mustStart()
	e := n.run(l, app("a0", "10.1.1.2"))
	n.crash(l)
	l = n.mustStart()
	defer n.crash(l)
	if l.endpoints[e.uid] == nil {
		t.Fatal("not adopted")
	}
	n.unplug("a0")
	l.sweepDevices()
	if l.endpoints[e.uid] != nil || len(l.byIfindex) != 0 {
		t.Error("the endpoint is still there")
	}
	for _, w := range l.owner.Workloads() {
		if w.UID == e.uid {
			t.Errorf("the owner still speaks for it: %v", w.State)
		}
	}
}

// --fresh-ranges is a statement that the pins can refute: a flag left in a unit
// file must not cut the wait for leases that a lost journal knew of (I1).
func TestFreshRangesIsNotBelievedAgainstThePins(t *testing.T) {
	n := newNode(t)
	n.veth("a0")
	l := n.mustStart()
	n.run(l, app("a0", "10.1.1.2"))
	n.crash(l)
	if err := os.RemoveAll(n.cfg.JournalDir); err != nil {
		t.Fatal(err)
	}
	l = n.mustStart()
	defer n.crash(l)
	if wait := l.grants.StartupWait(l.now()); wait < lease.MaxLease {
		t.Errorf("waits %v for leases of which it knows nothing, want at least %v", wait, lease.MaxLease)
	}
}

// A range that moves away while no agent runs shuts the workloads in it, and
// nobody else's.
func TestRangeMovesWhileNoAgentRuns(t *testing.T) {
	n := newNode(t)
	n.cfg.Ranges = append(n.cfg.Ranges, netip.MustParsePrefix("10.1.3.0/24"))
	l := n.mustStart()
	for ifname, ip := range map[string]string{"a0": "10.1.1.2", "a1": "10.1.1.3", "a2": "10.1.1.4", "a3": "10.1.1.5", "moved": "10.1.3.2"} {
		n.veth(ifname)
		n.run(l, app(ifname, ip))
	}
	n.crash(l)
	n.cfg.Ranges = n.cfg.Ranges[:1]
	l = n.mustStart()
	defer n.crash(l)
	for _, ifname := range []string{"a0", "a1", "a2", "a3"} {
		if ep := n.inKernel(l, ifname); ep.State != uint32(abi.EPActive) {
			t.Errorf("%s: state %d, want active", ifname, ep.State)
		}
	}
	if ep := n.inKernel(l, "moved"); ep.State != uint32(abi.EPClosed) {
		t.Errorf("moved: state %d, want closed", ep.State)
	}
	if _, ok := l.table.Get(netip.MustParseAddr("10.1.3.2")); ok {
		t.Error("the binding of an IP that is not this node's stands")
	}
}

// A restart with other flags: a binding of an owner that does not speak for the
// IP any more, or that nobody would renew, is not believed until its lease ends.
func TestBindingOfAFormerOwner(t *testing.T) {
	const index = 3
	for name, change := range map[string]struct {
		to    func(*Config)
		stays bool
	}{
		"nothing": {func(*Config) {}, true},
		"range": {func(c *Config) {
			c.Peers = []Peer{{Name: "n2", Address: c.Peers[0].Address, Ranges: []netip.Prefix{netip.MustParsePrefix("10.1.7.0/24")}}}
		}, false},
		"owner": {func(c *Config) {
			p := c.Peers[0]
			p.Name = "n9"
			c.Peers = []Peer{p}
		}, false},
		"classic": {func(c *Config) { c.Evidence, c.UnsafeClassic = ModeClassic, true }, false},
	} {
		t.Run(name, func(t *testing.T) {
			n := newNode(t)
			l := n.mustStart()
			b := identity.Binding{IP: netip.MustParseAddr("10.1.2.2"), Generation: 1, UID: identity.NewUID(), Owner: "n2", Identity: identity.New("example.org", "default", "default", nil)}
			if l.nodeOf(b.IP) != b.Owner {
				t.Fatal("not in a range of n2")
			}
			l.dp.State().ReserveStamps(1)
			for _, w := range []lease.Write{lease.SetDeadline{Lease: index, Deadline: l.now().Add(time.Minute)},
				lease.Install{Stamp: l.table.NextStamp(), Slot: 9, Lease: index, Binding: b, OwnerBoot: identity.BootID{7}, Evidence: identity.EvidenceLease}} {
				if err := l.write(w); err != nil {
					t.Fatal(err)
				}
			}
			n.crash(l)
			change.to(&n.cfg)
			l = n.mustStart()
			defer n.crash(l)
			if e, stays := l.table.Get(b.IP); stays != change.stays {
				t.Errorf("stays: %v, want %v: %+v", stays, change.stays, e)
			}
			for i, s := range l.dp.Slots() {
				if i == 9 && !change.stays {
					t.Errorf("in the kernel: %+v", s)
				}
			}
		})
	}
}
