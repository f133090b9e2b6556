package agent

import (
	"crypto/sha256"
	"fmt"
	"net/netip"

	"go.uber.org/zap"

	"portcullis/bpf/abi"
	"portcullis/datapath"
	"portcullis/identity"
	"portcullis/ipcache"
	"portcullis/ipcache/lease"
)

// LocalHost is whether a node reaches its own workloads, as the kubelet's probes
// must.
type LocalHost string

// The kinds.
const (
	LocalHostAlways LocalHost = "always" // unless a policy denies it
	LocalHostPolicy LocalHost = "policy" // where policies allow it
)

// installLocal publishes a binding of this node. It has no deadline: only the
// live agent changes it. ifindex is the device by which its packets come in; 0
// for the node's own addresses, whose packets are generated here.
func (l *loop) installLocal(b identity.Binding, ifindex uint32) error {
	if e, ok := l.table.Get(b.IP); ok {
		if e.Binding.UID == b.UID && e.Binding.Generation == b.Generation {
			return nil // a repeated activation
		}
		l.zeroLocal(b.IP)
	}
	e, err := l.table.Install(b, ipcache.LeaseLocal, identity.EvidenceLocal, l.boot)
	if err != nil {
		return err
	}
	// The slot is a user of the number: it has one as long as it stands.
	n, err := l.acquire(b.Identity, b.IP)
	if err != nil {
		l.table.Free(e.Slot)
		return err
	}
	if err := l.addPorts(e.Stamp, b); err != nil {
		l.table.Free(e.Slot)
		l.release(n)
		return err
	}
	s := abi.Slot{Stamp: e.Stamp, IP: datapath.Addr(b.IP), Installed: uint64(l.now()), Generation: uint64(b.Generation),
		Identity: uint32(n), Lease: e.Lease, Ifindex: ifindex, Evidence: uint8(identity.EvidenceLocal)}
	if err := l.dp.InstallSlot(e.Slot, s, cold(e.Stamp, b, l.boot)); err != nil {
		l.table.Free(e.Slot)
		l.removePorts(e.Stamp)
		l.release(n)
		return fmt.Errorf("%w the binding of %s: %w", errKernelRefuse, b.IP, err)
	}
	l.numerics[e.Stamp] = n
	l.installedAt[e.Stamp] = l.now()
	l.settled(n, b)
	return nil
}

// zeroLocal ends a local binding in the kernel.
func (l *loop) zeroLocal(ip netip.Addr) {
	e, ok := l.table.Get(ip)
	if !ok || e.Lease != ipcache.LeaseLocal {
		return
	}
	l.table.Condemn(e.Slot)
	if err := l.dp.ZeroSlot(e.Slot, e.Stamp, ip); err != nil {
		// The stamp is zeroed by a store that cannot fail; what failed is
		// to remove the IP's entry, which now names a stamp that no slot
		// has, and so counts for nothing.
		l.log.Warn("remove a local binding", zap.Stringer("ip", ip), zap.Error(err))
	}
	l.table.Free(e.Slot)
	l.removePorts(e.Stamp)
	l.release(l.numerics[e.Stamp])
	delete(l.installedAt, e.Stamp)
	delete(l.numerics, e.Stamp)
}

// addNodeIPs makes this node the holder of its own addresses, for neighbours
// (identity remote-node) and for its own endpoints (identity host).
func (l *loop) addNodeIPs() {
	remote, _ := identity.Reserved("remote-node")
	for _, ip := range l.topology.Load().nodeIPs {
		uid := nodeUID(l.cfg.Node, ip)
		l.nodeUIDs[uid] = ip
		// Generation 0: the one in the journal, if this agent is not the
		// first; the node has always held its own addresses.
		l.stepOwner(lease.Adopt{Add: lease.Add{UID: uid, IPs: []netip.Addr{ip}, Identity: remote}})
		for _, w := range l.owner.Workloads() {
			if w.UID == uid && w.State == lease.WorkloadActive {
				l.activateNodeIP(uid, w.Generation)
			}
		}
	}
}

// activateNodeIP publishes an address of the node; false: the UID is not one.
func (l *loop) activateNodeIP(uid identity.UID, generation identity.Generation) bool {
	ip, ok := l.nodeUIDs[uid]
	if !ok {
		return false
	}
	host, _ := identity.Reserved("host")
	b := identity.Binding{IP: ip, Generation: generation, UID: uid, Identity: host, Owner: l.cfg.Node}
	if err := l.installLocal(b, 0); err != nil {
		l.alarms.raise("map-full", fmt.Sprintf("this node's address %s is unknown to its own endpoints: %v", ip, err))
		l.retryActivation[uid] = generation
		return true
	}
	delete(l.retryActivation, uid)
	return true
}

// nodeUID names the node itself as the holder of one of its addresses: the
// same after a restart.
func nodeUID(node identity.NodeName, ip netip.Addr) (u identity.UID) {
	h := sha256.Sum256([]byte("portcullis node address\x00" + string(node) + "\x00" + ip.String()))
	copy(u[:], h[:])
	u[6] = u[6]&0x0f | 0x80 // version 8: made by a rule of its own (RFC 9562)
	u[8] = u[8]&0x3f | 0x80
	return u
}
