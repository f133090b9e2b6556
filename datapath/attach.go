package datapath

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/link"
	"golang.org/x/sys/unix"
)

// A device that has the programs and no endpoint is shut: they drop whatever
// comes. So the programs may be on it long before anybody registers it. That
// matters, for to attach one takes the kernel a grace period of RCU, of some
// 12 ms, with its lock over all devices (RTNL) held.

var hooks = []struct {
	name string
	at   ebpf.AttachType
}{{fromWorkload, ebpf.AttachTCXIngress}, {toWorkload, ebpf.AttachTCXEgress}}

// Attach puts a device under the programs: both links, at the head of their
// hooks, each pinned at once under the device's name. Links that stand already
// get the present programs. Nobody but the caller may have written an endpoint
// for the index: it would be in force at once.
//
// On failure nothing is left open: the device is taken down, for it would pass
// everything without programs. It may be repeated.
func (d *Datapath) Attach(ifname string, ifindex uint32) error {
	got, err := ifindexOf(ifname)
	if err != nil {
		return err
	}
	if got != ifindex {
		return fmt.Errorf("device %s has index %d, not %d: it was replaced", ifname, got, ifindex)
	}
	if err = d.attach(ifname, ifindex); err == nil {
		return nil
	}
	if !DeviceExists(ifindex) { // it vanished meanwhile
		return errors.Join(ErrNoDevice, err, d.pins.removeLinksOf(ifname, ifindex))
	}
	if down := deviceDown(ifname); down != nil {
		// What is attached stays: it drops everything.
		return errors.Join(err, fmt.Errorf("%s may be without programs: %w", ifname, down))
	}
	return errors.Join(err, d.pins.removeLinksOf(ifname, ifindex))
}

// attach attaches both programs to a device and pins the links.
func (d *Datapath) attach(ifname string, ifindex uint32) error {
	if err := os.MkdirAll(d.pins.device(ifname), 0o700); err != nil {
		return fmt.Errorf("make the directory of the links of %s: %w", ifname, err)
	}
	if err := d.clearName(ifname, ifindex); err != nil {
		return err
	}
	for _, hook := range hooks {
		if err := d.attachOne(ifname, ifindex, hook.name, hook.at); err != nil {
			return fmt.Errorf("attach %s to %s: %w", hook.name, ifname, err)
		}
	}
	return nil
}

// clearName takes pins away from a name that belong to another device: to its
// own name if it has another one by now, for good if it is gone.
func (d *Datapath) clearName(ifname string, ifindex uint32) error {
	other, err := d.pins.deviceOf(ifname)
	if err != nil || other == 0 || other == ifindex {
		return err
	}
	name, err := nameOf(other)
	switch {
	case errors.Is(err, ErrNoDevice): // it went just now
		err = d.pins.removeLinks(ifname)
	case err == nil && name == ifname:
		// It has its former name again; its gate stays.
		err = errors.New("devices change names with each other")
	case err == nil:
		err = d.MoveLinks(other, ifname, name)
	}
	if err != nil {
		return fmt.Errorf("the links of device %d stand under the name %s: %w", other, ifname, err)
	}
	return os.MkdirAll(d.pins.device(ifname), 0o700)
}

func (d *Datapath) attachOne(ifname string, ifindex uint32, name string, at ebpf.AttachType) error {
	prog := d.coll.Programs[name]
	path := filepath.Join(d.pins.device(ifname), name)
	old, oldIndex, err := d.pins.link(ifname, name)
	if err != nil {
		return err
	}
	if old != nil {
		defer old.Close()
		if oldIndex == ifindex {
			return old.Update(prog) // atomic: the hook is never without a program
		}
		if err := os.Remove(path); err != nil { // of a device that vanished
			return err
		}
	}
	l, err := link.AttachTCX(link.TCXOptions{Interface: int(ifindex), Program: prog, Attach: at, Anchor: link.Head()})
	if err != nil {
		return err
	}
	// From here on the pin keeps it; without one it would go with this process.
	defer l.Close()
	return l.Pin(path)
}

// Guarded reports whether both programs are on the device of this network
// namespace that has the index, and pinned under that name.
func (d *Datapath) Guarded(ifname string, ifindex uint32) (bool, error) {
	for _, hook := range hooks {
		l, at, err := d.pins.link(ifname, hook.name)
		if err != nil {
			return false, err
		}
		if l == nil {
			return false, nil
		}
		l.Close()
		if at != ifindex {
			return false, nil
		}
	}
	return true, nil
}

// Detach removes the links of a device that is gone from the name under which
// they are pinned; those of another device stay. It must not be called for one
// that is there: without programs that would pass everything. It may be
// repeated.
func (d *Datapath) Detach(ifname string, ifindex uint32) error {
	if err := d.pins.removeLinksOf(ifname, ifindex); err != nil {
		return fmt.Errorf("remove the links of %s: %w", ifname, err)
	}
	return nil
}

// TakeDown takes a device down that cannot be guarded: nothing passes through
// it then. One that does not exist is no error.
func (d *Datapath) TakeDown(ifname string) error { return deviceDown(ifname) }

// MoveLinks gives the pins of a device's links the device's new name. If pins
// of another device that is there have that name, the two change places: that
// one is to be moved in its turn. It may be repeated.
func (d *Datapath) MoveLinks(ifindex uint32, from, to string) error {
	other, err := d.pins.deviceOf(to)
	if err != nil || other == ifindex {
		return err
	}
	if have, err := d.pins.deviceOf(from); err != nil {
		return err
	} else if have != ifindex {
		return fmt.Errorf("the links of %s are device %d's, not %d's", from, have, ifindex)
	}
	flags := uint(unix.RENAME_EXCHANGE)
	if other == 0 {
		flags = unix.RENAME_NOREPLACE
		if err := d.pins.removeLinks(to); err != nil {
			return fmt.Errorf("remove the links of a former %s: %w", to, err)
		}
	}
	if err := unix.Renameat2(unix.AT_FDCWD, d.pins.device(from), unix.AT_FDCWD, d.pins.device(to), flags); err != nil {
		return fmt.Errorf("give the links of %s its new name %s: %w", from, to, err)
	}
	return nil
}

// Links returns the devices that have pinned links, by their index, with the
// names under which they are pinned; dead are names whose devices vanished.
func (d *Datapath) Links() (live map[uint32]string, dead []string, err error) {
	names, err := d.pins.devices()
	if err != nil {
		return nil, nil, err
	}
	live = map[uint32]string{}
	for _, name := range names {
		ifindex, err := d.pins.deviceOf(name)
		if err != nil {
			return nil, nil, err
		}
		if ifindex == 0 {
			dead = append(dead, name)
		} else {
			live[ifindex] = name
		}
	}
	return live, dead, nil
}
