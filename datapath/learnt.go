package datapath

import (
	"errors"
	"net/netip"
	"unsafe"

	"github.com/cilium/ebpf"
	"golang.org/x/sys/unix"

	"portcullis/bpf/abi"
)

// IsKnown reports whether one of the known ranges covers an address.
func IsKnown(known map[netip.Prefix]abi.Range, ip netip.Addr) bool {
	return coveredBy(known, netip.PrefixFrom(ip, ip.BitLen()))
}

// PutAddress gives one address of the world a number of its own, whatever block
// it is in; false: a known range covers it, so nothing was done (I5). SetRanges
// must have been called before, and is to be told of the address from then on,
// or it removes it. Flows that were judged by the number before are not judged
// again: what that says of the address is true still.
func (d *Datapath) PutAddress(ip netip.Addr, known map[netip.Prefix]abi.Range, n uint32) (bool, error) {
	if IsKnown(known, ip) {
		return false, nil
	}
	m, k, r := d.coll.Maps["ranges"], rangeKey(netip.PrefixFrom(ip, ip.BitLen())), abi.Range{Identity: n}
	var old abi.Range
	fresh := errors.Is(m.Lookup(&k, &old), ebpf.ErrKeyNotExist)
	if err := m.Put(&k, &r); err != nil {
		return false, mapError("put "+ip.String(), "ranges", err)
	}
	if fresh {
		d.ranges.Add(1)
	}
	return true, nil
}

// Pair is the addresses of the two ends of flows.
type Pair struct{ Local, Remote netip.Addr }

// WatchFlows has sweeps tell of flows between these addresses (SweepStats.Live).
// The map must not be changed any more. Safe for concurrent use.
func (d *Datapath) WatchFlows(pairs map[Pair]struct{}) { d.watched.Store(&pairs) }

// CountFlows counts the flows that live between these addresses; the map is
// written to. It reads all of conntrack, so it is for people who ask. Safe for
// concurrent use.
func (d *Datapath) CountFlows(flows map[Pair]int) error {
	m, now := d.coll.Maps["conntrack"], d.Now()
	keys, values := make([]ctKey, sweepBatch), make([]ctValue, sweepBatch)
	var cursor ebpf.MapBatchCursor
	for done := false; !done; {
		n, err := m.BatchLookup(&cursor, keys, values, nil)
		if errors.Is(err, unix.ENOSPC) && n == 0 { // one bucket holds more than fits
			keys, values = make([]ctKey, 2*len(keys)), make([]ctValue, 2*len(values))
			continue
		}
		if done = errors.Is(err, ebpf.ErrKeyNotExist); err != nil && !done {
			return mapError("count", "conntrack", err)
		}
		for i := range n {
			k, ct := (*abi.CTKey)(unsafe.Pointer(&keys[i])), (*abi.CT)(unsafe.Pointer(&values[i]))
			if now-int64(ct.LastSeen) >= int64(lifetime(k.Proto, abi.CTFlag(ct.Flags))) {
				continue
			}
			a, b := AddrFrom(k.A), AddrFrom(k.B)
			for _, p := range []Pair{{a, b}, {b, a}} {
				if count, wanted := flows[p]; wanted {
					flows[p] = count + 1
				}
			}
		}
	}
	return nil
}

// noteLive notes a flow that lives, if somebody wants to know.
func (d *Datapath) noteLive(k *abi.CTKey, live map[Pair]struct{}) {
	pairs := d.watched.Load()
	if pairs == nil || len(*pairs) == 0 {
		return
	}
	a, b := AddrFrom(k.A), AddrFrom(k.B)
	for _, p := range []Pair{{a, b}, {b, a}} {
		if _, ok := (*pairs)[p]; ok {
			live[p] = struct{}{}
		}
	}
}
