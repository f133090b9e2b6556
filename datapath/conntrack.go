package datapath

import (
	"errors"
	"math"
	"net/netip"
	"slices"
	"time"
	"unsafe"

	"github.com/cilium/ebpf"
	"golang.org/x/sys/unix"

	"portcullis/bpf/abi"
)

// How long an entry stays after its last packet. A packet that passes renews
// it. Entries are not needed for safety, every packet is judged by them only
// while stamp, lease and epoch are right; they are what tells a reply.
const (
	lifeTCPSyn         = 60 * time.Second  // no reply yet
	lifeTCPEstablished = 6 * time.Hour     // seen both ways
	lifeTCPHalfClosed  = 5 * time.Minute   // one side has finished
	lifeTCPClosing     = 10 * time.Second  // both have, or a reset
	lifeUDP            = 60 * time.Second  // one way
	lifeUDPReplied     = 180 * time.Second // both ways
	lifeICMP           = 30 * time.Second
	lifeOther          = 60 * time.Second
	// Of an entry all of whose judgements are of ended endpoints: nobody can
	// use it. Not 0, as an endpoint may be younger than the list of endpoints.
	lifeNoJudge = 10 * time.Second
	// Of an entry all of whose judgements name bindings that ended. It can
	// renew itself when the same workload is confirmed again, so that its
	// replies keep their direction.
	lifeDead = 60 * time.Second
)

const sweepBatch = 4096

// usedEvery is how often Used tells of silent flows too: the agent refuses to
// give bindings back sooner than after 15 s.
const usedEvery = 10 * time.Second

// SweepStats is what one sweep of conntrack found.
type SweepStats struct {
	Entries int // before the sweep
	Expired int // removed: past their lifetime
	Dead    int // removed: endpoint or binding ended
	Failed  int // could not be removed; tried again next time
	// Used are the IPs whose present binding carried packets since the last
	// sweep, each once. The first sweep of a process tells of every flow that
	// lives, and so does one every ten seconds: a connection that is silent
	// for hours needs its binding, for a reply counts from no other (I4).
	Used []netip.Addr
}

type (
	ctKey   [unsafe.Sizeof(abi.CTKey{})]byte
	ctValue [unsafe.Sizeof(abi.CT{})]byte
)

// SweepConntrack removes entries that nobody needs any more; now is
// CLOCK_BOOTTIME in ns. Entries that change while it runs may be missed, or
// seen twice. It may run beside everything else, but only once at a time.
func (d *Datapath) SweepConntrack(now int64) (SweepStats, error) {
	d.sweepMu.Lock()
	defer d.sweepMu.Unlock()
	var stats SweepStats
	judges, err := d.judges()
	if err != nil {
		return stats, err
	}
	d.countFragments(judges, now)
	counts := d.beginBudgets()
	// last_seen may be a tick late. Twice used does no harm, never used would
	// have a binding in use released.
	since := d.lastSweep - int64(clockTick)
	all := now-d.lastAll >= int64(usedEvery)
	if all {
		since = math.MinInt64
	}
	m := d.coll.Maps["conntrack"]
	used := map[netip.Addr]bool{}
	keys, values := make([]ctKey, sweepBatch), make([]ctValue, sweepBatch)
	var cursor ebpf.MapBatchCursor
	for done := false; !done; {
		n, err := m.BatchLookup(&cursor, keys, values, nil)
		if errors.Is(err, unix.ENOSPC) && n == 0 {
			// One bucket holds more than fits: a flood of colliding keys.
			keys, values = make([]ctKey, 2*len(keys)), make([]ctValue, 2*len(values))
			continue
		}
		if done = errors.Is(err, ebpf.ErrKeyNotExist); err != nil && !done {
			return stats, mapError("sweep", "conntrack", err)
		}
		for i := range n {
			if d.sweepOne(m, &keys[i], &values[i], now, since, judges, used, &stats) {
				counts.left(decodeCT(&values[i]).Budget)
			}
		}
	}
	d.endBudgets(counts)
	for ip := range used {
		stats.Used = append(stats.Used, ip)
	}
	slices.SortFunc(stats.Used, netip.Addr.Compare)
	d.lastSweep = now
	if all {
		d.lastAll = now
	}
	return stats, nil
}

