package authz

import (
	"fmt"
	"slices"

	"portcullis/identity"
)

// Selector selects workloads: those that meet every requirement. An empty
// selector selects every workload. No selector selects a reserved identity.
type Selector []Requirement

// Requirement asks that an attribute of a workload is related to Values.
type Requirement struct {
	Attribute Attribute
	Key       string // of a label; else empty
	Operator  Operator
	Values    []string // one or more for In and NotIn, else none; sorted, each once
}

// Attribute is a property of a workload that a selector can look at.
type Attribute uint8

// The attributes. An identity has every label of its pod today. Whoever filters
// labels must refuse a selector that names one which the filter removes: In
// would select nobody, NotIn and DoesNotExist everybody.
const (
	PodLabel       Attribute = iota + 1
	NamespaceLabel           // joined from Repository.SetNamespaceLabels
	Namespace                // the name; every workload has one
	ServiceAccount           // the name; every workload has one

	// Labels of what is no workload.
	NodeLabel    // in Nodes
	GroupLabel   // in BlockGroup
	ServiceLabel // in Service

	Cluster // of a workload: the name of the cluster, Options.Cluster

	// TrustDomain is that of the workload's SPIFFE ID. A selector that looks at
	// it selects peers of the trust domains that it names, by In only; any
	// other selects peers of Options.TrustDomain.
	TrustDomain
)

// Operator is the relation that a requirement asks for.
type Operator uint8

// The operators. As in Kubernetes, a label that is not there meets NotIn.
const (
	In           Operator = iota + 1 // the attribute is there and is one of Values
	NotIn                            // it is not there, or is none of Values
	Exists                           // it is there
	DoesNotExist                     // it is not there
)

// ParseOperator returns the operator that Kubernetes' label selectors call so.
func ParseOperator(s string) (Operator, bool) {
	i := slices.Index([]string{"In", "NotIn", "Exists", "DoesNotExist"}, s)
	return Operator(i + 1), i >= 0
}

// TakesValues reports whether the operator compares with values.
func (o Operator) TakesValues() bool { return o == In || o == NotIn }

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

// attributes gives the value of an attribute, and whether it is there. known
// is false where nobody has said what labels there are.
type attributes func(Requirement) (value string, there, known bool)

// labelsOf are the attributes of what has nothing but labels.
func labelsOf(labels map[string]string) attributes {
	return func(r Requirement) (string, bool, bool) {
		value, there := labels[r.Key]
		return value, there, true
	}
}

// selectsWorkload reports whether the selector selects the identity. doubt is
// the answer where that hangs on labels which are not known: unknown is not
// absent, so the caller names the side that lets less pass.
func (s Selector) selectsWorkload(id identity.Identity, f *facts, doubt bool) bool {
	if id.Reserved != "" {
		return false
	}
	attributes := f.of(id)
	return !slices.ContainsFunc(s, func(r Requirement) bool { return !r.met(attributes, doubt) })
}

// selects implements PeerSelector. A workload of another trust domain is
// nobody to policies, whatever its labels, unless they name its trust domain.
func (s Selector) selects(p Peer, f *facts, doubt bool) bool {
	return (p.Identity.TrustDomain == f.trustDomain || s.namesTrustDomains()) && s.selectsWorkload(p.Identity, f, doubt)
}

func (s Selector) namesTrustDomains() bool {
	return slices.ContainsFunc(s, func(r Requirement) bool { return r.Attribute == TrustDomain })
}

// meets reports whether attributes that are all known meet the selector.
func (s Selector) meets(a attributes) bool {
	return !slices.ContainsFunc(s, func(r Requirement) bool { return !r.met(a, false) })
}

func (r Requirement) met(a attributes, doubt bool) bool {
	value, there, known := a(r)
	if !known {
		return doubt
	}
	switch r.Operator {
	case In:
		return there && r.has(value)
	case NotIn:
		return !there || !r.has(value)
	case Exists:
		return there
	case DoesNotExist:
		return !there
	}
	return false // Validate lets no other through
}

// has reports whether the value is one of Values.
func (r Requirement) has(value string) bool {
	_, found := slices.BinarySearch(r.Values, value)
	return found
}

func (s Selector) validate() error {
	return s.validateFor(PodLabel, NamespaceLabel, Namespace, ServiceAccount, Cluster, TrustDomain)
}

// validateFor reports a selector that looks at other attributes than these.
func (s Selector) validateFor(allowed ...Attribute) error {
	for _, r := range s {
		if !slices.Contains(allowed, r.Attribute) || r.Operator < In || r.Operator > DoesNotExist {
			return fmt.Errorf("attribute %d or operator %d has no place here", r.Attribute, r.Operator)
		}
		if r.Attribute == TrustDomain && r.Operator != In {
			return fmt.Errorf("operator %d of a trust domain: a selector names those that it means", r.Operator)
		}
		if r.Operator.TakesValues() != (len(r.Values) > 0) {
			return fmt.Errorf("operator %d with %d values", r.Operator, len(r.Values))
		}
		for i := 1; i < len(r.Values); i++ {
			if r.Values[i-1] >= r.Values[i] {
				return fmt.Errorf("the values of %q are not sorted, each once", r.Key)
			}
		}
	}
	return nil
}
