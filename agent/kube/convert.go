package kube

import (
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"net/netip"
	"slices"
	"strings"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"

	"portcullis/authz"
	"portcullis/authz/dialect"
	"portcullis/authz/dialect/cilium"
	"portcullis/authz/dialect/k8s"
	"portcullis/identity"
)

// notOfIdentity are labels that change with every rollout or name one pod: an
// identity that had them would be a new one each time. A policy that speaks of
// one is refused.
var notOfIdentity = []string{
	"pod-template-hash", "controller-revision-hash", "pod-template-generation",
	"controller-uid", "batch.kubernetes.io/controller-uid",
}

// maxAddresses bounds what a node has of its own. Its kubelet writes them, and
// each is a range that all agents know, also when the node is gone.
const (
	maxAddresses = 16
	maxDeparted  = 64 // that it had before
)

// toNode reads a Node. What cannot be used is left out and told: an address that
// nobody claims is at worst unbound.
func toNode(n *corev1.Node) Node {
	out := Node{Name: identity.NodeName(n.Name), UID: string(n.UID), Unmanaged: n.Labels[UnmanagedLabel] == "true"}
	var problems []string
	cidrs := n.Spec.PodCIDRs
	if len(cidrs) == 0 && n.Spec.PodCIDR != "" {
		cidrs = []string{n.Spec.PodCIDR}
	}
	for _, text := range cidrs {
		p, err := netip.ParsePrefix(text)
		if err != nil || p.Bits() == 0 || p.Addr().Is4In6() {
			problems = append(problems, fmt.Sprintf("podCIDR %q is not an address prefix", text))
			continue
		}
		out.Ranges = append(out.Ranges, p.Masked())
	}
	for _, a := range n.Status.Addresses {
		if a.Type != corev1.NodeInternalIP {
			continue
		}
		ip, err := netip.ParseAddr(a.Address)
		if err != nil || ip.Zone() != "" || ip.IsUnspecified() || ip.IsLoopback() || ip.IsMulticast() {
			problems = append(problems, fmt.Sprintf("InternalIP %q is not a unicast address", a.Address))
			continue
		}
		switch ip = ip.Unmap(); {
		case slices.Contains(out.Addresses, ip):
		case len(out.Addresses) == maxAddresses:
			problems = append(problems, fmt.Sprintf("more than %d InternalIPs", maxAddresses))
		default:
			out.Addresses = append(out.Addresses, ip)
		}
	}
	if len(out.Addresses) > 0 {
		out.Agent = netip.AddrPortFrom(out.Addresses[0], AgentPort)
	}
	if text := n.Annotations[AgentAnnotation]; text != "" {
		// Not elsewhere: the address is one that the node speaks for.
		at, err := netip.ParseAddrPort(text)
		if err != nil || at.Port() == 0 || !slices.Contains(out.Addresses, at.Addr().Unmap()) {
			problems = append(problems, fmt.Sprintf("annotation %s: %q is not ADDRESS:PORT with one of the node's InternalIPs", AgentAnnotation, text))
		} else {
			out.Agent = netip.AddrPortFrom(at.Addr().Unmap(), at.Port())
		}
	}
	out.Problem = strings.Join(problems, "; ")
	return out
}

// claims are the prefixes that a node says are its own.
func (n Node) claims() []netip.Prefix {
	out := slices.Clone(n.Ranges)
	for _, ip := range n.Addresses {
		out = append(out, netip.PrefixFrom(ip, ip.BitLen()))
	}
	return out
}

