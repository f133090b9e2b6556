package hold

import (
	"testing"
	"time"

	"portcullis/bpf/abi"
)

// A workload whose calls are refused at once gets its places back evenly, as
// many as its quota in the time that a refusal counts; nobody else waits.
func TestRefusedCallsKeepTheirPlaces(t *testing.T) {
	const places, refused = 8, 80 * time.Millisecond
	back := map[uint32]int{}
	q := NewQueue(Limits{PerEndpoint: places, Refused: refused}, func(i, _ uint32) { back[i]++ })
	arrival := int64(1000)
	refuse := func(peer, endpoint int, d abi.Direction) {
		t.Helper()
		r := rec(peer, endpoint, arrival)
		r.Direction = d
		if _, dropped := q.Add(r); dropped != nil {
			t.Fatalf("dropped: %v", dropped.Why)
		}
		if drop, _ := q.Refuse(r.Peer, arrival+1, abi.ReasonRefused); len(drop) != 1 || drop[0].Why != abi.ReasonRefused {
			t.Fatalf("refused: %v", drop)
		}
	}
	for i := range places {
		refuse(i, 1, abi.DirEgress)
	}
	refuse(20, 2, abi.DirEgress)  // another workload's call
	refuse(21, 3, abi.DirIngress) // and one to a workload
	if back[1] != 0 || back[2] != 0 || back[3] != 1 || q.Len() != 0 {
		t.Fatalf("given back at once: %v, %d packets left", back, q.Len())
	}
	for i := range places {
		free := arrival + int64(refused) + int64(i)*int64(refused)/places
		if at, ok := q.Next(); !ok || at != free {
			t.Fatalf("place %d is free at %d, %v; want %d", i, at, ok, free)
		}
		q.Expire(free - 1)
		if back[1] != i {
			t.Fatalf("%d given back too early, want %d", back[1], i)
		}
		q.Expire(free)
		if back[1] != i+1 || back[2] != 1 {
			t.Fatalf("given back: %v; want %d and 1", back, i+1)
		}
	}
	if _, ok := q.Next(); ok || len(q.lastFree) != 0 {
		t.Fatalf("something is left: %v", q.lastFree)
	}
	// What was long ago does not count; at the end everything is free.
	arrival += int64(time.Hour)
	refuse(1, 1, abi.DirEgress)
	if at, _ := q.Next(); at != arrival+int64(refused) {
		t.Fatalf("free at %d, want %d", at, arrival+int64(refused))
	}
	q.DropAll(abi.ReasonHoldTimeout)
	if back[1] != places+1 {
		t.Fatalf("given back: %v", back)
	}
}
