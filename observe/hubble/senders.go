package hubble

import (
	"sync/atomic"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"

	observerpb "github.com/cilium/cilium/api/v1/observer"
)

// sender takes answers in their order.
type sender interface {
	put(*observerpb.GetFlowsResponse) error // errEnough: no more are wanted
	done() error                            // all was put
	end()                                   // nobody uses it any more
}

type plainSender struct {
	send func(*observerpb.GetFlowsResponse) error
}

func (s *plainSender) put(r *observerpb.GetFlowsResponse) error { return s.send(r) }
func (s *plainSender) done() error                              { return nil }
func (s *plainSender) end()                                     {}

// firstSender sends so many flows.
type firstSender struct {
	send func(*observerpb.GetFlowsResponse) error
	left uint64
}

func (s *firstSender) put(r *observerpb.GetFlowsResponse) error {
	if r.GetFlow() != nil {
		if s.left == 0 {
			return errEnough
		}
		s.left--
	}
	return s.send(r)
}
func (s *firstSender) done() error { return nil }
func (s *firstSender) end()        {}

// room is what all requests together may keep. Safe for concurrent use.
type room struct {
	most int64 // bytes, as they are sent: in memory they are a few times as many
	used atomic.Int64
}

// mostKept is the room of a relay: of some 70,000 flows.
const mostKept = 64 << 20

func (r *room) take(n int64) error {
	if r.used.Add(n) > r.most {
		r.used.Add(-n)
		return status.Errorf(codes.ResourceExhausted, "requests for the last flows keep %d MiB already: ask for fewer, or again later", r.most>>20)
	}
	return nil
}

// lastSender sends the last flows, when all are known, and what is no flow at
// once.
type lastSender struct {
	send func(*observerpb.GetFlowsResponse) error
	most int
	room *room
	kept []keptFlow // a ring, once it has most
	next int        // the oldest of a full one
}

type keptFlow struct {
	resp *observerpb.GetFlowsResponse
	size int64
}

func (s *lastSender) put(r *observerpb.GetFlowsResponse) error {
	if r.GetFlow() == nil {
		return s.send(r)
	}
	k := keptFlow{r, int64(proto.Size(r))}
	if len(s.kept) < s.most {
		if err := s.room.take(k.size); err != nil {
			return err
		}
		s.kept = append(s.kept, k)
		return nil
	}
	old := &s.kept[s.next]
	if err := s.room.take(k.size - old.size); err != nil {
		return err
	}
	*old, s.next = k, (s.next+1)%s.most
	return nil
}

func (s *lastSender) done() error {
	for i := range s.kept {
		if err := s.send(s.kept[(s.next+i)%len(s.kept)].resp); err != nil {
			return err
		}
	}
	return nil
}

func (s *lastSender) end() {
	for _, k := range s.kept {
		s.room.used.Add(-k.size)
	}
	s.kept = nil
}
