// Package cilium parses cilium.io/v2 CiliumNetworkPolicy and
// CiliumClusterwideNetworkPolicy into the rule model, and CiliumCIDRGroup into
// groups.
//
// It keeps Cilium's meaning: a policy speaks of its own namespace, and so do
// its peers unless they say something of namespaces; a rule with toPorts and
// without peers speaks of every peer; a rule with neither allows nothing, but
// puts its subjects under policy; an empty list of peers names nobody.
//
// A selector of Cilium's looks at the labels of anybody. Here it becomes a
// selector of workloads and, where it has reserved: labels, the names of those
// that are none but meet it too.
//
// What Cilium 1.20 refuses is refused, and what cannot be judged. What can be
// judged but has no datapath is in Policy.NotEnforced. The package is pure and
// imports authz, authz/dialect, identity and bpf/abi only.
package cilium
