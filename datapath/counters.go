package datapath

import (
	"portcullis/bpf/abi"
)

// CounterKey names one counter. Reason is ReasonNone where a packet passed, or
// map-full where its flow could not be remembered; with VerdictAudit it passed,
// and Reason is what it would have been dropped for.
type CounterKey struct {
	Direction abi.Direction
	Verdict   abi.Verdict
	Reason    abi.Reason
}

// Counter counts packets and bytes.
type Counter = abi.Counter

// Counters returns the counters that are not 0, summed over CPUs, with the
// drops that user space decided (whose bytes are not counted). A held packet
// is counted as held, and again by what became of it.
func (d *Datapath) Counters() (map[CounterKey]Counter, error) {
	out, err := d.KernelCounters()
	if err != nil {
		return nil, err
	}
	for k, n := range d.DecidedDrops() {
		c := out[k]
		c.Packets += n
		out[k] = c
	}
	return out, nil
}

// DecidedDrops returns the drops that user space decided, by CountDrop, since this
// process began. Safe for concurrent use.
func (d *Datapath) DecidedDrops() map[CounterKey]uint64 {
	out := map[CounterKey]uint64{}
	for dir := range abi.DirMax {
		for reason := range abi.ReasonMax {
			if n := d.drops[dir][reason].Load(); n > 0 {
				out[CounterKey{dir, abi.VerdictDrop, reason}] = n
			}
		}
	}
	return out
}

// KernelCounters returns what the programs counted since their maps were made, as
// Counters does. It never falls, whatever becomes of the agent. Safe for
// concurrent use.
func (d *Datapath) KernelCounters() (map[CounterKey]Counter, error) {
	m := d.coll.Maps["counters"]
	out := map[CounterKey]Counter{}
	var perCPU []abi.Counter
	for dir := range abi.DirMax {
		for reason := range abi.ReasonMax {
			for verdict := range abi.VerdictMax {
				i := (uint32(dir)*uint32(abi.ReasonMax)+uint32(reason))*uint32(abi.VerdictMax) + uint32(verdict)
				if err := m.Lookup(i, &perCPU); err != nil {
					return nil, mapError("read counters", "counters", err)
				}
				var c Counter
				for _, v := range perCPU {
					c.Packets += v.Packets
					c.Bytes += v.Bytes
				}
				if c != (Counter{}) {
					out[CounterKey{dir, verdict, reason}] = c
				}
			}
		}
	}
	return out, nil
}

// CountDrop counts a packet that user space decided to drop: a held one. Safe
// for concurrent use. These counts begin with this process.
func (d *Datapath) CountDrop(direction abi.Direction, reason abi.Reason) {
	if direction >= abi.DirMax || reason >= abi.ReasonMax {
		direction, reason = abi.DirIngress, abi.ReasonMalformed // never uncounted (I6)
	}
	d.drops[direction][reason].Add(1)
}
