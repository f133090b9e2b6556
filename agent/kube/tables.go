package kube

import (
	"fmt"
	"maps"
	"net/netip"
	"reflect"
	"slices"
	"strings"
	"time"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/api/meta"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"

	"portcullis/authz"
	"portcullis/identity"
)

// entry is an object as it came last, and what of it is in force.
type entry struct {
	good    *Object // nil: no version of it could be used
	refused string  // why the last one cannot; "": it is the good one
	uid     string  // of what is refused
}

// tables hold the last known of everything. They are the pure part of a Source,
// which guards them.
type tables struct {
	node     identity.NodeName
	nodes    map[string]Node
	departed []Range
	pods     map[string]*Pod
	objects  map[string]map[string]entry // by resource, by namespace/name
	refused  uint64                      // versions that were, since the start
}

func newTables(node identity.NodeName) *tables {
	t := &tables{node: node, nodes: map[string]Node{}, pods: map[string]*Pod{}, objects: map[string]map[string]entry{}}
	for _, r := range resources("") {
		t.objects[r.name()] = map[string]entry{}
	}
	return t
}

// converted is an object of one of the kinds, converted.
type converted struct {
	key    string
	node   *Node
	pod    *Pod
	object *Object
	ref    authz.Ref
	err    error  // why object cannot be used
	uid    string // of that object
}

// convert reads what a watch brings. It needs no lock.
func convert(r resource, obj any) (converted, error) {
	m, err := meta.Accessor(obj)
	if err != nil {
		return converted{}, fmt.Errorf("%s: an event without an object: %w", r.name(), err)
	}
	c := converted{key: m.GetNamespace() + "/" + m.GetName(), uid: string(m.GetUID())}
	switch o := obj.(type) {
	case *corev1.Node:
		n := toNode(o)
		c.node = &n
	case *corev1.Pod:
		if p, ok := toPod(o); ok {
			if r.only == "" { // of other nodes too
				p.IPs = podIPs(o)
			}
			c.pod = &p
		}
	case *corev1.Namespace:
		c.ref = authz.Ref{Kind: "Namespace", Name: o.Name}
		c.object, c.err = toNamespace(o)
	case *unstructured.Unstructured:
		c.ref = authz.Ref{Kind: r.kind, Namespace: o.GetNamespace(), Name: o.GetName()}
		if c.object, c.err = toObject(o); c.err == nil && c.object.Ref != c.ref {
			c.object, c.err = nil, fmt.Errorf("it is read as %s", c.object.Ref)
		}
	default:
		return converted{}, fmt.Errorf("%s: an event with an object of type %T", r.name(), obj)
	}
	return c, nil
}

// put takes an object up and reports whether that changes anything.
func (t *tables) put(r resource, c converted) bool {
	switch r.name() {
	case "nodes":
		old, there := t.nodes[c.key]
		if there && reflect.DeepEqual(old, *c.node) {
			return false
		}
		before := t.sortedNodes()
		t.nodes[c.key] = *c.node
		t.departed = depart(t.departed, before, t.sortedNodes())
		return true
	case "pods":
		old := t.pods[c.key]
		if c.pod == nil {
			delete(t.pods, c.key)
			return old != nil
		}
		if old != nil && reflect.DeepEqual(*old, *c.pod) {
			return false
		}
		t.pods[c.key] = c.pod
		return true
	}
	old := t.objects[r.name()][c.key]
	next := t.next(old, c)
	t.objects[r.name()][c.key] = next
	return next != old
}

// next: what cannot be used leaves the last version in force that could.
func (t *tables) next(old entry, c converted) entry {
	switch {
	case c.err != nil:
		if old.refused != c.err.Error() {
			t.refused++
		}
		return entry{good: old.good, refused: c.err.Error(), uid: c.uid}
	case old.good != nil && old.good.Source == c.object.Source:
		return entry{good: old.good}
	}
	return entry{good: c.object}
}

// drop forgets an object and reports whether that changes anything.
func (t *tables) drop(r resource, key string) (changed bool) {
	switch r.name() {
	case "nodes":
		before := t.sortedNodes()
		if _, changed = t.nodes[key]; changed {
			delete(t.nodes, key)
			t.departed = depart(t.departed, before, t.sortedNodes())
		}
	case "pods":
		_, changed = t.pods[key]
		delete(t.pods, key)
	default:
		_, changed = t.objects[r.name()][key]
		delete(t.objects[r.name()], key)
	}
	return changed
}

