package identity

import (
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"maps"
	"slices"
	"strings"
)

// Identity is what policy speaks of: who a workload is, whatever its address.
// Two workloads with equal identities are the same to every policy.
//
// An Identity is immutable after New or Reserved; its maps must not be changed.
type Identity struct {
	// Reserved names one of the built-in identities ("host", "world", ...).
	// When set, every other field is empty.
	Reserved string `json:"reserved,omitempty"`

	TrustDomain    string            `json:"trustDomain,omitempty"`
	Namespace      string            `json:"namespace,omitempty"`
	ServiceAccount string            `json:"serviceAccount,omitempty"`
	Labels         map[string]string `json:"labels,omitempty"` // security-relevant pod labels only
}

// Hash names an identity between agents: SHA-256 of its canonical form. Unlike
// a numeric identity it means the same on every node.
type Hash [32]byte

// String returns the first 16 hex digits, enough for people.
func (h Hash) String() string { return hex.EncodeToString(h[:8]) }

// New returns the identity of a workload. Labels that Filter rejects must have
// been removed before. The map is copied.
func New(trustDomain, namespace, serviceAccount string, labels map[string]string) Identity {
	return Identity{TrustDomain: trustDomain, Namespace: namespace, ServiceAccount: serviceAccount, Labels: maps.Clone(labels)}
}

// Canonical returns the one textual form of the identity. It is injective:
// every part is quoted, labels are sorted.
func (id Identity) Canonical() string {
	if id.Reserved != "" {
		return fmt.Sprintf("reserved:%q", id.Reserved)
	}
	var b strings.Builder
	fmt.Fprintf(&b, "td=%q,ns=%q,sa=%q", id.TrustDomain, id.Namespace, id.ServiceAccount)
	for _, k := range slices.Sorted(maps.Keys(id.Labels)) {
		fmt.Fprintf(&b, ",%q=%q", k, id.Labels[k])
	}
	return b.String()
}

// Hash returns the identity's name between agents.
func (id Identity) Hash() Hash { return sha256.Sum256([]byte(id.Canonical())) }

// Equal reports whether two identities are the same to every policy.
func (id Identity) Equal(o Identity) bool {
	return id.Reserved == o.Reserved && id.TrustDomain == o.TrustDomain && id.Namespace == o.Namespace &&
		id.ServiceAccount == o.ServiceAccount && maps.Equal(id.Labels, o.Labels)
}

// SPIFFEID returns the SPIFFE ID of the identity's workloads by DefaultTemplate,
// for display: a Template says which one counts, and whether there can be one.
// It is empty for reserved identities.
func (id Identity) SPIFFEID() string {
	if id.Reserved != "" {
		return ""
	}
	return "spiffe://" + id.TrustDomain + "/ns/" + id.Namespace + "/sa/" + id.ServiceAccount
}

// String returns the identity as people read it: "ns/sa[k=v k=v]" or
// "reserved:host".
func (id Identity) String() string {
	if id.Reserved != "" {
		return "reserved:" + id.Reserved
	}
	var b strings.Builder
	fmt.Fprintf(&b, "%s/%s[", id.Namespace, id.ServiceAccount)
	for i, k := range slices.Sorted(maps.Keys(id.Labels)) {
		if i > 0 {
			b.WriteByte(' ')
		}
		b.WriteString(k)
		if v := id.Labels[k]; v != "" {
			b.WriteString("=" + v)
		}
	}
	b.WriteByte(']')
	return b.String()
}

// LabelList returns the identity's labels in Cilium's notation
// (source:key=value), sorted: what endpoint list and monitor show.
func (id Identity) LabelList() []string {
	if id.Reserved != "" {
		return []string{"reserved:" + id.Reserved}
	}
	out := make([]string, 0, len(id.Labels)+2)
	for k, v := range id.Labels {
		if v == "" {
			out = append(out, "k8s:"+k)
			continue
		}
		out = append(out, "k8s:"+k+"="+v)
	}
	out = append(out, "k8s:"+NamespaceLabel+"="+id.Namespace, "k8s:"+ServiceAccountLabel+"="+id.ServiceAccount)
	slices.Sort(out)
	return out
}

// The labels by which Cilium policies speak of namespace and service account.
const (
	NamespaceLabel      = "io.kubernetes.pod.namespace"
	ServiceAccountLabel = "io.cilium.k8s.policy.serviceaccount"
)

// AgentSPIFFEPath returns the path of a node agent's SPIFFE ID.
func AgentSPIFFEPath(node NodeName) string { return "/portcullis/node/" + string(node) }

// RelaySPIFFEPath is the path of a relay's SPIFFE ID: agents tell it of flows, and
// of nothing else.
const RelaySPIFFEPath = "/portcullis/relay"
