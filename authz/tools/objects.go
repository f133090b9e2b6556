package tools

import (
	"net/netip"
	"slices"
	"strings"

	"portcullis/authz"
	"portcullis/authz/dialect"
	"portcullis/identity"
)

// pod is a Pod.
type pod struct {
	namespace, name string
	owner           authz.Ref
	labels          map[string]string
	podSpec
	ips      []netip.Addr
	finished bool
}

func (p *pod) title() string { return p.namespace + "/" + p.name }

// podSpec is what the specification of a pod says to policy.
type podSpec struct {
	serviceAccount string
	node           string
	hostNetwork    bool
	ports          []identity.NamedPort
}

// template is an object that makes pods.
type template struct {
	authz.Ref
	owner    authz.Ref
	labels   map[string]string // of its pods
	replicas int
	finished bool // it makes no more
	podSpec
}

func (t *template) title() string { return t.Namespace + "/" + t.Name }

// addresses are what an EndpointSlice, or Endpoints, says of a service.
type addresses struct {
	service string
	ips     []netip.Addr
}

// templateKinds are the kinds of objects that make pods.
var templateKinds = []string{"Deployment", "StatefulSet", "DaemonSet", "ReplicaSet", "ReplicationController", "Job", "CronJob"}

// text returns the string in a field, or "" where it is not there.
func text(v *dialect.Value, key string) string {
	if f := field(v, key); f != nil {
		s, _ := f.Text()
		return s
	}
	return ""
}

// field returns what a path of fields leads to, or nil.
func field(v *dialect.Value, path ...string) *dialect.Value {
	for _, key := range path {
		if v == nil {
			return nil
		}
		if !v.IsObject() {
			v.Each(func(string, *dialect.Value) {}) // refuses it
			return nil
		}
		v = v.Field(key)
	}
	return v
}

func flag(v *dialect.Value, key string) bool {
	if f := field(v, key); f != nil {
		b, _ := f.Boolean()
		return b
	}
	return false
}

func each(v *dialect.Value, item func(*dialect.Value)) {
	if v != nil {
		v.List(func(_ int, v *dialect.Value) { item(v) })
	}
}

// known is a map of labels that says that there are no others.
func known(labels map[string]string) map[string]string {
	if labels == nil {
		return map[string]string{}
	}
	return labels
}

// labelsOf returns a map of labels; nil if there are none.
func labelsOf(v *dialect.Value) map[string]string {
	var out map[string]string
	if v != nil {
		v.Each(func(key string, f *dialect.Value) {
			if s, ok := f.LabelValue(); ok && f.LabelKey(key) {
				if out == nil {
					out = map[string]string{}
				}
				out[key] = s
			}
		})
	}
	return out
}

// name parses the name of an object, and its namespace if it has one.
func name(v *dialect.Value, kind string, namespaced bool) authz.Ref {
	ref := authz.Ref{Kind: kind}
	meta := field(v, "metadata")
	if meta == nil {
		v.Refuse("field metadata is missing")
		return ref
	}
	switch f, made := field(meta, "name"), text(meta, "generateName"); {
	case f != nil:
		ref.Name, _ = f.ObjectName()
	case made != "": // the API server adds something
		ref.Name = strings.TrimRight(made, "-")
	default:
		meta.Require("name")
	}
	if namespaced {
		ref.Namespace = dialect.DefaultNamespace
		if f := field(meta, "namespace"); f != nil {
			if s, ok := f.Namespace(); ok {
				ref.Namespace = s
			}
		}
	}
	return ref
}

// owner returns the object that controls this one.
func owner(v *dialect.Value, namespace string) (out authz.Ref) {
	each(field(v, "metadata", "ownerReferences"), func(o *dialect.Value) {
		if flag(o, "controller") {
			out = authz.Ref{Kind: text(o, "kind"), Namespace: namespace, Name: text(o, "name")}
		}
	})
	return out
}

