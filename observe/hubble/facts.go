package hubble

import (
	"errors"
	"net/netip"
	"strconv"
	"strings"
	"time"

	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/anypb"
	"google.golang.org/protobuf/types/known/structpb"

	flowpb "github.com/cilium/cilium/api/v1/flow"
	"portcullis/observe/flow"
)

// Facts are what we know of a flow and Hubble's record has no field for. In a
// flow's extension they are a google.protobuf.Struct under the keys below;
// 64-bit numbers are text there, and durations seconds with their unit. What is
// not known is not there.
type Facts struct {
	Verdict          string         // "verdict": ours: drop, pass, hold, audit, steer
	Reason           string         // "reason" of a drop, ours: policy-denied, stale-lease, ...
	Evidence         string         // "evidence" of the peer's binding: none, watch, lease, svid, local
	NoEvidenceNeeded bool           // "noEvidenceNeeded": the verdict is the same whoever the peer is
	Generation       uint64         // "generation" of the peer's binding
	BindingAge       time.Duration  // "bindingAge"
	LeaseLeft        time.Duration  // "leaseLeft"; negative: it had ended so long ago
	Held             time.Duration  // "held": for how long the packet was
	Reinjected       bool           // "reinjected"
	Later            bool           // "later": the flow had been told of before, here and in this direction
	Policy           string         // "policy" that decided, KIND/NS/NAME
	SourceSPIFFE     string         // "sourceSpiffeID"
	DestSPIFFE       string         // "destinationSpiffeID"
	Called           netip.AddrPort // "called": what the workload called, where the node has translated that to the peer
	Process          *flow.Process  // "process", an object: pid, binary, arguments, cwd, uid, auid, container, start, execID, forked, incomplete, parent
}

func facts(r *flow.Record) Facts {
	f := Facts{Verdict: r.Verdict.String(), Reason: r.Reason.String(), Evidence: r.Evidence.String(), NoEvidenceNeeded: r.NoEvidenceNeeded,
		LeaseLeft: r.LeaseLeft, Held: r.Held, Reinjected: r.Reinjected, Later: r.Later, Policy: r.Policy,
		SourceSPIFFE: r.Source.SPIFFE, DestSPIFFE: r.Dest.SPIFFE, Called: r.Called, Process: r.Process}
	if r.L7 != nil {
		f.Evidence = "" // that was looked at when the connection began: its record tells
	}
	if r.Stamp != 0 {
		f.Generation, f.BindingAge = uint64(r.Generation), r.BindingAge
	}
	return f
}

// extension returns the facts as the field of a flow that is for such.
func (f Facts) extension() *anypb.Any {
	s := &structpb.Struct{Fields: map[string]*structpb.Value{}}
	text := func(key, v string) {
		if v != "" {
			s.Fields[key] = structpb.NewStringValue(strings.ToValidUTF8(v, "?"))
		}
	}
	flag := func(key string, v bool) {
		if v {
			s.Fields[key] = structpb.NewBoolValue(true)
		}
	}
	lasting := func(key string, d time.Duration) {
		if d != 0 {
			text(key, seconds(d))
		}
	}
	text("verdict", f.Verdict)
	if f.Reason != "none" {
		text("reason", f.Reason)
	}
	text("evidence", f.Evidence)
	flag("noEvidenceNeeded", f.NoEvidenceNeeded)
	if f.Generation != 0 {
		text("generation", strconv.FormatUint(f.Generation, 10))
		text("bindingAge", seconds(f.BindingAge))
	}
	lasting("leaseLeft", f.LeaseLeft)
	lasting("held", f.Held)
	flag("reinjected", f.Reinjected)
	flag("later", f.Later)
	text("policy", f.Policy)
	text("sourceSpiffeID", f.SourceSPIFFE)
	text("destinationSpiffeID", f.DestSPIFFE)
	if f.Called.IsValid() {
		text("called", f.Called.String())
	}
	if p := processValue(f.Process); p != nil {
		s.Fields["process"] = p
	}
	out := &anypb.Any{}
	// In one order always: the same record is the same bytes.
	if err := anypb.MarshalFrom(out, s, proto.MarshalOptions{Deterministic: true}); err != nil {
		return nil // no such value is made above; a flow without facts is still true
	}
	return out
}

