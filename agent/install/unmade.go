package install

import (
	"context"
	"fmt"
	"strings"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/apimachinery/pkg/runtime"
)

// unmade says which pods of the installation are not those that it wants, and why
// they cannot be made, a line for each: a quota, a policy for pods or a webhook
// forbids them. Nothing but Events tells that. No line: all are there, or nobody
// has said why not.
func (c *Cluster) unmade(ctx context.Context) (out []string) {
	for _, name := range []string{agentName, cleanupName} {
		set, err := c.get(ctx, kindNamed("DaemonSet"), name)
		if err == nil && set != nil && count(set, "status", "currentNumberScheduled") < count(set, "status", "desiredNumberScheduled") {
			out = append(out, c.failedCreate(ctx, "DaemonSet", name, "pods of "+name)...)
		}
	}
	issuer, err := c.get(ctx, kindNamed("Deployment"), issuerName)
	if err != nil || issuer == nil {
		return out // who asks has asked for others with the same rights, and says so
	}
	if former := count(issuer, "status", "replicas") - count(issuer, "status", "updatedReplicas"); former > 0 {
		out = append(out, fmt.Sprintf("%d of the issuer's pods are of a former release, as while they are replaced; for ever where there is no other node for one: issuer.replicas=1 then", former))
	}
	if count(issuer, "status", "replicas") < count(issuer, "spec", "replicas") {
		out = append(out, c.failedCreate(ctx, "ReplicaSet", issuerName+"-", "pods of "+issuerName)...)
	}
	return out
}

// failedCreate is the last that was said about pods that cannot be made for an
// object whose name begins so.
func (c *Cluster) failedCreate(ctx context.Context, kind, name, what string) []string {
	var last corev1.Event
	// Events are only told of: without the right to read them there is less to tell.
	_ = each(ctx, c.dynamic.Resource(at("", "v1", "events")).Namespace(c.namespace), metav1.ListOptions{FieldSelector: "reason=FailedCreate,involvedObject.kind=" + kind}, func(o *unstructured.Unstructured) bool {
		var e corev1.Event
		if runtime.DefaultUnstructuredConverter.FromUnstructured(o.Object, &e) == nil && strings.HasPrefix(e.InvolvedObject.Name, name) && !when(&e).Before(when(&last)) {
			last = e
		}
		return true
	})
	if last.Message == "" {
		return nil
	}
	return []string{fmt.Sprintf("%s cannot be made: %s", what, strings.TrimPrefix(last.Message, "(combined from similar events): "))}
}

// when is the last time that an Event tells of.
func when(e *corev1.Event) *metav1.Time {
	if e.LastTimestamp.IsZero() {
		return &e.CreationTimestamp
	}
	return &e.LastTimestamp
}
