// Package cilium parses cilium.io/v2 CiliumNetworkPolicy into the rule model.
//
// It keeps Cilium's meaning: a policy speaks of its own namespace, and so do
// its peers unless they say something of namespaces; a rule with toPorts and
// without peers speaks of every peer; a rule with neither allows nothing, but
// puts its subjects under policy; an empty list of peers names nobody. It is
// pure and imports authz and authz/dialect only.
package cilium
