package audit

import (
	"cmp"
	"errors"
	"fmt"
	"sync"
	"sync/atomic"
	"time"

	"go.uber.org/zap"

	"portcullis/identity"
	"portcullis/ipcache/lease"
)

// Sync is when written records are forced to the disk.
type Sync string

// The policies: none leaves it to the kernel, interval does it once a second,
// always after each write (of one or more records).
const (
	SyncNone     Sync = "none"
	SyncInterval Sync = "interval"
	SyncAlways   Sync = "always"
)

// Config is what a log is told. Path and Node are required; what is zero gets
// the default that stands beside it.
type Config struct {
	Path   string
	Node   identity.NodeName
	Signer Signer      // nil: no checkpoint can be signed
	Log    *zap.Logger // nil: none

	Queue      int           // 16384 records that wait to be written
	MaxBytes   int64         // 64 MiB, then a new file is begun
	MaxAge     time.Duration // 24 h, the same
	Keep       int           // files beside the current one; 0: all
	Records    int           // 1000, between two checkpoints
	Checkpoint time.Duration // 1 min, between two checkpoints
	Sync       Sync          // interval
}

const (
	// tick is how often the writer looks at what is due, and tries again.
	tick = time.Second
	// alarmEvery bounds how often the same trouble is logged.
	alarmEvery = 10 * time.Second
	// batch bounds the records of one write.
	batch = 512
	// rotateEvery bounds how often a new file is begun.
	rotateEvery = time.Second
	// closeWait bounds how long Close waits for a disk that stands still.
	closeWait = 5 * time.Second
)

// Errors of Append and Close.
var (
	ErrFull   = errors.New("the queue of the confirmation log is full")
	ErrClosed = errors.New("the confirmation log is closed")
)

// Log is an open confirmation log.
type Log struct {
	cfg     Config
	queue   chan *Record
	asked   chan func(*writer) // run by the writer
	closing chan struct{}      // closed by Close
	done    chan struct{}      // closed when the writer has ended

	mu      sync.Mutex
	closed  bool                     // guarded by mu
	missing map[lease.LogKind]uint64 // guarded by mu; records lost and not yet told in the log
	since   time.Time                // guarded by mu; of the first of them
	problem string                   // guarded by mu; why nothing can be written, "" if it can
	files   string                   // guarded by mu; what is wrong with rotation or retention
	unsaid  string                   // guarded by mu; why nothing can be signed
	head    Head                     // guarded by mu; what is written

	lost     atomic.Uint64
	troubled atomic.Bool
}

// Open opens the log, continues the chain that is in it, and starts the writer,
// which Close ends. One process at a time may write a log.
func Open(cfg Config) (*Log, error) {
	defaults(&cfg)
	l := &Log{cfg: cfg, queue: make(chan *Record, cfg.Queue), asked: make(chan func(*writer)), closing: make(chan struct{}), done: make(chan struct{}), missing: map[lease.LogKind]uint64{}}
	w := &writer{l: l, cfg: cfg}
	if err := w.open(); err != nil {
		return nil, fmt.Errorf("confirmation log: %w", err)
	}
	l.head = w.head
	go w.run()
	return l, nil
}

func defaults(c *Config) {
	if c.Log == nil {
		c.Log = zap.NewNop()
	}
	set := func(n *int, to int) {
		if *n == 0 {
			*n = to
		}
	}
	set(&c.Queue, 16384)
	set(&c.Records, 1000)
	if c.MaxBytes == 0 {
		c.MaxBytes = 64 << 20
	}
	if c.MaxAge == 0 {
		c.MaxAge = 24 * time.Hour
	}
	if c.Checkpoint == 0 {
		c.Checkpoint = time.Minute
	}
	if c.Sync == "" {
		c.Sync = SyncInterval
	}
}

// Append takes one record to be written; it never waits for the disk. s is the
// session that it came by, nil for none. An error means that the record is lost:
// it is counted, and a gap will tell of it.
func (l *Log) Append(e lease.LogEntry, s *Session) error {
	r := &Record{Time: time.Now().UTC().Round(0), Node: l.cfg.Node, Kind: e.Kind, Peer: e.Peer, Session: s, IP: e.IP,
		Generation: e.Generation, UID: e.UID, Reason: e.Reason, Duration: e.Duration.Seconds()}
	if e.Evidence != identity.EvidenceNone {
		r.Evidence = e.Evidence.String()
	}
	if c := e.Certificate; c != (lease.Certificate{}) {
		r.Certificate = &Session{SPIFFEID: c.SPIFFEID, Serial: c.Serial, Issuer: c.Issuer}
	}
	if !e.Identity.Equal(identity.Identity{}) {
		r.Identity = &e.Identity
	}
	return l.put(r)
}

// AppendCoverage takes a record of admitted flows; it is as Append.
func (l *Log) AppendCoverage(c Coverage) error {
	return l.put(&Record{Time: time.Now().UTC().Round(0), Node: l.cfg.Node, Kind: KindCoverage, Coverage: &c})
}

// put queues a record.
func (l *Log) put(r *Record) error {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.closed {
		l.lose(r.Kind, r.Time)
		return ErrClosed
	}
	select {
	case l.queue <- r:
		return nil
	default:
		l.lose(r.Kind, r.Time)
		return ErrFull
	}
}

// lose counts a lost record. mu is held.
func (l *Log) lose(kind lease.LogKind, at time.Time) {
	if len(l.missing) == 0 {
		l.since = at
	}
	l.missing[kind]++
	l.lost.Add(1)
}

// Lost returns how many records were lost since Open.
func (l *Log) Lost() uint64 { return l.lost.Load() }

// Writable tells whether a record that is appended now is likely to be kept: it
// is false from the first write that fails until one works, and while the queue
// is three quarters full. It costs next to nothing.
func (l *Log) Writable() bool { return !l.troubled.Load() && len(l.queue) < cap(l.queue)*3/4 }

// Problems returns what an operator must know of: that records cannot be
// written, and that they cannot be signed. "" is nothing.
func (l *Log) Problems() (writing, signing string) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return cmp.Or(l.problem, l.files), l.unsaid
}

// Head returns where the written chain stands.
func (l *Log) Head() Head {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.head
}

// Reopen opens the path anew, for whoever has moved the file away, after what
// is queued was written. If it fails, the old file goes on being written.
func (l *Log) Reopen() error {
	answer := make(chan error, 1)
	if err := l.ask(func(w *writer) { answer <- w.reopen() }); err != nil {
		return err
	}
	return <-answer
}

// ask has the writer run f.
func (l *Log) ask(f func(*writer)) error {
	select {
	case l.asked <- f:
		return nil
	case <-l.done:
		return ErrClosed
	}
}

// Close writes what is queued, signs it, and closes the file. Records that come
// later are lost, and counted. A disk that does not answer holds it up for some
// seconds, not for ever.
func (l *Log) Close() error {
	l.mu.Lock()
	if !l.closed {
		l.closed = true
		close(l.queue)
		close(l.closing)
	}
	l.mu.Unlock()
	select {
	case <-l.done:
	case <-time.After(closeWait):
		return errors.New("confirmation log: the disk does not answer: what was queued is lost")
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.problem != "" {
		return fmt.Errorf("confirmation log: %s", l.problem)
	}
	return nil
}
