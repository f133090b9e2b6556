package flow

import (
	"fmt"
	"net/netip"
	"slices"
	"strconv"
	"strings"

	"portcullis/bpf/abi"
)

// Filter chooses records: those that match every field that is set. A field
// with several values matches any of them; where it speaks of an end, either
// end will do. The zero Filter matches everything.
type Filter struct {
	Verdicts   []abi.Verdict
	Reasons    []abi.Reason
	Directions []abi.Direction
	Prefixes   []netip.Prefix // of either end's address
	Labels     []Label        // of either end's identity
	Ports      []uint16       // of either end
	Protocols  []uint8
	Endpoints  []uint32  // ids: the judge or either end
	Workloads  []string  // "NS/NAME" of either end
	Related    []Related // an endpoint of this node, or a workload: the judge or either end
	Types      []Type
}

// Type is what a record is about. A record may be of several types.
type Type string

// The types.
const (
	TypePacket  Type = "packet"
	TypeDrop    Type = "drop"    // a packet that was dropped
	TypeTrace   Type = "trace"   // a packet that was not: it passed, is held, or was steered
	TypeVerdict Type = "verdict" // policy decided, about a new flow
	TypeL7      Type = "l7"      // a request that the node's proxy has judged
)

// Types are all types, in the order in which help texts name them.
func Types() []Type { return []Type{TypeDrop, TypeTrace, TypeVerdict, TypeL7, TypePacket} }

// Is reports whether the record is of a type.
func (r *Record) Is(t Type) bool {
	packet := r.L7 == nil && r.Lost == nil
	switch t {
	case TypePacket:
		return packet
	case TypeDrop:
		return packet && r.dropped()
	case TypeTrace:
		return packet && !r.dropped()
	case TypeVerdict:
		return packet && r.ByPolicy()
	case TypeL7:
		return r.L7 != nil
	}
	return false
}

// dropped: what is not known to have gone on is taken for dropped.
func (r *Record) dropped() bool {
	switch r.Verdict {
	case abi.VerdictPass, abi.VerdictHold, abi.VerdictAudit, abi.VerdictSteer:
		return false
	}
	return true
}

// ByPolicy reports whether policy decided about the packet of the record: that it
// is dropped, would be but for the audit, or opens a flow.
func (r *Record) ByPolicy() bool {
	return r.Verdict == abi.VerdictAudit || r.Reason == abi.ReasonPolicyDenied ||
		r.Rule != 0 && r.State == abi.FlowNew && r.Verdict != abi.VerdictHold
}

// ParseType parses a type's word.
func ParseType(s string) (Type, error) {
	all := Types()
	if slices.Contains(all, Type(s)) {
		return Type(s), nil
	}
	words := make([]string, len(all))
	for i, t := range all {
		words[i] = string(t)
	}
	return "", fmt.Errorf("there is no type %q: want %s", s, strings.Join(words, ", "))
}

// Related names an endpoint of this node by its id, or a workload as "NS/NAME".
type Related struct {
	Endpoint uint32
	Workload string // "": it is named by its id
}

// ParseRelated parses an id, or NS/NAME.
func ParseRelated(s string) (Related, error) {
	if id, err := strconv.ParseUint(s, 10, 32); err == nil && id > 0 {
		return Related{Endpoint: uint32(id)}, nil
	}
	if ns, name, ok := strings.Cut(s, "/"); ok && ns != "" && name != "" && !strings.Contains(name, "/") {
		return Related{Workload: s}, nil
	}
	return Related{}, fmt.Errorf("%q names no endpoint: want its id, or NAMESPACE/NAME", s)
}

// to reports whether the record speaks of it.
func (x Related) to(r *Record) bool {
	if x.Workload != "" {
		return r.Source.Workload == x.Workload || r.Dest.Workload == x.Workload
	}
	return x.Endpoint == r.Endpoint || x.Endpoint == r.Source.Endpoint || x.Endpoint == r.Dest.Endpoint
}

