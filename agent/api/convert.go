package api

import (
	"errors"
	"fmt"
	"net/netip"
	"strings"

	"google.golang.org/protobuf/types/known/durationpb"
	"google.golang.org/protobuf/types/known/timestamppb"

	"portcullis/identity"
	"portcullis/observe/flow"
)

// FromRecord returns the wire form of a flow record.
func FromRecord(r *flow.Record) *FlowEvent {
	ev := &FlowEvent{
		BootTime: r.BootTime, Node: string(r.Node),
		Verdict: r.Verdict.String(), Reason: r.Reason.String(), Direction: r.Direction.String(), State: r.State.String(),
		Protocol: flow.Protocol(r.Protocol), TcpFlags: uint32(r.TCPFlags),
		Source: fromEnd(&r.Source), Destination: fromEnd(&r.Dest),
		Endpoint: r.Endpoint, Ifindex: r.Ifindex, Interface: r.Interface, Evidence: r.Evidence.String(), NoEvidenceNeeded: r.NoEvidenceNeeded,
		Generation: uint64(r.Generation), Stamp: r.Stamp,
		Reinjected: r.Reinjected, Length: r.Length, Rule: r.Rule, Policy: r.Policy,
	}
	if !r.Time.IsZero() {
		ev.Time = timestamppb.New(r.Time)
	}
	if r.Stamp != 0 {
		ev.BindingAge = durationpb.New(r.BindingAge)
	}
	if r.LeaseLeft != 0 {
		ev.LeaseLeft = durationpb.New(r.LeaseLeft)
	}
	if r.Held != 0 {
		ev.Held = durationpb.New(r.Held)
	}
	if r.ICMP != nil {
		ev.Icmp = &ICMP{Type: uint32(r.ICMP.Type), Code: uint32(r.ICMP.Code)}
	}
	if r.Called.IsValid() {
		ev.Called = r.Called.String()
	}
	ev.L7, ev.Process = fromL7(r.L7), fromProcess(r.Process)
	if r.Lost != nil {
		ev.Lost = &LostEvents{Count: r.Lost.Count, Where: string(r.Lost.Where)}
	}
	return ev
}

func fromProcess(p *flow.Process) *Process {
	if p == nil {
		return nil
	}
	// A workload chooses these bytes, and a message holds UTF-8 only.
	text := func(s string) string { return strings.ToValidUTF8(s, "?") }
	out := &Process{Pid: p.PID, Binary: text(p.Binary), Arguments: text(p.Arguments), Cwd: text(p.CWD), Uid: p.UID, Auid: p.AUID,
		Container: p.Container, ExecId: p.ExecID, Parent: fromProcess(p.Parent), Forked: p.Forked, Incomplete: p.Incomplete}
	if !p.Start.IsZero() {
		out.Start = timestamppb.New(p.Start)
	}
	return out
}

func toProcess(p *Process) *flow.Process {
	if p == nil {
		return nil
	}
	out := &flow.Process{PID: p.Pid, Binary: p.Binary, Arguments: p.Arguments, CWD: p.Cwd, UID: p.Uid, AUID: p.Auid,
		Container: p.Container, ExecID: p.ExecId, Parent: toProcess(p.Parent), Forked: p.Forked, Incomplete: p.Incomplete}
	if p.Start != nil {
		out.Start = p.Start.AsTime()
	}
	return out
}

func fromEnd(e *flow.End) *FlowEnd {
	end := &FlowEnd{
		Port: uint32(e.Port), Identity: uint32(e.Identity), Text: e.Text, Labels: e.Labels, SpiffeId: e.SPIFFE, Workload: e.Workload, Endpoint: e.Endpoint,
		OwnerKind: e.Owner.Kind, OwnerName: e.Owner.Name, Service: e.Service, Names: e.Names,
	}
	if e.IP.IsValid() {
		end.Ip = e.IP.String()
	}
	return end
}

// ToRecord returns the flow record of its wire form. A word that this version
// does not know is an error.
func ToRecord(ev *FlowEvent) (r flow.Record, err error) {
	var errs [10]error
	r = flow.Record{
		BootTime: ev.GetBootTime(), Node: identity.NodeName(ev.GetNode()), TCPFlags: uint8(ev.GetTcpFlags()),
		Endpoint: ev.GetEndpoint(), Ifindex: ev.GetIfindex(), Interface: ev.GetInterface(), NoEvidenceNeeded: ev.GetNoEvidenceNeeded(),
		Generation: identity.Generation(ev.GetGeneration()), Stamp: ev.GetStamp(), BindingAge: ev.GetBindingAge().AsDuration(), LeaseLeft: ev.GetLeaseLeft().AsDuration(), Held: ev.GetHeld().AsDuration(),
		Reinjected: ev.GetReinjected(), Length: ev.GetLength(), Rule: ev.GetRule(), Policy: ev.GetPolicy(), Process: toProcess(ev.GetProcess()),
	}
	if ev.GetTime() != nil {
		r.Time = ev.GetTime().AsTime()
	}
	if lost := ev.GetLost(); lost != nil {
		return flow.Record{Time: r.Time, Node: r.Node, Lost: &flow.Lost{Count: lost.GetCount(), Where: flow.LostWhere(lost.GetWhere())}}, nil
	}
	r.Verdict, errs[0] = flow.ParseVerdict(ev.GetVerdict())
	r.Reason, errs[1] = flow.ParseReason(ev.GetReason())
	r.Direction, errs[2] = flow.ParseDirection(ev.GetDirection())
	r.State, errs[3] = flow.ParseState(ev.GetState())
	r.Protocol, errs[4] = flow.ParseProtocol(ev.GetProtocol())
	r.Evidence, errs[5] = flow.ParseEvidence(ev.GetEvidence())
	r.Source, errs[6] = toEnd(ev.GetSource())
	r.Dest, errs[7] = toEnd(ev.GetDestination())
	r.L7, errs[8] = toL7(ev.GetL7())
	if x := ev.GetIcmp(); x != nil {
		r.ICMP = &flow.ICMP{Type: uint8(x.GetType()), Code: uint8(x.GetCode())}
	}
	if ev.GetCalled() != "" {
		r.Called, errs[9] = netip.ParseAddrPort(ev.GetCalled())
	}
	return r, errors.Join(errs[:]...)
}

