package hold

import (
	"fmt"
	"math/rand/v2"
	"net/netip"
	"slices"
	"testing"
	"time"

	"portcullis/bpf/abi"
)

func ip(i int) netip.Addr { return netip.AddrFrom4([4]byte{10, 0, 0, byte(i)}) }

func rec(peer, endpoint int, arrival int64) Record {
	return Record{Peer: ip(peer), Endpoint: uint32(endpoint), HoldIndex: uint32(endpoint), Direction: abi.DirIngress, Arrival: arrival, Packet: make([]byte, 60)}
}

// books checks what Queue promises: each record ends exactly once, and is then
// given back once.
type books struct {
	t        *testing.T
	q        *Queue
	out      map[uint32]int // given back, by hold index
	added    map[uint32]int
	open     map[uint16]Record // by Sport, which the test makes unique
	released int
}

func newBooks(t *testing.T, l Limits) *books {
	b := &books{t: t, out: map[uint32]int{}, added: map[uint32]int{}, open: map[uint16]Record{}}
	b.q = NewQueue(l, func(i, _ uint32) { b.out[i]++; b.released++ })
	return b
}

func (b *books) ended(r Record) {
	b.t.Helper()
	if _, ok := b.open[r.Sport]; !ok {
		b.t.Fatalf("record %d ended twice, or was never added", r.Sport)
	}
	delete(b.open, r.Sport)
}

func (b *books) drops(list []Ended, why ...abi.Reason) {
	b.t.Helper()
	for _, e := range list {
		b.ended(e.Record)
		ok := len(why) == 0 && e.Why != abi.ReasonNone
		for _, w := range why {
			ok = ok || e.Why == w
		}
		if !ok {
			b.t.Fatalf("record %d dropped for %v, want one of %v", e.Sport, e.Why, why)
		}
	}
}

func (b *books) check() {
	b.t.Helper()
	if b.q.Len() != len(b.open) {
		b.t.Fatalf("queue has %d packets, the books %d", b.q.Len(), len(b.open))
	}
	waits, outstanding, bytes := map[netip.Addr]bool{}, map[uint32]int{}, 0
	for _, r := range b.open {
		waits[r.Peer] = true
		outstanding[r.HoldIndex]++
		bytes += len(r.Packet)
	}
	if bytes != b.q.bytes {
		b.t.Fatalf("queue counts %d bytes, the books %d", b.q.bytes, bytes)
	}
	for i := range 20 {
		if b.q.Waits(ip(i)) != waits[ip(i)] {
			b.t.Fatalf("Waits(%v) = %v", ip(i), b.q.Waits(ip(i)))
		}
	}
	for _, p := range b.q.refused {
		outstanding[p.holdIndex]++
	}
	for i, n := range b.added {
		if n-b.out[i] != outstanding[i] {
			b.t.Fatalf("quota %d: in %d, out %d, but %d packets are held or keep their place", i, n, b.out[i], outstanding[i])
		}
	}
}

func TestQueueSequences(t *testing.T) {
	for seed := range uint64(300) {
		t.Run(fmt.Sprint(seed), func(t *testing.T) {
			rng := rand.New(rand.NewPCG(seed, 7))
			l := Limits{PerEndpoint: 1 + rng.IntN(12), PerSource: 1 + rng.IntN(8), Total: 1 + rng.IntN(30), Bytes: 60 * (1 + rng.IntN(30)), Timeout: 100}
			b := newBooks(t, l)
			now := int64(1000)
			var serial uint16
			for range 600 {
				now += int64(rng.IntN(8))
				peer := ip(rng.IntN(6))
				switch rng.IntN(12) {
				default:
					r := rec(rng.IntN(6), 1+rng.IntN(4), now)
					serial++
					r.Sport = serial
					if rng.IntN(2) == 0 {
						r.Direction = abi.DirEgress
					}
					waited := b.q.Waits(r.Peer)
					before := b.q.Len()
					b.open[serial] = r
					b.added[r.HoldIndex]++
					ask, dropped := b.q.Add(r)
					if dropped != nil {
						if ask {
							t.Fatal("a dropped packet asks")
						}
						b.drops([]Ended{*dropped}, abi.ReasonHoldOverflow)
					} else if ask == waited {
						t.Fatalf("ask = %v while waiting = %v", ask, waited)
					}
					if dropped == nil && before >= l.Total {
						t.Fatal("more packets than Total")
					}
				case 0:
					notBefore := now - int64(rng.IntN(60))
					inject, drop := b.q.Answer(peer, notBefore)
					last := uint16(0)
					for _, r := range inject {
						if r.Arrival <= notBefore || r.Peer != peer {
							t.Fatalf("injected %+v with notBefore %d", r, notBefore)
						}
						if r.Sport <= last {
							t.Fatal("order changed")
						}
						last = r.Sport
						b.ended(r)
					}
					for _, e := range drop {
						if e.Arrival > notBefore {
							t.Fatalf("dropped %+v with notBefore %d", e, notBefore)
						}
					}
					b.drops(drop, abi.ReasonGenerationChanged)
					if b.q.Waits(peer) {
						t.Fatal("waits after an answer")
					}
				case 1:
					asked := now - int64(rng.IntN(60))
					drop, remaining := b.q.Refuse(peer, asked, abi.ReasonRefused)
					for _, e := range drop {
						if e.Arrival >= asked {
							t.Fatalf("refused %+v, asked %d", e, asked)
						}
					}
					b.drops(drop, abi.ReasonRefused)
					if remaining != b.q.Waits(peer) {
						t.Fatal("remaining is wrong")
					}
				case 2:
					drop, gone := b.q.Expire(now)
					b.drops(drop, abi.ReasonHoldTimeout, abi.ReasonRefused, abi.ReasonOwnerUnreachable)
					for _, ip := range gone {
						if b.q.Waits(ip) {
							t.Fatal("gone, but waits")
						}
					}
					if at, ok := b.q.Next(); ok && at <= now {
						t.Fatalf("Expire(%d) left something for %d", now, at)
					}
				case 3:
					id := uint32(1 + rng.IntN(4))
					drop, _ := b.q.DropEndpoint(id, abi.ReasonNoEndpoint)
					b.drops(drop, abi.ReasonNoEndpoint)
					for _, r := range b.open {
						if r.Endpoint == id {
							t.Fatal("a record of the dropped endpoint is left")
						}
					}
				case 4:
					b.q.Note(peer, abi.ReasonOwnerUnreachable)
				}
				b.check()
			}
			b.drops(b.q.DropAll(abi.ReasonNoEndpoint), abi.ReasonNoEndpoint)
			b.check()
			if b.released != int(serial) || b.q.Len() != 0 {
				t.Fatalf("%d records, %d given back, %d left", serial, b.released, b.q.Len())
			}
		})
	}
}

