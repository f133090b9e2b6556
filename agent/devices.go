package agent

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"path"
	"slices"
	"strings"
	"sync"
	"time"

	"go.uber.org/zap"

	"portcullis/datapath"
	"portcullis/datapath/netdev"
)

// devices puts the programs on workloads' devices. It has a goroutine of its
// own, which alone touches links: to attach takes the kernel tens of
// milliseconds, for which the loop must not wait.
//
//	a device appears that --workload-device names    attach
//	a registration names a device                    attach, if not done
//	it has a new name                                its pins follow
//	it is gone                                       pins and endpoint go
//
// Until the loop writes its endpoint, a device with programs is shut. That
// needs an index that has no endpoint: the loop is asked to end the former
// device's before anything is attached.
type devices struct {
	dp     *datapath.Datapath
	cfg    *Config
	log    *zap.Logger
	alarms *alarms
	// inLoop runs a function in the loop: loop.call.
	inLoop func(context.Context, func() error) error
	// The loop's part, called by inLoop.
	vacate  func(ifindex uint32) error
	renamed func(ifindex uint32, name string)

	requests chan deviceRequest
	wake     chan struct{} // there is something in waiting

	mu       sync.Mutex
	waiting  map[uint32]sighting // guarded by mu; one for each device at most
	order    []uint32            // guarded by mu: the indices in waiting, oldest first
	attached map[uint32]string   // guarded by mu: index -> the name of its pins; changed by the owner goroutine

	// Devices that could not be put under programs, to be tried again. They
	// are down. Touched by the owner goroutine alone.
	failed map[uint32]string // index -> name
}

// sighting is what was heard of an index since it was looked at last.
type sighting struct {
	gone   bool           // a device of this index went
	device *netdev.Device // nil: there is none now
}

type deviceRequest struct {
	ifname string
	done   chan<- deviceAnswer // has room
}

type deviceAnswer struct {
	ifindex uint32
	err     error
}

// newDevices takes over the links that an earlier agent left.
func newDevices(l *loop) (*devices, error) {
	d := &devices{dp: l.dp, cfg: &l.cfg, log: l.log, alarms: l.alarms, inLoop: l.call, vacate: l.vacate, renamed: l.renamed,
		requests: make(chan deviceRequest), wake: make(chan struct{}, 1),
		waiting: map[uint32]sighting{}, failed: map[uint32]string{}}
	live, dead, err := d.dp.Links()
	if err != nil {
		return nil, err
	}
	for _, name := range dead {
		if err := d.dp.Detach(name, 0); err != nil {
			return nil, err
		}
	}
	d.attached = live
	return d, nil
}

// run is the owner goroutine, until ctx ends. Registrations go before devices
// that nobody asked for yet.
func (d *devices) run(ctx context.Context) error {
	retry := time.NewTicker(retryInterval)
	defer retry.Stop()
	for {
		select {
		case r := <-d.requests:
			d.serve(ctx, r)
			continue
		default:
		}
		if i, s, ok := d.next(); ok {
			d.look(ctx, i, s)
			continue
		}
		select {
		case <-ctx.Done():
			return nil
		case r := <-d.requests:
			d.serve(ctx, r)
		case <-d.wake:
		case <-retry.C:
			d.retry(ctx)
		}
		if ctx.Err() != nil {
			return nil
		}
	}
}

func (d *devices) serve(ctx context.Context, r deviceRequest) {
	ifindex, err := d.ensure(ctx, r.ifname)
	r.done <- deviceAnswer{ifindex, err}
}

// enforce puts a device under the programs, if it is not, and returns its
// index. When ctx ends first it may still be done; the device is shut then.
// Safe for concurrent use; not for the loop.
func (d *devices) enforce(ctx context.Context, ifname string) (uint32, error) {
	done := make(chan deviceAnswer, 1)
	select {
	case d.requests <- deviceRequest{ifname, done}:
	case <-ctx.Done():
		return 0, ctx.Err()
	}
	select {
	case a := <-done:
		return a.ifindex, a.err
	case <-ctx.Done():
		return 0, ctx.Err()
	}
}

