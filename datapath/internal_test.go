package datapath

import (
	"errors"
	"net/netip"
	"os"
	"testing"
	"time"
	"unsafe"

	"github.com/cilium/ebpf"

	"portcullis/bpf/abi"
)

func TestCheckRelease(t *testing.T) {
	for release, ok := range map[string]bool{
		"6.6.0": true, "6.18.44-fc": true, "7.0": true, "6.10.3-generic": true,
		"6.5.13": false, "5.15.0-101-generic": false, "4.19": false, "": false, "linux": false,
	} {
		if err := checkRelease(release); (err == nil) != ok || err != nil && !errors.Is(err, ErrUnsupported) {
			t.Errorf("%q: %v", release, err)
		}
	}
}

func TestEscape(t *testing.T) {
	for _, name := range []string{"eth0", "eth0.100", "a%2eb", "%", "..", "%25", "veth-x_y"} {
		if got := unescape(escape(name)); got != name {
			t.Errorf("%q became %q", name, got)
		}
	}
	if escape("a.b") == escape("a%2eb") {
		t.Error("two names share a directory")
	}
}

// What waits behind a held fragment finds its entry still there when the hold ends.
func TestFragmentsOutliveHolds(t *testing.T) {
	for hold, want := range map[time.Duration]time.Duration{0: 2 * time.Second, 10 * time.Second: 11 * time.Second} {
		cfg, err := Config{PinDir: "/x", HoldTimeout: hold}.withDefaults()
		if err != nil {
			t.Fatal(err)
		}
		spec, err := (&Datapath{cfg: cfg}).spec()
		if err != nil {
			t.Fatal(err)
		}
		var got uint64
		if err := spec.Variables["fragment_lifetime"].Get(&got); err != nil || time.Duration(got) != want {
			t.Errorf("hold timeout %v: %v, %v", hold, time.Duration(got), err)
		}
	}
}

func TestConfigDefaults(t *testing.T) {
	c, err := Config{PinDir: "/x"}.withDefaults()
	if err != nil || c.Bindings != 65536 || c.HoldTotal != 4096 || c.HoldPerSource != 16 || c.FragmentsPerEndpoint != 64 || c.ConntrackPerEndpoint != 32768 || c.MarkMask != 1<<32-1 || c.Log == nil {
		t.Errorf("%+v, %v", c, err)
	}
	if c, err := (Config{PinDir: "/x", EndpointMarkMask: 0xffff0000}).withDefaults(); err != nil || c.MarkMask != 0xffff || c.markShift() != 16 {
		t.Errorf("%+v, %v", c, err)
	}
	for _, bad := range []Config{{}, {PinDir: "/x", Bindings: -1}, {PinDir: "/x", HeldBytes: 5000}, {PinDir: "/x", EventBytes: 2048}, {PinDir: "/x", MarkMask: 1},
		{PinDir: "/x", EndpointMarkMask: 0xff0ff}, {PinDir: "/x", EndpointMarkMask: 0x1ffff}, {PinDir: "/x", EndpointMarkMask: 0x3f0},
		{PinDir: "/x", EndpointMarkMask: 0xfff0, MarkMask: 0xffffff00}, {PinDir: "/x", HoldPerSource: -1}, {PinDir: "/x", FragmentsPerEndpoint: 12}, {PinDir: "/x", FragmentsPerEndpoint: 1 << 20}, {PinDir: "/x", Conntrack: 8, ConntrackPerEndpoint: 9}} {
		if _, err := bad.withDefaults(); err == nil {
			t.Errorf("%+v: accepted", bad)
		}
	}
}

func TestParseHeld(t *testing.T) {
	var h abi.Held
	h.Peer, h.Local = Addr(netip.MustParseAddr("10.0.0.1")), Addr(netip.MustParseAddr("fd00::1"))
	h.Arrival, h.Len, h.HoldIndex = 5, 3, 7
	header := unsafe.Slice((*byte)(unsafe.Pointer(&h)), heldHeader)
	b := append(append([]byte(nil), header...), 1, 2, 3, 4, 5)
	r, err := parseHeld(b)
	if err != nil || string(r.Packet) != "\x01\x02\x03" || r.Peer.String() != "10.0.0.1" || r.Local.String() != "fd00::1" || r.Arrival != 5 {
		t.Errorf("%+v, %v", r, err)
	}
	b[heldHeader] = 9 // the ring's memory is used again
	if r.Packet[0] != 1 {
		t.Error("the packet is not a copy")
	}
	h.Len = 6
	if r, err := parseHeld(append(append([]byte(nil), header...), 1, 2, 3, 4, 5)); err == nil || r.HoldIndex != 7 {
		t.Errorf("a packet longer than its record: %+v, %v", r, err)
	}
	if _, err := parseHeld(b[:heldHeader-1]); err == nil {
		t.Error("half a header was accepted")
	}
}