// Match reports whether the filter chooses the record.
func (f *Filter) Match(r *Record) bool {
	either := func(match func(*End) bool) bool { return match(&r.Source) || match(&r.Dest) }
	return matchAny(f.Verdicts, r.Verdict) &&
		(len(f.Types) == 0 || slices.ContainsFunc(f.Types, r.Is)) &&
		(len(f.Related) == 0 || slices.ContainsFunc(f.Related, func(x Related) bool { return x.to(r) })) &&
		matchAny(f.Reasons, r.Reason) &&
		matchAny(f.Directions, r.Direction) &&
		matchAny(f.Protocols, r.Protocol) &&
		(len(f.Prefixes) == 0 || either(func(e *End) bool {
			return slices.ContainsFunc(f.Prefixes, func(p netip.Prefix) bool { return p.Contains(e.IP) })
		})) &&
		(len(f.Labels) == 0 || either(func(e *End) bool {
			return slices.ContainsFunc(f.Labels, func(l Label) bool { return slices.ContainsFunc(e.Labels, l.Match) })
		})) &&
		(len(f.Ports) == 0 || hasPorts(r.Protocol) && either(func(e *End) bool { return slices.Contains(f.Ports, e.Port) })) &&
		(len(f.Endpoints) == 0 || slices.Contains(f.Endpoints, r.Endpoint) ||
			either(func(e *End) bool { return e.Endpoint != 0 && slices.Contains(f.Endpoints, e.Endpoint) })) &&
		(len(f.Workloads) == 0 || either(func(e *End) bool { return e.Workload != "" && slices.Contains(f.Workloads, e.Workload) }))
}

func matchAny[T comparable](want []T, have T) bool {
	return len(want) == 0 || slices.Contains(want, have)
}

// hasPorts is false where an End's Port is something else.
func hasPorts(proto uint8) bool { return proto != protoICMPv4 && proto != protoICMPv6 }

// Label is a condition on one label of an identity.
type Label struct {
	Source string // "k8s", "reserved"; "": any
	Key    string
	Value  string
	Exact  bool // the value must be Value; else any
}

// ParseLabel parses [source:]key[=value].
func ParseLabel(s string) (Label, error) {
	l := splitLabel(s)
	if l.Key == "" || l.Source == "" && strings.Contains(l.Key, ":") {
		return Label{}, fmt.Errorf("label %q has no key: want [source:]key[=value], e.g. org=empire or reserved:world", s)
	}
	return l, nil
}

// String returns the text that ParseLabel parses.
func (l Label) String() string {
	s := l.Key
	if l.Source != "" {
		s = l.Source + ":" + s
	}
	if l.Exact {
		s += "=" + l.Value
	}
	return s
}

// Match reports whether a label (source:key[=value]) meets the condition.
func (l Label) Match(label string) bool {
	have := splitLabel(label)
	return (l.Source == "" || l.Source == have.Source) && l.Key == have.Key && (!l.Exact || l.Value == have.Value)
}

func splitLabel(s string) (l Label) {
	l.Key, l.Value, l.Exact = strings.Cut(s, "=")
	if source, key, ok := strings.Cut(l.Key, ":"); ok {
		l.Source, l.Key = source, key
	}
	return l
}

// ParsePrefix parses an address or a prefix.
func ParsePrefix(s string) (netip.Prefix, error) {
	if ip, err := netip.ParseAddr(s); err == nil {
		ip = ip.Unmap().WithZone("")
		return netip.PrefixFrom(ip, ip.BitLen()), nil
	}
	p, err := netip.ParsePrefix(s)
	if err != nil {
		return netip.Prefix{}, fmt.Errorf("%q is neither an address nor a prefix: want e.g. 10.1.0.7 or 10.1.0.0/24", s)
	}
	if ip := p.Addr(); ip.Is4In6() && p.Bits() >= 96 {
		p = netip.PrefixFrom(ip.Unmap(), p.Bits()-96)
	}
	return p.Masked(), nil
}
