package kube

import (
	"context"
	"fmt"
	"sync"
	"time"

	"go.uber.org/zap"
)

// About is the object that an event tells of.
type About struct {
	APIVersion, Kind, Namespace, Name, UID string
}

// Event is something that people are told of one object. What is the same again,
// that is of one object with one reason and key, counts up in one Event of the
// cluster, with the first one's words.
type Event struct {
	About   About
	Warning bool
	Reason  string // CamelCase, at most 128 bytes
	Action  string // what the agent did, CamelCase, at most 128 bytes
	Note    string // one sentence for people; cut at 1,024 bytes
	Key     string // distinguishes events of one object and reason
	// Others is the note of the one event that counts it when the object has had
	// its share of events; "": it is lost then, and counted.
	Others string
	// Shared: every agent tells it, so it has a name that follows from what it
	// says, and whoever is first writes it.
	Shared bool
}

// Rates and bounds of what one agent writes. A node's share is what the API server
// must bear of each node when all of them have something to tell.
const (
	nodeBurst   = 32
	nodeEvery   = 5 * time.Second // one more write
	objectBurst = 8
	objectEvery = time.Minute // one more event of one object
	maxSeries   = 1024        // known at a time, those that wait to be written among them
	maxObjects  = 1024        // whose shares are known

	countAgain    = time.Minute      // between an event and its first new count; doubles up to
	countAgainMax = 16 * time.Minute // this
	seriesQuiet   = 20 * time.Minute // then it is another event
	giveUp        = 10 * time.Minute // what could not be written for so long
	retryFirst    = time.Second      // after the API server failed; doubles up to
	retryMax      = time.Minute      // this
)

// EventCounts tell how events fared since the start.
type EventCounts struct {
	Created, Updated uint64
	// Lost by why: rate (the object had had its share), full (too many waited),
	// refused (by the API server), unreachable (for too long).
	Lost map[string]uint64
}

// EventLosses are the keys of EventCounts.Lost.
var EventLosses = []string{"rate", "full", "refused", "unreachable"}

// Events writes events, rate-limited and in the background. Its methods are safe
// for concurrent use; all but Run and Now do not block. A nil Events takes
// everything and writes nothing.
type Events struct {
	sink     eventSink
	instance string // names this agent
	log      *zap.Logger
	wake     chan struct{} // of capacity 1

	mu      sync.Mutex
	series  map[seriesKey]*series // guarded by mu
	objects map[About]*bucket     // guarded by mu
	node    bucket                // guarded by mu
	counts  EventCounts           // guarded by mu
	names   uint64                // guarded by mu; given so far
	retryAt time.Time             // guarded by mu; the API server failed
	pause   time.Duration         // guarded by mu; after it fails the next time
	refused bool                  // guarded by mu; the last write was, and that was logged
	forgot  time.Time             // guarded by mu; when forget looked last
}

type seriesKey struct {
	about       About
	reason, key string
}

// series are events that are one in the cluster.
type series struct {
	key         seriesKey
	event       Event
	name        string // of the object
	first, last time.Time
	count, told uint64        // so often; as the cluster knows
	due         time.Time     // not written before
	again       time.Duration // to the next new count
	created     bool
	foreign     bool // another agent's: its count is not ours to change
}

// bucket is a token bucket; the zero is full.
type bucket struct {
	used float64
	at   time.Time
}

// refill gives back what came since, and returns what is used of the burst.
func (b *bucket) refill(now time.Time, every time.Duration) float64 {
	b.used = max(0, b.used-float64(now.Sub(b.at))/float64(every))
	b.at = now
	return b.used
}

// take takes a token, if there is one.
func (b *bucket) take(now time.Time, burst int, every time.Duration) bool {
	if b.refill(now, every)+1 > float64(burst) {
		return false
	}
	b.used++
	return true
}

// wait returns when there is a token.
func (b *bucket) wait(now time.Time, burst int, every time.Duration) time.Duration {
	over := b.refill(now, every) + 1 - float64(burst)
	return max(0, time.Duration(over*float64(every)))
}

func newEvents(sink eventSink, instance string, log *zap.Logger) *Events {
	return &Events{sink: sink, instance: instance, log: log, wake: make(chan struct{}, 1), series: map[seriesKey]*series{}, objects: map[About]*bucket{},
		pause: retryFirst, counts: EventCounts{Lost: map[string]uint64{}}}
}

// Put has an event written, counted in an earlier one, or lost.
func (e *Events) Put(ev Event) {
	if e == nil {
		return
	}
	now := time.Now()
	e.mu.Lock()
	defer e.mu.Unlock()
	key := seriesKey{ev.About, ev.Reason, ev.Key}
	if e.count(key, now) {
		return
	}
	if !e.object(ev.About, now) {
		key.key = "" // of which there is one for each reason: that is bound enough
		if ev.Others == "" {
			e.counts.Lost["rate"]++
			return
		}
		if e.count(key, now) {
			return
		}
		ev.Note, ev.Key = ev.Others, ""
	}
	if len(e.series) >= maxSeries {
		e.forget(now)
	}
	if len(e.series) >= maxSeries {
		e.counts.Lost["full"]++
		return
	}
	e.names++
	e.series[key] = &series{key: key, event: ev, name: eventName(&ev, now, e.names), first: now, last: now, count: 1, due: now, again: countAgain}
	e.poke()
}

func (e *Events) poke() {
	select {
	case e.wake <- struct{}{}:
	default:
	}
}

