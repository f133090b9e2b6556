package datapath

import (
	"errors"
	"math"
	"net/netip"
	"slices"
	"sync/atomic"
	"time"
	"unsafe"

	"github.com/cilium/ebpf"
	"golang.org/x/sys/unix"

	"portcullis/bpf/abi"
)

// The sweep walks through conntrack in passes. A pass is cut into steps, one
// each SweepInterval, and takes the longer the emptier the map is: while little
// is in it, nothing hurries. What is over is gone when the next pass has come
// by, so at most one pass (and a step) after its end.
const (
	// SweepInterval is how often SweepStep is to be called.
	SweepInterval = time.Second
	// SweepPass is the longest that a pass takes. See paces.
	SweepPass = 30 * time.Second
)

// paces: from so many per cent in use on, of the whole or of one endpoint's
// share, a pass takes so long.
var paces = []struct {
	percent uint64
	pass    time.Duration
}{{90, 2 * time.Second}, {50, 5 * time.Second}, {25, 15 * time.Second}, {0, SweepPass}}

func passTime(percent uint64) time.Duration {
	for _, p := range paces {
		if percent >= p.percent {
			return p.pass
		}
	}
	return SweepPass
}

const (
	sweepBatch = 1024 // entries that one system call reads
	// A step looks at no fewer entries, so a map with little in it is done at once.
	sweepLeast = 2 * sweepBatch
)

// SweepStats is what a step, or a whole sweep, found.
type SweepStats struct {
	Entries int // looked at
	Expired int // removed: past their lifetime
	Dead    int // removed: endpoint or binding ended
	Failed  int // could not be removed; tried again in the next pass
	// Used are the IPs whose present binding carried packets since the pass
	// before began, each once, sorted. The first pass of a process tells of
	// every flow that lives, and so does one from time to time: a connection
	// that is silent for hours needs its binding, for a reply counts from no
	// other (I4).
	Used []netip.Addr
	// Live are the pairs of WatchFlows between which a flow lives, each once in a
	// step: all of them in a pass.
	Live []Pair
}

// sweep is where the sweep stands. Guarded by Datapath.sweepMu.
type sweep struct {
	keys   []ctKey
	values []ctValue
	used   map[netip.Addr]struct{} // in this step
	live   map[Pair]struct{}       // in this step

	running bool
	cursor  ebpf.MapBatchCursor
	began   int64 // this pass, or the last one
	since   int64 // packets since then tell of use
	all     bool  // silent flows tell of it, too
	lastAll int64 // when the last such pass began that was finished
	entries int   // looked at in this pass
	counts  *budgetCounts
	last    int // entries of the last whole pass

	fragmentsNext uint32 // hold index with which countFragments goes on
	fragmentsMost int64  // that it has seen since it began
}

// SweepStep does the next bit of the work of removing what nobody needs any
// more from conntrack; now is CLOCK_BOOTTIME in ns. Called every SweepInterval,
// it looks at every entry once in a pass, which takes no longer than longest
// and SweepPass, and 2 seconds when 90 % are in use. Of each binding with a flow
// that lives Used tells at least once in any twice longest (and two steps). Entries that
// come while a pass is under way may be missed by it, or seen twice. It may run
// beside everything else, but only once at a time.
//
// After an error the pass begins anew with the next step.
func (d *Datapath) SweepStep(now int64, longest time.Duration) (SweepStats, error) {
	d.sweepMu.Lock()
	defer d.sweepMu.Unlock()
	s := &d.sweep
	flows, percent := d.fill()
	pass := int64(min(passTime(percent), longest))
	if !s.running && s.began != 0 && now < s.began+pass {
		return SweepStats{}, nil
	}
	// So many that the pass is through in time; if it is late, all.
	expected := max(flows, uint64(s.last), uint64(s.entries))
	share := int(expected*uint64(SweepInterval)/uint64(pass)) + 1
	if s.began == 0 || s.running && now >= s.began+pass {
		return d.sweepSome(now, 0, longest/2) // late; or the first, from which budgets are known
	}
	return d.sweepSome(now, max(share, sweepLeast), longest/2)
}

