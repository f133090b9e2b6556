package datapath

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/link"
	"go.uber.org/zap"

	"portcullis/bpf/abi"
)

// AddEndpoint puts a device under the programs, with the endpoint quarantined
// whatever ep.State says: SetEndpoint lifts that. The element comes first, so
// that there is no moment in which a program finds none, then both links, at
// the head of their hooks, each pinned at once.
//
// On failure nothing is left open: the device is taken down, for it would pass
// everything without programs. It may be repeated.
func (d *Datapath) AddEndpoint(ifname string, ep abi.Endpoint) error {
	ifindex, err := ifindexOf(ifname)
	if err != nil {
		return err
	}
	if ep.Ifindex == 0 {
		ep.Ifindex = ifindex
	}
	if ep.Ifindex != ifindex {
		return fmt.Errorf("device %s has index %d, not %d: it was replaced", ifname, ifindex, ep.Ifindex)
	}
	if err := d.checkEndpoint(&ep); err != nil {
		return err
	}
	ep.State = uint32(abi.EPQuarantined)
	err = d.coll.Maps["endpoints"].Put(ifindex, &ep)
	if err != nil {
		err = mapError("add endpoint on "+ifname, "endpoints", err)
	} else {
		err = d.attach(ifname, ifindex)
	}
	if err == nil {
		return nil
	}
	if down := deviceDown(ifname); down != nil {
		// What is attached stays: without an element it drops everything.
		err = errors.Join(err, fmt.Errorf("%s may be without programs: %w", ifname, down))
	} else {
		err = errors.Join(err, d.pins.removeLinksOf(ifname, ifindex))
	}
	return errors.Join(err, d.deleteEndpoint(ifindex))
}

func (d *Datapath) checkEndpoint(ep *abi.Endpoint) error {
	switch {
	case ep.ID == 0:
		return fmt.Errorf("endpoint on device %d has no id: all are used up, restart the node", ep.Ifindex)
	case ep.Policy == 0:
		return fmt.Errorf("endpoint %d has no policy set", ep.ID)
	case ep.HoldIndex == 0 || ep.HoldIndex >= d.quota.n:
		return fmt.Errorf("endpoint %d: hold index %d is not in 1..%d", ep.ID, ep.HoldIndex, d.quota.n-1)
	}
	return nil
}

