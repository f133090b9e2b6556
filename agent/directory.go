package agent

import (
	"net/netip"
	"sync"

	"portcullis/agent/api"
	"portcullis/authz"
	"portcullis/identity"
)

// directory is what flow records need to speak in names. The loop alone
// writes it; event readers and the local API read it concurrently.
type directory struct {
	mu         sync.RWMutex
	endpoints  map[uint32]string // endpoint id -> "namespace/name"
	workloads  map[netip.Addr]*endpoint
	rules      map[uint32][]authz.RuleRef // by endpoint id
	identities map[identity.Numeric]identity.Identity
}

func newDirectory() *directory {
	d := &directory{endpoints: map[uint32]string{}, workloads: map[netip.Addr]*endpoint{}, rules: map[uint32][]authz.RuleRef{}, identities: map[identity.Numeric]identity.Identity{}}
	for n, id := range identity.NewAllocator().All {
		d.identities[n] = id
	}
	return d
}

// addEndpoint notes what is known of an endpoint, its policy included; again
// after each change.
func (d *directory) addEndpoint(e *endpoint) {
	copied := *e
	d.mu.Lock()
	defer d.mu.Unlock()
	d.endpoints[e.id] = e.fullName()
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
	d.mu.Lock()
	defer d.mu.Unlock()
	d.identities[n] = id
}

func (d *directory) removeIdentity(n identity.Numeric) {
	d.mu.Lock()
	defer d.mu.Unlock()
	delete(d.identities, n)
}

// Endpoint returns the name of a local endpoint, "" if it is not known.
func (d *directory) Endpoint(id uint32) string {
	d.mu.RLock()
	defer d.mu.RUnlock()
	return d.endpoints[id]
}

// Bound returns the local workload that holds the IP in that generation, and
// its endpoint's id.
func (d *directory) Bound(ip netip.Addr, generation identity.Generation) (string, uint32) {
	d.mu.RLock()
	defer d.mu.RUnlock()
	if e := d.workloads[ip]; e != nil && e.generation == generation {
		return e.fullName(), e.id
	}
	return "", 0
}

// Holder returns the local workload that holds the IP now, its endpoint's id and
// the number of its identity.
func (d *directory) Holder(ip netip.Addr) (name string, endpoint uint32, n identity.Numeric) {
	d.mu.RLock()
	defer d.mu.RUnlock()
	if e := d.workloads[ip]; e != nil {
		return e.fullName(), e.id, e.numeric
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

// Identity returns the identity behind a number.
func (d *directory) Identity(n identity.Numeric) (identity.Identity, bool) {
	d.mu.RLock()
	defer d.mu.RUnlock()
	id, ok := d.identities[n]
	return id, ok
}
