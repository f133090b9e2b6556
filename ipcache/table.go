package ipcache

import (
	"cmp"
	"errors"
	"fmt"
	"iter"
	"maps"
	"net/netip"
	"slices"

	"portcullis/bpf/abi"
	"portcullis/identity"
)

// Lease indices with a fixed meaning; those of sessions begin at LeaseFirst.
const (
	LeaseNone    = uint32(abi.LeaseNone)
	LeaseLocal   = uint32(abi.LeaseLocal)
	LeaseClassic = uint32(abi.LeaseClassic)
	LeaseFirst   = uint32(abi.LeaseFirst)
)

// FirstSlot is the lowest slot that a Table gives out. Slot 0 stays empty, so
// that a zeroed element of a kernel map names nothing.
const FirstSlot = 1

// The ways in which a Table says no. Each is an alarm: what was asked for is
// not installed, and nothing was evicted to make room (I6).
var (
	ErrSlotsFull  = errors.New("ipcache: no free slot: raise --bindings")
	ErrOwnerFull  = errors.New("ipcache: no more bindings of one owner: a session could not account for them")
	ErrLeasesFull = errors.New("ipcache: no free lease index: raise --sessions")
	ErrBound      = errors.New("ipcache: the IP has a binding already")
	ErrStamps     = errors.New("ipcache: the stamp counter cannot be made durable")
)

// Entry is one installation of a binding.
//
//	Install            Condemn              Free
//	  free ──▶ installed ──────▶ condemned ──────▶ free
//	           (in byIP)         (kernel store of 0 not yet known to be done)
//
// A condemned entry keeps its slot and goes on naming its lease, because the
// kernel may still do so; it is no longer the binding of its IP.
type Entry struct {
	Slot  uint32
	Stamp uint64 // never 0, never reused: I4 rests on it
	Lease uint32 // index; it and Proved are what changes while the entry stands
	// Proved is until when (BOOTTIME ns) the binding counts as proved by the
	// workload's SVID; 0: it does not. Then its evidence is svid, else Evidence.
	Proved int64

	Binding   identity.Binding // Identity is empty when restored: the kernel keeps its hash alone
	Hash      identity.Hash    // of Binding.Identity, always set
	OwnerBoot identity.BootID  // in which Binding.Generation means something
	Evidence  identity.Evidence
	Condemned bool
}

// Config sizes a Table. Every field but Reserve is required.
type Config struct {
	// Slots and Leases are the sizes of the kernel's arrays of that name,
	// in elements; their first FirstSlot and LeaseFirst are not given out.
	Slots, Leases uint32
	// PerOwner bounds the entries of one owner, condemned ones included, so
	// that a session's Hello can list them all. 0: no bound but Slots.
	PerOwner int
	// NextStamp is the first stamp that may be given: at least 1, and above
	// every stamp given in this boot (I4).
	NextStamp uint64
	// Reserve makes durable that stamps below limit may be in use, before
	// the first of them is. A failure fails the Install. Nil: the caller
	// persists NextStamp by other means.
	Reserve func(limit uint64) error
}

// reserveAhead is how many stamps one Reserve covers.
const reserveAhead = 1024

// Table is the desired state of the slots. Not safe for concurrent use.
type Table struct {
	cfg      Config
	next     uint64 // next stamp to give
	reserved uint64 // stamps below may be given

	slots      map[uint32]*record // occupied ones, condemned included
	byIP       map[netip.Addr]*record
	owners     map[identity.NodeName]*owned // those with entries
	identities map[identityKey]*shared      // those of entries

	freeSlots  fifo
	freeLeases fifo
	leases     map[uint32]int // lease index in use -> entries that name it (I2)
}

// New returns an empty table.
func New(cfg Config) (*Table, error) {
	switch {
	case cfg.Slots <= FirstSlot:
		return nil, fmt.Errorf("ipcache: %d slots: want at least %d", cfg.Slots, FirstSlot+1)
	case cfg.Leases <= LeaseFirst:
		return nil, fmt.Errorf("ipcache: %d leases: want at least %d", cfg.Leases, LeaseFirst+1)
	case cfg.NextStamp == 0:
		return nil, errors.New("ipcache: stamp 0 means an empty slot: NextStamp must be at least 1")
	}
	return &Table{
		cfg:        cfg,
		next:       cfg.NextStamp,
		reserved:   cfg.NextStamp,
		slots:      map[uint32]*record{},
		byIP:       map[netip.Addr]*record{},
		owners:     map[identity.NodeName]*owned{},
		identities: map[identityKey]*shared{},
		freeSlots:  newFIFO(FirstSlot, cfg.Slots),
		freeLeases: newFIFO(LeaseFirst, cfg.Leases),
		leases:     map[uint32]int{},
	}, nil
}

