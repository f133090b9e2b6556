package agent

import (
	"fmt"
	"net/netip"
	"slices"

	"go.uber.org/zap"

	"portcullis/authz"
	"portcullis/bpf/abi"
	"portcullis/datapath"
	"portcullis/identity"
	"portcullis/ipcache"
	"portcullis/ipcache/lease"
)

// What an earlier agent left in the kernel goes on enforcing while no agent
// runs. This one takes over what it can account for and shuts the rest:
//
//	pinned slot, identity known   -> stays, under its stamp, until its lease ends
//	pinned slot, identity unknown -> zeroed
//	pinned slot, of a node that may
//	not speak for the IP any more -> zeroed
//	pinned endpoint, registered   -> stays as it is, gets its policy anew
//	registered, its process ended -> its gate is closed
//	registered, half relabelled   -> quarantined, waits as a new one
//	pinned endpoint, not          -> its gate is closed
//	pinned endpoint, its policy   -> everything is denied there until somebody
//	files are gone                   imports one for it, or deletes any (I2)
//
// Policies are in the repository before the first endpoint is compiled, and
// numbers keep their identities, so a packet that passed before passes now.

// adoptSlots restores the table of slots and the numbers in them.
func (l *loop) adoptSlots() error {
	wanted, holders := map[identity.Hash]bool{}, map[holder]bool{}
	for _, s := range l.dp.Slots() {
		wanted[s.Cold.IdentityHash] = true
		holders[holderOf(s)] = true
	}
	ports, err := l.store.loadPorts(func(of holder) bool { return holders[of] })
	if err := l.forgot(err); err != nil {
		return err
	}
	known, err := l.store.loadIdentities(func(h identity.Hash) bool { return wanted[h] })
	if err := l.forgot(err); err != nil {
		return err
	}
	for _, r := range []string{"host", "remote-node"} {
		id, _ := identity.Reserved(r)
		known[id.Hash()] = id
	}
	for _, w := range l.stored {
		known[w.identity.Hash()] = w.identity
	}
	numbers := map[identity.Numeric]bool{}
	for _, s := range l.dp.Slots() {
		numbers[identity.Numeric(s.Identity)] = true
	}
	there, err := l.dp.Ranges()
	if err != nil {
		return err
	}
	for _, r := range there {
		numbers[identity.Numeric(r.Identity)] = true
	}
	if err := l.forgot(l.store.loadRegions(func(n identity.Numeric) bool { return numbers[n] })); err != nil {
		return err
	}
	for i, s := range l.dp.Slots() {
		id, ok := known[s.Cold.IdentityHash]
		named := ports[holderOf(s)]
		if s.Lease == ipcache.LeaseLocal {
			named = l.stored[s.Cold.UID].ports
		}
		if !ok || l.adoptSlot(i, s, id, named) != nil {
			if err := l.dp.ZeroSlot(i, s.Stamp, datapath.AddrFrom(s.IP)); err != nil {
				return err
			}
			l.ids.Reserve(identity.Numeric(s.Identity), int64(l.now()))
			l.log.Info("a binding of an earlier agent is not taken over", zap.Stringer("ip", datapath.AddrFrom(s.IP)))
		}
	}
	return nil
}

func holderOf(s datapath.Slot) holder { return holder{cString(s.Cold.Owner[:]), s.Cold.UID} }

// forgetStrangers keeps what is stored of remote workloads in proportion to
// those that are known now.
func (l *loop) forgetStrangers() {
	if n := l.store.appended; n < storeCompactAbove || n < 2*l.storeKept && n < storeLimit {
		return
	}
	wanted, holders := map[identity.Hash]bool{}, map[holder]bool{}
	for e := range l.table.All() {
		wanted[e.Hash] = true
		holders[holder{e.Binding.Owner, e.Binding.UID}] = true
	}
	if err := l.store.forget(func(h identity.Hash) bool { return wanted[h] }, func(of holder) bool { return holders[of] },
		func(n identity.Numeric) bool { _, ok := l.ids.Lookup(n); return ok }); err != nil {
		l.log.Warn("rewrite what is remembered of remote workloads", zap.Error(err))
		return
	}
	l.storeKept = l.store.appended
}