func address(v *dialect.Value) (netip.Addr, bool) {
	s, ok := v.Text()
	if !ok {
		return netip.Addr{}, false
	}
	ip, err := netip.ParseAddr(s)
	if err != nil || ip.Zone() != "" {
		v.Refuse("want an IP address, not %q", cut(s))
		return netip.Addr{}, false
	}
	return ip.Unmap(), true
}

func cut(s string) string {
	if len(s) > 80 {
		return s[:80] + "..."
	}
	return s
}

func parsePodSpec(v *dialect.Value) (s podSpec) {
	if v == nil {
		return s
	}
	s.serviceAccount = text(v, "serviceAccountName")
	if s.serviceAccount == "" {
		s.serviceAccount = text(v, "serviceAccount")
	}
	s.node = text(v, "nodeName")
	s.hostNetwork = flag(v, "hostNetwork")
	for _, list := range []string{"containers", "initContainers"} {
		each(field(v, list), func(c *dialect.Value) {
			each(field(c, "ports"), func(p *dialect.Value) {
				n := identity.NamedPort{Name: text(p, "name"), Protocol: text(p, "protocol")}
				if n.Protocol == "" {
					n.Protocol = "TCP"
				}
				if f := field(p, "containerPort"); f != nil {
					number, ok := f.Number()
					if ok && (number < 1 || number > 65535) {
						f.Refuse("want a port from 1 to 65535")
					}
					n.Port = uint16(number)
				}
				if n.Port != 0 && !slices.Contains(s.ports, n) {
					s.ports = append(s.ports, n)
				}
			})
		})
	}
	return s
}

func (r *Reader) pod(doc *dialect.Document) {
	root := doc.Root()
	ref := name(root, "Pod", true)
	p := &pod{namespace: ref.Namespace, name: ref.Name, owner: owner(root, ref.Namespace),
		labels: labelsOf(field(root, "metadata", "labels")), podSpec: parsePodSpec(field(root, "spec"))}
	if status := field(root, "status"); status != nil {
		phase := text(status, "phase")
		p.finished = phase == "Succeeded" || phase == "Failed"
		add := func(v *dialect.Value) {
			if ip, ok := address(v); ok && !slices.Contains(p.ips, ip) {
				p.ips = append(p.ips, ip)
			}
		}
		if f := field(status, "podIP"); f != nil && !empty(f) {
			add(f)
		}
		each(field(status, "podIPs"), func(v *dialect.Value) {
			if f := field(v, "ip"); f != nil && !empty(f) {
				add(f)
			}
		})
	}
	if r.object(doc, ref) {
		r.world.pods[ref] = p
	}
}

// empty reports whether a value is the empty string, as in the status of a pod
// that has not begun.
func empty(v *dialect.Value) bool {
	if !v.IsText() {
		return false
	}
	s, _ := v.Text()
	return s == ""
}

func (r *Reader) template(kind string, path ...string) func(*dialect.Document) {
	return func(doc *dialect.Document) {
		root := doc.Root()
		ref := name(root, kind, true)
		t := &template{Ref: ref, owner: owner(root, ref.Namespace), replicas: 1}
		if f := field(root, "spec", "replicas"); f != nil {
			t.replicas, _ = f.Number()
		}
		each(field(root, "status", "conditions"), func(c *dialect.Value) {
			if what := text(c, "type"); kind == "Job" && (what == "Complete" || what == "Failed") && text(c, "status") == "True" {
				t.finished = true
			}
		})
		at := field(root, path...)
		if at == nil {
			root.Refuse("field %s is missing", strings.Join(path, "."))
			return
		}
		t.labels = labelsOf(field(at, "metadata", "labels"))
		t.podSpec = parsePodSpec(field(at, "spec"))
		if r.object(doc, ref) {
			r.world.templates[ref] = t
		}
	}
}

