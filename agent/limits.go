package agent

import (
	"fmt"
	"strings"

	"portcullis/bpf/abi"
	"portcullis/datapath"
	"portcullis/identity"
	"portcullis/ipcache"
	"portcullis/ipcache/session"
)

// leases returns how many lease indices the kernel has: one for each session,
// and those that name none.
func (c *Config) leases() int { return c.Sessions + int(ipcache.LeaseFirst) }

// kernelConfig is what the flags ask of the datapath.
func (l *loop) kernelConfig() datapath.Config {
	c := &l.cfg
	return datapath.Config{PinDir: c.PinDir, Classic: c.Evidence == ModeClassic, Watch: c.Evidence == ModeWatch, Proofs: c.proves(), ProveAll: c.Evidence == ModeSVID, Log: l.log,
		Bindings: c.Bindings, Endpoints: c.Endpoints, Leases: c.leases(), Policy: c.PolicyEntries, Ranges: c.RangeEntries, Sources: c.SourceEntries, Services: c.ServiceEntries, L7Services: c.L7ServiceEntries,
		Conntrack: c.Conntrack, ConntrackPerEndpoint: c.ConntrackPerEndpoint, FragmentsPerEndpoint: c.FragmentsPerEndpoint,
		HoldPerEndpoint: c.HoldPerEndpoint, HoldPerSource: c.HoldPerSource, HoldTotal: c.HoldTotal, HoldTimeout: c.HoldTimeout,
		HeldBytes: c.HeldBytes, EventBytes: c.EventBytes, EventsPerSource: c.EventsPerSource,
		Aggregation: c.Aggregation, AggregationInterval: c.AggregationInterval, AggregationFlags: c.AggregationFlags, MarkMask: c.MarkMask, EndpointMarkMask: c.EndpointMarkMask}
}

// pressure says how full everything is that has a limit: the kernel's tables,
// and the agent's own.
//
//	grants    leases that this node has given on its bindings
//	sessions  lease indices in use: one for each owner, a second one while its
//	          session is replaced
//	names     addresses that the workload knows which was told of most by DNS
//	proxy     connections of the L7 proxy, some seconds ago; while there is one
func (l *loop) pressure() ([]datapath.Pressure, error) {
	out, err := l.dp.Pressure()
	if err != nil {
		return nil, err
	}
	return append(out, l.ownPressure()...), nil
}

// ownPressure is that of what is not in the kernel.
func (l *loop) ownPressure() (out []datapath.Pressure) {
	if l.grants != nil {
		out = append(out, datapath.Pressure{Name: "grants", Used: uint64(l.grants.GrantCount()), Capacity: uint64(l.cfg.Grants)})
	}
	most := 0
	for _, e := range l.endpoints {
		if e.book != nil {
			most = max(most, e.book.Len())
		}
	}
	out = append(out, datapath.Pressure{Name: "sessions", Used: uint64(l.table.LeasesUsed()), Capacity: uint64(l.cfg.Sessions)},
		datapath.Pressure{Name: "names", Used: uint64(most), Capacity: uint64(l.cfg.NamesPerEndpoint)})
	if l.steering {
		out = append(out, datapath.Pressure{Name: "proxy", Used: uint64(l.feed.Status().Stats.Connections), Capacity: uint64(l.cfg.ProxyConnections)})
	}
	return out
}

// alarmProxy tells of connections that the proxy refused for want of room since it
// was looked at last (I6).
func (l *loop) alarmProxy() {
	if !l.steering {
		return
	}
	full := l.feed.Status().Stats.Full // of the proxy that runs: it begins anew with another
	before := l.proxyFull
	if l.proxyFull = full; full <= before {
		return
	}
	l.alarms.raise("proxy-full", fmt.Sprintf("the L7 proxy refused %d connections in %v: all its places, or a client's half of them, were taken; `status` shows how many are, `monitor` whose they were; raise --proxy-connections", full-before, limitInterval))
}

// lostTotals are counters of what was lost for want of room, as they were when
// alarmLimits last looked.
type lostTotals struct{ overflow, full, lost uint64 }