// adoptSlot takes over one slot; on an error the caller zeroes it.
func (l *loop) adoptSlot(slot uint32, s datapath.Slot, id identity.Identity, ports []identity.NamedPort) error {
	if s.Lease == ipcache.LeaseClassic && l.cfg.Evidence != ModeClassic {
		return fmt.Errorf("slot %d is of mode classic", slot)
	}
	if watch := s.Evidence == uint8(identity.EvidenceWatch); s.Lease >= ipcache.LeaseFirst && watch != (l.cfg.Evidence == ModeWatch) {
		return fmt.Errorf("slot %d is of another mode, and nobody would move its deadline", slot)
	}
	if s.Lease >= ipcache.LeaseFirst && l.cfg.Evidence == ModeClassic {
		return fmt.Errorf("slot %d has a lease, which nobody renews in mode classic", slot)
	}
	if owner := cString(s.Cold.Owner[:]); s.Lease != ipcache.LeaseLocal && !l.speaks(owner, datapath.AddrFrom(s.IP)) {
		// Nor could the one who may have it now, perhaps this node itself.
		return fmt.Errorf("slot %d: %s does not speak for its IP any more", slot, owner)
	}
	if l.proofs == nil && s.Proved != 0 {
		// Nobody follows its SVID, bundle and clock any more.
		if err := l.dp.SetProved(slot, s.Stamp, 0); err != nil {
			return err
		}
		s.Proved = 0
	}
	n := identity.Numeric(s.Identity)
	if err := l.restore(n, id); err != nil {
		return err
	}
	b := identity.Binding{IP: datapath.AddrFrom(s.IP), Generation: identity.Generation(s.Generation), UID: s.Cold.UID, Identity: id, Owner: cString(s.Cold.Owner[:]), Ports: ports}
	if err := l.table.Restore(ipcache.Entry{Slot: slot, Stamp: s.Stamp, Lease: s.Lease, Binding: b, Hash: id.Hash(),
		OwnerBoot: s.Cold.OwnerBoot, Evidence: identity.Evidence(s.Evidence), Proved: int64(s.Proved)}); err != nil {
		l.release(n)
		return err
	}
	if l.proofs != nil && s.Lease == ipcache.LeaseLocal && int64(s.Proved) > int64(l.now()) {
		l.proofs.keepProof(b.UID, l.now())
	}
	l.repo.AddPorts(s.Stamp, id, ports) // no endpoint is compiled yet
	l.numerics[s.Stamp], l.installedAt[s.Stamp] = n, lease.Time(s.Installed)
	return nil
}

// registered reports whether the endpoint on a device is one of those that an
// earlier agent registered and did not end, with IPs that are still this
// node's: the owner machine takes the adoption of others for the end of all.
func (l *loop) registered(name string, ep abi.Endpoint) bool {
	w, ok := l.stored[ep.UID]
	return ok && w.ifname == name && ep.State != uint32(abi.EPClosed) && sameIPs(w.ips, ep) && l.allGivable(w.ips)
}

// shutStrangers closes the endpoints that are not registered. It comes before
// the owner machine begins: to that, their bindings ended at its start, and
// packets that they send later must not be taken for their IPs' next holder's
// (I1).
func (l *loop) shutStrangers() error {
	pinned, err := l.dp.Endpoints()
	if err != nil {
		return err
	}
	for name, ep := range pinned {
		why := "it is not registered"
		if l.registered(name, ep) {
			if !l.processGone(l.stored[ep.UID]) {
				if err := l.quarantineHalfRelabelled(ep); err != nil {
					return err
				}
				continue
			}
			why = "its process ended"
		}
		if err := l.shutPinned(name, ep); err != nil {
			return err
		}
		l.log.Warn("an endpoint of an earlier agent is shut", zap.String("why", why), zap.String("device", name), zap.String("uid", identity.UID(ep.UID).String()))
	}
	return nil
}

func (l *loop) shutPinned(name string, ep abi.Endpoint) error {
	ep.State = uint32(abi.EPClosed)
	if err := l.dp.SetEndpoint(ep); err != nil {
		return fmt.Errorf("shut the endpoint on %s that an earlier agent left: %w", name, err)
	}
	return nil
}

// adoptEndpoints takes over the endpoints that are registered. It comes before
// every other input of the owner machine.
func (l *loop) adoptEndpoints() error {
	pinned, err := l.dp.Endpoints()
	if err != nil {
		return err
	}
	for name, ep := range pinned {
		if !l.registered(name, ep) {
			continue
		}
		w := l.stored[ep.UID]
		if err := l.adoptEndpoint(w, ep); err != nil {
			l.log.Warn("an endpoint of an earlier agent is not taken over", zap.String("workload", w.fullName()), zap.Error(err))
			if err := l.shutPinned(name, ep); err != nil {
				return err
			}
		}
	}
	for uid, w := range l.stored {
		if l.endpoints[uid] == nil {
			l.zeroBinding(w.ips, uid)
			if err := l.store.deleteWorkload(uid); err != nil {
				return err
			}
		}
	}
	l.stored = nil
	return nil
}