func TestStateCounters(t *testing.T) {
	s := State{&abi.State{NextStamp: 1, NextEndpoint: 1, NextPolicy: 1<<32 - 1}}
	if a, b := s.ReserveStamps(10), s.ReserveStamps(1); a != 1 || b != 11 {
		t.Errorf("stamps %d, %d", a, b)
	}
	if a, b := s.NextEndpointID(), s.NextEndpointID(); a != 1 || b != 2 {
		t.Errorf("endpoints %d, %d", a, b)
	}
	if a, b, c := s.NextPolicySet(), s.NextPolicySet(), s.NextPolicySet(); a != 1<<32-1 || b != 0 || c != 0 {
		t.Errorf("policy sets %d, %d, %d: a number was used twice", a, b, c)
	}
}

// An entry that was renewed since it was looked at is not removed.
func TestRemoveUnused(t *testing.T) {
	if os.Geteuid() != 0 {
		if os.Getenv("CI") == "true" {
			t.Fatal("this test needs root, and CI must run it")
		}
		t.Skip("needs root: kernel maps")
	}
	m, err := ebpf.NewMap(&ebpf.MapSpec{Type: ebpf.Hash, KeySize: uint32(len(ctKey{})), ValueSize: uint32(len(ctValue{})), MaxEntries: 4})
	if err != nil {
		t.Fatal(err)
	}
	defer m.Close()
	key := &ctKey{1}
	ct := abi.CT{LastSeen: 5, Flags: 9}
	put := func() {
		t.Helper()
		if err := m.Put(key, (*ctValue)(unsafe.Pointer(&ct))); err != nil {
			t.Fatal(err)
		}
	}
	put()
	if removed, _, err := removeUnused(m, key, 4); removed || err != nil {
		t.Errorf("renewed: removed %v, %v", removed, err)
	}
	for range 2 { // there, and not there any more
		if removed, _, err := removeUnused(m, key, 5); !removed || err != nil {
			t.Errorf("unused: removed %v, %v", removed, err)
		}
	}
	// Renewed all the time, by somebody else: whatever the moment, what is
	// removed was as old as it was said to be.
	stop, done := make(chan struct{}), make(chan struct{})
	ct.LastSeen = 7
	put()
	go func() {
		defer close(done)
		renewed := abi.CT{LastSeen: 8, Flags: 9}
		for {
			select {
			case <-stop:
				return
			default:
				// As the kernel does: only what is there.
				_ = m.Update(key, (*ctValue)(unsafe.Pointer(&renewed)), ebpf.UpdateExist)
			}
		}
	}()
	for range 20000 {
		removed, _, err := removeUnused(m, key, 7)
		var now ctValue
		there := m.Lookup(key, &now) == nil
		if err != nil || removed == there || there && decodeCT(&now).LastSeen != 8 {
			t.Errorf("removed %v, %v; there %v: %+v", removed, err, there, decodeCT(&now))
			break
		}
		put() // 7 again
	}
	close(stop)
	<-done
}

func TestNewMarks(t *testing.T) {
	for range 100 {
		a, b, err := newMarks(0x00ff00ff)
		if err != nil || a == 0 || b == 0 || a == b || (a|b)&^0x00ff00ff != 0 {
			t.Fatalf("%#x %#x %v", a, b, err)
		}
	}
	if _, _, err := newMarks(0x100); err == nil {
		t.Error("two different marks in one bit")
	}
}

func TestPassTime(t *testing.T) {
	for percent, want := range map[uint64]time.Duration{0: 30 * time.Second, 24: 30 * time.Second, 25: 15 * time.Second, 50: 5 * time.Second,
		89: 5 * time.Second, 90: 2 * time.Second, 100: 2 * time.Second, 700: 2 * time.Second} {
		if got := passTime(percent); got != want {
			t.Errorf("%d %%: %v, want %v", percent, got, want)
		}
	}
}

// A pass corrects what it has proved wrong, and nothing else.
func TestBudgetsAfterAPass(t *testing.T) {
	for _, tc := range []struct {
		name                        string
		in0, in, out, counted, want uint64 // want: how many entries the endpoint has afterwards
	}{
		{"right, quiet", 10, 10, 4, 6, 6},
		{"made some, counted too", 10, 15, 4, 11, 11},
		{"made some, not counted", 10, 15, 4, 6, 11},
		{"removed by this pass", 10, 10, 7, 3, 3},
		{"fewer than were counted", 10, 10, 8, 6, 6},
		{"more than there can be", 10, 12, 0, 6, 8},
		{"taken over by others", 10, 7, 4, 6, 3},
		{"counted from nothing, as after a change of layout", 0, 0, 0, 5, 5},
		{"across the end of the numbers", ^uint64(1), 3, ^uint64(6), 5, 10},
	} {
		d := &Datapath{budget: array[abi.CTBudget]{mem: make([]byte, 2*int(unsafe.Sizeof(abi.CTBudget{}))), n: 2}}
		*d.budget.at(1) = abi.CTBudget{In: tc.in, Out: tc.out}
		d.endBudgets(&budgetCounts{in0: []uint64{0, tc.in0}, n: []uint64{0, tc.counted}, nobodys: 3})
		if got := d.flows(1); got != tc.want || d.nobodys.Load() != 3 {
			t.Errorf("%s: %d flows, want %d", tc.name, got, tc.want)
		}
	}
}
