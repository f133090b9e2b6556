package hubble

import (
	"crypto/sha256"
	"encoding/binary"
	"fmt"
	"net/netip"
	"strings"

	"google.golang.org/protobuf/types/known/timestamppb"
	"google.golang.org/protobuf/types/known/wrapperspb"

	flowpb "github.com/cilium/cilium/api/v1/flow"
	"portcullis/bpf/abi"
	"portcullis/observe/flow"
)

// Place is where records were made, as Hubble calls it.
type Place struct {
	Node    string // of Kubernetes, or of the configuration
	Cluster string // "" or "default": node names stand alone
	Version string // of Portcullis
}

// Name returns the node's name among those of all clusters.
func (p Place) Name() string {
	if p.Cluster == "" || p.Cluster == "default" {
		return p.Node
	}
	return p.Cluster + "/" + p.Node
}

// From returns the flows that a record may be shown as, the first for preference:
// a packet is a trace or a drop, and a policy verdict too where policy decided.
// number is the record's in its ring, which its UUID is made of. A record of what
// was lost is no flow.
func (p Place) From(r *flow.Record, number uint64) []*flowpb.Flow {
	if r.Lost != nil {
		return nil
	}
	f := &flowpb.Flow{
		Uuid: p.uuid(r, number), Emitter: &flowpb.Emitter{Name: "Portcullis", Version: strings.TrimPrefix(p.Version, "v")},
		Verdict: verdict(r), IP: ip(r), L4: layer4(r), Type: flowpb.FlowType_L3_L4, NodeName: p.Name(),
		//lint:ignore SA1019 hubble's clients still read it
		Source: p.endpoint(&r.Source), Destination: p.endpoint(&r.Dest), TrafficDirection: direction(r), Summary: summary(r),
	}
	f.SourceService, f.DestinationService = service(&r.Source), service(&r.Dest)
	f.SourceNames, f.DestinationNames = r.Source.Names, r.Dest.Names
	if !r.Time.IsZero() {
		f.Time = timestamppb.New(r.Time)
	}
	if r.Ifindex != 0 || r.Interface != "" {
		f.Interface = &flowpb.NetworkInterface{Index: r.Ifindex, Name: r.Interface}
	}
	if r.State != abi.FlowNone {
		f.IsReply = wrapperspb.Bool(r.State == abi.FlowReply)
		//lint:ignore SA1019 hubble's clients still read it
		f.Reply = f.IsReply.Value
	}
	if f.Verdict == flowpb.Verdict_DROPPED {
		f.DropReasonDesc = dropReason(r.Reason)
		//lint:ignore SA1019 hubble's clients still read it
		f.DropReason = uint32(f.DropReasonDesc)
	}
	setPolicy(f, r)
	f.Extensions = facts(r).extension()
	if r.L7 != nil {
		f.Type, f.L7, f.EventType = flowpb.FlowType_L7, layer7(r.L7), &flowpb.CiliumEventType{Type: eventL7}
		f.IsReply, f.TraceObservationPoint = wrapperspb.Bool(false), flowpb.TraceObservationPoint_UNKNOWN_POINT
		return []*flowpb.Flow{f}
	}
	return variants(f, r)
}

// variants sets the event type, and adds the other flow that the record is.
func variants(f *flowpb.Flow, r *flow.Record) []*flowpb.Flow {
	if r.Verdict == abi.VerdictAudit {
		return []*flowpb.Flow{asPolicy(f, r)}
	}
	out := []*flowpb.Flow{f}
	if r.ByPolicy() {
		out = append(out, asPolicy(f, r))
	}
	if f.Verdict == flowpb.Verdict_DROPPED {
		f.EventType = &flowpb.CiliumEventType{Type: eventDrop, SubType: int32(f.DropReasonDesc)}
		return out
	}
	f.TraceReason = map[abi.FlowState]flowpb.TraceReason{abi.FlowNew: flowpb.TraceReason_NEW, abi.FlowEstablished: flowpb.TraceReason_ESTABLISHED, abi.FlowReply: flowpb.TraceReason_REPLY}[r.State]
	sub, point := int32(subToStack), flowpb.TraceObservationPoint_TO_STACK
	switch {
	case r.Verdict == abi.VerdictSteer:
		sub, point = subToProxy, flowpb.TraceObservationPoint_TO_PROXY
	case r.Direction == abi.DirIngress:
		sub, point = subToPod, flowpb.TraceObservationPoint_TO_ENDPOINT
	}
	f.EventType, f.TraceObservationPoint = &flowpb.CiliumEventType{Type: eventTrace, SubType: sub}, point
	return out
}

// asPolicy returns the flow as a verdict of policy. It shares what it points to.
func asPolicy(f *flowpb.Flow, r *flow.Record) *flowpb.Flow {
	v := shallow(f)
	v.EventType = &flowpb.CiliumEventType{Type: eventPolicy}
	if r.Rule != 0 {
		v.PolicyMatchType = matchL3L4
	}
	return v
}

func setPolicy(f *flowpb.Flow, r *flow.Record) {
	if r.Policy == "" {
		return
	}
	policy := &flowpb.Policy{Kind: r.Policy}
	if parts := strings.Split(r.Policy, "/"); len(parts) == 3 {
		policy = &flowpb.Policy{Kind: parts[0], Namespace: parts[1], Name: parts[2]}
	} else if len(parts) == 2 {
		policy = &flowpb.Policy{Kind: parts[0], Name: parts[1]}
	}
	denied := r.Verdict == abi.VerdictAudit || f.Verdict == flowpb.Verdict_DROPPED
	list := []*flowpb.Policy{policy}
	switch {
	case r.Direction == abi.DirIngress && denied:
		f.IngressDeniedBy = list
	case r.Direction == abi.DirIngress:
		f.IngressAllowedBy = list
	case denied:
		f.EgressDeniedBy = list
	default:
		f.EgressAllowedBy = list
	}
}

