package datapath

import (
	"errors"
	"fmt"
	"io/fs"
	"net/netip"
	"path/filepath"
	"unsafe"

	"github.com/cilium/ebpf"

	"portcullis/bpf/abi"
)

// View reads what is pinned in a directory, whether an agent runs there or
// not, and changes nothing: its file descriptors cannot write. It is for those
// who look at the gate from outside. Safe for concurrent use, but for Close.
//
// It sees the maps that were pinned when it was opened: not those of an agent
// that replaced them since.
type View struct {
	slots, leases, bindings, endpoints, counters, state *ebpf.Map
}

// OpenView opens the pins of a directory. The caller closes it. An error
// matches fs.ErrNotExist if nothing is pinned there, and is ErrPins if maps
// are of another version.
func OpenView(dir string) (*View, error) {
	v := &View{}
	for name, open := range map[string]struct {
		to   **ebpf.Map
		size uintptr
	}{
		"slots": {&v.slots, sizeOf[abi.Slot]()}, "leases": {&v.leases, sizeOf[abi.Lease]()},
		"bindings": {&v.bindings, sizeOf[abi.Binding]()}, "endpoints": {&v.endpoints, sizeOf[abi.Endpoint]()},
		"counters": {&v.counters, sizeOf[abi.Counter]()}, "state": {&v.state, sizeOf[abi.State]()},
	} {
		path := filepath.Join(pinDir(filepath.Clean(dir)).maps(), name)
		m, err := ebpf.LoadPinnedMap(path, &ebpf.LoadPinOptions{ReadOnly: true})
		if err != nil {
			return nil, errors.Join(fmt.Errorf("open the pinned map %s: %w", path, err), v.Close())
		}
		*open.to = m
		if uintptr(m.ValueSize()) != open.size {
			return nil, errors.Join(fmt.Errorf("%w: %s has values of %d bytes, want %d", ErrPins, path, m.ValueSize(), open.size), v.Close())
		}
	}
	return v, nil
}

// Close gives the file descriptors back. It may be repeated.
func (v *View) Close() error {
	var errs []error
	for _, m := range []**ebpf.Map{&v.slots, &v.leases, &v.bindings, &v.endpoints, &v.counters, &v.state} {
		if *m != nil {
			errs = append(errs, (*m).Close())
			*m = nil
		}
	}
	return errors.Join(errs...)
}

// Binding returns the slot that is in force for an IP, whatever its lease says.
// The error matches fs.ErrNotExist if there is none.
func (v *View) Binding(ip netip.Addr) (abi.Slot, error) {
	key := Addr(ip)
	var b abi.Binding
	var s abi.Slot
	err := v.bindings.Lookup(&key, &b)
	if err == nil {
		err = v.slots.Lookup(b.Slot, &s)
	}
	switch {
	case errors.Is(err, ebpf.ErrKeyNotExist), err == nil && (s.Stamp == 0 || s.Stamp != b.Stamp):
		return abi.Slot{}, fmt.Errorf("binding of %v: %w", ip, fs.ErrNotExist)
	case err != nil:
		return abi.Slot{}, mapError("look", "bindings", err)
	}
	return s, nil
}

// Deadline returns what is stored for a lease (CLOCK_BOOTTIME, ns): 0 if it
// has ended.
func (v *View) Deadline(lease uint32) (int64, error) {
	var l abi.Lease
	if err := v.leases.Lookup(lease, &l); err != nil {
		return 0, mapError("look", "leases", err)
	}
	return int64(l.Deadline), nil
}

// Endpoint returns what the programs are told of the workload on a device of
// this network namespace. The error matches fs.ErrNotExist if they are told
// nothing.
func (v *View) Endpoint(ifindex uint32) (abi.Endpoint, error) {
	var e abi.Endpoint
	err := v.endpoints.Lookup(ifindex, &e)
	if errors.Is(err, ebpf.ErrKeyNotExist) {
		return e, fmt.Errorf("endpoint on device %d: %w", ifindex, fs.ErrNotExist)
	}
	if err != nil {
		return e, mapError("look", "endpoints", err)
	}
	return e, nil
}

// Packets returns one counter of the programs, summed over CPUs. Packets that
// an agent's user space dropped are not in it.
func (v *View) Packets(k CounterKey) (uint64, error) {
	var perCPU []abi.Counter
	i := (uint32(k.Direction)*uint32(abi.ReasonMax)+uint32(k.Reason))*uint32(abi.VerdictMax) + uint32(k.Verdict)
	if err := v.counters.Lookup(i, &perCPU); err != nil {
		return 0, mapError("look", "counters", err)
	}
	var n uint64
	for _, c := range perCPU {
		n += c.Packets
	}
	return n, nil
}

// LostEvents returns how many events found the ring full.
func (v *View) LostEvents() (uint64, error) {
	var s abi.State
	if err := v.state.Lookup(uint32(0), &s); err != nil {
		return 0, mapError("look", "state", err)
	}
	return s.LostEvents, nil
}

// ClockTick is by how much a stored deadline is earlier than the lease's end:
// the programs' clock may be that late.
const ClockTick = clockTick

func sizeOf[T any]() uintptr {
	var zero T
	return unsafe.Sizeof(zero)
}