func seconds(d time.Duration) string { return strconv.FormatFloat(d.Seconds(), 'f', -1, 64) + "s" }

func processValue(p *flow.Process) *structpb.Value {
	if p == nil {
		return nil
	}
	s := &structpb.Struct{Fields: map[string]*structpb.Value{
		"pid": structpb.NewNumberValue(float64(p.PID)), "uid": structpb.NewNumberValue(float64(p.UID)), "auid": structpb.NewNumberValue(float64(p.AUID))}}
	for key, v := range map[string]string{"binary": p.Binary, "arguments": p.Arguments, "cwd": p.CWD, "container": p.Container, "execID": p.ExecID} {
		if v != "" {
			s.Fields[key] = structpb.NewStringValue(strings.ToValidUTF8(v, "?")) // a workload chooses these bytes
		}
	}
	for key, v := range map[string]bool{"forked": p.Forked, "incomplete": p.Incomplete} {
		if v {
			s.Fields[key] = structpb.NewBoolValue(true)
		}
	}
	if !p.Start.IsZero() {
		s.Fields["start"] = structpb.NewStringValue(p.Start.UTC().Format(time.RFC3339Nano))
	}
	if parent := processValue(p.Parent); parent != nil {
		s.Fields["parent"] = parent
	}
	return structpb.NewStructValue(s)
}

// ErrNoFacts says that a flow has none of ours: another server made it.
var ErrNoFacts = errors.New("the flow has no extension of Portcullis")

// FactsOf reads a flow's facts. ErrNoFacts: it has none.
func FactsOf(f *flowpb.Flow) (Facts, error) {
	var s structpb.Struct
	if f.GetExtensions() == nil || !f.GetExtensions().MessageIs(&s) {
		return Facts{}, ErrNoFacts
	}
	if err := f.GetExtensions().UnmarshalTo(&s); err != nil {
		return Facts{}, err
	}
	text := func(key string) string { return s.Fields[key].GetStringValue() }
	if text("verdict") == "" {
		return Facts{}, ErrNoFacts
	}
	out := Facts{Verdict: text("verdict"), Reason: text("reason"), Evidence: text("evidence"), NoEvidenceNeeded: s.Fields["noEvidenceNeeded"].GetBoolValue(),
		Reinjected: s.Fields["reinjected"].GetBoolValue(), Later: s.Fields["later"].GetBoolValue(), Policy: text("policy"), SourceSPIFFE: text("sourceSpiffeID"), DestSPIFFE: text("destinationSpiffeID"),
		Process: toProcess(s.Fields["process"].GetStructValue())}
	if out.Reason == "" {
		out.Reason = "none"
	}
	var errs []error
	if g := text("generation"); g != "" {
		var err error
		out.Generation, err = strconv.ParseUint(g, 10, 64)
		errs = append(errs, err)
	}
	for key, to := range map[string]*time.Duration{"bindingAge": &out.BindingAge, "leaseLeft": &out.LeaseLeft, "held": &out.Held} {
		if d := text(key); d != "" {
			var err error
			*to, err = time.ParseDuration(d)
			errs = append(errs, err)
		}
	}
	if at := text("called"); at != "" {
		var err error
		out.Called, err = netip.ParseAddrPort(at)
		errs = append(errs, err)
	}
	return out, errors.Join(errs...)
}

func toProcess(s *structpb.Struct) *flow.Process {
	if s == nil {
		return nil
	}
	text := func(key string) string { return s.Fields[key].GetStringValue() }
	number := func(key string) uint32 { return uint32(s.Fields[key].GetNumberValue()) }
	p := &flow.Process{PID: number("pid"), Binary: text("binary"), Arguments: text("arguments"), CWD: text("cwd"), UID: number("uid"), AUID: number("auid"),
		Container: text("container"), ExecID: text("execID"), Forked: s.Fields["forked"].GetBoolValue(), Incomplete: s.Fields["incomplete"].GetBoolValue(), Parent: toProcess(s.Fields["parent"].GetStructValue())}
	p.Start, _ = time.Parse(time.RFC3339Nano, text("start")) // zero: not known
	return p
}
