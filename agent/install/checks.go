package install

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/netip"
	"regexp"
	"slices"
	"strconv"
	"strings"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/apimachinery/pkg/version"

	"portcullis/agent/kube"
	"portcullis/datapath/doctor"
)

// oldestKernel is the oldest that agents work on: 6.6, the first with tcx.
var oldestKernel = [2]int{6, 6}

// Checks looks at the cluster as its API server shows it, before anything is
// changed. What only a node itself can tell, `portcullis doctor` says there.
func (c *Cluster) Checks(ctx context.Context) ([]doctor.Check, error) {
	nodes, err := c.nodes(ctx)
	if err != nil {
		return nil, err
	}
	out := []doctor.Check{c.checkVersion(ctx), checkNodes(nodes), checkRanges(nodes), checkKernels(nodes)}
	engines, err := c.checkEngines(ctx)
	if err != nil {
		return nil, err
	}
	crds, err := c.checkCRDs(ctx)
	if err != nil {
		return nil, err
	}
	return append(out, engines, crds), nil
}

// some names a few of many.
func some(names []string) string {
	const few = 5
	if n := len(names) - few; n > 0 {
		return strings.Join(names[:few], ", ") + fmt.Sprintf(" and %d more", n)
	}
	return strings.Join(names, ", ")
}

// oldestServer is the oldest minor version of Kubernetes 1 that the manifests
// are written for; the chart says the same.
const oldestServer = 28

func (c *Cluster) checkVersion(ctx context.Context) doctor.Check {
	var v version.Info
	r, err := c.open(ctx, "/version", nil)
	if err == nil {
		err = json.NewDecoder(io.LimitReader(r, maxExec)).Decode(&v)
		r.Close()
	}
	return checkServer(v, err)
}

func checkServer(v version.Info, err error) doctor.Check {
	check := doctor.Check{Name: "kubernetes", Status: doctor.OK, What: v.GitVersion}
	major, errMajor := strconv.Atoi(v.Major)
	minor, errMinor := strconv.Atoi(strings.TrimRight(v.Minor, "+")) // of clouds: 28+
	switch {
	case errors.Join(err, errMajor, errMinor) != nil:
		check.Status, check.What = doctor.Warn, "the API server's version is not told"
		check.Why, check.Do = fmt.Sprintf("manifests and agents are of Kubernetes 1.%d or newer", oldestServer), "see `kubectl version`"
	case major < 1 || major == 1 && minor < oldestServer:
		check.Status = doctor.Fail
		check.Why, check.Do = fmt.Sprintf("manifests and agents are of Kubernetes 1.%d or newer", oldestServer), "upgrade the cluster"
	}
	return check
}

func checkNodes(nodes []corev1.Node) doctor.Check {
	check := doctor.Check{Name: "nodes", Status: doctor.OK}
	var other, away []string
	for _, n := range nodes {
		if os := n.Status.NodeInfo.OperatingSystem; os != "" && os != "linux" {
			other = append(other, n.Name)
		}
		if !slices.ContainsFunc(n.Status.Conditions, func(c corev1.NodeCondition) bool {
			return c.Type == corev1.NodeReady && c.Status == corev1.ConditionTrue
		}) {
			away = append(away, n.Name)
		}
	}
	check.What = fmt.Sprintf("%d nodes", len(nodes))
	switch {
	case len(nodes) == 0:
		check.Status, check.What = doctor.Warn, "the cluster has no nodes"
		check.Why, check.Do = "agents run on nodes", "add some; agents come by themselves"
	case len(other) > 0:
		check.Status, check.What = doctor.Warn, "not Linux: "+some(other)
		check.Why, check.Do = "no agent runs there, and packets of their pods are dropped where policies must know who sent them", "label them "+kube.UnmanagedLabel+"=true, and set agent.nodeSelector to kubernetes.io/os: linux"
	case len(away) > 0:
		check.Status, check.What = doctor.Warn, "not ready: "+some(away)
		check.Why, check.Do = "their agents come when they do, and are waited for", "mend them, or install without --wait"
	}
	return check
}

// checkRanges: agents know each other's pods by their nodes' ranges.
func checkRanges(nodes []corev1.Node) doctor.Check {
	check := doctor.Check{Name: "ranges", Status: doctor.OK}
	var without, wrong []string
	held := map[netip.Prefix]string{}
	for _, n := range nodes {
		ranges := n.Spec.PodCIDRs
		if len(ranges) == 0 && n.Spec.PodCIDR != "" {
			ranges = []string{n.Spec.PodCIDR}
		}
		if len(ranges) == 0 && n.Labels[kube.UnmanagedLabel] != "true" {
			without = append(without, n.Name)
		}
		for _, text := range ranges {
			p, err := netip.ParsePrefix(text)
			if err != nil {
				wrong = append(wrong, n.Name+": "+text)
				continue
			}
			for q, other := range held {
				if q.Overlaps(p) {
					wrong = append(wrong, fmt.Sprintf("%s of %s and %s of %s overlap", text, n.Name, q, other))
				}
			}
			held[p] = n.Name
		}
	}
	check.What = fmt.Sprintf("%d ranges of pods", len(held))
	switch {
	case len(wrong) > 0:
		check.Status, check.What = doctor.Fail, some(wrong)
		check.Why, check.Do = "the node that has an address's range is the authority on who holds it; of two there would be no one", "give nodes ranges that do not overlap (spec.podCIDRs)"
	case len(nodes) > 0 && len(without) == len(nodes):
		check.Status, check.What = doctor.Fail, "no node has spec.podCIDRs"
		check.Why = "the node that has an address's range is the authority on who holds it: a CNI that gives pods addresses from the whole network, as the AWS VPC CNI, Azure CNI and Calico's own IPAM do, does not fit yet"
		check.Do = "use a CNI with ranges of nodes, and kube-controller-manager --allocate-node-cidrs"
	case len(without) > 0:
		check.Status, check.What = doctor.Warn, "without spec.podCIDRs: "+some(without)
		check.Why, check.Do = "their agents wait for a range, and no pod starts there until they have one", "give them a range, or see why the controller manager has not"
	}
	return check
}

