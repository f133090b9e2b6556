package tests

import (
	"net/netip"
	"runtime"
	"slices"
	"strings"
	"testing"
	"time"

	"portcullis/bpf/abi"
)

const (
	psh        = 0x08
	everyOne   = 1<<uint32(abi.DirEgress) | 1<<uint32(abi.DirIngress)
	everySent  = 1 << uint32(abi.DirEgress)
	watched    = syn | fin | rst
	tellUnit   = 20 // a millisecond or so
	tellUnits  = 20
	neverAgain = 50 // units of 2^50 ns: no test lasts that long
)

func tells(every, flags, interval, shift uint32) []option {
	return []option{constant("tell_every", every), constant("tell_flags", flags), constant("tell_interval", interval), constant("tell_shift", shift)}
}

// tellLevels are the levels as an agent sets them.
var tellLevels = map[string][]option{
	"none":    tells(everyOne, watched, 0, 0),
	"low":     tells(everySent, watched, tellUnits, neverAgain),
	"medium":  tells(0, watched, tellUnits, neverAgain),
	"maximum": tells(0, watched, 0, 0),
	"first":   tells(0, 0, 0, 0), // and no flags
}

// TestTellLevels: of a flow's packets each level tells of those that it says,
// whatever they are for.
func TestTellLevels(t *testing.T) {
	type step struct {
		out   bool
		flags uint8 // UDP: none
		said  string
	}
	const all, sent, flagged, first = "none", "none low", "none low medium maximum", "none low medium maximum first"
	tcpSteps := []step{
		{true, syn, first}, {true, syn, sent}, {false, syn | ack, first}, {false, syn | ack, all},
		{true, ack, sent}, {true, ack | psh, sent}, {false, ack, all}, {true, ack, sent}, {false, ack | psh, all},
		{true, fin | ack, flagged}, {true, fin | ack, sent}, {false, fin | ack, "none low medium maximum"}, {true, ack, sent},
		{false, rst, flagged}, {false, rst, all}, {true, rst, flagged},
	}
	udpSteps := []step{{true, 0, first}, {true, 0, sent}, {false, 0, first}, {false, 0, all}, {true, 0, sent}, {false, 0, all}}
	for level, opts := range tellLevels {
		t.Run(level, func(t *testing.T) {
			eachFamily(t, func(t *testing.T, f family) {
				for proto, steps := range map[string][]step{"tcp": tcpSteps, "udp": udpSteps} {
					t.Run(proto, func(t *testing.T) {
						g := newGate(t, opts...)
						g.endpoint(g.pod, f, f.pod, 0)
						packet := func(src netip.Addr, sport uint16, dst netip.Addr, dport uint16, flags uint8) []byte {
							if proto == "udp" {
								return udp(src, sport, dst, dport)
							}
							return tcp(src, sport, dst, dport, flags)
						}
						for i, s := range steps {
							var r result
							if s.out {
								r = g.from(g.pod, packet(f.pod, 40000, f.peer, 80, s.flags))
							} else {
								r = g.to(g.pod, g.uplink, packet(f.peer, 80, f.pod, 40000, s.flags))
							}
							g.pass(r)
							if want := b2i(slices.Contains(strings.Fields(s.said), level)); len(r.events) != want {
								t.Errorf("step %d (%+v): %d records, want %d", i, s, len(r.events), want)
							}
							for _, e := range r.events {
								g.tellsStep(e, i == 0, s.said == first, s.out, s.flags)
							}
						}
					})
				}
			})
		})
	}
}

func (g *gate) tellsStep(e abi.Event, opens, first, out bool, flags uint8) {
	g.t.Helper()
	want, words := abi.FlowReply, abi.EventNoEvidence
	if !first {
		words |= abi.EventLater
	}
	if opens {
		want = abi.FlowNew
	} else if out {
		want = abi.FlowEstablished
	}
	if abi.FlowState(e.State) != want || e.TcpFlags != flags || e.Flags != uint8(words) {
		g.t.Errorf("a record of %v, TCP flags %#x, flags %#x; want %v, %#x, %#x", abi.FlowState(e.State), e.TcpFlags, e.Flags, want, flags, words)
	}
}

