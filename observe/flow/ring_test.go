package flow

import (
	"fmt"
	"net/netip"
	"runtime"
	"sync"
	"testing"

	"portcullis/bpf/abi"
	"portcullis/identity"
)

// A ring of any size holds the last records in their order, and tells of every
// other one that it is lost.
func TestRingKeepsTheLast(t *testing.T) {
	for _, size := range []int{1, 2, 7, chunk - 1, chunk, chunk + 1, 3 * chunk} {
		for _, count := range []int{0, 1, size - 1, size, size + 1, 3*size + 2} {
			r := NewRing(size)
			for i := range count {
				r.Put(&Record{BootTime: uint64(i)})
			}
			want := max(0, count-size)
			if oldest, next := r.Bounds(); oldest != uint64(want) || next != uint64(count) {
				t.Fatalf("%d of %d: from %d to %d", count, size, oldest, next)
			}
			var from, lost uint64
			buf := make([]Record, 5)
			for {
				n, after, l := r.Read(from, buf)
				lost, from = lost+l, after
				for _, rec := range buf[:n] {
					if rec.BootTime != uint64(want) {
						t.Fatalf("%d of %d: record %d in the place of %d", count, size, rec.BootTime, want)
					}
					want++
				}
				if n == 0 {
					break
				}
			}
			if want != count || lost != uint64(max(0, count-size)) {
				t.Fatalf("%d of %d: read up to %d, lost %d", count, size, want, lost)
			}
		}
	}
}

// Readers that wait miss nothing that they are not told of, whoever is faster.
func TestRingTellsEveryReaderOfEveryRecord(t *testing.T) {
	const count = 5000
	r := NewRing(64)
	var readers sync.WaitGroup
	for range 3 {
		readers.Go(func() {
			var from, seen, lost uint64
			buf := make([]Record, 16)
			for seen+lost < count {
				<-r.Wait(from)
				n, after, l := r.Read(from, buf)
				for i, rec := range buf[:n] {
					if rec.BootTime != from+l+uint64(i) {
						t.Errorf("record %d in the place of %d", rec.BootTime, from+l+uint64(i))
						return
					}
				}
				seen, lost, from = seen+uint64(n), lost+l, after
			}
			if seen+lost != count {
				t.Errorf("%d seen and %d lost of %d", seen, lost, count)
			}
		})
	}
	for i := range count {
		r.Put(&Record{BootTime: uint64(i)})
	}
	readers.Wait()
}

func TestRingWaitIsOverWhenTheRecordIsThere(t *testing.T) {
	r := NewRing(2)
	wait := r.Wait(0)
	select {
	case <-wait:
		t.Fatal("nothing has come, and the wait is over")
	default:
	}
	r.Put(&Record{})
	<-wait
	<-r.Wait(0)
	select {
	case <-r.Wait(1):
		t.Fatal("the second has not come, and the wait is over")
	default:
	}
}

// some are records as an agent makes them: many flows of few identities.
func some(b *testing.B) func(i int) Record {
	known := make([]Known, 50)
	for i := range known {
		known[i] = Know(identity.New("lab.test", "default", fmt.Sprint("app-", i), map[string]string{"app": fmt.Sprint(i), "org": "empire"}), "spiffe://lab.test/ns/default/sa/x")
	}
	resolve := resolver()
	resolve.Identity = func(n identity.Numeric) (Known, bool) { return known[int(n)%len(known)], true }
	base := netip.MustParseAddr("10.0.0.1").As16()
	return func(i int) Record {
		ev := syn()
		ev.Src = abi.Addr(base)
		ev.Src[13], ev.Src[14], ev.Src[15] = byte(i>>16), byte(i>>8), byte(i)
		ev.SrcIdentity, ev.DstIdentity = uint32(i), uint32(i+1)
		return FromEvent(ev, resolve)
	}
}

// What a record costs, from the kernel's event to its place in the ring.
func BenchmarkRing(b *testing.B) {
	make, r := some(b), NewRing(100_000)
	b.ReportAllocs()
	for i := range b.N {
		rec := make(i)
		r.Put(&rec)
	}
	b.ReportMetric(float64(b.N)/b.Elapsed().Seconds(), "events/s")
}

// What a ring of 100,000 records weighs when it is full.
func BenchmarkRingMemory(b *testing.B) {
	const size = 100_000
	record := some(b)
	for range b.N {
		var before, after runtime.MemStats
		runtime.GC()
		runtime.ReadMemStats(&before)
		r := NewRing(size)
		for i := range size {
			rec := record(i)
			r.Put(&rec)
		}
		runtime.GC()
		runtime.ReadMemStats(&after)
		b.ReportMetric(float64(after.HeapAlloc-before.HeapAlloc)/(1<<20), "MiB")
		b.ReportMetric(float64(after.HeapAlloc-before.HeapAlloc)/size, "B/record")
		runtime.KeepAlive(r)
	}
}
