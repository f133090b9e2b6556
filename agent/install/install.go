package install

import (
	"context"
	"fmt"
	"slices"
	"strings"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
)

// Names of objects.
const (
	agentName   = "portcullis-agent"
	issuerName  = "portcullis-issuer"
	cleanupName = "portcullis-cleanup"
	recordName  = "portcullis-uninstall" // ConfigMap: what an uninstall must still know when the agents are gone
)

// Options of Install.
type Options struct {
	Release  Release
	SkipCRDs bool // leave the definitions of policies' kinds alone
	Wait     bool // until every agent is ready
	// Say tells what is done, a line at a time. Not nil.
	Say func(format string, args ...any)
}

// Install makes the cluster hold what the release says, and removes what a
// former release had and this one has not. Done twice it changes nothing. It
// begins only if nothing that Checks finds forbids it, and refuses to give an
// installation another trust domain, or its nodes' CNI another place.
//
// The objects are made in the order of their kinds. Agents come last: they need
// all of the others. The definitions of policies' kinds that somebody else made
// are left as they are.
func (c *Cluster) Install(ctx context.Context, o Options) error {
	return stopped(ctx, c.install(ctx, o))
}

func (c *Cluster) install(ctx context.Context, o Options) error {
	files, err := o.Release.Render()
	if err != nil {
		return err
	}
	if o.SkipCRDs {
		files = slices.DeleteFunc(files, func(f File) bool { return f.CRDs })
	}
	objects, err := Objects(files...)
	if err != nil {
		return err
	}
	inOrder(objects)
	if err := c.mayInstall(ctx); err != nil {
		return err
	}
	moved, err := c.sameInstallation(ctx, o)
	if err != nil {
		return err
	}
	if err := c.fitIssuer(ctx, objects, o.Say); err != nil {
		return err
	}
	if err := c.rehearse(ctx, objects, o.Say); err != nil {
		return err
	}
	for i, obj := range objects {
		if err := c.applyOne(ctx, obj, o.Say); err != nil {
			return err
		}
		if i+1 < len(objects) && obj.GetKind() == crdKind && objects[i+1].GetKind() != crdKind {
			if err := c.awaitCRDs(ctx, objects[:i+1]); err != nil {
				return err
			}
		}
	}
	if err := c.prune(ctx, objects, o.Say); err != nil {
		return err
	}
	sayLeft(moved, o.Say)
	if !o.Wait {
		return nil
	}
	return c.AwaitReady(ctx, o.Say)
}

// fitIssuer lets the issuer have no more pods than the cluster has nodes, each of
// which has room for one: of two on one node the second would wait for ever, and
// at an upgrade the first, which then is the only one, would never be replaced.
func (c *Cluster) fitIssuer(ctx context.Context, objects []*unstructured.Unstructured, say func(string, ...any)) error {
	nodes, err := c.nodes(ctx)
	if err != nil {
		return err
	}
	for _, o := range objects {
		want, _, _ := unstructured.NestedFloat64(o.Object, "spec", "replicas") // as YAML and JSON have numbers
		most := float64(len(nodes))
		if o.GetName() != issuerName || o.GetKind() != "Deployment" || want <= most || most == 0 {
			continue
		}
		if err := unstructured.SetNestedField(o.Object, most, "spec", "replicas"); err != nil {
			return err
		}
		say("issuer: %v in the place of %v, for the cluster has no more nodes; install again when it has", most, want)
	}
	return nil
}