func b2i(b bool) int {
	if b {
		return 1
	}
	return 0
}

// TestTellInterval: a flow that goes on has a record in each interval, in each
// direction; and without an interval none.
func TestTellInterval(t *testing.T) {
	eachFamily(t, func(t *testing.T, f family) {
		for proto, send := range map[string][2][]byte{
			"tcp": {tcp(f.pod, 1, f.peer, 2, ack), tcp(f.peer, 2, f.pod, 1, ack)},
			"udp": {udp(f.pod, 1, f.peer, 2), udp(f.peer, 2, f.pod, 1)},
		} {
			t.Run(proto, func(t *testing.T) {
				g := newGate(t, tells(0, watched, tellUnits, tellUnit)...)
				g.endpoint(g.pod, f, f.pod, 0)
				var at [2][]uint64
				for begin := time.Now(); len(at[0]) < 4 || len(at[1]) < 4; {
					for way, r := range []result{g.from(g.pod, send[0]), g.to(g.pod, g.uplink, send[1])} {
						g.pass(r)
						for _, e := range r.events {
							at[way] = append(at[way], e.Time)
						}
					}
					if time.Since(begin) > time.Minute {
						t.Fatalf("records at %v", at)
					}
				}
				for _, times := range at {
					for i := 1; i < len(times); i++ {
						if units := times[i]>>tellUnit - times[i-1]>>tellUnit; units < tellUnits {
							t.Errorf("a record %d units after the last one, want at least %d: %v", units, tellUnits, times)
						}
					}
				}
			})
		}
	})
	t.Run("none", func(t *testing.T) {
		f := families[0]
		g := newGate(t, tellLevels["maximum"]...)
		g.endpoint(g.pod, f, f.pod, 0)
		told := 0
		begin := boottime()
		for boottime()-begin < 4*tellUnits<<tellUnit {
			told += len(g.from(g.pod, tcp(f.pod, 1, f.peer, 2, ack)).events)
		}
		if told != 1 {
			t.Errorf("%d records of one flow, want 1", told)
		}
	})
}

// TestTellIdle: a flow that was idle for longer than the count of units is wide
// has a record with its next packet, whatever that count says.
func TestTellIdle(t *testing.T) {
	f := families[0]
	const unit = 32 // 4 s
	g := newGate(t, tells(0, watched, tellUnits, unit)...)
	g.endpoint(g.pod, f, f.pod, 0)
	p := udp(f.pod, 1, f.peer, 2)
	g.pass(g.from(g.pod, p))
	if r := g.from(g.pod, p); len(r.events) != 0 {
		t.Fatal("told twice")
	}
	k, v := g.oneFlow()
	now := boottime() >> unit
	if now < 2*tellUnits {
		t.Fatal("the machine has been up for some milliseconds only")
	}
	v.LastSeen = (now - tellUnits) << unit
	v.Told[0].When = uint8(now) // as 256 units ago
	g.put("conntrack", k, v)
	if r := g.from(g.pod, p); len(r.events) != 1 {
		t.Errorf("%d records, want 1", len(r.events))
	}
}

// TestTellAgain: ports that are used again after the end are a new flow, at both
// workloads of a node; a SYN that is sent again is not.
func TestTellAgain(t *testing.T) {
	eachFamily(t, func(t *testing.T, f family) {
		g := newGate(t, tellLevels["medium"]...)
		g.endpoint(g.pod, f, f.pod, 0)
		g.endpoint(g.pod2, f, f.pod2, 0)
		hop := func(flags uint8, back bool, want abi.FlowState) {
			t.Helper()
			a, b, p := g.pod, g.pod2, tcp(f.pod, 1, f.pod2, 2, flags)
			if back {
				a, b, p = g.pod2, g.pod, tcp(f.pod2, 2, f.pod, 1, flags)
			}
			for i, r := range []result{g.from(a, p), g.to(b, a, p)} {
				g.pass(r)
				if want == abi.FlowNone && len(r.events) == 0 {
					continue
				}
				if len(r.events) != 1 || abi.FlowState(r.events[0].State) != want {
					t.Errorf("hook %d: %+v, want one record, %v", i, r.events, want)
				}
			}
		}
		for range 3 {
			hop(syn, false, abi.FlowNew)
			hop(syn, false, abi.FlowNone)
			hop(syn|ack, true, abi.FlowReply)
			hop(ack, false, abi.FlowNone)
			hop(ack, true, abi.FlowNone)
			hop(fin|ack, true, abi.FlowReply)
			hop(fin|ack, false, abi.FlowEstablished)
			hop(ack, true, abi.FlowNone)
		}
	})
}

