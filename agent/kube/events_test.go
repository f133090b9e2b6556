package kube

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"go.uber.org/zap"
	eventsv1 "k8s.io/api/events/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/apimachinery/pkg/runtime/schema"
)

// written is an API server that keeps events by namespace/name.
type written struct {
	mu      sync.Mutex
	events  map[string]*eventsv1.Event
	asked   int
	patches []string
	fail    error // what it answers to everything; nil: it works
}

func (w *written) create(_ context.Context, e *eventsv1.Event) error {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.asked++
	if w.fail != nil {
		return w.fail
	}
	key := e.Namespace + "/" + e.Name
	if w.events[key] != nil {
		return apierrors.NewAlreadyExists(schema.GroupResource{Resource: "events"}, e.Name)
	}
	w.events[key] = e
	return nil
}

func (w *written) patch(_ context.Context, namespace, name string, patch []byte) error {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.asked++
	if w.fail != nil {
		return w.fail
	}
	if w.events[namespace+"/"+name] == nil {
		return apierrors.NewNotFound(schema.GroupResource{Resource: "events"}, name)
	}
	w.patches = append(w.patches, string(patch))
	return nil
}

func (w *written) set(err error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.fail = err
}

// look returns how many events there are, how many patches came, and how many
// requests.
func (w *written) look() (events, patches, asked int) {
	w.mu.Lock()
	defer w.mu.Unlock()
	return len(w.events), len(w.patches), w.asked
}

// tells runs f with an Events that writes to w, in time that passes by itself.
func tells(t *testing.T, f func(t *testing.T, e *Events, w *written)) {
	t.Helper()
	synctest.Test(t, func(t *testing.T) {
		w := &written{events: map[string]*eventsv1.Event{}}
		e := newEvents(w, "n1", zap.NewNop())
		done := make(chan error)
		ctx, cancel := context.WithCancel(t.Context())
		go func() { done <- e.Run(ctx) }()
		f(t, e, w)
		cancel()
		if err := <-done; err != nil {
			t.Error(err)
		}
	})
}

func after(d time.Duration) {
	time.Sleep(d) // of the bubble: it takes no time
	synctest.Wait()
}

func drop(pod, key string) Event {
	return Event{About: About{"v1", "Pod", "shop", pod, "uid-" + pod}, Warning: true, Reason: "PacketsDropped", Action: "Drop", Key: key, Note: "to " + key, Others: "and others"}
}

func losses(e *Events) string {
	c := e.Counts()
	return fmt.Sprint("created ", c.Created, " counted ", c.Updated, " lost ", c.Lost)
}

// TestEventsCountUp: what comes again is one Event, whose count follows by and by.
func TestEventsCountUp(t *testing.T) {
	tells(t, func(t *testing.T, e *Events, w *written) {
		e.Put(drop("web", "a"))
		after(0)
		if n, p, _ := w.look(); n != 1 || p != 0 {
			t.Fatalf("after the first: %d events, %d patches", n, p)
		}
		for range 600 { // ten minutes of one a second
			e.Put(drop("web", "a"))
			after(time.Second)
		}
		n, p, _ := w.look()
		if n != 1 || p < 2 || p > 4 { // after 1, 3, 7 minutes
			t.Errorf("after ten minutes: %d events, %d patches", n, p)
		}
		after(countAgainMax)
		w.mu.Lock()
		defer w.mu.Unlock()
		if last := w.patches[len(w.patches)-1]; !strings.Contains(last, `"count":601`) {
			t.Errorf("the last patch is %s", last)
		}
	})
}

// TestEventsCountBeforeWritten: what waits is written once, with its count.
func TestEventsCountBeforeWritten(t *testing.T) {
	tells(t, func(t *testing.T, e *Events, w *written) {
		for range 5 {
			e.Put(drop("web", "a"))
		}
		after(time.Second)
		w.mu.Lock()
		defer w.mu.Unlock()
		for _, ev := range w.events {
			if ev.Series == nil || ev.Series.Count != 5 || ev.Note != "to a" || ev.Type != "Warning" || ev.ReportingInstance != "n1" || ev.EventTime.IsZero() || ev.Namespace != "shop" || ev.Regarding.UID != "uid-web" {
				t.Errorf("written: %+v", ev)
			}
		}
		if len(w.events) != 1 || len(w.patches) != 0 {
			t.Errorf("%d events, %d patches", len(w.events), len(w.patches))
		}
	})
}

// TestEventsOfOneObject: one pod's share does not grow with what happens to it.
func TestEventsOfOneObject(t *testing.T) {
	tells(t, func(t *testing.T, e *Events, w *written) {
		for i := range 1000 {
			e.Put(drop("web", fmt.Sprint(i)))
		}
		after(2 * time.Minute)
		if n, _, _ := w.look(); n != objectBurst+1 {
			t.Errorf("%d events of one pod, want %d", n, objectBurst+1)
		}
		e.Put(drop("db", "a"))
		after(2 * time.Minute)
		if n, _, _ := w.look(); n != objectBurst+2 {
			t.Errorf("another pod has none: %d", n)
		}
		one := drop("web", "more")
		for i := range 100 {
			one.Key, one.Others = fmt.Sprint("more", i), ""
			e.Put(one)
		}
		if c := e.Counts(); c.Lost["rate"] < 90 {
			t.Errorf("what is lost is not counted: %s", losses(e))
		}
	})
}

