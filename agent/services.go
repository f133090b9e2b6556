package agent

import (
	"fmt"
	"maps"
	"net/netip"
	"slices"

	"go.uber.org/zap"

	"portcullis/authz"
	"portcullis/authz/dialect/k8s"
)

// setServices tells the kernel which addresses stand for others: packets to them
// are judged behind the node's translation, by whom they lead to. Those of the
// configuration are ranges; those of services that were imported are single
// addresses.
func (l *loop) setServices() error {
	if l.servicesSet {
		return nil
	}
	all := map[netip.Prefix]bool{}
	for _, p := range l.cfg.ServiceRanges {
		all[p] = true
	}
	// An address that a node has (an external one, a load balancer's) is judged as
	// the node's first, and behind the translation all the same.
	known := l.knownRanges()
	held := func(ip netip.Addr) bool {
		for p := range known {
			if p.Contains(ip) {
				return true
			}
		}
		return false
	}
	for _, s := range l.services {
		for _, ip := range s.Addresses {
			if p := netip.PrefixFrom(ip, ip.BitLen()); !held(ip) {
				all[p] = true
			}
		}
	}
	if err := l.dp.Untranslated(); err != nil && len(all) > 0 {
		l.alarms.raise("services", fmt.Sprintf("packets to services are dropped where egress is under policy: the kernel does not let them be judged behind its translation: %v", err))
	}
	if err := l.dp.SetServices(slices.Collect(maps.Keys(all))); err != nil {
		return err
	}
	l.servicesSet = true
	return nil
}

// useService puts into the repository what stands behind a service. Its addresses
// come into the kernel when policies are applied.
func (l *loop) useService(s *authz.ServiceObject) {
	l.services[s.Ref], l.servicesSet = s, false
	l.names.setService(s.Ref, s)
	if s.External != "" {
		l.log.Info("a service is a name for another (ExternalName): toServices means nobody by it", zap.Stringer("service", s.Ref))
	}
	l.joinService(s)
}

func (l *loop) forgetService(ref authz.Ref) {
	delete(l.services, ref)
	l.names.setService(ref, nil)
	l.servicesSet = false
	l.repo.SetService(authz.ServiceName{Namespace: ref.Namespace, Name: ref.Name}, nil)
}

// useSlice takes up a part of what stands behind a service, be the service known
// by now or not.
func (l *loop) useSlice(s *authz.SliceObject) {
	former := l.slices[s.Ref]
	l.slices[s.Ref] = s
	if former != nil && former.Service != s.Service {
		l.joinSliced(former)
	}
	l.joinSliced(s)
}

func (l *loop) forgetSlice(ref authz.Ref) {
	former := l.slices[ref]
	delete(l.slices, ref)
	l.joinSliced(former)
}

// joinSliced tells the repository what stands behind a slice's service now.
func (l *loop) joinSliced(s *authz.SliceObject) {
	at := authz.Ref{Kind: k8s.ServiceKind, Namespace: s.Namespace, Name: s.Service}
	if service := l.services[at]; service != nil {
		l.joinService(service)
	}
}

// joinService tells the repository what stands behind a service. Of its slices
// what is in the cluster's service range is left out: a translation leads to no
// other, so such an address is nobody's, and least of all the world's.
func (l *loop) joinService(s *authz.ServiceObject) {
	b := authz.JoinSlices(s, l.slices)
	b.Blocks = slices.DeleteFunc(b.Blocks, func(p netip.Prefix) bool {
		return slices.ContainsFunc(l.cfg.ServiceRanges, func(r netip.Prefix) bool { return r.Contains(p.Addr()) })
	})
	l.repo.SetService(authz.ServiceName{Namespace: s.Namespace, Name: s.Name}, &b)
}
