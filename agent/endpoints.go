package agent

import (
	"errors"
	"fmt"
	"maps"
	"net"
	"net/netip"
	"slices"
	"time"

	"go.uber.org/zap"

	flowpb "github.com/cilium/cilium/api/v1/flow"
	"portcullis/authz"
	"portcullis/authz/names"
	"portcullis/bpf/abi"
	"portcullis/datapath"
	"portcullis/identity"
	"portcullis/ipcache/lease"
	"portcullis/observe/flow"
)

// workload is what a registration says: who holds which IPs, behind which
// device.
type workload struct {
	uid       identity.UID
	namespace string
	name      string
	identity  identity.Identity
	ips       []netip.Addr
	ifname    string
	mac       net.HardwareAddr
	ports     []identity.NamedPort
	process   process        // whose end is the workload's
	sources   []netip.Prefix // further ones under which it forwards; in no node's range
	// after is the generation that a relabel ended: what is said here is not
	// what others were told of that one, or of one before.
	after identity.Generation
	// attachment is the sandbox it was registered for; zero: none was named.
	attachment attachment
	// held is for how long it had its IPs when it was registered; 0: they
	// were new to it. It is not kept.
	held time.Duration
	// byUID: its identity and ports are what the cluster says of its UID.
	byUID bool
}

func (w *workload) fullName() string { return w.namespace + "/" + w.name }

// endpoint is a local workload as the datapath knows it. Owned by the loop.
type endpoint struct {
	workload
	id        uint32 // never reused in a boot
	ifindex   uint32
	holdIndex uint32
	numeric   identity.Numeric
	state     abi.EndpointState // what the kernel was told last
	detail    string            // why it is not active
	policy    policySet
	subject   *authz.Subject // of loop.sets
	lost      uint32         // directions (enforceFlags) denied because their policies are gone, see adopt.go
	// generation of its bindings; 0 until it was activated.
	generation identity.Generation
	created    time.Time
	owner      flow.Owner  // of its pod, for flow records
	relabelled lease.Time  // packets that were held up to then are its former self's
	book       *names.Book // what it was told by DNS; nil: nothing
	// activated is closed when the quarantine ends, or when the endpoint does.
	activated chan struct{}
}

// policySet is an endpoint's policy as it stands in the kernel.
type policySet struct {
	id   uint32
	set  authz.Set
	lost uint32 // endpoint.lost, as it counts there
	svid bool   // its rules ask for evidence svid where they name none

	former []uint32 // the endpoint's sets before, the latest first; see formerSets
}

// Errors of a registration.
var (
	errConflict     = errors.New("already registered")
	errNotMine      = errors.New("not an address of this node's ranges")
	errNoDevice     = errors.New("no such device")
	errNoHoldIndex  = errors.New("too many endpoints")
	errKernelRefuse = errors.New("the kernel refused")
)

// admissible looks whether a workload may be registered, before its device is
// touched. An endpoint means that it is registered already, as it is.
func (l *loop) admissible(w *workload) (*endpoint, error) {
	if e, ok := l.endpoints[w.uid]; ok && !w.attachment.follows(e.attachment) {
		if !sameWorkload(&e.workload, w) {
			return nil, fmt.Errorf("uid %s is %w with other fields: relabel it, or deregister it first", w.uid, errConflict)
		}
		return e, nil
	}
	if ip, ok := l.nodeUIDs[w.uid]; ok {
		return nil, fmt.Errorf("uid %s is %w: it names this node as the holder of %s", w.uid, errConflict, ip)
	}
	return nil, l.claimIPs(w)
}