// SweepConntrack does a whole pass at once, and every ten seconds tells of
// silent flows, too.
func (d *Datapath) SweepConntrack(now int64) (SweepStats, error) {
	d.sweepMu.Lock()
	defer d.sweepMu.Unlock()
	d.sweep.running = false
	return d.sweepSome(now, 0, 10*time.Second)
}

// fill returns how many flows there are, and how full conntrack is, in per
// cent: the whole, or the share of the endpoint that has most.
func (d *Datapath) fill() (flows, percent uint64) {
	most := uint64(0)
	flows = uint64(max(0, d.nobodys.Load()))
	for i := range d.budget.n {
		n := d.flows(i)
		flows, most = flows+n, max(most, n)
	}
	percent = 100 * flows / uint64(max(1, d.cfg.Conntrack))
	if d.cfg.ConntrackPerEndpoint > 0 {
		percent = max(percent, 100*most/uint64(d.cfg.ConntrackPerEndpoint))
	}
	return flows, percent
}

// beginPass comes before the first entry of a pass is read.
func (d *Datapath) beginPass(now int64, allEvery time.Duration) {
	s := &d.sweep
	if s.keys == nil {
		s.keys, s.values = make([]ctKey, sweepBatch), make([]ctValue, sweepBatch)
		s.used, s.live = map[netip.Addr]struct{}{}, map[Pair]struct{}{}
	}
	s.running, s.cursor, s.entries = true, ebpf.MapBatchCursor{}, 0
	// last_seen may be a tick late. Twice used does no harm, never used would
	// have a binding in use released.
	s.since = s.began - int64(clockTick)
	if s.all = now-s.lastAll >= int64(allEvery); s.all {
		s.since = math.MinInt64
	}
	s.began = now
	s.counts = d.beginBudgets()
}

// endPass comes after the last.
func (d *Datapath) endPass() {
	s := &d.sweep
	d.endBudgets(s.counts)
	s.counts, s.last = nil, s.entries
	if s.all {
		s.lastAll = s.began
	}
}

// sweepSome looks at about so many entries, or 0: at all that are left of the
// pass.
func (d *Datapath) sweepSome(now int64, entries int, allEvery time.Duration) (stats SweepStats, err error) {
	s := &d.sweep
	defer func() {
		if err != nil {
			s.running = false
		}
	}()
	judges, err := d.judges()
	if err != nil {
		return stats, err
	}
	if !s.running {
		d.beginPass(now, allEvery)
	}
	m := d.coll.Maps["conntrack"]
	clear(s.used)
	clear(s.live)
	for s.running && (entries == 0 || stats.Entries < entries) {
		n, err := m.BatchLookup(&s.cursor, s.keys, s.values, nil)
		if errors.Is(err, unix.ENOSPC) && n == 0 {
			// One bucket holds more than fits: a flood of colliding keys.
			s.keys, s.values = make([]ctKey, 2*len(s.keys)), make([]ctValue, 2*len(s.values))
			continue
		}
		if s.running = !errors.Is(err, ebpf.ErrKeyNotExist); err != nil && s.running {
			return stats, mapError("sweep", "conntrack", err)
		}
		for i := range n {
			d.sweepOne(m, &s.keys[i], &s.values[i], now, judges, &stats)
		}
		s.entries += n
	}
	if !s.running {
		d.endPass()
		d.countFragments(judges, now)
	}
	for ip := range s.used {
		stats.Used = append(stats.Used, ip)
	}
	slices.SortFunc(stats.Used, netip.Addr.Compare)
	for p := range s.live {
		stats.Live = append(stats.Live, p)
	}
	return stats, nil
}

