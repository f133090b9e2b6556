// Package k8s parses networking.k8s.io/v1 NetworkPolicy into the rule model.
//
// It keeps Kubernetes' meaning: a rule without peers speaks of every peer, a
// port without a number of every port of its protocol; policyTypes defaults to
// Ingress, and Egress where there are egress rules; rules of a direction that
// policyTypes does not name say nothing. It is pure and imports authz and
// authz/dialect only.
package k8s
