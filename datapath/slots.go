package datapath

import (
	"errors"
	"fmt"
	"iter"
	"math"
	"net/netip"
	"sync/atomic"
	"time"
	"unsafe"

	"github.com/cilium/ebpf"
	"go.uber.org/zap"

	"portcullis/bpf/abi"
)

// never is the deadline of what has none.
const never = math.MaxUint64

// clockTick is by how much the programs' clock may be late: they read
// CLOCK_BOOTTIME again only when the kernel's coarse clock has moved, which it
// does with the timer tick, 100 to 1000 times a second. 10 ms is the tick at
// HZ=100, the slowest; deadlines are written that much early, so that none
// lasts longer than it should on any kernel.
const clockTick = 10 * time.Millisecond

// Slot is one installed binding: what the programs see of it, and what user
// space keeps beside it.
type Slot struct {
	abi.Slot
	Cold abi.SlotCold
}

// slotRest is how long an emptied slot stays empty, and at least how long the
// entry of a local IP stays after its binding.
const slotRest = time.Second

// rest is an entry of bindings that leads to no slot any more.
type rest struct {
	stamp uint64
	since int64 // BOOTTIME, ns
}

// words is a slot as it is stored: each word in one piece.
type words [unsafe.Sizeof(abi.Slot{}) / 8]uint64

// InstallSlot publishes a binding: the slot is written while its stamp is 0,
// then gets its stamp, then the IP is led to it. If the last fails (ErrMapFull)
// the stamp is zeroed again, so that nothing of the binding is in force; what
// the IP had before stays, which is another stamp.
//
// The lease must have its deadline, and policy must know the identity, before.
// A slot that this process emptied is not filled again for a second (see
// pc_slot): ErrMapFull, for it happens only when nearly every slot is in use.
func (d *Datapath) InstallSlot(slot uint32, s abi.Slot, c abi.SlotCold) error {
	if slot == 0 || slot >= d.slots.n || s.Stamp == 0 || s.IP == (abi.Addr{}) || s.Lease >= d.lease.n {
		return fmt.Errorf("install slot %d: stamp %d, lease %d: out of range", slot, s.Stamp, s.Lease)
	}
	if at, ok := d.emptied[slot]; ok {
		if d.Now()-at < int64(slotRest) {
			return fmt.Errorf("install slot %d: it was emptied less than %v ago: %w", slot, slotRest, ErrMapFull)
		}
		delete(d.emptied, slot)
	}
	d.endRests()
	p, w := (*words)(unsafe.Pointer(d.slots.at(slot))), (*words)(unsafe.Pointer(&s))
	atomic.StoreUint64(&p[0], 0)
	c.Stamp = s.Stamp
	*d.cold.at(slot) = c // no program reads it
	for i := 1; i < len(p); i++ {
		atomic.StoreUint64(&p[i], w[i])
	}
	atomic.StoreUint64(&p[0], s.Stamp) // published: complete from here on
	b := abi.Binding{Stamp: s.Stamp, Slot: slot}
	if err := d.coll.Maps["bindings"].Put(&s.IP, &b); err != nil {
		atomic.StoreUint64(&p[0], 0)
		d.emptied[slot] = d.Now()
		return mapError("install a binding of "+AddrFrom(s.IP).String(), "bindings", err)
	}
	if d.outsideRanges(s.IP) {
		d.bumpRangeEpoch() // flows that took the IP for its range's are judged again
	}
	return nil
}

