package agent

import (
	"testing"
	"time"
)

// For how long a pod has had its IPs counts only if no agent of this boot bound
// any.
func TestHeldSince(t *testing.T) {
	n := newNode(t)
	l := n.mustStart()
	defer n.crash(l)
	w := app("a0", "10.1.1.2")
	if at := l.heldSince(&w); at != 0 {
		t.Errorf("new to it: %v", at)
	}
	w.held = time.Second
	if at := l.heldSince(&w); at <= 0 || at > l.now().Add(-w.held) {
		t.Errorf("for a second: %v, now is %v", at, l.now())
	}
	w.held = 1 << 62
	if at := l.heldSince(&w); at != 1 {
		t.Errorf("since before the boot: %v", at)
	}
	l.boundBefore = true
	if at := l.heldSince(&w); at != 0 {
		t.Errorf("although an agent bound IPs: %v", at)
	}
}
