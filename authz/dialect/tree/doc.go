// Package tree parses the policy trees that Cilium took in 2016 and 2017, before
// it had objects of Kubernetes: one JSON object with a name, rules and children.
//
// It keeps their meaning, in words of the rule model:
//
//	coverage  the subjects: workloads of any namespace that have all the labels
//	allow     the peers: who is covered is under default deny on ingress
//	requires  what every peer must have besides; it allows nothing
//	l4        limits TCP and UDP, in either direction, and allows nothing
//	l7-rules  rules inside HTTP, by which what is allowed at a port is judged
//	          further
//
// A label in a child of the tree is relative to the child's path: "deathstar"
// in root.id.empire is the label id.empire.deathstar. A tree is known by its
// shape, for it has no apiVersion and kind. What is not obeyed is refused where
// it stands. The package is pure and imports authz, authz/dialect and identity
// only.
package tree
