package install

import (
	"cmp"
	"context"
	"encoding/json"
	"fmt"
	"slices"
	"strings"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"

	"portcullis/agent/kube"
)

// UninstallOptions are those of Uninstall.
type UninstallOptions struct {
	// Release says how nodes are cleaned where no agents are found that say it.
	Release        Release
	RemovePolicies bool     // remove the definitions of policies although there are some, and them
	CleanNodes     bool     // clean the nodes also where nothing of an installation is found
	SkipNodes      []string // are not waited for: what is on them stays
	// Say tells what is done, a line at a time. Not nil.
	Say func(format string, args ...any)
}

// Uninstall removes the installation, in the order that leaves no node with a
// plugin whose agent is gone, by which no pod could start: the agents; then, on
// every node, what they left; then the objects. It returns what stays, and why.
//
// It can be stopped anywhere and called again: what is still to be known when
// the agents are gone is in a ConfigMap, which goes last but the namespace.
func (c *Cluster) Uninstall(ctx context.Context, o UninstallOptions) (stay []string, err error) {
	stay, err = c.uninstall(ctx, o)
	return stay, stopped(ctx, err)
}

func (c *Cluster) uninstall(ctx context.Context, o UninstallOptions) (stay []string, err error) {
	// What is of the whole cluster is that of one installation only: agents
	// elsewhere would lose their rights, and the policies their definitions.
	if other, err := c.elsewhere(ctx); err != nil || other != "" {
		if err == nil {
			err = fmt.Errorf("the installation is in namespace %s: nothing was changed: use --namespace %[1]s", other)
		}
		return nil, err
	}
	agents, r, err := c.toClean(ctx, o)
	if err != nil {
		return nil, err
	}
	if r != nil && !r.Cleaned {
		if err := c.clean(ctx, agents, r, o); err != nil {
			return nil, err
		}
	}
	if r != nil {
		stay = append(stay, "/var/log/portcullis on the nodes: the confirmation log")
	}
	for _, n := range o.SkipNodes {
		stay = append(stay, fmt.Sprintf("node %s: plugin, programs, maps and state, for it was skipped: no new pod starts there", n))
	}
	if err := c.removeObjects(ctx, o.Say); err != nil {
		return stay, err
	}
	kept, err := c.removeCRDs(ctx, o.RemovePolicies, o.Say)
	if stay = append(stay, kept...); err != nil {
		return stay, err
	}
	if _, err := c.remove(ctx, kindNamed("ConfigMap"), recordName); err != nil {
		return stay, err
	}
	kept, err = c.removeNamespace(ctx, o)
	if stay = append(stay, kept...); err != nil {
		return stay, err
	}
	if agents != nil && agents.GetAnnotations()["meta.helm.sh/release-name"] != "" {
		stay = append(stay, "Helm's record of release "+agents.GetAnnotations()["meta.helm.sh/release-name"]+", if its namespace stays: helm uninstall")
	}
	return append(stay, c.labelled(ctx)...), nil
}

// toClean finds the agents, nil if there are none, and how nodes are to be
// cleaned, nil if nothing says that anything was ever installed.
func (c *Cluster) toClean(ctx context.Context, o UninstallOptions) (agents *unstructured.Unstructured, r *record, err error) {
	if r, err = c.readRecord(ctx); err != nil {
		return nil, nil, err
	}
	if agents, err = c.get(ctx, kindNamed("DaemonSet"), agentName); err != nil {
		return nil, nil, err
	}
	if agents != nil {
		r, err = recordOf(agents, o.Release)
		return agents, r, err
	}
	if r != nil {
		return nil, r, nil
	}
	// Somebody has removed the agents alone, or with their namespace: no pod can
	// start on the nodes, where the plugin is left.
	found := o.CleanNodes
	for _, k := range []string{"ServiceAccount", "ClusterRoleBinding"} {
		there, err := c.get(ctx, kindNamed(k), agentName)
		if err != nil {
			return nil, nil, err
		}
		found = found || there != nil
	}
	if !found {
		o.Say("there are no agents, and no rights of agents: if they were removed by something else than this command, pods do not start any more: --clean-nodes takes the plugin off the nodes")
		return nil, nil, nil
	}
	o.Say("there is no DaemonSet %s: the nodes are cleaned by the values given, or the usual ones: by image %s, plugin in %s", agentName, o.Release.image(), o.Release.Values.CNI.BinDir)
	return nil, &record{Release: o.Release}, nil
}

