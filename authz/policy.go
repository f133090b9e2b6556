package authz

import (
	"cmp"
	"fmt"

	"portcullis/authz/l7"
	"portcullis/bpf/abi"
	"portcullis/identity"
)

// Ref names a policy. Two policies with one Ref are versions of one policy.
type Ref struct {
	Kind      string `json:"kind"`
	Namespace string `json:"namespace,omitempty"`
	Name      string `json:"name"`
}

// String returns "Kind namespace/name", or "Kind name" for what is in no
// namespace.
func (r Ref) String() string {
	if r.Namespace == "" {
		return r.Kind + " " + r.Name
	}
	return r.Kind + " " + r.Namespace + "/" + r.Name
}

func (r Ref) compare(o Ref) int {
	return cmp.Or(cmp.Compare(r.Namespace, o.Namespace), cmp.Compare(r.Name, o.Name), cmp.Compare(r.Kind, o.Kind))
}

// Policy is one policy document in the one rule model. It is immutable once it
// has been put into a Repository.
type Policy struct {
	Ref
	UID    string // of the object in its API server; may be empty
	Source string // the document, verbatim

	// Specs are judged side by side, as if each were a policy of its own.
	Specs []Spec
	// NotEnforced are the places of what can be judged but has no datapath
	// yet. Who enforces must refuse a policy that has any; see Enforceable.
	NotEnforced []Problem
	// NeedsProxy are the places of rules inside protocols. Who enforces without a
	// proxy must refuse a policy that has any.
	NeedsProxy []Problem
}

// Spec is one specification of a policy: subjects, and what holds for them.
type Spec struct {
	// Subject selects the workloads that the rules speak of.
	Subject Selector
	// Nodes: the subjects are nodes, and Subject looks at their labels. No
	// workload is meant.
	Nodes bool
	// DenyIngress and DenyEgress: what no rule of any policy allows is denied
	// to the subject in this direction.
	DenyIngress, DenyEgress bool
	Rules                   []Rule
}

// Enforceable returns nil, or the error of type Problems that says which
// parts of the policy have no datapath yet.
func (p *Policy) Enforceable() error {
	if len(p.NotEnforced) == 0 {
		return nil
	}
	return Problems(p.NotEnforced)
}

// Action is what a rule does with the packets that it matches.
type Action uint8

// The actions. Deny wins over Allow, whatever the order. Limit allows nothing:
// TCP and UDP outside the ports of all Limit rules that speak of a subject in a
// direction are denied, whoever the peer is; other protocols are not touched.
const (
	Deny Action = iota
	Allow
	Limit
)

// String returns "deny", "allow" or "limit".
func (a Action) String() string {
	switch a {
	case Allow:
		return "allow"
	case Limit:
		return "limit"
	}
	return "deny"
}

// Rule matches the packets of one direction whose peer and port it names. The
// zero rule matches nothing.
type Rule struct {
	Direction abi.Direction // seen from the subject
	Action    Action

	AnyPeer bool           // whoever the peer is, workload or not
	Peers   []PeerSelector // else: a peer that one of these selects

	AnyPort bool        // every protocol and port
	Ports   []PortRange // else: one of these

	// Evidence is the least that an allow rule asks of the peer's binding;
	// none stands for the configured default. Where several rules allow a
	// packet, the strongest demand among them counts.
	Evidence identity.Evidence
	// L7: what the rule allows is allowed as far as these rules inside the
	// protocol go; nil: wholly. Where several rules allow a packet, it is let
	// inside as far as any of them goes; see Inside. In a Limit rule it is said
	// of whatever is allowed at its ports.
	L7 *l7.Rules

	Path string // where in the document, for flow records and traces
}

// IP protocols that policies can name.
const (
	ProtoICMP   = 1
	ProtoTCP    = 6
	ProtoUDP    = 17
	ProtoICMPv6 = 58
	ProtoSCTP   = 132
)

// PortRange is a protocol and an inclusive range of the called side's ports
// (for ICMP: type << 8 | code), or the name that ports of the called
// workload's containers bear.
type PortRange struct {
	Proto       uint8
	First, Last uint16
	Name        string // if there is one, First and Last are 0
}

// Port returns the range of one port.
func Port(proto uint8, port uint16) PortRange {
	return PortRange{Proto: proto, First: port, Last: port}
}

// AllPorts returns the range of every port of a protocol.
func AllPorts(proto uint8) PortRange { return PortRange{Proto: proto, Last: 0xffff} }

// PortNamed returns the ports of a protocol that bear a name.
func PortNamed(proto uint8, name string) PortRange { return PortRange{Proto: proto, Name: name} }

// resolve returns the ports that a name stands for at a workload.
func (p PortRange) resolve(named []identity.NamedPort) (out []PortRange) {
	for _, n := range named {
		if n.Name == p.Name && portProtocols[n.Protocol] == p.Proto {
			out = append(out, Port(p.Proto, n.Port))
		}
	}
	return out
}

// portProtocols are the protocols of container ports.
var portProtocols = map[string]uint8{"TCP": ProtoTCP, "UDP": ProtoUDP, "SCTP": ProtoSCTP}

// Validate reports what the compiler could not obey. A policy that it passes
// means what it says; parsers make no other.
func (p *Policy) Validate() error {
	if p.Kind == "" || p.Name == "" {
		return fmt.Errorf("policy %s: it has no kind or no name", p.Ref)
	}
	for i, spec := range p.Specs {
		validate := spec.Subject.validate
		if spec.Nodes {
			validate = func() error { return spec.Subject.validateFor(NodeLabel) }
		}
		if err := validate(); err != nil {
			return fmt.Errorf("policy %s: spec %d: subject: %w", p.Ref, i, err)
		}
		for j, r := range spec.Rules {
			if err := r.validate(); err != nil {
				return fmt.Errorf("policy %s: spec %d: rule %d (%s): %w", p.Ref, i, j, r.Path, err)
			}
		}
	}
	return nil
}

func (r Rule) validate() error {
	if r.Direction >= abi.DirMax || r.Action > Limit {
		return fmt.Errorf("unknown direction %d or action %d", r.Direction, r.Action)
	}
	if r.AnyPeer && r.Peers != nil || r.AnyPort && r.Ports != nil {
		return fmt.Errorf("it names every peer (or port) and some")
	}
	for _, p := range r.Ports {
		if p.First > p.Last {
			return fmt.Errorf("port range %d-%d ends before it begins", p.First, p.Last)
		}
		if p.Name != "" && (p.Last != 0 || p.Proto != ProtoTCP && p.Proto != ProtoUDP && p.Proto != ProtoSCTP) {
			return fmt.Errorf("port %q has a number too, or is of a protocol (%d) without ports", p.Name, p.Proto)
		}
	}
	if r.Action == Deny && (r.L7 != nil || r.Evidence != identity.EvidenceNone) {
		return fmt.Errorf("it denies, and asks for evidence or L7")
	}
	if r.Action == Limit {
		if err := r.validateLimit(); err != nil {
			return err
		}
	}
	for _, s := range r.Peers {
		if s == nil {
			return fmt.Errorf("one of its peers is nothing")
		}
		if err := s.validate(); err != nil {
			return err
		}
	}
	return nil
}
