package datapath

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"net/netip"
	"path/filepath"
	"strconv"
	"strings"
	"sync/atomic"

	"github.com/cilium/ebpf"

	"portcullis/bpf/abi"
	"portcullis/identity"
)

var (
	// ErrNotJudged means that the datapath has no judgement of the flow that leads
	// it through the proxy: not yet, or not any more, or none that says who the
	// peer is. What is asked again after the flow's next packet may be answered.
	ErrNotJudged = errors.New("the datapath has not judged this flow to go through the proxy")
	// ErrEnded means that a ground of the flow's judgement is gone: its workload,
	// its peer's binding, the lease. No packet of it passes any more.
	ErrEnded = errors.New("the flow has ended")
)

// Steered reads what the datapath has judged of flows that go through the proxy,
// from the pinned maps, and can write none of them. Safe for concurrent use, but
// for Close. It sees the maps that were pinned when it was opened: not those of an
// agent of another version that replaced them since.
type Steered struct {
	conntrack, endpoints, bindings, slots, leases, ranges, state *ebpf.Map
	memory                                                       memory
}

// SteeredFlow is what the judgement of a flow's subject says now.
type SteeredFlow struct {
	Endpoint uint32           // id of the subject
	Set      uint32           // its policy set in force; the judgement may be of an earlier one, until the flow's next packet
	Peer     identity.Numeric // 0 where the verdict is the same whoever it is, and nobody knows
	PeerAddr netip.Addr       // of a service's flow, the backend's
	Port     uint16           // that policy speaks of: of a service's flow, the backend's
	Evidence abi.Evidence     // of the peer's binding
	Rule     uint32           // which rule decided, under the set of the judgement
}

// OpenSteered opens the pins of a directory. The caller closes it. An error
// matches fs.ErrNotExist if nothing is pinned there, and is ErrPins if maps are of
// another version.
func OpenSteered(pinDirectory string) (*Steered, error) {
	s := &Steered{}
	for name, open := range map[string]struct {
		to   **ebpf.Map
		size uintptr
	}{
		"conntrack": {&s.conntrack, sizeOf[abi.CT]()}, "endpoints": {&s.endpoints, sizeOf[abi.Endpoint]()},
		"bindings": {&s.bindings, sizeOf[abi.Binding]()}, "slots": {&s.slots, sizeOf[abi.Slot]()},
		"leases": {&s.leases, sizeOf[abi.Lease]()}, "ranges": {&s.ranges, sizeOf[abi.Range]()}, "state": {&s.state, sizeOf[abi.State]()},
	} {
		path := filepath.Join(pinDir(filepath.Clean(pinDirectory)).maps(), name)
		m, err := ebpf.LoadPinnedMap(path, &ebpf.LoadPinOptions{ReadOnly: true})
		if err != nil {
			return nil, errors.Join(fmt.Errorf("open the pinned map %s: %w", path, err), s.Close())
		}
		*open.to = m
		if uintptr(m.ValueSize()) != open.size {
			return nil, errors.Join(fmt.Errorf("%w: %s has values of %d bytes, want %d", ErrPins, path, m.ValueSize(), open.size), s.Close())
		}
	}
	if err := s.memory.open(pinDir(filepath.Clean(pinDirectory)).maps()); err != nil {
		return nil, errors.Join(err, s.Close())
	}
	return s, nil
}

// Maps names the maps that are read. The agent whose programs judge by the same
// ones has the same name for them (Datapath.SteeredMaps).
func (s *Steered) Maps() (string, error) {
	return mapIDs(s.conntrack, s.endpoints, s.bindings, s.slots, s.leases, s.ranges, s.state)
}

// SteeredMaps names the maps in force that a Steered reads. Who has opened others
// reads what the programs do not judge by any more.
func (d *Datapath) SteeredMaps() (string, error) {
	m := d.coll.Maps
	return mapIDs(m["conntrack"], m["endpoints"], m["bindings"], m["slots"], m["leases"], m["ranges"], m["state"])
}

func mapIDs(all ...*ebpf.Map) (string, error) {
	var ids []string
	for _, m := range all {
		info, err := m.Info()
		if err != nil {
			return "", fmt.Errorf("ask for a map's number: %w", err)
		}
		id, ok := info.ID()
		if !ok {
			return "", errors.New("the kernel does not number its maps")
		}
		ids = append(ids, strconv.Itoa(int(id)))
	}
	return strings.Join(ids, ","), nil
}

// Close gives the file descriptors back. It may be repeated.
func (s *Steered) Close() error {
	errs := []error{s.memory.close()}
	for _, m := range []**ebpf.Map{&s.conntrack, &s.endpoints, &s.bindings, &s.slots, &s.leases, &s.ranges, &s.state} {
		if *m != nil {
			errs = append(errs, (*m).Close())
			*m = nil
		}
	}
	return errors.Join(errs...)
}

