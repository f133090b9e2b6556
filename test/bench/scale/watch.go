package main

import (
	"context"
	"errors"
	"fmt"
	"path/filepath"
	"time"

	"github.com/cilium/ebpf"

	"portcullis/bpf/abi"
)

// look is how often the leases are looked at: far more often than they are
// renewed.
const look = 5 * time.Millisecond

// watched is what an idle agent did.
type watched struct {
	For         time.Duration `json:"for_ns"`
	CPU         time.Duration `json:"cpu_ns"`
	CPUShare    float64       `json:"cpu_share"` // of one core
	Renewals    int           `json:"renewals"`  // stores of a deadline seen in `leases`
	Leases      int           `json:"leases"`    // indices that they went to
	PerBeat     float64       `json:"stores_per_heartbeat_and_session"`
	SlotChanges int           `json:"slot_changes"` // elements of `slots` that differ afterwards
	Bindings    uint64        `json:"bindings"`
	Flows       uint64        `json:"flows"` // in conntrack, at the begin
	Load        string        `json:"load_averages"`
}

// watch looks at the agent and its maps for a while.
func (a *agent) watch(ctx context.Context, o options) (w watched, err error) {
	leases, err := ebpf.LoadPinnedMap(filepath.Join(a.pins, "maps", "leases"), &ebpf.LoadPinOptions{ReadOnly: true})
	if err != nil {
		return w, err
	}
	defer leases.Close()
	slots, err := ebpf.LoadPinnedMap(filepath.Join(a.pins, "maps", "slots"), &ebpf.LoadPinOptions{ReadOnly: true})
	if err != nil {
		return w, err
	}
	defer slots.Close()
	before, err := dump(slots)
	if err != nil {
		return w, err
	}
	if w.Bindings, w.Flows, err = a.counts(ctx); err != nil {
		return w, err
	}
	last := map[uint32]uint64{}
	stores := map[uint32]int{}
	sample := func(count bool) error {
		// Sessions take the lowest indices first; those of a session that was
		// replaced come later.
		for i := uint32(abi.LeaseFirst); i < uint32(abi.LeaseFirst)+uint32(4*o.owners); i++ {
			var l abi.Lease
			if err := leases.Lookup(i, &l); err != nil {
				return err
			}
			if l.Deadline != last[i] && count {
				stores[i]++
			}
			last[i] = l.Deadline
		}
		return nil
	}
	if err := sample(false); err != nil {
		return w, err
	}
	begin, cpu := time.Now(), cpuOf(a.pid)
	tick := time.NewTicker(look)
	defer tick.Stop()
	for time.Since(begin) < o.idle {
		select {
		case <-ctx.Done():
			return w, ctx.Err()
		case <-tick.C:
		}
		if err := sample(true); err != nil {
			return w, err
		}
	}
	w.For, w.CPU = time.Since(begin), cpuOf(a.pid)-cpu
	w.CPUShare = w.CPU.Seconds() / w.For.Seconds()
	for _, n := range stores {
		w.Renewals += n
	}
	w.Leases = len(stores)
	w.PerBeat = float64(w.Renewals) / (w.For.Seconds() / o.heartbeat.Seconds()) / float64(o.owners)
	after, err := dump(slots)
	if err != nil {
		return w, err
	}
	for i := range before {
		if before[i] != after[i] {
			w.SlotChanges++
		}
	}
	w.Load = load()
	return w, nil
}

// dump reads an array.
func dump(m *ebpf.Map) ([]abi.Slot, error) {
	var out []abi.Slot
	var cursor ebpf.MapBatchCursor
	const batch = 4096
	keys, values := make([]uint32, batch), make([]abi.Slot, batch)
	for {
		n, err := m.BatchLookup(&cursor, keys, values, nil)
		if err != nil && !errors.Is(err, ebpf.ErrKeyNotExist) {
			return nil, fmt.Errorf("read the slots: %w", err)
		}
		out = append(out, values[:n]...)
		if err != nil {
			return out, nil
		}
	}
}
