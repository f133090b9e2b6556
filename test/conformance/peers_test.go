package conformance

import (
	"cmp"
	"math/rand/v2"
	"net/netip"

	"portcullis/authz"
	"portcullis/bpf/abi"
	"portcullis/identity"
)

// What the kernel's maps say of a peer's address.
const (
	loopback = 1    // the device of test-run, and so of the endpoint
	uplink   = 1000 // need not exist: only its number is looked at
	sibling  = 1001 // the veth of another local endpoint

	liveLease    = uint32(abi.LeaseFirst)
	expiredLease = uint32(abi.LeaseFirst) + 1
)

// known: how the kernel must find a peer, where it has to look.
type known int

const (
	bound   known = iota // its identity counts
	ranged               // its identity counts, by its range, without a binding
	expired              // past its lease
	missing              // no binding
	spoofed              // did not come from where the address lives
	nobody               // forwarded with the node's own address, which is anybody's
)

// peer is an address, the state of the maps about it, and where its packets
// come in.
type peer struct {
	name     string
	v4, v6   string
	slot     *abi.Slot // nil: no binding; identity and IP are filled in
	revoked  bool      // the slot's stamp is 0
	from     uint32    // ingress ifindex
	reserved string
	inbound  known // as a source (to_workload)
	outbound known // as a destination (from_workload)
	holdable bool
}

var peers = []*peer{
	{name: "local", v4: "10.7.0.2", v6: "fd00:7::2", slot: &abi.Slot{Lease: uint32(abi.LeaseLocal), Ifindex: sibling, Evidence: uint8(abi.EvidenceLocal)}, from: sibling},
	{name: "local, from elsewhere", v4: "10.7.0.3", v6: "fd00:7::3", slot: &abi.Slot{Lease: uint32(abi.LeaseLocal), Ifindex: sibling, Evidence: uint8(abi.EvidenceLocal)}, from: uplink, inbound: spoofed},
	{name: "leased", v4: "10.9.0.2", v6: "fd00:9::2", slot: &abi.Slot{Lease: liveLease, Evidence: uint8(abi.EvidenceLease)}, from: uplink},
	{name: "proved", v4: "10.9.0.3", v6: "fd00:9::3", slot: &abi.Slot{Lease: liveLease, Evidence: uint8(abi.EvidenceSvid)}, from: uplink},
	{name: "leased, not from an uplink", v4: "10.9.0.4", v6: "fd00:9::4", slot: &abi.Slot{Lease: liveLease, Evidence: uint8(abi.EvidenceLease)}, from: sibling, inbound: spoofed},
	{name: "weak", v4: "10.9.0.5", v6: "fd00:9::5", slot: &abi.Slot{Lease: liveLease, Evidence: uint8(abi.EvidenceWatch)}, from: uplink},
	{name: "expired", v4: "10.9.0.6", v6: "fd00:9::6", slot: &abi.Slot{Lease: expiredLease, Evidence: uint8(abi.EvidenceLease)}, from: uplink, inbound: expired, outbound: expired, holdable: true},
	{name: "expired, floating", v4: "10.8.0.2", v6: "fd00:8::2", slot: &abi.Slot{Lease: expiredLease, Evidence: uint8(abi.EvidenceLease)}, from: uplink, inbound: expired, outbound: expired},
	{name: "lease 0", v4: "10.9.0.7", v6: "fd00:9::7", slot: &abi.Slot{Lease: uint32(abi.LeaseNone), Evidence: uint8(abi.EvidenceLease)}, from: uplink, inbound: expired, outbound: expired, holdable: true},
	{name: "classic", v4: "10.9.0.8", v6: "fd00:9::8", slot: &abi.Slot{Lease: uint32(abi.LeaseClassic), Evidence: uint8(abi.EvidenceLease)}, from: uplink, inbound: expired, outbound: expired, holdable: true},
	{name: "revoked", v4: "10.9.0.9", v6: "fd00:9::9", slot: &abi.Slot{Lease: liveLease, Evidence: uint8(abi.EvidenceLease)}, revoked: true, from: uplink, inbound: missing, outbound: missing, holdable: true},
	{name: "unbound", v4: "10.9.0.10", v6: "fd00:9::10", from: uplink, inbound: missing, outbound: missing, holdable: true},
	{name: "unbound, no owner", v4: "10.8.0.3", v6: "fd00:8::3", from: uplink, inbound: missing, outbound: missing},
	{name: "world", v4: "198.51.100.7", v6: "2001:db8::7", from: uplink, reserved: "world", inbound: ranged, outbound: ranged},
	{name: "range", v4: "192.0.2.10", v6: "2001:db8:c::10", from: uplink, reserved: "world", inbound: ranged, outbound: ranged},
	{name: "host", v4: "10.1.0.1", v6: "fd00:1::1", slot: &abi.Slot{Lease: uint32(abi.LeaseLocal), Evidence: uint8(abi.EvidenceLocal)}, reserved: "host"},
	{name: "forwarded as host", v4: "10.1.0.1", v6: "fd00:1::1", slot: &abi.Slot{Lease: uint32(abi.LeaseLocal), Evidence: uint8(abi.EvidenceLocal)}, from: uplink, reserved: "host", inbound: nobody},
	{name: "remote node", v4: "10.1.0.2", v6: "fd00:1::2", slot: &abi.Slot{Lease: liveLease, Evidence: uint8(abi.EvidenceLease)}, from: uplink, reserved: "remote-node"},
}

