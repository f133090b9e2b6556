package tests

import (
	"encoding/binary"
	"runtime"
	"strings"
	"testing"
	"time"

	"github.com/cilium/ebpf"
	"golang.org/x/sys/unix"

	"portcullis/bpf/abi"
)

// withinTick calls f, which begins with packets of an established flow and ends
// with one that is not to pass by what was remembered of them, until all of it
// falls into one tick of one CPU's clock: so what was remembered was there.
func (g *gate) withinTick(f func(begun func())) {
	g.t.Helper()
	var was, cpus unix.CPUSet
	if err := unix.SchedGetaffinity(0, &was); err != nil {
		g.t.Fatal(err)
	}
	cpu := 0
	for !was.IsSet(cpu) {
		cpu++
	}
	cpus.Set(cpu)
	if err := unix.SchedSetaffinity(0, &cpus); err != nil { // the thread is this test's
		g.t.Fatal(err)
	}
	defer func() {
		if err := unix.SchedSetaffinity(0, &was); err != nil {
			g.t.Error(err)
		}
	}()
	for { // however slow the machine is: some tick is long enough
		var before abi.Clock
		g.forget() // what the last try left
		f(func() { before = g.clocks()[cpu] })
		if g.t.Failed() || before != (abi.Clock{}) && before == g.clocks()[cpu] {
			return
		}
	}
}

// settle makes the packet's flow an established one, and lets the programs
// remember it, with its second packet in a tick.
func (g *gate) settle(begun func(), send func() result) {
	g.t.Helper()
	g.pass(send())
	begun()
	for range 3 {
		g.pass(send())
	}
}

// TestRecentIsUsed: what passed in this tick passes without its flow being
// looked up. (Else the tests below would say nothing.)
func TestRecentIsUsed(t *testing.T) {
	runtime.LockOSThread()
	eachFamily(t, func(t *testing.T, f family) {
		g, _ := wantPeer(t, f)
		g.bind(f.peer, idClient)
		send := func() result { return g.to(g.pod, g.uplink, tcp(f.peer, 1, f.pod, 80, ack)) }
		g.withinTick(func(begun func()) {
			g.settle(begun, send)
			k, _ := g.oneFlow()
			if err := g.coll.Maps["conntrack"].Delete(k); err != nil {
				t.Fatal(err)
			}
			g.pass(send())
		})
		if n := len(g.flows()); n != 0 {
			t.Errorf("%d flows: it was judged in full", n)
		}
		// A tick later it is a new flow.
		for end := time.Now().Add(time.Minute); len(g.flows()) == 0; {
			g.pass(send())
			if time.Now().After(end) {
				t.Fatal("the tick does not end")
			}
		}
	})
}

// TestRecentGrounds: what passed in this tick passes no more as soon as one
// ground for it has gone, and does not vouch for another packet.
func TestRecentGrounds(t *testing.T) {
	runtime.LockOSThread()
	type world struct {
		*gate
		f  family
		ep abi.Endpoint
		b  bound
	}
	to := func(w *world, p []byte) result { return w.to(w.pod, w.uplink, p) }
	call := func(w *world) []byte { return tcp(w.f.peer, 1, w.f.pod, 80, ack) }
	for _, tt := range []struct {
		name   string
		spoil  func(w *world)
		send   func(w *world) result // nil: the same packet
		reason abi.Reason
	}{
		{"nothing", nil, nil, abi.ReasonNone},
		{"binding revoked", func(w *world) { w.revoke(w.b) }, nil, abi.ReasonUnbound},
		{"slot filled with another", func(w *world) {
			w.b.Slot.Stamp = w.b.stamp + 1000
			w.put("slots", w.b.slot, w.b.Slot)
		}, nil, abi.ReasonUnbound},
		{"lease past its deadline", func(w *world) { w.lease(session, -time.Second) }, nil, abi.ReasonStaleLease},
		{"lease index switched to one that ended", func(w *world) {
			s := w.b.Slot
			s.Stamp, s.Lease = w.b.stamp, uint32(abi.LeaseNone)
			w.put("slots", w.b.slot, s)
		}, nil, abi.ReasonStaleLease},
		{"gate closed", func(w *world) {
			w.ep.State = uint32(abi.EPClosed)
			w.put("endpoints", w.pod, w.ep)
		}, nil, abi.ReasonNoEndpoint},
		{"quarantined", func(w *world) {
			w.ep.State = uint32(abi.EPQuarantined)
			w.put("endpoints", w.pod, w.ep)
		}, nil, abi.ReasonQuarantined},
		{"endpoint gone", func(w *world) { w.delete("endpoints", w.pod) }, nil, abi.ReasonNoEndpoint},
		{"another policy", func(w *world) {
			w.ep.Policy = 777
			w.put("endpoints", w.pod, w.ep)
		}, nil, abi.ReasonPolicyDenied},
		{"another address", func(w *world) {
			w.ep.IP4, w.ep.IP6 = addr(families[0].pod2), addr(families[1].pod2)
			w.put("endpoints", w.pod, w.ep)
		}, nil, abi.ReasonUnsupported},
		{"another origin", nil, func(w *world) result { return w.to(w.pod, w.stranger, call(w)) }, abi.ReasonSpoofed},
		{"another device", nil, func(w *world) result { return w.to(w.pod2, w.uplink, call(w)) }, abi.ReasonNoEndpoint},
		{"the other hook", nil, func(w *world) result {
			return w.run("from_workload", call(w), skBuff{Ifindex: w.pod, IngressIfindex: w.uplink})
		}, abi.ReasonSpoofed},
		{"another source", nil, func(w *world) result { return to(w, tcp(w.f.peer2, 1, w.f.pod, 80, ack)) }, abi.ReasonUnbound},
		{"another destination", nil, func(w *world) result { return to(w, tcp(w.f.peer, 1, w.f.pod2, 80, ack)) }, abi.ReasonUnsupported},
		{"another port", nil, func(w *world) result { return to(w, tcp(w.f.peer, 1, w.f.pod, 81, ack)) }, abi.ReasonPolicyDenied},
		{"another protocol", nil, func(w *world) result {
			p, at := call(w), 14+9
			if w.f.is6 {
				at = 14 + 6
			}
			p[at] = protoSCTP
			return to(w, p)
		}, abi.ReasonPolicyDenied},
		{"longer than it is", nil, func(w *world) result {
			p, at := call(w), 14+2
			if w.f.is6 {
				at = 14 + 4
			}
			binary.BigEndian.PutUint16(p[at:], 1000)
			return to(w, p)
		}, abi.ReasonMalformed},
		{"shorter than its header", nil, func(w *world) result {
			p, at, n := call(w), 14+2, uint16(39)
			if w.f.is6 {
				at, n = 14+4, 19
			}
			binary.BigEndian.PutUint16(p[at:], n)
			return to(w, p)
		}, abi.ReasonMalformed},
		{"a short TCP header", nil, func(w *world) result {
			p := call(w)
			p[len(p)-8] = 0x40
			return to(w, p)
		}, abi.ReasonMalformed},
	} {
		t.Run(tt.name, func(t *testing.T) {
			eachFamily(t, func(t *testing.T, f family) {
				g, ep := wantPeer(t, f)
				g.ipRange(f.remote, abi.RangeKnown, 0) // nothing is held
				w := &world{gate: g, f: f, ep: ep}
				send := tt.send
				if send == nil {
					send = func(w *world) result { return to(w, call(w)) }
				}
				var r result
				first := g.nextSlot
				g.withinTick(func(begun func()) {
					w.ep = ep
					g.put("endpoints", g.pod, ep)
					g.nextSlot = first // on a busy machine it is tried more often than there are slots
					w.b = g.bind(f.peer, idClient)
					g.settle(begun, func() result { return to(w, call(w)) })
					if tt.spoil != nil {
						tt.spoil(w)
					}
					r = send(w)
				})
				if tt.reason == abi.ReasonNone {
					g.pass(r)
				} else {
					g.drop(r, tt.reason)
				}
			})
		})
	}
}

