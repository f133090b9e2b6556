package datapath

import (
	"context"
	"errors"
	"fmt"
	"os"
	"sync/atomic"
	"time"
	"unsafe"

	"github.com/cilium/ebpf/ringbuf"
	"go.uber.org/zap"
	"golang.org/x/sys/unix"

	"portcullis/bpf/abi"
)

// tickInterval is how often the hold reader shows that it lives. The kernel
// stops holding when it has not for a second.
const tickInterval = 50 * time.Millisecond

// The reader of events is woken only for every eventsWakeup bytes of them (or a
// quarter of the ring; powers of two): being woken for each would cost more than the packet.
// It looks every eventsInterval by itself, so that none waits longer.
const (
	eventsWakeup   = 64 << 10
	eventsInterval = 20 * time.Millisecond
)

// Events calls f for every event until ctx ends, whose error it returns. What
// happened while no agent ran comes first, as far as the ring had room. An event
// is seen within eventsInterval, or at once when many wait. f is called from this
// goroutine; while it blocks events gather in the ring, and
// are lost, counted in State.LostEvents, when that is full.
func (d *Datapath) Events(ctx context.Context, f func(abi.Event)) error {
	rd, err := ringbuf.NewReader(d.coll.Maps["events"])
	if err != nil {
		return fmt.Errorf("read events: %w", err)
	}
	defer rd.Close()
	defer context.AfterFunc(ctx, func() { rd.Close() })()
	var rec ringbuf.Record
	rd.SetDeadline(time.Now().Add(eventsInterval))
	for {
		if err := rd.ReadInto(&rec); err != nil {
			if ctx.Err() != nil {
				return ctx.Err()
			}
			if errors.Is(err, os.ErrDeadlineExceeded) { // and the ring has been read to its end
				rd.SetDeadline(time.Now().Add(eventsInterval))
				continue
			}
			return fmt.Errorf("read events: %w", err)
		}
		var ev abi.Event
		size := int(unsafe.Sizeof(ev))
		if len(rec.RawSample) < size {
			return fmt.Errorf("event of %d bytes, want %d: agent and programs do not fit together", len(rec.RawSample), size)
		}
		copy(unsafe.Slice((*byte)(unsafe.Pointer(&ev)), size), rec.RawSample)
		f(ev)
	}
}

// Held calls f for every packet that the kernel holds, until ctx ends, whose
// error it returns. Each is to be given back with ReleaseHold when its hold
// ends, whatever becomes of it.
//
// First it empties the ring: what an earlier agent held, it held for answers
// that are gone, and an old packet may be from an IP's former holder. Then it
// ticks, which lets the kernel hold. f is called from this goroutine; while it
// blocks there is no tick, and after a second the kernel holds no more: rightly,
// as nobody would decide. When Held returns the kernel stops at once.
func (d *Datapath) Held(ctx context.Context, f func(HeldPacket)) error {
	rd, err := ringbuf.NewReader(d.coll.Maps["held"])
	if err != nil {
		return fmt.Errorf("read held packets: %w", err)
	}
	defer rd.Close()
	state := d.State()
	defer state.tick(0)
	if err := d.emptyHeld(rd); err != nil {
		return err
	}
	var rec ringbuf.Record
	for ctx.Err() == nil {
		state.tick(d.Now())
		rd.SetDeadline(time.Now().Add(tickInterval))
		if err := rd.ReadInto(&rec); err != nil {
			if errors.Is(err, os.ErrDeadlineExceeded) {
				continue
			}
			return fmt.Errorf("read held packets: %w", err)
		}
		p, err := parseHeld(rec.RawSample)
		if err != nil {
			// Dropped: nothing of it may be sent. The packet was taken off the
			// stack, so it is lost, and counted.
			d.log().Error("a held packet cannot be understood", zap.Error(err))
			d.ReleaseHold(p.HoldIndex, p.Source)
			d.countLost(p, abi.ReasonMalformed)
			continue
		}
		f(p)
	}
	return ctx.Err()
}

// emptyHeld drops what is in the ring, and sets all quotas to "nothing
// outstanding".
func (d *Datapath) emptyHeld(rd *ringbuf.Reader) error {
	// No packet is held from here on; after the barrier no program is under
	// way that saw an earlier tick. So the ring and the quotas stand still.
	d.State().tick(0)
	if err := barrier(); err != nil {
		return err
	}
	if err := d.drainHeld(rd); err != nil {
		return err
	}
	for _, a := range []*array[abi.HoldQuota]{&d.quota, &d.sources} {
		for i := range a.n {
			q := a.at(i)
			atomic.StoreUint64(&q.Out, atomic.LoadUint64(&q.In))
		}
	}
	return nil
}

// drainHeld takes what there is out of a ring of held packets, and counts it.
func (d *Datapath) drainHeld(rd *ringbuf.Reader) error {
	var rec ringbuf.Record
	for {
		rd.SetDeadline(time.Now())
		err := rd.ReadInto(&rec)
		if errors.Is(err, os.ErrDeadlineExceeded) {
			return nil
		}
		if err != nil {
			return fmt.Errorf("empty the ring of held packets: %w", err)
		}
		// A record of another version may say anything; it is counted all the same.
		p, _ := parseHeld(rec.RawSample)
		d.countLost(p, abi.ReasonHoldTimeout)
	}
}

// countLost counts a held packet that nobody will send.
func (d *Datapath) countLost(p HeldPacket, why abi.Reason) {
	if !p.Passed {
		d.CountDrop(p.Direction, why)
	}
}

// barrier returns when every program that was running when it was called has
// ended: MEMBARRIER_CMD_GLOBAL waits for an RCU grace period, and programs run
// within one.
func barrier() error {
	const cmdGlobal = 1
	_, _, errno := unix.Syscall(unix.SYS_MEMBARRIER, cmdGlobal, 0, 0)
	if errno == 0 {
		return nil
	}
	if errno != unix.EINVAL && errno != unix.ENOSYS && errno != unix.EPERM {
		return fmt.Errorf("membarrier: %w", errno)
	}
	// Kernels with nohz_full CPUs refuse it. Programs end within microseconds;
	// this is long, and once per start.
	time.Sleep(100 * time.Millisecond)
	return nil
}

// ReleaseHold gives one ended hold back to the quota of its endpoint, of its
// source (HeldPacket.HoldIndex and Source), and to that of all. Safe for
// concurrent use.
func (d *Datapath) ReleaseHold(index, source uint32) {
	if source != 0 && source < d.sources.n {
		atomic.AddUint64(&d.sources.at(source).Out, 1)
	}
	if index != 0 && index < d.quota.n {
		atomic.AddUint64(&d.quota.at(index).Out, 1)
	}
	atomic.AddUint64(&d.quota.at(0).Out, 1)
}

// Outstanding returns how many packets the kernel counts as held: of one hold
// index, or of all with index 0.
func (d *Datapath) Outstanding(index uint32) uint64 {
	if index >= d.quota.n {
		return 0
	}
	q := d.quota.at(index)
	out := atomic.LoadUint64(&q.Out) // first: the difference is never negative
	return atomic.LoadUint64(&q.In) - out
}
