package ipcache

// fifo is a queue of free indices: what was freed last is used last. Indices
// that were never used come before all others.
type fifo struct {
	fresh, end uint32          // never used: fresh..end-1
	taken      map[uint32]bool // of those, removed out of turn
	freed      []uint32
}

func newFIFO(first, end uint32) fifo { return fifo{fresh: first, end: end, taken: map[uint32]bool{}} }

func (f *fifo) pop() (uint32, bool) {
	for f.fresh < f.end {
		i := f.fresh
		f.fresh++
		if !f.taken[i] {
			return i, true
		}
		delete(f.taken, i)
	}
	if len(f.freed) == 0 {
		return 0, false
	}
	i := f.freed[0]
	f.freed = f.freed[1:]
	return i, true
}

func (f *fifo) push(i uint32) { f.freed = append(f.freed, i) }

// remove takes an index that was never given out. Taking it twice is harmless.
func (f *fifo) remove(i uint32) {
	if i >= f.fresh && i < f.end {
		f.taken[i] = true
	}
}
