package agent

import (
	"maps"
	"sync"
)

// Notices are conditions that something beside the agent tells of, for its status:
// an alarm for each, as long as it has a text. The zero is ready. Safe for
// concurrent use.
type Notices struct {
	mu    sync.Mutex
	texts map[string]string
}

// Set notes a condition under its name; an empty text: it is over.
func (n *Notices) Set(name, text string) {
	n.mu.Lock()
	defer n.mu.Unlock()
	if n.texts == nil {
		n.texts = map[string]string{}
	}
	n.texts[name] = text
}

func (n *Notices) all() map[string]string {
	n.mu.Lock()
	defer n.mu.Unlock()
	return maps.Clone(n.texts)
}

// alarmNotices makes alarms of what was told.
func (l *loop) alarmNotices() {
	if l.cfg.Notices == nil {
		return
	}
	for name, text := range l.cfg.Notices.all() {
		if text == "" {
			l.alarms.clear(name)
		} else {
			l.alarms.raise(name, text)
		}
	}
}