// mayInstall refuses where the installation would fight with somebody.
func (c *Cluster) mayInstall(ctx context.Context) error {
	for _, name := range []string{cleanupName, recordName} {
		k := kindNamed("DaemonSet")
		if name == recordName {
			k = kindNamed("ConfigMap")
		}
		if o, err := c.get(ctx, k, name); err != nil || o != nil {
			if err == nil {
				err = fmt.Errorf("%s %s is there: an uninstall was begun and did not end, and would take a new agent's plugin away: end it first by `portcullis uninstall`", k.name, name)
			}
			return err
		}
	}
	agents, err := c.get(ctx, kindNamed("DaemonSet"), agentName)
	if err != nil {
		return err
	}
	if agents != nil {
		if release := agents.GetAnnotations()["meta.helm.sh/release-name"]; release != "" {
			return fmt.Errorf("the agents are of Helm's release %s: two installers would undo each other's changes: use `helm upgrade %[1]s`, or remove its record first (secrets of type helm.sh/release.v1 in its namespace, and the annotations meta.helm.sh/*)", release)
		}
		if agents.GetDeletionTimestamp() != nil {
			return fmt.Errorf("the agents are being removed: wait until `kubectl -n %s get daemonset %s` finds none", c.namespace, agentName)
		}
	}
	// One cluster has one authority on each node: a second installation
	// elsewhere would put a second agent beside the first.
	other, err := c.elsewhere(ctx)
	if err != nil {
		return err
	}
	if other != "" {
		return fmt.Errorf("there is an installation in namespace %s: a node can have one agent only: use --namespace %[1]s, or uninstall that one", other)
	}
	ns, err := c.get(ctx, kindNamed("Namespace"), c.namespace)
	if err != nil {
		return err
	}
	if ns != nil && ns.GetDeletionTimestamp() != nil {
		return fmt.Errorf("namespace %s is being removed, and with it would go what is made in it now: wait until `kubectl get namespace %[1]s` finds none; what holds it is in its status", c.namespace)
	}
	return nil
}

// elsewhere is another namespace with an installation, "" if there is none. It
// is known by its agents, and by whom the rights of agents are given to: some of
// what an installation has is of the whole cluster, and there once.
func (c *Cluster) elsewhere(ctx context.Context) (string, error) {
	binding, err := c.get(ctx, kindNamed("ClusterRoleBinding"), agentName)
	if err != nil {
		return "", err
	}
	if binding != nil {
		subjects, _, _ := unstructured.NestedSlice(binding.Object, "subjects")
		for _, s := range subjects {
			if m, ok := s.(map[string]any); ok && m["namespace"] != c.namespace {
				return fmt.Sprint(m["namespace"]), nil
			}
		}
	}
	other := ""
	err = each(ctx, c.dynamic.Resource(kindNamed("DaemonSet").resource), metav1.ListOptions{LabelSelector: partOf + "=" + product}, func(o *unstructured.Unstructured) bool {
		if o.GetName() == agentName && o.GetNamespace() != c.namespace {
			other = o.GetNamespace()
		}
		return other == ""
	})
	if err != nil {
		return "", fmt.Errorf("list daemonsets of all namespaces: %w", err)
	}
	return other, nil
}

func (c *Cluster) applyOne(ctx context.Context, o *unstructured.Unstructured, say func(string, ...any)) error {
	if o.GetKind() == crdKind {
		there, err := c.get(ctx, kindNamed(crdKind), o.GetName())
		if err != nil {
			return err
		}
		if there != nil && there.GetDeletionTimestamp() != nil {
			// Its objects go, then it does: what were applied to it now would go too.
			say("%s %s is being removed: it is made anew when it is gone", o.GetKind(), o.GetName())
			if err := c.awaitGone(ctx, kindNamed(crdKind), there); err != nil {
				return err
			}
			there = nil
		}
		if there != nil && !ownCRD(there) {
			say("%s %s kept: somebody else has made it", o.GetKind(), o.GetName())
			return nil
		}
	}
	result, err := c.apply(ctx, o)
	if err == nil {
		say("%s %s %s", o.GetKind(), o.GetName(), result)
	}
	return err
}