func (l *loop) adoptEndpoint(w workload, ep abi.Endpoint) error {
	e := &endpoint{workload: w, id: ep.ID, ifindex: ep.Ifindex, holdIndex: ep.HoldIndex, state: abi.EndpointState(ep.State),
		generation: identity.Generation(ep.Generation), created: l.created[w.uid], activated: make(chan struct{})}
	if !l.holdIndexes.reserve(e.holdIndex) {
		return fmt.Errorf("its hold index %d is taken", e.holdIndex)
	}
	if e.lost = ep.Flags & enforceFlags; e.lost != 0 && (l.underPolicy(e) || l.neverHadAny(e, ep)) {
		e.lost = 0
	}
	if e.lost != 0 {
		then := "everything is denied there until one is imported, or policies are deleted"
		if l.neverEnforced(e) {
			then = "it is open, for policy is never enforced there, and stays so later unless one is imported"
		}
		l.alarms.raise("policies-lost", fmt.Sprintf("%s is under policy in the kernel, and no policy in %s selects it: %s", e.fullName(), l.cfg.StateDir, then))
	}
	var err error
	if e.numeric, err = l.acquireIn(e.identity, identity.Region{}); err == nil {
		err = l.compile(e)
	}
	if err != nil {
		l.holdIndexes.give(e.holdIndex, l.now())
		return err
	}
	l.add(e)
	l.watchAdopted(e)
	add := lease.Add{UID: e.uid, IPs: e.ips, Identity: e.identity, Ports: e.ports}
	if e.state != abi.EPActive {
		l.pendingAdds = append(l.pendingAdds, add)
		return l.dp.SetEndpoint(e.abi())
	}
	l.stepOwner(lease.Adopt{Add: add, Generation: e.generation})
	if l.ownerHolds(e.uid, e.generation) && l.localStands(e) {
		close(e.activated)
	} else {
		// Not a workload that the owner machine can vouch for: it waits as
		// a new one does.
		l.zeroBinding(e.ips, e.uid)
		for _, ip := range e.ips {
			delete(l.byIP, ip)
		}
		e.state, e.generation = abi.EPQuarantined, 0
	}
	if err := l.dp.SetEndpoint(e.abi()); err != nil {
		return err
	}
	return l.dp.DeletePolicySet(ep.Policy)
}

// enforceFlags are what a policy makes of an endpoint.
const enforceFlags = uint32(abi.EPEnforceIngress | abi.EPEnforceEgress)

// neverHadAny reports whether the endpoint was denied everything in the kernel
// as --enforce=always has it, without a policy, and is so now: then none was
// lost. The node may have been let in all the same; if it was not, what kept it
// out may be lost.
func (l *loop) neverHadAny(e *endpoint, ep abi.Endpoint) bool {
	node := ep.Flags&uint32(abi.EPAdmitHost) != 0 || l.cfg.AllowLocalHost != LocalHostAlways
	return l.enforcement(e) == authz.EnforceAlways && ep.Flags&enforceFlags == enforceFlags && node && l.dp.PolicySets()[ep.Policy] == 0
}

// underPolicy reports whether any policy speaks of the endpoint.
func (l *loop) underPolicy(e *endpoint) bool {
	return slices.ContainsFunc(l.repo.List(), func(p *authz.Policy) bool { return l.repo.Selects(p, e.identity) })
}

// localStands reports whether every binding of the endpoint is installed, and
// under the endpoint's identity.
func (l *loop) localStands(e *endpoint) bool {
	return !slices.ContainsFunc(e.ips, func(ip netip.Addr) bool {
		entry, ok := l.table.Get(ip)
		return !ok || entry.Lease != ipcache.LeaseLocal || entry.Binding.UID != e.uid || entry.Binding.Generation != e.generation || !entry.Binding.Identity.Equal(e.identity)
	})
}

// ownerHolds reports whether the owner machine holds the workload as active.
func (l *loop) ownerHolds(uid identity.UID, generation identity.Generation) bool {
	return slices.ContainsFunc(l.owner.Workloads(), func(w lease.WorkloadInfo) bool {
		return w.UID == uid && w.State == lease.WorkloadActive && w.Generation == generation
	})
}

// zeroBinding ends the local bindings of a workload on these IPs.
func (l *loop) zeroBinding(ips []netip.Addr, uid identity.UID) {
	for _, ip := range ips {
		if e, ok := l.table.Get(ip); ok && e.Binding.UID == uid {
			l.zeroLocal(ip)
		}
	}
}

// sweepSlots ends the local bindings that no endpoint stands behind, once
// every endpoint that can be adopted was.
func (l *loop) sweepSlots() {
	var gone []netip.Addr
	for e := range l.table.All() {
		if e.Lease == ipcache.LeaseLocal && l.byIP[e.Binding.IP] == nil && !slices.Contains(l.topology.Load().nodeIPs, e.Binding.IP) {
			gone = append(gone, e.Binding.IP)
		}
	}
	for _, ip := range gone {
		l.zeroLocal(ip)
	}
}

func sameIPs(ips []netip.Addr, ep abi.Endpoint) bool {
	var have []netip.Addr
	for _, a := range []abi.Addr{ep.IP4, ep.IP6} {
		if ip := datapath.AddrFrom(a); ip.IsValid() {
			have = append(have, ip)
		}
	}
	return len(have) == len(ips) && !slices.ContainsFunc(ips, func(ip netip.Addr) bool { return !slices.Contains(have, ip) })
}

// cString returns the node name in a zero-terminated field.
func cString(b []byte) identity.NodeName {
	if i := slices.Index(b, 0); i >= 0 {
		b = b[:i]
	}
	return identity.NodeName(b)
}
