package agent

import (
	"slices"
	"time"

	"portcullis/ipcache/lease"
)

// indexes gives out small numbers, 1 to size, least recently used first. One
// that was given back rests before it is given out again: packets under way
// may carry it (see pc_mark in bpf/abi.h).
type indexes struct {
	size int
	rest time.Duration
	free []freeIndex // oldest first
}

type freeIndex struct {
	index uint32
	since lease.Time // 0: was never in use
}

func newIndexes(size int, rest time.Duration) *indexes {
	x := &indexes{size: size, rest: rest}
	for i := 1; i <= size; i++ {
		x.free = append(x.free, freeIndex{index: uint32(i)})
	}
	return x
}

func (x *indexes) take(now lease.Time) (uint32, bool) {
	if len(x.free) == 0 || x.free[0].since != 0 && now < x.free[0].since.Add(x.rest) {
		return 0, false
	}
	i := x.free[0].index
	x.free = x.free[1:]
	return i, true
}

// reserve takes a certain number, if it is free.
func (x *indexes) reserve(i uint32) bool {
	at := slices.IndexFunc(x.free, func(f freeIndex) bool { return f.index == i })
	if at < 0 {
		return false
	}
	x.free = slices.Delete(x.free, at, at+1)
	return true
}

func (x *indexes) give(i uint32, now lease.Time) { x.free = append(x.free, freeIndex{i, now}) }
