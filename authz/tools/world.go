package tools

import (
	"cmp"
	"fmt"
	"maps"
	"net/netip"
	"slices"
	"strings"

	"portcullis/authz"
	"portcullis/identity"
)

// TrustDomain is that of workloads which manifests speak of: these do not say.
const TrustDomain = "cluster.local"

// World is a cluster: its workloads, what policies can ask of them, and its
// policies. It is not to be changed once a Judge has it.
type World struct {
	// TrustDomain is the workloads'; empty: TrustDomain.
	TrustDomain string
	Files       []string // in the order in which they were read
	// Notes say what was left out or taken to be so, for people.
	Notes []string

	Namespaces map[string]map[string]string // labels; one that is missing: not known
	Nodes      []Node
	Services   map[authz.ServiceName]*Service
	Groups     []*authz.Group
	Policies   []Policy
	Workloads  []Workload // by Title

	// Ranges are the addresses that belong to workloads: one of them that no
	// workload has is nobody, and not world.
	Ranges []netip.Prefix

	pods      map[authz.Ref]*pod
	templates map[authz.Ref]*template
	slices    map[authz.Ref]*addresses // EndpointSlice and Endpoints
}

// Policy is a policy and the file that it stands in.
type Policy struct {
	*authz.Policy
	File string
}

// Workload is one workload: a pod, or a template that stands for pods.
type Workload struct {
	Title    string // "ns/name", unique
	Kind     string // Pod, or of the object that the template is in
	Identity identity.Identity
	IPs      []netip.Addr // the main one first
	// Ports are its containers', also those without a name.
	Ports []identity.NamedPort
	Node  string // empty: not known
	// Peer: its policies are not known here; it is only who others meet.
	Peer bool
}

// Node is a node of the cluster.
type Node struct {
	Name   string
	Labels map[string]string // nil: not known
	IPs    []netip.Addr
}

// Service is a service, and what stands behind it.
type Service struct {
	authz.Backends
	IPs []netip.Addr // its own

	external bool // it is a name for another: nobody is behind it
}

func newWorld() *World {
	return &World{
		Namespaces: map[string]map[string]string{}, Services: map[authz.ServiceName]*Service{},
		pods: map[authz.Ref]*pod{}, templates: map[authz.Ref]*template{}, slices: map[authz.Ref]*addresses{},
	}
}

func (w *World) note(format string, args ...any) {
	if s := fmt.Sprintf(format, args...); !slices.Contains(w.Notes, s) {
		w.Notes = append(w.Notes, s)
	}
}

// With returns the world as it is once somebody has applied what n holds: each
// object of n in the place of the one with its name, or beside the others.
func (w *World) With(n *World) *World {
	out := *w
	out.Files = append(slices.Clone(w.Files), n.Files...)
	out.Notes = append(slices.Clone(w.Notes), n.Notes...)
	out.Namespaces = merge(w.Namespaces, n.Namespaces)
	out.Services = merge(w.Services, n.Services)
	out.pods, out.templates, out.slices = merge(w.pods, n.pods), merge(w.templates, n.templates), merge(w.slices, n.slices)
	out.Policies = over(w.Policies, n.Policies, func(p Policy) authz.Ref { return p.Ref })
	out.Groups = over(w.Groups, n.Groups, func(g *authz.Group) authz.Ref { return g.Ref })
	out.Nodes = over(w.Nodes, n.Nodes, func(x Node) string { return x.Name })
	out.Ranges = append(slices.Clone(w.Ranges), n.Ranges...)
	fixed := slices.DeleteFunc(slices.Clone(w.Workloads), func(x Workload) bool { return w.made(x) })
	out.Workloads = fixed
	out.derive()
	return &out
}

// Without returns the world without its policies and groups.
func (w *World) Without() *World {
	out := *w
	out.Policies, out.Groups = nil, nil
	return &out
}

func merge[K comparable, V any](a, b map[K]V) map[K]V {
	out := maps.Clone(a)
	if out == nil {
		out = map[K]V{}
	}
	maps.Copy(out, b)
	return out
}

