package agent

import (
	"cmp"
	"fmt"
	"runtime/debug"
	"slices"

	"google.golang.org/protobuf/types/known/durationpb"
	"google.golang.org/protobuf/types/known/timestamppb"

	"portcullis/agent/api"
	"portcullis/bpf/abi"
	"portcullis/identity"
	"portcullis/ipcache/lease"
	"portcullis/ipcache/session"
)

// release is set by the linker: -X portcullis/agent.release=v1.2.3.
var release string

// Version is this program's: the release that it was built as, else what Go knows
// of the module, else "devel".
func Version() string {
	if release != "" {
		return release
	}
	if info, ok := debug.ReadBuildInfo(); ok && info.Main.Version != "" && info.Main.Version != "(devel)" {
		return info.Main.Version
	}
	return "devel"
}

func (l *loop) status() (*api.StatusResponse, error) {
	now := l.now()
	s := &api.StatusResponse{Node: string(l.cfg.Node), Version: Version(), Started: timestamppb.New(l.started), BootId: l.boot.String(),
		EvidenceMode: string(l.cfg.Evidence), Ttl: durationpb.New(l.cfg.TTL), Heartbeat: durationpb.New(l.cfg.Heartbeat),
		ReuseMargin: durationpb.New(l.cfg.ReuseMargin), LostEvents: l.dp.State().LostEvents(), LimitedEvents: l.dp.State().LimitedEvents(), Policies: uint32(len(l.repo.List())),
		Endpoints: uint32(len(l.endpoints)), DevicesUnregistered: l.devicesUnregistered()}
	if l.grants != nil {
		s.Grants = uint32(l.grants.GrantCount())
		s.StartupWait = durationpb.New(l.grants.StartupWait(now))
	}
	for _, e := range l.endpoints {
		if e.state == abi.EPQuarantined {
			s.EndpointsQuarantined++
		}
	}
	for e := range l.table.All() {
		if e.Binding.Owner != l.cfg.Node {
			s.Bindings++
		}
	}
	for _, x := range l.listSessions() {
		s.Sessions++
		if x.State == "up" {
			s.SessionsUp++
		}
	}
	l.statusSources(s)
	l.statusProxy(s)
	maps, err := l.pressure()
	if err != nil {
		return nil, err
	}
	for _, m := range maps {
		s.Maps = append(s.Maps, &api.Map{Name: m.Name, Entries: m.Used, Capacity: m.Capacity})
	}
	s.Held = &api.HeldPackets{Outstanding: uint64(l.holds.Len()), Limit: uint64(l.cfg.HoldTotal), Total: l.heldTotal, Reinjected: l.reinjected, Dropped: l.heldDropped, NotTaken: l.notTaken}
	counters, err := l.dp.Counters()
	if err != nil {
		return nil, err
	}
	for k, c := range counters {
		if c.Packets > 0 {
			s.Counters = append(s.Counters, &api.Counter{Direction: k.Direction.String(), Verdict: k.Verdict.String(), Reason: k.Reason.String(), Packets: c.Packets, Bytes: c.Bytes})
		}
	}
	slices.SortFunc(s.Counters, func(a, b *api.Counter) int {
		return cmp.Or(cmp.Compare(a.Direction, b.Direction), cmp.Compare(a.Verdict, b.Verdict), cmp.Compare(a.Reason, b.Reason))
	})
	for _, a := range l.alarms.list() {
		s.Alarms = append(s.Alarms, &api.Alarm{Name: a.name, Text: a.text, Since: timestamppb.New(a.since), Count: a.count})
	}
	s.Healthy = len(s.Problems) == 0
	return s, nil
}

// devicesUnregistered counts the devices under programs behind which there is
// no workload yet.
func (l *loop) devicesUnregistered() (n uint32) {
	for _, i := range l.devices.under() {
		if l.byIfindex[i] == nil {
			n++
		}
	}
	return n
}

// statusSources tells of what the agent cannot work without.
func (l *loop) statusSources(s *api.StatusResponse) {
	source := &api.Source{Name: l.source.From().Kind(), State: "ok"}
	svid, err := l.source.GetX509SVID()
	if err != nil {
		source.State, source.Detail = "waiting", err.Error()
		s.Problems = append(s.Problems, fmt.Sprintf("no SVID from %s, so no session with other agents: %v", l.source.From(), err))
	} else {
		s.SpiffeId = svid.ID.String()
		_, end := l.source.Life()
		s.CertificateExpiry = timestamppb.New(end)
	}
	s.Sources = append(s.Sources, source, &api.Source{Name: "policies", State: "ok", Detail: fmt.Sprintf("%d in force, %d of them imported", len(l.repo.List()), l.imported())})
	l.statusCluster(s)
}

// listSessions joins what the transport knows of streams with what the
// machines know of leases.
func (l *loop) listSessions() (out []*api.Session) {
	now := l.now()
	streams := map[lease.StreamID]session.Info{}
	for _, i := range l.transport.Sessions() {
		streams[i.Stream] = i
	}
	for _, o := range l.owner.Sessions() {
		m := &api.Session{Peer: string(o.Verifier), Role: "owner", State: "connecting", Bindings: uint32(o.Grants)}
		if o.State == lease.StreamOpen {
			m.State = "up"
			m.Remaining = durationpb.New(max(0, o.Deadline.Sub(now)))
		}
		sessionStream(m, streams[o.Stream])
		out = append(out, m)
	}
	for _, v := range l.verifier.Sessions() {
		m := &api.Session{Peer: string(v.Owner), Role: "verifier", Bindings: uint32(v.Bindings)}
		if v.Deadline != 0 {
			m.Remaining = durationpb.New(max(0, v.Deadline.Sub(now)))
		}
		m.State, m.Detail = verifierState(v, now)
		sessionStream(m, streams[v.Stream])
		out = append(out, m)
	}
	slices.SortFunc(out, func(a, b *api.Session) int {
		return cmp.Or(cmp.Compare(a.Peer, b.Peer), cmp.Compare(a.Role, b.Role))
	})
	return out
}

// verifierState puts the state of an owner into the words of the command line.
func verifierState(v lease.VerifierSession, now lease.Time) (state, detail string) {
	switch {
	case v.State == lease.PeerOpen && v.Deadline > now:
		return "up", ""
	case v.State == lease.PeerIdle:
		return "down", "nothing is wanted of it"
	case v.State == lease.PeerBackoff:
		return "down", "cannot be reached; tried again shortly"
	default:
		return "connecting", v.State.String()
	}
}

func sessionStream(m *api.Session, i session.Info) {
	if i.Stream == 0 {
		return
	}
	m.SpiffeId, m.Address = i.SPIFFEID, i.Remote
	if !i.Expires.IsZero() {
		m.CertificateExpiry = timestamppb.New(i.Expires)
	}
	if !i.Opened.IsZero() {
		m.Since = timestamppb.New(i.Opened)
	}
}

// resetSession closes the session with an owner and forgets what was confirmed
// on it.
func (l *loop) resetSession(peer identity.NodeName) (existed bool, bindings uint32, err error) {
	if _, there := l.topology.Load().peers[peer]; !there {
		return false, 0, fmt.Errorf("peer %q: %w among the nodes that this agent knows", peer, errNotFound)
	}
	for _, v := range l.verifier.Sessions() {
		if v.Owner == peer {
			existed, bindings = true, uint32(v.Bindings)
		}
	}
	l.stepVerifier(lease.ResetSession{Owner: peer})
	return existed, bindings, nil
}
