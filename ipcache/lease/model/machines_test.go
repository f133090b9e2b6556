package model

import (
	"encoding/binary"
	"fmt"
	"math/rand/v2"
	"net/netip"
	"testing"
	"time"

	"portcullis/identity"
	"portcullis/ipcache"
	"portcullis/ipcache/lease"
)

// The machines of the product, in the place of the model: one owner of one IP,
// verifiers, streams that deliver when they are told to, the kernels' slots and
// leases. One tick is 15 s of a verifier's clock and 18.75 s of the owner's, so
// MaxLease is four of them on both sides.
const (
	tickVerifier = lease.MaxLease / 4
	tickOwner    = tickVerifier * 5 / 4
)

var (
	theIP  = netip.MustParseAddr("10.0.0.1")
	bootO  = identity.BootID{'o'}
	bootV  = identity.BootID{'v'}
	byRole = identity.New("td", "ns", "sa", nil)
)

type machines struct {
	t   *testing.T
	rng *rand.Rand
	cfg Config
	met map[string]int // how often what happened
	// What a walk is made with, beside the configuration.
	idle, margin time.Duration

	ticks    int
	owner    *lease.Owner // nil: down
	journal  []lease.Record
	lastGen  identity.Generation
	workload int // the present or last, from 0
	active   bool
	present  bool
	gens     map[identity.Generation]int // to workloads
	verifier []*machineV
	streams  lease.StreamID
	nonces   uint64
	over     string // why the walk can go no further
}

type machineV struct {
	m          *machines
	name       identity.NodeName
	v          *lease.Verifier // nil: down
	table      *ipcache.Table
	slots      map[uint32]lease.Install
	leases     map[uint32]lease.Time
	stamp      uint64
	dialling   bool
	failing    bool // the next zero fails
	now, older *wire
}

// wire is one stream. Both sides have the same name for it.
type wire struct {
	id         lease.StreamID
	accepted   bool // the owner heard of it
	toOwner    []lease.Message
	toVerifier []lease.Message
	dead       bool // the owner's end is gone
}

func uid(w int) identity.UID { return identity.UID{byte(w + 1)} }

func (m *machines) ownerNow() lease.Time {
	return lease.Time(time.Hour + time.Duration(m.ticks)*tickOwner)
}

func (m *machines) verifierNow() lease.Time {
	return lease.Time(2*time.Hour + time.Duration(m.ticks)*tickVerifier)
}

func newMachines(t *testing.T, cfg Config, rng *rand.Rand, change func(*machines), met map[string]int) *machines {
	m := &machines{t: t, met: met, rng: rng, cfg: cfg, idle: 100 * time.Hour, margin: time.Duration(cfg.Margin) * tickOwner, gens: map[identity.Generation]int{}}
	if cfg.Releases {
		m.idle = 2 * tickVerifier
	}
	if change != nil {
		change(m)
	}
	m.startOwner(lease.JournalMissing, true)
	m.stepOwner(m.add(0))
	m.ticks = 8 // the first start is long ago
	for v := range cfg.Verifiers {
		m.verifier = append(m.verifier, &machineV{m: m, name: identity.NodeName(fmt.Sprintf("v%d", v+1)), slots: map[uint32]lease.Install{}, leases: map[uint32]lease.Time{}, stamp: 1})
		m.verifier[v].start()
	}
	return m
}

func (m *machines) add(w int) lease.Add {
	m.workload, m.present, m.active = w, true, false
	return lease.Add{UID: uid(w), IPs: []netip.Addr{theIP}, Identity: byRole}
}

func (m *machines) startOwner(journal lease.JournalState, fresh bool) {
	if journal == lease.JournalMissing {
		m.journal = nil
	}
	o, err := lease.NewOwner(lease.OwnerConfig{
		Node: "o", Boot: bootO, ReuseMargin: m.margin, Flight: time.Duration(m.cfg.Flight) * tickVerifier,
		Nonce:          func() (n lease.Nonce) { m.nonces++; binary.LittleEndian.PutUint64(n[:], m.nonces); return },
		Mine:           func(netip.Addr) bool { return true },
		LastGeneration: m.lastGen, Journal: journal, Records: m.journal, FreshRanges: fresh,
	}, m.ownerNow())
	if err != nil {
		m.t.Fatal(err)
	}
	m.owner = o
	if m.present && m.active {
		m.stepOwner(lease.Adopt{Add: lease.Add{UID: uid(m.workload), IPs: []netip.Addr{theIP}, Identity: byRole}, Generation: m.generation()})
	} else if m.present {
		m.stepOwner(m.add(m.workload))
	}
	m.stepOwner(lease.OwnerTick{})
}