// over returns what is in a, but for what is in b by the same key, and b.
func over[T any, K comparable](a, b []T, key func(T) K) []T {
	replaced := map[K]bool{}
	for _, x := range b {
		replaced[key(x)] = true
	}
	return append(slices.DeleteFunc(slices.Clone(a), func(x T) bool { return replaced[key(x)] }), b...)
}

// made reports whether the workload comes from a manifest.
func (w *World) made(x Workload) bool {
	for _, kind := range append([]string{"Pod"}, templateKinds...) {
		if x.Kind == kind {
			return true
		}
	}
	return false
}

// derive makes workloads of pods and templates, and backends of slices.
func (w *World) derive() {
	live := w.podWorkloads()
	w.templateWorkloads(live)
	slices.SortFunc(w.Workloads, func(a, b Workload) int { return cmp.Compare(a.Title, b.Title) })
	slices.SortFunc(w.Policies, func(a, b Policy) int {
		return cmp.Or(cmp.Compare(a.Namespace, b.Namespace), cmp.Compare(a.Name, b.Name), cmp.Compare(a.Kind, b.Kind))
	})
	slices.SortFunc(w.Nodes, func(a, b Node) int { return cmp.Compare(a.Name, b.Name) })
	w.backends()
	w.unknownNamespaces()
	var policies []*authz.Policy
	for _, p := range w.Policies {
		policies = append(policies, p.Policy)
	}
	for _, s := range UnknownGroups(policies, func(name string) bool {
		return slices.ContainsFunc(w.Groups, func(g *authz.Group) bool { return g.Name == name })
	}) {
		w.note("%s", s)
	}
}

// podWorkloads adds a workload for each pod that runs, and returns the owners
// of those pods.
func (w *World) podWorkloads() map[authz.Ref]bool {
	owners := map[authz.Ref]bool{}
	finished := 0
	for _, ref := range sorted(w.pods) {
		p := w.pods[ref]
		if p.finished {
			finished++
			continue
		}
		for _, o := range w.owners(p) {
			owners[o] = true
		}
		if p.hostNetwork {
			w.note("pod %s uses its node's network: to others it is that node, and no policy selects it", p.title())
			continue
		}
		w.Workloads = append(w.Workloads, Workload{Title: p.title(), Kind: "Pod", Identity: w.identity(p.namespace, p.podSpec, p.labels),
			IPs: p.ips, Ports: p.ports, Node: p.node})
	}
	if finished > 0 {
		w.note("%d finished pods are left out", finished)
	}
	return owners
}

func (w *World) identity(namespace string, spec podSpec, labels map[string]string) identity.Identity {
	return identity.New(cmp.Or(w.TrustDomain, TrustDomain), namespace, cmp.Or(spec.serviceAccount, "default"), labels)
}

// owners returns the object that made the pod, and what made that.
func (w *World) owners(p *pod) (out []authz.Ref) {
	for o := p.owner; o.Name != ""; {
		out = append(out, o)
		t := w.templates[o]
		switch {
		case len(out) > 4: // the longest chain is two
			return out
		case t != nil:
			o = t.owner
		case o.Kind == "ReplicaSet" && p.labels["pod-template-hash"] != "":
			name, _ := strings.CutSuffix(o.Name, "-"+p.labels["pod-template-hash"])
			o = authz.Ref{Kind: "Deployment", Namespace: o.Namespace, Name: name}
		case o.Kind == "Job" && strings.Contains(o.Name, "-"):
			o = authz.Ref{Kind: "CronJob", Namespace: o.Namespace, Name: o.Name[:strings.LastIndexByte(o.Name, '-')]}
		default:
			return out
		}
	}
	return out
}

