package datapath

import (
	"cmp"
	"errors"
	"fmt"
	"maps"
	"net/netip"
	"slices"
	"sync/atomic"

	"github.com/cilium/ebpf"

	"portcullis/bpf/abi"
)

// FoldRanges puts known ranges and the numbers of the world's blocks into one
// table of prefixes. A block within a known range is left out: what covers its
// IPs then is the known range, so no block makes one of them world (I5).
func FoldRanges[N ~uint32](known map[netip.Prefix]abi.Range, world map[netip.Prefix]N) map[netip.Prefix]abi.Range {
	out := maps.Clone(known)
	for p, n := range world {
		if !coveredBy(known, p) {
			out[p] = abi.Range{Identity: uint32(n)}
		}
	}
	// To the kernel IPv4 is a part of IPv6: no block there may cover it.
	if all4 := netip.PrefixFrom(netip.IPv4Unspecified(), 0); len(world) > 0 {
		if _, ok := out[all4]; !ok {
			out[all4] = abi.Range{Identity: uint32(abi.IDWorld)}
		}
	}
	return out
}

// coveredBy reports whether all of a prefix is in a known range.
func coveredBy(known map[netip.Prefix]abi.Range, p netip.Prefix) bool {
	for bits := p.Bits(); bits >= 0; bits-- {
		if shorter, err := p.Addr().Prefix(bits); err == nil {
			if _, ok := known[shorter]; ok {
				return true
			}
		}
	}
	return false
}

// SetRanges makes the ranges those given. At no time is an IP of a known range
// taken for one of the world (I5), nor for one of a region that it is not in:
//
//	put what is known         an IP is in its known range, whatever comes after
//	put the rest, longest first    where a region has a hole, the hole is there first
//	remove the rest, shortest first    what a region had as a hole goes after it
//	remove what is not known any more
//
// On failure what is done is done, and the caller repeats it. Where there is no
// room for a known range, the narrowest prefix around it that has an entry becomes
// known until there is: what is in it needs a binding, and the world in it is shut
// out (I6). So the families' roots always have entries, as the world.
func (d *Datapath) SetRanges(want map[netip.Prefix]abi.Range) error {
	desired := map[abi.RangeKey]abi.Range{}
	for p, r := range want {
		if !p.IsValid() {
			return fmt.Errorf("range %v is not a prefix", p)
		}
		desired[rangeKey(p)] = r
	}
	actual, err := d.rangesInKernel()
	if err != nil {
		return err
	}
	m := d.coll.Maps["ranges"]
	world := abi.Range{Identity: uint32(abi.IDWorld)}
	for _, root := range roots {
		if _, ok := desired[root]; !ok {
			desired[root] = world
		}
		if _, ok := actual[root]; !ok { // says what its lack says
			if err := m.Put(&root, &world); err != nil {
				return mapError("set ranges", "ranges", err)
			}
			actual[root] = world
		}
	}
	steps := rangeSteps(actual, desired)
	if len(steps) > 0 {
		// Flows that were judged by range are judged again (I5); also after a
		// change that was made by half.
		defer d.bumpRangeEpoch()
	}
	var failed error
	for _, s := range steps {
		known := !s.remove && s.value.Flags&uint32(abi.RangeKnown) != 0
		if failed != nil && !known {
			break // nothing is opened
		}
		var err error
		switch {
		case !s.remove:
			err = m.Put(&s.key, &s.value)
		default:
			if err = m.Delete(&s.key); errors.Is(err, ebpf.ErrKeyNotExist) {
				err = nil
			}
		}
		switch {
		case err == nil && known:
			actual[s.key] = s.value
		case err != nil && known:
			failed = errors.Join(failed, mapError("set ranges", "ranges", err), d.shutAround(s.key, actual))
		case err != nil:
			failed = mapError("set ranges", "ranges", err)
		}
	}
	if failed != nil {
		return errors.Join(failed, d.shutWithin(want, actual))
	}
	d.ranges.Store(int64(len(desired)))
	return nil
}

// roots are all of IPv6, and all of IPv4.
var roots = []abi.RangeKey{rangeKey(netip.PrefixFrom(netip.IPv6Unspecified(), 0)), rangeKey(netip.PrefixFrom(netip.IPv4Unspecified(), 0))}

// shutAround makes known what an address in the prefix finds, for want of an entry
// of its own.
func (d *Datapath) shutAround(key abi.RangeKey, actual map[abi.RangeKey]abi.Range) error {
	in := prefixOf(key)
	for bits := in.Bits(); bits >= 0; bits-- {
		around := rangeKey(netip.PrefixFrom(in.Addr(), bits))
		if _, ok := actual[around]; ok {
			return d.shut(around, actual)
		}
	}
	return fmt.Errorf("%s has no entry around it", in)
}

// shutWithin makes known the world's blocks within known ranges, which were to be
// removed.
func (d *Datapath) shutWithin(want map[netip.Prefix]abi.Range, actual map[abi.RangeKey]abi.Range) error {
	known := map[netip.Prefix]abi.Range{}
	for p, r := range want {
		if r.Flags&uint32(abi.RangeKnown) != 0 {
			known[p.Masked()] = r
		}
	}
	for k := range actual {
		if coveredBy(known, prefixOf(k)) {
			if err := d.shut(k, actual); err != nil {
				return err
			}
		}
	}
	return nil
}

