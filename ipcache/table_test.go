package ipcache_test

import (
	"errors"
	"net/netip"
	"testing"

	"portcullis/identity"
	"portcullis/ipcache"
)

func ip(n int) netip.Addr { return netip.AddrFrom4([4]byte{10, 0, byte(n >> 8), byte(n)}) }

func binding(n int) identity.Binding {
	return identity.Binding{IP: ip(n), Generation: identity.Generation(n), Owner: "o", Identity: identity.New("td", "ns", "sa", nil)}
}

func newTable(t *testing.T, c ipcache.Config) *ipcache.Table {
	t.Helper()
	tb, err := ipcache.New(c)
	if err != nil {
		t.Fatal(err)
	}
	return tb
}

func install(t *testing.T, tb *ipcache.Table, n int, lease uint32) ipcache.Entry {
	t.Helper()
	e, err := tb.Install(binding(n), lease, identity.EvidenceLease, identity.BootID{})
	if err != nil {
		t.Fatal(err)
	}
	return e
}

func TestStampsAreNeverReused(t *testing.T) {
	var reserved []uint64
	tb := newTable(t, ipcache.Config{Slots: 4, Leases: 8, NextStamp: 100, Reserve: func(limit uint64) error {
		reserved = append(reserved, limit)
		return nil
	}})
	last := uint64(99)
	for i := range 3000 {
		e := install(t, tb, i, ipcache.LeaseLocal)
		if e.Stamp <= last || e.Stamp >= reserved[len(reserved)-1] {
			t.Fatalf("stamp %d after %d, reserved below %v", e.Stamp, last, reserved)
		}
		last = e.Stamp
		tb.Free(e.Slot)
	}
	if len(reserved) < 2 {
		t.Fatalf("reserved %v", reserved)
	}
}

func TestReserveFails(t *testing.T) {
	fail := true
	tb := newTable(t, ipcache.Config{Slots: 4, Leases: 8, NextStamp: 1, Reserve: func(uint64) error {
		if fail {
			return errors.New("disk")
		}
		return nil
	}})
	if _, err := tb.Install(binding(1), ipcache.LeaseLocal, identity.EvidenceLocal, identity.BootID{}); !errors.Is(err, ipcache.ErrStamps) {
		t.Fatal(err)
	}
	if tb.Len() != 0 {
		t.Fatal("installed all the same")
	}
	fail = false
	install(t, tb, 1, ipcache.LeaseLocal)
}

func TestSlotsAreFIFOAndBounded(t *testing.T) {
	tb := newTable(t, ipcache.Config{Slots: 4, Leases: 8, NextStamp: 1})
	a, b, c := install(t, tb, 1, ipcache.LeaseLocal), install(t, tb, 2, ipcache.LeaseLocal), install(t, tb, 3, ipcache.LeaseLocal)
	if _, err := tb.Install(binding(4), ipcache.LeaseLocal, identity.EvidenceLocal, identity.BootID{}); !errors.Is(err, ipcache.ErrSlotsFull) {
		t.Fatal(err)
	}
	tb.Free(b.Slot)
	tb.Free(a.Slot)
	if e := install(t, tb, 5, ipcache.LeaseLocal); e.Slot != b.Slot {
		t.Fatalf("slot %d, want the one freed first, %d", e.Slot, b.Slot)
	}
	if _, err := tb.Install(binding(3), ipcache.LeaseLocal, identity.EvidenceLocal, identity.BootID{}); !errors.Is(err, ipcache.ErrBound) {
		t.Fatal(err)
	}
	if e, ok := tb.Get(ip(3)); !ok || e.Slot != c.Slot {
		t.Fatalf("%+v", e)
	}
	if tb.Len() != 2 || tb.Cap() != 3 {
		t.Fatalf("%d of %d", tb.Len(), tb.Cap())
	}
}

func TestCondemned(t *testing.T) {
	tb := newTable(t, ipcache.Config{Slots: 4, Leases: 8, NextStamp: 1})
	l, err := tb.AcquireLease()
	if err != nil || l != ipcache.LeaseFirst {
		t.Fatal(l, err)
	}
	a := install(t, tb, 1, l)
	tb.Condemn(a.Slot)
	if _, ok := tb.Get(ip(1)); ok || tb.Holds("o") {
		t.Fatal("a condemned entry is still the binding of its IP")
	}
	b := install(t, tb, 1, ipcache.LeaseLocal) // the IP may have another
	// But the slot is taken, and its lease index too (I2).
	if b.Slot == a.Slot || tb.LeaseUsers(l) != 1 {
		t.Fatalf("slot %d, users %d", b.Slot, tb.LeaseUsers(l))
	}
	if err := tb.ReleaseLease(l); err == nil {
		t.Fatal("an index was freed that a slot names")
	}
	tb.Free(a.Slot)
	if err := tb.ReleaseLease(l); err != nil {
		t.Fatal(err)
	}
	if err := tb.ReleaseLease(l); err == nil {
		t.Fatal("freed twice")
	}
	if e, ok := tb.Get(ip(1)); !ok || e.Stamp != b.Stamp {
		t.Fatalf("%+v", e)
	}
}