func (r *Reader) namespace(doc *dialect.Document) {
	ref := name(doc.Root(), "Namespace", false)
	labels := known(labelsOf(field(doc.Root(), "metadata", "labels")))
	if r.object(doc, ref) {
		r.world.Namespaces[ref.Name] = labels
	}
}

func (r *Reader) node(doc *dialect.Document) {
	root := doc.Root()
	ref := name(root, "Node", false)
	n := Node{Name: ref.Name, Labels: known(labelsOf(field(root, "metadata", "labels")))}
	each(field(root, "status", "addresses"), func(v *dialect.Value) {
		if kind := text(v, "type"); kind == "InternalIP" || kind == "ExternalIP" {
			if f := field(v, "address"); f != nil {
				if ip, ok := address(f); ok {
					n.IPs = append(n.IPs, ip)
				}
			}
		}
	})
	var ranges []netip.Prefix
	add := func(v *dialect.Value) {
		if s, ok := v.Text(); ok {
			p, err := netip.ParsePrefix(s)
			if err != nil {
				v.Refuse("want a block of addresses, not %q", cut(s))
				return
			}
			if !slices.Contains(ranges, p.Masked()) {
				ranges = append(ranges, p.Masked())
			}
		}
	}
	if f := field(root, "spec", "podCIDR"); f != nil {
		add(f)
	}
	each(field(root, "spec", "podCIDRs"), add)
	if r.object(doc, ref) {
		r.world.Nodes = append(r.world.Nodes, n)
		r.world.Ranges = append(r.world.Ranges, ranges...)
	}
}

func (r *Reader) service(doc *dialect.Document) {
	root := doc.Root()
	ref := name(root, "Service", true)
	s := &Service{Backends: authz.Backends{Labels: labelsOf(field(root, "metadata", "labels")), Selector: labelsOf(field(root, "spec", "selector"))}}
	add := func(v *dialect.Value) {
		if !v.IsText() || !empty(v) {
			if v.IsText() {
				if name, _ := v.Text(); name == "None" {
					return // headless
				}
			}
			if ip, ok := address(v); ok && !slices.Contains(s.IPs, ip) {
				s.IPs = append(s.IPs, ip)
			}
		}
	}
	if f := field(root, "spec", "clusterIP"); f != nil {
		add(f)
	}
	each(field(root, "spec", "clusterIPs"), add)
	if s.external = text(field(root, "spec"), "type") == "ExternalName"; s.external {
		s.Selector, s.IPs = nil, nil // it is a name for another: the API server looks at nothing else of it
	}
	if r.object(doc, ref) {
		r.world.Services[authz.ServiceName{Namespace: ref.Namespace, Name: ref.Name}] = s
	}
}

// endpoints parses Endpoints, which have their service's name.
func (r *Reader) endpoints(doc *dialect.Document) {
	ref := name(doc.Root(), "Endpoints", true)
	e := &addresses{service: ref.Name}
	each(field(doc.Root(), "subsets"), func(v *dialect.Value) {
		each(field(v, "addresses"), func(v *dialect.Value) {
			if f := field(v, "ip"); f != nil {
				if ip, ok := address(f); ok {
					e.ips = append(e.ips, ip)
				}
			}
		})
	})
	if r.object(doc, ref) {
		r.world.slices[ref] = e
	}
}

func (r *Reader) slice(doc *dialect.Document) {
	root := doc.Root()
	ref := name(root, "EndpointSlice", true)
	e := &addresses{service: labelsOf(field(root, "metadata", "labels"))["kubernetes.io/service-name"]}
	named := text(root, "addressType") == "FQDN"
	each(field(root, "endpoints"), func(v *dialect.Value) {
		each(field(v, "addresses"), func(v *dialect.Value) {
			if named {
				return // no address: nobody is meant by it
			}
			if ip, ok := address(v); ok {
				e.ips = append(e.ips, ip)
			}
		})
	})
	if r.object(doc, ref) {
		r.world.slices[ref] = e
	}
}