var release = regexp.MustCompile(`^([0-9]+)\.([0-9]+)`)

func checkKernels(nodes []corev1.Node) doctor.Check {
	check := doctor.Check{Name: "kernels", Status: doctor.OK}
	var old, left, unknown []string // left: old ones that are said to have no agent
	seen := map[string]bool{}
	for _, n := range nodes {
		running := n.Status.NodeInfo.KernelVersion
		m := release.FindStringSubmatch(running)
		if m == nil {
			unknown = append(unknown, n.Name)
			continue
		}
		seen[m[0]] = true
		major, _ := strconv.Atoi(m[1]) // of so many digits that it fails: 0, which is old
		minor, _ := strconv.Atoi(m[2])
		if major < oldestKernel[0] || major == oldestKernel[0] && minor < oldestKernel[1] {
			if n.Labels[kube.UnmanagedLabel] == "true" {
				left = append(left, n.Name+" ("+running+")")
				continue
			}
			old = append(old, n.Name+" ("+running+")")
		}
	}
	check.What = "Linux " + strings.Join(sortedKeys(seen), ", ")
	switch {
	case len(old) > 0:
		check.Status, check.What = doctor.Fail, fmt.Sprintf("older than Linux %d.%d: %s", oldestKernel[0], oldestKernel[1], some(old))
		check.Why, check.Do = "agents attach by tcx, and do not start without it; and no pod starts where the agent does not", "upgrade these nodes, or leave them out: agent.nodeSelector, and the label "+kube.UnmanagedLabel+"=true"
	case len(left) > 0:
		check.Status, check.What = doctor.Warn, fmt.Sprintf("older than Linux %d.%d, and labelled as unmanaged: %s", oldestKernel[0], oldestKernel[1], some(left))
		check.Why, check.Do = "an agent that comes there all the same does not start, and no pod does", "leave them out by agent.nodeSelector, if that is not done"
	case len(unknown) > 0:
		check.Status, check.What = doctor.Warn, "the kernel's version is not told: "+some(unknown)
		check.Why, check.Do = "agents need Linux 6.6 or newer", "run `portcullis doctor` there"
	}
	return check
}

// engines are other software that judges pods' packets, by labels of its pods.
var engines = map[string]string{
	"k8s-app=cilium": "Cilium", "k8s-app=calico-node": "Calico", "app=antrea": "Antrea", "k8s-app=kube-router": "kube-router", "k8s-app=aws-node": "the AWS VPC CNI",
}

func (c *Cluster) checkEngines(ctx context.Context) (doctor.Check, error) {
	check := doctor.Check{Name: "others", Status: doctor.OK, What: "no other software that judges pods' packets is known here"}
	var found []string
	for _, selector := range sortedKeys(engines) {
		// One is enough to know that it is there.
		l, err := c.dynamic.Resource(at("", "v1", "pods")).List(ctx, metav1.ListOptions{LabelSelector: selector, Limit: 1})
		if err != nil {
			return check, fmt.Errorf("list pods: %w", err)
		}
		if len(l.Items) > 0 {
			found = append(found, engines[selector])
		}
	}
	if len(found) > 0 {
		check.Status, check.What = doctor.Warn, strings.Join(found, ", ")+" in this cluster"
		check.Why = "if it enforces policies too, what either refuses is dropped; one with programs of its own on pods' devices (Cilium, Calico with eBPF) takes packets past the agents or them past it"
		check.Do = "switch its policies off, or its eBPF; `portcullis doctor` on a node names programs that stand in the way (docs/kubernetes.md)"
	}
	return check, nil
}

func (c *Cluster) checkCRDs(ctx context.Context) (doctor.Check, error) {
	check := doctor.Check{Name: "definitions", Status: doctor.OK}
	names, err := definitions()
	if err != nil {
		return check, err
	}
	var foreign, missing, odd []string
	for _, name := range names {
		o, err := c.get(ctx, kindNamed(crdKind), name)
		switch {
		case err != nil:
			return check, err
		case o == nil:
			missing = append(missing, name)
		case !ownCRD(o):
			foreign = append(foreign, name)
			if !serves(o, "v2") {
				odd = append(odd, name)
			}
		}
	}
	check.What = "of policies: the cluster has them"
	if len(missing) > 0 {
		check.What = "of policies: to be made: " + some(missing)
	}
	if len(foreign) > 0 {
		check.What += "; somebody else's, which stay: " + some(foreign)
	}
	if len(odd) > 0 {
		check.Status = doctor.Warn
		check.Why, check.Do = "agents read version v2, which is not served of "+some(odd), "upgrade whoever made them"
	}
	return check, nil
}

// serves reports whether a definition serves a version.
func serves(crd *unstructured.Unstructured, version string) bool {
	versions, _, _ := unstructured.NestedSlice(crd.Object, "spec", "versions")
	return slices.ContainsFunc(versions, func(v any) bool {
		m, ok := v.(map[string]any)
		return ok && m["name"] == version && m["served"] == true
	})
}
