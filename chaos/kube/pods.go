package kube

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"sync"
	"time"

	"portcullis/chaos/kube/talk"
)

// pods is what the API server tells of the run's pods. It may be used from any
// goroutine.
type pods struct {
	mu      sync.Mutex
	known   map[string]*podState // guarded by mu; never changed once in it
	gone    map[string]bool      // guarded by mu
	changed chan struct{}        // guarded by mu; closed at the next change
}

func newPods() *pods {
	return &pods{known: map[string]*podState{}, gone: map[string]bool{}, changed: make(chan struct{})}
}

// watch follows the pods until ctx ends.
func (p *pods) watch(ctx context.Context, k kubectl) {
	for ctx.Err() == nil {
		// It ends now and then, and when the API server is away: then again.
		_ = k.stream(ctx, p.read, "get", "pods", "--watch", "--output-watch-events", "-o", "json")
		talk.Sleep(ctx, time.Second)
	}
}

func (p *pods) read(in io.Reader) error {
	for d := json.NewDecoder(in); ; {
		var e struct {
			Type   string
			Object podState
		}
		if err := d.Decode(&e); err != nil {
			if errors.Is(err, io.EOF) {
				return nil
			}
			return err
		}
		p.mu.Lock()
		p.known[e.Object.Metadata.Name] = &e.Object
		p.gone[e.Object.Metadata.Name] = e.Type == "DELETED"
		close(p.changed)
		p.changed = make(chan struct{})
		p.mu.Unlock()
	}
}

// get returns a pod, nil if it is not known, and whether it is gone.
func (p *pods) get(name string) (s *podState, gone bool, changed <-chan struct{}) {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.known[name], p.gone[name], p.changed
}

// follower is a pod whose lines are read.
type follower struct {
	log  podLog // name, node, is; the rest is guarded by mu
	done chan struct{}

	mu      sync.Mutex
	ended   bool          // guarded by mu: all was read
	err     error         // guarded by mu: why not
	changed chan struct{} // guarded by mu; closed at the next record
}

// order makes a pod and lets its lines be read. What it returns without an error
// is among the run's logs, whatever comes of the pod.
func (w *world) order(ctx, background context.Context, pod object, is string, readers *sync.WaitGroup) (*follower, error) {
	meta, spec := pod["metadata"].(object), pod["spec"].(object)
	f := &follower{log: podLog{name: meta["name"].(string), node: spec["nodeName"].(string), is: is}, done: make(chan struct{}), changed: make(chan struct{})}
	ordered := talk.Now()
	out, err := w.k.run(ctx, marshal(pod), "create", "-f", "-", "-o", "json")
	if err != nil {
		return nil, err
	}
	var made struct{ Items []podState }
	if err := json.Unmarshal(out, &made); err != nil || len(made.Items) != 1 {
		var one podState // kubectl prints a single object as such
		if err := json.Unmarshal(out, &one); err != nil {
			return nil, fmt.Errorf("pod %s: %w", f.log.name, err)
		}
		made.Items = []podState{one}
	}
	f.log.uid = made.Items[0].Metadata.UID
	readers.Go(func() { defer close(f.done); w.follow(background, f, ordered) })
	return f, nil
}

