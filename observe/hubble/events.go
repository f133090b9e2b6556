package hubble

import (
	"sync"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/timestamppb"

	flowpb "github.com/cilium/cilium/api/v1/flow"
	observerpb "github.com/cilium/cilium/api/v1/observer"
)

// keptEvents is how many events of the agent are kept.
const keptEvents = 1024

// Events keeps the last events of the agent: endpoints, policies and bindings
// that came, changed and went. Safe for concurrent use; a nil one takes none.
type Events struct {
	mu    sync.Mutex
	list  []agentEvent // a ring, once it is full
	next  uint64       // number of the next one
	awake chan struct{}
}

type agentEvent struct {
	at time.Time
	ev *flowpb.AgentEvent
}

// NewEvents returns an empty list.
func NewEvents() *Events { return &Events{awake: make(chan struct{})} }

// Put adds an event, which is not changed any more. The oldest one makes room.
func (e *Events) Put(at time.Time, ev *flowpb.AgentEvent) {
	if e == nil {
		return
	}
	e.mu.Lock()
	defer e.mu.Unlock()
	if len(e.list) < keptEvents {
		e.list = append(e.list, agentEvent{at, ev})
	} else {
		e.list[e.next%keptEvents] = agentEvent{at, ev}
	}
	e.next++
	close(e.awake)
	e.awake = make(chan struct{})
}

// read returns the events from a number on, the number after them, and a channel
// that is closed when there are more.
func (e *Events) read(from uint64) (out []agentEvent, next uint64, more <-chan struct{}) {
	if e == nil {
		return nil, 0, nil
	}
	e.mu.Lock()
	defer e.mu.Unlock()
	from = max(from, e.next-uint64(len(e.list)))
	for n := from; n < e.next; n++ {
		out = append(out, e.list[n%keptEvents])
	}
	return out, e.next, e.awake
}

// GetAgentEvents implements observer.ObserverServer.
func (s *Server) GetAgentEvents(req *observerpb.GetAgentEventsRequest, stream grpc.ServerStreamingServer[observerpb.GetAgentEventsResponse]) error {
	leave, err := s.streams.enter(stream.Context())
	if err != nil {
		return err
	}
	defer leave()
	for _, t := range []*timestamppb.Timestamp{req.GetSince(), req.GetUntil()} {
		if t != nil && t.CheckValid() != nil {
			return status.Error(codes.InvalidArgument, "since, until: no time")
		}
	}
	if req.GetFirst() && req.GetFollow() {
		return status.Error(codes.InvalidArgument, "first and follow do not go together")
	}
	over, stop := passed(req.GetFollow(), untilOf(req.GetUntil()))
	defer stop()
	events, next, more := s.o.Events.read(0)
	for {
		for _, e := range chosen(req, events) {
			resp := &observerpb.GetAgentEventsResponse{AgentEvent: e.ev, NodeName: s.o.Place.Name(), Time: timestamppb.New(e.at)}
			if err := stream.Send(resp); err != nil {
				return err
			}
		}
		if !req.GetFollow() {
			return nil
		}
		req = &observerpb.GetAgentEventsRequest{Follow: true, Since: req.Since, Until: req.Until, Number: keptEvents} // all that is new
		select {
		case <-over: // what came until now is the rest
			req.Follow, over = false, nil
		case <-more:
		case <-stream.Context().Done():
			return status.FromContextError(stream.Context().Err()).Err()
		}
		events, next, more = s.o.Events.read(next)
	}
}

func untilOf(t *timestamppb.Timestamp) time.Time {
	if t == nil {
		return time.Time{}
	}
	return t.AsTime()
}

// chosen returns the events that a request asks for, of those that are there.
func chosen(req *observerpb.GetAgentEventsRequest, events []agentEvent) []agentEvent {
	var out []agentEvent
	for _, e := range events {
		if (req.Since == nil || !e.at.Before(req.Since.AsTime())) && (req.Until == nil || !e.at.After(req.Until.AsTime())) {
			out = append(out, e)
		}
	}
	n := len(out)
	if req.GetNumber() > 0 {
		n = int(min(req.GetNumber(), uint64(n)))
	} else if req.GetFollow() && req.Since == nil {
		n = 0
	}
	if req.GetFirst() {
		return out[:n]
	}
	return out[len(out)-n:]
}
