package privilege

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"unsafe"

	"golang.org/x/sys/unix"
)

// Set is a set of capabilities, a bit each.
type Set uint64

// Of is the set of some capabilities, unix.CAP_ constants.
func Of(capabilities ...int) (s Set) {
	for _, c := range capabilities {
		s |= 1 << c
	}
	return s
}

// Held returns the capabilities that the calling thread is permitted, and those
// that it could get by executing a program.
func Held() (permitted, bounding Set, err error) {
	header := unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}
	var data [2]unix.CapUserData
	if err := unix.Capget(&header, &data[0]); err != nil {
		return 0, 0, fmt.Errorf("ask for capabilities: %w", err)
	}
	for c := range 64 {
		in, err := unix.PrctlRetInt(unix.PR_CAPBSET_READ, uintptr(c), 0, 0, 0)
		if err != nil { // EINVAL: the kernel knows no more of them
			break
		}
		bounding |= Set(in) << c
	}
	return Set(data[0].Permitted) | Set(data[1].Permitted)<<32, bounding, nil
}

// ambient returns the capabilities that a program keeps when the calling thread executes
// it, though its user is not root and its file gives none.
func ambient() (s Set) {
	for c := range 64 {
		in, err := unix.PrctlRetInt(unix.PR_CAP_AMBIENT, unix.PR_CAP_AMBIENT_IS_SET, uintptr(c), 0, 0)
		if err != nil { // EINVAL: the kernel knows no more of them
			break
		}
		s |= Set(in) << c
	}
	return s
}

// Drop gives up the calling thread's capabilities but those of keep. What is kept of ambient
// ones stays ambient: it is all that a user who is not root has after Exec.
func Drop(keep Set) error {
	permitted, bounding, err := Held()
	if err != nil {
		return err
	}
	for c := range 64 {
		if bounding&^keep&(1<<c) == 0 {
			continue
		}
		if err := unix.Prctl(unix.PR_CAPBSET_DROP, uintptr(c), 0, 0, 0); err != nil {
			return fmt.Errorf("give up capability %d: %w", c, err)
		}
	}
	have, pass := permitted&keep, ambient()&keep
	header := unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}
	data := [2]unix.CapUserData{ // what is not inheritable is not ambient any more
		{Effective: uint32(have), Permitted: uint32(have), Inheritable: uint32(pass)},
		{Effective: uint32(have >> 32), Permitted: uint32(have >> 32), Inheritable: uint32(pass >> 32)},
	}
	if err := unix.Capset(&header, &data[0]); err != nil {
		return fmt.Errorf("give up capabilities: %w", err)
	}
	return nil
}

// Exec executes this program again, with the same arguments and what env says in
// addition. The thread that calls it must be locked to its goroutine; its
// namespaces, capabilities and, if it is the process's first one, the signal at its
// parent's death are the new program's. It returns only an error. The process's name
// (comm) is "exe" then, until Name.
func Exec(env ...string) error {
	return fmt.Errorf("execute the program again: %w", unix.Exec("/proc/self/exe", os.Args, slices.Concat(os.Environ(), env)))
}

// Name gives the process, which the calling thread must be the first of, the name of its
// program again, as ps(1) and pidof(1) know it; another thread only itself.
func Name() error {
	path, err := os.Executable()
	if err != nil {
		return err
	}
	name, err := unix.BytePtrFromString(filepath.Base(path))
	if err != nil {
		return err
	}
	return unix.Prctl(unix.PR_SET_NAME, uintptr(unsafe.Pointer(name)), 0, 0, 0)
}

// Limit has the process hold no capabilities but those of keep: it returns nil in
// one that holds no others, and does not return in one that does. The goroutine must be locked to
// its thread, best to the first one (Exec). An error says what could not be given
// up: what was begun of it is this thread's alone.
func Limit(keep Set) error {
	permitted, bounding, err := Held()
	if err != nil {
		return err
	}
	if (permitted|bounding)&^keep == 0 {
		return Name()
	}
	if err := Drop(keep); err != nil {
		return err
	}
	// Once more is never needed; without this, a kernel that does as it likes
	// would have it go on for ever.
	if permitted, bounding, err = Held(); err != nil || (permitted|bounding)&^keep != 0 {
		return errors.Join(err, fmt.Errorf("capabilities %#x cannot be given up", uint64((permitted|bounding)&^keep)))
	}
	return Exec()
}
