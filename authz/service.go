package authz

import (
	"maps"
	"net/netip"
	"slices"
)

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
	// Ports are those at the addresses, and where each leads.
	Ports []ServicePort
	// External is the DNS name that the service is another word for; empty: it is
	// none. Nobody stands behind such a service.
	External string
}

// ServicePort is a port at a service's addresses: TCP and UDP only, for of others
// nobody looks inside.
type ServicePort struct {
	Protocol uint8
	Port     uint16
	// Target is the port of the workloads behind it; 0: the one that is called
	// TargetName in each.
	Target     uint16
	TargetName string
}

// SliceObject is what an EndpointSlice says: some of the addresses that a service
// leads to. It counts for a service without a selector only: whom one with a
// selector leads to its workloads' labels say.
type SliceObject struct {
	Ref
	UID     string       // of the object in its API server; may be empty
	Source  string       // the document, verbatim
	Service string       // in the slice's namespace; empty: it is of none
	IPs     []netip.Addr // sorted, each once
}

// JoinSlices returns what stands behind a service: what it says itself, and if it
// has no selector the addresses of its slices.
func JoinSlices[M ~map[Ref]*SliceObject](s *ServiceObject, all M) Backends {
	b := s.Backends
	b.Blocks = nil
	if len(b.Selector) > 0 || s.External != "" {
		return b
	}
	for x := range maps.Values(all) {
		if x.Namespace != s.Namespace || x.Service != s.Name {
			continue
		}
		for _, ip := range x.IPs {
			b.Blocks = append(b.Blocks, netip.PrefixFrom(ip, ip.BitLen()))
		}
	}
	slices.SortFunc(b.Blocks, netip.Prefix.Compare)
	b.Blocks = slices.Compact(b.Blocks)
	return b
}
