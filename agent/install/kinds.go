package install

import (
	"slices"

	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/apimachinery/pkg/runtime/schema"
)

// Objects of the installation are known by a label.
const (
	partOf  = "app.kubernetes.io/part-of"
	product = "portcullis"
)

// kind is one of those that an installation is made of.
type kind struct {
	name       string
	resource   schema.GroupVersionResource
	namespaced bool
}

func at(group, version, resource string) schema.GroupVersionResource {
	return schema.GroupVersionResource{Group: group, Version: version, Resource: resource}
}

const rbac = "rbac.authorization.k8s.io"

// kinds are in the order in which objects are made; they are removed in the
// opposite one.
var kinds = []kind{
	{"CustomResourceDefinition", at("apiextensions.k8s.io", "v1", "customresourcedefinitions"), false},
	{"Namespace", at("", "v1", "namespaces"), false},
	{"ServiceAccount", at("", "v1", "serviceaccounts"), true},
	{"ClusterRole", at(rbac, "v1", "clusterroles"), false},
	{"ClusterRoleBinding", at(rbac, "v1", "clusterrolebindings"), false},
	{"Role", at(rbac, "v1", "roles"), true},
	{"RoleBinding", at(rbac, "v1", "rolebindings"), true},
	{"ConfigMap", at("", "v1", "configmaps"), true},
	{"Secret", at("", "v1", "secrets"), true},
	{"Service", at("", "v1", "services"), true},
	{"Deployment", at("apps", "v1", "deployments"), true},
	{"DaemonSet", at("apps", "v1", "daemonsets"), true},
}

func kindNamed(name string) kind {
	k, ok := kindOf(&unstructured.Unstructured{Object: map[string]any{"kind": name}})
	if !ok {
		panic("no kind " + name) // a name in this package's source
	}
	return k
}

func kindOf(o *unstructured.Unstructured) (kind, bool) {
	i := slices.IndexFunc(kinds, func(k kind) bool { return k.name == o.GetKind() })
	if i < 0 {
		return kind{}, false
	}
	return kinds[i], true
}

// inOrder sorts objects into the order in which they are made.
func inOrder(objects []*unstructured.Unstructured) {
	place := func(o *unstructured.Unstructured) int {
		return slices.IndexFunc(kinds, func(k kind) bool { return k.name == o.GetKind() })
	}
	slices.SortStableFunc(objects, func(a, b *unstructured.Unstructured) int { return place(a) - place(b) })
}

// resourceOf is what a definition defines, in the version that is stored.
func resourceOf(crd *unstructured.Unstructured) schema.GroupVersionResource {
	group, _, _ := unstructured.NestedString(crd.Object, "spec", "group")
	plural, _, _ := unstructured.NestedString(crd.Object, "spec", "names", "plural")
	versions, _, _ := unstructured.NestedSlice(crd.Object, "spec", "versions")
	version := ""
	for _, v := range versions {
		if m, ok := v.(map[string]any); ok && m["served"] == true && (version == "" || m["storage"] == true) {
			version, _ = m["name"].(string)
		}
	}
	return at(group, version, plural)
}
