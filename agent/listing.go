package agent

import (
	"fmt"
	"maps"
	"net/netip"
	"slices"
	"strings"
	"time"

	"google.golang.org/protobuf/types/known/durationpb"
	"google.golang.org/protobuf/types/known/timestamppb"

	"portcullis/agent/api"
	"portcullis/authz"
	"portcullis/bpf/abi"
	"portcullis/identity"
	"portcullis/ipcache"
	"portcullis/ipcache/lease"
)

// identityMessage describes an identity, as that of a workload on a node. Without
// node or UID the SPIFFE ID is empty if the template asks for them.
func (l *loop) identityMessage(n identity.Numeric, id identity.Identity, on identity.NodeName, uid identity.UID) *api.Identity {
	spiffeID, err := l.template.ID(id, on, uid)
	if err != nil {
		spiffeID = "" // it can have none
	}
	return &api.Identity{Numeric: uint32(n), Text: id.String(), Labels: id.LabelList(), SpiffeId: spiffeID, Hash: id.Hash().String()}
}

func portMessages(ports []identity.NamedPort) (out []*api.NamedPort) {
	for _, p := range ports {
		out = append(out, &api.NamedPort{Name: p.Name, Port: uint32(p.Port), Protocol: p.Protocol})
	}
	return out
}

func ipTexts(ips []netip.Addr) (out []string) {
	for _, ip := range ips {
		out = append(out, ip.String())
	}
	return out
}

func (l *loop) listEndpoints(uid string) (out []*api.Endpoint) {
	grants := l.grantMessages()
	for _, e := range slices.SortedFunc(maps.Values(l.endpoints), func(a, b *endpoint) int { return int(a.id) - int(b.id) }) {
		if uid != "" && uid != e.uid.String() {
			continue
		}
		m := &api.Endpoint{Id: e.id, Workload: &api.Workload{Uid: e.uid.String(), Namespace: e.namespace, Name: e.name},
			Identity: l.identityMessage(e.numeric, e.identity, l.cfg.Node, e.uid), Ips: ipTexts(e.ips), Mac: e.mac.String(), Ifname: e.ifname, Ifindex: e.ifindex,
			Generation: uint64(e.generation), State: e.state.String(), Detail: l.endpointDetail(e),
			IngressEnforced: e.policy.set.EnforceIngress, EgressEnforced: e.policy.set.EnforceEgress, PolicyEpoch: e.policy.id,
			Ports: portMessages(e.ports), Created: timestamppb.New(e.created), Pid: uint32(e.process.PID), Attachment: e.attachment.message()}
		for _, ip := range e.ips { // all of them are bound and proved together
			if b, ok := l.table.Get(ip); ok && b.Binding.UID == e.uid {
				m.Evidence = b.EvidenceAt(int64(l.now())).String()
			}
		}
		if e.state == abi.EPQuarantined {
			for _, ip := range e.ips {
				m.Grants = append(m.Grants, grants[ip]...)
			}
		}
		out = append(out, m)
	}
	return out
}

// endpointDetail says why an endpoint is not active.
func (l *loop) endpointDetail(e *endpoint) string {
	if e.state != abi.EPQuarantined {
		return ""
	}
	if e.detail != "" {
		return e.detail
	}
	for _, w := range l.owner.Workloads() {
		if w.UID == e.uid && w.State == lease.WorkloadQuarantined {
			if w.OpensAt == 0 {
				return "its IP is not free yet"
			}
			left := max(0, w.OpensAt.Sub(l.now())).Round(time.Millisecond)
			if w.Leases == 0 && l.grants != nil && l.grants.StartupWait(l.now()) > 0 {
				return fmt.Sprintf("waits for %v: what was granted before the agent's start is not known, and may hold until then", left)
			}
			return fmt.Sprintf("waits for %d leases on the IP's last holder, %v at the most", w.Leases, left)
		}
	}
	return ""
}

func (l *loop) listIdentities(reserved bool) (out []*api.Identity) {
	for n, id := range l.ids.All {
		if id.Reserved != "" && !reserved || l.ids.Users(n) == 0 {
			continue
		}
		m := l.identityMessage(n, id, "", identity.UID{})
		if in := l.ids.Region(n); !in.IsZero() {
			m.Text += " in " + in.String()
		}
		m.Users = uint32(l.ids.Users(n))
		out = append(out, m)
	}
	slices.SortFunc(out, func(a, b *api.Identity) int { return strings.Compare(a.Text, b.Text) })
	return out
}

