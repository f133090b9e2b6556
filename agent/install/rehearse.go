package install

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"

	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
)

// rehearse asks the API server to try all objects before one is changed, so that an
// upgrade which it refuses in part (a value, a right, a webhook) changes nothing at all.
// Objects in a namespace that is yet to be made cannot be tried; there is nothing of
// a former installation then that half of a new one could harm. In one that is yet to get
// labels, by which webhooks and policies go, they are tried, but a refusal may not be the last word.
func (c *Cluster) rehearse(ctx context.Context, objects []*unstructured.Unstructured, say func(string, ...any)) error {
	ns, err := c.get(ctx, kindNamed("Namespace"), c.namespace)
	if err != nil {
		return err
	}
	unlabelled := ns != nil && slices.ContainsFunc(objects, func(o *unstructured.Unstructured) bool {
		return o.GetKind() == "Namespace" && !within(o.GetLabels(), ns.GetLabels())
	})
	var refused []error
	for _, o := range objects {
		k, ok := kindOf(o)
		if !ok || k.name == crdKind || k.namespaced && ns == nil { // definitions have rules of their own
			continue
		}
		switch _, err := c.put(ctx, k, o, metav1.DryRunAll); {
		case err == nil:
		case ctx.Err() != nil, passing(err):
			return fmt.Errorf("nothing was changed, for the API server did not try a part of it: %w", err)
		case apierrors.IsNotFound(err): // a binding's role, for those whose own rights are looked at: it comes before the binding
		case unrehearsed(err), k.namespaced && unlabelled:
			say("%s %s could not be tried: %v", o.GetKind(), o.GetName(), err)
		default:
			refused = append(refused, err)
		}
	}
	if len(refused) > 0 {
		return fmt.Errorf("nothing was changed, for the API server refuses a part of it:\n%w", errors.Join(refused...))
	}
	return nil
}

// within reports whether all of some labels are among others.
func within(some, all map[string]string) bool {
	for key, value := range some {
		if there, ok := all[key]; !ok || there != value {
			return false
		}
	}
	return true
}

// unrehearsed reports that the server cannot tell: a webhook would change something
// even where it is only asked.
func unrehearsed(err error) bool {
	return apierrors.IsBadRequest(err) && strings.Contains(err.Error(), "does not support dry run")
}