func direction(r *flow.Record) flowpb.TrafficDirection {
	if r.Direction == abi.DirIngress {
		return flowpb.TrafficDirection_INGRESS
	}
	return flowpb.TrafficDirection_EGRESS
}

func (p Place) endpoint(e *flow.End) *flowpb.Endpoint {
	out := &flowpb.Endpoint{ID: e.Endpoint, Identity: uint32(e.Identity), Namespace: e.Namespace(), Labels: e.Labels, PodName: e.Pod()}
	if out.Namespace != "" {
		out.ClusterName = p.Cluster
	}
	if e.Owner.Name != "" {
		out.Workloads = []*flowpb.Workload{{Kind: e.Owner.Kind, Name: e.Owner.Name}}
	}
	return out
}

func service(e *flow.End) *flowpb.Service {
	ns, name, ok := strings.Cut(e.Service, "/")
	if !ok {
		return nil
	}
	return &flowpb.Service{Namespace: ns, Name: name}
}

func ip(r *flow.Record) *flowpb.IP {
	text := func(a netip.Addr) string {
		if !a.IsValid() {
			return ""
		}
		return a.String()
	}
	v := flowpb.IPVersion_IPv4
	if r.Source.IP.Is6() {
		v = flowpb.IPVersion_IPv6
	}
	return &flowpb.IP{Source: text(r.Source.IP), Destination: text(r.Dest.IP), IpVersion: v}
}

func layer4(r *flow.Record) *flowpb.Layer4 {
	src, dst := uint32(r.Source.Port), uint32(r.Dest.Port)
	switch r.Protocol {
	case protoTCP:
		tcp := &flowpb.TCP{SourcePort: src, DestinationPort: dst}
		if r.L7 == nil {
			tcp.Flags = tcpFlags(r.TCPFlags)
		}
		return &flowpb.Layer4{Protocol: &flowpb.Layer4_TCP{TCP: tcp}}
	case protoUDP:
		return &flowpb.Layer4{Protocol: &flowpb.Layer4_UDP{UDP: &flowpb.UDP{SourcePort: src, DestinationPort: dst}}}
	case protoSCTP:
		return &flowpb.Layer4{Protocol: &flowpb.Layer4_SCTP{SCTP: &flowpb.SCTP{SourcePort: src, DestinationPort: dst}}}
	case protoICMPv4:
		m := &flowpb.ICMPv4{}
		if r.ICMP != nil {
			m.Type, m.Code = uint32(r.ICMP.Type), uint32(r.ICMP.Code)
		}
		return &flowpb.Layer4{Protocol: &flowpb.Layer4_ICMPv4{ICMPv4: m}}
	case protoICMPv6:
		m := &flowpb.ICMPv6{}
		if r.ICMP != nil {
			m.Type, m.Code = uint32(r.ICMP.Type), uint32(r.ICMP.Code)
		}
		return &flowpb.Layer4{Protocol: &flowpb.Layer4_ICMPv6{ICMPv6: m}}
	}
	return nil
}

func tcpFlags(b uint8) *flowpb.TCPFlags {
	return &flowpb.TCPFlags{FIN: b&0x01 != 0, SYN: b&0x02 != 0, RST: b&0x04 != 0, PSH: b&0x08 != 0,
		ACK: b&0x10 != 0, URG: b&0x20 != 0, ECE: b&0x40 != 0, CWR: b&0x80 != 0}
}

// layer7 tells of a request and of its answer in one message: the proxy makes
// one record of both.
func layer7(x *flow.L7) *flowpb.Layer7 {
	out := &flowpb.Layer7{Type: flowpb.L7FlowType_REQUEST, LatencyNs: uint64(max(0, x.Latency))}
	// Workloads choose some of these bytes, and a message holds UTF-8 only.
	text := func(s string) string { return strings.ToValidUTF8(s, "?") }
	switch {
	case x.Method != "":
		h := &flowpb.HTTP{Code: uint32(x.Status), Method: text(x.Method), Url: text("http://" + x.Host + x.Path), Protocol: text(x.Version)}
		for _, field := range x.Header {
			k, v, _ := strings.Cut(field, ": ")
			h.Headers = append(h.Headers, &flowpb.HTTPHeader{Key: text(k), Value: text(v)})
		}
		out.Record = &flowpb.Layer7_Http{Http: h}
	case x.Protocol == "dns":
		d := &flowpb.DNS{Query: text(strings.TrimSuffix(x.Name, ".") + "."), Ttl: uint32(x.TTL.Seconds()), ObservationSource: "proxy",
			Rcode: uint32(max(0, x.Code)), Qtypes: []string{flow.QueryType(x.Type)}}
		for _, a := range x.Addresses {
			d.Ips = append(d.Ips, a.String())
		}
		out.Record = &flowpb.Layer7_Dns{Dns: d}
	}
	return out
}

// uuid names a record: the same for each reader, and another for each record of
// any node.
func (p Place) uuid(r *flow.Record, number uint64) string {
	b := append([]byte(p.Name()), 0)
	b = binary.LittleEndian.AppendUint64(b, number)
	b = binary.LittleEndian.AppendUint64(b, r.BootTime)
	sum := sha256.Sum256(binary.LittleEndian.AppendUint64(b, uint64(r.Time.UnixNano())))
	sum[6], sum[8] = sum[6]&0x0f|0x80, sum[8]&0x3f|0x80 // version 8: our own making
	return fmt.Sprintf("%x-%x-%x-%x-%x", sum[:4], sum[4:6], sum[6:8], sum[8:10], sum[10:16])
}
