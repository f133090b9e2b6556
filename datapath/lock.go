package datapath

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"time"

	"golang.org/x/sys/unix"
)

// lockWait is how long Open, Remove and Tombstone wait for the pin directory:
// longer than a killed process needs to end.
const lockWait = 2 * time.Second

// lockPins takes the pin directory for this process, until the file is closed
// or the process ends: a Datapath holds it as long as it lives, so whoever has
// it knows that no agent writes the maps. ErrInUse if another has it all the
// time. The directory itself carries the lock; bpffs has no regular files.
func lockPins(dir string, wait time.Duration) (*os.File, error) {
	for deadline := time.Now().Add(wait); ; time.Sleep(10 * time.Millisecond) {
		f, err := os.Open(filepath.Clean(dir))
		if err != nil {
			return nil, fmt.Errorf("lock the pin directory: %w", err)
		}
		err = unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB)
		if err == nil && sameDir(f, dir) {
			return f, nil
		}
		f.Close()
		if err != nil && !errors.Is(err, unix.EWOULDBLOCK) && !errors.Is(err, unix.EINTR) {
			return nil, fmt.Errorf("lock the pin directory %s: %w", dir, err)
		}
		if time.Now().After(deadline) {
			return nil, fmt.Errorf("%w: %s", ErrInUse, dir)
		}
	}
}

// sameDir tells whether the directory that was locked is the one that has the
// name still: Remove may have come first.
func sameDir(f *os.File, dir string) bool {
	a, err1 := f.Stat()
	b, err2 := os.Stat(dir)
	return err1 == nil && err2 == nil && os.SameFile(a, b)
}
