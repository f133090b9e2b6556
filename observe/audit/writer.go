package audit

import (
	"fmt"
	"os"
	"time"

	"go.uber.org/zap"
	"golang.org/x/sys/unix"

	"portcullis/ipcache/lease"
)

// writer is the part of a Log that touches the disk. Its goroutine is the only
// one that uses it, after open.
//
// Records go from the queue to pending; there they get their place in the chain
// as they are written, so that what could not be written waits, and everything
// after it too.
type writer struct {
	l   *Log
	cfg Config

	file    *os.File
	regular bool // the path is a file, not a pipe or a device
	size    int64
	first   uint64    // number of the file's first record, 0 for none
	begun   time.Time // when the file was begun

	head    Head
	pending []Record

	// A line of which only a part was written: its rest, and the head when it
	// is whole.
	rest     []byte
	restHead Head
	cut      []byte // the part that was written

	unsigned   int       // records since the last checkpoint
	signedAt   time.Time // when that was
	cannotSign bool      // told in the log
	dirty      bool      // written and not synced
	unsynced   bool      // the last sync failed
	told       time.Time // the last alarm
	grumbled   time.Time // the last alarm about files
	tried      time.Time // the last rotation
	crowded    bool      // there may be files to remove
	kept       bool      // one of them could not be, and that is told
}

// run writes until the queue is closed and empty.
func (w *writer) run() {
	defer close(w.l.done)
	t := time.NewTicker(tick)
	defer t.Stop()
	w.flush()
	for {
		queue := w.l.queue
		if len(w.pending) >= batch {
			queue = nil // what is stuck waits in the queue, which is bounded
		}
		select {
		case r, ok := <-queue:
			if ok {
				ok = w.take(r)
			}
			w.flush()
			if !ok {
				w.finish()
				return
			}
		case <-w.closing(queue):
			w.finish()
			return
		case f := <-w.l.asked:
			w.drain()
			w.flush()
			f(w)
		case <-t.C:
			w.flush()
			w.due()
		}
	}
}

// closing is the log's end for a writer that does not look at its queue.
func (w *writer) closing(queue chan *Record) <-chan struct{} {
	if queue != nil {
		return nil
	}
	return w.l.closing
}

// take puts a record and those behind it into pending. It returns false when
// the queue is closed and empty.
func (w *writer) take(r *Record) bool {
	w.pending = append(w.pending, *r)
	return w.drain()
}

func (w *writer) drain() bool {
	for len(w.pending) < batch {
		select {
		case r, ok := <-w.l.queue:
			if !ok {
				return false
			}
			w.pending = append(w.pending, *r)
		default:
			return true
		}
	}
	return true
}

// finish writes what is left, and signs it.
func (w *writer) finish() {
	for w.drain() {
		if w.flush(); len(w.pending) >= batch {
			break // the disk takes nothing
		}
	}
	w.flush()
	// The end is told whatever was signed before, and nothing follows it: no new
	// file, and nothing of what is lost from now on. Else the next agent takes
	// this one for dead, and an auditor the log for cut off.
	w.tellGap()
	w.pending = append(w.pending, w.signature(whyStop))
	wrote := w.writeAll()
	w.sync(w.cfg.Sync != SyncNone)
	if wrote {
		w.works()
	}
	left := len(w.pending) + len(w.l.queue)
	if left > 0 {
		w.cfg.Log.Error("ALARM: the confirmation log ends without its last records", zap.Int("missing", left))
	}
	w.l.lost.Add(uint64(left))
	w.file.Close()
}

// due does what time brings.
func (w *writer) due() {
	w.follow()
	if w.unsigned > 0 && time.Since(w.signedAt) >= w.cfg.Checkpoint {
		w.checkpoint("interval")
	}
	w.sync(w.cfg.Sync == SyncInterval)
	if w.size > 0 && time.Since(w.begun) >= w.cfg.MaxAge {
		w.rotate()
	}
	w.retain()
}

