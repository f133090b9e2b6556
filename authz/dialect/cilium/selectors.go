package cilium

import (
	"slices"
	"strings"

	"portcullis/authz"
	"portcullis/authz/dialect"
	"portcullis/identity"
)

// endpoints is what a selector of endpoints selects. Cilium's selectors look
// at labels of anybody, workloads or not; here they are two things.
type endpoints struct {
	workloads  authz.Selector
	noWorkload bool     // it selects none, whatever workloads says
	named      []string // the reserved identities that it selects
	reserved   bool     // it speaks of reserved: labels
	namespaced bool     // it speaks of namespaces
}

// Cilium's labels for the namespace's labels, and for the cluster.
const (
	namespaceLabels = "io.cilium.k8s.namespace.labels."
	clusterLabel    = "io.cilium.k8s.policy.cluster"
)

// Our own label, by which a policy names the trust domain of a workload's SPIFFE
// ID. Cilium has no such source of labels, so no policy that was written for it
// means another thing.
const (
	spiffeSource     = "spiffe"
	trustDomainLabel = "trust-domain"
)

// candidate is what a selector can select beside workloads.
type candidate struct {
	name   string
	labels []string // reserved: labels, without values
}

var candidates = []candidate{
	{"host", []string{"host"}},
	{"world-ipv4", []string{"world", "world-ipv4"}},
	{"world-ipv6", []string{"world", "world-ipv6"}},
	{"unmanaged", []string{"unmanaged"}},
	{"health", []string{"health"}},
	{"init", []string{"init"}},
	{"remote-node", []string{"remote-node"}},
	// A node with an API server is a node.
	{"kube-apiserver", []string{"kube-apiserver", "remote-node"}},
	{"ingress", []string{"ingress"}},
}

// parseEndpoints parses a selector of endpoints: of the policy's subjects, or
// of peers.
func parseEndpoints(v *dialect.Value, namespace string, subject bool) (out endpoints) {
	out.workloads = authz.Selector{}
	for _, c := range candidates {
		out.named = append(out.named, c.name)
	}
	v.LabelSelector(func(at *dialect.Value, r authz.Requirement) {
		source, key, ok := splitLabel(at, r.Key, "k8s", "any", "reserved", spiffeSource)
		if !ok || source == spiffeSource && !trustDomains(at, key, r) {
			return
		}
		if source == "reserved" && !slices.ContainsFunc(candidates, func(c candidate) bool { return slices.Contains(c.labels, key) }) {
			at.Refuse("there is no reserved identity %q", key)
			return
		}
		out.keep(source, key, r)
		if source == "reserved" {
			out.reserved = true
			// No workload has such a label.
			out.noWorkload = out.noWorkload || !meets(nil, key, r)
			return
		}
		if source == spiffeSource {
			r.Attribute, r.Key = authz.TrustDomain, ""
			out.workloads = append(out.workloads, r)
			return
		}
		out.workload(at, key, r, namespace, subject)
	})
	// Both families are world.
	if slices.Contains(out.named, "world-ipv4") && slices.Contains(out.named, "world-ipv6") {
		out.named = slices.DeleteFunc(out.named, func(n string) bool { return strings.HasPrefix(n, "world-") })
		out.named = append(out.named, "world")
	}
	return out
}

// trustDomains checks a requirement of the trust domain.
func trustDomains(at *dialect.Value, key string, r authz.Requirement) bool {
	if key != trustDomainLabel {
		at.Refuse("of labels with the source %s: there is %s:%s", spiffeSource, spiffeSource, trustDomainLabel)
		return false
	}
	if r.Operator != authz.In {
		at.Refuse("name the trust domains that are meant, by matchLabels or by In: any other would be whoever is federated")
		return false
	}
	for _, name := range r.Values {
		if err := identity.CheckTrustDomain(name); err != nil {
			at.Refuse("%v", err)
			return false
		}
	}
	return true
}

// keep leaves those of the named that meet the requirement too.
func (out *endpoints) keep(source, key string, r authz.Requirement) {
	out.named = slices.DeleteFunc(out.named, func(name string) bool {
		for _, c := range candidates {
			if c.name == name && source != "k8s" {
				return !meets(c.labels, key, r)
			}
		}
		return !meets(nil, key, r)
	})
}

// meets reports whether who has labels without values meets the requirement.
func meets(labels []string, key string, r authz.Requirement) bool {
	there := slices.Contains(labels, key)
	switch r.Operator {
	case authz.In:
		return there && slices.Contains(r.Values, "")
	case authz.NotIn:
		return !there || !slices.Contains(r.Values, "")
	case authz.Exists:
		return there
	}
	return !there
}

