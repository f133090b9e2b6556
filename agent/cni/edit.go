package cni

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"path/filepath"

	"golang.org/x/sys/unix"
)

// A network configuration is another program's file, which it may write at any
// time. So ours is exchanged for it, in one step, and what came out of the place
// is looked at: if it is not what was read before, somebody wrote meanwhile, and
// his is the newer one, which is edited in its turn.

// editTries bounds how often somebody may be quicker.
const editTries = 8

// edit makes a file what change makes of it. list is what was read of it.
func edit(path string, list []byte, change func([]byte) ([]byte, error)) error {
	out, err := change(list)
	if err != nil || bytes.Equal(out, list) {
		return err
	}
	expected := list
	for range editTries {
		x, err := exchange(path, out)
		if err != nil {
			return err
		}
		if bytes.Equal(x.displaced, expected) {
			return os.Remove(x.beside)
		}
		expected = out
		if out, err = change(x.displaced); err != nil {
			// Half of it, perhaps: who writes it has it open, so the very file
			// goes back into its place.
			return errors.Join(fmt.Errorf("it was written meanwhile: %w", err), x.undo())
		}
		if err := os.Remove(x.beside); err != nil {
			return err
		}
	}
	return errors.New("somebody writes it all the time")
}

// exchanged is a file that was put in the place of another.
type exchanged struct {
	path      string
	beside    string // where the other one is now
	displaced []byte // its content
}

// undo puts the other one back.
func (x exchanged) undo() error {
	return errors.Join(unix.Renameat2(unix.AT_FDCWD, x.beside, unix.AT_FDCWD, x.path, unix.RENAME_EXCHANGE), os.Remove(x.beside))
}

func exchange(path string, content []byte) (x exchanged, err error) {
	x.path = path
	if x.beside, err = writeBeside(path, bytes.NewReader(content), 0o600); err != nil {
		return x, err
	}
	if err = unix.Renameat2(unix.AT_FDCWD, x.beside, unix.AT_FDCWD, path, unix.RENAME_EXCHANGE); err == nil {
		if x.displaced, err = os.ReadFile(x.beside); err == nil {
			return x, nil
		}
		return x, errors.Join(err, x.undo())
	}
	return x, errors.Join(fmt.Errorf("exchange %s for another: %w", path, err), os.Remove(x.beside))
}

// sweepBeside removes what a program that was killed while it wrote has left: of
// the binary that is as long as the binary.
func sweepBeside(dirs ...string) {
	for _, d := range dirs {
		if d == "" {
			continue
		}
		left, _ := filepath.Glob(filepath.Join(d, besidePrefix+"*"+besideSuffix)) // fails for a bad pattern only
		for _, file := range left {
			_ = os.Remove(file) // what stays is in nobody's way
		}
	}
}