// One endpoint's, or one source's, storm leaves room for the others.
func TestQueueQuotas(t *testing.T) {
	b := newBooks(t, Limits{PerEndpoint: 8, PerSource: 4, Total: 20})
	add := func(peer, endpoint int) *Ended {
		r := rec(peer, endpoint, 1)
		_, d := b.q.Add(r)
		return d
	}
	for i := range 4 {
		if add(1, 1) != nil {
			t.Fatalf("packet %d of the source overflows", i)
		}
	}
	if add(1, 2) == nil {
		t.Fatal("a fifth packet of one source is held")
	}
	for i := range 4 {
		if add(2, 1) != nil {
			t.Fatalf("packet %d of the endpoint overflows", 4+i)
		}
	}
	if add(3, 1) == nil {
		t.Fatal("a ninth packet of one endpoint is held")
	}
	if add(3, 2) != nil {
		t.Fatal("another source's first contact with another endpoint is not held")
	}
}

func TestQueueReasons(t *testing.T) {
	b := newBooks(t, Limits{Timeout: time.Second})
	sec := int64(time.Second)
	for i := range 3 {
		b.q.Add(rec(i, 1, 10))
	}
	b.q.Note(ip(1), abi.ReasonOwnerUnreachable)
	b.q.Refuse(ip(2), 10, abi.ReasonRefused) // arrived when it was sent: not before
	b.q.Refuse(ip(2), 5, abi.ReasonNone)     // no reason is no option
	drop, gone := b.q.Expire(9 + sec)
	if len(drop) != 0 || len(gone) != 0 {
		t.Fatal("expired too early")
	}
	drop, gone = b.q.Expire(10 + sec)
	want := []abi.Reason{abi.ReasonHoldTimeout, abi.ReasonOwnerUnreachable, abi.ReasonHoldTimeout}
	if len(drop) != 3 || len(gone) != 3 {
		t.Fatalf("%d expired, %d gone", len(drop), len(gone))
	}
	for i, e := range drop {
		if e.Why != want[i] {
			t.Errorf("packet %d: %v, want %v", i, e.Why, want[i])
		}
	}
}

// What workloads send to one address shares no limit among them, and none with
// what that address sends.
func TestQueueSources(t *testing.T) {
	var sources []uint32
	q := NewQueue(Limits{PerSource: 2}, func(_, source uint32) { sources = append(sources, source) })
	for i, tc := range []struct {
		endpoint int
		dir      abi.Direction
		room     bool
	}{
		{1, abi.DirEgress, true}, {1, abi.DirEgress, true}, {1, abi.DirEgress, false}, {2, abi.DirEgress, true},
		{1, abi.DirIngress, true}, {2, abi.DirIngress, true}, {3, abi.DirIngress, false}, {3, abi.DirEgress, true},
	} {
		r := rec(1, tc.endpoint, 1)
		r.Direction, r.Source = tc.dir, uint32(100+i)
		if _, drop := q.Add(r); (drop == nil) != tc.room {
			t.Errorf("packet %d: dropped %v", i, drop)
		}
	}
	q.Answer(ip(1), 0)
	want := []uint32{102, 106, 100, 101, 103, 104, 105, 107}
	if !slices.Equal(sources, want) || len(q.bySource) != 0 {
		t.Errorf("given back %v, want %v; %d sources left", sources, want, len(q.bySource))
	}
}