// ZeroSlot revokes a binding: one store, after which no program counts it. It
// changes nothing if the slot has another stamp by then. Then the IP's entry
// is removed, if it still leads here. That of a local workload's IP stays for a
// second more: by it after_translation knows the packets that from_workload has
// let go for it to judge, and that are nobody's by then. It may be repeated.
//
// The only error is a slot or stamp out of range. When the entry cannot be
// removed the revocation holds all the same, for the entry names a stamp that
// no slot has; it is logged, and goes with the IP's next binding or the next
// start.
func (d *Datapath) ZeroSlot(slot uint32, stamp uint64, ip netip.Addr) error {
	if slot == 0 || slot >= d.slots.n || stamp == 0 {
		return fmt.Errorf("zero slot %d: stamp %d: out of range", slot, stamp)
	}
	d.endRests()
	key := Addr(ip)
	if s := d.slots.at(slot); atomic.CompareAndSwapUint64(&s.Stamp, stamp, 0) {
		d.emptied[slot] = d.Now()
		if s.Lease == uint32(abi.LeaseLocal) && s.Ifindex != 0 {
			d.resting[key] = rest{stamp, d.Now()}
		}
	}
	if d.resting[key].stamp != stamp {
		d.unbind(key, stamp)
	}
	return nil
}

// unbind removes the entry of an IP, if it leads to that stamp.
func (d *Datapath) unbind(key abi.Addr, stamp uint64) {
	var b abi.Binding
	m := d.coll.Maps["bindings"]
	err := m.Lookup(&key, &b)
	if err == nil && b.Stamp == stamp {
		err = m.Delete(&key)
	}
	if err != nil && !errors.Is(err, ebpf.ErrKeyNotExist) {
		d.log().Warn("a revoked binding's entry stays in the map", zap.Stringer("ip", AddrFrom(key)), zap.Error(err))
	}
}

// endRests removes the entries that have rested for long enough. It comes with
// every change of a slot: what stays longer takes room, and does no harm.
func (d *Datapath) endRests() {
	for key, r := range d.resting {
		if d.Now()-r.since >= int64(slotRest) {
			d.unbind(key, r.stamp)
			delete(d.resting, key)
		}
	}
}

// SwitchLease puts a standing binding on another lease, by one store. The
// lease must have its deadline before. ErrStaleStamp if the slot holds another
// binding, which is not touched.
func (d *Datapath) SwitchLease(slot uint32, stamp uint64, lease uint32) error {
	if slot == 0 || slot >= d.slots.n || stamp == 0 || lease >= d.lease.n {
		return fmt.Errorf("switch slot %d to lease %d: out of range", slot, lease)
	}
	s := d.slots.at(slot)
	if atomic.LoadUint64(&s.Stamp) != stamp {
		return fmt.Errorf("switch slot %d to lease %d: %w", slot, lease, ErrStaleStamp)
	}
	// One goroutine writes slots, so the stamp cannot change in between.
	atomic.StoreUint32(&s.Lease, lease)
	return nil
}

// SwitchIdentity puts a standing binding under another number, by one store:
// its stamp stays, so its flows live on. Both numbers must say something true of
// it, and policy must know the new one before. ErrStaleStamp if the slot holds
// another binding, which is not touched.
func (d *Datapath) SwitchIdentity(slot uint32, stamp uint64, numeric uint32) error {
	if slot == 0 || slot >= d.slots.n || stamp == 0 {
		return fmt.Errorf("switch slot %d to identity %d: out of range", slot, numeric)
	}
	s := d.slots.at(slot)
	if atomic.LoadUint64(&s.Stamp) != stamp {
		return fmt.Errorf("switch slot %d to identity %d: %w", slot, numeric, ErrStaleStamp)
	}
	// One goroutine writes slots, so the stamp cannot change in between.
	atomic.StoreUint32(&s.Identity, numeric)
	return nil
}

// SetProved stores until when (CLOCK_BOOTTIME ns) a standing binding counts as
// proved by its workload's SVID, one tick early: see clockTick. 0 or less takes
// the proof back. It is one store: stamp and flows stay. ErrStaleStamp if the slot
// holds another binding, which is not touched.
func (d *Datapath) SetProved(slot uint32, stamp uint64, boottime int64) error {
	if slot == 0 || slot >= d.slots.n || stamp == 0 {
		return fmt.Errorf("prove slot %d: out of range", slot)
	}
	s := d.slots.at(slot)
	if atomic.LoadUint64(&s.Stamp) != stamp {
		return fmt.Errorf("prove slot %d: %w", slot, ErrStaleStamp)
	}
	// One goroutine writes slots, so the stamp cannot change in between.
	atomic.StoreUint64(&s.Proved, uint64(max(0, boottime-int64(clockTick))))
	return nil
}