// count counts one more of what is known, with mu held.
func (e *Events) count(key seriesKey, now time.Time) bool {
	s := e.series[key]
	if s == nil || now.Sub(s.last) > seriesQuiet {
		return false
	}
	s.count++
	s.last = now
	if s.created && s.told+1 == s.count { // Run sleeps for longer than until this is due, perhaps
		e.poke()
	}
	return true
}

// object takes one of an object's share, with mu held.
func (e *Events) object(about About, now time.Time) bool {
	b := e.objects[about]
	if b == nil {
		if len(e.objects) >= maxObjects {
			e.forget(now)
		}
		if len(e.objects) >= maxObjects {
			return false
		}
		b = &bucket{at: now}
		e.objects[about] = b
	}
	return b.take(now, objectBurst, objectEvery)
}

// forget drops, with mu held, what has nothing more to say. It looks at everything,
// so not for each event of a flood.
func (e *Events) forget(now time.Time) {
	if now.Sub(e.forgot) < time.Second {
		return
	}
	e.forgot = now
	for key, s := range e.series {
		if s.created && (s.told == s.count || s.foreign) && now.Sub(s.last) > seriesQuiet {
			delete(e.series, key)
		}
	}
	for about, b := range e.objects {
		if b.refill(now, objectEvery) == 0 {
			delete(e.objects, about)
		}
	}
}

// Counts tells how events fared.
func (e *Events) Counts() EventCounts {
	out := EventCounts{Lost: map[string]uint64{}}
	if e == nil {
		return out
	}
	e.mu.Lock()
	defer e.mu.Unlock()
	out.Created, out.Updated = e.counts.Created, e.counts.Updated
	for why, n := range e.counts.Lost {
		out.Lost[why] = n
	}
	return out
}

// next returns, with mu held, what is to be written now, or how long nothing is.
func (e *Events) next(now time.Time) (*series, time.Duration) {
	var first *series
	for key, s := range e.series {
		if s.told == s.count || s.foreign {
			if now.Sub(s.last) > seriesQuiet {
				delete(e.series, key)
			}
			continue
		}
		// What nobody has heard of goes before a new count, then the earlier.
		if first == nil || s.due.Before(first.due) && s.created == first.created || !s.created && first.created && !s.due.After(now) {
			first = s
		}
	}
	if first == nil {
		return nil, seriesQuiet
	}
	wait := max(first.due.Sub(now), e.retryAt.Sub(now), e.node.wait(now, nodeBurst, nodeEvery))
	if wait > 0 {
		return nil, wait
	}
	e.node.take(now, nodeBurst, nodeEvery)
	return first, 0
}

// Run writes until ctx ends. What waits then is lost with the process.
func (e *Events) Run(ctx context.Context) error {
	timer := time.NewTimer(0)
	defer timer.Stop()
	for {
		e.mu.Lock()
		s, wait := e.next(time.Now())
		var w write
		if s != nil {
			w = s.write()
		}
		e.mu.Unlock()
		if s != nil {
			e.wrote(s, w, e.send(ctx, w))
			if ctx.Err() == nil {
				continue
			}
		}
		timer.Reset(wait)
		select {
		case <-ctx.Done():
			return nil
		case <-e.wake:
		case <-timer.C:
		}
	}
}

// Now writes one event before it returns, whatever the rates say: for an agent
// that ends. It waits for the API server, at most until ctx ends.
func (e *Events) Now(ctx context.Context, ev Event) error {
	if e == nil {
		return nil
	}
	now := time.Now()
	e.mu.Lock()
	e.names++
	s := &series{event: ev, name: eventName(&ev, now, e.names), first: now, last: now, count: 1}
	e.mu.Unlock()
	err := e.sink.create(ctx, s.write().object(e.instance))
	if err != nil && answerOf(err) != answerExists {
		return fmt.Errorf("tell of %s %s: %w", ev.About.Kind, ev.About.Name, err)
	}
	return nil
}

// wrote takes up what became of a write.
func (e *Events) wrote(s *series, w write, err error) {
	now := time.Now()
	e.mu.Lock()
	defer e.mu.Unlock()
	switch what := answerOf(err); {
	case what == answerDone, what == answerExists && !w.created:
		e.done(s, w, what, now)
	case what == answerGone && w.created:
		// The cluster has forgotten it; it is told anew, under another name.
		e.names++
		s.created, s.name = false, eventName(&s.event, now, e.names)
	case what == answerLater && now.Sub(w.due) < giveUp:
		e.retryAt = now.Add(e.pause)
		e.pause = min(2*e.pause, retryMax)
	default:
		why := "refused"
		if what == answerLater {
			why = "unreachable"
			e.retryAt = now.Add(e.pause)
		} else if !e.refused {
			e.refused = true
			e.log.Warn("the API server refuses an Event; further ones are counted", zap.String("about", s.event.About.Kind+" "+s.event.About.Namespace+"/"+s.event.About.Name), zap.Error(err))
		}
		e.counts.Lost[why] += s.count - s.told
		if e.series[s.key] == s { // and no later one of the same key
			delete(e.series, s.key)
		}
	}
}

// done notes, with mu held, what the cluster knows now.
func (e *Events) done(s *series, w write, what answer, now time.Time) {
	e.pause, e.refused = retryFirst, false
	if w.created {
		e.counts.Updated++
	} else if what == answerDone {
		e.counts.Created++
	}
	// One of that name is there: another agent's, or our own, of a write whose
	// answer did not come.
	s.created, s.foreign, s.told = true, s.event.Shared, w.count
	s.due = now.Add(s.again)
	s.again = min(2*s.again, countAgainMax)
}
