package tests

import (
	"slices"
	"sync/atomic"
	"testing"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"

	"portcullis/bpf/abi"
)

// TestNoEndpoint: a device without an endpoint, and a closed gate, let nothing
// through; not ARP either.
func TestNoEndpoint(t *testing.T) {
	eachFamily(t, func(t *testing.T, f family) {
		for name, change := range map[string]func(g *gate, ep abi.Endpoint){
			"none":          func(g *gate, ep abi.Endpoint) { g.delete("endpoints", g.pod) },
			"closed":        func(g *gate, ep abi.Endpoint) { ep.State = uint32(abi.EPClosed); g.put("endpoints", g.pod, ep) },
			"unknown state": func(g *gate, ep abi.Endpoint) { ep.State = 9; g.put("endpoints", g.pod, ep) },
			"id zero":       func(g *gate, ep abi.Endpoint) { ep.ID = 0; g.put("endpoints", g.pod, ep) },
			"recycled":      func(g *gate, ep abi.Endpoint) { ep.Ifindex = g.pod2; g.put("endpoints", g.pod, ep) },
		} {
			t.Run(name, func(t *testing.T) {
				g := newGate(t)
				ep := g.endpoint(g.pod, f, f.pod, 0)
				out, in := tcp(f.pod, 1, f.peer, 2, syn), tcp(f.peer, 2, f.pod, 1, syn|ack)
				g.pass(g.from(g.pod, out))
				g.pass(g.to(g.pod, g.uplink, in))
				change(g, ep)
				g.drop(g.from(g.pod, out), abi.ReasonNoEndpoint)
				g.drop(g.to(g.pod, g.uplink, in), abi.ReasonNoEndpoint)
				g.drop(g.from(g.pod, arp(1, podMAC, families[0].pod, families[0].node)), abi.ReasonNoEndpoint)
				g.drop(g.to(g.pod, 0, arp(1, hostMAC, families[0].node, families[0].pod)), abi.ReasonNoEndpoint)
				g.drop(g.from(g.pod, []byte("a frame that is nothing")), abi.ReasonNoEndpoint)
			})
		}
	})
}

// TestSpoofing: a workload sends under its own addresses only (I1).
func TestSpoofing(t *testing.T) {
	v4, v6 := families[0], families[1]
	for _, tt := range []struct {
		name   string
		f      family
		flags  abi.EndpointFlag
		packet []byte
		reason abi.Reason
	}{
		{"own IPv4", v4, 0, udp(v4.pod, 1, v4.peer, 2), 0},
		{"own IPv6", v6, 0, udp(v6.pod, 1, v6.peer, 2), 0},
		{"a neighbour's IPv4", v4, 0, udp(v4.pod2, 1, v4.peer, 2), abi.ReasonSpoofed},
		{"a neighbour's IPv6", v6, 0, udp(v6.pod2, 1, v6.peer, 2), abi.ReasonSpoofed},
		{"IPv6 without having one", v4, 0, udp(v6.pod, 1, v6.peer, 2), abi.ReasonSpoofed},
		{"IPv4 without having one", v6, 0, udp(v4.pod, 1, v4.peer, 2), abi.ReasonSpoofed},
		{"unspecified IPv4", v6, 0, udp(ip("0.0.0.0"), 68, ip("255.255.255.255"), 67), abi.ReasonSpoofed},
		{"unspecified IPv6", v4, 0, udp(ip("::"), 1, v6.peer, 2), abi.ReasonSpoofed},
		{"link-local", v6, 0, udp(ip("fe80::1"), 1, v6.peer, 2), abi.ReasonSpoofed},
		{"echo", v4, 0, icmpEcho(v4, v4.pod2, v4.peer, 8, 1), abi.ReasonSpoofed},
		{"multicast IPv4", v4, 0, udp(ip("224.0.0.1"), 1, v4.peer, 2), abi.ReasonSpoofed},
		{"own MAC", v4, abi.EPCheckMac, udp(v4.pod, 1, v4.peer, 2), 0},
		{"another MAC, unchecked", v4, 0, withMAC(udp(v4.pod, 1, v4.peer, 2), pod2MAC), 0},
		{"another MAC", v4, abi.EPCheckMac, withMAC(udp(v4.pod, 1, v4.peer, 2), pod2MAC), abi.ReasonSpoofed},
		{"another MAC, IPv6", v6, abi.EPCheckMac, withMAC(udp(v6.pod, 1, v6.peer, 2), pod2MAC), abi.ReasonSpoofed},
		{"another MAC, last byte", v6, abi.EPCheckMac, withMAC(udp(v6.pod, 1, v6.peer, 2), [6]byte{2, 0xaa, 0, 0, 0, 9}), abi.ReasonSpoofed},
	} {
		t.Run(tt.name, func(t *testing.T) {
			g := newGate(t)
			g.endpoint(g.pod, tt.f, tt.f.pod, tt.flags)
			r := g.from(g.pod, tt.packet)
			v := drop
			if tt.reason == 0 {
				v = pass
			}
			g.want(r, v, tt.reason)
			if n := len(g.flows()); n != 0 && v == drop {
				t.Errorf("%d entries", n)
			}
		})
	}
}

