package authz

import (
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
	// Enforce is how far policy is enforced; EnforceIn, if it names a
	// subject's namespace, goes before it.
	Enforce   Enforcement
	EnforceIn map[string]Enforcement
}

// Repository holds the policies in force, what is known of namespaces, and the
// named ports of workloads that are bound. It is not safe for concurrent use:
// one loop owns it.
type Repository struct {
	opts       Options
	policies   map[Ref]*Policy
	namespaces map[string]map[string]string // a namespace that is missing is one nobody has spoken of
	ports      portBook
}

// NewRepository returns an empty repository.
func NewRepository(opts Options) *Repository {
	return &Repository{opts: opts, policies: map[Ref]*Policy{}, namespaces: map[string]map[string]string{}, ports: newPortBook()}
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

// nameLabel is the label that every namespace has, with its name, whether its
// labels are known or not.
const nameLabel = "kubernetes.io/metadata.name"

// SetNamespaceLabels says what the labels of a namespace are; nil forgets
// them, an empty map says that there are none. It reports whether that changed
// anything: then sets must be compiled anew. Of a namespace that nobody has
// spoken of only the name is known: what a selector asks of its other labels
// is not met in an allow rule, and is met in a deny rule.
func (r *Repository) SetNamespaceLabels(namespace string, labels map[string]string) (changed bool) {
	old, known := r.namespaces[namespace]
	if labels == nil {
		delete(r.namespaces, namespace)
		return known
	}
	labels = maps.Clone(labels)
	delete(labels, nameLabel)
	r.namespaces[namespace] = labels
	return !known || !maps.Equal(old, labels)
}

// namespaceLabel is of type namespaces.
func (r *Repository) namespaceLabel(namespace, key string) (value string, there, known bool) {
	if key == nameLabel {
		return namespace, true, true
	}
	labels, known := r.namespaces[namespace]
	value, there = labels[key]
	return value, there, known
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
		for _, rule := range p.Rules {
			if rule.Direction == abi.DirEgress && slices.ContainsFunc(rule.Ports, func(p PortRange) bool { return p.Name != "" }) {
				return true
			}
		}
	}
	return false
}

// selects reports whether the policy speaks of the subject; sure is false
// where that hangs on namespace labels that are not known. Trust domains are
// not compared: a local endpoint with a strange one is under policy all the
// same.
func (r *Repository) selects(p *Policy, subject identity.Identity) (selected, sure bool) {
	return p.Subject.selects(subject, r.namespaceLabel, true), p.Subject.selects(subject, r.namespaceLabel, false)
}

// Compile returns what the policies in force mean for one subject, given its
// own named ports and every peer that has a numeric identity on this node.
// Later peers: Set.AddPeer.
func (r *Repository) Compile(subject identity.Identity, peers iter.Seq2[identity.Numeric, identity.Identity], own ...identity.NamedPort) Set {
	// The set keeps today's namespaces; the inner maps are never changed.
	then := &Repository{opts: r.opts, namespaces: maps.Clone(r.namespaces)}
	s := Set{Rules: []RuleRef{{}}, Entries: map[abi.PolicyKey]abi.Policy{}, match: then.matches, ports: r.ports.of}
	mode := r.enforcement(subject)
	if mode == EnforceNever {
		return s
	}
	s.Audit = mode == EnforceAudit
	// Always: under default deny, whatever the policies say.
	deny := [abi.DirMax]bool{mode == EnforceAlways, mode == EnforceAlways}
	var denies [abi.DirMax]bool
	for _, p := range r.List() {
		selected, sure := r.selects(p, subject)
		if !selected {
			continue
		}
		deny[abi.DirIngress] = deny[abi.DirIngress] || p.DenyIngress
		deny[abi.DirEgress] = deny[abi.DirEgress] || p.DenyEgress
		for i := range p.Rules {
			rule := &p.Rules[i]
			if rule.Action == Allow && !sure {
				continue // it denies what it would deny, and allows nothing
			}
			denies[rule.Direction] = denies[rule.Direction] || rule.Action == Deny
			s.addRule(RuleRef{Policy: p.Ref, Path: rule.Path, Direction: rule.Direction, Action: rule.Action}, rule, own)
		}
	}
	for dir := range abi.DirMax {
		// Deny rules without a default deny: all but what they name passes.
		if denies[dir] && !deny[dir] {
			all := &Rule{Direction: dir, Action: Allow, AnyPeer: true, AnyPort: true}
			s.addRule(RuleRef{Path: "default allow", Direction: dir, Action: Allow}, all, nil)
		}
	}
	s.EnforceIngress = deny[abi.DirIngress] || denies[abi.DirIngress]
	s.EnforceEgress = deny[abi.DirEgress] || denies[abi.DirEgress]
	maps.Copy(s.Entries, s.compileAny())
	for n, id := range peers {
		s.AddPeer(n, id)
	}
	return s
}

// matches reports whether the rule's selectors name the peer.
func (r *Repository) matches(rule *Rule, peer identity.Identity) bool {
	if peer.TrustDomain != r.opts.TrustDomain {
		return false
	}
	doubt := rule.Action == Deny
	return slices.ContainsFunc(rule.Peers, func(s Selector) bool { return s.selects(peer, r.namespaceLabel, doubt) })
}
