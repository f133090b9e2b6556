package agent

import (
	"testing"
	"time"
)

func TestIndexesRest(t *testing.T) {
	x := newIndexes(2, time.Second)
	a, _ := x.take(100)
	b, ok := x.take(100)
	if !ok || a == b || a == 0 || b == 0 {
		t.Fatalf("took %d and %d", a, b)
	}
	x.give(b, 100)
	x.give(a, 200)
	if i, ok := x.take(100); ok {
		t.Errorf("index %d was given out before it had rested", i)
	}
	if i, ok := x.take(100 + 1e9); !ok || i != b {
		t.Errorf("took %d, want %d, which rested longest", i, b)
	}
	if !x.reserve(a) || x.reserve(a) {
		t.Error("an index is reserved once")
	}
	if _, ok := x.take(1e12); ok {
		t.Error("took one that is in use")
	}
}
