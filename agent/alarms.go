package agent

import (
	"slices"
	"strings"
	"sync"
	"time"
)

// alarm is a condition that an operator must know of (I6).
type alarm struct {
	name  string
	text  string
	since time.Time
	last  time.Time
	count uint64
}

// alarmLife is how long an alarm stands after its last occurrence, unless it
// is cleared before. Conditions that go on are raised again and again.
const alarmLife = 10 * time.Minute

// standing are alarms that wait for an operator: they are raised once, and stand
// until they are cleared.
var standing = map[string]bool{"policies-lost": true, "policy-not-applied": true, "uplink": true, "conflict": true, "ranges": true, "node-missing": true,
	"policy-refused": true, "node-unusable": true, "policy-failed": true, "relabel-failed": true, "services": true, "migration": true, "watch": true, "node-unmanaged": true, "processes": true}

// alarms holds the conditions raised and not cleared. Safe for concurrent use.
type alarms struct {
	mu     sync.Mutex
	raised map[string]*alarm
}

func newAlarms() *alarms { return &alarms{raised: map[string]*alarm{}} }

// raise counts one more occurrence; the text of the last one is kept.
func (a *alarms) raise(name, text string) {
	a.mu.Lock()
	defer a.mu.Unlock()
	r := a.raised[name]
	if r == nil {
		r = &alarm{name: name, since: time.Now()}
		a.raised[name] = r
	}
	r.text = text
	r.last = time.Now()
	r.count++
}

func (a *alarms) clear(name string) {
	a.mu.Lock()
	defer a.mu.Unlock()
	delete(a.raised, name)
}

// expire clears what did not occur for alarmLife.
func (a *alarms) expire() {
	a.mu.Lock()
	defer a.mu.Unlock()
	for name, r := range a.raised {
		if !standing[name] && time.Since(r.last) > alarmLife {
			delete(a.raised, name)
		}
	}
}

func (a *alarms) list() []alarm {
	a.mu.Lock()
	defer a.mu.Unlock()
	out := make([]alarm, 0, len(a.raised))
	for _, r := range a.raised {
		out = append(out, *r)
	}
	slices.SortFunc(out, func(x, y alarm) int { return strings.Compare(x.name, y.name) })
	return out
}
