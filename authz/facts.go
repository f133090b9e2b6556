package authz

import (
	"iter"
	"maps"
	"net/netip"
	"slices"

	"portcullis/identity"
)

// facts is what is known beside policies. It is never changed: who learns
// something makes another. So a set goes on meaning what it meant.
type facts struct {
	trustDomain string
	cluster     string
	namespaces  map[string]map[string]string // one that is missing is one nobody has spoken of
	groups      map[string]blockGroup
	services    map[ServiceName]Backends
}

// nameLabel is the label that every namespace has, with its name, whether its
// labels are known or not.
const nameLabel = "kubernetes.io/metadata.name"

// of are the attributes of a workload.
func (f *facts) of(id identity.Identity) attributes {
	return func(r Requirement) (value string, there, known bool) {
		switch r.Attribute {
		case PodLabel:
			value, there = id.Labels[r.Key]
			return value, there, true
		case Namespace:
			return id.Namespace, true, true
		case ServiceAccount:
			return id.ServiceAccount, true, true
		case Cluster:
			return f.cluster, true, true
		case TrustDomain:
			return id.TrustDomain, id.TrustDomain != "", true
		case NamespaceLabel:
			if r.Key == nameLabel {
				return id.Namespace, true, true
			}
			labels, known := f.namespaces[id.Namespace]
			value, there = labels[r.Key]
			return value, there, known
		}
		return "", false, true // Validate lets no other through
	}
}

// with returns the map with a key set, or without it if there is no value.
func with[K comparable, V any](m map[K]V, key K, value *V) map[K]V {
	m = maps.Clone(m)
	if m == nil {
		m = map[K]V{}
	}
	if value == nil {
		delete(m, key)
	} else {
		m[key] = *value
	}
	return m
}

// SetNamespaceLabels says what the labels of a namespace are; nil forgets
// them, an empty map says that there are none. It reports whether that changed
// anything: then sets must be compiled anew. Of a namespace that nobody has
// spoken of only the name is known: what a selector asks of its other labels
// is not met in an allow rule, and is met in a deny rule.
func (r *Repository) SetNamespaceLabels(namespace string, labels map[string]string) (changed bool) {
	old, known := r.facts.namespaces[namespace]
	f := *r.facts
	if labels == nil {
		changed = known
		f.namespaces = with(f.namespaces, namespace, nil)
	} else {
		labels = maps.Clone(labels)
		delete(labels, nameLabel)
		changed = !known || !maps.Equal(old, labels)
		f.namespaces = with(f.namespaces, namespace, &labels)
	}
	if changed {
		before := r.facts
		r.facts = &f
		r.sets.namespaceChanged(namespace, before)
	}
	return changed
}

// SetBlockGroup says what blocks (masked) a group of addresses has, and what
// labels. Sets must be compiled anew.
func (r *Repository) SetBlockGroup(name string, labels map[string]string, blocks []netip.Prefix) {
	f := *r.facts
	f.groups = with(f.groups, name, &blockGroup{labels: maps.Clone(labels), blocks: slices.SortedFunc(slices.Values(blocks), netip.Prefix.Compare)})
	r.learnGroup(name, &f)
}

// DeleteBlockGroup forgets a group. Sets must be compiled anew.
func (r *Repository) DeleteBlockGroup(name string) {
	f := *r.facts
	f.groups = with(f.groups, name, nil)
	r.learnGroup(name, &f)
}

// SetService says what stands behind a service; nil forgets it. Sets must be
// compiled anew.
func (r *Repository) SetService(at ServiceName, b *Backends) {
	f := *r.facts
	if b != nil {
		sorted := *b
		sorted.Blocks = slices.SortedFunc(slices.Values(b.Blocks), netip.Prefix.Compare)
		b = &sorted
	}
	f.services = with(f.services, at, b)
	r.learn(&f, func(x PeerSelector) bool {
		s, ok := innermost(x).(Service)
		return ok && (s.Name == "" || s.Name == at.Name) && (s.Namespace == "" || s.Namespace == at.Namespace)
	})
}

func (r *Repository) learnGroup(name string, f *facts) {
	r.learn(f, func(x PeerSelector) bool {
		g, ok := innermost(x).(BlockGroup)
		return ok && (g.Name == "" || g.Name == name)
	})
}

// learn puts other facts in the place of those known. looks names the
// selectors that look at what changed.
func (r *Repository) learn(f *facts, looks func(PeerSelector) bool) {
	before := r.facts
	r.facts = f
	r.sets.factsChanged(before, looks)
}

// Blocks returns the blocks of addresses that the policies in force tell
// apart, masked, sorted, each once: for peers that are world, or for those with
// a binding. A peer is seen in the longest that covers its address.
func (r *Repository) Blocks(bound bool) []netip.Prefix {
	seen := map[netip.Prefix]bool{}
	add := func(blocks ...netip.Prefix) {
		for _, b := range blocks {
			seen[b] = true
		}
	}
	for s := range r.peerSelectors() {
		switch s := innermost(s).(type) {
		case Block:
			if s.Bound || !bound {
				add(s.Prefix)
				add(s.Except...)
			}
		case BlockGroup:
			if bound {
				continue
			}
			add(s.Except...)
			for name, g := range r.facts.groups {
				if s.Name == name || s.Name == "" && s.Labels.meets(labelsOf(g.labels)) {
					add(g.blocks...)
				}
			}
		case Service:
			for _, b := range s.named(r.facts) {
				if len(b.Selector) == 0 {
					add(b.Blocks...)
				}
			}
		}
	}
	return slices.SortedFunc(maps.Keys(seen), netip.Prefix.Compare)
}

// peerSelectors yields those of every rule in force.
func (r *Repository) peerSelectors() iter.Seq[PeerSelector] {
	return func(yield func(PeerSelector) bool) {
		for _, p := range r.policies {
			for _, spec := range p.Specs {
				for _, rule := range spec.Rules {
					for _, s := range rule.Peers {
						if !yield(s) {
							return
						}
					}
				}
			}
		}
	}
}
