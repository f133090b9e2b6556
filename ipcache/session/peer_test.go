package session_test

import (
	"context"
	"crypto/rand"
	"net/netip"
	"strconv"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"portcullis/identity"
	"portcullis/ipcache"
	"portcullis/ipcache/lease"
	"portcullis/ipcache/session"
)

// Times of the machines in these tests: long enough for a busy machine.
const (
	testTTL    = 2 * time.Second
	testBeat   = 100 * time.Millisecond
	testMargin = 20 * time.Millisecond
)

// peer is an agent without a kernel: both machines over a real transport. One
// goroutine owns the machines and the map that stands for the kernel's.
type peer struct {
	*node
	t      testing.TB
	inbox  chan func()
	gate   sync.Mutex // held: nothing is read from the transport
	ranges []netip.Prefix

	owner    *lease.Owner
	verifier *lease.Verifier
	table    *ipcache.Table
	timers   [2]lease.Time

	slots     map[netip.Addr]lease.Install
	deadlines map[uint32]lease.Time
	answers   []lease.Answer
	active    map[identity.UID]identity.Generation
	logs      []lease.LogEntry

	stopRun func() // nil until started
}

type peerConfig struct {
	name   identity.NodeName
	boot   byte
	ranges string
	owner  func(*lease.OwnerConfig)
	node   func(*session.Config)
	// speaks replaces the verifier's knowledge of who may speak for what.
	speaks func(identity.NodeName, netip.Addr) bool
}

func (l *lab) peer(t testing.TB, c peerConfig) *peer {
	t.Helper()
	p := &peer{t: t, inbox: make(chan func(), 64), slots: map[netip.Addr]lease.Install{}, deadlines: map[uint32]lease.Time{}, active: map[identity.UID]identity.Generation{}}
	p.ranges = []netip.Prefix{netip.MustParsePrefix(c.ranges)}
	p.node = l.node(t, c.name, func(cfg *session.Config) {
		cfg.Sink = p
		if c.node != nil {
			c.node(cfg)
		}
	})
	p.start(c)
	return p
}

// start makes fresh machines, as a new process has, in place of earlier ones.
func (p *peer) start(c peerConfig) {
	if p.stopRun != nil {
		p.stopRun()
	}
	boot := identity.BootID{c.boot}
	owner := lease.OwnerConfig{Node: c.name, Boot: boot, ReuseMargin: testMargin, Journal: lease.JournalMissing, FreshRanges: true,
		Nonce: func() (n lease.Nonce) { rand.Read(n[:]); return n },
		Mine:  func(ip netip.Addr) bool { return p.ranges[0].Contains(ip) }}
	if c.owner != nil {
		c.owner(&owner)
	}
	var err error
	if p.owner, err = lease.NewOwner(owner, bootNow()); err != nil {
		p.t.Fatal(err)
	}
	if p.table, err = ipcache.New(ipcache.Config{Slots: 64, Leases: 16, NextStamp: 1}); err != nil {
		p.t.Fatal(err)
	}
	speaks := c.speaks
	if speaks == nil {
		speaks = func(identity.NodeName, netip.Addr) bool { return true }
	}
	if p.verifier, err = lease.NewVerifier(lease.VerifierConfig{Node: c.name, Boot: boot, TTL: testTTL, Heartbeat: testBeat, Speaks: speaks}, p.table, bootNow()); err != nil {
		p.t.Fatal(err)
	}
	p.stopRun = background(p.t, p.run)
	p.do(func() {
		p.stepOwner(lease.OwnerTick{})
		p.stepVerifier(lease.VerifierTick{})
	})
}

func bootNow() lease.Time {
	var ts unix.Timespec
	if err := unix.ClockGettime(unix.CLOCK_BOOTTIME, &ts); err != nil {
		panic(err)
	}
	return lease.Time(ts.Nano())
}

func (p *peer) run(ctx context.Context) error {
	tick := time.NewTicker(5 * time.Millisecond)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return nil
		case f := <-p.inbox:
			f()
		case <-tick.C:
			now := bootNow()
			if p.timers[0] != 0 && p.timers[0] <= now {
				p.timers[0] = 0
				p.stepOwner(lease.OwnerTick{})
			}
			if p.timers[1] != 0 && p.timers[1] <= now {
				p.timers[1] = 0
				p.stepVerifier(lease.VerifierTick{})
			}
		}
	}
}

// do runs f in the goroutine that owns the machines.
func (p *peer) do(f func()) {
	done := make(chan struct{})
	p.inbox <- func() { f(); close(done) }
	<-done
}

