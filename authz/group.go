package authz

import "net/netip"

// Group is a named group of blocks of addresses, which policies can speak of
// (BlockGroup). It becomes known by Repository.SetBlockGroup.
type Group struct {
	Ref
	UID    string // of the object in its API server; may be empty
	Source string // the document, verbatim
	Labels map[string]string
	Blocks []netip.Prefix // masked
}