// register creates the endpoint, quarantined and enforced, and then asks the
// owner machine for its IPs. The programs are on the device already (see
// devices): without an endpoint, or when it ends in an error, they drop
// everything.
func (l *loop) register(w workload, ifindex uint32) (*endpoint, error) {
	if e, err := l.admissible(&w); e != nil || err != nil {
		return e, err
	}
	if stale := l.byIfindex[ifindex]; stale != nil && stale.state == abi.EPClosed {
		return nil, fmt.Errorf("device %s is %w: it was that of %s, which ended, and serves no other workload: make another device", w.ifname, errConflict, stale.fullName())
	} else if stale != nil {
		return nil, fmt.Errorf("device %s is %w: it belongs to %s", w.ifname, errConflict, stale.fullName())
	}
	if _, err := l.deregister(w.uid); err != nil { // its former sandbox's, if there is one
		return nil, err
	}
	holdIndex, ok := l.holdIndexes.take(l.now())
	if !ok {
		return nil, fmt.Errorf("%w: this agent serves at most %d", errNoHoldIndex, l.holdIndexes.size)
	}
	e := &endpoint{workload: w, id: l.dp.State().NextEndpointID(), ifindex: ifindex, holdIndex: holdIndex,
		state: abi.EPQuarantined, created: time.Now(), activated: make(chan struct{})}
	err := l.watchProcess(&e.workload)
	if err == nil {
		err = l.enforce(e)
	}
	if err != nil {
		l.processes.remove(e.uid)
		l.holdIndexes.give(holdIndex, l.now())
		return nil, err
	}
	l.add(e)
	l.log.Info("endpoint registered", zap.String("workload", e.fullName()), zap.Stringer("uid", e.uid), zap.Uint32("endpoint", e.id), zap.Any("ips", e.ips))
	l.stepOwner(lease.Add{UID: e.uid, IPs: e.ips, Identity: e.identity, Ports: e.ports, HeldSince: l.heldSince(&w)})
	return e, nil
}

// heldSince is since when a workload has had its IPs, 0 where that does not
// count: if an agent of this boot bound anything, others may hold leases on what
// this very workload was before.
func (l *loop) heldSince(w *workload) lease.Time {
	if w.held <= 0 || l.boundBefore {
		return 0
	}
	return max(l.now().Add(-w.held), 1)
}

// add enters an endpoint into the books.
func (l *loop) add(e *endpoint) {
	l.endpoints[e.uid] = e
	l.byIfindex[e.ifindex] = e
	l.byEndpointID[e.id] = e
	if e.state == abi.EPActive {
		l.hold(e)
	}
	l.names.addEndpoint(e)
	l.ownPod(e)
	l.eventEndpoint(flowpb.AgentEventType_ENDPOINT_CREATED, e)
	l.follow(e)
}

// hold notes that the endpoint has its IPs. Until it is active somebody else may
// have them, and keeps them if it is rejected.
func (l *loop) hold(e *endpoint) {
	for _, ip := range e.ips {
		l.byIP[ip] = e
	}
}

// enforce gives the programs on the device the endpoint and its policy, before
// anything waits: from here on its packets are judged as its own.
func (l *loop) enforce(e *endpoint) error {
	numeric, err := l.acquireIn(e.identity, identity.Region{})
	if err != nil {
		return err
	}
	e.numeric = numeric
	if err := l.compile(e); err != nil {
		l.release(numeric)
		return err
	}
	// The record first: an agent that dies after the next step must find it.
	if err := l.kept(l.store.putWorkload(e)); err != nil {
		l.uncompile(e)
		l.release(numeric)
		return err
	}
	err = l.dp.SetSources(e.id, e.sources)
	if err == nil {
		err = l.dp.AddEndpoint(e.ifname, e.abi())
	}
	if err != nil {
		l.uncompile(e)
		l.release(numeric)
		l.forgetWorkload(e.uid)
		return fmt.Errorf("%w the endpoint on %s: %w", errKernelRefuse, e.ifname, err)
	}
	return nil
}