func (m *machines) generation() identity.Generation {
	for g, w := range m.gens {
		if w == m.workload {
			return g
		}
	}
	m.t.Fatal("an active workload without a generation")
	return 0
}

func (m *machines) stepOwner(in lease.OwnerInput) {
	for _, out := range m.owner.Step(m.ownerNow(), in) {
		switch out := out.(type) {
		case lease.SendToVerifier:
			for _, v := range m.verifier {
				if v.now != nil && v.now.id == out.Stream && !v.now.dead {
					v.now.toVerifier = append(v.now.toVerifier, out.Message)
				}
			}
		case lease.CloseVerifier:
			m.hungUp(out)
		case lease.Activate:
			m.active = true
			m.lastGen = max(m.lastGen, out.Generation)
			m.gens[out.Generation] = m.workload
		case lease.Journal:
			m.journal = append(m.journal, out.Record)
		case lease.Rejected:
			m.t.Fatalf("rejected: %s", out.Why)
		}
	}
}

func (m *machines) hungUp(out lease.CloseVerifier) {
	for _, v := range m.verifier {
		if v.older != nil && v.older.id == out.Stream {
			v.older = nil
		}
		if v.now != nil && v.now.id == out.Stream {
			// The model's owner never hangs up on a present stream by itself.
			m.over = "the owner hangs up: " + out.Why
		}
	}
}

func (n *machineV) start() {
	table, err := ipcache.New(ipcache.Config{Slots: 8, Leases: 32, NextStamp: n.stamp})
	if err != nil {
		n.m.t.Fatal(err)
	}
	for slot, s := range n.slots {
		if err := table.Restore(ipcache.Entry{Slot: slot, Stamp: s.Stamp, Lease: s.Lease, OwnerBoot: s.OwnerBoot, Hash: s.Binding.Identity.Hash(),
			Evidence: s.Evidence, Binding: identity.Binding{IP: theIP, Generation: s.Binding.Generation, UID: s.Binding.UID, Owner: "o"}}); err != nil {
			n.m.t.Fatal(err)
		}
	}
	for i := range n.leases {
		if table.LeaseUsers(i) == 0 {
			delete(n.leases, i) // as the agent does at its start
		}
	}
	n.table = table
	n.v, err = lease.NewVerifier(lease.VerifierConfig{
		Node: n.name, Boot: bootV, TTL: time.Duration(n.m.cfg.TTL) * tickVerifier, Heartbeat: tickVerifier,
		IdleBinding: n.m.idle, IdleSession: 100 * time.Hour, DeadAfter: 100 * time.Hour,
		Speaks: func(identity.NodeName, netip.Addr) bool { return true },
	}, table, n.m.verifierNow())
	if err != nil {
		n.m.t.Fatal(err)
	}
	n.step(lease.VerifierTick{})
}

func (n *machineV) step(in lease.VerifierInput) {
	for _, out := range n.v.Step(n.m.verifierNow(), in) {
		switch out := out.(type) {
		case lease.Zero:
			if n.failing {
				n.failing = false
				n.m.met["a store fails"]++
				n.step(lease.StoreFailed{Write: out})
				return
			}
			delete(n.slots, out.Slot)
		case lease.Install:
			n.slots[out.Slot] = out
			n.stamp = max(n.stamp, out.Stamp+1)
		case lease.SwitchLease:
			s := n.slots[out.Slot]
			s.Lease = out.Lease
			n.slots[out.Slot] = s
		case lease.SetDeadline:
			n.leases[out.Lease] = out.Deadline
		case lease.OpenStream:
			n.dialling = true
		case lease.SendToOwner:
			if n.now != nil && n.now.id == out.Stream && !n.now.dead {
				n.now.toOwner = append(n.now.toOwner, out.Message)
			}
		case lease.CloseOwner:
			if out.Why != "store failed" {
				n.m.t.Fatalf("%s closes: %s", n.name, out.Why)
			}
			n.dropWire()
		}
	}
}

// giveUp ends the verifier's side of its stream; what it sent may still be read.
func (n *machineV) giveUp() {
	w := n.now
	if n.v != nil {
		n.step(lease.OwnerGone{Owner: "o", Stream: w.id, Why: "given up"})
	}
	n.dropWire()
}

// dropWire has the owner alone at its end.
func (n *machineV) dropWire() {
	w := n.now
	n.now = nil
	if w == nil || w.dead || !w.accepted {
		return
	}
	if old := n.older; old != nil && n.m.owner != nil {
		// One such stream at a time: see docs/model.
		n.older = nil
		n.m.stepOwner(lease.VerifierGone{Stream: old.id})
	}
	w.toVerifier = nil
	n.older = w
}

