package datapath_test

import (
	"context"
	"crypto/rand"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"strings"
	"testing"
	"time"

	"github.com/cilium/ebpf"

	"portcullis/bpf/abi"
	"portcullis/datapath"
	"portcullis/datapath/hold"
)

func pinnedMap(l *lab, name string) *ebpf.Map {
	l.t.Helper()
	m, err := ebpf.LoadPinnedMap(l.pins+"/maps/"+name, nil)
	l.must(err)
	l.t.Cleanup(func() { m.Close() })
	return m
}

func (l *lab) injector(d *datapath.Datapath) *hold.Injector {
	l.t.Helper()
	in, err := hold.NewInjector(d.Marks())
	l.must(err)
	l.t.Cleanup(func() { in.Close() })
	return in
}

// The first packet of an unknown peer is held, and arrives as it was sent once
// the peer is confirmed: its checksum is right, or the socket would not get it.
func TestFirstUDPPacketIsHeldThenArrives(t *testing.T) {
	for _, tc := range []struct {
		from, to netip.Addr
		size     int
	}{{remote4, workload4, 5}, {remote6, workload6, 5}, {remote4, workload4, 1400}, {remote6, workload6, 1400}} {
		t.Run(fmt.Sprintf("%v %d bytes", tc.from, tc.size), func(t *testing.T) {
			l := newLab(t)
			d := l.open()
			ep := l.serve(d)
			g, in := l.gate(d), l.injector(d)
			q := hold.NewQueue(hold.Limits{}, d.ReleaseHold)
			server, client := l.udp(l.workload, tc.to, 5000), l.udp(l.remote, tc.from, 6000)
			first, second := strings.Repeat("a", tc.size), strings.Repeat("b", tc.size)
			l.send(client, tc.to, 5000, first)
			l.send(client, tc.to, 5000, second)
			r := g.next(l)
			if r.Peer != tc.from || r.Local != tc.to || r.Endpoint != ep.ID || r.Ifindex != uint32(l.wl) || r.HoldIndex != 1 ||
				r.Proto != 17 || r.Sport != 6000 || r.Dport != 5000 || r.Direction != abi.DirIngress || r.Reason != abi.ReasonUnbound ||
				r.Arrival <= 0 || r.Arrival > d.Now() || r.GSOSize != 0 {
				t.Fatalf("held %+v", r)
			}
			if ask, _ := q.Add(r); !ask {
				t.Fatal("the first packet asks nobody")
			}
			if ask, _ := q.Add(g.next(l)); ask {
				t.Fatal("the second packet asks again")
			}
			if n := d.Outstanding(1); n != 2 || d.Outstanding(0) != 2 {
				t.Fatalf("%d and %d packets are outstanding, want 2", n, d.Outstanding(0))
			}
			l.nothing(server)
			l.confirm(d, 1, tc.from)
			inject, drop := q.Answer(tc.from, 0)
			if len(inject) != 2 || len(drop) != 0 {
				t.Fatalf("%d to inject, %d to drop", len(inject), len(drop))
			}
			for _, r := range inject {
				l.must(in.Inject(r))
			}
			l.receive(server, first)
			l.receive(server, second)
			if d.Outstanding(0) != 0 || d.Outstanding(1) != 0 {
				t.Fatal("the quotas were not given back")
			}
			// From now on nothing is held; the reply passes too.
			l.send(client, tc.to, 5000, "third")
			l.receive(server, "third")
			l.send(server, tc.from, 6000, "reply")
			l.receive(client, "reply")
			select {
			case r := <-g.records:
				t.Fatalf("held after the confirmation: %+v", r)
			default:
			}
		})
	}
}