// meaning compiles the endpoint's policy.
func (l *loop) meaning(e *endpoint) authz.Set {
	set := l.sets.Compile(e.subject)
	if l.neverEnforced(e) {
		return set // never means never; the alarm about lost policies stands
	}
	// Enforced without an entry is denied, to the node too: what denied it
	// something may be lost.
	set.LocalHost = set.LocalHost && e.lost&uint32(abi.EPEnforceIngress) == 0
	set.EnforceIngress = set.EnforceIngress || e.lost&uint32(abi.EPEnforceIngress) != 0
	set.EnforceEgress = set.EnforceEgress || e.lost&uint32(abi.EPEnforceEgress) != 0
	return set
}

// enforcement is how far the operator wants policy enforced on the endpoint.
func (l *loop) enforcement(e *endpoint) authz.Enforcement {
	if mode, ok := l.cfg.EnforceIn[e.identity.Namespace]; ok {
		return mode
	}
	return l.cfg.Enforce
}

// neverEnforced reports whether the operator wants no policy on the endpoint.
func (l *loop) neverEnforced(e *endpoint) bool { return l.enforcement(e) == authz.EnforceNever }

// compile puts the endpoint's policy into the kernel, under a new set.
func (l *loop) compile(e *endpoint) error {
	e.subject = l.sets.AddSubject(e.identity, e.ports...)
	l.bySubject[e.subject] = e
	l.recallNames(e)
	e.policy = policySet{id: l.dp.State().NextPolicySet(), set: l.meaning(e), lost: e.lost, svid: l.cfg.EvidenceIn[e.identity.Namespace] == ModeSVID}
	if err := l.putSet(e.policy.id, e.policy.set, policySet{}); err != nil {
		l.forgetSubject(e)
		return fmt.Errorf("%w the policy of %s: %w", errKernelRefuse, e.fullName(), err)
	}
	l.steerSet(e.policy.id, e.policy.set)
	l.sets.Use(e.subject, e.policy.set)
	return nil
}

// uncompile is compile's opposite.
func (l *loop) uncompile(e *endpoint) {
	l.forgetPolicy(e)
	l.forgetSubject(e)
}

func (l *loop) forgetSubject(e *endpoint) {
	l.forgetNames(e)
	l.sets.RemoveSubject(e.subject)
	delete(l.bySubject, e.subject)
}

// claimIPs checks that the node may give these IPs away. That another workload
// still has one does not matter: whoever registers was given the IP, and a
// deregistration may be missing. The owner machine takes it from the holder,
// whose gate is closed, once the newcomer stands, quarantined; the newcomer
// waits as after every end.
func (l *loop) claimIPs(w *workload) error {
	for _, ip := range w.ips {
		if !l.givable(ip) {
			return fmt.Errorf("%s is %w (%v)", ip, errNotMine, l.topology.Load().ranges)
		}
		if holder := l.byIP[ip]; holder != nil {
			l.log.Warn("an IP is given to another workload before its holder was deregistered", zap.Stringer("ip", ip),
				zap.String("holder", holder.fullName()), zap.String("newcomer", w.fullName()))
		}
	}
	for _, p := range w.sources {
		if owner, taken := l.topology.Load().overlapping(p); taken {
			return fmt.Errorf("extra source %s is %w: it lies in the range of node %s, which says who holds it", p, errNotMine, owner)
		}
	}
	return nil
}

// givable reports whether the IP is one that this node gives to workloads.
func (l *loop) givable(ip netip.Addr) bool {
	return l.mine(ip) && !slices.Contains(l.topology.Load().nodeIPs, ip)
}

func (l *loop) allGivable(ips []netip.Addr) bool {
	return !slices.ContainsFunc(ips, func(ip netip.Addr) bool { return !l.givable(ip) })
}

