package agent

import (
	"fmt"
	"maps"

	"portcullis/authz"
	"portcullis/datapath"
)

// Whom a service leads to is known behind the node's translation, and that is
// behind the proxy. So the kernel is told at which addresses of services somebody
// may be reached whom a set looks into: what is sent there is steered from its
// first packet on. What it was not told of is dropped there (l7-unavailable): to
// be late, or to have no room, lets nothing by.

// steered is what the kernel was told, by policy set. Owned by the loop.
type steered struct {
	sets   map[uint32]addresses // nil: nothing yet by this agent
	behind bool                 // sets or peers have changed since
	failed bool                 // the kernel did not take all of it
}

type addresses = map[authz.ServiceAddress]struct{}

// steerServices tells the kernel what the sets in force look into, and those that
// endpoints are about to be switched to, by what is known of services and their
// workloads now. A failure is an alarm, and is tried again.
func (l *loop) steerServices(next map[*endpoint]policySet) {
	if !l.steering {
		return
	}
	sets := map[uint32]authz.Set{}
	for _, e := range l.bySubject {
		sets[e.policy.id] = e.policy.set
	}
	for _, p := range next {
		sets[p.id] = p.set
	}
	l.steered.behind = false
	l.tellSteered(l.lookInto(sets))
}

// steerSet does so of a set that is about to be used, beside what the kernel was
// told of others.
func (l *loop) steerSet(id uint32, set authz.Set) {
	if !l.steering || !set.LooksInsideEgress() {
		return
	}
	all := maps.Clone(l.steered.sets)
	if all == nil {
		all = map[uint32]addresses{}
	}
	maps.Copy(all, l.lookInto(map[uint32]authz.Set{id: set}))
	l.tellSteered(all)
}

// lookInto returns which addresses of services the sets look into.
func (l *loop) lookInto(sets map[uint32]authz.Set) map[uint32]addresses {
	var ids []uint32
	var list []authz.Set
	for id, set := range sets {
		ids, list = append(ids, id), append(list, set)
	}
	out := map[uint32]addresses{}
	for i, at := range l.sets.ServicesInside(maps.Values(l.services), list...) {
		if len(at) > 0 {
			out[ids[i]] = at
		}
	}
	return out
}

func (l *loop) tellSteered(all map[uint32]addresses) {
	if l.steered.sets != nil && !l.steered.failed && maps.EqualFunc(all, l.steered.sets, maps.Equal) {
		return
	}
	var services []datapath.L7Service
	for id, ats := range all {
		for at := range ats {
			services = append(services, datapath.L7Service{Set: id, Address: at.AddrPort, Protocol: at.Protocol})
		}
	}
	l.steered.sets = all
	if err := l.dp.SetL7Services(services); err != nil {
		l.steered.failed = true
		l.alarms.raise("l7-services", fmt.Sprintf("flows under rules inside protocols to %d addresses of services are dropped in part: %v", len(services), err))
		return
	}
	if l.steered.failed {
		l.alarms.clear("l7-services")
	}
	l.steered.failed = false
}

// followSteered brings the kernel up to date after sets have gone, or peers have
// come or gone.
func (l *loop) followSteered() {
	if l.steered.behind || l.steered.failed {
		l.steerServices(nil)
	}
}