// record is what must be known when the agents are gone.
type record struct {
	Release Release
	Cleaned bool // every node
}

func (c *Cluster) readRecord(ctx context.Context) (*record, error) {
	o, err := c.get(ctx, kindNamed("ConfigMap"), recordName)
	if err != nil || o == nil {
		return nil, err
	}
	text, _, _ := unstructured.NestedString(o.Object, "data", "record.json")
	var r record
	if err := json.Unmarshal([]byte(text), &r); err != nil {
		return nil, fmt.Errorf("ConfigMap %s, by which an uninstall goes on, cannot be read (%w): remove it, and give the values of the installation by --values and --set", recordName, err)
	}
	return &r, nil
}

func (c *Cluster) writeRecord(ctx context.Context, r *record) error {
	b, err := json.Marshal(r)
	if err != nil {
		return err
	}
	_, err = c.apply(ctx, &unstructured.Unstructured{Object: map[string]any{
		"apiVersion": "v1", "kind": "ConfigMap",
		"metadata": map[string]any{"name": recordName, "namespace": c.namespace},
		"data":     map[string]any{"record.json": string(b)},
	}})
	return err
}

// recordOf reads from the agents how nodes must be cleaned: by their image,
// where their CNI is. It works for whoever has installed them.
func recordOf(agents *unstructured.Unstructured, base Release) (*record, error) {
	var spec struct {
		Spec struct{ Template corev1.PodTemplateSpec }
	}
	b, err := agents.MarshalJSON()
	if err != nil {
		return nil, err
	}
	if err := json.Unmarshal(b, &spec); err != nil {
		return nil, fmt.Errorf("DaemonSet %s: %w", agentName, err)
	}
	pod := spec.Spec.Template.Spec
	i := slices.IndexFunc(pod.Containers, func(c corev1.Container) bool { return c.Name == "agent" })
	if i < 0 {
		return nil, fmt.Errorf("DaemonSet %s has no container agent: is it this product's?", agentName)
	}
	agent := pod.Containers[i]
	r := &record{Release: base}
	r.Release.Image = agent.Image
	v := &r.Release.Values
	if agent.ImagePullPolicy != "" {
		v.Image.PullPolicy = string(agent.ImagePullPolicy)
	}
	v.Image.PullSecrets = []map[string]any{}
	for _, s := range pod.ImagePullSecrets {
		v.Image.PullSecrets = append(v.Image.PullSecrets, map[string]any{"name": s.Name})
	}
	v.Agent.NodeSelector = map[string]any{}
	for key, value := range pod.NodeSelector {
		v.Agent.NodeSelector[key] = value
	}
	v.CNI.BinDir = cmp.Or(flagOf(agent.Args, "--cni-bin-dir"), v.CNI.BinDir)
	v.CNI.ConfDir = cmp.Or(flagOf(agent.Args, "--cni-conf-dir"), v.CNI.ConfDir)
	return r, nil
}

