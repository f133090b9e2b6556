package install

import (
	"context"
	"fmt"
	"slices"
	"strings"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
)

type metaFields = metav1.ManagedFieldsEntry

const crdKind = "CustomResourceDefinition"

// ciliumSchema is the label by which Cilium's operator marks the definitions
// that it has made or taken over.
const ciliumSchema = "io.cilium.k8s.crd.schema.version"

// ownCRD reports whether a definition is ours: it has our label, and Cilium has
// not taken it over.
func ownCRD(o *unstructured.Unstructured) bool {
	labels := o.GetLabels()
	_, cilium := labels[ciliumSchema]
	return labels[partOf] == product && !cilium
}

// awaitCRDs waits until the API server serves what the definitions define.
func (c *Cluster) awaitCRDs(ctx context.Context, crds []*unstructured.Unstructured) error {
	return c.until(ctx, "the definitions of policies", func() (bool, string, error) {
		for _, o := range crds {
			there, err := c.get(ctx, kindNamed(crdKind), o.GetName())
			if err != nil {
				return false, "", err
			}
			if there == nil || !condition(there, "Established") {
				return false, o.GetName() + " is not established", nil
			}
		}
		return true, "", nil
	})
}

func condition(o *unstructured.Unstructured, name string) bool {
	list, _, _ := unstructured.NestedSlice(o.Object, "status", "conditions")
	return slices.ContainsFunc(list, func(e any) bool {
		m, ok := e.(map[string]any)
		return ok && m["type"] == name && m["status"] == "True"
	})
}

// removeCRDs removes the definitions that are ours and of which no objects are
// left; with them their objects would go. It returns what stays, and why.
func (c *Cluster) removeCRDs(ctx context.Context, withPolicies bool, say func(string, ...any)) (stay []string, err error) {
	k := kindNamed(crdKind)
	names, err := definitions()
	if err != nil {
		return nil, err
	}
	for _, name := range names {
		o, err := c.get(ctx, k, name)
		if err != nil {
			return stay, err
		}
		if o == nil {
			continue
		}
		if !ownCRD(o) {
			stay = append(stay, fmt.Sprintf("%s %s: somebody else has made it", crdKind, name))
			continue
		}
		if !withPolicies {
			n, err := c.countObjects(ctx, o)
			if err != nil {
				return stay, err
			}
			if n != "" {
				stay = append(stay, fmt.Sprintf("%s %s: %s; they would go with it: --remove-policies", crdKind, name, n))
				continue
			}
		}
		if _, err := c.remove(ctx, k, name); err != nil {
			return stay, err
		}
		// Who installs again at once must not find one that is about to go.
		if err := c.awaitGone(ctx, k, o); err != nil {
			return stay, err
		}
		say("%s %s removed", crdKind, name)
	}
	return stay, nil
}

// definitions are the names of those in the chart.
func definitions() (names []string, err error) {
	files, err := Release{Namespace: DefaultNamespace, Values: Default()}.Render()
	if err != nil {
		return nil, err
	}
	files = slices.DeleteFunc(files, func(f File) bool { return !f.CRDs })
	objects, err := Objects(files...)
	for _, o := range objects {
		names = append(names, o.GetName())
	}
	return names, err
}

// countObjects says how many objects of a definition's kind there are, and one
// of them; "": none.
func (c *Cluster) countObjects(ctx context.Context, crd *unstructured.Unstructured) (string, error) {
	from := c.dynamic.Resource(resourceOf(crd))
	n, first := 0, ""
	err := each(ctx, from, metav1.ListOptions{}, func(o *unstructured.Unstructured) bool {
		if n++; first == "" {
			first = strings.TrimPrefix(o.GetNamespace()+"/"+o.GetName(), "/")
		}
		return true
	})
	if err != nil {
		return "", fmt.Errorf("whether policies are left: list %s: %w", crd.GetName(), err)
	}
	switch n {
	case 0:
		return "", nil
	case 1:
		return "there is " + first, nil
	}
	return fmt.Sprintf("there are %d, %s among them", n, first), nil
}