// flush writes pending as far as it goes.
func (w *writer) flush() {
	w.tellGap()
	some := len(w.rest) > 0 || len(w.pending) > 0
	if !w.writeAll() {
		return
	}
	if some && w.unsigned >= w.cfg.Records {
		w.checkpoint("records")
	}
	w.sync(w.cfg.Sync == SyncAlways)
	w.works()
	if w.size >= w.cfg.MaxBytes {
		w.rotate()
	}
}

// writeAll returns false, and has told why, if the disk does not take all of
// pending.
func (w *writer) writeAll() bool {
	for len(w.rest) > 0 || len(w.pending) > 0 {
		if err := w.writeSome(); err != nil {
			w.alarm(err)
			return false
		}
	}
	return true
}

// tellGap puts a record of what was lost before the records that follow.
func (w *writer) tellGap() {
	w.l.mu.Lock()
	defer w.l.mu.Unlock()
	if len(w.l.missing) == 0 || w.l.problem != "" && len(w.pending) >= batch {
		return // the gap goes on
	}
	r := w.record(KindGap)
	r.Reason, r.Gap = "the queue was full", &Gap{Lost: w.l.missing, Since: w.l.since}
	if w.l.problem != "" {
		r.Reason += ": " + w.l.problem
	}
	w.pending = append(w.pending, r)
	w.l.missing = map[lease.LogKind]uint64{}
}

func (w *writer) record(kind lease.LogKind) Record {
	return Record{Time: time.Now().UTC().Round(0), Node: w.cfg.Node, Kind: kind}
}

// writeSome writes pending in one write. What was written leaves it.
func (w *writer) writeSome() error {
	if len(w.rest) > 0 {
		n, err := w.write(w.rest)
		w.cut, w.rest = append(w.cut, w.rest[:n]...), w.rest[n:]
		if len(w.rest) > 0 {
			return err
		}
		if w.restHead.Sequence > 0 {
			w.commit(w.restHead)
		}
		return nil
	}
	var buf []byte
	var ends []int
	var heads []Head
	at := w.head
	for i := 0; i < len(w.pending) && len(ends) < batch; i++ {
		r := &w.pending[i]
		r.Sequence, r.Previous = at.Sequence+1, at.Hash
		if r.Kind == KindCheckpoint {
			w.trySign(r)
		}
		line, err := r.seal()
		if err != nil { // a record that cannot be a line: its place says so
			*r = Record{Time: r.Time, Node: r.Node, Kind: KindGap, Sequence: r.Sequence, Previous: r.Previous,
				Reason: "a record could not be written: " + err.Error(), Gap: &Gap{Lost: map[lease.LogKind]uint64{r.Kind: 1}, Since: r.Time}}
			w.l.lost.Add(1)
			if line, err = r.seal(); err != nil {
				return err
			}
		}
		at = Head{r.Sequence, r.Hash}
		buf = append(buf, line...)
		ends, heads = append(ends, len(buf)), append(heads, at)
	}
	n, err := w.write(buf)
	whole := 0
	for ; whole < len(ends) && ends[whole] <= n; whole++ {
		w.commit(heads[whole])
	}
	if whole < len(ends) {
		if begin := append([]int{0}, ends...)[whole]; n > begin {
			w.cut, w.rest, w.restHead = append([]byte(nil), buf[begin:n]...), append([]byte(nil), buf[n:ends[whole]]...), heads[whole]
		}
	}
	return err
}

// commit takes note that pending's first record is written.
func (w *writer) commit(h Head) {
	r := w.pending[0]
	w.pending = w.pending[1:]
	w.head, w.cut, w.dirty = h, nil, true
	if w.first == 0 {
		w.first, w.begun = h.Sequence, time.Now()
	}
	w.unsigned++
	if r.Kind == KindCheckpoint {
		w.unsigned, w.cannotSign = 0, false
	}
	w.l.mu.Lock()
	defer w.l.mu.Unlock()
	w.l.head = h
	if r.Kind == KindCheckpoint {
		w.l.unsaid = ""
	}
}

