package datapath

import (
	"encoding/binary"
	"errors"
	"net/netip"

	"github.com/cilium/ebpf"

	"portcullis/bpf/abi"
)

// L7Service is a service's address and port of which some backend is under an
// entry with PolicyL7 of a policy set's egress.
type L7Service struct {
	Set      uint32
	Address  netip.AddrPort
	Protocol uint8
}

func (s L7Service) key() abi.L7ServiceKey {
	k := abi.L7ServiceKey{Addr: Addr(s.Address.Addr()), Set: s.Set, Proto: s.Protocol}
	binary.BigEndian.PutUint16(k.Port[:], s.Address.Port())
	return k
}

// L7Services returns those to which nothing goes any more that was not steered, in
// any order.
func (d *Datapath) L7Services() (out []L7Service, err error) {
	m := d.coll.Maps["l7_services"]
	var k abi.L7ServiceKey
	var v abi.L7Service
	it := m.Iterate()
	for it.Next(&k, &v) {
		if v.Flags&uint32(abi.L7ServiceSteered) != 0 {
			out = append(out, L7Service{Set: k.Set, Protocol: k.Proto, Address: netip.AddrPortFrom(AddrFrom(k.Addr), binary.BigEndian.Uint16(k.Port[:]))})
		}
	}
	if err := it.Err(); err != nil {
		return nil, mapError("read services under L7", "l7_services", err)
	}
	return out, nil
}

// SetL7Services makes those of all sets the ones given: what workloads under such
// a set send there is steered into the proxy from its first packet on. Put a new
// set's here before endpoints use it, and leave an old one's until none does. What
// leaves makes room for what comes; on failure, which is ErrMapFull or the
// kernel's, a part is steered, and what an entry with PolicyL7 allows of the rest
// is dropped. It may be repeated. One goroutine at a time.
func (d *Datapath) SetL7Services(services []L7Service) error {
	m := d.coll.Maps["l7_services"]
	want := map[abi.L7ServiceKey]bool{}
	for _, s := range services {
		want[s.key()] = true
	}
	var stale, young []abi.L7ServiceKey
	var k abi.L7ServiceKey
	var v abi.L7Service
	const ready = uint32(abi.L7ServiceSteer | abi.L7ServiceSteered)
	done := map[abi.L7ServiceKey]bool{}
	it := m.Iterate()
	for it.Next(&k, &v) {
		if !want[k] {
			stale = append(stale, k)
		} else if v.Flags == ready {
			done[k] = true
		}
	}
	if err := it.Err(); err != nil {
		return mapError("read services under L7", "l7_services", err)
	}
	for _, k := range stale {
		if err := m.Delete(&k); err != nil && !errors.Is(err, ebpf.ErrKeyNotExist) {
			return mapError("set services under L7", "l7_services", err)
		}
	}
	d.l7services.Store(int64(len(want))) // what does not fit is counted too: the map is full
	for k := range want {
		if done[k] {
			continue
		}
		if err := m.Put(&k, &abi.L7Service{Flags: uint32(abi.L7ServiceSteer)}); err != nil {
			return mapError("set services under L7", "l7_services", err)
		}
		young = append(young, k)
	}
	if len(young) > 0 {
		// No packet is between from_workload and after_translation any more that
		// was not steered.
		if err := barrier(); err != nil {
			return err
		}
	}
	for _, k := range young {
		if err := m.Put(&k, &abi.L7Service{Flags: ready}); err != nil {
			return mapError("set services under L7", "l7_services", err)
		}
	}
	return nil
}
