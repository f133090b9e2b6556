package authz

import (
	"cmp"
	"iter"
	"maps"
	"slices"

	"portcullis/bpf/abi"
	"portcullis/identity"
)

// Options are a Repository's.
type Options struct {
	// TrustDomain is the one whose workloads policies mean when they select
	// peers. A workload of another is nobody to them, whatever its labels.
	TrustDomain string
	// Cluster is the name of the cluster that these workloads are in, for
	// policies that speak of it; empty: "default", as Cilium has it.
	Cluster string
	// LocalHost: the subject's own node reaches it whatever the policies do
	// not allow, as the kubelet's probes must; only a rule that denies keeps
	// it out. See Set.LocalHost.
	LocalHost bool
	// Enforce is how far policy is enforced; EnforceIn, if it names a
	// subject's namespace, goes before it.
	Enforce   Enforcement
	EnforceIn map[string]Enforcement
}

// Repository holds the policies in force, what is known of namespaces, and the
// named ports of workloads that are bound. It is not safe for concurrent use:
// one loop owns it.
type Repository struct {
	opts     Options
	policies map[Ref]*Policy
	facts    *facts
	ports    portBook
}

// NewRepository returns an empty repository.
func NewRepository(opts Options) *Repository {
	return &Repository{opts: opts, policies: map[Ref]*Policy{}, facts: &facts{trustDomain: opts.TrustDomain, cluster: cmp.Or(opts.Cluster, "default")}, ports: newPortBook()}
}

// Put adds policies, each in the place of an earlier one with its Ref. If one
// is invalid (Policy.Validate), none is added.
func (r *Repository) Put(policies ...*Policy) error {
	for _, p := range policies {
		if err := p.Validate(); err != nil {
			return err
		}
	}
	for _, p := range policies {
		r.policies[p.Ref] = p
	}
	return nil
}

// Delete removes a policy and reports whether there was one.
func (r *Repository) Delete(ref Ref) bool {
	_, ok := r.policies[ref]
	delete(r.policies, ref)
	return ok
}

// Get returns a policy, or nil.
func (r *Repository) Get(ref Ref) *Policy { return r.policies[ref] }

// List returns the policies by namespace, name and kind.
func (r *Repository) List() []*Policy {
	return slices.SortedFunc(maps.Values(r.policies), func(a, b *Policy) int { return a.compare(b.Ref) })
}

// AddPorts says that a binding, known by the stamp under which it is about to
// be installed, is of a workload with these named ports. Workloads of one
// identity contribute the union, as in Cilium. It reports whether sets must be
// compiled anew before the binding is published.
func (r *Repository) AddPorts(stamp uint64, id identity.Identity, ports []identity.NamedPort) (changed bool) {
	return r.ports.add(stamp, id, ports) && r.namesPeerPorts()
}

// RemovePorts says that the binding under the stamp is no more. It reports
// whether sets must be compiled anew; until they are, a port that no workload
// of the identity has any more stays what its name made it.
func (r *Repository) RemovePorts(stamp uint64) (changed bool) {
	return r.ports.remove(stamp) && r.namesPeerPorts()
}

// namesPeerPorts reports whether a policy names ports of peers.
func (r *Repository) namesPeerPorts() bool {
	for _, p := range r.policies {
		for _, spec := range p.Specs {
			for _, rule := range spec.Rules {
				if rule.Direction == abi.DirEgress && slices.ContainsFunc(rule.Ports, func(p PortRange) bool { return p.Name != "" }) {
					return true
				}
			}
		}
	}
	return false
}

// selects reports whether the spec speaks of the subject; sure is false
// where that hangs on namespace labels that are not known. Trust domains are
// not compared: a local endpoint with a strange one is under policy all the
// same.
func (r *Repository) selects(s *Spec, subject identity.Identity) (selected, sure bool) {
	if s.Nodes {
		return false, false
	}
	return s.Subject.selectsWorkload(subject, r.facts, true), s.Subject.selectsWorkload(subject, r.facts, false)
}

// Compile returns what the policies in force mean for one subject, given its
// own named ports and every peer that has a numeric identity on this node.
// Later peers: Set.AddPeer.
func (r *Repository) Compile(subject identity.Identity, peers iter.Seq2[identity.Numeric, Peer], own ...identity.NamedPort) Set {
	s := Set{Rules: []RuleRef{{}}, Entries: map[abi.PolicyKey]abi.Policy{}, LocalHost: r.opts.LocalHost, facts: r.facts, ports: r.ports.of}
	mode := r.enforcement(subject)
	if mode == EnforceNever {
		return s
	}
	s.Audit = mode == EnforceAudit
	// Always: under default deny, whatever the policies say.
	deny := [abi.DirMax]bool{mode == EnforceAlways, mode == EnforceAlways}
	var lone [abi.DirMax]bool // a rule speaks of the direction
	for _, p := range r.List() {
		for i := range p.Specs {
			spec := &p.Specs[i]
			selected, sure := r.selects(spec, subject)
			if !selected {
				continue
			}
			deny[abi.DirIngress] = deny[abi.DirIngress] || spec.DenyIngress
			deny[abi.DirEgress] = deny[abi.DirEgress] || spec.DenyEgress
			for j := range spec.Rules {
				rule := &spec.Rules[j]
				if rule.Action == Allow && !sure {
					continue // it denies what it would deny, and allows nothing
				}
				lone[rule.Direction] = lone[rule.Direction] || rule.restricts()
				s.addRule(RuleRef{Policy: p.Ref, Path: rule.Path, Direction: rule.Direction, Action: rule.Action}, rule, own)
			}
		}
	}
	for dir := range abi.DirMax {
		// Rules that restrict, without a default deny: all but what they name
		// passes.
		if lone[dir] && !deny[dir] {
			all := &Rule{Direction: dir, Action: Allow, AnyPeer: true, AnyPort: true}
			s.addRule(RuleRef{Path: "default allow", Direction: dir, Action: Allow}, all, nil)
		}
	}
	s.EnforceIngress = deny[abi.DirIngress] || lone[abi.DirIngress]
	s.EnforceEgress = deny[abi.DirEgress] || lone[abi.DirEgress]
	maps.Copy(s.Entries, s.compileAny())
	for n, p := range peers {
		s.AddPeer(n, p)
	}
	return s
}

// restricts reports whether less passes with the rule than without any.
func (r *Rule) restricts() bool { return r.Action == Deny || r.demands() }
