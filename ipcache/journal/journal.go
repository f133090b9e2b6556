package journal

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"time"

	"go.uber.org/zap"
	"golang.org/x/sys/unix"

	"portcullis/identity"
	"portcullis/ipcache/lease"
)

// longestLease is how long a grant that nobody renews can run, by the clock of
// its owner: MaxLease x (1 + rho).
const longestLease = lease.MaxLease + lease.MaxLease*lease.RhoNum/lease.RhoDen

// Names in the journal's directory.
const (
	fileName    = "journal"
	newName     = "journal.new"
	corruptName = "journal.corrupt"
	lockName    = "lock"
)

// retryLock is how often a waiting agent looks whether the other one ended.
const retryLock = 100 * time.Millisecond

// Journal is an open journal. It holds the directory's lock until Close.
type Journal struct {
	dir    string
	head   header
	log    *zap.Logger
	lock   *os.File
	file   *os.File
	size   int64 // of whole records in the file
	count  int   // of records in the file
	broken error // not nil: the file's end is not a record's end, nothing may follow
}

// Open locks the directory, made if missing, and reads the journal of the agent
// that ran before. While another agent holds the lock, Open waits and says so.
//
// boot is this kernel's. The state tells what the records are worth:
//
//   - JournalPresent: they are complete, and of this boot.
//   - JournalOtherBoot: the journal was of another boot; there are none.
//   - JournalMissing: there was no journal; there are none.
//
// The last two are found again until a record was appended, so that a crash
// right after the start does not cut short the wait that they ask for.
//
// A journal that cannot be read is kept as journal.corrupt for whoever wants to
// know why. Its grants may all be out still, and no flag excuses the wait for
// their end, so what is returned is a journal that asks for it: JournalPresent
// with one RecordWait.
//
// An error means that there is no journal: the agent must not serve.
func Open(dir string, boot identity.BootID, log *zap.Logger) (*Journal, []lease.Record, lease.JournalState, error) {
	return OpenContext(context.Background(), dir, boot, log)
}

// OpenContext is Open; the wait for another agent ends with ctx, and is then an
// error.
func OpenContext(ctx context.Context, dir string, boot identity.BootID, log *zap.Logger) (*Journal, []lease.Record, lease.JournalState, error) {
	if log == nil {
		log = zap.NewNop()
	}
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, nil, 0, fmt.Errorf("journal: %w", err)
	}
	lock, err := takeLock(ctx, filepath.Join(dir, lockName), log)
	if err != nil {
		return nil, nil, 0, err
	}
	j := &Journal{dir: dir, log: log, lock: lock}
	records, state, err := j.load(boot)
	if err != nil {
		j.Close()
		return nil, nil, 0, err
	}
	return j, records, state, nil
}

// takeLock returns the locked file. One agent writes a journal.
func takeLock(ctx context.Context, path string, log *zap.Logger) (*os.File, error) {
	f, err := os.OpenFile(path, os.O_CREATE|os.O_RDWR, 0o600)
	if err != nil {
		return nil, fmt.Errorf("journal: %w", err)
	}
	told := false
	for {
		err := unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB)
		if err == nil {
			if told {
				log.Info("the other agent has ended, this one goes on", zap.String("lock", path))
			}
			return f, nil
		}
		if !errors.Is(err, unix.EWOULDBLOCK) && !errors.Is(err, unix.EINTR) {
			f.Close()
			return nil, fmt.Errorf("journal: lock %s: %w", path, err)
		}
		if !told {
			told = true
			log.Warn("another agent of this node is running; this one waits until it ends", zap.String("lock", path))
		}
		t := time.NewTimer(retryLock)
		select {
		case <-t.C:
		case <-ctx.Done():
			t.Stop()
			f.Close()
			return nil, fmt.Errorf("journal: another agent holds %s: %w", path, context.Cause(ctx))
		}
	}
}

// load reads the file or begins a new one.
func (j *Journal) load(boot identity.BootID) ([]lease.Record, lease.JournalState, error) {
	path := filepath.Join(j.dir, fileName)
	now, err := bootTime()
	if err != nil {
		return nil, 0, err
	}
	data, err := os.ReadFile(path)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, lease.JournalMissing, j.begin(header{format, boot, now, lease.JournalMissing}, nil)
	}
	if err != nil {
		// Neither there nor not there: somebody must look.
		return nil, 0, fmt.Errorf("journal: %w", err)
	}
	h, records, good, err := parse(data)
	if err == nil && h.Boot == boot && h.Created > now {
		err = fmt.Errorf("it was begun at %d ns of this boot, which is in the future", h.Created)
	}
	switch {
	case err != nil:
		return j.replaceCorrupt(data, err, header{format, boot, now, lease.JournalPresent})
	case h.Boot != boot:
		return nil, lease.JournalOtherBoot, j.begin(header{format, boot, now, lease.JournalOtherBoot}, nil)
	}
	if good < len(data) {
		j.log.Warn("the journal's last record was cut off by a crash: it is dropped, nobody was told of it",
			zap.String("journal", path), zap.Int("bytes", len(data)-good))
		if err := os.Truncate(path, int64(good)); err != nil {
			return nil, 0, fmt.Errorf("journal: cut off the torn end: %w", err)
		}
	}
	state := lease.JournalPresent
	if len(records) == 0 {
		state = h.Origin
	}
	j.head, j.size, j.count = h, int64(good), len(records)
	j.file, err = os.OpenFile(path, os.O_WRONLY|os.O_APPEND, 0)
	if err != nil {
		return nil, 0, fmt.Errorf("journal: %w", err)
	}
	return records, state, nil
}

