package hubble

import (
	"strings"

	flowpb "github.com/cilium/cilium/api/v1/flow"
	"portcullis/bpf/abi"
	"portcullis/observe/flow"
)

// Numbers of event types, as Hubble's clients know them.
const (
	eventDrop   = 1
	eventTrace  = 4
	eventPolicy = 5
	eventL7     = 129
	subToPod    = 0 // of a trace: to-endpoint
	subToProxy  = 1
	subToStack  = 3
	matchNone   = 0 // of a policy verdict: no rule
	matchL3L4   = 2
	protoICMPv4 = 1
	protoTCP    = 6
	protoUDP    = 17
	protoICMPv6 = 58
	protoSCTP   = 132
)

// dropReasons says a reason in the words that Hubble has. It has none for most
// of ours: the exact one is in the extension and in the summary.
var dropReasons = map[abi.Reason]flowpb.DropReason{
	abi.ReasonPolicyDenied:        flowpb.DropReason_POLICY_DENIED,
	abi.ReasonRefused:             flowpb.DropReason_STALE_OR_UNROUTABLE_IP,
	abi.ReasonOwnerUnreachable:    flowpb.DropReason_STALE_OR_UNROUTABLE_IP,
	abi.ReasonHoldTimeout:         flowpb.DropReason_STALE_OR_UNROUTABLE_IP,
	abi.ReasonHoldOverflow:        flowpb.DropReason_DROP_RATE_LIMITED,
	abi.ReasonStaleLease:          flowpb.DropReason_STALE_OR_UNROUTABLE_IP,
	abi.ReasonUnbound:             flowpb.DropReason_STALE_OR_UNROUTABLE_IP,
	abi.ReasonGenerationChanged:   flowpb.DropReason_STALE_OR_UNROUTABLE_IP,
	abi.ReasonEvidenceTooWeak:     flowpb.DropReason_AUTH_REQUIRED,
	abi.ReasonConflict:            flowpb.DropReason_STALE_OR_UNROUTABLE_IP,
	abi.ReasonSpoofed:             flowpb.DropReason_INVALID_SOURCE_IP,
	abi.ReasonQuarantined:         flowpb.DropReason_DROP_EP_NOT_READY,
	abi.ReasonMapFull:             flowpb.DropReason_CT_MAP_INSERTION_FAILED,
	abi.ReasonMalformed:           flowpb.DropReason_INVALID_PACKET_DROPPED,
	abi.ReasonUnsupported:         flowpb.DropReason_UNSUPPORTED_L3_PROTOCOL,
	abi.ReasonNoEndpoint:          flowpb.DropReason_DROP_EP_NOT_READY,
	abi.ReasonNoFlow:              flowpb.DropReason_UNKNOWN_CONNECTION_TRACKING_STATE,
	abi.ReasonTranslated:          flowpb.DropReason_UNKNOWN_SENDER,
	abi.ReasonServiceUntranslated: flowpb.DropReason_SERVICE_BACKEND_NOT_FOUND,
	abi.ReasonUnmanaged:           flowpb.DropReason_STALE_OR_UNROUTABLE_IP,
	abi.ReasonL7Unavailable:       flowpb.DropReason_DROP_PUNT_PROXY,
}

func dropReason(r abi.Reason) flowpb.DropReason { return dropReasons[r] }

func verdict(r *flow.Record) flowpb.Verdict {
	if r.L7 != nil && r.L7.Verdict == "failed" {
		return flowpb.Verdict_ERROR
	}
	switch r.Verdict {
	case abi.VerdictPass:
		return flowpb.Verdict_FORWARDED
	case abi.VerdictHold:
		return flowpb.Verdict_TRACED // nothing is decided yet
	case abi.VerdictAudit:
		return flowpb.Verdict_AUDIT
	case abi.VerdictSteer:
		return flowpb.Verdict_REDIRECTED
	}
	return flowpb.Verdict_DROPPED // what is not known to have passed is shown as dropped
}

// summary is what clients show of a flow in one column.
func summary(r *flow.Record) string {
	if r.L7 != nil {
		return r.L7.Summary()
	}
	s := flow.Protocol(r.Protocol)
	switch {
	case r.Protocol == protoTCP && r.TCPFlags != 0: // behind the translation they are not known
		s = "TCP Flags: " + strings.Join(flow.TCPFlags(r.TCPFlags), ", ")
	case r.ICMP != nil:
		s += " " + r.ICMP.Text(r.Protocol)
	}
	if r.Verdict == abi.VerdictHold {
		return s + "; held"
	}
	if r.Reason != abi.ReasonNone && r.Reason != abi.ReasonPolicyDenied {
		s += "; " + r.Reason.String()
	}
	if r.Held > 0 {
		s += "; held for " + flow.Age(r.Held)
	}
	return s
}