// connect dials from the remote side while the test plays the agent.
func (l *lab) connect(g *gate, q *hold.Queue, in *hold.Injector, ln net.Listener, from, to netip.Addr) (client, server *net.TCPConn) {
	l.t.Helper()
	dialed := make(chan error, 1)
	var c net.Conn
	go func() { // its thread ends with it
		dialed <- inThread(l.remote, func() (err error) {
			d := net.Dialer{LocalAddr: &net.TCPAddr{IP: from.AsSlice()}, Timeout: patience}
			d.SetMultipathTCP(false)
			c, err = d.Dial("tcp", netip.AddrPortFrom(to, 5000).String())
			return err
		})
	}()
	r := g.next(l)
	if r.Proto != 6 {
		l.t.Fatalf("held %+v, want a SYN", r)
	}
	q.Add(r)
	l.confirm(g.d, 1, from)
	inject, _ := q.Answer(from, 0)
	for _, r := range inject {
		l.must(in.Inject(r))
	}
	l.must(<-dialed)
	l.t.Cleanup(func() { c.Close() })
	s, err := ln.Accept()
	l.must(err)
	l.t.Cleanup(func() { s.Close() })
	return c.(*net.TCPConn), s.(*net.TCPConn)
}

func (l *lab) listen(to netip.Addr) net.Listener {
	l.t.Helper()
	var ln net.Listener
	l.in(l.workload, func() {
		var err error
		lc := net.ListenConfig{}
		lc.SetMultipathTCP(false)
		ln, err = lc.Listen(context.Background(), "tcp", netip.AddrPortFrom(to, 5000).String())
		l.must(err)
	})
	l.t.Cleanup(func() { ln.Close() })
	return ln
}

func TestFirstTCPConnectHasNoRetransmit(t *testing.T) {
	for _, tc := range []struct{ from, to netip.Addr }{{remote4, workload4}, {remote6, workload6}} {
		t.Run(tc.from.String(), func(t *testing.T) {
			l := newLab(t)
			d := l.open()
			l.serve(d)
			g, in := l.gate(d), l.injector(d)
			client, server := l.connect(g, hold.NewQueue(hold.Limits{}, d.ReleaseHold), in, l.listen(tc.to), tc.from, tc.to)
			if n := tcpInfo(t, client).Total_retrans; n != 0 {
				t.Errorf("%d segments were retransmitted", n)
			}
			_, err := client.Write([]byte("hello"))
			l.must(err)
			b := make([]byte, 5)
			_, err = io.ReadFull(server, b)
			l.must(err)
			if string(b) != "hello" || d.Outstanding(0) != 0 {
				t.Errorf("received %q, %d outstanding", b, d.Outstanding(0))
			}
		})
	}
}

// In the middle of a connection the binding is revoked, and large segments are
// held until it is confirmed again: they arrive whole.
func TestGSOSegmentsAreHeldThenArrive(t *testing.T) {
	for _, tc := range []struct{ from, to netip.Addr }{{remote4, workload4}, {remote6, workload6}} {
		t.Run(tc.from.String(), func(t *testing.T) {
			l := newLab(t)
			d := l.open()
			l.serve(d)
			g, in := l.gate(d), l.injector(d)
			q := hold.NewQueue(hold.Limits{}, d.ReleaseHold)
			client, server := l.connect(g, q, in, l.listen(tc.to), tc.from, tc.to)
			data := make([]byte, 1<<20)
			rand.Read(data)
			// Grow the window first, so that there are large segments.
			sent := make(chan error, 1)
			got := make(chan [32]byte, 1)
			go func() {
				h := sha256.New()
				for range 2 {
					if _, err := io.CopyN(h, server, int64(len(data))); err != nil {
						t.Error(err)
					}
					if _, err := server.Write([]byte{1}); err != nil {
						t.Error(err)
					}
				}
				got <- [32]byte(h.Sum(nil))
			}()
			_, err := client.Write(data)
			l.must(err)
			// The byte comes with the present window: an update of it that
			// followed would be dropped below.
			_, err = client.Read(make([]byte, 1))
			l.must(err)

			stamp := uint64(0)
			for _, s := range d.Slots() {
				stamp = s.Stamp
			}
			l.must(d.ZeroSlot(1, stamp, tc.from))
			go func() { _, err := client.Write(data); sent <- err }()
			large := 0
			r := g.next(l)
			for {
				if r.GSOSize != 0 {
					large++
					if len(r.Packet) <= 1514 {
						t.Errorf("a GSO packet of %d bytes", len(r.Packet))
					}
				}
				if _, drop := q.Add(r); drop != nil {
					t.Fatalf("dropped for %v", drop.Why)
				}
				if len(g.records) == 0 && large > 0 {
					break
				}
				r = g.next(l)
			}
			l.confirm(d, 2, tc.from)
			inject, _ := q.Answer(tc.from, 0)
			for _, r := range inject {
				l.must(in.Inject(r))
			}
			// What came in between is in the ring still.
			done := false
			for !done {
				select {
				case r := <-g.records:
					l.must(in.Inject(r))
					d.ReleaseHold(r.HoldIndex, r.Source)
				case sum := <-got:
					if sum != sha256.Sum256(append(data, data...)) {
						t.Error("the data was changed on its way")
					}
					done = true
				case <-time.After(patience):
					t.Fatalf("the data did not arrive; %d GSO packets were held; counters %v", large, counters(l, d))
				}
			}
			l.must(<-sent)
			t.Logf("%d GSO packets held, %d packets in all", large, len(inject))
		})
	}
}

