package export

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"os"
	"sync"
	"sync/atomic"
	"time"
)

// A file may take a write and not come back: a pipe that nobody reads, a file
// server that does not answer. Nothing ends such a call but the other side, so
// nobody waits for it for good. The agent's ring of records is the queue meanwhile,
// and what it has no room for is counted and told of.
const (
	stallsAfter = 5 * time.Second // a call that takes longer is an alarm
	closeWait   = 3 * time.Second // for all that are ended at a time
)

// runner is the exports that run. Owned by Run.
type runner struct {
	o       Options
	last    string // text of the file that was looked at
	looked  bool
	running map[string]*task // by name
	stuck   map[string]*task // by file: those that were ended and have not; at most maxExports
}

// task is a running export.
type task struct {
	key    string
	file   string
	cancel context.CancelFunc
	done   chan struct{}
	w      *writer
}

// end ends tasks. Those that do not end in time are left to themselves, and
// remembered as stuck.
func (r *runner) end(tasks []*task) {
	for _, t := range tasks {
		t.cancel()
	}
	patience := time.NewTimer(closeWait)
	defer patience.Stop()
	late := false
	for _, t := range tasks {
		if !late {
			select {
			case <-t.done:
			case <-patience.C:
				late = true
			}
		}
		select {
		case <-t.done:
			r.o.Problem(t.w.x.Name, nil)
		default:
			t.w.told.leave()
			r.stuck[t.file] = t
			r.o.Problem(t.w.x.Name, nil)
			r.tellLeft(t)
		}
	}
}

func (r *runner) tellLeft(t *task) {
	r.o.Problem(former(t.file), fmt.Errorf("export %s: %s takes nothing: it was left, with some %d records that it may not have", t.w.x.Name, t.file, t.w.unwritten.Load()))
}

// former is the name under which Problem is told of a file that was left.
func former(file string) string { return "former " + file }

func (r *runner) stopAll() {
	var all []*task
	for _, t := range r.running {
		all = append(all, t)
	}
	r.end(all)
}

// watch tells of tasks that hang, for as long as they do, and when they do not any
// more.
func (r *runner) watch(now time.Time) {
	for file, t := range r.stuck {
		select {
		case <-t.done:
			delete(r.stuck, file)
			r.o.Problem(former(file), nil)
		default:
			r.tellLeft(t)
		}
	}
	oldest, next := r.o.Ring.Bounds()
	for _, t := range r.running {
		var err error
		if since := t.w.busy.Load(); since != 0 && now.Sub(time.Unix(0, since)) > stallsAfter {
			at := t.w.at.Load()
			err = fmt.Errorf("export %s: %s has taken nothing for %v: %d records wait, %d are lost", t.w.x.Name, t.file,
				now.Sub(time.Unix(0, since)).Round(time.Second), next-max(at, oldest), max(at, oldest)-at)
		}
		t.w.told.stalls(err)
	}
}

// reload does what the file says, if it says something new. With a file that is
// wrong all goes on as it was.
func (r *runner) reload(ctx context.Context, from uint64) {
	text, err := os.ReadFile(r.o.File)
	if errors.Is(err, os.ErrNotExist) {
		text, err = nil, nil
	}
	if err == nil && r.looked && string(text) == r.last {
		return
	}
	exports, perr := parse(text)
	err = errors.Join(err, perr)
	if len(r.stuck) >= maxExports {
		err = errors.Join(err, fmt.Errorf("%d files that were exported to hang", len(r.stuck)))
	}
	if err != nil {
		r.o.Problem("", fmt.Errorf("%s: %w: exports go on as they were", r.o.File, err))
		return
	}
	r.last, r.looked = string(text), true
	r.o.Problem("", nil)
	wanted, at := map[string]bool{}, map[string]uint64{}
	for _, x := range exports {
		if t := r.running[x.Name]; t != nil && t.key == x.key {
			wanted[x.Name] = true
		}
	}
	var ending []*task
	for name, t := range r.running { // before a new one opens the same file
		if !wanted[name] {
			ending = append(ending, t)
			delete(r.running, name)
		}
	}
	r.end(ending)
	for _, t := range ending {
		at[t.w.x.Name] = t.w.at.Load()
	}
	for _, x := range exports {
		if r.running[x.Name] == nil {
			begin, known := at[x.Name]
			if !known {
				begin = from
			}
			r.running[x.Name] = r.start(ctx, x, begin)
		}
	}
}

// start begins an export, where a file is stuck once that has ended.
func (r *runner) start(ctx context.Context, x export, from uint64) *task {
	ctx, cancel := context.WithCancel(ctx)
	w := &writer{o: &r.o, x: x, told: &told{name: x.Name, problem: r.o.Problem}}
	w.at.Store(from)
	t := &task{key: x.key, file: x.File, cancel: cancel, done: make(chan struct{}), w: w}
	if x.File == Stdout {
		w.out = stream{bufio.NewWriterSize(r.o.Stdout, 64<<10)}
	} else {
		w.out = &file{e: &w.x.Export, now: time.Now}
	}
	before := r.stuck[x.File]
	go func() {
		defer close(t.done)
		if before != nil {
			select {
			case <-before.done:
			case <-ctx.Done():
				return
			}
		}
		w.run(ctx)
	}()
	return t
}

// told is what Problem was told of an export, which may both fail and hang. Safe
// for concurrent use.
type told struct {
	name    string
	problem func(name string, err error)

	mu            sync.Mutex
	failed, stall error // guarded by mu
	left          bool  // nothing is told any more: another one may have the name; guarded by mu
}

func (t *told) fails(err error)  { t.say(&t.failed, err) }
func (t *told) stalls(err error) { t.say(&t.stall, err) }

func (t *told) say(which *error, err error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.left || *which == nil && err == nil {
		return
	}
	*which = err
	t.problem(t.name, errors.Join(t.failed, t.stall))
}

func (t *told) leave() {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.left = true
}

// busy is since when a writer waits for its file, in ns of the wall clock; 0: it
// does not.
type busy struct{ atomic.Int64 }

func (b *busy) during(f func() error) error {
	b.Store(time.Now().UnixNano())
	defer b.Store(0)
	return f()
}