// Restore takes over an installation found in the pinned maps after a restart.
// It must come before the first Install. Of two entries of one IP the one
// with the greater stamp is its binding, the other is condemned: the caller
// finds it by Condemned and clears it.
func (t *Table) Restore(e Entry) error {
	switch {
	case e.Stamp == 0 || e.Slot < FirstSlot || e.Slot >= t.cfg.Slots:
		return fmt.Errorf("ipcache: restore slot %d, stamp %d: out of range", e.Slot, e.Stamp)
	case e.Stamp >= t.cfg.NextStamp:
		return fmt.Errorf("ipcache: restore slot %d: stamp %d is not below the counter's %d", e.Slot, e.Stamp, t.cfg.NextStamp)
	case e.Lease == LeaseNone || e.Lease >= t.cfg.Leases:
		return fmt.Errorf("ipcache: restore slot %d: lease index %d: out of range", e.Slot, e.Lease)
	case t.slots[e.Slot] != nil:
		return fmt.Errorf("ipcache: restore slot %d twice", e.Slot)
	}
	if old := t.byIP[e.Binding.IP]; old != nil && !e.Condemned {
		if old.stamp > e.Stamp {
			e.Condemned = true
		} else {
			t.Condemn(old.slot)
		}
	}
	t.freeSlots.remove(e.Slot)
	if e.Lease >= LeaseFirst {
		t.freeLeases.remove(e.Lease)
	}
	t.add(e)
	return nil
}

// Install chooses a slot and a fresh stamp for a binding. The lease index must
// be one of the fixed ones or acquired.
func (t *Table) Install(b identity.Binding, lease uint32, ev identity.Evidence, ownerBoot identity.BootID) (Entry, error) {
	if t.byIP[b.IP] != nil {
		return Entry{}, ErrBound
	}
	if t.cfg.PerOwner > 0 && t.CountOf(b.Owner) >= t.cfg.PerOwner {
		return Entry{}, ErrOwnerFull
	}
	if lease >= LeaseFirst {
		if _, ok := t.leases[lease]; !ok {
			return Entry{}, fmt.Errorf("ipcache: lease index %d is not in use", lease)
		}
	}
	if t.next >= t.reserved {
		limit := t.next + reserveAhead
		if t.cfg.Reserve != nil {
			if err := t.cfg.Reserve(limit); err != nil {
				return Entry{}, fmt.Errorf("%w: %w", ErrStamps, err)
			}
		}
		t.reserved = limit
	}
	slot, ok := t.freeSlots.pop()
	if !ok {
		return Entry{}, ErrSlotsFull
	}
	e := Entry{
		Slot: slot, Stamp: t.next, Lease: lease,
		Binding: b, Hash: b.Identity.Hash(), OwnerBoot: ownerBoot, Evidence: ev,
	}
	t.next++
	return t.add(e).entry(), nil
}

// Condemn says that the slot is to be zeroed: its entry is no longer the
// binding of its IP, which may get another. No such slot: nothing happens.
func (t *Table) Condemn(slot uint32) {
	e := t.slots[slot]
	if e == nil || e.condemned {
		return
	}
	e.condemned = true
	delete(t.byIP, e.ip)
	e.owner.condemn(e)
}

// Free gives a slot back, after 0 was stored into its stamp in the kernel. It
// needs no rest: programs read the stamp a second time. Still, the slot goes
// to the end of the queue.
func (t *Table) Free(slot uint32) {
	e := t.slots[slot]
	if e == nil {
		return
	}
	t.Condemn(slot)
	t.remove(e)
	t.unname(e.lease)
	t.freeSlots.push(slot)
}

// SetLease makes a standing entry name another lease index.
func (t *Table) SetLease(slot, lease uint32) {
	e := t.slots[slot]
	if e == nil || e.lease == lease {
		return
	}
	t.unname(e.lease)
	e.lease = lease
	t.leases[lease]++
}

// SetProved notes until when (BOOTTIME ns) a standing entry counts as proved.
func (t *Table) SetProved(slot uint32, until int64) {
	if e := t.slots[slot]; e != nil {
		e.proved = until
	}
}

// EvidenceAt returns how strongly the binding is known at a time (BOOTTIME ns).
func (e *Entry) EvidenceAt(now int64) identity.Evidence {
	if now < e.Proved {
		return identity.EvidenceSVID
	}
	return e.Evidence
}