// SetDeadline stores the deadline of a lease (CLOCK_BOOTTIME ns), one tick
// early: see clockTick. 0 or less ends the lease. The reserved indices cannot
// be set.
func (d *Datapath) SetDeadline(lease uint32, boottime int64) error {
	if lease < uint32(abi.LeaseFirst) || lease >= d.lease.n {
		return fmt.Errorf("deadline of lease %d: out of range %d..%d", lease, abi.LeaseFirst, d.lease.n-1)
	}
	atomic.StoreUint64(&d.lease.at(lease).Deadline, uint64(max(0, boottime-int64(clockTick))))
	return nil
}

// Deadline returns what is stored for a lease: 0 if it has ended.
func (d *Datapath) Deadline(lease uint32) uint64 {
	if lease >= d.lease.n {
		return 0
	}
	return atomic.LoadUint64(&d.lease.at(lease).Deadline)
}

// Slots returns the bindings that are installed, by slot.
func (d *Datapath) Slots() iter.Seq2[uint32, Slot] {
	return func(yield func(uint32, Slot) bool) {
		for i := uint32(1); i < d.slots.n; i++ {
			if s, ok := d.slot(i); ok && !yield(i, s) {
				return
			}
		}
	}
}

// slot reads one slot; ok is false if it is empty, or changes meanwhile.
func (d *Datapath) slot(i uint32) (s Slot, ok bool) {
	p, w := (*words)(unsafe.Pointer(d.slots.at(i))), (*words)(unsafe.Pointer(&s.Slot))
	if w[0] = atomic.LoadUint64(&p[0]); w[0] == 0 {
		return Slot{}, false
	}
	for k := 1; k < len(p); k++ {
		w[k] = atomic.LoadUint64(&p[k])
	}
	s.Cold = *d.cold.at(i)
	return s, atomic.LoadUint64(&p[0]) == w[0] && s.Cold.Stamp == w[0]
}

// adoptSlots ends what an agent left half done when it died. Every slot in
// force afterwards has its description and is led to by its IP; every entry
// leads to a slot in force.
func (d *Datapath) adoptSlots() error {
	m := d.coll.Maps["bindings"]
	for i := uint32(0); i < d.slots.n; i++ {
		stamp := atomic.LoadUint64(&d.slots.at(i).Stamp)
		if stamp == 0 {
			continue
		}
		s, ok := d.slot(i)
		if ok {
			var b abi.Binding
			err := m.Lookup(&s.IP, &b)
			if err != nil && !errors.Is(err, ebpf.ErrKeyNotExist) {
				return mapError("adopt bindings", "bindings", err)
			}
			ok = err == nil && b.Slot == i && b.Stamp == stamp
		}
		if !ok || i == 0 || s.Lease >= d.lease.n {
			atomic.StoreUint64(&d.slots.at(i).Stamp, 0)
			d.emptied[i] = d.Now()
		}
	}
	var key abi.Addr
	var b abi.Binding
	var dead []abi.Addr
	it := m.Iterate()
	for it.Next(&key, &b) {
		if b.Slot >= d.slots.n || atomic.LoadUint64(&d.slots.at(b.Slot).Stamp) != b.Stamp {
			dead = append(dead, key)
		}
	}
	if err := it.Err(); err != nil {
		return mapError("adopt bindings", "bindings", err)
	}
	for _, key := range dead {
		if err := m.Delete(&key); err != nil && !errors.Is(err, ebpf.ErrKeyNotExist) {
			return mapError("adopt bindings", "bindings", err)
		}
	}
	return nil
}
