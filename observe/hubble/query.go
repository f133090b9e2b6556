package hubble

import (
	"context"
	"fmt"
	"time"

	"google.golang.org/protobuf/types/known/timestamppb"

	flowpb "github.com/cilium/cilium/api/v1/flow"
	observerpb "github.com/cilium/cilium/api/v1/observer"
	"portcullis/observe/flow"
)

// batch is how many records are read from the ring at a time.
const batch = 64

// query is a request for flows, compiled.
type query struct {
	filter       *Filter
	extra        *Extra
	mask         *Mask
	number       uint64 // 0: no bound
	first        bool
	follow       bool
	since, until time.Time // zero: no bound
}

func newQuery(req *observerpb.GetFlowsRequest) (q query, err error) {
	if q.filter, err = Compile(req.GetWhitelist(), req.GetBlacklist()); err != nil {
		return q, err
	}
	if q.mask, err = NewMask(req.GetFieldMask()); err != nil {
		return q, err
	}
	if q.extra, err = extraOf(req.GetExtensions()); err != nil {
		return q, err
	}
	for _, b := range []struct {
		name string
		from *timestamppb.Timestamp
		to   *time.Time
	}{{"since", req.GetSince(), &q.since}, {"until", req.GetUntil(), &q.until}} {
		if b.from == nil {
			continue
		}
		if err := b.from.CheckValid(); err != nil {
			return q, fmt.Errorf("%s: %w", b.name, err)
		}
		*b.to = b.from.AsTime()
	}
	q.number, q.first, q.follow = req.GetNumber(), req.GetFirst(), req.GetFollow()
	if q.first && q.follow {
		return q, fmt.Errorf("first and follow do not go together: the first flows are of the past")
	}
	return q, nil
}

// choose returns the flow that the query shows of a record, nil: none. It is
// shared with other queries, and not to be changed.
func (q *query) choose(o *Options, r *flow.Record, number uint64) *flowpb.Flow {
	if r.Lost != nil || !q.since.IsZero() && r.Time.Before(q.since) || !q.until.IsZero() && r.Time.After(q.until) || !q.extra.Match(r) {
		return nil
	}
	for _, f := range o.converted.from(o.Place, r, number) {
		if q.filter.Match(f) {
			return f
		}
	}
	return nil
}

// reader answers one query.
type reader struct {
	o    *Options
	q    query
	send func(*observerpb.GetFlowsResponse) error
	buf  []flow.Record
}

// tellsLate is for how long after its packet a record may come into the ring.
const tellsLate = time.Second

// passed returns a channel that is closed when nothing more comes of the time
// until then, nil: that is never, and stop, for who does not wait for it any more.
func passed(follow bool, until time.Time) (over <-chan struct{}, stop func()) {
	if !follow || until.IsZero() {
		return nil, func() {}
	}
	c := make(chan struct{})
	t := time.AfterFunc(time.Until(until.Add(tellsLate)), func() { close(c) })
	return c, func() { t.Stop() }
}

// run sends what the query asks for: to the end of the ring, or with follow
// until ctx ends or until has passed. A record that was overwritten before it
// could be read is told of as lost (I6).
func (r *reader) run(ctx context.Context) error {
	from, end := r.start()
	over, stop := passed(r.q.follow, r.q.until)
	defer stop()
	var sent uint64
	for {
		select {
		case <-over: // what is there now is the rest
			_, end = r.o.Ring.Bounds()
			r.q.follow, over = false, nil
		default:
		}
		if err := ctx.Err(); err != nil {
			return err
		}
		if !r.q.follow && from >= end {
			return nil
		}
		n, after, lost := r.o.Ring.Read(from, r.buf)
		if err := r.lost(lost); err != nil {
			return err
		}
		for i := range n {
			number := after - uint64(n-i)
			if !r.q.follow && number >= end {
				return nil
			}
			ok, err := r.one(&r.buf[i], number)
			if err != nil {
				return err
			}
			if ok {
				sent++
			}
			if r.q.first && r.q.number > 0 && sent == r.q.number {
				return nil
			}
		}
		from = after
		if n > 0 {
			continue
		}
		select {
		case <-r.o.Ring.Wait(from):
		case <-over:
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}

// start returns where to begin, and the end of what is there now.
func (r *reader) start() (from, end uint64) {
	oldest, end := r.o.Ring.Bounds()
	switch {
	case r.q.first || !r.q.since.IsZero() && r.q.number == 0 || r.q.number >= end-oldest && r.q.number > 0:
		return oldest, end
	case r.q.number == 0 && r.q.follow:
		return end, end
	case r.q.number == 0:
		return oldest, end
	}
	from = end
	var found uint64
	backwards(r.o.Ring, func(rec *flow.Record, number uint64) bool {
		if number >= end || r.q.choose(r.o, rec, number) == nil {
			return true
		}
		from, found = number, found+1
		return found < r.q.number
	})
	return from, end
}

// one sends a record, if the query asks for it.
func (r *reader) one(rec *flow.Record, number uint64) (sent bool, err error) {
	if rec.Lost != nil {
		return false, r.send(r.o.Place.Lost(rec.Lost, rec.Time))
	}
	f := r.q.choose(r.o, rec, number)
	if f == nil {
		return false, nil
	}
	resp := &observerpb.GetFlowsResponse{NodeName: f.GetNodeName(), Time: f.GetTime()}
	resp.ResponseTypes = &observerpb.GetFlowsResponse_Flow{Flow: r.q.mask.Apply(f)}
	return true, r.send(resp)
}

func (r *reader) lost(n uint64) error {
	if n == 0 {
		return nil
	}
	return r.send(r.o.Place.Lost(&flow.Lost{Count: n, Where: flow.LostRing}, time.Now()))
}

// Lost tells of what nobody can know. Events of the proxy are lost in its queue;
// for those over a source's share Hubble has no word.
func (p Place) Lost(l *flow.Lost, at time.Time) *observerpb.GetFlowsResponse {
	source := map[flow.LostWhere]flowpb.LostEventSource{
		flow.LostKernel: flowpb.LostEventSource_PERF_EVENT_RING_BUFFER,
		flow.LostProxy:  flowpb.LostEventSource_OBSERVER_EVENTS_QUEUE,
		flow.LostRing:   flowpb.LostEventSource_HUBBLE_RING_BUFFER,
		flow.LostSource: flowpb.LostEventSource_UNKNOWN_LOST_EVENT_SOURCE,
	}[l.Where]
	return &observerpb.GetFlowsResponse{NodeName: p.Name(), Time: timestamppb.New(at),
		ResponseTypes: &observerpb.GetFlowsResponse_LostEvents{LostEvents: &flowpb.LostEvent{Source: source, NumEventsLost: l.Count, Last: timestamppb.New(at)}}}
}
