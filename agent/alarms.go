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
	count uint64
}

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
	r.count++
}

func (a *alarms) clear(name string) {
	a.mu.Lock()
	defer a.mu.Unlock()
	delete(a.raised, name)
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
