package agent

import (
	"context"
	"net/netip"
	"testing"
	"time"

	"portcullis/identity"
	"portcullis/ipcache/lease"
)

// Bundles that change in the moment in which something else did are not missed:
// an authority that was withdrawn would be believed on.
func TestNewsOfProofsAreNotMissed(t *testing.T) {
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	own, bundles := make(chan struct{}), make(chan struct{})
	taken := 0
	n := proofNews{
		svids: func() <-chan struct{} { return nil },
		own: func() <-chan struct{} {
			if taken++; taken == 2 { // the agent's SVID has changed, and now a bundle does
				close(bundles)
				bundles = make(chan struct{})
				own = make(chan struct{})
			}
			return own
		},
		bundles: func() <-chan struct{} { return bundles },
		offset:  func() time.Duration { return 0 },
	}
	close(own)
	looks, doubts := 0, 0
	n.watch(ctx, nil, func() { looks++ }, func() { doubts++; cancel() })
	if doubts != 1 || looks == 0 {
		t.Errorf("looked %d times, doubted %d times, want once", looks, doubts)
	}
}

func TestWallClockThatIsSet(t *testing.T) {
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	offset := time.Duration(0)
	never := func() <-chan struct{} { return nil }
	n := proofNews{svids: never, own: never, bundles: never, offset: func() time.Duration { return offset }}
	tick := make(chan time.Time, 1)
	looks, doubts := 0, 0
	n.watch(ctx, tick, func() {
		switch looks++; looks {
		case 1: // a tick with nothing new
			tick <- time.Time{}
		case 2:
			if doubts != 0 {
				t.Error("doubted without cause")
			}
			offset = -time.Hour
			tick <- time.Time{}
		}
	}, func() { doubts++; cancel() })
	if doubts != 1 {
		t.Errorf("doubted %d times, want once", doubts)
	}
}

// An agent that does not follow SVIDs leaves no proof of an earlier one standing.
func TestProofOfAnEarlierAgent(t *testing.T) {
	n := newNode(t)
	n.veth("a0")
	l := n.mustStart()
	n.run(l, app("a0", "10.1.1.2"))
	ip := netip.MustParseAddr("10.1.1.2")
	e, ok := l.table.Get(ip)
	if !ok {
		t.Fatal("it has no binding")
	}
	if err := l.dp.SetProved(e.Slot, e.Stamp, int64(l.now().Add(time.Hour))); err != nil {
		t.Fatal(err)
	}
	n.crash(l)
	l = n.mustStart()
	defer n.crash(l)
	after, ok := l.table.Get(ip)
	if !ok || after.Stamp != e.Stamp {
		t.Fatalf("%+v was not taken over: %+v", e, after)
	}
	slots := map[uint32]uint64{}
	for i, s := range l.dp.Slots() {
		slots[i] = s.Proved
	}
	if after.Proved != 0 || slots[after.Slot] != 0 {
		t.Errorf("proved until %d, in the kernel until %d", after.Proved, slots[after.Slot])
	}
}

// A planned restart ends no flow that asks for a proof: those of this node's own
// workloads stand until their SVIDs have had time to come, and no longer.
func TestProofsOutliveARestart(t *testing.T) {
	n := newNode(t)
	n.cfg.WorkloadSVIDDir = t.TempDir()
	n.veth("a0")
	l := n.mustStart()
	n.run(l, app("a0", "10.1.1.2"))
	ip := netip.MustParseAddr("10.1.1.2")
	proved := func() bool {
		e, _ := l.table.Get(ip)
		for i, s := range l.dp.Slots() {
			if i == e.Slot && s.Proved != 0 {
				return e.Proved != 0
			}
		}
		return false
	}
	e, ok := l.table.Get(ip)
	if !ok || l.proofs == nil {
		t.Fatal("it has no binding, or nobody proves")
	}
	for _, c := range []struct {
		name   string
		until  lease.Time
		change func()
		stands bool
	}{
		{"no SVID yet", lease.Time(time.Hour), func() {}, true},
		{"what rests on bundles is looked at again", lease.Time(time.Hour), func() { clear(l.proofs.local) }, true},
		{"there is no source of SVIDs", lease.Time(time.Hour), func() { l.workloadSVIDs = nil }, false},
		{"no SVID comes", lease.Time(time.Hour), func() { l.proofs.keptUntil = l.now() }, false},
		{"its certificate ends", 0, func() {}, false},
		{"it ended and came back", lease.Time(time.Hour), func() { l.unfollow(e.Binding.UID) }, false},
		{"the SVID is not its own", lease.Time(time.Hour), func() { l.template = identity.Template{} }, false},
	} {
		err := l.storeProved(e, int64(l.now().Add(time.Duration(c.until))))
		if err != nil {
			t.Fatal(err)
		}
		n.crash(l)
		l = n.mustStart()
		if e, ok = l.table.Get(ip); !ok {
			t.Fatal("it was not taken over")
		}
		if l.workloadSVIDs, err = newWorkloads(n.cfg, l.log); err != nil {
			t.Fatal(err)
		}
		c.change()
		for _, own := range l.endpoints {
			l.proveEndpoint(own)
		}
		if proved() != c.stands {
			t.Errorf("%s: proved %t, want %t", c.name, proved(), c.stands)
		}
	}
	n.crash(l)
}

// A workload whose SVID is late, and verifiers that ask and ask, do not fill the
// confirmation log; what is new is in it.
func TestRefusedProofsAreToldOnce(t *testing.T) {
	p, now := &toldRefusals{}, lease.Time(time.Hour)
	late := toldRefusal{"n2", identity.UID{1}, lease.ProofNoSVID}
	said := 0
	for range 480 { // two minutes
		if p.say(late, now) {
			said++
		}
		now = now.Add(250 * time.Millisecond)
	}
	if said != 2 {
		t.Errorf("said %d times in two minutes, want twice", said)
	}
	for _, other := range []toldRefusal{{"n3", identity.UID{1}, lease.ProofNoSVID}, {"n2", identity.UID{2}, lease.ProofNoSVID}, {"n2", identity.UID{1}, lease.ProofExpired}} {
		if !p.say(other, now) {
			t.Errorf("%+v is not said", other)
		}
	}
	for i := range 2 * toldMost {
		p.say(toldRefusal{uid: identity.UID{byte(i), byte(i >> 8)}}, now)
		if len(p.told) > toldMost {
			t.Fatal("it remembers without end")
		}
	}
}
