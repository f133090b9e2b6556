package agent

import (
	"fmt"
	"maps"

	"go.uber.org/zap"

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
	// sets are those of an earlier agent too, until all endpoints have been put
	// under sets of this one. nil: nothing yet by this agent.
	sets   map[uint32]addresses
	behind bool // sets or peers have changed since
	failed bool // the kernel did not take all of it
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
	all := l.lookInto(sets)
	l.steered.behind = l.stored != nil
	if l.stored != nil { // endpoints are being taken over
		l.knowSteered()
		for id, at := range l.steered.sets {
			if _, known := sets[id]; !known {
				all[id] = at
			}
		}
	}
	l.tellSteered(all)
}

// steerSet does so of a set that is about to be used, beside what the kernel was
// told of others: by an earlier agent too, for endpoints that are not taken over
// yet are judged by what that said.
func (l *loop) steerSet(id uint32, set authz.Set) {
	if !l.steering || !set.LooksInsideEgress() {
		return
	}
	l.knowSteered()
	all := maps.Clone(l.steered.sets)
	maps.Copy(all, l.lookInto(map[uint32]authz.Set{id: set}))
	l.tellSteered(all)
}

// knowSteered takes over what an earlier agent told the kernel, once. The loop's
// first look at all sets ends what is of none of them.
func (l *loop) knowSteered() {
	if l.steered.sets != nil {
		return
	}
	l.steered.sets, l.steered.behind = map[uint32]addresses{}, true
	there, err := l.dp.L7Services()
	if err != nil {
		// Flows to services are dropped under sets that are not told again, until
		// their endpoints are under the next ones.
		l.log.Error("which services an earlier agent steered is not known", zap.Error(err))
		return
	}
	for _, s := range there {
		if l.steered.sets[s.Set] == nil {
			l.steered.sets[s.Set] = addresses{}
		}
		l.steered.sets[s.Set][authz.ServiceAddress{AddrPort: s.Address, Protocol: s.Protocol}] = struct{}{}
	}
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
		l.alarms.raise("l7-services", fmt.Sprintf("flows under rules inside protocols to %d addresses of services are dropped in part: %v: raise --l7-service-entries if that is full", len(services), err))
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
