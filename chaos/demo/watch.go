package demo

import (
	"context"
	"fmt"
	"slices"
	"sync"
	"time"

	"portcullis/agent/api"
	"portcullis/chaos/lab"
)

// watch collects the flow events of one agent, as `portcullis monitor` shows
// them, from before something is done.
type watch struct {
	cancel context.CancelFunc
	done   chan struct{}

	mu     sync.Mutex
	events []*api.FlowEvent // guarded by mu
	lost   uint64           // guarded by mu; events that the stream or the kernel's ring had no room for
}

// watchNode subscribes at a node's agent; on return nothing that happens later
// is missed. The caller stops it.
func watchNode(ctx context.Context, l *lab.Lab, node string, req *api.MonitorRequest) (*watch, error) {
	c, err := l.Client(node)
	if err != nil {
		return nil, err
	}
	ctx, cancel := context.WithCancel(ctx)
	stream, err := c.Monitor(ctx, req)
	if err == nil {
		_, err = stream.Header() // sent when we are subscribed
	}
	if err != nil {
		cancel()
		return nil, fmt.Errorf("monitor of node %s: %w", node, err)
	}
	w := &watch{cancel: cancel, done: make(chan struct{})}
	go func() {
		defer close(w.done)
		for {
			m, err := stream.Recv()
			if err != nil {
				return // stopped, or the agent is gone: what is missing shows
			}
			w.mu.Lock()
			if f := m.GetFlow(); f != nil {
				w.events = append(w.events, f)
			}
			w.lost += m.GetLost().GetCount()
			w.mu.Unlock()
		}
	}()
	return w, nil
}

// stop ends the subscription and waits until it has ended.
func (w *watch) stop() {
	w.cancel()
	<-w.done
}

// lostEvents returns how many events did not arrive.
func (w *watch) lostEvents() uint64 {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.lost
}

// between counts the events from a to b, and returns the time of the last
// (CLOCK_BOOTTIME ns).
func (w *watch) between(a, b int64) (n int, last int64) {
	w.mu.Lock()
	defer w.mu.Unlock()
	for _, e := range w.events {
		if t := int64(e.GetBootTime()); t >= a && t < b {
			n, last = n+1, max(last, t)
		}
	}
	return n, last
}

// find returns the first event of any of the watches that is wanted, waiting
// for at most limit; nil if there is none.
func find(watches []*watch, limit time.Duration, wanted func(*api.FlowEvent) bool) *api.FlowEvent {
	for deadline := time.Now().Add(limit); ; {
		for _, w := range watches {
			w.mu.Lock()
			i := slices.IndexFunc(w.events, wanted)
			var e *api.FlowEvent
			if i >= 0 {
				e = w.events[i]
			}
			w.mu.Unlock()
			if e != nil {
				return e
			}
		}
		if !time.Now().Before(deadline) {
			return nil
		}
		time.Sleep(10 * time.Millisecond)
	}
}

// describe writes an event as one line of the story.
func describe(e *api.FlowEvent) string {
	return fmt.Sprintf("monitor of node %s: %s (%s) %s:%d -> %s:%d %s, identity %s -> %s, evidence %s, generation %d",
		e.GetNode(), e.GetVerdict(), e.GetReason(), e.GetSource().GetIp(), e.GetSource().GetPort(),
		e.GetDestination().GetIp(), e.GetDestination().GetPort(), e.GetProtocol(),
		e.GetSource().GetText(), e.GetDestination().GetText(), e.GetEvidence(), e.GetGeneration())
}