// attach attaches both programs to a device and pins the links. Links that
// stand already get the present programs.
func (d *Datapath) attach(ifname string, ifindex uint32) error {
	if err := os.MkdirAll(d.pins.device(ifname), 0o700); err != nil {
		return fmt.Errorf("make the directory of the links of %s: %w", ifname, err)
	}
	for _, hook := range []struct {
		name string
		at   ebpf.AttachType
	}{{fromWorkload, ebpf.AttachTCXIngress}, {toWorkload, ebpf.AttachTCXEgress}} {
		if err := d.attachOne(ifname, ifindex, hook.name, hook.at); err != nil {
			return fmt.Errorf("attach %s to %s: %w", hook.name, ifname, err)
		}
	}
	return nil
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
		if oldIndex != 0 {
			return fmt.Errorf("the pin belongs to device %d, which still exists under another name", oldIndex)
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

// SetEndpoint replaces the endpoint of a device as a whole: programs see the
// old one or the new one. On failure the old one stays in force.
func (d *Datapath) SetEndpoint(ep abi.Endpoint) error {
	if err := d.checkEndpoint(&ep); err != nil {
		return err
	}
	err := d.coll.Maps["endpoints"].Update(ep.Ifindex, &ep, ebpf.UpdateExist)
	return mapError(fmt.Sprintf("set endpoint %d", ep.ID), "endpoints", err)
}

// RemoveEndpoint ends an endpoint: its gate is closed first. If the device is
// gone (as it should be) links and element go too; while it exists they stay,
// and drop everything: a device without programs would pass everything. Call
// it again when the device is gone. It may be repeated.
func (d *Datapath) RemoveEndpoint(ifname string, ifindex uint32) error {
	if err := d.shut(ifindex); err != nil {
		return err // the links stay, of course
	}
	if deviceExists(ifname, ifindex) {
		return nil
	}
	// The name may have passed to a new device, whose links these are then.
	owner, err := d.pins.deviceOf(ifname)
	if err != nil {
		return err
	}
	if owner == 0 || owner == ifindex {
		if err := d.pins.removeLinks(ifname); err != nil {
			return fmt.Errorf("remove the links of %s: %w", ifname, err)
		}
	}
	if err := d.deleteEndpoint(ifindex); err != nil {
		return err
	}
	d.reapSources()
	return nil
}

// shut closes the gate of a device: by its state, or else by removing the
// element, for no element means drop too.
func (d *Datapath) shut(ifindex uint32) error {
	var ep abi.Endpoint
	m := d.coll.Maps["endpoints"]
	err := m.Lookup(ifindex, &ep)
	if errors.Is(err, ebpf.ErrKeyNotExist) {
		return nil
	}
	if err == nil {
		ep.State = uint32(abi.EPClosed)
		err = m.Update(ifindex, &ep, ebpf.UpdateExist)
	}
	if err == nil || errors.Is(err, ebpf.ErrKeyNotExist) {
		return nil
	}
	if delErr := d.deleteEndpoint(ifindex); delErr != nil {
		return fmt.Errorf("close the gate of device %d: %w", ifindex, errors.Join(err, delErr))
	}
	return nil
}

func (d *Datapath) deleteEndpoint(ifindex uint32) error {
	if err := d.coll.Maps["endpoints"].Delete(ifindex); err != nil && !errors.Is(err, ebpf.ErrKeyNotExist) {
		return mapError(fmt.Sprintf("delete the endpoint of device %d", ifindex), "endpoints", err)
	}
	return nil
}

// Endpoints returns the endpoints whose device exists and has both links, by
// the name under which they were added: what an agent adopts at its start.
func (d *Datapath) Endpoints() (map[string]abi.Endpoint, error) {
	names, err := d.pins.devices()
	if err != nil {
		return nil, err
	}
	out := map[string]abi.Endpoint{}
	for _, name := range names {
		ifindex, err := d.pins.deviceOf(name)
		if err != nil {
			return nil, err
		}
		var ep abi.Endpoint
		if ifindex == 0 {
			continue
		}
		switch err := d.coll.Maps["endpoints"].Lookup(ifindex, &ep); {
		case errors.Is(err, ebpf.ErrKeyNotExist):
			continue // ended: it has no element, so everything is dropped
		case err != nil:
			return nil, mapError("read the endpoint on "+name, "endpoints", err)
		case ep.Ifindex == ifindex:
			out[name] = ep
		}
	}
	return out, nil
}

// swapSteps replace the programs: first their pins, then those under the links
// of every device, which is done in one step each.
func (d *Datapath) swapSteps() []step {
	steps := []step{{"pin programs", func() error { return d.pins.pinPrograms(d.coll.Programs) }}}
	names, err := d.pins.devices()
	if err != nil {
		return []step{{"list devices", func() error { return err }}}
	}
	for _, name := range names {
		steps = append(steps, step{"swap " + name, func() error { return d.adoptDevice(name) }})
	}
	return steps
}

// adoptDevice puts this agent's programs under the links of a device, and takes
// the links away if it vanished meanwhile.
func (d *Datapath) adoptDevice(name string) error {
	ifindex, err := d.pins.deviceOf(name)
	if err != nil {
		return err
	}
	if ifindex == 0 {
		d.log().Info("a device vanished while no agent ran", zap.String("device", name))
		if err := d.pins.removeLinks(name); err != nil {
			return fmt.Errorf("remove the links of %s: %w", name, err)
		}
		return nil
	}
	// Replaces the programs; attaches one that an agent which died in
	// AddEndpoint had not come to.
	return d.attach(name, ifindex)
}

// putInOrder ends what an earlier agent left half done: no endpoint without its
// device, no slot without its binding, no policy that nobody uses. What is
// sound is not touched.
func (d *Datapath) putInOrder() error {
	// No program is under way any more that read a slot before it was emptied:
	// what the earlier agent emptied may be filled (see pc_slot).
	if err := barrier(); err != nil {
		return err
	}
	names, err := d.pins.devices()
	if err != nil {
		return err
	}
	alive := map[uint32]bool{}
	for _, name := range names {
		ifindex, err := d.pins.deviceOf(name)
		if err != nil {
			return err
		}
		alive[ifindex] = true
	}
	var ifindex uint32
	var ep abi.Endpoint
	var dead []uint32
	it := d.coll.Maps["endpoints"].Iterate()
	for it.Next(&ifindex, &ep) {
		if !alive[ifindex] {
			dead = append(dead, ifindex)
		}
	}
	if err := it.Err(); err != nil {
		return mapError("adopt endpoints", "endpoints", err)
	}
	for _, ifindex := range dead {
		if err := d.deleteEndpoint(ifindex); err != nil {
			return err
		}
	}
	d.reapSources()
	if err := d.adoptSlots(); err != nil {
		return err
	}
	return d.adoptPolicy()
}