// shut makes an entry known; there is room for that.
func (d *Datapath) shut(k abi.RangeKey, actual map[abi.RangeKey]abi.Range) error {
	if actual[k].Flags&uint32(abi.RangeKnown) != 0 {
		return nil
	}
	r := abi.Range{Flags: uint32(abi.RangeKnown)}
	if err := d.coll.Maps["ranges"].Put(&k, &r); err != nil {
		return mapError("shut "+prefixOf(k).String(), "ranges", err)
	}
	actual[k] = r
	return nil
}

type rangeStep struct {
	key    abi.RangeKey
	value  abi.Range
	remove bool
}

// rangeSteps is the way from one state of the map to another; see SetRanges.
func rangeSteps(actual, desired map[abi.RangeKey]abi.Range) []rangeStep {
	var steps []rangeStep
	for k, r := range desired {
		if old, ok := actual[k]; !ok || old != r {
			steps = append(steps, rangeStep{key: k, value: r})
		}
	}
	for k, r := range actual {
		if _, ok := desired[k]; !ok {
			steps = append(steps, rangeStep{key: k, value: r, remove: true})
		}
	}
	turn := func(s rangeStep) int {
		known := s.value.Flags&uint32(abi.RangeKnown) != 0
		switch {
		case !s.remove && known:
			return 0
		case !s.remove:
			return 1
		case !known:
			return 2
		}
		return 3
	}
	slices.SortFunc(steps, func(a, b rangeStep) int {
		shorter := cmp.Compare(a.key.Prefixlen, b.key.Prefixlen)
		if !a.remove {
			shorter = -shorter
		}
		return cmp.Or(cmp.Compare(turn(a), turn(b)), shorter)
	})
	return steps
}

// Ranges returns the ranges in the kernel: at the start, those of an earlier
// agent.
func (d *Datapath) Ranges() (map[netip.Prefix]abi.Range, error) {
	actual, err := d.rangesInKernel()
	if err != nil {
		return nil, err
	}
	out := map[netip.Prefix]abi.Range{}
	for k, r := range actual {
		out[prefixOf(k)] = r
	}
	return out, nil
}

// prefixOf is the inverse of rangeKey.
func prefixOf(k abi.RangeKey) netip.Prefix {
	ip, bits := netip.AddrFrom16(k.Addr), int(k.Prefixlen)
	if ip.Is4In6() && bits >= 96 {
		ip, bits = ip.Unmap(), bits-96
	}
	return netip.PrefixFrom(ip, bits)
}

func (d *Datapath) rangesInKernel() (map[abi.RangeKey]abi.Range, error) {
	actual := map[abi.RangeKey]abi.Range{}
	var k abi.RangeKey
	var v abi.Range
	it := d.coll.Maps["ranges"].Iterate()
	for it.Next(&k, &v) {
		actual[k] = v
	}
	return actual, mapError("read ranges", "ranges", it.Err())
}

func (d *Datapath) bumpRangeEpoch() { atomic.AddUint64(&d.state.at(0).RangeEpoch, 1) }

// outsideRanges reports whether flows with the IP may have been judged by its
// range. When it cannot tell, it says yes, which costs a judgement each.
func (d *Datapath) outsideRanges(ip abi.Addr) bool {
	var r abi.Range
	err := d.coll.Maps["ranges"].Lookup(&abi.RangeKey{Prefixlen: 128, Addr: ip}, &r)
	return err != nil || r.Flags&uint32(abi.RangeKnown) == 0
}

func rangeKey(p netip.Prefix) abi.RangeKey {
	p = p.Masked()
	k := abi.RangeKey{Prefixlen: uint32(p.Bits()), Addr: Addr(p.Addr())}
	if p.Addr().Is4() {
		k.Prefixlen += 96
	}
	return k
}

// SetUplinks makes the uplinks those given, by ifindex. Those that are none
// any more go first. On failure fewer devices may be uplinks than asked for,
// never more; it may be repeated.
func (d *Datapath) SetUplinks(ifindices []int) error {
	m := d.coll.Maps["uplinks"]
	want := map[uint32]bool{}
	for _, i := range ifindices {
		if i <= 0 {
			return fmt.Errorf("uplink %d is not an interface index", i)
		}
		want[uint32(i)] = true
	}
	var k uint32
	var v abi.Uplink
	var stale []uint32
	it := m.Iterate()
	for it.Next(&k, &v) {
		if !want[k] {
			stale = append(stale, k)
		}
	}
	if err := it.Err(); err != nil {
		return mapError("read uplinks", "uplinks", err)
	}
	for _, k := range stale {
		if err := m.Delete(k); err != nil && !errors.Is(err, ebpf.ErrKeyNotExist) {
			return mapError("set uplinks", "uplinks", err)
		}
	}
	for k := range want {
		if err := m.Put(k, &abi.Uplink{}); err != nil {
			return mapError("set uplinks", "uplinks", err)
		}
	}
	return nil
}
