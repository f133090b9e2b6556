package datapath

import (
	"math"
	"sync/atomic"

	"portcullis/bpf/abi"
)

// State are the counters that outlive the agent. Safe for concurrent use.
type State struct{ p *abi.State }

// ReserveStamps takes n stamps and returns the first of them. Stamps are
// never 0, and never given out twice while the pins stand.
func (s *State) ReserveStamps(n uint64) (first uint64) {
	return atomic.AddUint64(&s.p.NextStamp, n) - n
}

// NextEndpointID returns an id that no endpoint had before; 0, which
// AddEndpoint refuses, when all 2^32 are used up.
func (s *State) NextEndpointID() uint32 { return next32(&s.p.NextEndpoint) }

// NextPolicySet returns a set number that was not used before; 0, which
// PutPolicy refuses, when all 2^32 are used up.
func (s *State) NextPolicySet() uint32 { return next32(&s.p.NextPolicy) }

func next32(p *uint64) uint32 {
	v := atomic.AddUint64(p, 1) - 1
	if v > math.MaxUint32 {
		return 0 // never wrap: a number used twice would make old judgements count
	}
	return uint32(v)
}

// LastGeneration returns the greatest generation that SetLastGeneration saw.
func (s *State) LastGeneration() uint64 { return atomic.LoadUint64(&s.p.LastGeneration) }

// SetLastGeneration remembers a generation. It never goes back.
func (s *State) SetLastGeneration(g uint64) {
	for {
		old := atomic.LoadUint64(&s.p.LastGeneration)
		if g <= old || atomic.CompareAndSwapUint64(&s.p.LastGeneration, old, g) {
			return
		}
	}
}

// LostEvents returns how many events found the ring full. Verdicts and
// counters are not affected.
func (s *State) LostEvents() uint64 { return atomic.LoadUint64(&s.p.LostEvents) }

// LimitedEvents returns how many events were not told because their source had had
// its share, Config.EventsPerSource. Verdicts and counters are not affected.
func (s *State) LimitedEvents() uint64 { return atomic.LoadUint64(&s.p.LimitedEvents) }

func (s *State) tick(now int64) { atomic.StoreUint64(&s.p.ReaderTick, uint64(now)) }
