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
}

// Repository holds the policies in force and what is known of namespaces. It
// is not safe for concurrent use: one loop owns it.
type Repository struct {
	opts       Options
	policies   map[Ref]*Policy
	namespaces map[string]map[string]string
}

// NewRepository returns an empty repository.
func NewRepository(opts Options) *Repository {
	return &Repository{opts: opts, policies: map[Ref]*Policy{}, namespaces: map[string]map[string]string{}}
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
// them. It reports whether that changed anything: then sets must be compiled
// anew. Of a namespace that nobody has spoken of only the name is known.
func (r *Repository) SetNamespaceLabels(namespace string, labels map[string]string) (changed bool) {
	labels = maps.Clone(labels)
	delete(labels, nameLabel)
	if maps.Equal(r.namespaces[namespace], labels) {
		return false
	}
	if len(labels) == 0 {
		delete(r.namespaces, namespace)
		return true
	}
	r.namespaces[namespace] = labels
	return true
}

// namespaceLabel returns the value of a namespace's label.
func (r *Repository) namespaceLabel(namespace, key string) (string, bool) {
	if key == nameLabel {
		return namespace, true
	}
	v, ok := r.namespaces[namespace][key]
	return v, ok
}

// selects reports whether the policy speaks of the subject. Trust domains are
// not compared: a local endpoint with a strange one is under policy all the
// same.
func (r *Repository) selects(p *Policy, subject identity.Identity) bool {
	return p.Subject.selects(subject, r.namespaceLabel)
}

// Compile returns what the policies in force mean for one subject, given every
// peer that has a numeric identity on this node. Later peers: Set.AddPeer.
func (r *Repository) Compile(subject identity.Identity, peers iter.Seq2[identity.Numeric, identity.Identity]) Set {
	s := Set{Rules: []RuleRef{{}}, Entries: map[abi.PolicyKey]abi.Policy{}}
	// The set keeps today's namespaces; the inner maps are never changed.
	s.match = (&Repository{opts: r.opts, namespaces: maps.Clone(r.namespaces)}).matches
	var deny, denies [abi.DirMax]bool
	for _, p := range r.List() {
		if !r.selects(p, subject) {
			continue
		}
		deny[abi.DirIngress] = deny[abi.DirIngress] || p.DenyIngress
		deny[abi.DirEgress] = deny[abi.DirEgress] || p.DenyEgress
		for i := range p.Rules {
			rule := &p.Rules[i]
			denies[rule.Direction] = denies[rule.Direction] || rule.Action == Deny
			s.addRule(RuleRef{Policy: p.Ref, Path: rule.Path, Direction: rule.Direction, Action: rule.Action}, rule)
		}
	}
	for dir := range abi.DirMax {
		// Deny rules without a default deny: all but what they name passes.
		if denies[dir] && !deny[dir] {
			all := &Rule{Direction: dir, Action: Allow, AnyPeer: true, AnyPort: true}
			s.addRule(RuleRef{Path: "default allow", Direction: dir, Action: Allow}, all)
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

// CompilePeer returns the entries for one numeric identity in the set of a
// subject as it is compiled now. To add a new identity to a set that is already
// in force, use that set's AddPeer: policies may have changed since.
func (r *Repository) CompilePeer(subject identity.Identity, n identity.Numeric, id identity.Identity) map[abi.PolicyKey]abi.Policy {
	s := r.Compile(subject, func(func(identity.Numeric, identity.Identity) bool) {})
	return s.AddPeer(n, id)
}

// matches reports whether the rule's selectors name the peer.
func (r *Repository) matches(rule *Rule, peer identity.Identity) bool {
	if peer.TrustDomain != r.opts.TrustDomain {
		return false
	}
	return slices.ContainsFunc(rule.Peers, func(s Selector) bool { return s.selects(peer, r.namespaceLabel) })
}