// A packet of from_workload is turned round by the mark, and judged there.
func TestTurnedPacketIsJudgedAsTheWorkloads(t *testing.T) {
	l := newLab(t)
	d := l.open()
	l.serve(d)
	in := l.injector(d)
	// Capture what the workload sends, as from_workload would hold it: let the
	// gate be shut for it, and take the frame from the workload's own device.
	server := l.udp(l.remote, remote4, 5000)
	frame := udpFrame(l)
	l.must(in.Inject(hold.Record{Direction: abi.DirEgress, Ifindex: uint32(l.wl), Packet: frame}))
	l.receive(server, "turned")
	pass := counters(l, d)[datapath.CounterKey{Direction: abi.DirEgress, Verdict: abi.VerdictPass}]
	if pass.Packets != 1 {
		t.Errorf("from_workload passed %d packets, want 1: %v", pass.Packets, counters(l, d))
	}
	// The mark allows nothing: a packet that is not the workload's is dropped.
	frame = udpFrame(l)
	frame[29] = 99 // the source address
	if err := in.Inject(hold.Record{Direction: abi.DirEgress, Ifindex: uint32(l.wl), Packet: frame}); err != nil && !errors.Is(err, hold.ErrDropped) {
		t.Fatal(err)
	}
	if n := dropped(l, d, abi.DirEgress, abi.ReasonSpoofed); n != 1 {
		t.Errorf("%d spoofed packets, want 1: %v", n, counters(l, d))
	}
}

// udpFrame is a packet of the workload to the remote, its checksum left to the
// device as local stacks do.
func udpFrame(l *lab) []byte {
	gw, err := net.InterfaceByName("wl0")
	l.must(err)
	payload := "turned"
	f := append(append(append([]byte{}, gw.HardwareAddr...), l.mac[:]...), 8, 0)
	total := 28 + len(payload)
	ip := []byte{0x45, 0, 0, byte(total), 0, 1, 0, 0, 64, 17, 0, 0, 10, 8, 0, 2, 10, 9, 0, 2}
	sum := uint32(0)
	for i := 0; i < 20; i += 2 {
		sum += uint32(ip[i])<<8 | uint32(ip[i+1])
	}
	sum = ^(sum>>16 + sum&0xffff)
	ip[10], ip[11] = byte(sum>>8), byte(sum)
	n := 8 + len(payload)
	pseudo := uint32(0x0a08+0x0002+0x0a09+0x0002+17) + uint32(n)
	pseudo = pseudo>>16 + pseudo&0xffff
	f = append(f, ip...)
	f = append(f, 7000>>8, 7000&255, 5000>>8, 5000&255, 0, byte(n), byte(pseudo>>8), byte(pseudo))
	return append(f, payload...)
}

