package datapath

import (
	"errors"
	"fmt"
	"strings"

	"golang.org/x/sys/unix"
)

var (
	// ErrUnsupported means that this kernel lacks what Portcullis needs.
	ErrUnsupported = errors.New("the kernel lacks what Portcullis needs (Linux 6.6 with tcx)")
	// ErrMapFull means that a map of the kernel has no room. What was to be
	// written is not in force; raise the map's size, or remove something.
	ErrMapFull = errors.New("the kernel's map is full")
	// ErrStaleStamp means that the slot holds another binding by now.
	ErrStaleStamp = errors.New("the slot has another stamp")
	// ErrPins is wrapped by errors about pins that cannot be adopted.
	ErrPins = errors.New("the pinned maps cannot be adopted")
	// ErrInUse means that another process, an agent most likely, has the pin
	// directory.
	ErrInUse = errors.New("the pin directory is in use by a running agent")
	// ErrNoDevice means that the network device does not exist.
	ErrNoDevice = errors.New("no such network device")
)

// LayoutError says why pinned maps can neither be adopted nor carried over
// into new ones. It is ErrPins; what was in force stays in force.
type LayoutError struct {
	PinDir string
	Diffs  []string // one for each map
}

// Error says what differs and what to do.
func (e *LayoutError) Error() string {
	return fmt.Sprintf("%v: in %s, %s. Either start an agent that fits them, "+
		"or end all workloads of this node and remove the pins, then start again", ErrPins, e.PinDir, strings.Join(e.Diffs, "; "))
}

// Unwrap makes it ErrPins.
func (e *LayoutError) Unwrap() error { return ErrPins }

// mapError names the map, and tells a full one from other failures.
func mapError(what, name string, err error) error {
	if err == nil {
		return nil
	}
	if errors.Is(err, unix.E2BIG) || errors.Is(err, unix.ENOSPC) || errors.Is(err, unix.ENOMEM) {
		return fmt.Errorf("%s: %w: %s: %v", what, ErrMapFull, name, err)
	}
	return fmt.Errorf("%s: map %s: %w", what, name, err)
}
