package authz

import (
	"iter"
	"net/netip"

	"portcullis/bpf/abi"
	"portcullis/identity"
)

// ServiceAddress is an address and port at which a service is called.
type ServiceAddress struct {
	netip.AddrPort
	Protocol uint8
}

// ServicesInside returns, for each of the sets, at which addresses of the services
// a workload of the set may reach somebody whom the set lets in as far as rules
// inside a protocol go: what is sent there has to be looked into, whoever of the
// service's workloads it comes to. Each is yielded once. Of a service behind which
// nobody is known yet (its workloads may be other nodes', of whom nobody here has
// asked) are those where the set looks inside whoever the peer is.
//
// Of a service without a selector none is: who stands behind it is known by a block
// of addresses, and of such nobody can tell the proxy who they are.
// The sets are those in force, or compiled since the last change of peers.
func (x *Sets) ServicesInside(services iter.Seq[*ServiceObject], sets ...Set) []map[ServiceAddress]struct{} {
	out := make([]map[ServiceAddress]struct{}, len(sets))
	var look []int // those that look inside on egress
	for i, s := range sets {
		if s.LooksInsideEgress() {
			look = append(look, i)
		}
	}
	if len(look) == 0 {
		return out
	}
	for service := range services {
		if len(service.Addresses) == 0 || len(service.Ports) == 0 || len(service.Selector) == 0 || service.External != "" {
			continue
		}
		behind := x.behind(service)
		for _, i := range look {
			for _, port := range service.Ports {
				if !sets[i].leadsInside(port, behind) {
					continue
				}
				if out[i] == nil {
					out[i] = map[ServiceAddress]struct{}{}
				}
				for _, ip := range service.Addresses {
					out[i][ServiceAddress{netip.AddrPortFrom(ip, port.Port), port.Protocol}] = struct{}{}
				}
			}
		}
	}
	return out
}

// LooksInsideEgress reports whether anything that the subject sends is let by as far
// as rules inside a protocol go only.
func (s Set) LooksInsideEgress() bool {
	return s.EnforceEgress && s.compiled != nil && s.insides[abi.DirEgress]
}

// behind returns the workloads with numbers that a service with a selector selects.
func (x *Sets) behind(s *ServiceObject) map[identity.Numeric]Peer {
	at, out := ServiceName{s.Namespace, s.Name}, map[identity.Numeric]Peer{}
	// Whatever its labels say, no other namespace's workload stands behind it.
	for n := range x.peersAt[place{kind: atNamespace, value: s.Namespace}] {
		// In doubt it does: it is looked into then, and nobody is let in by that.
		if p := x.peers[n]; s.Backends.selects(at, p, x.repo.facts, true) {
			out[n] = p
		}
	}
	return out
}

// looksInsideWhoever reports whether the set looks inside at a port whoever the peer
// is, and does not let the nodes in wholly there: where they stand behind the service
// it would lead to nobody whom the proxy can be told of.
func (s Set) looksInsideWhoever(proto uint8, port uint16) bool {
	inside := func(n identity.Numeric) bool {
		d := s.Judge(abi.DirEgress, n, proto, port)
		return d.Verdict == abi.VerdictPass && d.L7
	}
	return inside(identity.NumUnmanaged) && inside(identity.NumHost) && inside(identity.NumRemoteNode)
}

// leadsInside reports whether a service's port leads to any of the peers at a port
// where the set looks inside.
func (s Set) leadsInside(port ServicePort, behind map[identity.Numeric]Peer) bool {
	if len(behind) == 0 && port.Target != 0 {
		return s.looksInsideWhoever(port.Protocol, port.Target)
	}
	for n, p := range behind {
		targets := []PortRange{Port(port.Protocol, port.Target)}
		if port.Target == 0 {
			targets = PortRange{Proto: port.Protocol, Name: port.TargetName}.resolve(s.ports(p.Identity))
		}
		for _, t := range targets {
			if d := s.Judge(abi.DirEgress, n, t.Proto, t.First); d.Verdict == abi.VerdictPass && d.L7 {
				return true
			}
		}
	}
	return false
}
