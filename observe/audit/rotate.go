package audit

import (
	"errors"
	"fmt"
	"os"
	"time"

	"go.uber.org/zap"
	"golang.org/x/sys/unix"
)

// openFile opens the path for appending, made with mode 0600 if missing, and
// keeps others from writing it.
func openFile(path string) (*os.File, bool, error) {
	f, err := os.OpenFile(path, os.O_CREATE|os.O_RDWR|os.O_APPEND, 0o600)
	if err != nil {
		return nil, false, err
	}
	info, err := f.Stat()
	if err == nil && info.Mode().IsRegular() {
		if err = unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB); err == unix.EWOULDBLOCK {
			err = errors.New("another process writes it")
		}
	}
	if err != nil {
		f.Close()
		return nil, false, fmt.Errorf("%s: %w", path, err)
	}
	return f, info.Mode().IsRegular(), nil
}

// open continues the log at the path.
func (w *writer) open() (err error) {
	if w.file, w.regular, err = openFile(w.cfg.Path); err != nil {
		return err
	}
	w.head, w.begun, w.signedAt = Head{Hash: zeroHash}, time.Now(), time.Now()
	begin := w.begin()
	if w.regular {
		if err := w.resume(begin); err != nil {
			w.file.Close()
			return err
		}
	}
	w.crowded = true
	r := w.record(KindStart)
	r.Begin = begin
	w.pending = append(w.pending, r)
	return nil
}

func (w *writer) begin() *Begin {
	return &Begin{Version: Version, Records: w.cfg.Records, Interval: w.cfg.Checkpoint.Seconds()}
}

// resume finds where the chain stands.
func (w *writer) resume(begin *Begin) error {
	info, err := w.file.Stat()
	if err != nil {
		return err
	}
	w.size = info.Size()
	end, err := lastRecord(w.file, w.size)
	if err != nil {
		return err
	}
	last := end.record
	if last == nil {
		// The file is empty, or was just begun when the agent died.
		older, err := rotated(w.cfg.Path)
		if err != nil {
			return err
		}
		if w.size > 0 && len(older) == 0 {
			return w.setAside(begin)
		}
		if len(older) > 0 {
			newest := older[len(older)-1]
			if last, err = lastOf(newest.path); err != nil {
				return err
			}
			begin.Previous = newest.name
		}
	} else {
		first, err := firstOf(w.cfg.Path)
		if err != nil {
			return err
		}
		w.first, w.begun = first.Sequence, first.Time
	}
	if last != nil {
		if last.Node != w.cfg.Node {
			return fmt.Errorf("%s is the log of node %s: give this agent another path", w.cfg.Path, last.Node)
		}
		w.head = Head{last.Sequence, last.Hash}
		begin.Clean = last.Checkpoint != nil && last.Checkpoint.Why == whyStop
	} else {
		begin.Clean = true
	}
	begin.Torn = end.torn()
	if !end.newline {
		// A line of its own for what follows. It is part of what is torn, or
		// ends a whole record.
		w.rest = []byte{'\n'}
	}
	return nil
}

// setAside moves away a file in which there is no record.
func (w *writer) setAside(begin *Begin) error {
	name := fmt.Sprintf("%s.aside-%d", w.cfg.Path, time.Now().UnixNano())
	if err := os.Rename(w.cfg.Path, name); err != nil {
		return err
	}
	w.cfg.Log.Warn("there is no record in the confirmation log: it was set aside, and a new one begun", zap.String("file", name))
	w.file.Close()
	begin.Previous, w.size = "", 0
	var err error
	w.file, w.regular, err = openFile(w.cfg.Path)
	return err
}

// reopen goes on at the path, whatever is there now.
func (w *writer) reopen() error {
	f, regular, err := w.another()
	if f == nil {
		return err
	}
	w.goOn(f, regular, w.cfg.Path)
	w.flush()
	return nil
}

// follow goes on at the path when somebody has removed the file: what is
// written would be nowhere. One that was moved away waits for Reopen.
func (w *writer) follow() {
	if !w.regular {
		return
	}
	var st unix.Stat_t
	if err := unix.Fstat(int(w.file.Fd()), &st); err != nil || st.Nlink > 0 {
		return
	}
	f, regular, err := w.another()
	if f == nil {
		w.complain(fmt.Errorf("%s was removed, and what is written is lost: %w", w.cfg.Path, err))
		return
	}
	w.complain(fmt.Errorf("%s was removed, with the records that were in it; the log goes on in a new file", w.cfg.Path))
	w.goOn(f, regular, w.cfg.Path)
	w.flush()
}

