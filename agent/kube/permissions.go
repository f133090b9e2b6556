package kube

import (
	"k8s.io/apimachinery/pkg/runtime/schema"

	"portcullis/authz/dialect/k8s"
	"portcullis/identity"
)

// Permission is what an agent must be allowed to do in every namespace.
type Permission struct {
	schema.GroupResource
	Verbs []string
}

// Permissions returns everything that a Source asks of the API server, beside
// discovery, which whoever is authenticated may. A manifest that grants more
// grants too much. Events need no right to read any: those of an agent are known
// to it, and of what all agents tell the name says whether it is there.
func Permissions() (out []Permission) {
	for _, r := range resources("") {
		out = append(out, Permission{r.at.GroupResource(), []string{"list", "watch"}})
	}
	return append(out, Permission{schema.GroupResource{Group: "events.k8s.io", Resource: "events"}, []string{"create", "patch"}})
}

// resource is what is watched.
type resource struct {
	at   schema.GroupVersionResource
	kind string // of a policy or group; the core resources are known by their types
	only string // a field selector; "": all
	has  string // a label selector; "": all; objects without the label meet a !=
	// added: by a CustomResourceDefinition, which may be missing.
	added bool
}

func (r resource) name() string { return r.at.Resource }

// handMade selects the slices that Kubernetes has not made from a selector.
const handMade = "endpointslice.kubernetes.io/managed-by!=endpointslice-controller.k8s.io"

// onNode selects the pods of a node.
func onNode(node identity.NodeName) string { return "spec.nodeName=" + string(node) }

// resources are what is watched. pods is a field selector, "": all.
func resources(pods string) []resource {
	core := schema.GroupVersion{Version: "v1"}
	cilium := schema.GroupVersion{Group: "cilium.io", Version: "v2"}
	return []resource{
		{at: core.WithResource("nodes")},
		{at: core.WithResource("namespaces")},
		// What stands behind services, and which addresses are services'.
		{at: core.WithResource("services"), kind: "Service"},
		// Whom services without a selector lead to; those of the others, which are
		// most of them, are left out: the pods' own labels say it.
		{at: schema.GroupVersionResource{Group: "discovery.k8s.io", Version: "v1", Resource: "endpointslices"}, kind: k8s.SliceKind, has: handMade},
		// In mode classic alone those of other nodes: who is behind their IPs
		// their agents say.
		{at: core.WithResource("pods"), only: pods},
		{at: schema.GroupVersionResource{Group: "networking.k8s.io", Version: "v1", Resource: "networkpolicies"}, kind: "NetworkPolicy"},
		{at: cilium.WithResource("ciliumnetworkpolicies"), kind: "CiliumNetworkPolicy", added: true},
		{at: cilium.WithResource("ciliumclusterwidenetworkpolicies"), kind: "CiliumClusterwideNetworkPolicy", added: true},
		{at: cilium.WithResource("ciliumcidrgroups"), kind: "CiliumCIDRGroup", added: true},
	}
}
