package flow

import "sync"

// chunk is how many records of a Ring are allocated at a time: a node with
// few flows pays for few.
const chunk = 512

// Ring keeps the last records of a node. It never blocks who writes: the oldest
// record makes room, and a reader that has not read it yet learns how many it
// missed. Records are numbered from 0 as they come. Safe for concurrent use.
//
//	oldest                      next
//	  v                          v
//	  [ r ][ r ][ r ] ... [ r ]       at most size of them
type Ring struct {
	mu     sync.Mutex
	chunks [][]Record    // by number modulo size; nil until needed
	size   uint64        // never 0
	next   uint64        // number of the next record
	awake  chan struct{} // closed when one comes; nil: nobody waits
}

// NewRing returns a ring of size records, at least 1.
func NewRing(size int) *Ring {
	n := uint64(max(1, size))
	return &Ring{chunks: make([][]Record, (n+chunk-1)/chunk), size: n}
}

// Size returns how many records the ring can keep.
func (r *Ring) Size() int { return int(r.size) }

// Put adds a record.
func (r *Ring) Put(record *Record) {
	r.mu.Lock()
	defer r.mu.Unlock()
	at := r.next % r.size
	c := &r.chunks[at/chunk]
	if *c == nil {
		*c = make([]Record, min(chunk, r.size-at))
	}
	(*c)[at%chunk] = *record
	r.next++
	if r.awake != nil {
		close(r.awake)
		r.awake = nil
	}
}

// Bounds returns the number of the oldest record that is kept, and of the next
// one that will come: as many have come so far.
func (r *Ring) Bounds() (oldest, next uint64) {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.oldest(), r.next
}

func (r *Ring) oldest() uint64 {
	if r.next > r.size {
		return r.next - r.size
	}
	return 0
}

// Read copies records from number from on into buf: n of them. after is the
// number that follows the last one read; lost is how many records from from on
// were overwritten before this call, and are not among those n.
func (r *Ring) Read(from uint64, buf []Record) (n int, after, lost uint64) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if o := r.oldest(); from < o {
		lost, from = o-from, o
	}
	for n < len(buf) && from < r.next {
		at := from % r.size
		buf[n] = r.chunks[at/chunk][at%chunk]
		n, from = n+1, from+1
	}
	return n, from, lost
}

// Wait returns a channel that is closed once the record of that number has
// come; it is closed already if it has.
func (r *Ring) Wait(number uint64) <-chan struct{} {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.next > number {
		return closed
	}
	if r.awake == nil {
		r.awake = make(chan struct{})
	}
	return r.awake
}

var closed = func() chan struct{} { c := make(chan struct{}); close(c); return c }()