// abi returns the endpoint as the kernel is to see it.
func (e *endpoint) abi() abi.Endpoint {
	ep := abi.Endpoint{Generation: uint64(e.generation), ID: e.id, Ifindex: e.ifindex, State: uint32(e.state),
		Identity: uint32(e.numeric), Policy: e.policy.id, HoldIndex: e.holdIndex, UID: e.uid}
	for _, ip := range e.ips {
		if ip.Is4() {
			ep.IP4 = ip.As16()
		} else {
			ep.IP6 = ip.As16()
		}
	}
	copy(ep.Mac[:], e.mac)
	if len(e.mac) == 6 {
		ep.Flags |= uint32(abi.EPCheckMac)
	}
	if len(e.sources) > 0 {
		ep.Flags |= uint32(abi.EPForwards)
	}
	if e.policy.set.LocalHost {
		ep.Flags |= uint32(abi.EPAdmitHost)
	}
	if e.policy.set.Audit {
		ep.Flags |= uint32(abi.EPAudit)
	}
	if e.policy.svid {
		ep.Flags |= uint32(abi.EPSvid)
	}
	if e.policy.set.EnforceIngress {
		ep.Flags |= uint32(abi.EPEnforceIngress)
	}
	if e.policy.set.EnforceEgress {
		ep.Flags |= uint32(abi.EPEnforceEgress)
	}
	return ep
}

// activate lifts the quarantine. First the local bindings, so that neighbours
// on this node know the workload before it can speak; the gate comes last. If
// a write fails the endpoint stays quarantined, the safe side, and is tried
// again.
func (l *loop) activate(uid identity.UID, generation identity.Generation) {
	if l.activateNodeIP(uid, generation) {
		return
	}
	e, ok := l.endpoints[uid]
	if !ok || e.state == abi.EPActive {
		return
	}
	e.generation = generation
	l.dp.State().SetLastGeneration(uint64(generation))
	if err := l.openGate(e); err != nil {
		e.detail = err.Error()
		l.alarms.raise("map-full", fmt.Sprintf("%s stays quarantined: %v", e.fullName(), err))
		l.retryActivation[uid] = generation
		return
	}
	delete(l.retryActivation, uid)
	l.hold(e)
	l.proveEndpoint(e)
	l.names.addEndpoint(e)
	l.log.Info("endpoint active", zap.String("workload", e.fullName()), zap.Uint64("generation", uint64(generation)))
	close(e.activated)
	l.instruments.ReuseDelay(time.Since(e.created))
}

func (l *loop) openGate(e *endpoint) error {
	for _, ip := range e.ips {
		b := identity.Binding{IP: ip, Generation: e.generation, UID: e.uid, Identity: e.identity, Owner: l.cfg.Node, Ports: e.ports}
		if err := l.installLocal(b, e.ifindex); err != nil {
			return err
		}
	}
	e.state = abi.EPActive
	if err := l.dp.SetEndpoint(e.abi()); err != nil {
		e.state = abi.EPQuarantined
		return fmt.Errorf("%w to open the gate: %w", errKernelRefuse, err)
	}
	e.detail = ""
	return nil
}

// deregister ends a workload: its gate closes in the kernel before the owner
// machine hears of it, for the wait before reuse counts from there. The
// programs stay on the device, shut, until the device is gone. existed is
// false for a UID that is not registered.
func (l *loop) deregister(uid identity.UID) (existed bool, err error) {
	e, ok := l.endpoints[uid]
	if !ok {
		return false, nil
	}
	old := e.state
	e.state = abi.EPClosed
	if err := l.dp.SetEndpoint(e.abi()); err != nil && datapath.DeviceExists(e.ifindex) {
		// The gate may still be open: the binding must not be given up.
		e.state = old
		return true, fmt.Errorf("%w to close the gate of %s, try again: %w", errKernelRefuse, e.fullName(), err)
	}
	l.processes.remove(uid)
	l.endHolds(l.holds.DropEndpoint(e.id, abi.ReasonQuarantined))
	l.zeroBinding(e.ips, uid) // only its own: its IPs may be another's
	for _, ip := range e.ips {
		if l.byIP[ip] == e {
			delete(l.byIP, ip)
		}
	}
	delete(l.endpoints, uid)
	delete(l.byEndpointID, e.id)
	delete(l.retryActivation, uid)
	delete(l.retryClose, uid)
	l.names.removeEndpoint(e)
	l.telling.forget(e.id)
	l.eventEndpoint(flowpb.AgentEventType_ENDPOINT_DELETED, e)
	l.forgetWorkload(uid)
	l.unfollow(uid)
	l.stepOwner(lease.Delete{UID: uid})
	l.uncompile(e)
	l.release(e.numeric)
	l.holdIndexes.give(e.holdIndex, l.now())
	select {
	case <-e.activated:
	default:
		close(e.activated)
	}
	l.log.Info("endpoint ended", zap.String("workload", e.fullName()), zap.Stringer("uid", uid))
	l.sweepDevice(e.ifindex)
	return true, nil
}

