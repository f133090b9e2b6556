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
	Values    []string // one or more for In and NotIn, else none
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

// namespaces gives the value of a namespace's label, and whether the label is
// there. known is false where nobody has said what labels the namespace has.
type namespaces func(name, key string) (value string, there, known bool)

// selects reports whether the selector selects the identity. doubt is the
// answer where that hangs on labels which are not known: unknown is not
// absent, so the caller names the side that lets less pass.
func (s Selector) selects(id identity.Identity, ns namespaces, doubt bool) bool {
	if id.Reserved != "" {
		return false
	}
	return !slices.ContainsFunc(s, func(r Requirement) bool { return !r.met(id, ns, doubt) })
}

func (r Requirement) met(id identity.Identity, ns namespaces, doubt bool) bool {
	var value string
	there, known := true, true
	switch r.Attribute {
	case PodLabel:
		value, there = id.Labels[r.Key]
	case NamespaceLabel:
		value, there, known = ns(id.Namespace, r.Key)
	case Namespace:
		value = id.Namespace
	case ServiceAccount:
		value = id.ServiceAccount
	}
	if !known {
		return doubt
	}
	switch r.Operator {
	case In:
		return there && slices.Contains(r.Values, value)
	case NotIn:
		return !there || !slices.Contains(r.Values, value)
	case Exists:
		return there
	case DoesNotExist:
		return !there
	}
	return false // Validate lets no other through
}

func (s Selector) validate() error {
	for _, r := range s {
		if r.Attribute < PodLabel || r.Attribute > ServiceAccount || r.Operator < In || r.Operator > DoesNotExist {
			return fmt.Errorf("unknown attribute %d or operator %d", r.Attribute, r.Operator)
		}
		if r.Operator.TakesValues() != (len(r.Values) > 0) {
			return fmt.Errorf("operator %d with %d values", r.Operator, len(r.Values))
		}
	}
	return nil
}