// lostSoFar counts from when the maps were made.
func (l *loop) lostSoFar() (t lostTotals, err error) {
	counters, err := l.dp.Counters()
	if err != nil {
		return t, err
	}
	t.lost = l.dp.State().LostEvents()
	for k, c := range counters {
		if k.Verdict != abi.VerdictDrop {
			continue
		}
		switch k.Reason {
		case abi.ReasonHoldOverflow:
			t.overflow += c.Packets
		case abi.ReasonMapFull:
			t.full += c.Packets
		}
	}
	return t, nil
}

// alarmLimits tells of what is nearly full, and of what was dropped or lost
// since it last looked because something was (I6).
func (l *loop) alarmLimits() {
	l.alarmProxy()
	full, err := l.pressure()
	if err != nil {
		l.alarms.raise("map-pressure", fmt.Sprintf("the fill of the maps is not known: %v", err))
	} else {
		l.alarmPressure(full)
	}
	now, err := l.lostSoFar()
	if err != nil {
		l.alarms.raise("map-pressure", fmt.Sprintf("the counters are not known: %v", err))
		return
	}
	before := l.lostBefore
	l.lostBefore = now
	if n := now.overflow - before.overflow; now.overflow > before.overflow {
		l.alarms.raise("hold-overflow", fmt.Sprintf("%d packets were dropped in %v that should have been held: the quota of a source, of a workload or of the node is used up; `monitor --reason hold-overflow` shows whose", n, limitInterval))
	}
	if n := now.full - before.full; now.full > before.full {
		l.alarms.raise("map-full", fmt.Sprintf("%d packets were dropped in %v for want of room in a table: `status` shows which is full, `monitor --reason map-full` whose packets they are; raise --bindings, --sessions, --conntrack, --conntrack-per-endpoint or --fragments-per-endpoint", n, limitInterval))
	}
	if n := now.lost - before.lost; now.lost > before.lost {
		l.alarms.raise("events-lost", fmt.Sprintf("%d flow events were lost in %v, their verdicts stand: raise --event-bytes, or find who causes so many", n, limitInterval))
	}
}

// sizedBy are the flags that set the sizes of what pressure tells of.
var sizedBy = map[string]string{
	"endpoints": "endpoints", "bindings": "bindings", "policy": "policy-entries", "ranges": "range-entries", "sources": "source-entries", "services": "service-entries",
	"conntrack": "conntrack", "conntrack-endpoint": "conntrack-per-endpoint", "fragments": "fragments-per-endpoint",
	"l7-services": "l7-service-entries", "names": "names-per-endpoint", "proxy": "proxy-connections",
	"held": "hold-total", "held-endpoint": "hold-per-endpoint", "held-source": "hold-per-source", "grants": "grants", "sessions": "sessions",
}

// noRoom says why a peer that an owner vouches for is not installed, or an
// owner not asked, and what to do about it.
func (l *loop) noRoom(owner identity.NodeName) string {
	switch {
	case l.table.LeasesUsed() >= l.cfg.Sessions:
		return "no lease index is left for a session with a further owner: raise --sessions"
	case l.table.CountOf(owner) >= session.MaxHeld:
		return fmt.Sprintf("node %s has the most bindings that one session can account for (%d): give its workloads to more nodes", owner, session.MaxHeld)
	}
	return "a confirmed binding did not fit into the kernel's maps: raise --bindings"
}

func (l *loop) alarmPressure(limits []datapath.Pressure) {
	var full []string
	for _, m := range limits {
		if m.Capacity > 0 && m.Used*100 >= m.Capacity*pressureAlarm {
			full = append(full, fmt.Sprintf("%s has %d of %d (--%s)", m.Name, m.Used, m.Capacity, sizedBy[m.Name]))
		}
	}
	if len(full) == 0 {
		l.alarms.clear("map-pressure")
		return
	}
	l.alarms.raise("map-pressure", "nearly full: "+strings.Join(full, ", ")+"; what does not fit is dropped or refused: raise that size, or find who fills it")
}