var ranges = []struct {
	prefix string
	flags  abi.RangeFlag
}{
	{"10.9.0.0/16", abi.RangeKnown | abi.RangeHoldable}, {"fd00:9::/32", abi.RangeKnown | abi.RangeHoldable},
	{"10.8.0.0/16", abi.RangeKnown}, {"fd00:8::/32", abi.RangeKnown},
}

// numbers are the numbers of a round: of peers, in each family, and of the
// world's blocks.
type numbers struct {
	who   map[*peer][2]identity.Numeric
	world map[netip.Prefix]identity.Numeric
}

func (n numbers) of(p *peer, ip netip.Addr) identity.Numeric {
	if ip.Is4() {
		return n.who[p][0]
	}
	return n.who[p][1]
}

// number gives each peer the number of who it is, in the region in which
// policies see it, as the agent does.
func number(r *rand.Rand, repo *authz.Repository, alloc *identity.Allocator) numbers {
	world, bound := repo.Regions(false), repo.Regions(true)
	n := numbers{who: map[*peer][2]identity.Numeric{}, world: map[netip.Prefix]identity.Numeric{}}
	for _, p := range peers {
		id, in := identity.Identity{Reserved: p.reserved}, bound
		if p.reserved == "" {
			id = someIdentity(r)
		}
		if p.reserved == "world" {
			in = world
		}
		v4, _ := alloc.AcquireIn(id, in.Of(netip.MustParseAddr(p.v4)))
		v6, _ := alloc.AcquireIn(id, in.Of(netip.MustParseAddr(p.v6)))
		n.who[p] = [2]identity.Numeric{v4, v6}
	}
	for in := range world.All() {
		n.world[in.Block], _ = alloc.AcquireIn(identity.Identity{Reserved: "world"}, in)
	}
	return n
}

var ownV4, ownV6 = netip.MustParseAddr("10.7.0.1"), netip.MustParseAddr("fd00:7::1")

// expect returns what the kernel must do with a packet, given what the
// evaluator says of the peer's identity.
func (p *peer) expect(d authz.Decision, dir abi.Direction) (abi.Verdict, abi.Reason) {
	denied := func(v abi.Verdict) (abi.Verdict, abi.Reason) {
		if v == abi.VerdictPass {
			return v, abi.ReasonNone
		}
		return abi.VerdictDrop, abi.ReasonPolicyDenied
	}
	if !d.NeedsEvidence {
		return denied(d.Verdict)
	}
	how := p.outbound
	if dir == abi.DirIngress {
		how = p.inbound
	}
	reason := abi.ReasonUnbound
	switch how {
	case spoofed:
		return abi.VerdictDrop, abi.ReasonSpoofed
	case ranged:
		if d.Verdict == abi.VerdictPass && d.LeastEvidence != identity.EvidenceNone {
			return abi.VerdictDrop, abi.ReasonEvidenceTooWeak
		}
		return denied(d.Verdict)
	case bound:
		// If d names no evidence, the default is a lease.
		least := cmp.Or(d.LeastEvidence, identity.EvidenceLease)
		if d.Verdict == abi.VerdictPass && !identity.Evidence(p.slot.Evidence).Meets(least) {
			return abi.VerdictDrop, abi.ReasonEvidenceTooWeak
		}
		return denied(d.Verdict)
	case expired:
		reason = abi.ReasonStaleLease
	case nobody:
		reason = abi.ReasonTranslated
	}
	if p.holdable {
		return abi.VerdictHold, reason
	}
	return abi.VerdictDrop, reason
}