// changed takes note of what the kernel tells of devices. It does not wait.
// Safe for concurrent use.
func (d *devices) changed(c netdev.Change) {
	d.mu.Lock()
	defer d.mu.Unlock()
	i := c.Device.Ifindex
	_, ours := d.attached[i]
	s, waits := d.waiting[i]
	if !ours && !waits && (c.Gone || !d.wanted(c.Device)) {
		return
	}
	if c.Gone {
		s = sighting{gone: true}
	} else {
		s.device = &c.Device
	}
	if !waits {
		d.order = append(d.order, i)
	}
	d.waiting[i] = s
	select {
	case d.wake <- struct{}{}:
	default: // it is awake
	}
}

// sweep takes note of the devices that vanished before anybody watched.
func (d *devices) sweep() {
	d.mu.Lock()
	var gone []uint32
	for i := range d.attached {
		if !datapath.DeviceExists(i) {
			gone = append(gone, i)
		}
	}
	d.mu.Unlock()
	for _, i := range gone {
		d.changed(netdev.Change{Device: netdev.Device{Ifindex: i}, Gone: true})
	}
}

func (d *devices) next() (ifindex uint32, s sighting, ok bool) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if len(d.order) == 0 {
		return 0, sighting{}, false
	}
	ifindex, d.order = d.order[0], d.order[1:]
	s = d.waiting[ifindex]
	delete(d.waiting, ifindex)
	return ifindex, s, true
}

// wanted reports whether the device is to have programs before anybody
// registers it.
func (d *devices) wanted(dev netdev.Device) bool {
	return d.mayServe(dev) && matchesAny(d.cfg.WorkloadDevices, dev.Name)
}

// mayServe reports whether it can be a workload's at all. On another one the
// node's own traffic would be judged as a workload's, and what comes in by an
// uplink would be believed to be this workload.
func (d *devices) mayServe(dev netdev.Device) bool {
	return dev.Kind == "veth" && !slices.Contains(d.cfg.Uplinks, dev.Name)
}

// look does what a sighting asks for.
func (d *devices) look(ctx context.Context, ifindex uint32, s sighting) {
	if s.gone {
		d.gone(ctx, ifindex)
	}
	if s.device == nil {
		return
	}
	name, ours := d.pinnedAs(ifindex)
	switch {
	case ours && name != s.device.Name:
		d.rename(ctx, ifindex, name, s.device.Name)
	case !ours && d.wanted(*s.device):
		if err := d.attach(ctx, s.device.Name, ifindex); err == nil {
			d.log.Debug("device under programs, before its registration", zap.String("device", s.device.Name))
		}
	}
}

// gone ends what a device had that went. A message that comes late, about an
// index that has a guarded device again, changes nothing.
func (d *devices) gone(ctx context.Context, ifindex uint32) {
	delete(d.failed, ifindex)
	d.settled()
	name, ours := d.pinnedAs(ifindex)
	if !ours {
		return
	}
	if ok, err := d.dp.Guarded(name, ifindex); ok || err != nil && datapath.DeviceExists(ifindex) {
		return // in doubt the programs stay
	}
	err := d.inLoop(ctx, func() error { return d.vacate(ifindex) })
	if err == nil {
		err = d.dp.Detach(name, ifindex)
	}
	if err != nil {
		// The pins stay, and the next start removes them.
		d.log.Warn("remove what a vanished device had", zap.String("device", name), zap.Error(err))
	}
	d.note(ifindex, "")
}

func (d *devices) rename(ctx context.Context, ifindex uint32, from, to string) {
	if err := d.dp.MoveLinks(ifindex, from, to); err != nil {
		d.log.Warn("follow a renamed device", zap.String("from", from), zap.String("to", to), zap.Error(err))
		return // it goes on under its former name
	}
	d.mu.Lock()
	for i, name := range d.attached { // they changed places: its own news is to come
		if name == to && i != ifindex {
			d.attached[i] = from
		}
	}
	d.mu.Unlock()
	d.note(ifindex, to)
	// An agent that is stopping leaves that to the next one.
	_ = d.inLoop(ctx, func() error { d.renamed(ifindex, to); return nil })
	d.log.Info("device renamed", zap.String("from", from), zap.String("to", to))
}