func withMAC(p []byte, mac [6]byte) []byte { copy(p[6:], mac[:]); return p }

// TestQuarantine: neither sends nor receives; ARP and duplicate-address
// detection excepted (I1).
func TestQuarantine(t *testing.T) {
	v4, v6 := families[0], families[1]
	allNodes := ip("ff02::1")
	for _, f := range families {
		g := newGate(t)
		ep := g.endpoint(g.pod, f, f.pod, 0)
		out, in := udp(f.pod, 1, f.peer, 2), udp(f.peer, 2, f.pod, 1)
		g.pass(g.from(g.pod, out))
		ep.State = uint32(abi.EPQuarantined)
		g.put("endpoints", g.pod, ep)
		g.drop(g.from(g.pod, out), abi.ReasonQuarantined)
		g.drop(g.to(g.pod, g.uplink, in), abi.ReasonQuarantined)
		g.drop(g.reinject(g.pod, in), abi.ReasonQuarantined)
		g.drop(g.to(g.pod, g.uplink, icmpError(f, f.world, f.pod, 3, out[14:])), abi.ReasonQuarantined)
		g.drop(g.from(g.pod, []byte("a frame that is nothing")), abi.ReasonQuarantined)
		if f.is6 {
			g.pass(g.from(g.pod, nd(135, ip("::"), ip("ff02::1:ff00:5"), v6.pod, 255)))
			g.drop(g.from(g.pod, nd(135, ip("::"), ip("ff02::1:ff00:6"), v6.pod2, 255)), abi.ReasonSpoofed)
			g.drop(g.from(g.pod, nd(135, ip("::"), ip("ff02::1:ff00:5"), v6.pod, 64)), abi.ReasonQuarantined)
			g.drop(g.from(g.pod, nd(135, v6.pod, ip("ff02::1:ff00:1"), v6.node, 255)), abi.ReasonQuarantined)
			g.drop(g.from(g.pod, nd(136, v6.pod, allNodes, v6.pod, 255)), abi.ReasonQuarantined)
			g.drop(g.from(g.pod, nd(133, ip("::"), ip("ff02::2"), ip("::"), 255)), abi.ReasonQuarantined)
			g.pass(g.to(g.pod, 0, nd(135, ip("::"), ip("ff02::1:ff00:5"), v6.pod, 255)))
			g.pass(g.to(g.pod, 0, nd(136, v6.pod2, allNodes, v6.pod, 255)))
			g.drop(g.to(g.pod, 0, nd(135, v6.node, ip("ff02::1:ff00:5"), v6.pod, 255)), abi.ReasonQuarantined)
			g.drop(g.to(g.pod, 0, nd(136, v6.node, v6.pod, v6.node, 255)), abi.ReasonQuarantined)
		} else {
			g.pass(g.from(g.pod, arp(1, podMAC, v4.pod, v4.node)))
			g.pass(g.to(g.pod, 0, arp(2, hostMAC, v4.node, v4.pod)))
			g.drop(g.from(g.pod, arp(2, podMAC, v4.node, v4.pod)), abi.ReasonSpoofed)
		}
		ep.State = uint32(abi.EPActive)
		g.put("endpoints", g.pod, ep)
		g.pass(g.from(g.pod, out))
	}
}

// TestLostEvents: a full ring is counted, and changes no verdict (I6).
func TestLostEvents(t *testing.T) {
	f := families[0]
	g := newGate(t, mapSize("events", 4096))
	g.endpoint(g.pod, f, f.pod, 0)
	var told int
	const sent = 100
	for i := range uint16(sent) {
		ret, err := g.coll.Programs["from_workload"].Run(runOptions(udp(f.pod, 1+i, f.peer, 2), skBuff{Ifindex: g.pod}))
		if err != nil {
			t.Fatal(err)
		}
		if int(int32(ret)) != tcxNext {
			t.Errorf("packet %d: %d", i, ret)
		}
	}
	told = len(drain(t, g.events, decodeEvent))
	if lost := g.state(nil).LostEvents; told == 0 || lost == 0 || told+int(lost) != sent {
		t.Errorf("%d told and %d lost of %d", told, lost, sent)
	}
}

// TestClockCell: the cell is filled, follows BOOTTIME, and a cell from another
// tick is not believed.
func TestClockCell(t *testing.T) {
	f := families[0]
	g := newGate(t)
	g.endpoint(g.pod, f, f.pod, 0)
	cpus := len(g.clocks())
	future := make([]abi.Clock, cpus)
	for i := range future {
		future[i] = abi.Clock{Tick: 1, Boot: 1 << 62} // of the first tick of this boot
	}
	g.put("clock", uint32(0), future)
	before := boottime()
	r := g.from(g.pod, udp(f.pod, 1, f.peer, 2))
	after := boottime()
	if e := r.events[0]; e.Time < before || e.Time > after {
		t.Errorf("time %d, not in [%d, %d]", e.Time, before, after)
	}
	_, first := g.oneFlow()
	for deadline := after + uint64(10*time.Second); ; {
		r = g.from(g.pod, udp(f.pod, 1, f.peer, 2))
		if _, v := g.oneFlow(); v.LastSeen > first.LastSeen {
			break
		}
		if boottime() > deadline {
			t.Fatal("the clock stands still")
		}
	}
}