// sweepOne looks at one entry, and reports whether it is left in the map.
func (d *Datapath) sweepOne(m *ebpf.Map, key *ctKey, value *ctValue, now, since int64, judges map[uint32]uint32, used map[netip.Addr]bool, stats *SweepStats) bool {
	stats.Entries++
	k, ct := (*abi.CTKey)(unsafe.Pointer(key)), decodeCT(value)
	judged, standing := false, false
	for _, j := range ct.Judgement {
		if _, ok := judges[j.Endpoint]; !ok {
			continue
		}
		judged = true
		if j.Stamp == 0 {
			standing = true // needed no evidence
			continue
		}
		if j.Slot == 0 || j.Slot >= d.slots.n {
			continue
		}
		if s, ok := d.slot(j.Slot); ok && s.Stamp == j.Stamp {
			standing = true
			if int64(ct.LastSeen) > since {
				used[AddrFrom(s.IP)] = true
			}
		}
	}
	life, dead := lifetime(k.Proto, abi.CTFlag(ct.Flags)), true
	switch {
	case !judged:
		life = min(life, lifeNoJudge)
	case !standing:
		life = min(life, lifeDead)
	default:
		dead = false
	}
	if now-int64(ct.LastSeen) < int64(life) {
		return true
	}
	removed, err := removeUnused(m, key, ct.LastSeen)
	switch {
	case err != nil:
		stats.Failed++
		return true
	case !removed:
		return true
	case dead:
		stats.Dead++
	default:
		stats.Expired++
	}
	return false
}

// removeUnused removes an entry unless a packet has renewed it since it was
// read: no live flow loses its entry. One that is renewed just when it is
// removed is put back, as the kernel wrote it, seal and all; a packet within
// these microseconds is judged as a first one.
func removeUnused(m *ebpf.Map, key *ctKey, lastSeen uint64) (removed bool, err error) {
	var ct ctValue
	err = m.Lookup(key, &ct)
	if err == nil && decodeCT(&ct).LastSeen != lastSeen {
		return false, nil
	}
	if err == nil {
		err = m.LookupAndDelete(key, &ct)
	}
	if errors.Is(err, ebpf.ErrKeyNotExist) {
		return true, nil // nobody's any more
	}
	if err != nil || decodeCT(&ct).LastSeen == lastSeen {
		return err == nil, err
	}
	// A flow that began anew meanwhile has its own entry: then it is right.
	if err := m.Update(key, &ct, ebpf.UpdateNoExist); err != nil && !errors.Is(err, ebpf.ErrKeyExist) {
		return true, err
	}
	return false, nil
}

func decodeCT(v *ctValue) (ct abi.CT) {
	*(*ctValue)(unsafe.Pointer(&ct)) = *v
	return ct
}

// Types of protocols that x/sys has no name for.
const protoSCTP = 132

func lifetime(proto uint8, flags abi.CTFlag) time.Duration {
	replied := flags&abi.CTSeenReply != 0
	switch proto {
	case unix.IPPROTO_TCP, protoSCTP: // SCTP sets the same flags
		const fin = abi.CTFinForward | abi.CTFinReply
		switch {
		case flags&abi.CTRst != 0 || flags&fin == fin:
			return lifeTCPClosing
		case flags&fin != 0:
			return lifeTCPHalfClosed
		case replied:
			return lifeTCPEstablished
		}
		return lifeTCPSyn
	case unix.IPPROTO_UDP:
		if replied {
			return lifeUDPReplied
		}
		return lifeUDP
	case unix.IPPROTO_ICMP, unix.IPPROTO_ICMPV6:
		return lifeICMP
	}
	return lifeOther
}

// judges returns the ids of the endpoints, with their hold indices.
func (d *Datapath) judges() (map[uint32]uint32, error) {
	out := map[uint32]uint32{}
	var ifindex uint32
	var ep abi.Endpoint
	it := d.coll.Maps["endpoints"].Iterate()
	for it.Next(&ifindex, &ep) {
		if ep.ID != 0 {
			out[ep.ID] = ep.HoldIndex
		}
	}
	if err := it.Err(); err != nil {
		return nil, mapError("sweep", "endpoints", err)
	}
	return out, nil
}