// Owner implements session.Sink. After the test nobody takes inputs any more.
func (p *peer) Owner(in lease.OwnerInput) { p.hand(func() { p.stepOwner(in) }) }

// Verifier implements session.Sink.
func (p *peer) Verifier(in lease.VerifierInput) { p.hand(func() { p.stepVerifier(in) }) }

func (p *peer) hand(f func()) {
	p.gate.Lock()
	defer p.gate.Unlock()
	select {
	case p.inbox <- f:
	case <-p.t.Context().Done():
	}
}

func (p *peer) stepOwner(in lease.OwnerInput) {
	for _, out := range p.owner.Step(bootNow(), in) {
		switch o := out.(type) {
		case lease.SendToVerifier:
			p.SendToVerifier(o.Stream, o.Message)
		case lease.CloseVerifier:
			p.Close(o.Stream, o.Why)
		case lease.Activate:
			p.active[o.UID] = o.Generation
		case lease.OwnerTimer:
			p.timers[0] = o.At
		case lease.OwnerLog:
			p.logs = append(p.logs, o.Entry)
		}
	}
}

func (p *peer) stepVerifier(in lease.VerifierInput) {
	for _, out := range p.verifier.Step(bootNow(), in) {
		switch o := out.(type) {
		case lease.OpenStream:
			p.Open(o.Owner)
		case lease.CloseOwner:
			p.Close(o.Stream, o.Why)
		case lease.SendToOwner:
			p.SendToOwner(o.Stream, o.Message)
		case lease.Answer:
			p.answers = append(p.answers, o)
		case lease.VerifierTimer:
			p.timers[1] = o.At
		case lease.VerifierLog:
			p.logs = append(p.logs, o.Entry)
		case lease.Install:
			p.slots[o.Binding.IP] = o
		case lease.Zero:
			if p.slots[o.IP].Stamp == o.Stamp {
				delete(p.slots, o.IP)
			}
		case lease.SwitchLease:
			for ip, s := range p.slots {
				if s.Stamp == o.Stamp {
					s.Lease = o.Lease
					p.slots[ip] = s
				}
			}
		case lease.SetDeadline:
			p.deadlines[o.Lease] = o.Deadline
		}
	}
}

// ---- what tests do ------------------------------------------------------

func workload(b byte, ip netip.Addr) lease.Add {
	return lease.Add{UID: uid(b), IPs: []netip.Addr{ip}, Identity: identity.New("td.lab", "default", "w"+strconv.Itoa(int(b)), nil)}
}

// add gives an IP to a workload and waits until it is active.
func (p *peer) add(a lease.Add) {
	p.t.Helper()
	p.do(func() { p.stepOwner(a) })
	p.eventually("activation", func() bool { return p.active[a.UID] != 0 })
}

// want is a packet from the IP that is held.
func (p *peer) want(ip netip.Addr, owner identity.NodeName) {
	p.do(func() { p.stepVerifier(lease.Want{IP: ip, Owner: owner, Arrival: bootNow()}) })
}

// admits is what the kernel would do with a packet from the IP: the stamp of
// the binding that lets it in, 0 if none does. Call it by do or eventually.
func (p *peer) admits(ip netip.Addr) uint64 {
	if s, ok := p.slots[ip]; ok && p.deadlines[s.Lease] > bootNow() {
		return s.Stamp
	}
	return 0
}

// confirmed asks for the IP and waits until it is let in.
func (p *peer) confirmed(ip netip.Addr, owner identity.NodeName) (stamp uint64) {
	p.t.Helper()
	p.want(ip, owner)
	p.eventually("confirmation", func() bool { stamp = p.admits(ip); return stamp != 0 })
	return stamp
}

// eventually polls a condition in the goroutine that owns the machines.
func (p *peer) eventually(what string, ok func() bool) {
	p.t.Helper()
	for deadline := time.Now().Add(patience); ; time.Sleep(2 * time.Millisecond) {
		var done bool
		p.do(func() { done = ok() })
		if done {
			return
		}
		if time.Now().After(deadline) {
			p.t.Fatalf("%s: no %s within %v", p.name, what, patience)
		}
	}
}

// logged reports whether a line of that kind and reason was written.
func (p *peer) logged(kind lease.LogKind, reason string) bool {
	for _, e := range p.logs {
		if e.Kind == kind && (reason == "" || e.Reason == reason) {
			return true
		}
	}
	return false
}