// clean removes the agents, and then what they left on every node.
func (c *Cluster) clean(ctx context.Context, agents *unstructured.Unstructured, r *record, o UninstallOptions) error {
	cleanup, err := r.Release.RenderCleanup()
	if err != nil {
		return err
	}
	objects, err := Objects(cleanup)
	if err != nil {
		return err
	}
	if err := c.ensureNamespace(ctx, r.Release); err != nil {
		return err
	}
	if err := c.writeRecord(ctx, r); err != nil {
		return err
	}
	k := kindNamed("DaemonSet")
	if agents != nil {
		if _, err := c.remove(ctx, k, agentName); err != nil {
			return err
		}
		o.Say("%s %s: ends; programs and leases in the nodes' kernels go on judging", k.name, agentName)
	}
	if err := c.until(ctx, "the agents to end", func() (bool, string, error) { return c.gone(ctx, agentName, o.SkipNodes) }); err != nil {
		return err
	}
	for _, obj := range objects {
		if _, err := c.apply(ctx, obj); err != nil {
			return err
		}
	}
	o.Say("DaemonSet %s: cleans the nodes", cleanupName)
	told := map[string]bool{}
	if err := c.until(ctx, "the nodes to be cleaned", func() (bool, string, error) { return c.cleaned(ctx, o, told) }); err != nil {
		return c.because(ctx, fmt.Errorf("%w; a node that is gone for good is left out by --skip-node NODE", err))
	}
	r.Cleaned = true
	if err := c.writeRecord(ctx, r); err != nil {
		return err
	}
	if _, err := c.remove(ctx, k, cleanupName); err != nil {
		return err
	}
	return c.until(ctx, "DaemonSet "+cleanupName+" to end", func() (bool, string, error) { return c.gone(ctx, cleanupName, o.SkipNodes) })
}

// ensureNamespace makes the namespace where somebody has removed it, for the
// nodes are cleaned by pods in it.
func (c *Cluster) ensureNamespace(ctx context.Context, r Release) error {
	k := kindNamed("Namespace")
	ns, err := c.get(ctx, k, c.namespace)
	if err != nil || ns != nil && ns.GetDeletionTimestamp() == nil {
		return err
	}
	if ns != nil {
		if err := c.awaitGone(ctx, k, ns); err != nil {
			return err
		}
	}
	r.Values.Namespace.Create = true
	files, err := r.Render()
	if err != nil {
		return err
	}
	objects, err := Objects(files...)
	if err != nil {
		return err
	}
	for _, o := range objects {
		if o.GetKind() == k.name {
			_, err = c.apply(ctx, o)
		}
	}
	return err
}

// gone reports whether a DaemonSet and its pods are gone, but for pods of nodes
// that are skipped.
func (c *Cluster) gone(ctx context.Context, name string, skip []string) (bool, string, error) {
	set, err := c.get(ctx, kindNamed("DaemonSet"), name)
	if err != nil {
		return false, "", err
	}
	pods, err := c.pods(ctx)
	if err != nil {
		return false, "", err
	}
	var left []string
	skipped := 0
	for _, p := range pods {
		switch {
		case p.component() != name:
		case slices.Contains(skip, p.Spec.NodeName):
			skipped++
		default:
			left = append(left, p.Spec.NodeName)
		}
	}
	if len(left) > 0 {
		return false, "pods are left on " + strings.Join(left, ", "), nil
	}
	return set == nil || skipped > 0, "DaemonSet " + name + " is being removed", nil
}

// cleaned reports whether every node says that it is done, and tells of each
// one as it does.
func (c *Cluster) cleaned(ctx context.Context, o UninstallOptions, told map[string]bool) (bool, string, error) {
	set, err := c.get(ctx, kindNamed("DaemonSet"), cleanupName)
	if err != nil || set == nil {
		if err == nil {
			err = fmt.Errorf("somebody has removed DaemonSet %s: start the uninstall again", cleanupName)
			return false, err.Error(), nil
		}
		return false, "", err
	}
	pods, err := c.pods(ctx)
	if err != nil {
		return false, "", err
	}
	want, done := int(count(set, "status", "desiredNumberScheduled")), 0
	var left []string
	for _, p := range pods {
		switch node := p.Spec.NodeName; {
		case p.component() != cleanupName:
		case slices.Contains(o.SkipNodes, node):
			done++
		case p.ready():
			if done++; !told[node] {
				told[node] = true
				o.Say("node %s is clean", node)
			}
		default:
			left = append(left, node)
		}
	}
	// Of none there is nothing to wait for, when the controller has looked.
	looked := observed(set) && (want > 0 || set.GetGeneration() > 0)
	return looked && done >= want, fmt.Sprintf("%d of %d nodes are clean; not yet: %s", done, want, strings.Join(left, ", ")), nil
}