// listBindings returns what stands in the table, for the IPs in only or all.
func (l *loop) listBindings(only map[netip.Addr]bool) (out []*api.Binding) {
	now := l.now()
	grants := l.grantMessages()
	for e := range l.table.All() {
		if e.Condemned || len(only) > 0 && !only[e.Binding.IP] {
			continue
		}
		out = append(out, l.bindingMessage(e, now, grants[e.Binding.IP]))
	}
	slices.SortFunc(out, func(a, b *api.Binding) int {
		return netip.MustParseAddr(a.Ip).Compare(netip.MustParseAddr(b.Ip))
	})
	return out
}

func (l *loop) bindingMessage(e ipcache.Entry, now lease.Time, grants []*api.Grant) *api.Binding {
	b := e.Binding
	n := l.numerics[e.Stamp]
	m := &api.Binding{Ip: b.IP.String(), Generation: uint64(b.Generation), Workload: &api.Workload{Uid: b.UID.String()},
		Evidence: e.EvidenceAt(int64(now)).String(), Mode: string(ModeLease), Owner: string(b.Owner), Stamp: e.Stamp, State: "live", Grants: grants}
	switch e.Lease {
	case ipcache.LeaseLocal:
		m.Local = true
		m.Mode = string(l.cfg.Evidence)
		if ep := l.byIP[b.IP]; ep != nil {
			m.Workload.Namespace, m.Workload.Name = ep.namespace, ep.name
		}
	case ipcache.LeaseClassic:
		m.Mode = string(ModeClassic)
	default:
		if e.Evidence == identity.EvidenceWatch {
			m.Mode = string(ModeWatch)
		}
		left := max(0, l.verifier.LeaseDeadline(e.Lease).Sub(now))
		m.Remaining = durationpb.New(left)
		if left == 0 {
			m.State = "stale"
		}
	}
	m.Identity = l.identityMessage(n, b.Identity, b.Owner, b.UID)
	if at, ok := l.installedAt[e.Stamp]; ok {
		m.Age = durationpb.New(now.Sub(at))
	}
	return m
}

// policyMessage tells of a policy; of a group, as of the policies that name it;
// of a namespace, as of the workloads in it. Services and their slices select nobody.
func (l *loop) policyMessage(o api.Object, source bool) *api.Policy {
	m := &api.Policy{Ref: api.FromRef(o.Ref), File: o.File}
	if at := l.policyFiles[o.Ref].at; !at.IsZero() {
		m.Imported = timestamppb.New(at)
	}
	var policies []*authz.Policy
	if o.Policy != nil {
		policies = []*authz.Policy{o.Policy}
	} else if o.Group != nil {
		policies = slices.DeleteFunc(l.repo.List(), func(p *authz.Policy) bool { return !p.Names(o.Group) })
	}
	for _, e := range l.endpoints {
		if o.Namespace != nil {
			if e.identity.Namespace == o.Namespace.Name {
				m.Endpoints++
			}
			continue
		}
		if slices.ContainsFunc(policies, func(p *authz.Policy) bool { return l.repo.Selects(p, e.identity) }) {
			m.Endpoints++
		}
	}
	if source {
		m.Source = o.Source
	}
	return m
}

// liveGrants counts the verifiers that hold a live lease on a workload's
// bindings.
func (l *loop) liveGrants(uid identity.UID) uint32 {
	now, verifiers := l.now(), map[identity.NodeName]bool{}
	for _, g := range l.allGrants() {
		if g.UID == uid && g.Deadline > now {
			verifiers[g.Verifier] = true
		}
	}
	return uint32(len(verifiers))
}

// grantMessages returns who holds a lease on which IP, whoever had the IP then.
func (l *loop) grantMessages() map[netip.Addr][]*api.Grant {
	now, out := l.now(), map[netip.Addr][]*api.Grant{}
	for _, g := range l.allGrants() {
		out[g.IP] = append(out[g.IP], &api.Grant{Verifier: string(g.Verifier), Remaining: durationpb.New(max(0, g.Deadline.Sub(now))),
			Revoked: g.Revoked, Ip: g.IP.String(), Generation: uint64(g.Generation)})
	}
	return out
}

func (l *loop) allGrants() []lease.GrantInfo {
	if l.grants == nil {
		return nil
	}
	return l.grants.Grants()
}