// sweepOne looks at one entry, and removes it if it is over.
func (d *Datapath) sweepOne(m *ebpf.Map, key *ctKey, value *ctValue, now int64, judges map[uint32]uint32, stats *SweepStats) {
	stats.Entries++
	s := &d.sweep
	k, ct := (*abi.CTKey)(unsafe.Pointer(key)), (*abi.CT)(unsafe.Pointer(value))
	judged, standing := false, false
	for i := range ct.Judgement {
		j := &ct.Judgement[i]
		if j.Endpoint == 0 {
			continue
		}
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
		// The stamp first: it is all that is wanted of most.
		if atomic.LoadUint64(&d.slots.at(j.Slot).Stamp) != j.Stamp {
			continue
		}
		standing = true
		if int64(ct.LastSeen) > s.since {
			if slot, ok := d.slot(j.Slot); ok && slot.Stamp == j.Stamp {
				s.used[AddrFrom(slot.IP)] = struct{}{}
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
		s.counts.left(ct.Budget)
		d.noteLive(k, s.live)
		return
	}
	removed, budget, err := removeUnused(m, key, ct.LastSeen)
	d.budgetRemoved(budget)
	switch {
	case err != nil:
		stats.Failed++
		if !removed {
			s.counts.left(ct.Budget)
		}
	case !removed:
		s.counts.left(ct.Budget)
	case dead:
		stats.Dead++
	default:
		stats.Expired++
	}
}

// removeUnused removes an entry unless a packet has renewed it since it was
// read: no live flow loses its entry. Its time is looked at once more just
// before, and again in what was removed. One that is renewed in the
// microsecond between is put back, as the kernel wrote it, seal and all, and a
// packet that comes until then is judged as a first one. What remains is a
// program that found the entry before it was removed and writes its time after:
// that renewal is lost with the entry, and the flow's next packet is judged as
// a first one, too. It never passes because of an entry that is gone, and it
// can only meet a flow that had been silent for its whole lifetime.
//
// budget is of the entry that is gone by this; 0: of none.
func removeUnused(m *ebpf.Map, key *ctKey, lastSeen uint64) (removed bool, budget uint32, err error) {
	var v ctValue
	err = m.Lookup(key, &v)
	if err == nil && decodeCT(&v).LastSeen != lastSeen {
		return false, 0, nil
	}
	if err == nil {
		err = m.LookupAndDelete(key, &v)
	}
	if errors.Is(err, ebpf.ErrKeyNotExist) {
		return true, 0, nil // nobody's any more
	}
	if err != nil {
		return false, 0, err
	}
	ct := decodeCT(&v)
	if ct.LastSeen == lastSeen {
		return true, ct.Budget, nil
	}
	err = m.Update(key, &v, ebpf.UpdateNoExist)
	if errors.Is(err, ebpf.ErrKeyExist) {
		return false, ct.Budget, nil // the flow began anew and has its own entry, which is right
	}
	if err != nil {
		return true, ct.Budget, err
	}
	return false, 0, nil
}

// judges returns the ids of the endpoints, with their hold indices.
func (d *Datapath) judges() (map[uint32]uint32, error) {
	m := d.coll.Maps["endpoints"]
	out := map[uint32]uint32{}
	ifindexes, eps := make([]uint32, 128), make([]abi.Endpoint, 128)
	var cursor ebpf.MapBatchCursor
	for done := false; !done; {
		n, err := m.BatchLookup(&cursor, ifindexes, eps, nil)
		if errors.Is(err, unix.ENOSPC) && n == 0 {
			ifindexes, eps = make([]uint32, 2*len(ifindexes)), make([]abi.Endpoint, 2*len(eps))
			continue
		}
		if done = errors.Is(err, ebpf.ErrKeyNotExist); err != nil && !done {
			return nil, mapError("sweep", "endpoints", err)
		}
		for i := range n {
			if eps[i].ID != 0 {
				out[eps[i].ID] = eps[i].HoldIndex
			}
		}
	}
	return out, nil
}