// What an earlier reader left in the ring is dropped, and nothing stays
// counted as outstanding.
func TestRingIsEmptiedAtStart(t *testing.T) {
	l := newLab(t)
	d := l.open()
	l.serve(d)
	server, client := l.udp(l.workload, workload4, 5000), l.udp(l.remote, remote4, 6000)
	g := l.gate(d)
	l.send(client, workload4, 5000, "old")
	g.next(l) // taken by an agent that dies: never given back
	g.stop()
	if d.Outstanding(1) != 1 {
		t.Fatal("not counted")
	}
	// The reader is gone but ticked a moment ago: packets still go to the ring.
	// (Held has zeroed the tick; a killed agent cannot.)
	var s abi.State
	m := pinnedMap(l, "state")
	l.must(m.Lookup(uint32(0), &s))
	s.ReaderTick = uint64(d.Now())
	l.must(m.Put(uint32(0), &s))
	l.send(client, workload4, 5000, "older")
	l.eventually("the packet is in the ring", func() bool { return d.Outstanding(1) == 2 })

	g = l.gate(d)
	if d.Outstanding(0) != 0 || d.Outstanding(1) != 0 {
		t.Errorf("%d and %d outstanding after the start", d.Outstanding(0), d.Outstanding(1))
	}
	l.send(client, workload4, 5000, "new")
	r := g.next(l)
	if !strings.HasSuffix(string(r.Packet), "new") {
		t.Errorf("the ring still had %q", r.Packet[42:])
	}
	l.nothing(server)
	if n := dropped(l, d, abi.DirIngress, abi.ReasonHoldTimeout); n != 1 {
		t.Errorf("%d drops counted for the old packet, want 1", n)
	}
}

// Nothing is held when nobody would decide: the reader has ended, or hangs.
func TestReaderTickStopsHolds(t *testing.T) {
	l := newLab(t)
	d := l.open()
	l.serve(d)
	client := l.udp(l.remote, remote4, 6000)
	unbound := func() uint64 { return dropped(l, d, abi.DirIngress, abi.ReasonUnbound) }

	l.send(client, workload4, 5000, "no reader yet")
	l.eventually("a drop without a reader", func() bool { return unbound() == 1 })

	g := l.gate(d)
	first := tick(l, d)
	l.eventually("an idle reader goes on ticking", func() bool { return tick(l, d) > first })
	l.send(client, workload4, 5000, "held")
	g.next(l)
	g.stop()
	l.send(client, workload4, 5000, "no reader any more")
	l.eventually("a drop after the reader ended", func() bool { return unbound() == 2 })

	// A reader that hangs in its callback.
	release, done := make(chan struct{}), make(chan error, 1)
	ctx, cancel := context.WithCancel(context.Background())
	go func() { done <- d.Held(ctx, func(hold.Record) { <-release }) }()
	l.eventually("the reader ticks", func() bool { return tick(l, d) != 0 })
	before := unbound()
	l.eventually("holds stop while the reader hangs", func() bool {
		l.send(client, workload4, 5000, "into a reader that hangs")
		return unbound() > before
	})
	cancel()
	close(release)
	<-done
}

func TestHoldQuotaOfTheKernel(t *testing.T) {
	l := newLab(t)
	cfg := l.config()
	cfg.HoldPerEndpoint = 4
	d, err := datapath.Open(cfg)
	l.must(err)
	t.Cleanup(func() { l.must(d.Close()) })
	l.serve(d)
	g := l.gate(d)
	client := l.udp(l.remote, remote4, 6000)
	for range 6 {
		l.send(client, workload4, 5000, "x")
	}
	l.eventually("two overflow", func() bool { return dropped(l, d, abi.DirIngress, abi.ReasonHoldOverflow) == 2 })
	for range 4 {
		g.release(l)
	}
	if d.Outstanding(0) != 0 || d.Outstanding(1) != 0 {
		t.Errorf("%d and %d outstanding", d.Outstanding(0), d.Outstanding(1))
	}
	l.send(client, workload4, 5000, "y")
	g.next(l)
}