// TestRecentRange: a flow that was judged by its peer's range asks for the
// range epoch all the same (I5).
func TestRecentRange(t *testing.T) {
	runtime.LockOSThread()
	eachFamily(t, func(t *testing.T, f family) {
		g, _ := wantPeer(t, f)
		var r result
		g.withinTick(func(begun func()) {
			g.settle(begun, func() result { return g.to(g.pod, g.uplink, tcp(f.world, 1, f.pod, 80, ack)) })
			g.bind(f.world, 999)
			g.state(func(s *abi.State) { s.RangeEpoch++ })
			r = g.to(g.pod, g.uplink, tcp(f.world, 1, f.pod, 80, ack))
			g.delete("bindings", addr(f.world))
			g.state(func(s *abi.State) { s.RangeEpoch++ })
		})
		g.drop(r, abi.ReasonPolicyDenied)
	})
}

// TestRecentEnds: packets that open or end a flow are told to conntrack, also
// within the tick.
func TestRecentEnds(t *testing.T) {
	runtime.LockOSThread()
	eachFamily(t, func(t *testing.T, f family) {
		g, _ := wantPeer(t, f)
		g.bind(f.peer, idClient)
		for flags, want := range map[uint8]abi.CTFlag{fin | ack: abi.CTFinForward, rst: abi.CTRst, syn: 0} {
			g.withinTick(func(begun func()) {
				g.settle(begun, func() result { return g.to(g.pod, g.uplink, tcp(f.peer, 1, f.pod, 80, ack)) })
				g.pass(g.to(g.pod, g.uplink, tcp(f.peer, 1, f.pod, 80, flags)))
			})
			if _, v := g.oneFlow(); abi.CTFlag(v.Flags)&(abi.CTFinForward|abi.CTRst) != want {
				t.Errorf("TCP flags %#x: conntrack says %#x", flags, v.Flags)
			}
			g.pass(g.to(g.pod, g.uplink, tcp(f.peer, 1, f.pod, 80, syn)))
		}
	})
}

// TestRecentOfOthers: what other programs remembered counts for none that came
// in their place: they may have had other constants.
func TestRecentOfOthers(t *testing.T) {
	runtime.LockOSThread()
	f := families[0]
	g, _ := wantPeer(t, f)
	g.bind(f.peer, idClient)
	maps := map[string]*ebpf.Map{}
	for name, m := range g.coll.Maps {
		if !strings.Contains(name, ".") {
			maps[name] = m
		}
	}
	old, next := g.coll, load(t, maps, constant("hold_key", uint64(1)))
	t.Cleanup(next.Close)
	send := func() result { return g.to(g.pod, g.uplink, tcp(f.peer, 1, f.pod, 80, ack)) }
	g.withinTick(func(begun func()) {
		g.coll = old
		g.settle(begun, send)
		k, _ := g.oneFlow()
		if err := g.coll.Maps["conntrack"].Delete(k); err != nil {
			t.Fatal(err)
		}
		g.coll = next
		g.pass(send())
	})
	if n := len(g.flows()); n != 1 {
		t.Errorf("%d flows: it passed by what the others remembered", n)
	}
}
