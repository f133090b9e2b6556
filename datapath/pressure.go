package datapath

import (
	"maps"
	"math"
	"slices"
	"sync/atomic"

	"portcullis/bpf/abi"
)

// Pressure says how full a table of the kernel is. What does not fit is
// dropped or refused, counted, and never let through.
type Pressure struct {
	Name     string
	Used     uint64
	Capacity uint64
}

// Pressure returns how full everything is that has a limit, always in the same
// order:
//
//	endpoints, bindings, policy, ranges, sources
//	conntrack           flows; without those that a sweep has not counted yet
//	conntrack-endpoint  flows of the endpoint that has opened most
//	fragments           datagrams under way of the endpoint that has most, at the last sweep; with
//	                    very many, spread over more than one
//	held                packets
//	held-endpoint       packets of the endpoint that has most
//	held-source         packets of the source that has most
//	services            prefixes
//	l7-services         addresses and ports of services, of each policy set that looks inside there
//
// It looks at every slot, which takes some 0.8 ms of CPU with 131,072 of them, and
// 10 ms with 1,048,576. Safe for concurrent use.
func (d *Datapath) Pressure() ([]Pressure, error) {
	judges, err := d.judges()
	if err != nil {
		return nil, err
	}
	slots := uint64(0)
	for i := uint32(1); i < d.slots.n; i++ {
		if atomic.LoadUint64(&d.slots.at(i).Stamp) != 0 {
			slots++
		}
	}
	flows, most := uint64(max(0, d.nobodys.Load())), uint64(0)
	for i := range d.budget.n {
		n := d.flows(i)
		flows, most = flows+n, max(most, n)
	}
	return []Pressure{
		{"endpoints", uint64(len(judges)), uint64(d.cfg.Endpoints)},
		{"bindings", slots, uint64(d.cfg.Bindings)},
		{"policy", uint64(d.policies.Load()), uint64(d.cfg.Policy)},
		{"ranges", uint64(d.ranges.Load()), uint64(d.cfg.Ranges)},
		{"sources", uint64(d.prefixes.Load()), uint64(d.cfg.Sources)},
		{"conntrack", min(flows, uint64(d.cfg.Conntrack)), uint64(d.cfg.Conntrack)},
		{"conntrack-endpoint", most, uint64(d.cfg.ConntrackPerEndpoint)},
		{"fragments", uint64(d.fragments.Load()), uint64(d.cfg.FragmentsPerEndpoint)},
		{"held", d.Outstanding(0), uint64(d.cfg.HoldTotal)},
		{"held-endpoint", fullest(&d.quota), uint64(d.cfg.HoldPerEndpoint)},
		{"held-source", fullest(&d.sources), uint64(d.cfg.HoldPerSource)},
		{"services", uint64(d.services.Load()), uint64(d.cfg.Services)},
		{"l7-services", min(uint64(d.l7services.Load()), uint64(d.cfg.L7Services)), uint64(d.cfg.L7Services)},
	}, nil
}

// fullest returns the greatest number outstanding, but for index 0.
func fullest(a *array[abi.HoldQuota]) (most uint64) {
	for i := uint32(1); i < a.n; i++ {
		most = max(most, outstanding(a.at(i)))
	}
	return most
}

func outstanding(q *abi.HoldQuota) uint64 {
	out := atomic.LoadUint64(&q.Out) // first: the difference is rarely negative
	return notNegative(atomic.LoadUint64(&q.In) - out)
}

// flows returns how many conntrack entries an endpoint has, by its hold index.
func (d *Datapath) flows(i uint32) uint64 {
	b := d.budget.at(i)
	out := atomic.LoadUint64(&b.Out)
	return notNegative(atomic.LoadUint64(&b.In) - out)
}

// notNegative reads a difference as signed: it may be off by what happens at
// the moment.
func notNegative(v uint64) uint64 {
	if v > math.MaxInt64 {
		return 0
	}
	return v
}

// budgetCounts is what a pass of the sweep counts; see pc_ct_budget.
type budgetCounts struct {
	in0     []uint64
	n       []uint64
	nobodys int64
}

// beginBudgets comes before the first entry is read.
func (d *Datapath) beginBudgets() *budgetCounts {
	c := &budgetCounts{in0: make([]uint64, d.budget.n), n: make([]uint64, d.budget.n)}
	for i := range d.budget.n {
		c.in0[i] = atomic.LoadUint64(&d.budget.at(i).In)
	}
	return c
}

// left counts an entry that stays.
func (c *budgetCounts) left(budget uint32) {
	if budget == 0 || budget >= uint32(len(c.n)) {
		c.nobodys++
		return
	}
	c.n[budget]++
}

// budgetRemoved takes note of an entry that the sweep has removed.
func (d *Datapath) budgetRemoved(budget uint32) {
	if budget > 0 && budget < d.budget.n {
		atomic.AddUint64(&d.budget.at(budget).Out, 1)
	}
}

// endBudgets comes after the last entry of a pass was read, and puts right what
// the pass has proved wrong: an endpoint has at least the entries that were
// counted, and at most those and what it has made since the pass began. A pass
// that failed does not come here: its counts would be too low.
func (d *Datapath) endBudgets(c *budgetCounts) {
	for i := uint32(1); i < d.budget.n; i++ {
		b := d.budget.at(i)
		in := atomic.LoadUint64(&b.In)
		counted, made := int64(c.n[i]), int64(in-c.in0[i]) // made: less than 0 when others replaced more
		has := int64(in - atomic.LoadUint64(&b.Out))
		right := min(max(has, counted+min(0, made)), counted+max(0, made))
		if right != has {
			atomic.StoreUint64(&b.Out, in-uint64(right))
		}
	}
	d.nobodys.Store(c.nobodys)
}

// fragmentsAtOnce bounds the work of countFragments: each element is a call of
// the kernel.
const fragmentsAtOnce = 1 << 16

// countFragments looks how many datagrams are under way, for Pressure, of so many
// endpoints as are cheap; the next call goes on with the next ones. The map is
// the kernel's own; nothing depends on what is read here.
func (d *Datapath) countFragments(judges map[uint32]uint32, now int64) {
	m := d.coll.Maps["fragments"]
	at, err := offsets(m, "fragments", "endpoint", "expires")
	if err != nil {
		return
	}
	ids := make(map[uint32]uint32, len(judges))
	for id, index := range judges {
		ids[index] = id
	}
	s, v, each := &d.sweep, make([]byte, m.ValueSize()), uint32(d.cfg.FragmentsPerEndpoint)
	indexes := slices.Sorted(maps.Keys(ids))
	from, _ := slices.BinarySearch(indexes, s.fragmentsNext)
	to := min(len(indexes), from+max(1, fragmentsAtOnce/int(each)))
	for _, index := range indexes[from:to] {
		n := int64(0)
		for i := range each {
			if err := m.Lookup(index*each+i, &v); err != nil {
				break
			}
			if fromBytes[uint32](v[at[0]:at[0]+4]) == ids[index] && uint64At(v, at[1]) > uint64(now) {
				n++
			}
		}
		s.fragmentsMost = max(s.fragmentsMost, n)
	}
	if to < len(indexes) {
		s.fragmentsNext = indexes[to]
		return
	}
	d.fragments.Store(s.fragmentsMost)
	s.fragmentsNext, s.fragmentsMost = 0, 0
}