// prune removes objects of ours that are not in the release any more. The
// namespace and definitions stay; so does what somebody else has applied with
// our label.
func (c *Cluster) prune(ctx context.Context, objects []*unstructured.Unstructured, say func(string, ...any)) error {
	keep := map[string]bool{}
	for _, o := range objects {
		keep[o.GetKind()+" "+o.GetName()] = true
	}
	for _, k := range slices.Backward(kinds) {
		if k.name == crdKind || k.name == "Namespace" {
			continue
		}
		there, err := c.list(ctx, k, partOf+"="+product)
		if err != nil {
			return err
		}
		for _, o := range there {
			if keep[k.name+" "+o.GetName()] || !applied(o) || o.GetDeletionTimestamp() != nil {
				continue
			}
			if _, err := c.remove(ctx, k, o.GetName()); err != nil {
				return err
			}
			say("%s %s removed: it is not part of this any more", k.name, o.GetName())
		}
	}
	return nil
}

// applied reports whether Install has made an object.
func applied(o *unstructured.Unstructured) bool {
	return slices.ContainsFunc(o.GetManagedFields(), func(f metaFields) bool { return f.Manager == FieldManager })
}

// AwaitReady waits until the issuer and every agent are up, of this release and
// ready, and says how far it is whenever that changes.
func (c *Cluster) AwaitReady(ctx context.Context, say func(string, ...any)) error {
	last := ""
	tell := func(text string) {
		if text != last {
			say("%s", text)
			last = text
		}
	}
	if err := c.until(ctx, "the issuer", func() (bool, string, error) {
		o, err := c.get(ctx, kindNamed("Deployment"), issuerName)
		if err != nil || o == nil {
			return err == nil, "", err
		}
		want, ready, updated := count(o, "spec", "replicas"), count(o, "status", "readyReplicas"), count(o, "status", "updatedReplicas")
		text := fmt.Sprintf("issuer: %d of %d ready", ready, want)
		former := count(o, "status", "replicas") - updated
		if former > 0 {
			text += fmt.Sprintf(", %d to be replaced", former)
		}
		tell(text)
		// One is enough, of this release.
		return ready > 0 && observed(o) && former <= 0, text, nil
	}); err != nil {
		return c.because(ctx, err)
	}
	err := c.until(ctx, "the agents", func() (bool, string, error) {
		o, err := c.get(ctx, kindNamed("DaemonSet"), agentName)
		if err == nil && o == nil {
			err = fmt.Errorf("there is no DaemonSet %s in namespace %s: `portcullis install`", agentName, c.namespace)
			return false, err.Error(), nil
		}
		if err != nil {
			return false, "", err
		}
		want, ready, updated := count(o, "status", "desiredNumberScheduled"), count(o, "status", "numberReady"), count(o, "status", "updatedNumberScheduled")
		text := fmt.Sprintf("agents: %d of %d ready", ready, want)
		if updated < want {
			text += fmt.Sprintf(", %d replaced", updated)
		}
		tell(text)
		return observed(o) && want > 0 && ready == want && updated == want, text, nil
	})
	return c.because(ctx, err)
}

// because adds to an error of waiting what keeps pods from becoming ready.
func (c *Cluster) because(ctx context.Context, err error) error {
	if err == nil {
		return nil
	}
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), c.answer)
	defer cancel()
	pods, perr := c.pods(ctx)
	if perr != nil {
		return err
	}
	var lines []string
	for _, why := range c.unmade(ctx) {
		lines = append(lines, "\n  "+why)
	}
	for _, p := range pods {
		if why := p.trouble(); why != "" {
			lines = append(lines, fmt.Sprintf("\n  %s on %s: %s", p.Name, p.Spec.NodeName, why))
		}
	}
	const most = 10
	if len(lines) > most {
		lines = append(lines[:most], fmt.Sprintf("\n  and %d more: portcullis status --cluster", len(lines)-most))
	}
	return fmt.Errorf("%w%s", err, strings.Join(lines, ""))
}

// count is a number in an object, 0 if there is none.
func count(o *unstructured.Unstructured, at ...string) int64 {
	n, _, _ := unstructured.NestedInt64(o.Object, at...)
	return n
}

// observed reports whether the status is of the present spec.
func observed(o *unstructured.Unstructured) bool {
	return count(o, "status", "observedGeneration") == o.GetGeneration()
}
