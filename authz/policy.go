package authz

import (
	"cmp"
	"fmt"
	"slices"

	"portcullis/bpf/abi"
	"portcullis/identity"
)

// Ref names a policy. Two policies with one Ref are versions of one policy.
type Ref struct {
	Kind      string `json:"kind"`
	Namespace string `json:"namespace,omitempty"`
	Name      string `json:"name"`
}

// String returns "Kind namespace/name".
func (r Ref) String() string { return r.Kind + " " + r.Namespace + "/" + r.Name }

func (r Ref) compare(o Ref) int {
	return cmp.Or(cmp.Compare(r.Namespace, o.Namespace), cmp.Compare(r.Name, o.Name), cmp.Compare(r.Kind, o.Kind))
}

// Policy is one policy document in the one rule model. It is immutable once it
// has been put into a Repository.
type Policy struct {
	Ref
	UID    string // of the object in its API server; may be empty
	Source string // the document, verbatim

	// Subject selects the workloads that the policy speaks of.
	Subject Selector
	// DenyIngress and DenyEgress: what no rule of any policy allows is denied
	// to the subject in this direction.
	DenyIngress, DenyEgress bool
	Rules                   []Rule
}

// Action is what a rule does with the packets that it matches.
type Action uint8

// The actions. Deny wins over Allow, whatever the order.
const (
	Deny Action = iota
	Allow
)

// String returns "deny" or "allow".
func (a Action) String() string {
	if a == Allow {
		return "allow"
	}
	return "deny"
}

// Rule matches the packets of one direction whose peer and port it names. The
// zero rule matches nothing.
type Rule struct {
	Direction abi.Direction // seen from the subject
	Action    Action

	AnyPeer bool       // whoever the peer is, workload or not
	Peers   []Selector // else: a peer that one of these selects

	AnyPort bool        // every protocol and port
	Ports   []PortRange // else: one of these

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
// (for ICMP: type << 8 | code).
type PortRange struct {
	Proto       uint8
	First, Last uint16
}

// Port returns the range of one port.
func Port(proto uint8, port uint16) PortRange { return PortRange{proto, port, port} }

// AllPorts returns the range of every port of a protocol.
func AllPorts(proto uint8) PortRange { return PortRange{proto, 0, 0xffff} }

// Selector selects workloads: those that meet every requirement. An empty
// selector selects every workload. No selector selects a reserved identity.
type Selector []Requirement

// Requirement asks that an attribute of a workload is related to Values.
type Requirement struct {
	Attribute Attribute
	Key       string // of a label; else empty
	Operator  Operator
	Values    []string
}

// Attribute is a property of a workload that a selector can look at.
type Attribute uint8

// The attributes.
const (
	PodLabel       Attribute = iota + 1
	NamespaceLabel           // joined from Repository.SetNamespaceLabels
	Namespace                // the name
	ServiceAccount
)

// Operator is the relation that a requirement asks for.
type Operator uint8

// The operators.
const (
	In Operator = iota + 1 // the attribute is there and is one of Values
)

// Label returns the requirement that a pod label has a value.
func Label(key, value string) Requirement {
	return Requirement{Attribute: PodLabel, Key: key, Operator: In, Values: []string{value}}
}

// NamespaceHasLabel returns the requirement that a label of the workload's
// namespace has a value.
func NamespaceHasLabel(key, value string) Requirement {
	return Requirement{Attribute: NamespaceLabel, Key: key, Operator: In, Values: []string{value}}
}

// InNamespace returns the requirement that the workload is in a namespace.
func InNamespace(name string) Requirement {
	return Requirement{Attribute: Namespace, Operator: In, Values: []string{name}}
}

// HasServiceAccount returns the requirement that the workload runs under a
// service account.
func HasServiceAccount(name string) Requirement {
	return Requirement{Attribute: ServiceAccount, Operator: In, Values: []string{name}}
}

// namespaces gives the value of a namespace's label.
type namespaces func(name, key string) (string, bool)

// selects reports whether the selector selects the identity.
func (s Selector) selects(id identity.Identity, ns namespaces) bool {
	if id.Reserved != "" {
		return false
	}
	return !slices.ContainsFunc(s, func(r Requirement) bool { return !r.met(id, ns) })
}

func (r Requirement) met(id identity.Identity, ns namespaces) bool {
	var value string
	ok := true
	switch r.Attribute {
	case PodLabel:
		value, ok = id.Labels[r.Key]
	case NamespaceLabel:
		value, ok = ns(id.Namespace, r.Key)
	case Namespace:
		value = id.Namespace
	case ServiceAccount:
		value = id.ServiceAccount
	}
	return ok && r.Operator == In && slices.Contains(r.Values, value)
}

// Validate reports what the compiler could not obey. A policy that it passes
// means what it says; parsers make no other.
func (p *Policy) Validate() error {
	if p.Kind == "" || p.Name == "" {
		return fmt.Errorf("policy %s: it has no kind or no name", p.Ref)
	}
	if err := p.Subject.validate(); err != nil {
		return fmt.Errorf("policy %s: subject: %w", p.Ref, err)
	}
	for i, r := range p.Rules {
		if err := r.validate(); err != nil {
			return fmt.Errorf("policy %s: rule %d (%s): %w", p.Ref, i, r.Path, err)
		}
	}
	return nil
}

func (r Rule) validate() error {
	if r.Direction >= abi.DirMax || r.Action > Allow {
		return fmt.Errorf("unknown direction %d or action %d", r.Direction, r.Action)
	}
	if r.AnyPeer && r.Peers != nil || r.AnyPort && r.Ports != nil {
		return fmt.Errorf("it names every peer (or port) and some")
	}
	for _, p := range r.Ports {
		if p.First > p.Last {
			return fmt.Errorf("port range %d-%d ends before it begins", p.First, p.Last)
		}
	}
	for _, s := range r.Peers {
		if err := s.validate(); err != nil {
			return err
		}
	}
	return nil
}

func (s Selector) validate() error {
	for _, r := range s {
		if r.Attribute < PodLabel || r.Attribute > ServiceAccount || r.Operator != In {
			return fmt.Errorf("unknown attribute %d or operator %d", r.Attribute, r.Operator)
		}
	}
	return nil
}
