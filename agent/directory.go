package agent

import (
	"net/netip"
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
	leases     map[uint64]uint32 // of remote bindings: stamp -> index of the lease, which changes with a new session
	template   identity.Template // it and node are set before anything is added
	node       identity.NodeName
}

// named is what is known of an endpoint. Its strings are made once: records of
// thousands of events a second share them.
type named struct{ workload, spiffe, device string }

func newDirectory() *directory {
	d := &directory{endpoints: map[uint32]named{}, workloads: map[netip.Addr]*endpoint{}, rules: map[uint32][]authz.RuleRef{}, identities: map[identity.Numeric]flow.Known{}, leases: map[uint64]uint32{}}
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
	d.endpoints[e.id] = named{e.fullName(), spiffe, e.ifname}
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

// Endpoint returns the name of a local endpoint, its SPIFFE ID and its device,
// "" for what is not known.
func (d *directory) Endpoint(id uint32) (workload, spiffe, device string) {
	d.mu.RLock()
	defer d.mu.RUnlock()
	e := d.endpoints[id]
	return e.workload, e.spiffe, e.device
}

// Bound returns the local workload that holds the IP in that generation, and
// its endpoint's id.
func (d *directory) Bound(ip netip.Addr, generation identity.Generation) (string, uint32) {
	d.mu.RLock()
	defer d.mu.RUnlock()
	if e := d.workloads[ip]; e != nil && e.generation == generation {
		return d.endpoints[e.id].workload, e.id
	}
	return "", 0
}

// Holder returns the local workload that holds the IP now, its endpoint's id and
// the number of its identity.
func (d *directory) Holder(ip netip.Addr) (name string, endpoint uint32, n identity.Numeric) {
	d.mu.RLock()
	defer d.mu.RUnlock()
	if e := d.workloads[ip]; e != nil {
		return d.endpoints[e.id].workload, e.id, e.numeric
	}
	return "", 0, 0
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
