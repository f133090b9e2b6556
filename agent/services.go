package agent

import (
	"fmt"
	"maps"
	"net/netip"
	"slices"

	"portcullis/authz"
)

// setServices tells the kernel which addresses stand for others: packets to them
// are judged behind the node's translation, by whom they lead to. Those of the
// configuration are ranges; those of services that were imported are single
// addresses.
func (l *loop) setServices() error {
	all := map[netip.Prefix]bool{}
	for _, p := range l.cfg.ServiceRanges {
		all[p] = true
	}
	for _, s := range l.services {
		for _, ip := range s.Addresses {
			all[netip.PrefixFrom(ip, ip.BitLen())] = true
		}
	}
	if err := l.dp.Untranslated(); err != nil && len(all) > 0 {
		l.alarms.raise("services", fmt.Sprintf("packets to services are dropped where egress is under policy: the kernel does not let them be judged behind its translation: %v", err))
	}
	return l.dp.SetServices(slices.Collect(maps.Keys(all)))
}

// useService puts a service into force: its addresses in the kernel, and in the
// repository what stands behind it. An address that somebody holds is no
// service's: it would be judged as what it is not.
func (l *loop) useService(s *authz.ServiceObject) error {
	for _, ip := range s.Addresses {
		for p := range l.knownRanges() {
			if p.Contains(ip) {
				return fmt.Errorf("service %s/%s has the address %s, which is in the range %s of a node", s.Namespace, s.Name, ip, p)
			}
		}
	}
	before := l.services[s.Ref]
	l.services[s.Ref] = s
	if err := l.setServices(); err != nil {
		if delete(l.services, s.Ref); before != nil {
			l.services[s.Ref] = before
		}
		return err
	}
	l.repo.SetService(authz.ServiceName{Namespace: s.Namespace, Name: s.Name}, &s.Backends)
	return nil
}

// forgetService is its opposite. Addresses that cannot be taken out of the
// kernel's map stay services, which allows nothing more.
func (l *loop) forgetService(s *authz.ServiceObject) {
	delete(l.services, s.Ref)
	l.repo.SetService(authz.ServiceName{Namespace: s.Namespace, Name: s.Name}, nil)
	if err := l.setServices(); err != nil {
		l.log.Warn("take a service's addresses out of the kernel: " + err.Error())
	}
}