// replace makes a resource what a list says, and reports whether that changes
// anything.
func (t *tables) replace(r resource, all []converted) (changed bool) {
	listed := map[string]bool{}
	switch r.name() {
	case "nodes": // as one step, for what moves from one node to another has not departed
		before, former := t.sortedNodes(), t.nodes
		t.nodes = map[string]Node{}
		for _, c := range all {
			t.nodes[c.key] = *c.node
		}
		t.departed = depart(t.departed, before, t.sortedNodes())
		return !reflect.DeepEqual(former, t.nodes)
	case "pods":
		for _, c := range all {
			listed[c.key] = true
			changed = t.put(r, c) || changed
		}
		for key := range t.pods {
			if !listed[key] {
				changed = t.drop(r, key) || changed
			}
		}
		return changed
	}
	for _, c := range all {
		listed[c.key] = true
		changed = t.put(r, c) || changed
	}
	for key := range t.objects[r.name()] {
		if !listed[key] {
			changed = t.drop(r, key) || changed
		}
	}
	return changed
}

// count returns how many objects of a resource there are, and how many of them
// are refused.
func (t *tables) count(r resource) (n, refused int) {
	switch r.name() {
	case "nodes":
		return len(t.nodes), 0
	case "pods":
		return len(t.pods), 0
	}
	for _, e := range t.objects[r.name()] {
		if n++; e.refused != "" {
			refused++
		}
	}
	return n, refused
}

func (t *tables) sortedNodes() []Node {
	return slices.SortedFunc(maps.Values(t.nodes), func(a, b Node) int { return strings.Compare(string(a.Name), string(b.Name)) })
}

// picture returns what is known now.
func (t *tables) picture() *Picture {
	p := &Picture{Nodes: t.sortedNodes(), Departed: t.departed, Pods: make(map[identity.UID]*Pod, len(t.pods))}
	claims := map[identity.UID]int{}
	for _, pod := range t.pods {
		if pod.Node != t.node {
			p.addRemote(pod)
			continue
		}
		if pod.Static != (identity.UID{}) {
			claims[pod.Static]++
			p.Pods[pod.Static] = pod
		}
	}
	for uid, n := range claims {
		if n > 1 { // who of them it is, nobody knows: the annotation is anybody's to write
			delete(p.Pods, uid)
		}
	}
	for _, pod := range t.pods {
		if pod.Node != t.node {
			continue
		}
		p.Pods[pod.UID] = pod // goes before what somebody calls static
	}
	for _, r := range resources("") {
		entries := t.objects[r.name()]
		for _, key := range slices.Sorted(maps.Keys(entries)) {
			if e := entries[key]; e.good != nil {
				p.Objects = append(p.Objects, e.good)
			}
		}
	}
	p.Refused = t.refusals()
	return p
}

func (p *Picture) addRemote(pod *Pod) {
	for _, ip := range pod.IPs {
		if other := p.Remote[ip]; other != nil && other.Created > pod.Created {
			continue
		}
		if p.Remote == nil {
			p.Remote = map[netip.Addr]*Pod{}
		}
		p.Remote[ip] = pod
	}
}

// refusals returns what cannot be used, sorted.
func (t *tables) refusals() (out []Refused) {
	for _, r := range resources("") {
		for key, e := range t.objects[r.name()] {
			if e.refused != "" {
				out = append(out, Refused{Ref: refOf(r, key), APIVersion: r.at.GroupVersion().String(), UID: e.uid, Why: e.refused, Kept: e.good != nil})
			}
		}
	}
	slices.SortFunc(out, func(a, b Refused) int { return strings.Compare(a.String(), b.String()) })
	return out
}

func refOf(r resource, key string) authz.Ref {
	namespace, name, _ := strings.Cut(key, "/")
	kind := r.kind
	if kind == "" {
		kind = "Namespace"
	}
	return authz.Ref{Kind: kind, Namespace: namespace, Name: name}
}

// watchState is how a watch fares; see Watch.
type watchState struct {
	listed, missing bool
	absent          int // answers in a row that the resource does not exist
	heard           time.Time
	err             string
}
