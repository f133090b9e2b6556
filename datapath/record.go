package datapath

import (
	"fmt"
	"net/netip"
	"unsafe"

	"portcullis/bpf/abi"
)

// HeldPacket is a packet that the kernel copied to user space and took off the
// stack, because the binding of Peer has to be confirmed first; or the copy of
// one that went on. Package hold calls it hold.Record.
type HeldPacket struct {
	Arrival   int64      // CLOCK_BOOTTIME ns, at the hook
	Peer      netip.Addr // whose binding is missing; never IPv4-mapped
	Local     netip.Addr // the endpoint's address
	Endpoint  uint32     // id of the endpoint that judges
	Ifindex   uint32     // of the endpoint's veth, where the packet goes back
	HoldIndex uint32     // the endpoint's quota that it was counted in
	Source    uint32     // the source's; 0: none
	GSOSize   uint16     // 0: not a GSO packet
	GSOSegs   uint16
	Direction abi.Direction
	Proto     uint8      // IPPROTO_*
	Reason    abi.Reason // what it would be dropped for were no hold possible
	Sport     uint16
	Dport     uint16
	Service   netip.AddrPort // what the workload called, where Peer is whom the node's translation chose; else not valid
	Stamp     uint64         // of the binding that waits for a proof, with ReasonEvidenceTooWeak; 0: not known
	Passed    bool           // its endpoint is under audit: it went on, and never is to be sent or counted again
	Proxied   bool           // it came from the L7 proxy, and goes back as such
	Packet    []byte         // from its link-layer header on; belongs to the receiver
}

const heldHeader = int(unsafe.Sizeof(abi.Held{}))

// parseHeld reads one record of the held ring. The packet is copied: b may be
// used again. An error means that kernel and agent disagree about the layout,
// and the record is to be dropped: nothing of it may be sent.
func parseHeld(b []byte) (HeldPacket, error) {
	if len(b) < heldHeader {
		return HeldPacket{}, fmt.Errorf("held record of %d bytes is shorter than its header of %d", len(b), heldHeader)
	}
	var h abi.Held
	copy(unsafe.Slice((*byte)(unsafe.Pointer(&h)), heldHeader), b)
	r := HeldPacket{
		Arrival: int64(h.Arrival), Peer: AddrFrom(h.Peer), Local: AddrFrom(h.Local),
		Endpoint: h.Endpoint, Ifindex: h.Ifindex, HoldIndex: h.HoldIndex, Source: h.SourceIndex,
		GSOSize: h.GsoSize, GSOSegs: h.GsoSegs,
		Direction: abi.Direction(h.Direction), Proto: h.Proto, Reason: abi.Reason(h.Reason),
		Sport: h.Sport, Dport: h.Dport, Passed: h.Passed != 0, Stamp: h.Stamp,
	}
	if uint64(h.Len) > uint64(len(b)-heldHeader) {
		return r, fmt.Errorf("held record says %d bytes of packet, but holds %d", h.Len, len(b)-heldHeader)
	}
	r.Packet = append([]byte(nil), b[heldHeader:heldHeader+int(h.Len)]...)
	r.Proxied = h.Proxied != 0
	if service := AddrFrom(h.Service); service.IsValid() {
		r.Service = netip.AddrPortFrom(service, h.ServicePort)
	}
	return r, nil
}

// Addr returns an address in the kernel's form: 16 bytes, IPv4 as
// ::ffff:a.b.c.d. The zero netip.Addr gives the zero Addr ("has none").
func Addr(ip netip.Addr) abi.Addr {
	if !ip.IsValid() {
		return abi.Addr{}
	}
	return abi.Addr(ip.As16())
}

// AddrFrom is the inverse of Addr: never an IPv4-mapped address, and the
// invalid netip.Addr for the zero Addr.
func AddrFrom(a abi.Addr) netip.Addr {
	if a == (abi.Addr{}) {
		return netip.Addr{}
	}
	return netip.AddrFrom16(a).Unmap()
}