// toPod reads a Pod. false: it has no UID that could be registered, or no
// network of its own.
func toPod(p *corev1.Pod) (Pod, bool) {
	uid, err := identity.ParseUID(string(p.UID))
	if err != nil || p.Spec.HostNetwork {
		return Pod{}, false
	}
	out := Pod{UID: uid, Namespace: p.Namespace, Name: p.Name, ServiceAccount: p.Spec.ServiceAccountName, Labels: securityLabels(p.Labels), Node: identity.NodeName(p.Spec.NodeName), Owner: ownerOf(p), Created: p.CreationTimestamp.Unix()}
	if out.ServiceAccount == "" {
		out.ServiceAccount = "default"
	}
	// The object of a static pod is a mirror, with a UID of its own. Anybody may
	// write the annotation into a pod; the kubelet also names its node the owner,
	// which not everybody can.
	if hash, ok := p.Annotations[corev1.MirrorPodAnnotationKey]; ok && ownedByNode(p) {
		if static, err := identity.ParseUID(hash); err == nil {
			out.Static = static
		}
	}
	add := func(c *corev1.Container) {
		for _, port := range c.Ports {
			protocol := string(port.Protocol)
			if protocol == "" {
				protocol = "TCP"
			}
			n := identity.NamedPort{Name: port.Name, Port: uint16(port.ContainerPort), Protocol: protocol}
			if port.Name != "" && port.ContainerPort > 0 && port.ContainerPort <= 65535 && !slices.Contains(out.Ports, n) {
				out.Ports = append(out.Ports, n)
			}
		}
	}
	for i := range p.Spec.Containers {
		add(&p.Spec.Containers[i])
	}
	for i := range p.Spec.InitContainers {
		if c := &p.Spec.InitContainers[i]; c.RestartPolicy != nil && *c.RestartPolicy == corev1.ContainerRestartPolicyAlways {
			add(c)
		}
	}
	return out, true
}

// ownerOf returns what made a pod: its controller; and where that was made for
// another in turn, which its name and the pod's labels tell, the other.
func ownerOf(p *corev1.Pod) Owner {
	c := metav1.GetControllerOf(p)
	if c == nil {
		return Owner{}
	}
	switch c.Kind {
	case "Node":
		return Owner{} // a static pod: its kubelet's, and of no other
	case "ReplicaSet":
		if hash := p.Labels["pod-template-hash"]; hash != "" {
			if name, ok := strings.CutSuffix(c.Name, "-"+hash); ok && name != "" {
				return Owner{Kind: "Deployment", Name: name}
			}
		}
	case "Job": // of a CronJob: NAME-MINUTES, those of the Unix time at which it was due
		if i := strings.LastIndexByte(c.Name, '-'); i > 0 && len(c.Name)-i-1 >= 8 && strings.Trim(c.Name[i+1:], "0123456789") == "" {
			return Owner{Kind: "CronJob", Name: c.Name[:i]}
		}
	}
	return Owner{Kind: c.Kind, Name: c.Name}
}

func ownedByNode(p *corev1.Pod) bool {
	return slices.ContainsFunc(p.OwnerReferences, func(o metav1.OwnerReference) bool {
		return o.APIVersion == "v1" && o.Kind == "Node" && o.Name == p.Spec.NodeName
	})
}

// podIPs returns what a pod says of its addresses: nothing if it has ended, for
// then they may be another's.
func podIPs(p *corev1.Pod) (ips []netip.Addr) {
	if p.Status.Phase == corev1.PodSucceeded || p.Status.Phase == corev1.PodFailed {
		return nil
	}
	for _, i := range p.Status.PodIPs {
		if ip, err := netip.ParseAddr(i.IP); err == nil {
			ips = append(ips, ip.Unmap())
		}
	}
	return ips
}

func securityLabels(all map[string]string) map[string]string {
	out := maps.Clone(all)
	for _, key := range notOfIdentity {
		delete(out, key)
	}
	return out
}

// toNamespace reads a Namespace: its labels.
func toNamespace(n *corev1.Namespace) (*Object, error) {
	var doc struct {
		APIVersion string `json:"apiVersion"`
		Kind       string `json:"kind"`
		Metadata   struct {
			Name   string            `json:"name"`
			UID    string            `json:"uid,omitempty"`
			Labels map[string]string `json:"labels,omitempty"`
		} `json:"metadata"`
	}
	doc.APIVersion, doc.Kind = "v1", k8s.NamespaceKind
	doc.Metadata.Name, doc.Metadata.UID, doc.Metadata.Labels = n.Name, string(n.UID), n.Labels
	source, err := json.Marshal(doc)
	if err != nil {
		return nil, err
	}
	return parse(string(source))
}

// toObject reads a policy, or what policies speak of.
func toObject(u *unstructured.Unstructured) (*Object, error) {
	if u.GetKind() == k8s.SliceKind {
		return toSlice(u.Object)
	}
	content := maps.Clone(u.Object)
	if u.GetKind() != "Service" { // whose status has addresses of load balancers
		delete(content, "status")
	}
	if meta, ok := content["metadata"].(map[string]any); ok {
		meta = maps.Clone(meta)
		// What changes without a change of meaning. A field that is not known
		// here stays, and is refused if it is not known there either.
		for _, k := range []string{"managedFields", "resourceVersion", "generation", "creationTimestamp", "annotations", "selfLink",
			"ownerReferences", "finalizers", "deletionTimestamp", "deletionGracePeriodSeconds", "generateName"} {
			delete(meta, k)
		}
		content["metadata"] = meta
	}
	source, err := json.Marshal(content)
	if err != nil {
		return nil, err
	}
	return parse(string(source))
}

