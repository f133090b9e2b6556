package chaos

import (
	"net/netip"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"portcullis/chaos/check"
)

// now is CLOCK_BOOTTIME in ns, the clock of histories.
func now() int64 {
	var t unix.Timespec
	if err := unix.ClockGettime(unix.CLOCK_BOOTTIME, &t); err != nil {
		panic(err) // every kernel that tcx is in has it
	}
	return t.Nano()
}

// recorder collects the history. It may be used from any goroutine.
type recorder struct {
	mu        sync.Mutex
	next      uint64                    // guarded by mu
	workloads []*check.Workload         // guarded by mu
	messages  map[uint64]*check.Message // guarded by mu
	faults    []*check.Fault            // guarded by mu
	long      []longer                  // guarded by mu
}

// longer is a fault during which longer leases are given than else.
type longer struct {
	fault *check.Fault
	lease time.Duration
}

func newRecorder() *recorder { return &recorder{messages: map[uint64]*check.Message{}} }

// made notes a workload before its namespace is made. The caller changes it by
// set alone.
func (r *recorder) made(w check.Workload) *check.Workload {
	w.Made = now()
	r.mu.Lock()
	defer r.mu.Unlock()
	r.workloads = append(r.workloads, &w)
	return &w
}

func (r *recorder) set(f func()) {
	r.mu.Lock()
	defer r.mu.Unlock()
	f()
}

// sending notes a message that is about to be sent, and returns its number.
// flow is that of an earlier message, or 0.
func (r *recorder) sending(m check.Message) uint64 {
	m.Sent = now()
	r.mu.Lock()
	defer r.mu.Unlock()
	r.next++
	if m.ID = r.next; m.Flow == 0 {
		m.Flow = m.ID
	}
	r.messages[m.ID] = &m
	return m.ID
}

// update changes a message. One that is not there (a number that somebody made
// up) changes nothing.
func (r *recorder) update(id uint64, f func(*check.Message)) bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	m := r.messages[id]
	if m != nil {
		f(m)
	}
	return m != nil
}

// ended notes that the sender waits no longer.
func (r *recorder) ended(id uint64) {
	t := now()
	r.update(id, func(m *check.Message) { m.Ended = t })
}

// received notes who received a message, and returns a copy of it.
func (r *recorder) received(id uint64, uid string) (m check.Message, ok bool) {
	t := now()
	ok = r.update(id, func(p *check.Message) {
		p.Received = append(p.Received, check.Receipt{UID: uid, At: t})
		m = *p
	})
	return m, ok
}

// begins notes a fault that is about to begin. f.Lease is the longest lease that is
// given until then, and, if that is longer than always, by what it does.
func (r *recorder) begins(f check.Fault, always time.Duration) *check.Fault {
	f.From = now()
	r.mu.Lock()
	defer r.mu.Unlock()
	r.faults = append(r.faults, &f)
	if f.Lease > always {
		r.long = append(r.long, longer{&f, f.Lease})
	}
	return &f
}

// began notes that a fault has begun. What earlier ones had given counts, too: the
// lease that an agent asked for before its absence stands when the next begins.
func (r *recorder) began(f *check.Fault) {
	r.mu.Lock()
	defer r.mu.Unlock()
	f.Began = now()
	for _, l := range r.long {
		left := l.lease
		if l.fault.Ended != 0 {
			left -= time.Duration(f.Began - l.fault.Ended)
		}
		f.Lease = max(f.Lease, left)
	}
}

// forget removes a fault that did not come to begin.
func (r *recorder) forget(f *check.Fault) {
	r.mu.Lock()
	defer r.mu.Unlock()
	for i, x := range r.faults {
		if x == f {
			r.faults = append(r.faults[:i], r.faults[i+1:]...)
			return
		}
	}
}

// history returns a copy of what there is.
func (r *recorder) history(run check.Run, rules []check.Rule) *check.History {
	r.mu.Lock()
	defer r.mu.Unlock()
	h := &check.History{Run: run, Rules: rules}
	for _, w := range r.workloads {
		h.Workloads = append(h.Workloads, *w)
	}
	for id := uint64(1); id <= r.next; id++ {
		m := *r.messages[id]
		m.Received = append([]check.Receipt(nil), m.Received...)
		h.Messages = append(h.Messages, m)
	}
	for _, f := range r.faults {
		h.Faults = append(h.Faults, *f)
	}
	return h
}

// counts are what a line of progress says.
func (r *recorder) counts() (messages, received, faults int) {
	r.mu.Lock()
	defer r.mu.Unlock()
	for _, m := range r.messages {
		if len(m.Received) > 0 || m.Connected != 0 {
			received++
		}
	}
	for _, f := range r.faults {
		if f.Ended == 0 {
			faults++
		}
	}
	return len(r.messages), received, faults
}

// tick is the grain of what ends: the kernel's coarse clock, and what lies
// between a packet's judgement and the call that returns it.
const tick = 20 * time.Millisecond

func unmap(a netip.AddrPort) netip.AddrPort { return netip.AddrPortFrom(a.Addr().Unmap(), a.Port()) }