// ensure puts the device under the programs that a registration names.
func (d *devices) ensure(ctx context.Context, ifname string) (uint32, error) {
	dev, err := netdev.ByName(ifname)
	if err != nil {
		return 0, fmt.Errorf("%w in the agent's network namespace: %w", errNoDevice, err)
	}
	if !d.mayServe(dev) {
		return 0, fmt.Errorf("%w for a workload: %s is no host side of its veth (kind %s)", errNoDevice, ifname, dev.Kind)
	}
	if name, ours := d.pinnedAs(dev.Ifindex); ours && name != ifname {
		d.rename(ctx, dev.Ifindex, name, ifname)
	}
	if ok, err := d.dp.Guarded(ifname, dev.Ifindex); err == nil && ok {
		d.note(dev.Ifindex, ifname)
		delete(d.failed, dev.Ifindex) // to try it again would end what is registered now
		d.settled()
		return dev.Ifindex, nil
	}
	return dev.Ifindex, d.attach(ctx, ifname, dev.Ifindex)
}

// attach puts a device under the programs. If it fails the device is down.
func (d *devices) attach(ctx context.Context, ifname string, ifindex uint32) error {
	err := d.inLoop(ctx, func() error { return d.vacate(ifindex) })
	switch {
	case errors.Is(err, errStopped) || ctx.Err() != nil:
		return errStopped // the next agent sees the device
	case err != nil:
		// With programs the former device's endpoint would be this one's.
		err = errors.Join(err, d.dp.TakeDown(ifname))
	default:
		err = d.dp.Attach(ifname, ifindex)
	}
	if former, ours := d.pinnedAs(ifindex); ours && former != ifname {
		// Of a device that went without a word; only dead links are removed.
		err = errors.Join(err, d.dp.Detach(former, 0))
	}
	if err == nil {
		d.note(ifindex, ifname)
		delete(d.failed, ifindex)
	} else {
		err = fmt.Errorf("%w the programs on %s: %w", errKernelRefuse, ifname, err)
		d.failed[ifindex] = ifname
		d.alarms.raise("attach", fmt.Sprintf("%v; it was taken down, for nobody would judge its packets, and is tried again", err))
	}
	// What is told of its end from here on is heard; what was told before is not.
	if !datapath.DeviceExists(ifindex) {
		d.gone(ctx, ifindex)
	}
	d.settled()
	return err
}

// retry attaches again where that failed. A device that was taken down stays
// so: whoever made it sets it up, or makes another.
func (d *devices) retry(ctx context.Context) {
	for _, ifindex := range slices.Collect(maps.Keys(d.failed)) {
		dev, err := netdev.ByIndex(ifindex)
		if errors.Is(err, netdev.ErrNoDevice) {
			d.gone(ctx, ifindex)
		} else if err == nil && d.mayServe(dev) {
			_ = d.attach(ctx, dev.Name, ifindex) // it raises the alarm again
		}
	}
}

// settled ends the alarm when nothing is left to be tried again.
func (d *devices) settled() {
	if len(d.failed) == 0 {
		d.alarms.clear("attach")
	}
}

func (d *devices) pinnedAs(ifindex uint32) (name string, ok bool) {
	d.mu.Lock()
	defer d.mu.Unlock()
	name, ok = d.attached[ifindex]
	return name, ok
}

// note enters a device under programs; without a name it takes one out.
func (d *devices) note(ifindex uint32, name string) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if name == "" {
		delete(d.attached, ifindex)
	} else {
		d.attached[ifindex] = name
	}
}

// under returns the indices of the devices under programs. Safe for concurrent
// use.
func (d *devices) under() []uint32 {
	d.mu.Lock()
	defer d.mu.Unlock()
	out := make([]uint32, 0, len(d.attached))
	for i := range d.attached {
		out = append(out, i)
	}
	return out
}

func matchesAny(patterns []string, name string) bool {
	return slices.ContainsFunc(patterns, func(p string) bool {
		ok, err := path.Match(p, name)
		return ok && err == nil // Validate has looked for those that are wrong
	})
}

func checkPattern(p string) error {
	if _, err := path.Match(p, ""); err != nil || p == "" || strings.ContainsAny(p, "/ ") {
		return errors.New("want a pattern of device names, e.g. cali*")
	}
	return nil
}