// dialects are the parsers of what is watched.
func dialects() []dialect.Dialect {
	return append(cilium.Dialects(), k8s.Dialect, k8s.Namespaces, k8s.Services, k8s.Slices)
}

// parse reads one object. Its error names every field that cannot be used.
func parse(source string) (o *Object, err error) {
	// Whoever may write a policy could else end every agent of the cluster, and
	// again whenever it starts. One that a parser fails at is refused.
	defer func() {
		if what := recover(); what != nil {
			o, err = nil, fmt.Errorf("its parser failed: %v", what)
		}
	}()
	said, err := dialect.ParseFile("kubernetes", []byte(source), dialects()...)
	if err != nil {
		return nil, problemText(err)
	}
	o = &Object{Source: source}
	switch {
	case len(said.Policies) == 1 && len(said.Refs()) == 1:
		o.Policy = said.Policies[0]
		o.Ref = o.Policy.Ref
		// Who enforces obeys all of a policy or none of it.
		if err := o.Policy.Enforceable(); err != nil {
			return nil, problemText(err)
		}
		for _, key := range notOfIdentity {
			if strings.Contains(source, `"`+key+`"`) || strings.Contains(source, `:`+key+`"`) || strings.Contains(source, `.`+key+`"`) {
				return nil, fmt.Errorf("the label %s is not part of an identity, so no policy can select by it", key)
			}
		}
	case len(said.Groups) == 1 && len(said.Refs()) == 1:
		o.Group = said.Groups[0]
		o.Ref = o.Group.Ref
	case len(said.Namespaces) == 1 && len(said.Refs()) == 1:
		o.Namespace = said.Namespaces[0]
		o.Ref = o.Namespace.Ref
	case len(said.Services) == 1 && len(said.Refs()) == 1:
		o.Service = said.Services[0]
		o.Ref = o.Service.Ref
	case len(said.Slices) == 1 && len(said.Refs()) == 1:
		o.Slice = said.Slices[0]
		o.Ref = o.Slice.Ref
	default:
		return nil, fmt.Errorf("the object says %d things instead of one", len(said.Refs()))
	}
	return o, nil
}

// problemText leaves out what speaks of files.
func problemText(err error) error {
	var problems authz.Problems
	if !errors.As(err, &problems) {
		return err
	}
	var lines []string
	for _, p := range problems {
		text := p.Message
		if p.Path != "" {
			text = p.Path + ": " + text
		}
		lines = append(lines, text)
	}
	return errors.New(strings.Join(lines, "; "))
}

// depart returns the ranges that no node has any more: those that stood, and
// those of nodes that went or gave some up. What a node claims now is left out.
//
// They stay known, without an owner (I5): that a node is gone says nothing of
// who has its IPs, so they are neither believed nor taken for the world.
func depart(departed []Range, before, after []Node) []Range {
	claimed := map[netip.Prefix]bool{}
	for _, n := range after {
		for _, p := range n.claims() {
			claimed[p] = true
		}
	}
	was := map[netip.Prefix]identity.NodeName{}
	for _, r := range departed {
		was[r.Prefix] = r.Node
	}
	for _, n := range before {
		for _, p := range n.claims() {
			was[p] = n.Name
		}
	}
	var out []Range
	for p, n := range was {
		if !covered(claimed, p) {
			out = append(out, Range{Prefix: p, Node: n})
		}
	}
	slices.SortFunc(out, func(a, b Range) int { return a.Prefix.Compare(b.Prefix) })
	// Of one node's own addresses not more than so many: whoever writes others
	// into its object all day fills no map with them.
	of := map[identity.NodeName]int{}
	return slices.DeleteFunc(out, func(r Range) bool {
		if !r.Prefix.IsSingleIP() {
			return false
		}
		of[r.Node]++
		return of[r.Node] > maxDeparted
	})
}

// covered reports whether one of the prefixes contains all of p.
func covered(prefixes map[netip.Prefix]bool, p netip.Prefix) bool {
	for bits := p.Bits(); bits >= 0; bits-- {
		if q, err := p.Addr().Prefix(bits); err == nil && prefixes[q] {
			return true
		}
	}
	return false
}