// Look returns what holds now of the flow that client opened to server, by the
// judgement of its subject: the client's own for DirEgress, the server's for
// DirIngress. Errors are ErrNotJudged, ErrEnded, or the kernel's: by each the flow
// is to be refused.
func (s *Steered) Look(dir abi.Direction, protocol uint8, client, server netip.AddrPort) (SteeredFlow, error) {
	return s.look(dir, protocol, client, server, &sight{})
}

// look notes in x which bindings the answer depends on.
func (s *Steered) look(dir abi.Direction, protocol uint8, client, server netip.AddrPort, x *sight) (SteeredFlow, error) {
	if dir >= abi.DirMax {
		return SteeredFlow{}, fmt.Errorf("look at a flow: no direction %v", dir)
	}
	key, clientIsB := flowKey(protocol, client, server)
	var ct abi.CT
	if err := s.conntrack.Lookup(&key, &ct); err != nil {
		return SteeredFlow{}, lookError(err, "conntrack", ErrNotJudged)
	}
	openedByB := ct.Flags&uint32(abi.CTForwardB) != 0
	j := ct.Judgement[dir]
	// A seal that is not right: the element is being written, or was another
	// flow's (I4).
	if openedByB != clientIsB || j.Endpoint == 0 || j.Flags&uint8(abi.JudgedL7) == 0 || j.Seal != judgementSeal(key, j, dir, openedByB) {
		return SteeredFlow{}, ErrNotJudged
	}
	own, peer := client.Addr(), server.Addr()
	if dir == abi.DirIngress {
		own, peer = peer, own
	}
	f := SteeredFlow{Endpoint: j.Endpoint, PeerAddr: peer.Unmap(), Port: server.Port(), Rule: j.Rule}
	if j.Flags&uint8(abi.JudgedByService) != 0 {
		f.Port = j.Mark
	}
	var err error
	if f.Set, err = s.subject(own, j.Endpoint, x); err != nil {
		return SteeredFlow{}, err
	}
	return f, s.peer(&f, j, x)
}

// lookError says what a lookup's error means where the element is missing.
func lookError(err error, name string, missing error) error {
	if errors.Is(err, ebpf.ErrKeyNotExist) {
		return missing
	}
	return mapError("look at a flow", name, err)
}

// subject returns the set in force of the endpoint that has the address.
func (s *Steered) subject(ip netip.Addr, id uint32, x *sight) (set uint32, err error) {
	slot, index, err := s.binding(ip)
	if err != nil {
		return 0, err
	}
	x.own = ground{index, slot.Stamp}
	var ep abi.Endpoint
	if err := s.endpoints.Lookup(slot.Ifindex, &ep); err != nil {
		return 0, lookError(err, "endpoints", ErrEnded)
	}
	if ep.ID != id || ep.State != uint32(abi.EPActive) || ep.Policy == 0 {
		return 0, ErrEnded
	}
	return ep.Policy, nil
}

// binding returns the slot in force of an address, and its index.
func (s *Steered) binding(ip netip.Addr) (abi.Slot, uint32, error) {
	key := Addr(ip)
	var b abi.Binding
	if err := s.bindings.Lookup(&key, &b); err != nil {
		return abi.Slot{}, 0, lookError(err, "bindings", ErrEnded)
	}
	slot, err := s.slot(b.Slot, b.Stamp)
	if err == nil && slot.IP != key {
		err = ErrEnded
	}
	return slot, b.Slot, err
}

// slot returns a slot that is the stamp's. Its contents never change while the
// stamp stands, so a copy of which the stamp is right at the end is whole.
func (s *Steered) slot(index uint32, stamp uint64) (abi.Slot, error) {
	var slot, again abi.Slot
	for _, to := range []*abi.Slot{&slot, &again} {
		if err := s.slots.Lookup(index, to); err != nil {
			return abi.Slot{}, lookError(err, "slots", ErrEnded)
		}
		if to.Stamp != stamp || stamp == 0 {
			return abi.Slot{}, ErrEnded
		}
	}
	return again, nil
}

