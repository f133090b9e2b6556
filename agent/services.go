package agent

import (
	"fmt"
	"maps"
	"net/netip"
	"slices"
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
	prefixes := slices.Collect(maps.Keys(all))
	if err := l.dp.Untranslated(); err != nil && len(prefixes) > 0 {
		l.alarms.raise("services", fmt.Sprintf("packets to services are dropped where egress is under policy: the kernel does not let them be judged behind its translation: %v", err))
	}
	return l.dp.SetServices(prefixes)
}
