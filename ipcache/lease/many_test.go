package lease_test

import (
	"net/netip"
	"runtime"
	"strconv"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"portcullis/identity"
	"portcullis/ipcache"
	"portcullis/ipcache/lease"
)

// many is a verifier with n live bindings of one owner.
func many(t testing.TB, n int, idle time.Duration) (v *lease.Verifier, table *ipcache.Table, now lease.Time) {
	t.Helper()
	table, err := ipcache.New(ipcache.Config{Slots: uint32(n) + 1, Leases: 8, NextStamp: 1})
	if err != nil {
		t.Fatal(err)
	}
	now = lease.Time(time.Hour)
	v, err = lease.NewVerifier(lease.VerifierConfig{Node: "v", Boot: bootV, TTL: 30 * time.Second, Heartbeat: 10 * time.Second,
		IdleBinding: idle, IdleSession: 100 * idle, DeadAfter: 100 * idle, Speaks: func(identity.NodeName, netip.Addr) bool { return true }}, table, now)
	if err != nil {
		t.Fatal(err)
	}
	say := func(m lease.Message) []lease.VerifierOutput {
		return v.Step(now, lease.FromOwner{Stream: 1, Message: m})
	}
	confirm := func(out []lease.VerifierOutput) {
		for _, c := range only[lease.Confirm](out) {
			// Every binding comes with strings of its own, as from the wire.
			say(binding(c, 1, identity.New("td", "ns", "sa", map[string]string{"app": "client", "tier": "front"})))
		}
	}
	v.Step(now, lease.Want{IP: manyIP(0), Owner: "o", Arrival: now})
	v.Step(now, lease.StreamOpened{Owner: "o", Stream: 1})
	h := only[lease.Hello](say(lease.Challenge{}))
	if len(h) != 1 {
		t.Fatalf("%d Hellos", len(h))
	}
	confirm(say(lease.Welcome{Boot: bootO, Echo: h[0].SentAt, TTL: h[0].Ask}))
	for i := range n {
		confirm(v.Step(now, lease.Want{IP: manyIP(i), Owner: "o", Arrival: now}))
	}
	if table.CountOf("o") != n {
		t.Fatalf("%d bindings, want %d", table.CountOf("o"), n)
	}
	return v, table, now
}

func manyIP(i int) netip.Addr {
	return netip.AddrFrom4([4]byte{10, byte(i >> 16), byte(i >> 8), byte(i)})
}

// Bindings that fall idle at once are given back a few at a time, the longest
// unused first; those in use stay.
func TestIdleInSlices(t *testing.T) {
	const n, slice = 2000, 256
	v, table, now := many(t, n, time.Minute)
	now = now.Add(30 * time.Second)
	used := lease.Used{}
	for i := 0; i < n; i += 4 {
		used.IPs = append(used.IPs, manyIP(i))
	}
	v.Step(now, used)
	now = now.Add(31 * time.Second)
	steps, last, released := 0, uint64(0), 0
	for table.CountOf("o") > n/4 {
		out := v.Step(now, lease.VerifierTick{})
		zeros := only[lease.Zero](out)
		if len(zeros) > slice {
			t.Fatalf("%d given back in one step", len(zeros))
		}
		released += len(only[lease.Release](out))
		for _, z := range zeros {
			if z.Stamp <= last {
				t.Fatalf("stamp %d after %d: not the longest unused", z.Stamp, last)
			}
			last = z.Stamp
		}
		// The next slice comes soon, by the timer that was asked for.
		for _, timer := range only[lease.VerifierTimer](out) {
			now = timer.At
		}
		if steps++; steps > 3*n/slice {
			t.Fatalf("%d bindings after %d steps", table.CountOf("o"), steps)
		}
	}
	if want := n - n/4; released != want || steps < want/slice {
		t.Errorf("%d released in %d steps, want %d", released, steps, want)
	}
	for i := range n {
		if _, ok := table.Get(manyIP(i)); ok != (i%4 == 0) {
			t.Fatalf("%v is bound: %v", manyIP(i), ok)
		}
	}
}

// The work of an idle verifier for each heartbeat, whatever the number of its
// bindings.
func BenchmarkIdleStep(b *testing.B) {
	for _, n := range []int{10, 10_000, 100_000} {
		b.Run(strconv.Itoa(n), func(b *testing.B) {
			v, _, now := many(b, n, 1000*time.Hour)
			b.ReportAllocs()
			b.ResetTimer()
			for range b.N {
				now = now.Add(10 * time.Second)
				v.Step(now, lease.VerifierTick{})
				v.Sessions()
			}
		})
	}
}

// The steps of a new session over all the bindings that one may have: what is
// listed in its Hello, and what its Welcome leads to.
func BenchmarkNewSession(b *testing.B) {
	for _, n := range []int{1000, 1 << 16} {
		b.Run(strconv.Itoa(n), func(b *testing.B) {
			v, _, now := many(b, n, 1000*time.Hour)
			hello, welcome := time.Duration(0), time.Duration(0)
			for i := range b.N {
				old, stream := lease.StreamID(1+i), lease.StreamID(2+i)
				now = now.Add(10 * time.Second)
				v.Step(now, lease.OwnerGone{Owner: "o", Stream: old})
				for len(only[lease.OpenStream](v.Step(now, lease.VerifierTick{}))) == 0 {
					now = now.Add(time.Second)
				}
				v.Step(now, lease.StreamOpened{Owner: "o", Stream: stream})
				begin := threadTime(b)
				h := one[lease.Hello](b, v.Step(now, lease.FromOwner{Stream: stream, Message: lease.Challenge{}}))
				hello += threadTime(b) - begin
				w := lease.Welcome{Boot: bootO, Echo: h.SentAt, TTL: h.Ask}
				for _, held := range h.Held {
					w.Stands = append(w.Stands, held.Ref)
				}
				begin = threadTime(b)
				out := v.Step(now, lease.FromOwner{Stream: stream, Message: w})
				welcome += threadTime(b) - begin
				if got := len(only[lease.SwitchLease](out)); got != n {
					b.Fatalf("%d switched, want %d", got, n)
				}
			}
			b.ReportMetric(float64(hello.Microseconds())/1000/float64(b.N), "ms-CPU/hello")
			b.ReportMetric(float64(welcome.Microseconds())/1000/float64(b.N), "ms-CPU/welcome")
		})
	}
}

// threadTime is the CPU time of this thread, which is this goroutine's alone.
func threadTime(b *testing.B) time.Duration {
	b.Helper()
	runtime.LockOSThread()
	var ts unix.Timespec
	if err := unix.ClockGettime(unix.CLOCK_THREAD_CPUTIME_ID, &ts); err != nil {
		b.Fatal(err)
	}
	return time.Duration(ts.Nano())
}