// TestTellShortWay: packets that pass by what was remembered of the tick are told
// of as others are.
func TestTellShortWay(t *testing.T) {
	runtime.LockOSThread()
	for name, opts := range map[string][]option{"none": tellLevels["none"], "psh": tells(0, watched|psh, 0, 0)} {
		t.Run(name, func(t *testing.T) {
			eachFamily(t, func(t *testing.T, f family) {
				g := newGate(t, opts...)
				g.endpoint(g.pod, f, f.pod, 0)
				port, told := uint16(0), 0
				g.withinTick(func(begun func()) {
					port++
					send := func(flags uint8) result { return g.from(g.pod, tcp(f.pod, port, f.peer, 2, flags)) }
					g.settle(begun, func() result { return send(ack) })
					told = len(send(ack|psh).events) + len(send(ack|psh).events)
				})
				if want := 1 + b2i(name == "none"); told != want {
					t.Errorf("%d records of two packets, want %d", told, want)
				}
			})
		})
	}
}

// TestTellDrops: every drop has its record at every level, and every packet of a
// kind that is no traffic has none.
func TestTellDrops(t *testing.T) {
	for level, opts := range tellLevels {
		t.Run(level, func(t *testing.T) {
			eachFamily(t, func(t *testing.T, f family) {
				g := newGate(t, opts...)
				g.endpoint(g.pod, f, f.pod, enforceIn)
				for range 5 { // run() wants a record for each
					g.drop(g.to(g.pod, g.uplink, tcp(f.world, 1, f.pod, 80, syn)), abi.ReasonPolicyDenied)
					g.drop(g.to(g.pod, g.uplink, udp(f.world, 1, f.pod, 80)), abi.ReasonPolicyDenied)
				}
				if f.is6 {
					return
				}
				if r := g.from(g.pod, arp(1, podMAC, f.pod, f.node)); len(r.events) != 0 {
					t.Errorf("a record of ARP: %+v", r.events)
				}
			})
		})
	}
}

// TestTellAudit: a flow that passes under audit only is told of as one that passes.
func TestTellAudit(t *testing.T) {
	eachFamily(t, func(t *testing.T, f family) {
		g := newGate(t, tellLevels["medium"]...)
		g.endpoint(g.pod, f, f.pod, enforceIn|abi.EPAudit)
		for i, tt := range []struct {
			flags uint8
			want  int
		}{{syn, 1}, {ack, 0}, {ack | psh, 0}, {fin | ack, 1}, {fin | ack, 0}} {
			r := g.to(g.pod, g.uplink, tcp(f.world, 1, f.pod, 80, tt.flags))
			g.want(r, abi.VerdictAudit, abi.ReasonPolicyDenied)
			if len(r.events) != tt.want {
				t.Errorf("packet %d: %d records, want %d", i, len(r.events), tt.want)
			}
		}
	})
}

// TestTellRule: what is told later of a flow names the rule and the evidence that
// the first packet's record names.
func TestTellRule(t *testing.T) {
	eachFamily(t, func(t *testing.T, f family) {
		g, ep := wantPeer(t, f, tellLevels["medium"]...)
		g.policy(ep.Policy, rule{identity: idClient, dir: ingress, proto: protoTCP, port: 80, flags: allow, rule: 7})
		b := g.bind(f.peer, idClient)
		first := g.to(g.pod, g.uplink, tcp(f.peer, 1, f.pod, 80, syn)).events
		last := g.to(g.pod, g.uplink, tcp(f.peer, 1, f.pod, 80, fin|ack)).events
		back := g.from(g.pod, tcp(f.pod, 80, f.peer, 1, fin|ack)).events
		for i, e := range [][]abi.Event{first, last, back} {
			if len(e) != 1 || e[0].Rule != 7 || e[0].Stamp != b.stamp || abi.Evidence(e[0].Evidence) != abi.EvidenceLease || e[0].Flags != uint8(b2i(i == 1))*uint8(abi.EventLater) {
				t.Errorf("%+v", e)
			}
		}
	})
}