func TestLeases(t *testing.T) {
	tb := newTable(t, ipcache.Config{Slots: 4, Leases: 6, NextStamp: 1})
	var ls []uint32
	for range 3 {
		l, err := tb.AcquireLease()
		if err != nil {
			t.Fatal(err)
		}
		ls = append(ls, l)
	}
	if _, err := tb.AcquireLease(); !errors.Is(err, ipcache.ErrLeasesFull) {
		t.Fatal(err)
	}
	e := install(t, tb, 1, ls[0])
	tb.SetLease(e.Slot, ls[1])
	for _, l := range []uint32{ls[2], ls[0]} {
		if err := tb.ReleaseLease(l); err != nil {
			t.Fatal(err)
		}
	}
	if l, _ := tb.AcquireLease(); l != ls[2] {
		t.Fatalf("lease %d, want the one freed first, %d", l, ls[2])
	}
	if _, err := tb.Install(binding(2), ls[0], identity.EvidenceLease, identity.BootID{}); err == nil {
		t.Fatal("installed on an index that nobody holds")
	}
	if tb.ReleaseLease(ipcache.LeaseLocal) == nil {
		t.Fatal("a fixed index was freed")
	}
}

func TestRestore(t *testing.T) {
	tb := newTable(t, ipcache.Config{Slots: 8, Leases: 8, NextStamp: 50})
	at := func(slot uint32, stamp uint64, n int) ipcache.Entry {
		b := binding(n)
		b.Identity = identity.Identity{}
		return ipcache.Entry{Slot: slot, Stamp: stamp, Lease: 4, Binding: b, Hash: binding(n).Identity.Hash()}
	}
	for _, e := range []ipcache.Entry{at(2, 49, 1), at(5, 40, 2), at(6, 41, 2)} {
		if err := tb.Restore(e); err != nil {
			t.Fatal(err)
		}
	}
	for name, e := range map[string]ipcache.Entry{
		"slot taken": at(2, 3, 9), "slot 0": at(0, 3, 9), "slot beyond": at(8, 3, 9), "no stamp": at(3, 0, 9),
		"stamp not below the counter": at(3, 50, 9), "no lease": {Slot: 3, Stamp: 3, Binding: binding(9)},
	} {
		if tb.Restore(e) == nil {
			t.Errorf("%s: restored", name)
		}
	}
	// Of two for one IP the newer counts.
	if e, _ := tb.Get(ip(2)); e.Slot != 6 {
		t.Fatalf("%+v", e)
	}
	if e, _ := tb.Slot(5); !e.Condemned {
		t.Fatalf("%+v", e)
	}
	if es := tb.OfOwner("o"); len(es) != 3 || es[0].Slot != 2 || es[2].Slot != 6 {
		t.Fatalf("%+v", es)
	}
	// What is restored is not given out.
	for range 4 {
		e := install(t, tb, 100+tb.Len(), ipcache.LeaseLocal)
		if e.Slot == 2 || e.Slot == 5 || e.Slot == 6 || e.Stamp < 50 {
			t.Fatalf("%+v", e)
		}
	}
	for range 4 {
		if l, err := tb.AcquireLease(); err != nil || l == 4 {
			t.Fatal(l, err)
		}
	}
	tb.SetBinding(2, binding(1))
	if e, _ := tb.Get(ip(1)); !e.Binding.Identity.Equal(binding(1).Identity) {
		t.Fatalf("%+v", e)
	}
	wrong := binding(2)
	wrong.Identity = identity.New("td", "ns", "other", nil)
	tb.SetBinding(6, wrong)
	if e, _ := tb.Get(ip(2)); e.Binding.Identity.Equal(wrong.Identity) {
		t.Fatal("another identity was learnt")
	}
}

func TestConfig(t *testing.T) {
	for _, c := range []ipcache.Config{{Slots: 1, Leases: 8, NextStamp: 1}, {Slots: 8, Leases: 3, NextStamp: 1}, {Slots: 8, Leases: 8}} {
		if _, err := ipcache.New(c); err == nil {
			t.Errorf("%+v accepted", c)
		}
	}
}

// One owner never has more entries than a session can list; others are not
// concerned, and a freed slot makes room.
func TestEntriesOfOneOwnerAreBounded(t *testing.T) {
	tb := newTable(t, ipcache.Config{Slots: 8, Leases: 8, NextStamp: 1, PerOwner: 2})
	a := install(t, tb, 1, ipcache.LeaseLocal)
	install(t, tb, 2, ipcache.LeaseLocal)
	tb.Condemn(a.Slot) // the kernel may still have it
	if _, err := tb.Install(binding(3), ipcache.LeaseLocal, identity.EvidenceLocal, identity.BootID{}); !errors.Is(err, ipcache.ErrOwnerFull) {
		t.Fatalf("a third of one owner: %v", err)
	}
	other := binding(4)
	other.Owner = "p"
	if _, err := tb.Install(other, ipcache.LeaseLocal, identity.EvidenceLocal, identity.BootID{}); err != nil {
		t.Fatal(err)
	}
	tb.Free(a.Slot)
	install(t, tb, 3, ipcache.LeaseLocal)
}
