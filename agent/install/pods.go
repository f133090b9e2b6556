package install

import (
	"context"
	"fmt"
	"slices"
	"strings"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/client-go/dynamic"
)

// pod is one of the installation.
type pod struct{ corev1.Pod }

const nameLabel = "app.kubernetes.io/name"

// pods returns those of the installation, by name.
func (c *Cluster) pods(ctx context.Context) (out []pod, err error) {
	err = list(ctx, c.dynamic.Resource(at("", "v1", "pods")).Namespace(c.namespace), partOf+"="+product, func(p corev1.Pod) { out = append(out, pod{p}) })
	if err != nil {
		return nil, fmt.Errorf("list pods: %w", err)
	}
	slices.SortFunc(out, func(a, b pod) int { return strings.Compare(a.Name, b.Name) })
	return out, nil
}

func (c *Cluster) nodes(ctx context.Context) (out []corev1.Node, err error) {
	err = list(ctx, c.dynamic.Resource(at("", "v1", "nodes")), "", func(n corev1.Node) { out = append(out, n) })
	if err != nil {
		return nil, fmt.Errorf("list nodes: %w", err)
	}
	slices.SortFunc(out, func(a, b corev1.Node) int { return strings.Compare(a.Name, b.Name) })
	return out, nil
}

// list reads all objects as T.
func list[T any](ctx context.Context, from dynamic.ResourceInterface, selector string, f func(T)) error {
	var wrong error
	err := each(ctx, from, metav1.ListOptions{LabelSelector: selector}, func(o *unstructured.Unstructured) bool {
		var t T
		wrong = runtime.DefaultUnstructuredConverter.FromUnstructured(o.Object, &t)
		f(t)
		return wrong == nil
	})
	if err == nil {
		err = wrong
	}
	return err
}

// component is which part of the installation the pod is of.
func (p pod) component() string { return p.Labels[nameLabel] }

func (p pod) ready() bool {
	return slices.ContainsFunc(p.Status.Conditions, func(c corev1.PodCondition) bool {
		return c.Type == corev1.PodReady && c.Status == corev1.ConditionTrue
	})
}

// running reports whether the agent's process can be asked.
func (p pod) running() bool {
	return slices.ContainsFunc(p.Status.ContainerStatuses, func(s corev1.ContainerStatus) bool { return s.State.Running != nil })
}

// image is what the pod's first container is made of.
func (p pod) image() string {
	for _, c := range p.Spec.Containers {
		return c.Image
	}
	return ""
}

// maxSaid bounds how much of a container's last words is shown.
const maxSaid = 600

// trouble says what keeps the pod from being ready, "" if it is.
func (p pod) trouble() string {
	if p.ready() && p.DeletionTimestamp == nil {
		return ""
	}
	for _, s := range slices.Concat(p.Status.InitContainerStatuses, p.Status.ContainerStatuses) {
		if text := stuck(s); text != "" {
			return text
		}
	}
	if p.DeletionTimestamp != nil {
		return "is ending"
	}
	for _, c := range p.Status.Conditions {
		if c.Type == corev1.PodScheduled && c.Status == corev1.ConditionFalse {
			return "has no node: " + c.Message
		}
	}
	if p.Status.Message != "" {
		return strings.TrimSpace(p.Status.Reason + ": " + p.Status.Message)
	}
	if p.running() {
		return "runs, and is not ready yet"
	}
	return "starts"
}

// stuck says why a container does not run, with its last words.
func stuck(s corev1.ContainerStatus) string {
	w := s.State.Waiting
	if w != nil && (w.Reason == "ContainerCreating" || w.Reason == "PodInitializing") && s.LastTerminationState.Terminated == nil {
		return ""
	}
	text := ""
	if w != nil {
		text = strings.TrimSuffix("does not start ("+w.Reason+"): "+w.Message, ": ")
	}
	for _, t := range []*corev1.ContainerStateTerminated{s.State.Terminated, s.LastTerminationState.Terminated} {
		if t == nil || t.ExitCode == 0 || s.State.Running != nil && s.Ready {
			continue
		}
		said := strings.TrimSpace(t.Message)
		if len(said) > maxSaid {
			said = "..." + said[len(said)-maxSaid:]
		}
		return strings.TrimPrefix(fmt.Sprintf("%s; ended with status %d: %s", text, t.ExitCode, strings.ReplaceAll(said, "\n", " | ")), "; ")
	}
	return text
}