// TestEventsPerSource: a source has its share of records and no more; what it
// does not get is counted, and others have theirs.
func TestEventsPerSource(t *testing.T) {
	eachFamily(t, func(t *testing.T, f family) {
		// An hour a record, and two of them ahead.
		g := newGate(t, constant("event_cost", uint64(time.Hour)), constant("event_burst", uint64(2*time.Hour)))
		g.endpoint(g.pod, f, f.pod, enforceIn)
		g.endpoint(g.pod2, f, f.pod2, enforceIn)
		told := func(prog string, ctx skBuff, packet func(i uint16) []byte) (n int) {
			for i := range uint16(10) {
				n += len(g.runUncounted(prog, packet(i), ctx).events)
			}
			return n
		}
		in := skBuff{Ifindex: g.pod, IngressIfindex: g.uplink}
		scan := func(i uint16) []byte { return tcp(f.world, 1, f.pod, 80+i, syn) }
		if n := told("to_workload", in, scan); n != 3 {
			t.Errorf("%d records of a scan, want 3", n)
		}
		in2 := skBuff{Ifindex: g.pod2, IngressIfindex: g.uplink}
		if n := told("to_workload", in2, func(i uint16) []byte { return tcp(f.world, 1, f.pod2, 80+i, syn) }); n != 0 {
			t.Errorf("%d records of the same stranger at another workload, want 0", n)
		}
		if n := told("to_workload", in, func(i uint16) []byte { return tcp(f.peer, 1, f.pod, 80+i, syn) }); n != 3 {
			t.Errorf("%d records of another source, want 3", n)
		}
		// Whatever source a workload writes.
		spoofed := func(i uint16) []byte {
			a := f.world.As16()
			a[15] = byte(i)
			return tcp(netip.AddrFrom16(a).Unmap(), 1, f.peer, 80, syn)
		}
		if n := told("from_workload", skBuff{Ifindex: g.pod, IngressIfindex: g.pod}, spoofed); n != 3 {
			t.Errorf("%d records of what a workload spoofs, want 3", n)
		}
		if s := g.state(nil); s.LimitedEvents != 7+10+7+7 || s.LostEvents != 0 {
			t.Errorf("%d limited and %d lost", s.LimitedEvents, s.LostEvents)
		}
		var drops uint64
		for k, c := range g.counters() {
			if k.verdict == abi.VerdictDrop {
				drops += c.Packets
			}
		}
		if drops != 40 {
			t.Errorf("%d drops are counted, want 40", drops)
		}
	})
}

// TestEventsPerSourceComeBack: a share is of time, so who waits has records again.
func TestEventsPerSourceComeBack(t *testing.T) {
	f := families[0]
	g := newGate(t, constant("event_cost", uint64(50*time.Millisecond)), constant("event_burst", uint64(0)))
	g.endpoint(g.pod, f, f.pod, enforceIn)
	var at []uint64
	for begin := time.Now(); len(at) < 4; {
		for _, e := range g.runUncounted("to_workload", tcp(f.world, 1, f.pod, 80, syn), skBuff{Ifindex: g.pod, IngressIfindex: g.uplink}).events {
			at = append(at, e.Time)
		}
		if time.Since(begin) > time.Minute {
			t.Fatalf("records at %v", at)
		}
	}
	for i := 1; i < len(at); i++ {
		if d := at[i] - at[i-1]; d < uint64(50*time.Millisecond) {
			t.Errorf("a record %v after the last one: %v", time.Duration(d), at)
		}
	}
}
