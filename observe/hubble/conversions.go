package hubble

import (
	"sync"

	flowpb "github.com/cilium/cilium/api/v1/flow"
	"portcullis/observe/flow"
)

// conversions keeps what the last records were converted to, so that a record is
// converted once, and not by each of those who follow. Who lags behind the others
// by more than there are places converts for itself. Safe for concurrent use.
//
//	record number modulo kept
//	         v
//	[ n+4 ][ n+1 ][ n+2 ][ n+3 ]      of each place the youngest
type conversions struct {
	places [keptConversions]struct {
		mu    sync.Mutex
		of    uint64 // record number + 1; 0: none yet
		flows []*flowpb.Flow
	}
}

// keptConversions are some 4 KB each.
const keptConversions = 256

// from is Place.From. What it returns is shared, and not to be changed.
func (c *conversions) from(p Place, r *flow.Record, number uint64) []*flowpb.Flow {
	if c == nil {
		return p.From(r, number)
	}
	at := &c.places[number%keptConversions]
	at.mu.Lock()
	defer at.mu.Unlock() // others who want this record wait, and then have it
	if at.of == number+1 {
		return at.flows
	}
	flows := p.From(r, number)
	if at.of < number+1 {
		at.of, at.flows = number+1, flows
	}
	return flows
}