func (t *Table) unname(lease uint32) {
	t.leases[lease]--
	if lease < LeaseFirst && t.leases[lease] == 0 {
		delete(t.leases, lease)
	}
}

// SetBinding completes an entry whose identity was not known (after Restore).
// It changes nothing that the kernel sees.
func (t *Table) SetBinding(slot uint32, b identity.Binding) {
	e := t.slots[slot]
	if e == nil || e.ip != b.IP || e.generation != b.Generation || e.owner.name != b.Owner || e.identity.hash != b.Identity.Hash() {
		return
	}
	old := e.identity
	e.uid, e.ports, e.identity = b.UID, b.Ports, t.share(b.Identity, old.hash)
	t.unshare(old)
}

// AcquireLease takes an unused lease index, the one unused for longest.
func (t *Table) AcquireLease() (uint32, error) {
	l, ok := t.freeLeases.pop()
	if !ok {
		return LeaseNone, ErrLeasesFull
	}
	t.leases[l] = 0
	return l, nil
}

// ReleaseLease gives an index back. The caller has stored 0 as its deadline.
// It is refused while any slot names the index, condemned ones included: the
// next session to get it would bring them to life (I2).
func (t *Table) ReleaseLease(lease uint32) error {
	n, ok := t.leases[lease]
	switch {
	case lease < LeaseFirst || !ok:
		return fmt.Errorf("ipcache: lease index %d is not in use", lease)
	case n > 0:
		return fmt.Errorf("ipcache: lease index %d is named by %d slots", lease, n)
	}
	delete(t.leases, lease)
	t.freeLeases.push(lease)
	return nil
}

// LeasesUsed returns how many lease indices are taken, but for the fixed ones.
func (t *Table) LeasesUsed() int {
	n := len(t.leases)
	for l := range LeaseFirst {
		if _, ok := t.leases[l]; ok {
			n--
		}
	}
	return n
}

// LeaseUsers returns how many entries name the index.
func (t *Table) LeaseUsers(lease uint32) int { return t.leases[lease] }

// Get returns the binding installed for an IP.
func (t *Table) Get(ip netip.Addr) (Entry, bool) { return deref(t.byIP[ip]) }

// Slot returns what occupies a slot, condemned or not.
func (t *Table) Slot(slot uint32) (Entry, bool) { return deref(t.slots[slot]) }

func deref(e *record) (Entry, bool) {
	if e == nil {
		return Entry{}, false
	}
	return e.entry(), true
}

// OfOwner returns a copy of the owner's entries, condemned ones included, by
// slot. It is for what has to look at all of them; CountOf, Holds and
// CondemnedOf take no time.
func (t *Table) OfOwner(owner identity.NodeName) []Entry {
	o := t.owners[owner]
	if o == nil {
		return nil
	}
	all := make([]*record, 0, o.count)
	for e := o.first; e != nil; e = e.after {
		all = append(all, e)
	}
	return bySlot(all)
}

// CondemnedOf returns a copy of the owner's condemned entries, by slot.
func (t *Table) CondemnedOf(owner identity.NodeName) []Entry {
	if o := t.owners[owner]; o != nil && len(o.condemned) > 0 {
		return bySlot(slices.Collect(maps.Values(o.condemned)))
	}
	return nil
}

func bySlot(of []*record) []Entry {
	slices.SortFunc(of, func(a, b *record) int { return cmp.Compare(a.slot, b.slot) })
	out := make([]Entry, len(of))
	for i, e := range of {
		out[i] = e.entry()
	}
	return out
}

// CountOf returns how many entries an owner has, condemned ones included.
func (t *Table) CountOf(owner identity.NodeName) int {
	if o := t.owners[owner]; o != nil {
		return o.count
	}
	return 0
}

// Owners returns whoever has entries, sorted.
func (t *Table) Owners() []identity.NodeName { return slices.Sorted(maps.Keys(t.owners)) }

// All yields every entry, condemned ones included, in no order.
func (t *Table) All() iter.Seq[Entry] {
	return func(yield func(Entry) bool) {
		for _, e := range t.slots {
			if !yield(e.entry()) {
				return
			}
		}
	}
}

// Len returns how many slots are occupied.
func (t *Table) Len() int { return len(t.slots) }

// Cap returns how many slots there are.
func (t *Table) Cap() int { return int(t.cfg.Slots) - FirstSlot }

// NextStamp returns the stamp that the next Install will use.
func (t *Table) NextStamp() uint64 { return t.next }

// Holds tells whether the owner has any binding here that is not condemned.
func (t *Table) Holds(owner identity.NodeName) bool {
	o := t.owners[owner]
	return o != nil && o.count > len(o.condemned)
}
