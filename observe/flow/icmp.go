package flow

import (
	"fmt"

	"portcullis/bpf/abi"
)

// ICMP is what a packet of ICMP or ICMPv6 says.
type ICMP struct {
	Type uint8 `json:"type"`
	Code uint8 `json:"code"`
}

// icmpOf returns what an event says of a packet of ICMP; nil: it is of another
// protocol, or the programs did not get as far.
func icmpOf(ev *abi.Event) *ICMP {
	switch {
	case ev.Proto != protoICMPv4 && ev.Proto != protoICMPv6, ev.Flags&uint8(abi.EventFragment) != 0:
		return nil
	case ev.IcmpType == 0 && (ev.Proto == protoICMPv6 || ev.Reason == uint8(abi.ReasonMalformed) || ev.Reason == uint8(abi.ReasonUnsupported)):
		return nil // 0 is an echo reply of ICMPv4, and no such is ever unsupported
	}
	return &ICMP{ev.IcmpType, ev.IcmpCode}
}

// Types of echoes, by IP protocol: request and reply.
var icmpEcho = map[uint8][2]uint8{protoICMPv4: {8, 0}, protoICMPv6: {128, 129}}

// EchoOf returns the type that a packet of ICMP has whose flow has those ports: a
// request has its identifier as source port, a reply as destination port.
func EchoOf(protocol uint8, sport, dport uint16) uint8 {
	if dport != 0 && sport == 0 {
		return icmpEcho[protocol][1]
	}
	return icmpEcho[protocol][0]
}

var icmp4Types = map[uint8]string{0: "EchoReply", 3: "DestinationUnreachable", 4: "SourceQuench", 5: "Redirect", 8: "EchoRequest", 9: "RouterAdvertisement",
	10: "RouterSolicitation", 11: "TimeExceeded", 12: "ParameterProblem", 13: "TimestampRequest", 14: "TimestampReply", 17: "AddressMaskRequest", 18: "AddressMaskReply"}

var icmp6Types = map[uint8]string{1: "DestinationUnreachable", 2: "PacketTooBig", 3: "TimeExceeded", 4: "ParameterProblem", 128: "EchoRequest", 129: "EchoReply",
	130: "MLDv1MulticastListenerQueryMessage", 131: "MLDv1MulticastListenerReportMessage", 132: "MLDv1MulticastListenerDoneMessage", 133: "RouterSolicitation",
	134: "RouterAdvertisement", 135: "NeighborSolicitation", 136: "NeighborAdvertisement", 137: "Redirect", 143: "MLDv2MulticastListenerReportMessageV2"}

// Codes by protocol and type, those that people look for.
var icmpCodes = map[[2]uint8]map[uint8]string{
	{protoICMPv4, 3}: {0: "Net", 1: "Host", 2: "Protocol", 3: "Port", 4: "FragmentationNeeded", 5: "SourceRoutingFailed", 6: "NetUnknown", 7: "HostUnknown",
		9: "NetAdminProhibited", 10: "HostAdminProhibited", 13: "CommAdminProhibited"},
	{protoICMPv4, 5}:  {0: "Net", 1: "Host"},
	{protoICMPv4, 11}: {0: "TTLExceeded", 1: "FragmentReassemblyTimeExceeded"},
	{protoICMPv6, 1}:  {0: "NoRouteToDst", 1: "AdminProhibited", 2: "BeyondScopeOfSrc", 3: "Address", 4: "Port", 5: "SrcAddressFailedPolicy", 6: "RejectRouteToDst"},
	{protoICMPv6, 3}:  {0: "HopLimitExceeded", 1: "FragmentReassemblyTimeExceeded"},
	{protoICMPv6, 4}:  {0: "ErroneousHeader", 1: "UnrecognizedNextHeader", 2: "UnrecognizedIPv6Option"},
}

// Text names type and code in the words that Hubble has too:
// "DestinationUnreachable(Port)", "EchoRequest", "42(1)".
func (x ICMP) Text(protocol uint8) string {
	types := icmp4Types
	if protocol == protoICMPv6 {
		types = icmp6Types
	}
	s, known := types[x.Type]
	if !known {
		s = fmt.Sprint(x.Type)
	}
	if code, ok := icmpCodes[[2]uint8{protocol, x.Type}][x.Code]; ok {
		return s + "(" + code + ")"
	}
	if x.Code != 0 {
		return fmt.Sprintf("%s(%d)", s, x.Code)
	}
	return s
}