// write returns how much was written, and an error if that is not all.
func (w *writer) write(data []byte) (n int, err error) {
	for {
		n, err = unix.Write(int(w.file.Fd()), data)
		if n > 0 || err != unix.EINTR {
			break
		}
	}
	n = max(n, 0)
	w.size += int64(n)
	if err == nil && n < len(data) {
		err = fmt.Errorf("only %d of %d bytes were written", n, len(data))
		if n > 0 { // the next try tells why
			var more int
			more, nextErr := unix.Write(int(w.file.Fd()), data[n:])
			n += max(more, 0)
			w.size += int64(max(more, 0))
			if n == len(data) {
				return n, nil
			}
			if nextErr != nil {
				err = nextErr
			}
		}
	}
	return n, err
}

// sync forces the file to the disk if it should.
func (w *writer) sync(should bool) {
	if !w.regular {
		w.unsynced = false
		return
	}
	if !should || !w.dirty {
		return
	}
	if err := w.file.Sync(); err != nil {
		// The kernel may have dropped what it could not write: nobody can say
		// what is on the disk. The chain will show it.
		w.unsynced = true
		w.alarm(fmt.Errorf("sync: %w", err))
		return
	}
	w.dirty, w.unsynced = false, false
}

// checkpoint asks for one at the end of pending.
func (w *writer) checkpoint(why string) {
	if w.unsigned == 0 && len(w.pending) == 0 {
		return
	}
	w.signedAt = time.Now()
	if w.cannotSign {
		if _, err := w.canSign(); err != nil {
			return // told already
		}
	}
	w.pending = append(w.pending, w.signature(why))
	w.flush()
}

// signature returns a checkpoint, which is signed when it gets its place.
func (w *writer) signature(why string) Record {
	r := w.record(KindCheckpoint)
	r.Checkpoint = &Checkpoint{Why: why}
	return r
}

func (w *writer) canSign() (Signer, error) {
	if w.cfg.Signer == nil {
		return nil, errNoSigner
	}
	_, err := w.cfg.Signer.GetX509SVID()
	return w.cfg.Signer, err
}

// trySign signs a checkpoint, or makes a record of that it cannot be signed.
func (w *writer) trySign(r *Record) {
	why := ""
	if r.Checkpoint != nil {
		why = r.Checkpoint.Why
	}
	r.Time = time.Now().UTC().Round(0)
	err := sign(w.cfg.Signer, r, why)
	if err == nil {
		return
	}
	r.Kind, r.Reason, r.Checkpoint = KindUnsigned, err.Error(), &Checkpoint{Why: why}
	w.cannotSign = true
	w.cfg.Log.Error("ALARM: the confirmation log cannot be signed", zap.Error(err))
	w.l.mu.Lock()
	defer w.l.mu.Unlock()
	w.l.unsaid = err.Error()
}

// alarm takes note that nothing can be written, and says so, at most every
// alarmEvery.
func (w *writer) alarm(err error) {
	w.l.troubled.Store(true)
	w.l.mu.Lock()
	w.l.problem = fmt.Sprintf("%s: %v", w.cfg.Path, err)
	w.l.mu.Unlock()
	if now := time.Now(); w.told.IsZero() || now.Sub(w.told) >= alarmEvery {
		w.told = now
		w.cfg.Log.Error("ALARM: the confirmation log cannot be written: make room or repair the path", zap.String("file", w.cfg.Path),
			zap.Int("waiting", len(w.pending)+len(w.l.queue)), zap.Uint64("lost", w.l.Lost()), zap.Error(err))
	}
}

// works ends an alarm.
func (w *writer) works() {
	if !w.l.troubled.Load() || w.unsynced || w.dirty && w.cfg.Sync == SyncAlways {
		return
	}
	w.l.troubled.Store(false)
	w.l.mu.Lock()
	w.l.problem = ""
	w.l.mu.Unlock()
	w.told = time.Time{}
	w.cfg.Log.Warn("the confirmation log can be written again", zap.String("file", w.cfg.Path), zap.Uint64("lost", w.l.Lost()))
}
