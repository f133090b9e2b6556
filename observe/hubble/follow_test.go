package hubble

import (
	"context"
	"errors"
	"fmt"
	"io"
	"slices"
	"sync"
	"testing"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/fieldmaskpb"
	"google.golang.org/protobuf/types/known/timestamppb"

	flowpb "github.com/cilium/cilium/api/v1/flow"
	observerpb "github.com/cilium/cilium/api/v1/observer"
)

// Who follows until a time has an end, though nothing more comes, or though
// flows come without end.
func TestFollowUntil(t *testing.T) {
	soon := func() *timestamppb.Timestamp { return timestamppb.New(time.Now().Add(time.Second)) }
	t.Run("nothing comes", func(t *testing.T) {
		w := newWorld(t, 100, 10)
		got, err := w.flows(&observerpb.GetFlowsRequest{Follow: true, Number: 2, Until: soon()}, 1000)
		if err != nil || !slices.Equal(numbers(got), []int{8, 9}) {
			t.Errorf("%v, %v", numbers(got), err)
		}
	})
	t.Run("it is past", func(t *testing.T) {
		w := newWorld(t, 100, 10)
		got, err := w.flows(&observerpb.GetFlowsRequest{Follow: true, Number: 100, Until: at(5)}, 1000)
		if err != nil || !slices.Equal(numbers(got), upTo(0, 5, 1)) {
			t.Errorf("%v, %v", numbers(got), err)
		}
	})
	t.Run("flows without end", func(t *testing.T) {
		w := newWorld(t, 100, 10)
		ctx, cancel := context.WithCancel(t.Context())
		var feeder sync.WaitGroup
		feeder.Go(func() {
			for ctx.Err() == nil {
				r := record(1)
				r.Time = time.Now()
				w.ring.Put(r)
			}
		})
		until := soon()
		got, err := w.flows(&observerpb.GetFlowsRequest{Follow: true, Until: until, FieldMask: &fieldmaskpb.FieldMask{Paths: []string{"time"}}}, 1<<30)
		cancel()
		feeder.Wait()
		if err != nil || len(got) == 0 {
			t.Errorf("%d answers, %v", len(got), err)
		}
		if i := slices.IndexFunc(got, func(r *observerpb.GetFlowsResponse) bool {
			return r.GetFlow() != nil && r.GetTime().AsTime().After(until.AsTime())
		}); i >= 0 {
			t.Errorf("of a later time: %v", got[i])
		}
	})
	t.Run("events of the agent", func(t *testing.T) {
		w := newWorld(t, 1, 0)
		w.events.Put(time.Now(), &flowpb.AgentEvent{Type: flowpb.AgentEventType_AGENT_STARTED})
		ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
		defer cancel()
		stream, err := w.GetAgentEvents(ctx, &observerpb.GetAgentEventsRequest{Follow: true, Number: 1, Until: soon()})
		if err != nil {
			t.Fatal(err)
		}
		if _, err := stream.Recv(); err != nil {
			t.Fatal(err)
		}
		if _, err := stream.Recv(); !errors.Is(err, io.EOF) {
			t.Errorf("%v, want the end", err)
		}
	})
}

// Through a relay too, with a node that is dead; and none that has said all is
// reported.
func TestRelayFollowsUntil(t *testing.T) {
	w := newRelayed(t, 3, 30, false)
	w.nodes[2].Stop()
	got, err := w.flows(&observerpb.GetFlowsRequest{Follow: true, Number: 1000, Until: timestamppb.New(time.Now().Add(time.Second))}, 1000)
	want := slices.DeleteFunc(upTo(0, 29, 1), func(n int) bool { return n%3 == 2 })
	if have := numbers(got); err != nil || !slices.Equal(have, want) {
		t.Errorf("%v, %v; want %v", have, err, want)
	}
	for _, r := range got {
		if s := r.GetNodeStatus(); s != nil && !slices.Equal(s.GetNodeNames(), []string{"c"}) {
			t.Errorf("reported: %v", s)
		}
	}
}

// A record is converted once for all who follow, and what each of them does with
// it is seen by no other.
func TestConvertedOnce(t *testing.T) {
	var c conversions
	p := Place{Node: "n1"}
	first := c.from(p, record(7), 7)
	if again := c.from(p, record(7), 7); &first[0] != &again[0] {
		t.Error("the same record is converted twice")
	}
	young := c.from(p, record(1), 7+keptConversions)
	if got := c.from(p, record(7), 7)[0].GetL4().GetTCP().GetDestinationPort(); got != 7 {
		t.Errorf("who lags is shown record %d", got)
	}
	if again := c.from(p, record(1), 7+keptConversions); &young[0] != &again[0] {
		t.Error("who lags has put an old record in place of a young one")
	}
}

func TestManyFollow(t *testing.T) {
	w := newWorld(t, 4096, 0)
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	const records = 500
	var readers sync.WaitGroup
	for i := range 12 {
		req := &observerpb.GetFlowsRequest{Follow: true, Number: 1 << 40}
		want := upTo(0, records-1, 1)
		if i%2 == 0 {
			req.Whitelist = []*flowpb.FlowFilter{{Verdict: []flowpb.Verdict{flowpb.Verdict_DROPPED}}}
			want = upTo(0, records-1, 3)
		}
		if i%3 == 0 {
			req.FieldMask = &fieldmaskpb.FieldMask{Paths: []string{"l4", "source.identity"}}
		}
		stream, err := w.GetFlows(ctx, req)
		if err != nil {
			t.Fatal(err)
		}
		readers.Go(func() {
			var got []*observerpb.GetFlowsResponse
			for len(got) < len(want) {
				resp, err := stream.Recv()
				if err != nil {
					t.Errorf("reader %d after %d: %v", i, len(got), err)
					return
				}
				if masked := resp.GetFlow().GetIP() == nil; masked != (i%3 == 0) {
					t.Errorf("reader %d: %v", i, resp)
					return
				}
				got = append(got, resp)
			}
			if !slices.Equal(numbers(got), want) {
				t.Errorf("reader %d: %v", i, numbers(got))
			}
		})
	}
	for i := range records {
		w.ring.Put(record(i))
	}
	readers.Wait()
	cancel()
	if _, err := w.flows(&observerpb.GetFlowsRequest{Number: 1}, 1); err != nil && status.Code(err) != codes.Canceled {
		t.Error(err)
	}
}

// What 64 streams that follow, and choose nothing, cost per record. Compare the
// two within one run.
func BenchmarkFollowers(b *testing.B) {
	const readers = 64
	never := []*flowpb.FlowFilter{{Verdict: []flowpb.Verdict{flowpb.Verdict_ERROR}}}
	for _, shared := range []bool{false, true} {
		b.Run(fmt.Sprintf("%d, converted once=%v", readers, shared), func(b *testing.B) {
			o := Options{Place: Place{Node: "n1"}}
			if shared {
				o.converted = &conversions{}
			}
			q, err := newQuery(&observerpb.GetFlowsRequest{Whitelist: never})
			if err != nil {
				b.Fatal(err)
			}
			rec := record(1)
			b.ReportAllocs()
			for i := range b.N {
				for range readers {
					q.choose(&o, rec, uint64(i))
				}
			}
		})
	}
}