// peer finds out who the other side is now, and whether every ground stands.
func (s *Steered) peer(f *SteeredFlow, j abi.Judgement, x *sight) error {
	switch {
	case j.Stamp != 0:
		slot, err := s.slot(j.Slot, j.Stamp)
		if err != nil {
			return err
		}
		if err := s.alive(slot, j.Evidence); err != nil {
			return err
		}
		f.Peer, f.PeerAddr, f.Evidence = identity.Numeric(slot.Identity), netip.AddrFrom16(slot.IP).Unmap(), evidenceOf(slot)
		x.peer, x.need = ground{j.Slot, j.Stamp}, j.Evidence
		// Whom masquerade hides is the binding's; its address is not the packets'.
		return nil
	case j.Flags&uint8(abi.JudgedByRange) != 0:
		if j.Flags&uint8(abi.JudgedByService) != 0 {
			// Whoever it is has no binding, and the judgement has no address.
			return ErrNotJudged
		}
		x.ranged, x.ranges = true, j.Slot
		return s.byRange(f, j.Slot)
	}
	// It needed no evidence. Who it is may be known all the same.
	if j.Flags&uint8(abi.JudgedByService) != 0 {
		f.PeerAddr = netip.Addr{}
		x.nobody = true
		return nil
	}
	slot, index, err := s.binding(f.PeerAddr)
	if err == nil && s.alive(slot, 0) == nil {
		f.Peer, f.Evidence = identity.Numeric(slot.Identity), evidenceOf(slot)
		x.peer = ground{index, slot.Stamp}
	}
	return nil
}

// alive asks what the programs ask of a binding with each packet.
func (s *Steered) alive(slot abi.Slot, need uint8) error {
	var l abi.Lease
	if err := s.leases.Lookup(slot.Lease, &l); err != nil {
		return lookError(err, "leases", ErrEnded)
	}
	have := evidenceOf(slot)
	if slot.Lease == uint32(abi.LeaseNone) || uint64(Now()) >= l.Deadline || uint8(have) < need ||
		abi.Evidence(need) == abi.EvidenceSvid && have == abi.EvidenceLocal {
		return ErrEnded
	}
	return nil
}

func evidenceOf(slot abi.Slot) abi.Evidence {
	if uint64(Now()) < slot.Proved {
		return abi.EvidenceSvid
	}
	return abi.Evidence(slot.Evidence)
}

// byRange names a peer that is known by its range only.
func (s *Steered) byRange(f *SteeredFlow, epoch uint32) error {
	if uint32(atomic.LoadUint64(&s.memory.state.at(0).RangeEpoch)) != epoch {
		return ErrNotJudged // ranges have changed: its next packet is judged anew (I5)
	}
	key := rangeKey(netip.PrefixFrom(f.PeerAddr, f.PeerAddr.BitLen()))
	var r abi.Range
	err := s.ranges.Lookup(&key, &r)
	switch {
	case errors.Is(err, ebpf.ErrKeyNotExist):
		f.Peer = identity.NumWorld
	case err != nil:
		return mapError("look at a flow", "ranges", err)
	case r.Flags&uint32(abi.RangeKnown) != 0:
		return ErrEnded
	default:
		f.Peer = identity.Numeric(r.Identity)
	}
	return nil
}

// flowKey is flow_of of bpf/lib/conntrack.h, for a packet from client to server.
func flowKey(protocol uint8, client, server netip.AddrPort) (k abi.CTKey, clientIsB bool) {
	c, s := Addr(client.Addr()), Addr(server.Addr())
	order := bytes.Compare(s[:], c[:])
	clientIsB = order < 0 || order == 0 && server.Port() < client.Port()
	k = abi.CTKey{A: c, B: s, APort: client.Port(), BPort: server.Port(), Proto: protocol}
	if clientIsB {
		k.A, k.B, k.APort, k.BPort = s, c, server.Port(), client.Port()
	}
	return k, clientIsB
}

// judgementSeal is judgement_seal of bpf/lib/conntrack.h.
func judgementSeal(k abi.CTKey, j abi.Judgement, dir abi.Direction, openedByB bool) uint64 {
	word := func(a abi.Addr, i int) uint64 { return binary.NativeEndian.Uint64(a[8*i:]) }
	last := uint64(k.Proto)<<32 | uint64(k.BPort)<<16 | uint64(k.APort)
	sum := word(k.A, 0)*0x9e3779b97f4a7c15 + word(k.A, 1)*0xc2b2ae3d27d4eb4f + word(k.B, 0)*0x165667b19e3779f9 +
		word(k.B, 1)*0xd6e8feb86659fd93 + last*0xa0761d6478bd642f
	const apart = uint8(abi.JudgedReplySeen | abi.JudgedL7)
	word32 := uint32(j.Mark)<<16 | uint32(j.Evidence)<<8 | uint32(j.Flags&^apart)<<2 | uint32(j.Flags&uint8(abi.JudgedL7))<<9 | uint32(dir)<<1
	if openedByB {
		word32 |= 1
	}
	return sum + j.Stamp*0xe7037ed1a0b428db + (uint64(j.Slot)<<32|uint64(j.Endpoint))*0x8ebc6af09c88c6e3 +
		(uint64(j.Epoch)<<32|uint64(word32))*0x589965cc75374cc3
}