// another opens the path if it is not the file that is open.
func (w *writer) another() (*os.File, bool, error) {
	here, err := w.file.Stat()
	if err != nil {
		return nil, false, err
	}
	if there, err := os.Stat(w.cfg.Path); err == nil && os.SameFile(here, there) {
		w.checkpoint("file")
		return nil, false, nil
	}
	w.checkpoint("file")
	w.sync(w.cfg.Sync != SyncNone)
	f, regular, err := openFile(w.cfg.Path)
	if err != nil {
		return nil, false, fmt.Errorf("confirmation log: %w", err)
	}
	info, err := f.Stat()
	if err == nil && regular && info.Size() > 0 {
		err = fmt.Errorf("%s has something in it already: the former file is written on", w.cfg.Path)
	}
	if err != nil {
		f.Close()
		return nil, false, fmt.Errorf("confirmation log: %w", err)
	}
	return f, regular, nil
}

// goOn writes on in a new file; former is the name of the one before.
func (w *writer) goOn(f *os.File, regular bool, former string) {
	w.file.Close()
	w.file, w.regular, w.size, w.first, w.begun = f, regular, 0, 0, time.Now()
	r := w.record(KindFile)
	r.Begin = w.begin()
	r.Begin.Previous, r.Begin.Clean = base(former), true
	if len(w.cut) > 0 { // that line is written whole in the new file
		r.Begin.Torn = tornOf(w.cut)
	}
	w.rest, w.cut, w.restHead = nil, nil, Head{}
	w.pending = append([]Record{r}, w.pending...)
}

// rotate begins a new file. If it cannot, the old one goes on.
func (w *writer) rotate() {
	if !w.regular || w.first == 0 || len(w.pending) > 0 || len(w.rest) > 0 {
		return
	}
	if time.Since(w.tried) < rotateEvery {
		return
	}
	w.tried = time.Now()
	w.checkpoint("file")
	if len(w.pending) > 0 {
		return
	}
	w.sync(w.cfg.Sync != SyncNone)
	name := rotatedName(w.cfg.Path, w.first)
	if err := unix.Renameat2(unix.AT_FDCWD, w.cfg.Path, unix.AT_FDCWD, name, unix.RENAME_NOREPLACE); err != nil {
		w.complain(fmt.Errorf("begin a new file: %w", &os.PathError{Op: "rename", Path: name, Err: err}))
		return
	}
	f, regular, err := openFile(w.cfg.Path)
	if err != nil {
		_ = os.Rename(name, w.cfg.Path) // else the log goes on under its new name
		w.complain(fmt.Errorf("begin a new file: %w", err))
		return
	}
	w.goOn(f, regular, name)
	w.l.mu.Lock()
	w.l.files = ""
	w.l.mu.Unlock()
	w.crowded = true
	w.flush()
	w.retain()
}

// retain removes the oldest file beyond those that are kept, after its last
// record was named in the log.
func (w *writer) retain() {
	if !w.crowded || w.cfg.Keep == 0 || !w.regular || len(w.pending) > 0 {
		return
	}
	files, err := rotated(w.cfg.Path)
	if err != nil || len(files) <= w.cfg.Keep {
		return
	}
	for _, f := range files[:len(files)-w.cfg.Keep] {
		last, err := lastOf(f.path)
		if err != nil || last == nil {
			w.kept = true
			w.complain(fmt.Errorf("%s is not removed: its last record cannot be read (%w)", f.path, errors.Join(err, errNoRecord)))
			return
		}
		r := w.record(KindRemoved)
		r.Removed = &Removed{File: f.name, First: f.first, Last: last.Sequence, Hash: last.Hash}
		w.pending = append(w.pending, r)
		w.flush()
		if len(w.pending) > 0 {
			return
		}
		w.sync(w.cfg.Sync != SyncNone)
		if err := os.Remove(f.path); err != nil {
			w.kept = true
			w.complain(err)
			return
		}
	}
	w.crowded = false
	if w.kept {
		w.kept = false
		w.l.mu.Lock()
		w.l.files = ""
		w.l.mu.Unlock()
	}
}

// complain tells of files that cannot be begun or removed; records are written
// all the same.
func (w *writer) complain(err error) {
	w.l.mu.Lock()
	again := w.l.files == err.Error()
	w.l.files = err.Error()
	w.l.mu.Unlock()
	if now := time.Now(); !again || now.Sub(w.grumbled) >= alarmEvery {
		w.grumbled = now
		w.cfg.Log.Error("ALARM: the files of the confirmation log", zap.Error(err))
	}
}