// follow reads a pod's lines until its last.
func (w *world) follow(ctx context.Context, f *follower, ordered int64) {
	var last uint64
	read := func(in io.Reader) (err error) {
		last, err = talk.Read(in, last, func(r talk.Record) { w.heard(f, r, ordered) })
		return err
	}
	var fruitless int
	for ctx.Err() == nil && !f.over() {
		s, gone, changed := w.pods.get(f.log.name)
		if !gone && (s == nil || s.Status.Phase == "Pending" || s.Metadata.UID != f.log.uid) {
			select {
			case <-changed:
			case <-ctx.Done():
			}
			continue
		}
		before := last
		err := w.k.stream(ctx, read, "logs", "--follow", f.log.name)
		if fruitless++; last > before {
			fruitless = 0
		}
		// Its node may be cut off for a while: then again. A gap stays one.
		if f.over() || fruitless < 5 || !gone && fruitless < 90 && s.Status.Phase == "Running" {
			talk.Sleep(ctx, time.Second)
			continue
		}
		f.fail(fmt.Errorf("pod %s: its lines end with number %d: %w", f.log.name, last, errors.Join(err, errors.New("the last is not there"))))
		break
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.log.is == "" {
		return // it broke something, and said nothing
	}
	w.logs = append(w.logs, &f.log)
	if !f.ended && len(f.log.records) > 0 {
		w.lost = append(w.lost, fmt.Sprintf("what pod %s (%s) wrote down after its line %d", f.log.name, f.log.is, last))
	}
}

// heard notes a record.
func (w *world) heard(f *follower, r talk.Record, ordered int64) {
	now := talk.Now()
	f.mu.Lock()
	f.log.records = append(f.log.records, r)
	boot := f.log.records[0].Boot
	f.ended = f.ended || r.Kind == talk.Ends || r.Kind == talk.Restored
	close(f.changed)
	f.changed = make(chan struct{})
	f.mu.Unlock()
	w.mu.Lock()
	if r.At != 0 {
		w.clocks.before(boot, r.At, w.boot, now)
	}
	if r.Kind == talk.Begins || r.Kind == talk.Breaking {
		w.clocks.before(w.boot, ordered, boot, r.At)
	}
	w.mu.Unlock()
	if !changes(f.log.is) {
		return
	}
	switch r.Kind {
	case talk.Begins:
		w.uses.taken(r.IPs, f.log.is)
		w.aims.add(f.log.uid, r.IPs)
	case talk.Leaves:
		w.aims.remove(f.log.uid)
	case talk.Ends:
		w.uses.freed(f.first().IPs)
	}
}

func (f *follower) first() talk.Record {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.log.records[0]
}

func (f *follower) over() bool {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.ended
}

func (f *follower) fail(err error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.err = err
}

// until waits until a pod has written down something of a kind, and returns it.
func (f *follower) until(ctx context.Context, kind talk.Kind) (talk.Record, error) {
	for {
		f.mu.Lock()
		r, ok := f.log.find(kind)
		changed, err := f.changed, f.err
		f.mu.Unlock()
		if ok || err != nil {
			return r, err
		}
		select {
		case <-changed:
		case <-f.done:
			f.mu.Lock()
			defer f.mu.Unlock()
			if r, ok := f.log.find(kind); ok {
				return r, nil
			}
			return r, errors.Join(f.err, fmt.Errorf("pod %s wrote down nothing that %s", f.log.name, kind))
		case <-ctx.Done():
			return r, ctx.Err()
		}
	}
}

// await waits until a pod serves.
func (w *world) await(ctx context.Context, f *follower) error {
	limited, cancel := context.WithTimeout(ctx, startLimit)
	defer cancel()
	_, err := f.until(limited, talk.Serves)
	if err != nil && ctx.Err() == nil {
		why := "the API server does not tell of it"
		if s, _, _ := w.pods.get(f.log.name); s != nil {
			why = s.why()
		}
		return fmt.Errorf("pod %s on %s does not come to serve: %s: %w", f.log.name, f.log.node, why, err)
	}
	return err
}

// lived waits until a pod has left by itself and all of it was read, and removes
// what is left of it.
func (w *world) lived(ctx context.Context, f *follower) error {
	select {
	case <-f.done:
	case <-ctx.Done():
		return ctx.Err()
	}
	_, err := w.k.run(ctx, nil, "delete", "pod", f.log.name, "--ignore-not-found", "--wait=false")
	return err
}

// dismiss lets a pod leave, and waits until all of it was read.
func (w *world) dismiss(ctx context.Context, f *follower) error {
	ctx, cancel := context.WithTimeout(ctx, 2*time.Minute)
	defer cancel()
	_, err := w.k.run(ctx, nil, "delete", "pod", f.log.name, "--ignore-not-found", "--wait=false")
	select {
	case <-f.done:
	case <-ctx.Done():
	}
	return err
}

// populate makes the pods that stay, and waits until they serve.
func (w *world) populate(ctx, background context.Context, readers *sync.WaitGroup) (out []*follower, err error) {
	// They end by themselves if nobody ends them.
	life := (w.Limit + 15*time.Minute).String()
	w.aims = newAims()
	for i, s := range standingPods(w.owner, w.verifiers) {
		args := []string{"--for", life}
		name := fmt.Sprintf("%s-at-%d", s.is, i)
		if caller := s.is == callerIs; caller {
			args = append(args, "--aimed")
		}
		f, err := w.order(ctx, background, w.talkerPod(name, s.is, s.node, args...), s.is, readers)
		if err != nil {
			return out, err
		}
		out = append(out, f)
	}
	for _, f := range out {
		if err := w.await(ctx, f); err != nil {
			return out, err
		}
		if f.log.is == callerIs {
			name := f.log.name
			readers.Go(func() { w.aim(background, name) })
			continue
		}
		w.serving = append(w.serving, f.first().IPs...)
	}
	return out, nil
}

// aim tells the caller whom to call, until ctx ends.
func (w *world) aim(ctx context.Context, caller string) {
	for ctx.Err() == nil {
		in, out := io.Pipe()
		cmd := w.k.command(ctx, "exec", "-i", caller, "--", "/portcullis", "chaos", "talk", "--aim")
		cmd.Stdin = in
		told := make(chan struct{})
		attempt, cancel := context.WithCancel(ctx)
		go func() { defer close(told); w.aims.tell(attempt, out) }()
		_ = cmd.Run() // it ends when its node is cut off: then again
		cancel()
		in.Close()
		<-told
		talk.Sleep(ctx, time.Second)
	}
}