// TestEventsOfOneNode: whatever happens on a node, its agent asks no more than
// its share of the API server.
func TestEventsOfOneNode(t *testing.T) {
	tells(t, func(t *testing.T, e *Events, w *written) {
		for pod := range 10 * maxSeries {
			e.Put(drop(fmt.Sprint("p", pod), "a"))
		}
		after(0)
		if _, _, asked := w.look(); asked != nodeBurst {
			t.Errorf("%d requests at once, want %d", asked, nodeBurst)
		}
		after(10 * nodeEvery)
		if _, _, asked := w.look(); asked > nodeBurst+11 {
			t.Errorf("%d requests after %v", asked, 10*nodeEvery)
		}
		if lost := e.Counts().Lost; lost["full"]+lost["rate"] != 9*maxSeries {
			t.Errorf("of %d, %s", 10*maxSeries, losses(e))
		}
	})
}

// TestEventsWithoutServer: what happens while the API server is away is told when it
// is back; what is too old by then is counted.
func TestEventsWithoutServer(t *testing.T) {
	tells(t, func(t *testing.T, e *Events, w *written) {
		w.set(errors.New("connection refused"))
		e.Put(drop("web", "a"))
		after(5 * time.Minute)
		if _, _, asked := w.look(); asked < 5 || asked > 15 {
			t.Errorf("asked %d times in five minutes", asked)
		}
		w.set(nil)
		after(2 * retryMax)
		if n, _, _ := w.look(); n != 1 {
			t.Errorf("not told when it is back: %s", losses(e))
		}
		w.set(apierrors.NewTooManyRequests("busy", 1))
		e.Put(drop("db", "a"))
		after(2 * giveUp)
		if c := e.Counts(); c.Lost["unreachable"] != 1 {
			t.Error(losses(e))
		}
	})
}

// TestEventsRefused: an agent without the right to write asks for each, and goes on.
func TestEventsRefused(t *testing.T) {
	tells(t, func(t *testing.T, e *Events, w *written) {
		w.set(apierrors.NewForbidden(schema.GroupResource{Resource: "events"}, "x", errors.New("no")))
		for i := range 3 {
			e.Put(drop("web", fmt.Sprint(i)))
		}
		after(time.Hour)
		if _, _, asked := w.look(); asked != 3 || e.Counts().Lost["refused"] != 3 {
			t.Errorf("asked %d times, %s", asked, losses(e))
		}
	})
}

// TestEventsForgotten: an Event that the cluster has forgotten is made anew.
func TestEventsForgotten(t *testing.T) {
	tells(t, func(t *testing.T, e *Events, w *written) {
		e.Put(drop("web", "a"))
		after(time.Second)
		w.mu.Lock()
		clear(w.events)
		w.mu.Unlock()
		e.Put(drop("web", "a"))
		after(2 * countAgain)
		w.mu.Lock()
		defer w.mu.Unlock()
		if len(w.events) != 1 {
			t.Fatalf("%d events", len(w.events))
		}
		for _, ev := range w.events {
			if ev.Series == nil || ev.Series.Count != 2 {
				t.Errorf("made anew: %+v", ev)
			}
		}
	})
}

// TestSharedEvent: all agents tell of a refused policy, and there is one event.
func TestSharedEvent(t *testing.T) {
	tells(t, func(t *testing.T, e *Events, w *written) {
		shared := Event{About: About{"networking.k8s.io/v1", "NetworkPolicy", "shop", "web", "u"}, Warning: true, Reason: "PolicyRefused", Action: "Read", Key: "why", Note: "why", Shared: true}
		other := newEvents(w, "n2", zap.NewNop())
		e.Put(shared)
		after(time.Second)
		if err := other.Now(t.Context(), shared); err != nil {
			t.Error(err)
		}
		e.Put(shared)
		after(time.Hour)
		e.Put(shared) // it was forgotten here
		after(time.Hour)
		if n, p, asked := w.look(); n != 1 || p != 0 || asked != 3 {
			t.Errorf("%d events, %d patches, %d requests", n, p, asked)
		}
	})
}

func TestEventNames(t *testing.T) {
	now := time.Unix(1, 0)
	long := Event{About: About{Name: strings.Repeat("a.", 126) + "a"}}
	if name := eventName(&long, now, 7); len(name) > maxName || strings.Contains(name, "..") {
		t.Errorf("%d bytes: %s", len(name), name)
	}
	if got := cut(strings.Repeat("é", 600), maxNote); len(got) != maxNote {
		t.Errorf("cut to %d bytes", len(got))
	}
	if got := cut("é", 1); got != "" {
		t.Errorf("half a rune: %q", got)
	}
	if got := eventNamespace(About{Kind: "Node"}); got != "default" {
		t.Errorf("an event of a node is in %q", got)
	}
}

// TestAnswers: what may pass by itself is tried again, and nothing else.
func TestAnswers(t *testing.T) {
	r := schema.GroupResource{Resource: "events"}
	for _, c := range []struct {
		err  error
		want answer
	}{
		{nil, answerDone}, {errors.New("refused"), answerLater}, {context.DeadlineExceeded, answerLater},
		{apierrors.NewUnauthorized(""), answerLater}, {apierrors.NewInternalError(errors.New("x")), answerLater},
		{apierrors.NewForbidden(r, "", nil), answerRefused}, {apierrors.NewInvalid(schema.GroupKind{}, "", nil), answerRefused},
		{apierrors.NewNotFound(r, ""), answerGone}, {apierrors.NewAlreadyExists(r, ""), answerExists},
		{apierrors.NewGenericServerResponse(http.StatusServiceUnavailable, "", r, "", "", 0, true), answerLater},
	} {
		if got := answerOf(c.err); got != c.want {
			t.Errorf("%v is %d, want %d", c.err, got, c.want)
		}
	}
}