func toEnd(e *FlowEnd) (end flow.End, err error) {
	end = flow.End{
		Port: uint16(e.GetPort()), Identity: identity.Numeric(e.GetIdentity()), Text: e.GetText(), Labels: e.GetLabels(), SPIFFE: e.GetSpiffeId(),
		Workload: e.GetWorkload(), Endpoint: e.GetEndpoint(),
		Owner: flow.Owner{Kind: e.GetOwnerKind(), Name: e.GetOwnerName()}, Service: e.GetService(), Names: e.GetNames(),
	}
	if s := e.GetIp(); s != "" {
		end.IP, err = netip.ParseAddr(s)
	}
	return end, err
}

// Filter returns the filter that a request asks for, or every mistake in it.
func (x *MonitorRequest) Filter() (f flow.Filter, err error) {
	var errs []error
	f.Verdicts = parseAll(x.GetVerdicts(), flow.ParseVerdict, &errs)
	f.Reasons = parseAll(x.GetReasons(), flow.ParseReason, &errs)
	f.Directions = parseAll(x.GetDirections(), flow.ParseDirection, &errs)
	f.Prefixes = parseAll(x.GetPrefixes(), flow.ParsePrefix, &errs)
	f.Labels = parseAll(x.GetLabels(), flow.ParseLabel, &errs)
	f.Protocols = parseAll(x.GetProtocols(), flow.ParseProtocol, &errs)
	f.Types = parseAll(x.GetTypes(), flow.ParseType, &errs)
	f.Related = parseAll(x.GetRelated(), flow.ParseRelated, &errs)
	f.Endpoints = x.GetEndpoints()
	f.Workloads = x.GetWorkloads()
	for _, p := range x.GetPorts() {
		if p > 65535 {
			errs = append(errs, fmt.Errorf("there is no port %d: want 0 to 65535", p))
		}
		f.Ports = append(f.Ports, uint16(p))
	}
	return f, errors.Join(errs...)
}

func parseAll[T any](words []string, parse func(string) (T, error), errs *[]error) []T {
	var out []T
	for _, w := range words {
		v, err := parse(w)
		if err != nil {
			*errs = append(*errs, err)
			continue
		}
		out = append(out, v)
	}
	return out
}

// Ref returns the text of a policy reference, "KIND/NS/NAME", or "KIND/NAME"
// for a policy of the whole cluster. The zero is "".
func (x *PolicyRef) Ref() string {
	if x.GetNamespace() == "" {
		return strings.TrimPrefix(x.GetKind()+"/"+x.GetName(), "/")
	}
	return x.GetKind() + "/" + x.GetNamespace() + "/" + x.GetName()
}

// Short names by which people call the kinds of policies, in lower case.
var kinds = map[string]string{
	"networkpolicy": "NetworkPolicy", "netpol": "NetworkPolicy",
	"ciliumnetworkpolicy": "CiliumNetworkPolicy", "cnp": "CiliumNetworkPolicy",
	"ciliumclusterwidenetworkpolicy": "CiliumClusterwideNetworkPolicy", "ccnp": "CiliumClusterwideNetworkPolicy",
	"ciliumcidrgroup": "CiliumCIDRGroup", "ccg": "CiliumCIDRGroup",
	"policytree": "PolicyTree", "tree": "PolicyTree",
	"namespace": "Namespace", "ns": "Namespace",
}

// ParseRef parses KIND/NS/NAME or KIND/NAME. The case of the kind does not
// matter; netpol, cnp, ccnp, ccg (CiliumCIDRGroup), ns and tree are short for the usual
// ones.
func ParseRef(s string) (*PolicyRef, error) {
	parts := strings.Split(s, "/")
	if len(parts) < 2 || len(parts) > 3 || parts[0] == "" || parts[len(parts)-1] == "" {
		return nil, fmt.Errorf("%q does not name a policy: want KIND/NAMESPACE/NAME, e.g. NetworkPolicy/default/deny-all, as `portcullis policy get` lists them", s)
	}
	ref := &PolicyRef{Kind: parts[0], Name: parts[len(parts)-1]}
	if k, ok := kinds[strings.ToLower(parts[0])]; ok {
		ref.Kind = k
	}
	if len(parts) == 3 {
		ref.Namespace = parts[1]
	}
	return ref, nil
}
