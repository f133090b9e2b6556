package ipcache

import (
	"fmt"
	"math/rand/v2"
	"net/netip"
	"slices"
	"testing"

	"portcullis/identity"
)

// A Table against a plain list of the same entries, over random changes.
func TestTableAgainstList(t *testing.T) {
	rng := rand.New(rand.NewPCG(1, 2))
	tb, err := New(Config{Slots: 40, Leases: 8, NextStamp: 1})
	if err != nil {
		t.Fatal(err)
	}
	l1, _ := tb.AcquireLease()
	l2, _ := tb.AcquireLease()
	model := map[uint32]Entry{}
	ids := []identity.Identity{identity.New("td", "ns", "a", nil), identity.New("td", "ns", "b", map[string]string{"k": "v"}), {}}
	owners := []identity.NodeName{"o1", "o2", "o3"}
	pick := func() (Entry, bool) {
		for _, slot := range rng.Perm(40) {
			if e, ok := model[uint32(slot)]; ok {
				return e, true
			}
		}
		return Entry{}, false
	}
	for step := range 2000 {
		e, ok := pick()
		switch r := rng.IntN(10); {
		case r < 5:
			b := identity.Binding{IP: netip.AddrFrom4([4]byte{10, 0, 0, byte(rng.IntN(60))}), Generation: identity.Generation(step),
				UID: identity.UID{byte(step)}, Identity: ids[rng.IntN(len(ids))], Owner: owners[rng.IntN(len(owners))]}
			if e, err := tb.Install(b, l1, identity.EvidenceLease, identity.BootID{}); err == nil {
				model[e.Slot] = e
			}
		case !ok:
		case r < 7:
			tb.Condemn(e.Slot)
			e.Condemned = true
			model[e.Slot] = e
		case r < 8:
			tb.SetLease(e.Slot, l2)
			e.Lease = l2
			model[e.Slot] = e
		case r < 9:
			e.Binding.UID = identity.UID{1}
			tb.SetBinding(e.Slot, e.Binding)
			model[e.Slot] = e
		default:
			tb.Free(e.Slot)
			delete(model, e.Slot)
		}
		if step%10 == 0 {
			compare(t, tb, model, owners)
		}
	}
}

func compare(t *testing.T, tb *Table, model map[uint32]Entry, owners []identity.NodeName) {
	t.Helper()
	say := func(es []Entry) string { return fmt.Sprintf("%+v", es) }
	distinct, users := map[identityKey]bool{}, 0
	var have []identity.NodeName
	for _, o := range owners {
		var all, condemned []Entry
		for slot := range uint32(40) {
			e, ok := model[slot]
			if !ok || e.Binding.Owner != o {
				continue
			}
			all = append(all, e)
			if e.Condemned {
				condemned = append(condemned, e)
			} else if got, ok := tb.Get(e.Binding.IP); !ok || got.Slot != slot {
				t.Fatalf("%v: %+v", e.Binding.IP, got)
			}
			distinct[keyOf(e.Binding.Identity, e.Hash)] = true
		}
		if len(all) > 0 {
			have = append(have, o)
		}
		if got := tb.OfOwner(o); say(got) != say(all) {
			t.Fatalf("entries of %s:\n%s\nwant\n%s", o, say(got), say(all))
		}
		if got := tb.CondemnedOf(o); say(got) != say(condemned) {
			t.Fatalf("condemned of %s:\n%s\nwant\n%s", o, say(got), say(condemned))
		}
		if tb.CountOf(o) != len(all) || tb.Holds(o) != (len(all) > len(condemned)) {
			t.Fatalf("%s: %d entries, holds %v; want %d with %d condemned", o, tb.CountOf(o), tb.Holds(o), len(all), len(condemned))
		}
	}
	for _, s := range tb.identities {
		users += s.users
	}
	if !slices.Equal(tb.Owners(), have) || tb.Len() != len(model) || len(tb.identities) != len(distinct) || users != len(model) {
		t.Fatalf("owners %v, %d entries, %d identities with %d users; want %v, %d, %d", tb.Owners(), tb.Len(), len(tb.identities), users, have, len(model), len(distinct))
	}
}
