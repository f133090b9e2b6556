package authz

import "net/netip"

// ServiceObject is what is said of a service. What stands behind it becomes known
// by Repository.SetService.
type ServiceObject struct {
	Ref
	UID    string // of the object in its API server; may be empty
	Source string // the document, verbatim
	Backends
	// Addresses stand for the service: its own, and those of load balancers.
	// None: it is headless, or a name for another.
	Addresses []netip.Addr
}