// templateWorkloads adds a workload for each template that has no pods here and
// that no other template stands for.
func (w *World) templateWorkloads(live map[authz.Ref]bool) {
	taken := map[string]int{}
	for _, x := range w.Workloads {
		taken[x.Title]++
	}
	var rest []*template
	for _, ref := range sorted(w.templates) {
		t := w.templates[ref]
		switch {
		case live[ref], w.templates[t.owner] != nil, t.finished:
		case t.replicas == 0:
			w.note("%s has no replicas: it is left out", ref)
		case t.hostNetwork:
			w.note("the pods of %s use their node's network: to others they are that node, and no policy selects them", ref)
		default:
			rest = append(rest, t)
			taken[t.title()]++
		}
	}
	for _, t := range rest {
		title := t.title()
		if taken[title] > 1 {
			title = t.Namespace + "/" + strings.ToLower(t.Kind) + "/" + t.Name
		}
		w.Workloads = append(w.Workloads, Workload{Title: title, Kind: t.Kind, Identity: w.identity(t.Namespace, t.podSpec, t.labels), Ports: t.ports})
	}
	if len(rest) > 0 {
		names := make([]string, len(rest))
		for i, t := range rest {
			names[i] = t.Ref.String()
		}
		w.note("no pods are given of %s: one workload without an address stands for the pods of each", list(names))
	}
}

// backends gives services without a selector the addresses of their slices.
func (w *World) backends() {
	merged := map[authz.ServiceName]*Service{}
	for at, s := range w.Services {
		copied := *s
		merged[at] = &copied
		if len(s.Selector) > 0 {
			continue
		}
		if copied.Blocks = nil; s.external {
			continue
		}
		for _, ref := range sorted(w.slices) {
			if e := w.slices[ref]; ref.Namespace == at.Namespace && e.service == at.Name {
				for _, ip := range e.ips {
					copied.Blocks = append(copied.Blocks, netip.PrefixFrom(ip, ip.BitLen()))
				}
			}
		}
	}
	w.Services = merged
}

// unknownNamespaces notes which namespaces policies might ask for labels that
// nobody has spoken of.
func (w *World) unknownNamespaces() {
	if !w.asksForNamespaceLabels() {
		return
	}
	var missing []string
	for _, x := range w.Workloads {
		if _, known := w.Namespaces[x.Identity.Namespace]; !known && !slices.Contains(missing, x.Identity.Namespace) {
			missing = append(missing, x.Identity.Namespace)
		}
	}
	if len(missing) > 0 {
		slices.Sort(missing)
		w.note("no Namespace object is given of %s: of its labels only the name is known, and what policies allow by others is not allowed", list(missing))
	}
}

// UnknownGroups says of each policy that names a group of addresses which is
// not known what that means, for people.
func UnknownGroups(policies []*authz.Policy, known func(name string) bool) (notes []string) {
	means := map[authz.Action]string{authz.Allow: "allows nobody by it", authz.Deny: "denies by it all of world"}
	for _, p := range policies {
		for name, action := range p.GroupNames() {
			s := fmt.Sprintf("%s names CiliumCIDRGroup %s, which is not there: until it is, the policy %s", p.Ref, name, means[action])
			if !known(name) && !slices.Contains(notes, s) {
				notes = append(notes, s)
			}
		}
	}
	return notes
}

func (w *World) asksForNamespaceLabels() bool {
	asks := func(s authz.Selector) bool {
		return slices.ContainsFunc(s, func(r authz.Requirement) bool {
			return r.Attribute == authz.NamespaceLabel && r.Key != "kubernetes.io/metadata.name"
		})
	}
	for spec := range w.specs() {
		if asks(spec.Subject) {
			return true
		}
		for _, r := range spec.Rules {
			if slices.ContainsFunc(r.Peers, func(p authz.PeerSelector) bool { s, ok := p.(authz.Selector); return ok && asks(s) }) {
				return true
			}
		}
	}
	return false
}

// specs yields those of every policy.
func (w *World) specs() func(func(*authz.Spec) bool) {
	return func(yield func(*authz.Spec) bool) {
		for _, p := range w.Policies {
			for i := range p.Specs {
				if !yield(&p.Specs[i]) {
					return
				}
			}
		}
	}
}

func sorted[V any](m map[authz.Ref]V) []authz.Ref {
	return slices.SortedFunc(maps.Keys(m), func(a, b authz.Ref) int {
		return cmp.Or(cmp.Compare(a.Namespace, b.Namespace), cmp.Compare(a.Name, b.Name), cmp.Compare(a.Kind, b.Kind))
	})
}

// list joins words for people, the first few of many.
func list(words []string) string {
	const most = 6
	if len(words) > most {
		return strings.Join(words[:most], ", ") + fmt.Sprintf(" and %d more", len(words)-most)
	}
	return strings.Join(words, ", ")
}
