package audit

import (
	"encoding/json"
	"fmt"
	"io"
	"net/netip"
	"os"
	"sync"
	"time"

	"go.uber.org/zap"
	"golang.org/x/sys/unix"

	"portcullis/identity"
	"portcullis/ipcache/lease"
)

// alarmEvery bounds how often a log that cannot be written is complained about.
const alarmEvery = 10 * time.Second

// Log is an open confirmation log.
type Log struct {
	path string
	node identity.NodeName
	log  *zap.Logger

	mu     sync.Mutex
	file   *os.File  // guarded by mu
	torn   bool      // guarded by mu; the file ends within a line
	lost   uint64    // guarded by mu; lines, since Open
	failed uint64    // guarded by mu; lines lost since the last that was written
	told   time.Time // guarded by mu; the last alarm
}

// line is what is written. Its fields are the format.
type line struct {
	Time       string              `json:"time"`
	Node       identity.NodeName   `json:"node"`
	Kind       lease.LogKind       `json:"kind"`
	Peer       identity.NodeName   `json:"peer,omitempty"`
	IP         netip.Addr          `json:"ip,omitzero"`
	Generation identity.Generation `json:"generation,string,omitzero"`
	UID        identity.UID        `json:"uid,omitzero"`
	Identity   *identity.Identity  `json:"identity,omitempty"`
	Evidence   identity.Evidence   `json:"evidence,omitzero"`
	Reason     string              `json:"reason,omitempty"`
	Duration   float64             `json:"duration,omitzero"` // seconds
}

// Open opens the log for appending, made with mode 0600 if missing. log gets
// alarms and may be nil.
func Open(path string, node identity.NodeName, log *zap.Logger) (*Log, error) {
	if log == nil {
		log = zap.NewNop()
	}
	l := &Log{path: path, node: node, log: log}
	if err := l.Reopen(); err != nil {
		return nil, err
	}
	return l, nil
}

// Reopen opens the path anew, for whoever has moved the file away. If it fails,
// the old file goes on being written.
func (l *Log) Reopen() error {
	f, err := os.OpenFile(l.path, os.O_CREATE|os.O_RDWR|os.O_APPEND, 0o600)
	if err != nil {
		return fmt.Errorf("confirmation log: %w", err)
	}
	torn, err := endsTorn(f)
	if err != nil {
		f.Close()
		return fmt.Errorf("confirmation log: %w", err)
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.file != nil {
		l.file.Close()
	}
	l.file, l.torn = f, torn
	return nil
}

// endsTorn tells whether an earlier agent died within a line.
func endsTorn(f *os.File) (bool, error) {
	info, err := f.Stat()
	if err != nil || !info.Mode().IsRegular() || info.Size() == 0 {
		return false, err
	}
	last := make([]byte, 1)
	if _, err := f.ReadAt(last, info.Size()-1); err != nil && err != io.EOF {
		return false, err
	}
	return last[0] != '\n', nil
}

// Append writes one line. An error means that the line is lost; it was counted
// and logged already.
func (l *Log) Append(e lease.LogEntry) error {
	out := line{
		Time: time.Now().UTC().Format(time.RFC3339Nano), Node: l.node, Kind: e.Kind, Peer: e.Peer, IP: e.IP,
		Generation: e.Generation, UID: e.UID, Evidence: e.Evidence, Reason: e.Reason, Duration: e.Duration.Seconds(),
	}
	if !e.Identity.Equal(identity.Identity{}) {
		out.Identity = &e.Identity
	}
	data, err := json.Marshal(out)
	l.mu.Lock()
	defer l.mu.Unlock()
	if err == nil {
		err = l.write(append(data, '\n'))
	}
	if err != nil {
		return l.alarm(e.Kind, err)
	}
	if l.failed > 0 {
		l.log.Warn("the confirmation log can be written again; lines are missing in it", zap.String("file", l.path), zap.Uint64("missing", l.failed))
		l.failed, l.told = 0, time.Time{}
	}
	return nil
}

// write writes a line in one write. mu is held.
func (l *Log) write(data []byte) error {
	if l.file == nil {
		return os.ErrClosed
	}
	if l.torn {
		// Let the half line stand alone: it is evidence too.
		data = append([]byte{'\n'}, data...)
	}
	// os.File would continue a short write by itself, as a second one.
	n, err := unix.Write(int(l.file.Fd()), data)
	for n <= 0 && err == unix.EINTR {
		n, err = unix.Write(int(l.file.Fd()), data)
	}
	if err == nil && n < len(data) {
		err = fmt.Errorf("only %d of %d bytes were written", n, len(data))
	}
	if n > 0 {
		l.torn = n < len(data) && data[n-1] != '\n'
	}
	return err
}

// alarm counts a lost line and says so, at most every alarmEvery. mu is held.
func (l *Log) alarm(kind lease.LogKind, err error) error {
	l.lost++
	l.failed++
	if now := time.Now(); l.told.IsZero() || now.Sub(l.told) >= alarmEvery {
		l.told = now
		l.log.Error("ALARM: the confirmation log cannot be written, lines are lost: make room or repair the path",
			zap.String("file", l.path), zap.String("kind", string(kind)), zap.Uint64("lost", l.failed), zap.Error(err))
	}
	return fmt.Errorf("confirmation log %s: %w", l.path, err)
}

// Lost returns how many lines could not be written since Open.
func (l *Log) Lost() uint64 {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.lost
}

// Close closes the file. Lines that come later are lost, and counted.
func (l *Log) Close() error {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.file == nil {
		return nil
	}
	err := l.file.Close()
	l.file = nil
	return err
}
