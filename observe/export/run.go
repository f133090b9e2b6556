package export

import (
	"context"
	"fmt"
	"io"
	"sync/atomic"
	"time"

	"google.golang.org/protobuf/encoding/protojson"
	"google.golang.org/protobuf/types/known/timestamppb"

	flowpb "github.com/cilium/cilium/api/v1/flow"
	observerpb "github.com/cilium/cilium/api/v1/observer"
	"portcullis/observe/flow"
	"portcullis/observe/hubble"
)

// Options are what Run needs. All are required, but where it says so.
type Options struct {
	File   string // of settings; one that is not there has no exports
	Ring   *flow.Ring
	Place  hubble.Place
	Stdout io.Writer // for exports to Stdout; used by one at a time
	// Problem is told what is wrong with an export, or with the file (name ""),
	// and with nil that it works again. It is called concurrently; may be nil.
	Problem func(name string, err error)
}

const (
	lookEvery = 2 * time.Second // at the file of settings
	batch     = 128             // records that are read at a time
)

// Run exports until ctx ends. It returns nil then, at the latest some seconds
// later: a file that hangs is left. What is wrong with an export is no error of it.
func Run(ctx context.Context, o Options) error {
	if o.Problem == nil {
		o.Problem = func(string, error) {}
	}
	r := &runner{o: o, running: map[string]*task{}, stuck: map[string]*task{}}
	defer r.stopAll()
	r.reload(ctx, 0) // the first exports get what is there already
	look := time.NewTicker(lookEvery)
	defer look.Stop()
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-look.C:
			_, next := o.Ring.Bounds()
			r.reload(ctx, next)
			r.watch(time.Now())
		}
	}
}

// writer is one export at work.
type writer struct {
	o      *Options
	x      export
	out    output
	failed uint64 // records that the file does not tell of
	unsure uint64 // records that lines since the last flush tell of
	told   *told
	// For who watches it:
	at        atomic.Uint64 // number of the record that it would read next
	busy      busy
	unwritten atomic.Uint64 // records that were read, and are not in the file for sure
}

// run writes records from number at on, until ctx ends.
func (w *writer) run(ctx context.Context) {
	buf, from := make([]flow.Record, batch), w.at.Load()
	for ctx.Err() == nil {
		n, after, lost := w.o.Ring.Read(from, buf)
		w.at.Store(after)
		w.unwritten.Store(uint64(n) + w.failed)
		if lost > 0 {
			w.line(w.lost(lost), lost)
		}
		for i := range n {
			w.record(&buf[i], after-uint64(n-i))
		}
		from = after
		if n > 0 {
			w.flush()
			w.unwritten.Store(w.failed)
			continue
		}
		select {
		case <-w.o.Ring.Wait(from):
		case <-ctx.Done():
		}
	}
	w.note(w.busy.during(w.out.close))
}

func (w *writer) flush() {
	if w.unsure == 0 {
		return // nothing was written: whether it works is not known
	}
	err := w.busy.during(w.out.flush)
	if err != nil {
		w.failed += w.unsure
	}
	w.unsure = 0
	w.note(err)
}

func (w *writer) record(r *flow.Record, number uint64) {
	if r.Lost != nil {
		w.line(w.o.Place.Lost(r.Lost, r.Time), r.Lost.Count)
		return
	}
	for _, f := range w.o.Place.From(r, number) {
		if !w.x.filter.Match(f) {
			continue
		}
		if w.x.Form == formProcess {
			w.connect(f)
			return
		}
		w.line(&observerpb.GetFlowsResponse{NodeName: f.GetNodeName(), Time: f.GetTime(), ResponseTypes: &observerpb.GetFlowsResponse_Flow{Flow: w.x.mask.Apply(f)}}, 1)
		return
	}
}

// lost tells of records that this export was too slow for, or could not write.
func (w *writer) lost(n uint64) *observerpb.GetFlowsResponse {
	return &observerpb.GetFlowsResponse{NodeName: w.o.Place.Name(), Time: timestamppb.Now(), ResponseTypes: &observerpb.GetFlowsResponse_LostEvents{
		LostEvents: &flowpb.LostEvent{Source: flowpb.LostEventSource_HUBBLE_RING_BUFFER, NumEventsLost: n}}}
}

// line writes one line, which tells of so many records. What cannot be written is
// counted, and told of in the first line that can (I6); nobody waits for a disk.
func (w *writer) line(resp *observerpb.GetFlowsResponse, tells uint64) {
	w.text(tells, func() ([]byte, error) { return protojson.MarshalOptions{UseProtoNames: true}.Marshal(resp) })
}

// connect writes a flow in the form that tells of its process, if it has that.
func (w *writer) connect(f *flowpb.Flow) {
	if b, err := hubble.ConnectJSON(f); err != nil || b != nil {
		w.text(1, func() ([]byte, error) { return b, err })
	}
}

func (w *writer) text(tells uint64, make func() ([]byte, error)) {
	if w.failed > 0 {
		before := w.failed
		if w.put(func() ([]byte, error) { return protojson.MarshalOptions{UseProtoNames: true}.Marshal(w.lost(before)) }) != nil {
			w.failed += tells
			return
		}
		w.failed, w.unsure = 0, w.unsure+before
	}
	if w.put(make) != nil {
		w.failed += tells
		return
	}
	w.unsure += tells
}

func (w *writer) put(make func() ([]byte, error)) error {
	b, err := make()
	if err == nil {
		err = w.busy.during(func() error { return w.out.write(append(b, '\n')) })
	}
	if err != nil { // with it goes what was in the buffer
		w.failed, w.unsure = w.failed+w.unsure, 0
		w.note(err)
	}
	return err
}

// note tells of a failure, and of its end. A file that failed is opened again.
func (w *writer) note(err error) {
	if err != nil {
		w.busy.during(w.out.close) //nolint:errcheck // it failed already
		err = fmt.Errorf("export %s: %w", w.x.Name, err)
	}
	w.told.fails(err)
}
