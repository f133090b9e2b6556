package sim

import (
	"portcullis/identity"
	"portcullis/ipcache/lease"
)

// who names a workload under one identity: a relabel makes it somebody else,
// and no two incarnations of a UID have the same identity here.
type who struct {
	uid  identity.UID
	hash identity.Hash
}

// workload is the truth about a workload, as long as it has one identity.
type workload struct {
	uid    identity.UID
	id     identity.Identity
	me     who // of uid and id; set by World.enter
	node   *node
	ip     int // index into World.ips
	name   string
	number int   // of all, in the order in which they came to be
	left   int64 // real time at which it got another identity
	active bool  // it can send and receive
	began  int64 // real time
	ended  int64 // real time at which it could last send; 0: it never could, or still can
	// lastLive is, for each node, when its kernel last let packets to this
	// workload out; -1: never, or long ago.
	lastLive []int64
}

// endpoint is an element of the pinned endpoints map.
type endpoint struct {
	w      *workload
	active bool
	gen    identity.Generation
}

type kslot struct {
	stamp uint64
	ip    int
	lease uint32
	uid   identity.UID
	gen   identity.Generation
	hash  identity.Hash
	of    *workload // uid under hash; nil: there never was one
	owner *node
	boot  identity.BootID

	switched    lease.Time // when it was put on its lease
	proved      lease.Time
	provedLease uint32 // the lease that it was on then
	proof       *made
	asked       int64 // real time
	nonce       lease.ProofNonce
}

// flow is an entry of the conntrack table: it passes while its stamp stands.
type flow struct {
	slot  uint32
	stamp uint64
	ip    int
	who   who // the peer it was made for
}

func (u *workload) who() who { return u.me }

func (s *kslot) who() who { return who{s.uid, s.hash} }

// kernel is what outlives the agent: the maps.
type kernel struct {
	slots     []kslot
	leases    []lease.Time
	binding   map[int]uint32 // IP -> slot
	endpoints []*endpoint
	flows     []flow
	nextStamp uint64
	maxStamp  uint64
	lastGen   identity.Generation
}

const (
	kernelSlots  = 24
	kernelLeases = 64
)

func newKernel() kernel {
	return kernel{
		slots: make([]kslot, kernelSlots), leases: make([]lease.Time, kernelLeases),
		binding: map[int]uint32{}, nextStamp: 1,
	}
}

func (k *kernel) endpoint(uid identity.UID) *endpoint {
	for _, e := range k.endpoints {
		if e.w.uid == uid {
			return e
		}
	}
	return nil
}

func (k *kernel) remove(uid identity.UID) {
	for i, e := range k.endpoints {
		if e.w.uid == uid {
			k.endpoints = append(k.endpoints[:i:i], k.endpoints[i+1:]...)
			return
		}
	}
}

// live tells whether a slot admits anything now.
func (n *node) live(s *kslot) bool { return s.stamp != 0 && n.k.leases[s.lease] > n.clock() }

// write carries out a write of the verifier.
func (n *node) write(wr lease.Write) {
	k := &n.k
	switch wr := wr.(type) {
	case lease.Install:
		ip := n.w.ipIndex[wr.Binding.IP]
		if wr.Stamp <= k.maxStamp {
			n.w.violate("I4", "%s: stamp %d was used before (%d)", n.name, wr.Stamp, k.maxStamp)
		}
		k.maxStamp = wr.Stamp
		k.slots[wr.Slot] = kslot{
			stamp: wr.Stamp, ip: ip, lease: wr.Lease, uid: wr.Binding.UID, gen: wr.Binding.Generation,
			hash: wr.Binding.Identity.Hash(), owner: n.w.byName[wr.Binding.Owner], boot: wr.OwnerBoot,
		}
		k.slots[wr.Slot].of = n.w.byWho[k.slots[wr.Slot].who()]
		k.binding[ip] = wr.Slot
	case lease.Zero:
		if s := &k.slots[wr.Slot]; s.stamp == wr.Stamp {
			if k.binding[s.ip] == wr.Slot {
				delete(k.binding, s.ip)
			}
			s.stamp = 0
		}
	case lease.SwitchLease:
		if s := &k.slots[wr.Slot]; s.stamp == wr.Stamp {
			s.lease, s.switched = wr.Lease, n.clock()
		}
	case lease.SetProved:
		n.storeProved(wr)
	case lease.SetDeadline:
		k.leases[wr.Lease] = wr.Deadline
	}
}

// packet is one that a workload truly sent.
type packet struct {
	from    *workload
	arrival lease.Time
}

// reinjected is how a held packet comes to be judged again.
const reinjected = "held, re-injected"

// judge is the kernel's verdict on a packet from the IP of its sender: first
// by flow, else by binding. It checks I1 and I4 on what passes.
func (n *node) judge(p packet, how string) bool {
	k := &n.k
	for _, f := range k.flows {
		if s := &k.slots[f.slot]; f.ip == p.from.ip && s.stamp == f.stamp && n.live(s) {
			if f.who != p.from.who() && !n.w.excused(p.from, f.who) {
				n.w.violate("I4", "%s: a packet of %s passes by the flow of another workload (%s)", n.name, p.from.name, how)
			}
			return true
		}
	}
	i, ok := k.binding[p.from.ip]
	if !ok || !n.live(&k.slots[i]) {
		return false
	}
	s := &k.slots[i]
	if s.who() != p.from.who() && !n.w.excused(p.from, s.who()) {
		n.w.violate("I1", "%s: a packet of %s is admitted as another workload (%s)", n.name, p.from.name, how)
	}
	if later := n.w.byWho[s.who()]; how == reinjected && later != nil && later.uid == p.from.uid && later.number > p.from.number {
		// Not even mode prompt takes for the new identity's what was held.
		n.w.violate("I1", "%s: a held packet of %s is admitted as %s", n.name, p.from.name, later.name)
	}
	if len(k.flows) >= 16 {
		k.flows = k.flows[1:]
	}
	k.flows = append(k.flows, flow{slot: i, stamp: s.stamp, ip: s.ip, who: s.who()})
	return true
}
