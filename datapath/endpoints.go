package datapath

import (
	"errors"
	"fmt"
	"sync/atomic"

	"github.com/cilium/ebpf"
	"go.uber.org/zap"

	"portcullis/bpf/abi"
)

// AddEndpoint gives the programs on a device an endpoint, quarantined whatever
// ep.State says: SetEndpoint lifts that. Attach comes before it; until the
// element is there, and if it cannot be written, they drop everything. It may
// be repeated.
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
	d.endpointsChanged()
	return mapError("add endpoint on "+ifname, "endpoints", err)
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

// SetEndpoint replaces the endpoint of a device as a whole: programs see the
// old one or the new one. On failure the old one stays in force.
func (d *Datapath) SetEndpoint(ep abi.Endpoint) error {
	if err := d.checkEndpoint(&ep); err != nil {
		return err
	}
	err := d.coll.Maps["endpoints"].Update(ep.Ifindex, &ep, ebpf.UpdateExist)
	d.endpointsChanged()
	return mapError(fmt.Sprintf("set endpoint %d", ep.ID), "endpoints", err)
}

// RemoveEndpoint removes the endpoint of a device that is gone. Where there is
// a device after all its programs drop everything. It may be repeated.
func (d *Datapath) RemoveEndpoint(ifindex uint32) error {
	if err := d.deleteEndpoint(ifindex); err != nil {
		return err
	}
	d.reapSources()
	return nil
}

func (d *Datapath) deleteEndpoint(ifindex uint32) error {
	err := d.coll.Maps["endpoints"].Delete(ifindex)
	d.endpointsChanged()
	if err != nil && !errors.Is(err, ebpf.ErrKeyNotExist) {
		return mapError(fmt.Sprintf("delete the endpoint of device %d", ifindex), "endpoints", err)
	}
	return nil
}

// endpointsChanged follows every change of the map endpoints: from here on the
// change is in force for what passed before it, too (pc_state.endpoint_epoch).
func (d *Datapath) endpointsChanged() { atomic.AddUint64(&d.state.at(0).EndpointEpoch, 1) }

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
	steps := []step{
		{"pin programs", func() error { return d.pins.pinPrograms(d.coll.Programs) }},
		{"attach " + afterTranslation, d.attachTranslation},
	}
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
	// The earlier agent may have changed a range, or bound an IP of none, and
	// died before it said so: what was judged by it is judged again (I5).
	d.bumpRangeEpoch()
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