// replaceCorrupt begins a journal that knows of nothing but the wait for every
// lease that could be out.
func (j *Journal) replaceCorrupt(data []byte, why error, h header) ([]lease.Record, lease.JournalState, error) {
	kept := filepath.Join(j.dir, corruptName)
	j.log.Error("the journal cannot be read, so the grants of before are not known: no IP is bound until every lease that could be out has ended; nothing need be done, a copy is kept for inspection",
		zap.String("kept", kept), zap.Duration("wait", longestLease), zap.Error(why))
	// A copy: the file itself stays until the new one takes its place in one
	// step, or a crash here would make it look as if there had been none.
	if err := os.WriteFile(kept, data, 0o600); err != nil {
		j.log.Warn("the unreadable journal could not be kept", zap.Error(err))
	}
	records := []lease.Record{{Kind: lease.RecordWait, At: h.Created.Add(longestLease), Boot: h.Boot}}
	return records, lease.JournalPresent, j.begin(h, records)
}

// begin replaces the file by one with the header and the records. If it fails,
// the old file and the old state stand.
func (j *Journal) begin(h header, records []lease.Record) error {
	data, err := appendFrame(nil, h)
	for _, r := range records {
		if err == nil {
			err = checkRecord(r)
		}
		if err == nil {
			data, err = appendFrame(data, r)
		}
	}
	if err != nil {
		return fmt.Errorf("journal: %w", err)
	}
	temp := filepath.Join(j.dir, newName)
	if err := os.Remove(temp); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("journal: %w", err)
	}
	f, err := os.OpenFile(temp, os.O_CREATE|os.O_EXCL|os.O_WRONLY|os.O_APPEND, 0o600)
	if err != nil {
		return fmt.Errorf("journal: %w", err)
	}
	if _, err = f.Write(data); err == nil {
		err = os.Rename(temp, filepath.Join(j.dir, fileName))
	}
	if err != nil {
		f.Close()
		os.Remove(temp)
		return fmt.Errorf("journal: begin a new file: %w", err)
	}
	if j.file != nil {
		j.file.Close()
	}
	j.head, j.file, j.size, j.count, j.broken = h, f, int64(len(data)), len(records), nil
	return nil
}

// Append makes a record durable: when it returns nil, a crash of this process
// does not lose it. After an error the record does not count, now or after a
// restart.
func (j *Journal) Append(r lease.Record) error {
	if j.broken != nil {
		return j.broken
	}
	if err := checkRecord(r); err != nil {
		return fmt.Errorf("journal: %w", err)
	}
	data, err := appendFrame(nil, r)
	if err != nil {
		return fmt.Errorf("journal: %w", err)
	}
	// One write: os.File would continue a short one by itself, and a record
	// that is half there must be taken back instead.
	n, err := unix.Write(int(j.file.Fd()), data)
	for n <= 0 && errors.Is(err, unix.EINTR) {
		n, err = unix.Write(int(j.file.Fd()), data)
	}
	if err == nil && n == len(data) {
		j.size += int64(n)
		j.count++
		return nil
	}
	if err == nil {
		err = fmt.Errorf("only %d of %d bytes were written", n, len(data))
	}
	if n > 0 {
		if cut := j.file.Truncate(j.size); cut != nil {
			// A record after half a record would be damage: write nothing more.
			j.broken = fmt.Errorf("journal: half a record could not be taken back: %w: compact it, or restart the agent", cut)
		}
	}
	return fmt.Errorf("journal: %w", err)
}

// Compact replaces the journal by these records, in one step: after a crash
// either the old or the new is there. If it fails, the old one stands.
//
// The records must say everything that is to be known after a crash: an empty
// list says that there is nothing to know.
func (j *Journal) Compact(records []lease.Record) error {
	h := j.head
	h.Origin = lease.JournalPresent
	return j.begin(h, records)
}

// Len returns how many records the file holds: when it is much larger than the
// number of grants and bindings, it is time to Compact.
func (j *Journal) Len() int { return j.count }

// Close releases the directory for another agent.
func (j *Journal) Close() error {
	var err error
	if j.file != nil {
		err = j.file.Close()
	}
	return errors.Join(err, j.lock.Close())
}

// bootTime reads CLOCK_BOOTTIME.
func bootTime() (lease.Time, error) {
	var ts unix.Timespec
	if err := unix.ClockGettime(unix.CLOCK_BOOTTIME, &ts); err != nil {
		return 0, fmt.Errorf("journal: CLOCK_BOOTTIME: %w", err)
	}
	return lease.Time(ts.Nano()), nil
}
