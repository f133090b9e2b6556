package agent

import (
	"net/netip"
	"slices"
	"sync"

	"portcullis/agent/api"
	"portcullis/authz"
	"portcullis/bpf/abi"
	"portcullis/identity"
	"portcullis/observe/flow"
)

// directory is what flow records need to speak in names. The loop alone
// writes it; event readers and the local API read it concurrently.
type directory struct {
	mu         sync.RWMutex
	endpoints  map[uint32]named // by endpoint id
	workloads  map[netip.Addr]*endpoint
	rules      map[uint32][]authz.RuleRef // by endpoint id
	identities map[identity.Numeric]flow.Known
	leases     map[uint64]uint32  // of remote bindings: stamp -> index of the lease, which changes with a new session
	pods       map[uint64]podName // of remote bindings by stamp, where the API server told who it is
	services   map[netip.Addr][]serviceAt
	learnt     map[uint32]map[netip.Addr][]string // names by endpoint id; the slices are never changed
	template   identity.Template                  // it and node are set before anything is added
	node       identity.NodeName
}

// named is what is known of an endpoint. Its strings are made once: records of
// thousands of events a second share them.
type named = flow.LocalEnd

// podName is a pod of another node.
type podName struct {
	name  string // NS/NAME
	owner flow.Owner
}

// serviceAt is one port of a service at an address.
type serviceAt struct {
	ref      authz.Ref
	name     string // NS/NAME
	protocol uint8
	port     uint16
}

func newDirectory() *directory {
	d := &directory{endpoints: map[uint32]named{}, workloads: map[netip.Addr]*endpoint{}, rules: map[uint32][]authz.RuleRef{}, identities: map[identity.Numeric]flow.Known{}, leases: map[uint64]uint32{},
		pods: map[uint64]podName{}, services: map[netip.Addr][]serviceAt{}, learnt: map[uint32]map[netip.Addr][]string{}}
	for n, id := range identity.NewAllocator().All {
		d.identities[n] = flow.Know(id, "")
	}
	return d
}

// spiffeOf returns the SPIFFE ID of an identity's workloads where it is the same
// on every node and for every one of them; else "".
func (d *directory) spiffeOf(id identity.Identity) string {
	a, err := d.template.ID(id, "a", identity.UID{1})
	if err != nil {
		return "" // it has none: it can prove nothing
	}
	if b, err := d.template.ID(id, "b", identity.UID{2}); err != nil || a != b {
		return ""
	}
	return a
}

// addEndpoint notes what is known of an endpoint, its policy included; again
// after each change.
func (d *directory) addEndpoint(e *endpoint) {
	copied := *e
	spiffe := ""
	if id, err := d.template.ID(e.identity, d.node, e.uid); err == nil {
		spiffe = id
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	d.endpoints[e.id] = named{Workload: e.fullName(), SPIFFE: spiffe, Device: e.ifname, Ifindex: e.ifindex, Owner: e.owner}
	d.rules[e.id] = e.policy.set.Rules
	for _, ip := range e.ips {
		d.workloads[ip] = &copied
	}
}

func (d *directory) removeEndpoint(e *endpoint) {
	d.mu.Lock()
	defer d.mu.Unlock()
	delete(d.endpoints, e.id)
	delete(d.rules, e.id)
	delete(d.learnt, e.id)
	for _, ip := range e.ips {
		if w := d.workloads[ip]; w != nil && w.id == e.id {
			delete(d.workloads, ip)
		}
	}
}

func (d *directory) addIdentity(n identity.Numeric, id identity.Identity) {
	known := flow.Know(id, d.spiffeOf(id))
	d.mu.Lock()
	defer d.mu.Unlock()
	d.identities[n] = known
}

func (d *directory) removeIdentity(n identity.Numeric) {
	d.mu.Lock()
	defer d.mu.Unlock()
	delete(d.identities, n)
}

// setLease notes under which lease the binding of a stamp is believed; 0: none
// any more.
func (d *directory) setLease(stamp uint64, lease uint32) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if lease < uint32(abi.LeaseFirst) { // local, classic: no deadline
		delete(d.leases, stamp)
		return
	}
	d.leases[stamp] = lease
}

// Lease returns the index of the lease of a stamp, 0: it has none.
func (d *directory) Lease(stamp uint64) uint32 {
	d.mu.RLock()
	defer d.mu.RUnlock()
	return d.leases[stamp]
}

