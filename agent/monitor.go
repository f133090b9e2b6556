package agent

import (
	"sync"

	"portcullis/observe/flow"
)

// monitorQueue is how many records a slow reader may lag behind.
const monitorQueue = 4096

// monitors keeps the last flow records, and fans them out to the readers of the
// local API. Safe for concurrent use. A reader that is too slow loses records
// and is told how many.
type monitors struct {
	ring    *flow.Ring         // nil: nothing is kept
	hear    func(*flow.Record) // nil: nobody; hears every record, does not block and does not keep it; set before run
	mu      sync.Mutex
	readers map[*monitor]struct{}
	lost    uint64 // records, by all readers that were ever here; guarded by mu
}

type monitor struct {
	records chan flow.Record
	match   func(*flow.Record) bool
	lost    uint64 // guarded by monitors.mu
}

// newMonitors keeps so many records, 0: none.
func newMonitors(keep int) *monitors {
	m := &monitors{readers: map[*monitor]struct{}{}}
	if keep > 0 {
		m.ring = flow.NewRing(keep)
	}
	return m
}

// maxMonitors bounds the readers: their queues are memory of the agent's.
const maxMonitors = 64

// subscribe returns a reader, to be unsubscribed when done; nil: there are too
// many.
func (m *monitors) subscribe(match func(*flow.Record) bool) *monitor {
	m.mu.Lock()
	defer m.mu.Unlock()
	if len(m.readers) >= maxMonitors {
		return nil
	}
	r := &monitor{records: make(chan flow.Record, monitorQueue), match: match}
	m.readers[r] = struct{}{}
	return r
}

func (m *monitors) unsubscribe(r *monitor) {
	m.mu.Lock()
	defer m.mu.Unlock()
	delete(m.readers, r)
}

// empty reports whether a record would be for nobody.
func (m *monitors) empty() bool {
	if m.ring != nil || m.hear != nil {
		return false
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	return len(m.readers) == 0
}

func (m *monitors) publish(record flow.Record) {
	m.keep(&record)
	if m.hear != nil {
		m.hear(&record)
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	for r := range m.readers {
		if !r.match(&record) {
			continue
		}
		select {
		case r.records <- record:
		default:
			r.lost++
			m.lost++
		}
	}
}

// keep puts a record into the ring, and nothing more.
func (m *monitors) keep(record *flow.Record) {
	if m.ring != nil {
		m.ring.Put(record)
	}
}

// counts returns how many readers there are, and how many records readers were
// too slow for.
func (m *monitors) counts() (readers int, lost uint64) {
	m.mu.Lock()
	defer m.mu.Unlock()
	return len(m.readers), m.lost
}

// lose says that records were lost before they came here: every reader missed
// them.
func (m *monitors) lose(n uint64) {
	m.mu.Lock()
	defer m.mu.Unlock()
	for r := range m.readers {
		r.lost += n
	}
}

// takeLost returns how many records the reader lost since the last call.
func (m *monitors) takeLost(r *monitor) uint64 {
	m.mu.Lock()
	defer m.mu.Unlock()
	n := r.lost
	r.lost = 0
	return n
}