func (g *gate) clocks() (c []abi.Clock) {
	g.t.Helper()
	if err := g.coll.Maps["clock"].Lookup(uint32(0), &c); err != nil {
		g.t.Fatal(err)
	}
	return c
}

// TestSecondRead races a verifier that revokes a binding and then renews the
// lease, for the bindings that stand, against packets of an established flow
// and of a new one. The binding and its lease are never alive at once, so
// nothing may pass, however the two interleave (I1, I2). A program that reads
// the stamp once, is held up, and then reads the deadline, sees both alive.
func TestSecondRead(t *testing.T) {
	const rounds = 400
	f := families[0]
	g, _ := wantPeer(t, f)
	g.ipRange(f.remote, abi.RangeKnown, 0)
	b := g.bind(f.peer, idClient)
	stamp := word(t, g.mmap("slots", 64*1025), int(b.slot)*64)
	lease := word(t, g.mmap("leases", 8*4096), int(session)*8)
	known, fresh := tcp(f.peer, 1, f.pod, 80, ack), tcp(f.peer, 2, f.pod, 80, ack)

	start, done := make(chan int), make(chan struct{})
	defer func() { close(start); <-done }()
	var spun atomic.Uint64
	go func() { // on the other CPU
		defer close(done)
		for spins := range start {
			for range spins {
				spun.Add(1)
			}
			stamp.Store(0)
			lease.Store(^uint64(0))
			done <- struct{}{}
		}
	}()
	for i := range rounds {
		// A stamp is never used twice.
		b.stamp++
		stamp.Store(b.stamp)
		g.put("bindings", addr(f.peer), abi.Binding{Stamp: b.stamp, Slot: b.slot})
		p := fresh
		if i%2 == 0 {
			p = known
			lease.Store(^uint64(0))
			g.pass(g.to(g.pod, g.uplink, p))
		}
		lease.Store(0)
		before := g.counters()[counterKey{dir: ingress, verdict: pass}].Packets
		start <- 500 + i*50%10000
		g.runMany("to_workload", p, skBuff{Ifindex: g.pod, IngressIfindex: g.uplink}, 1000)
		<-done
		drain(t, g.events, decodeEvent)
		if n := g.counters()[counterKey{dir: ingress, verdict: pass}].Packets - before; n != 0 {
			t.Errorf("round %d: %d packets passed without a live binding", i, n)
		}
	}
}

func (g *gate) mmap(name string, size int) []byte {
	g.t.Helper()
	page := unix.Getpagesize()
	size = (size + page - 1) / page * page
	mem, err := unix.Mmap(g.coll.Maps[name].FD(), 0, size, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED)
	if err != nil {
		g.t.Fatal(err)
	}
	g.t.Cleanup(func() { unix.Munmap(mem) })
	return mem
}

func word(t *testing.T, mem []byte, at int) *atomic.Uint64 {
	t.Helper()
	return (*atomic.Uint64)(unsafe.Pointer(&mem[at]))
}

// TestClockAfterASleep: what a resume leaves behind, a cell of this tick with
// the time of before, is believed until the tick moves and never after it; one
// of any earlier tick never (A1).
func TestClockAfterASleep(t *testing.T) {
	f := families[0]
	g, _ := wantPeer(t, f)
	g.ipRange(f.remote, abi.RangeKnown, 0)
	g.bind(f.peer, idClient)
	p := tcp(f.peer, 1, f.pod, 80, ack)
	g.pass(g.to(g.pod, g.uplink, p))
	g.put("leases", session, abi.Lease{Deadline: boottime() - uint64(time.Minute)})
	stale := func(behind uint64) []abi.Clock {
		g.put("clock", uint32(0), make([]abi.Clock, len(g.clocks())))
		g.to(g.pod, g.uplink, p) // fills the cell of one CPU
		var tick uint64
		for _, c := range g.clocks() {
			tick = max(tick, c.Tick)
		}
		cells := make([]abi.Clock, len(g.clocks()))
		for i := range cells {
			cells[i] = abi.Clock{Tick: tick - behind, Boot: boottime() - uint64(time.Hour)}
		}
		g.put("clock", uint32(0), cells)
		return cells
	}
	stale(1)
	g.drop(g.to(g.pod, g.uplink, p), abi.ReasonStaleLease)

	cells := stale(0)
	for deadline := boottime() + uint64(10*time.Second); boottime() < deadline; {
		r := g.to(g.pod, g.uplink, p)
		if r.verdict == pass && slices.Equal(g.clocks(), cells) {
			continue // the tick stands
		}
		for range 3 {
			g.drop(r, abi.ReasonStaleLease)
			r = g.to(g.pod, g.uplink, p)
		}
		return
	}
	t.Error("the old time is believed for ten seconds")
}