func (l *loop) forgetWorkload(uid identity.UID) {
	if err := l.store.deleteWorkload(uid); err != nil {
		// A restart finds a record without an endpoint, and drops it.
		l.log.Warn("remove the record of a workload", zap.Error(err))
	}
}

// sweepDevice removes the element of an ended endpoint once its device is gone;
// its links are removed by devices.
func (l *loop) sweepDevice(ifindex uint32) {
	e := l.byIfindex[ifindex]
	if e == nil || e.state != abi.EPClosed || datapath.DeviceExists(ifindex) {
		return
	}
	if err := l.dp.RemoveEndpoint(ifindex); err != nil {
		l.log.Warn("remove an ended endpoint", zap.String("device", e.ifname), zap.Error(err))
	}
	delete(l.byIfindex, ifindex)
}

// linkGone is the second way in which a workload's end is seen. If another
// device has the index by now, devices has a closer look.
func (l *loop) linkGone(ifindex uint32) {
	if l.byIfindex[ifindex] == nil || datapath.DeviceExists(ifindex) {
		return
	}
	if err := l.vacate(ifindex); err != nil {
		l.log.Error("end of a workload whose device is gone", zap.Error(err))
	}
}

// vacate ends the endpoint that an index has, whose device is gone: if another
// device has the index it must not pass for the former one's workload (I1).
func (l *loop) vacate(ifindex uint32) error {
	// Not one that was registered under its UID since, behind another device.
	if e := l.byIfindex[ifindex]; e != nil && l.endpoints[e.uid] == e {
		if _, err := l.deregister(e.uid); err != nil {
			return err
		}
	}
	if err := l.dp.RemoveEndpoint(ifindex); err != nil {
		return err
	}
	delete(l.byIfindex, ifindex)
	return nil
}

// renamed notes the new name of an endpoint's device.
func (l *loop) renamed(ifindex uint32, name string) {
	e := l.byIfindex[ifindex]
	if e == nil || e.ifname == name {
		return
	}
	e.ifname = name
	if l.endpoints[e.uid] != e {
		return // it ended
	}
	if err := l.kept(l.store.putWorkload(e)); err != nil {
		// The next agent finds it under another name than it was registered
		// with, and shuts it.
		l.log.Warn("note the new name of a device", zap.String("workload", e.fullName()), zap.Error(err))
	}
}

// sweepDevices ends the workloads whose devices vanished between the adoption
// and the watch over devices.
func (l *loop) sweepDevices() {
	for _, ifindex := range slices.Collect(maps.Keys(l.byIfindex)) {
		l.linkGone(ifindex)
	}
}

func sameWorkload(a, b *workload) bool {
	return a.namespace == b.namespace && a.name == b.name && a.identity.Equal(b.identity) &&
		slices.Equal(a.ips, b.ips) && a.ifname == b.ifname && slices.Equal(a.ports, b.ports) && slices.Equal(a.sources, b.sources) &&
		a.process.PID == b.process.PID && a.attachment == b.attachment && a.byUID == b.byUID
}
