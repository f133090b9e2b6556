package lease_test

import (
	"testing"
	"time"

	"portcullis/identity"
	"portcullis/ipcache"
	"portcullis/ipcache/lease"
)

// Mode classic: what was announced is believed until somebody says otherwise.
func TestClassic(t *testing.T) {
	o, err := lease.NewClassicOwner(newOwner(t, nil).cfg)
	if err != nil {
		t.Fatal(err)
	}
	table, err := ipcache.New(ipcache.Config{Slots: 8, Leases: 8, NextStamp: 1})
	if err != nil {
		t.Fatal(err)
	}
	cfg := lease.VerifierConfig{Node: "v", Speaks: func(identity.NodeName, addr) bool { return true }}
	v, err := lease.NewClassicVerifier(cfg, table, []identity.NodeName{"o"})
	if err != nil {
		t.Fatal(err)
	}
	now := lease.Time(time.Hour)
	stream := lease.StreamID(0)
	carry := func(outs []lease.OwnerOutput) (all []lease.VerifierOutput) {
		for _, s := range only[lease.SendToVerifier](outs) {
			if s.Stream == stream {
				all = append(all, v.Step(now, lease.FromOwner{Stream: stream, Message: s.Message})...)
			}
		}
		return all
	}
	connect := func() []lease.VerifierOutput {
		stream++
		v.Step(now, lease.StreamOpened{Owner: "o", Stream: stream})
		return carry(o.Step(now, lease.StreamAccepted{Stream: stream, Verifier: "v"}))
	}
	add := func(uid identity.UID, id identity.Identity) []lease.OwnerOutput {
		return o.Step(now, lease.Add{UID: uid, IPs: addrs(ip1), Identity: id})
	}

	one[lease.OpenStream](t, v.Step(now, lease.VerifierTick{})) // without being wanted
	one[lease.Activate](t, add(w0, y1))                         // at once
	i := one[lease.Install](t, connect())
	if i.Lease != ipcache.LeaseClassic || i.Evidence != identity.EvidenceWatch {
		t.Fatalf("%+v", i)
	}
	if a := one[lease.Answer](t, v.Step(now, lease.Want{IP: ip1, Owner: "o"})); !a.Live || a.NotBefore != 0 {
		t.Fatalf("%+v", a)
	}
	one[lease.Zero](t, carry(o.Step(now, lease.Delete{UID: w0})))
	none[lease.Answer](t, v.Step(now, lease.Want{IP: ip1, Owner: "o", Arrival: now}))
	one[lease.Activate](t, add(w0, y1)) // no quarantine
	out := carry(o.Step(now, lease.Delete{UID: w1}))
	none[lease.Zero](t, out)

	// Cut off, it goes on believing in w0 for ever: the bug.
	v.Step(now, lease.OwnerGone{Owner: "o", Stream: stream})
	o.Step(now, lease.VerifierGone{Stream: stream})
	one[lease.OpenStream](t, v.Step(now.Add(time.Second), lease.VerifierTick{}))
	o.Step(now, lease.Delete{UID: w0})
	one[lease.Activate](t, add(w1, y2))
	now = now.Add(24 * time.Hour)
	out = v.Step(now, lease.VerifierTick{})
	none[lease.Zero](t, out)

	// Connected again, it is told.
	out = connect()
	ordered(t, out, isA[lease.Install])
	if e, ok := table.Get(ip1); !ok || e.Binding.UID != w1 {
		t.Fatalf("%+v", e)
	}
	if s := v.Sessions(); len(s) != 1 || s[0].State != lease.PeerOpen || s[0].Bindings != 1 {
		t.Fatalf("%+v", s)
	}
}

// A relabelled workload is announced anew, without a wait.
func TestClassicRelabel(t *testing.T) {
	o, err := lease.NewClassicOwner(newOwner(t, nil).cfg)
	if err != nil {
		t.Fatal(err)
	}
	now := lease.Time(time.Hour)
	one[lease.Rejected](t, o.Step(now, lease.Relabel{UID: w0, Identity: y2}))
	gen := one[lease.Activate](t, o.Step(now, lease.Add{UID: w0, IPs: addrs(ip1), Identity: y1})).Generation
	o.Step(now, lease.StreamAccepted{Stream: 1, Verifier: "v"})
	out := o.Step(now, lease.Relabel{UID: w0, Identity: y2})
	if w := one[lease.Withdraw](t, out); w.Generation != gen {
		t.Errorf("withdrawn: %+v, want generation %d", w, gen)
	}
	a, b := one[lease.Activate](t, out), one[lease.Announce](t, out)
	if a.Generation <= gen || b.Binding.Generation != a.Generation || !b.Binding.Identity.Equal(y2) {
		t.Errorf("activated %+v, announced %+v", a, b)
	}
}

// What an agent of mode lease has left in the kernel is renewed by nobody: it
// is replaced by what the owner announces, or cleared.
func TestClassicAfterLease(t *testing.T) {
	table, err := ipcache.New(ipcache.Config{Slots: 8, Leases: 8, NextStamp: 10})
	if err != nil {
		t.Fatal(err)
	}
	left := func(slot uint32, ip addr, uid identity.UID) ipcache.Entry {
		e := ipcache.Entry{Slot: slot, Stamp: uint64(slot), Lease: ipcache.LeaseFirst, Hash: y1.Hash(), Evidence: identity.EvidenceLease,
			Binding: identity.Binding{IP: ip, Generation: 5, UID: uid, Identity: y1, Owner: "o"}}
		if err := table.Restore(e); err != nil {
			t.Fatal(err)
		}
		return e
	}
	stands, ended := left(1, ip1, w0), left(2, ip2, w1)
	cfg := lease.VerifierConfig{Node: "v", Speaks: func(identity.NodeName, addr) bool { return true }}
	v, err := lease.NewClassicVerifier(cfg, table, []identity.NodeName{"o"})
	if err != nil {
		t.Fatal(err)
	}
	now := lease.Time(time.Hour)
	step := func(in lease.VerifierInput) []lease.VerifierOutput { now++; return v.Step(now, in) }
	one[lease.OpenStream](t, step(lease.VerifierTick{}))
	// A packet that is held for it is not sent round in circles.
	none[lease.Answer](t, step(lease.Want{IP: ip1, Owner: "o", Arrival: now}))
	step(lease.StreamOpened{Owner: "o", Stream: 1})
	out := step(lease.FromOwner{Stream: 1, Message: lease.Welcome{Stands: []lease.Ref{{IP: ip1, Generation: 5}}}})
	if z := one[lease.Zero](t, out); z.Stamp != ended.Stamp {
		t.Fatalf("%+v", z)
	}
	out = step(lease.FromOwner{Stream: 1, Message: lease.Announce{Binding: stands.Binding}})
	ordered(t, out, isA[lease.Zero], isA[lease.Install], isA[lease.Answer])
	if z := one[lease.Zero](t, out); z.Stamp != stands.Stamp {
		t.Fatalf("%+v", z)
	}
	if i := one[lease.Install](t, out); i.Lease != ipcache.LeaseClassic || i.Stamp == stands.Stamp {
		t.Fatalf("%+v", i)
	}
	if a := one[lease.Answer](t, out); !a.Live {
		t.Fatalf("%+v", a)
	}
	step(lease.VerifierTick{})
	if e, ok := table.Get(ip1); !ok || e.Lease != ipcache.LeaseClassic || table.Len() != 1 {
		t.Fatalf("%+v, %d slots", e, table.Len())
	}
}