// do does one random thing, and returns its name; "": nothing that is possible.
func (m *machines) do() string {
	n := m.verifier[m.rng.IntN(len(m.verifier))]
	switch r := m.rng.IntN(100); {
	case r < 10:
		m.ticks++
		return "tick"
	case r < 14 && m.owner != nil:
		m.stepOwner(lease.OwnerTick{})
		return "OwnerTick"
	case r < 24:
		return m.churn(r)
	case r < 27:
		return m.ownerFault()
	case r < 50 && m.owner != nil:
		return n.toOwner()
	case n.v == nil:
		if r < 80 {
			n.start()
			return "verifier starts"
		}
		return ""
	case r == 50 && m.rng.IntN(3) == 0:
		n.v, n.dialling = nil, false
		if n.now != nil {
			n.giveUp()
		}
		return "verifier crashes"
	case r < 54 && n.now != nil && n.now.accepted && !n.now.dead:
		n.giveUp()
		return "stream breaks"
	case r < 64:
		n.step(lease.VerifierTick{})
		return "VerifierTick"
	case r < 72:
		n.step(lease.Want{IP: theIP, Owner: "o", Arrival: m.verifierNow()})
		return "Want"
	case r < 74 && n.now != nil && !n.now.dead && n.v.PeerState("o") == lease.PeerOpen:
		n.step(lease.FromOwner{Stream: n.now.id, Message: lease.Going{}})
		return "Going"
	default:
		return n.fromOwner()
	}
}

func (m *machines) churn(r int) string {
	last := m.workload+1 >= m.cfg.Workloads
	switch {
	case m.present && m.active && !last && r < 17:
		m.present = false
		if m.owner != nil {
			m.stepOwner(lease.Delete{UID: uid(m.workload)})
		}
		return "the workload goes"
	case m.owner != nil && !last && (!m.present || !m.active && r == 20):
		m.stepOwner(m.add(m.workload + 1))
		return "a workload comes"
	}
	return ""
}

func (m *machines) ownerFault() string {
	if m.owner == nil {
		journal := lease.JournalPresent
		if m.rng.IntN(2) == 0 {
			journal = lease.JournalMissing
		}
		m.startOwner(journal, false)
		return "owner starts"
	}
	if m.rng.IntN(3) != 0 {
		return ""
	}
	m.owner = nil
	for _, n := range m.verifier {
		n.older = nil
		if n.now != nil {
			n.now.dead, n.now.toOwner, n.now.toVerifier = true, nil, nil
		}
	}
	return "owner crashes"
}

// toOwner hands the owner the next thing of this verifier.
func (n *machineV) toOwner() string {
	m := n.m
	if w := n.older; w != nil && len(w.toOwner) > 0 && m.rng.IntN(2) == 0 {
		msg := w.toOwner[0]
		w.toOwner = w.toOwner[1:]
		m.stepOwner(lease.FromVerifier{Stream: w.id, Message: msg})
		return fmt.Sprintf("old stream of %s: %T", n.name, msg)
	}
	w := n.now
	switch {
	case w == nil || w.dead:
		return ""
	case !w.accepted:
		w.accepted = true
		m.stepOwner(lease.StreamAccepted{Stream: w.id, Verifier: n.name})
		return "accept"
	case len(w.toOwner) == 0:
		return ""
	}
	msg := w.toOwner[0]
	w.toOwner = w.toOwner[1:]
	m.stepOwner(lease.FromVerifier{Stream: w.id, Message: msg})
	return fmt.Sprintf("owner reads %T of %s", msg, n.name)
}

// fromOwner hands a verifier its next thing.
func (n *machineV) fromOwner() string {
	m := n.m
	w := n.now
	switch {
	case w == nil && n.dialling && m.owner != nil:
		n.dialling = false
		m.streams++
		n.now = &wire{id: m.streams}
		n.step(lease.StreamOpened{Owner: "o", Stream: m.streams})
		return "stream opens"
	case w == nil:
		return ""
	case w.dead:
		n.giveUp()
		return "the stream's end is noticed"
	case len(w.toVerifier) == 0:
		return ""
	}
	msg := w.toVerifier[0]
	w.toVerifier = w.toVerifier[1:]
	if _, ok := msg.(lease.Revoke); ok && m.cfg.StoreFails && m.rng.IntN(3) == 0 {
		n.failing = true
	}
	defer func() { n.failing = false }()
	n.step(lease.FromOwner{Stream: w.id, Message: msg})
	return fmt.Sprintf("%s reads %T", n.name, msg)
}
