package cilium

import (
	"slices"
	"strings"

	"portcullis/authz"
	"portcullis/authz/dialect"
	"portcullis/bpf/abi"
)

// peers collects whom a rule names.
type peers struct {
	*parser
	dir    abi.Direction
	action authz.Action

	fieldsSeen []*dialect.Value // those that name peers
	selectors  []authz.PeerSelector
	everybody  bool
}

// fields are those of a rule that name peers.
func (p *peers) fields() dialect.Fields {
	prefix := "from"
	if p.dir == abi.DirEgress {
		prefix = "to"
	}
	fields := dialect.Fields{
		prefix + "Endpoints": p.each(p.endpoint),
		prefix + "CIDR":      p.each(p.cidr),
		prefix + "CIDRSet":   p.each(p.cidrRule),
		prefix + "Entities":  p.each(p.entity),
		prefix + "Nodes":     p.each(p.node),
		prefix + "Groups":    p.each(refuse("groups of other providers are not asked; write their blocks into " + prefix + "CIDRSet")),
		prefix + "Requires": func(v *dialect.Value) {
			v.List(func(int, *dialect.Value) {})
			if v.Len() > 0 {
				refuse("Cilium has dropped it; add the labels to each selector in " + prefix + "Endpoints")(v)
			}
		},
	}
	if p.dir == abi.DirEgress {
		fields["toServices"] = p.services
		fields["toFQDNs"] = p.fqdns
	}
	return fields
}

// each parses every element of a field that names peers.
func (p *peers) each(item func(*dialect.Value)) func(*dialect.Value) {
	return func(v *dialect.Value) {
		p.fieldsSeen = append(p.fieldsSeen, v)
		v.List(func(_ int, v *dialect.Value) { item(v) })
	}
}

// result returns whom the rule names. ports: it names ports or ICMP types.
func (p *peers) result(ports bool) (selectors []authz.PeerSelector, anyPeer bool) {
	var first *dialect.Value
	for _, f := range p.fieldsSeen {
		switch {
		case f.Len() == 0:
		case first != nil:
			f.Refuse("it cannot be combined with %s in one rule: write a rule for each", first.Key())
		default:
			first = f
		}
	}
	for _, f := range p.fieldsSeen {
		if f.IsList() && f.Len() == 0 && first != nil {
			// Cilium lets it keep the rule from naming anybody.
			f.Refuse("an empty list names nobody, beside %s: remove one of them", first.Key())
		}
	}
	switch {
	case p.everybody:
		return nil, true
	case len(p.fieldsSeen) == 0:
		// Ports without peers: everybody, there. Neither: nobody.
		return nil, ports
	}
	return p.selectors, false
}

func (p *peers) add(s ...authz.PeerSelector) { p.selectors = append(p.selectors, s...) }

// unbound are the entities that nothing on this node is known to be yet. An
// allow rule allows nobody by them.
var unbound = []string{"init", "ingress", "health", "kube-apiserver"}

// denyUnbound keeps a rule that denies from being taken where it could not
// find whom it names.
func (p *peers) denyUnbound(v *dialect.Value, names ...string) {
	if p.action != authz.Deny {
		return
	}
	for _, n := range names {
		switch {
		case slices.Contains(unbound, n):
			v.NotEnforced("who is %s is not known yet, so it cannot be denied; deny the nodes that it is on by host and remote-node, and its other addresses by CIDR", n)
		case n == "cluster":
			// An API server outside looks like world.
			v.NotEnforced("who is kube-apiserver, which cluster means too, is not known yet, so it cannot be denied; deny host, remote-node, and selectors of workloads (with io.kubernetes.pod.namespace Exists: all of them), and addresses of the API server outside by CIDR")
		default:
			continue
		}
		return
	}
}

// whole is every workload of the cluster.
var whole = authz.Selector{}

// entity parses an element of fromEntities or toEntities.
func (p *peers) entity(v *dialect.Value) {
	name, ok := v.Text()
	if !ok {
		return
	}
	p.denyUnbound(v, name)
	switch name {
	case "all":
		p.everybody = true
	case "none":
	case "cluster":
		p.add(authz.Entities{"host", "remote-node", "init", "ingress", "health", "unmanaged", "kube-apiserver"}, whole)
	case "world-ipv4", "world-ipv6":
		p.add(family(name))
	case "remote-node":
		// A node with an API server is a node.
		p.add(authz.Entities{"remote-node", "kube-apiserver"})
	case "world", "host", "init", "ingress", "unmanaged", "health", "kube-apiserver":
		p.add(authz.Entities{name})
	case "cluster-mesh":
		v.Refuse("not supported: there is one cluster; write cluster")
	default:
		v.Refuse("there is no such entity: want all, world, world-ipv4, world-ipv6, cluster, host, remote-node, kube-apiserver, init, ingress, unmanaged, health or none")
	}
}

