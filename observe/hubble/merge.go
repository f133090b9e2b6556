package hubble

import (
	"context"
	"errors"
	"fmt"
	"io"
	"time"

	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/timestamppb"

	observerpb "github.com/cilium/cilium/api/v1/observer"
	relaypb "github.com/cilium/cilium/api/v1/relay"
)

// ---- merging -----------------------------------------------------------

// source is one node's part of a merge. Touched by the merger's goroutine only.
type source struct {
	name  string
	head  *observerpb.GetFlowsResponse // nil: none yet. No more than one: a node ahead of the others waits in its stream
	came  time.Time                    // when the head did
	began time.Time                    // since when the next one is waited for
	late  bool                         // it was reported, and is not waited for
	over  bool
	next  chan struct{} // its listener may read on
}

// said is what a node's listener hands to the merger.
type said struct {
	from *source
	resp *observerpb.GetFlowsResponse
	err  error // the end; io.EOF: all was said. Of who follows: it is tried again
}

type merger struct {
	patience time.Duration
	follow   bool      // until the time until has passed, if it is not zero
	until    time.Time // not changed
	sources  []*source
	in       chan said
	send     sender
	place    Place
	notices  []*observerpb.GetFlowsResponse // to be sent first
}

// retryEvery is how often a node that went is asked again, by who follows.
const retryEvery = time.Second

// listen reads a node's stream, one answer ahead of what was sent. Who follows
// asks a node that went again, for what came since.
func (m *merger) listen(ctx context.Context, s *source, c observerpb.ObserverClient, req *observerpb.GetFlowsRequest) {
	say := func(x said) bool {
		select {
		case m.in <- x:
		case <-ctx.Done():
			return false
		}
		if x.err != nil {
			return true
		}
		select {
		case <-s.next:
			return true
		case <-ctx.Done():
			return false
		}
	}
	since, follow := timestamppb.Now(), req.GetFollow()
	for {
		stream, err := c.GetFlows(ctx, req)
		heard := false
		for err == nil {
			var resp *observerpb.GetFlowsResponse
			if resp, err = stream.Recv(); err != nil {
				break
			}
			if heard = true; !say(said{s, resp, nil}) {
				return
			}
		}
		if !say(said{s, nil, err}) || !follow || m.said(err) {
			return
		}
		if heard { // else it is asked for what it was asked for
			since = timestamppb.Now()
		}
		if heard || req.GetNumber() == 0 && req.GetSince() == nil {
			req = proto.CloneOf(req)
			req.Number, req.Since = 0, since
		}
		select {
		case <-time.After(retryEvery):
		case <-ctx.Done():
			return
		}
	}
}

// followWindow is how long a flow waits for older ones of other nodes, while
// those may have nothing to say.
const followWindow = 100 * time.Millisecond

// run merges until all is said, or ctx ends.
func (m *merger) run(ctx context.Context) error {
	timer := time.NewTimer(m.patience)
	defer timer.Stop()
	over, stop := passed(m.follow, m.until)
	defer stop()
	for {
		wait, err := m.step(time.Now())
		if errors.Is(err, errEnough) {
			return nil
		}
		if err == nil && m.done() {
			return m.send.done()
		}
		if err != nil {
			return err
		}
		timer.Reset(wait)
		select {
		case x := <-m.in:
			m.hear(x, time.Now())
		case <-over:
			over = nil
			m.end(time.Now())
		case <-timer.C:
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}

var errEnough = errors.New("all that was asked for was sent")

// done reports whether nothing is to come that would be waited for.
func (m *merger) done() bool {
	for _, s := range m.sources {
		if s.head != nil || !s.over && (!s.late || m.follow) {
			return false
		}
	}
	return true
}

// hear takes in what a node said.
func (m *merger) hear(x said, now time.Time) {
	s := x.from
	switch {
	case m.follow && m.said(x.err): // its clock may be ahead of this one
		s.over = true
		return
	case x.err == nil:
		if s.head, s.came = x.resp, now; s.late {
			s.late = false
			m.report(s, relaypb.NodeState_NODE_CONNECTED, "")
		}
		return
	case m.follow && !s.late, !m.follow && !errors.Is(x.err, io.EOF):
		m.report(s, relaypb.NodeState_NODE_UNAVAILABLE, status.Convert(x.err).Message())
	}
	s.late, s.over = m.follow, !m.follow
}

// said reports whether a node that is followed has told all until the time until.
func (m *merger) said(err error) bool { return !m.until.IsZero() && errors.Is(err, io.EOF) }

// end is called when the time until which nodes are followed has passed: they say
// the rest, and who takes longer than patience is not waited for.
func (m *merger) end(now time.Time) {
	m.follow = false
	for _, s := range m.sources {
		s.began = now
	}
}

// report tells the caller of a node that went, or came back.
func (m *merger) report(s *source, state relaypb.NodeState, why string) {
	m.notices = append(m.notices, &observerpb.GetFlowsResponse{NodeName: m.place.Name(), Time: timestamppb.Now(), ResponseTypes: &observerpb.GetFlowsResponse_NodeStatus{
		NodeStatus: &relaypb.NodeStatusEvent{StateChange: state, NodeNames: []string{s.name}, Message: why}}})
}

func (m *merger) notify() error {
	for len(m.notices) > 0 {
		n := m.notices[0]
		m.notices = m.notices[1:]
		if err := m.send.put(n); err != nil {
			return err
		}
	}
	return nil
}

// step sends what may be sent now, and returns how long nothing changes by
// itself.
func (m *merger) step(now time.Time) (wait time.Duration, err error) {
	for {
		first, missing := m.first(now)
		if err := m.notify(); err != nil {
			return 0, err
		}
		if first != nil && m.follow && missing > 0 {
			missing = followWindow - now.Sub(first.came)
		}
		if missing > 0 {
			return missing, nil
		}
		if first == nil {
			return time.Hour, nil
		}
		resp := first.head
		first.head, first.began = nil, now
		first.next <- struct{}{}
		if err := m.send.put(resp); err != nil {
			return 0, err
		}
	}
}

// first returns the node with the oldest answer, nil: none has one. missing is
// how long some other node is waited for yet; 0: none is. A node whose time is
// over is reported.
func (m *merger) first(now time.Time) (first *source, missing time.Duration) {
	for _, s := range m.sources {
		switch {
		case s.head != nil:
			if first == nil || s.head.GetTime().AsTime().Before(first.head.GetTime().AsTime()) {
				first = s
			}
		case s.over || s.late:
		case m.follow:
			missing = m.patience // it may have nothing to say
		case now.Sub(s.began) >= m.patience:
			s.late = true
			m.report(s, relaypb.NodeState_NODE_UNAVAILABLE, fmt.Sprintf("no answer for %v: it is not waited for", m.patience))
		default:
			missing = max(missing, m.patience-now.Sub(s.began))
		}
	}
	return first, missing
}