// setPod notes who holds the binding of a stamp, as the API server tells; the
// zero: it does not, or the binding has ended.
func (d *directory) setPod(stamp uint64, pod podName) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if pod.name == "" {
		delete(d.pods, stamp)
		return
	}
	d.pods[stamp] = pod
}

// setService notes what addresses and ports stand for a service; nil: none any
// more.
func (d *directory) setService(ref authz.Ref, s *authz.ServiceObject) {
	d.mu.Lock()
	defer d.mu.Unlock()
	for ip, all := range d.services {
		if all = slices.DeleteFunc(all, func(x serviceAt) bool { return x.ref == ref }); len(all) == 0 {
			delete(d.services, ip)
		} else {
			d.services[ip] = all
		}
	}
	if s == nil {
		return
	}
	for _, ip := range s.Addresses {
		for _, p := range s.Ports {
			d.services[ip] = append(d.services[ip], serviceAt{ref, ref.Namespace + "/" + ref.Name, p.Protocol, p.Port})
		}
	}
}

// Service returns the service whose address and port that is, "": none's. Of
// protocols without ports the address is enough, if it is one service's alone.
func (d *directory) Service(at netip.AddrPort, protocol uint8) string {
	d.mu.RLock()
	defer d.mu.RUnlock()
	name := ""
	for _, x := range d.services[at.Addr()] {
		switch {
		case x.protocol == protocol && x.port == at.Port():
			return x.name
		case protocol == authz.ProtoTCP || protocol == authz.ProtoUDP || protocol == authz.ProtoSCTP:
		case name != "" && name != x.name:
			return ""
		default:
			name = x.name
		}
	}
	return name
}

// setNames notes by which names an endpoint knows an address, none: by none any
// more. The slice must not be changed later.
func (d *directory) setNames(endpoint uint32, ip netip.Addr, names []string) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if len(names) == 0 {
		delete(d.learnt[endpoint], ip)
		return
	}
	if d.learnt[endpoint] == nil {
		d.learnt[endpoint] = map[netip.Addr][]string{}
	}
	d.learnt[endpoint][ip] = names
}

// forgetNames: an endpoint knows no names any more.
func (d *directory) forgetNames(endpoint uint32) {
	d.mu.Lock()
	defer d.mu.Unlock()
	delete(d.learnt, endpoint)
}

// Names returns the names by which an endpoint knows an address.
func (d *directory) Names(endpoint uint32, ip netip.Addr) []string {
	d.mu.RLock()
	defer d.mu.RUnlock()
	return d.learnt[endpoint][ip]
}

// Endpoint tells of a local endpoint.
func (d *directory) Endpoint(id uint32) flow.LocalEnd {
	d.mu.RLock()
	defer d.mu.RUnlock()
	return d.endpoints[id]
}

// Bound tells of the local workload that holds the IP in that generation, and its
// endpoint's id; or of the pod of another node that the API server told of.
func (d *directory) Bound(ip netip.Addr, generation identity.Generation, stamp uint64) (string, flow.Owner, uint32) {
	d.mu.RLock()
	defer d.mu.RUnlock()
	if e := d.workloads[ip]; e != nil && e.generation == generation {
		known := d.endpoints[e.id]
		return known.Workload, known.Owner, e.id
	}
	pod := d.pods[stamp]
	return pod.name, pod.owner, 0
}

// Holder tells of the local workload that holds the IP now: with its endpoint's id
// and the number of its identity.
func (d *directory) Holder(ip netip.Addr) (known flow.LocalEnd, endpoint uint32, n identity.Numeric) {
	d.mu.RLock()
	defer d.mu.RUnlock()
	if e := d.workloads[ip]; e != nil {
		return d.endpoints[e.id], e.id, e.numeric
	}
	return flow.LocalEnd{}, 0, 0
}

// Policy returns the policy of a rule of an endpoint.
func (d *directory) Policy(endpoint, rule uint32) string {
	d.mu.RLock()
	defer d.mu.RUnlock()
	if rules := d.rules[endpoint]; int(rule) < len(rules) && rule > 0 {
		return api.FromRef(rules[rule].Policy).Ref()
	}
	return ""
}

// Identity tells of the identity behind a number.
func (d *directory) Identity(n identity.Numeric) (flow.Known, bool) {
	d.mu.RLock()
	defer d.mu.RUnlock()
	id, ok := d.identities[n]
	return id, ok
}