// endpoint parses an element of fromEndpoints or toEndpoints.
func (p *peers) endpoint(v *dialect.Value) {
	s := parseEndpoints(v, p.namespace, false)
	if !s.reserved {
		// Who lacks a label meets NotIn and DoesNotExist. It is meant only where
		// the selector speaks of who is no workload: elsewhere it would let in
		// world for a namespace that it leaves out.
		s.named = nil
		if !s.namespaced && p.namespace != "" {
			s.workloads = append(s.workloads, authz.InNamespace(p.namespace))
		}
	}
	if !s.noWorkload {
		p.add(s.workloads)
	}
	if len(s.named) == 0 {
		return
	}
	var names []string
	for _, who := range s.named {
		switch who {
		case "world-ipv4", "world-ipv6":
			p.add(family(who))
		default:
			names = append(names, who)
		}
	}
	if len(names) > 0 {
		p.add(authz.Entities(names))
	}
	p.denyUnbound(v, s.named...)
}

// node parses an element of fromNodes or toNodes.
func (p *peers) node(v *dialect.Value) {
	p.add(authz.Nodes(nodeLabels(v, "node", "any")))
	if p.action == authz.Deny {
		v.NotEnforced("labels of nodes are not known yet, so they cannot be denied by them; deny host and remote-node, or addresses by CIDR")
	}
}

// services parses toServices.
func (p *peers) services(v *dialect.Value) {
	p.each(func(v *dialect.Value) {
		var s authz.Service
		namespace := func(v *dialect.Value) { s.Namespace, _ = v.Namespace() }
		v.Object(dialect.Fields{
			"k8sService": func(v *dialect.Value) {
				s.Namespace = p.namespace
				v.Object(dialect.Fields{"namespace": namespace, "serviceName": func(v *dialect.Value) { s.Name, _ = v.ObjectName() }})
				v.Require("serviceName")
				if s.Namespace == "" && !v.Has("namespace") {
					v.Refuse("field namespace is missing")
				}
			},
			"k8sServiceSelector": func(v *dialect.Value) {
				v.Object(dialect.Fields{"namespace": namespace, "selector": func(v *dialect.Value) {
					v.LabelSelector(func(at *dialect.Value, r authz.Requirement) {
						if at.LabelKey(r.Key) {
							r.Attribute = authz.ServiceLabel
							s.Labels = append(s.Labels, r)
						}
					})
				}})
				v.Require("selector")
			},
		})
		if v.IsObject() && v.Has("k8sService") == v.Has("k8sServiceSelector") {
			v.Refuse("want k8sService or k8sServiceSelector, one of them")
		}
		p.add(s)
	})(v)
	if p.action == authz.Deny {
		v.NotEnforced("what is behind a service may not be known, so it cannot be denied; deny the service's workloads by toEndpoints, or its addresses by toCIDR")
	}
}

// fqdns parses toFQDNs.
func (p *peers) fqdns(v *dialect.Value) {
	p.each(func(v *dialect.Value) {
		if n, ok := parseDNSName(v); ok {
			p.add(n)
		}
	})(v)
	v.NeedsProxy("write the addresses into toCIDR, or leave the peers out and name toPorts for everybody")
}

// parseDNSName parses an element of toFQDNs or of rules.dns.
func parseDNSName(v *dialect.Value) (n authz.DNSName, ok bool) {
	name := func(to *string, wild string) func(*dialect.Value) {
		return func(v *dialect.Value) {
			s, isText := v.Text()
			if isText && !isDNSName(s, wild) {
				v.Refuse("want a DNS name of letters, digits, -, _%s and single dots between them, at most 255", strings.Join(strings.Split(wild, ""), " "))
				return
			}
			*to, ok = strings.ToLower(strings.TrimSuffix(s, ".")), isText
		}
	}
	v.Object(dialect.Fields{"matchName": name(&n.Name, ""), "matchPattern": name(&n.Pattern, "*")})
	if v.IsObject() && v.Has("matchName") == v.Has("matchPattern") {
		v.Refuse("want matchName or matchPattern, one of them")
	}
	return n, ok && (n.Name == "") != (n.Pattern == "")
}

func isDNSName(s, wild string) bool {
	if len(s) > 255 || s == "" {
		return false
	}
	for label := range strings.SplitSeq(strings.TrimSuffix(s, "."), ".") {
		if label == "" || strings.Trim(strings.ToLower(label), "abcdefghijklmnopqrstuvwxyz0123456789-_"+wild) != "" {
			return false
		}
	}
	return true
}