// workload adds a requirement that workloads must meet.
func (out *endpoints) workload(at *dialect.Value, key string, r authz.Requirement, namespace string, subject bool) {
	r.Key = ""
	label, ofNamespace := strings.CutPrefix(key, namespaceLabels)
	switch {
	case key == identity.NamespaceLabel:
		r.Attribute, out.namespaced = authz.Namespace, true
		if !namespaces(at, r, namespace, subject) {
			return
		}
	case ofNamespace:
		r.Attribute, r.Key, out.namespaced = authz.NamespaceLabel, label, true
	case key == identity.ServiceAccountLabel:
		r.Attribute = authz.ServiceAccount
	case key == clusterLabel && r.Operator == authz.Exists:
		return // every workload is in a cluster
	case key == clusterLabel:
		r.Attribute = authz.Cluster
	case strings.HasPrefix(key, "k8s.io.cilium.k8s."), strings.HasPrefix(key, "k8s.io.kubernetes.pod."):
		// A slip that is seen in published policies.
		at.Refuse("no workload has such a label: the source of a label is written with a colon, as in k8s:%s", identity.NamespaceLabel)
		return
	case strings.HasPrefix(key, "io.cilium."), strings.HasPrefix(key, "io.kubernetes.pod."):
		// Cilium gives these a meaning; as a pod's label it would match nobody.
		at.Refuse("not supported: of Cilium's own labels %s, %s, %s... and %s are",
			identity.NamespaceLabel, identity.ServiceAccountLabel, namespaceLabels, clusterLabel)
		return
	default:
		r.Attribute, r.Key = authz.PodLabel, key
	}
	if isLabel := r.Attribute == authz.PodLabel || r.Attribute == authz.NamespaceLabel; !isLabel || at.LabelKey(r.Key) {
		out.workloads = append(out.workloads, r)
	}
}

// namespaces checks a requirement of the namespace's name.
func namespaces(at *dialect.Value, r authz.Requirement, namespace string, subject bool) bool {
	for _, name := range r.Values {
		if !at.IsNamespace(name) {
			return false
		}
	}
	if r.Operator == authz.DoesNotExist {
		at.Refuse("every workload is in a namespace: name who is none by reserved: labels or by entities")
		return false
	}
	own := slices.Contains(r.Values, namespace)
	switch {
	case !subject, namespace == "", r.Operator == authz.In && own, r.Operator == authz.NotIn && !own, r.Operator == authz.Exists:
		return true
	}
	at.Refuse("a policy selects workloads of its own namespace, %s: remove the label, or give the policy another namespace", namespace)
	return false
}

// splitLabel returns the source of a label (any: without one) and its key; at
// is where it stands.
func splitLabel(at *dialect.Value, full string, sources ...string) (source, key string, ok bool) {
	source, key, found := strings.Cut(full, ":")
	switch {
	case !found:
		return "any", full, true
	case slices.Contains(sources, source):
		return source, key, true
	}
	at.Refuse("unknown source of a label: want %s:, or none", strings.Join(sources, ": or "))
	return "", "", false
}

// subject parses endpointSelector.
func (p *parser) subject(v *dialect.Value) {
	s := parseEndpoints(v, p.namespace, true)
	p.Subject = append(p.Subject, s.workloads...)
	if s.noWorkload {
		p.Subject = append(p.Subject, nobody...)
		v.NotEnforced("policies speak of workloads, and what has this reserved: label is none; remove the policy")
	}
}

// nobody selects no workload.
var nobody = authz.Selector{
	{Attribute: authz.Namespace, Operator: authz.DoesNotExist},
}

// nodes parses nodeSelector.
func (p *parser) nodes(v *dialect.Value) {
	if p.namespace != "" {
		v.Refuse("a %s speaks of workloads: use endpointSelector, or write a %s", Kind, ClusterwideKind)
		return
	}
	p.Subject = nodeLabels(v, "k8s", "any")
	v.NotEnforced("policies for nodes have no datapath; protect the node by its own firewall, and workloads by endpointSelector")
}

// nodeLabels parses a selector of nodes.
func nodeLabels(v *dialect.Value, sources ...string) authz.Selector {
	s := authz.Selector{}
	v.LabelSelector(func(at *dialect.Value, r authz.Requirement) {
		_, key, ok := splitLabel(at, r.Key, sources...)
		if key == clusterLabel && r.Operator == authz.Exists {
			return // every node is in a cluster
		}
		if ok && at.LabelKey(key) {
			r.Attribute, r.Key = authz.NodeLabel, key
			s = append(s, r)
		}
	})
	return s
}

// family returns world of one family of addresses: world-ipv4 or world-ipv6.
func family(name string) authz.Block {
	if name == "world-ipv4" {
		return authz.Block{Prefix: everyIPv4}
	}
	return authz.Block{Prefix: everyIPv6}
}