// removeObjects removes everything of the installation but definitions, the
// record and the namespace: what has its label, and what an installation
// without labels had by the same names.
func (c *Cluster) removeObjects(ctx context.Context, say func(string, ...any)) error {
	files, err := Release{Namespace: c.namespace, Values: Default()}.Render()
	if err != nil {
		return err
	}
	usual, err := Objects(files...)
	if err != nil {
		return err
	}
	for _, k := range slices.Backward(kinds) {
		if k.name == crdKind || k.name == "Namespace" {
			continue
		}
		names := map[string]bool{}
		there, err := c.list(ctx, k, partOf+"="+product)
		if err != nil {
			return err
		}
		for _, o := range there {
			names[o.GetName()] = true
		}
		for _, o := range usual {
			if o.GetKind() == k.name {
				names[o.GetName()] = true
			}
		}
		for _, name := range sortedKeys(names) {
			was, err := c.remove(ctx, k, name)
			if err != nil {
				return err
			}
			if was {
				say("%s %s removed", k.name, name)
			}
		}
	}
	return nil
}

// removeNamespace removes the namespace if the installation made it and nobody
// else has anything in it.
func (c *Cluster) removeNamespace(ctx context.Context, o UninstallOptions) (stay []string, err error) {
	k := kindNamed("Namespace")
	ns, err := c.get(ctx, k, c.namespace)
	if err != nil || ns == nil {
		return nil, err
	}
	if ns.GetLabels()[partOf] != product {
		return []string{"Namespace " + c.namespace + ": somebody else has made it"}, nil
	}
	foreign, err := c.foreign(ctx, o.SkipNodes)
	if err != nil {
		return nil, err
	}
	if len(foreign) > 0 {
		return []string{"Namespace " + c.namespace + ": there is something else in it: " + strings.Join(foreign, ", ")}, nil
	}
	if ns.GetDeletionTimestamp() == nil {
		if _, err := c.remove(ctx, k, c.namespace); err != nil {
			return nil, err
		}
	}
	if len(o.SkipNodes) > 0 {
		return []string{"Namespace " + c.namespace + ": ends when the pods of skipped nodes do"}, nil
	}
	err = c.until(ctx, "namespace "+c.namespace+" to end", func() (bool, string, error) {
		ns, err := c.get(ctx, k, c.namespace)
		return err == nil && ns == nil, "it is being removed", err
	})
	if err == nil {
		o.Say("Namespace %s removed", c.namespace)
	}
	return nil, err
}

// foreign names what is in the namespace and neither of the installation nor
// made by Kubernetes in every one.
func (c *Cluster) foreign(ctx context.Context, skip []string) (out []string, err error) {
	for _, k := range []kind{
		{"Pod", at("", "v1", "pods"), true}, {"PersistentVolumeClaim", at("", "v1", "persistentvolumeclaims"), true},
		kindNamed("ConfigMap"), kindNamed("Secret"), kindNamed("Service"), kindNamed("Deployment"), kindNamed("DaemonSet"),
		{"StatefulSet", at("apps", "v1", "statefulsets"), true}, {"Job", at("batch", "v1", "jobs"), true},
	} {
		objects, err := c.list(ctx, k, partOf+"!="+product)
		if err != nil {
			return nil, err
		}
		for _, o := range objects {
			helm := k.name == "Secret" && strings.HasPrefix(o.GetName(), "sh.helm.release.")
			if o.GetName() == "kube-root-ca.crt" || o.GetName() == recordName || helm || o.GetDeletionTimestamp() != nil {
				continue
			}
			out = append(out, k.name+" "+o.GetName())
		}
	}
	return out, nil
}

// labelled names nodes that the operator has labelled; nobody else takes that
// back.
func (c *Cluster) labelled(ctx context.Context) []string {
	nodes, err := c.nodes(ctx)
	if err != nil {
		return nil // it is only told of
	}
	var names []string
	for _, n := range nodes {
		if _, ok := n.Labels[kube.UnmanagedLabel]; ok {
			names = append(names, n.Name)
		}
	}
	if len(names) == 0 {
		return nil
	}
	return []string{fmt.Sprintf("the label %s on %s: kubectl label node %s %[1]s-", kube.UnmanagedLabel, strings.Join(names, ", "), strings.Join(names, " "))}
}
