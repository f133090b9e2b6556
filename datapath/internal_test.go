package datapath

import (
	"errors"
	"net/netip"
	"testing"
	"unsafe"

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

func TestConfigDefaults(t *testing.T) {
	c, err := Config{PinDir: "/x"}.withDefaults()
	if err != nil || c.Bindings != 65536 || c.HoldTotal != 4096 || c.HoldPerSource != 16 || c.ConntrackPerEndpoint != 32768 || c.MarkMask != 1<<32-1 || c.Log == nil {
		t.Errorf("%+v, %v", c, err)
	}
	for _, bad := range []Config{{}, {PinDir: "/x", Bindings: -1}, {PinDir: "/x", HeldBytes: 5000}, {PinDir: "/x", EventBytes: 2048}, {PinDir: "/x", MarkMask: 1},
		{PinDir: "/x", HoldPerSource: -1}, {PinDir: "/x", Conntrack: 8, ConntrackPerEndpoint: 9}} {
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
