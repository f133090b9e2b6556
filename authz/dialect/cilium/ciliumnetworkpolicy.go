package cilium

import (
	"fmt"
	"regexp"
	"slices"
	"strconv"
	"strings"

	"portcullis/authz"
	"portcullis/authz/dialect"
	"portcullis/bpf/abi"
	"portcullis/identity"
)

// Kind is the kind of the policies that this package makes.
const Kind = "CiliumNetworkPolicy"

// Dialect is this package's, for dialect.ParseFile.
var Dialect = dialect.Dialect{APIVersion: "cilium.io/v2", Kind: Kind, Parse: Parse}

// Parse parses one CiliumNetworkPolicy. It returns the policy or every problem.
func Parse(doc *dialect.Document) ([]*authz.Policy, []authz.Problem) {
	p := doc.Policy(Kind, func(p *authz.Policy) dialect.Fields {
		if !doc.Root().Has("specs") {
			doc.Root().Require("spec")
		}
		return dialect.Fields{
			"spec": func(v *dialect.Value) {
				parser := parser{namespace: p.Namespace}
				parser.spec(v)
				p.Specs = []authz.Spec{parser.Spec}
			},
			"specs": dialect.NotYet("write a policy with one spec for each"),
		}
	})
	if bad := doc.Problems(); len(bad) > 0 {
		return nil, bad
	}
	return []*authz.Policy{p}, nil
}

type parser struct {
	authz.Spec
	namespace string
}

// notYet lists the fields that Cilium has and we do not obey yet, with what to
// do instead, by the object that they are in.
var notYet = struct{ spec, from, to, toPorts map[string]string }{
	spec: map[string]string{
		"nodeSelector":      "policies for nodes are not enforced: use endpointSelector, or remove the policy",
		"ingressDeny":       "write as ingress what is allowed; all else is denied",
		"egressDeny":        "write as egress what is allowed; all else is denied",
		"enableDefaultDeny": "remove it: a policy with ingress or egress rules denies what no rule allows",
		"labels":            "remove it: the policy is known by its name",
		"log":               "remove it",
	},
	from: map[string]string{
		"fromRequires":   "add the labels to each selector in fromEndpoints",
		"fromCIDR":       "select peers by fromEndpoints",
		"fromCIDRSet":    "select peers by fromEndpoints",
		"fromEntities":   "select peers by fromEndpoints; for everybody leave the peers out and name toPorts",
		"fromGroups":     "select peers by fromEndpoints",
		"fromNodes":      "select peers by fromEndpoints",
		"icmps":          "write a rule without toPorts to allow ICMP with all else from its peers",
		"authentication": "remove it: peers are known by the agent's --evidence for all rules alike",
	},
	to: map[string]string{
		"toRequires":     "add the labels to each selector in toEndpoints",
		"toCIDR":         "select peers by toEndpoints; for everybody leave the peers out and name toPorts",
		"toCIDRSet":      "select peers by toEndpoints; for everybody leave the peers out and name toPorts",
		"toEntities":     "select peers by toEndpoints; for everybody leave the peers out and name toPorts",
		"toServices":     "select the service's workloads by toEndpoints",
		"toFQDNs":        "for everybody leave the peers out and name toPorts",
		"toGroups":       "select peers by toEndpoints; for everybody leave the peers out and name toPorts",
		"toNodes":        "select peers by toEndpoints; for everybody leave the peers out and name toPorts",
		"icmps":          "write a rule without toPorts to allow ICMP with all else to its peers",
		"authentication": "remove it: peers are known by the agent's --evidence for all rules alike",
	},
	toPorts: map[string]string{
		"rules":          "rules inside a protocol (L7) are not enforced; remove them to allow the whole port, or remove the port",
		"listener":       "remove it, to allow the whole port",
		"serverNames":    "remove it, to allow the whole port",
		"terminatingTLS": "remove it",
		"originatingTLS": "remove it",
	},
}

// with returns the fields that are parsed together with those that are not yet.
func with(fields dialect.Fields, notYet map[string]string) dialect.Fields {
	for k, instead := range notYet {
		fields[k] = dialect.NotYet(instead)
	}
	return fields
}

func (p *parser) spec(spec *dialect.Value) {
	p.Subject = authz.Selector{authz.InNamespace(p.namespace)}
	if !spec.Has("nodeSelector") {
		spec.Require("endpointSelector")
	}
	spec.Object(with(dialect.Fields{
		"description": func(v *dialect.Value) { v.Text() },
		"endpointSelector": func(v *dialect.Value) {
			s, _ := p.selector(v, true)
			p.Subject = append(p.Subject, s...)
		},
		// One rule or more, were it empty, puts the subject under policy.
		"ingress": func(v *dialect.Value) {
			v.List(func(i int, r *dialect.Value) { p.rule(abi.DirIngress, i, r) })
			p.DenyIngress = v.Len() > 0
		},
		"egress": func(v *dialect.Value) {
			v.List(func(i int, r *dialect.Value) { p.rule(abi.DirEgress, i, r) })
			p.DenyEgress = v.Len() > 0
		},
	}, notYet.spec))
}

func (p *parser) rule(dir abi.Direction, i int, v *dialect.Value) {
	r := authz.Rule{Direction: dir, Action: authz.Allow, AnyPort: true, Path: fmt.Sprintf("spec.%s[%d]", dir, i)}
	peers, refused := "fromEndpoints", notYet.from
	if dir == abi.DirEgress {
		peers, refused = "toEndpoints", notYet.to
	}
	v.Object(with(dialect.Fields{
		peers: func(f *dialect.Value) {
			f.List(func(_ int, peer *dialect.Value) { r.Peers = append(r.Peers, p.peer(peer)) })
		},
		"toPorts": func(f *dialect.Value) {
			f.List(func(_ int, ports *dialect.Value) {
				r.AnyPort = false
				r.Ports = append(r.Ports, toPorts(ports)...)
			})
		},
	}, refused))
	// Ports without peers: everybody, there. Neither: nobody.
	r.AnyPeer = !v.Has(peers) && !r.AnyPort
	p.Rules = append(p.Rules, r)
}

// peer parses an element of fromEndpoints or toEndpoints: without a word on
// namespaces, it means the policy's own.
func (p *parser) peer(v *dialect.Value) authz.Selector {
	s, named := p.selector(v, false)
	if !named {
		s = append(s, authz.InNamespace(p.namespace))
	}
	return s
}

// selector parses an endpoint selector. named tells that it speaks of
// namespaces.
func (p *parser) selector(v *dialect.Value, subject bool) (s authz.Selector, named bool) {
	v.LabelSelector(func(at *dialect.Value, r authz.Requirement) {
		key, ok := sourceless(r.Key, at)
		if !ok {
			return
		}
		r.Key = ""
		label, ofNamespace := strings.CutPrefix(key, namespaceLabels)
		switch {
		case key == identity.NamespaceLabel:
			r.Attribute, named = authz.Namespace, true
			if !p.namespaces(at, r, subject) {
				return
			}
		case ofNamespace:
			r.Attribute, r.Key, named = authz.NamespaceLabel, label, true
		case key == identity.ServiceAccountLabel:
			r.Attribute = authz.ServiceAccount
		case key == clusterLabel && r.Operator == authz.Exists:
			return // every workload is in a cluster
		case strings.HasPrefix(key, "io.cilium."), strings.HasPrefix(key, "io.kubernetes.pod."):
			// Cilium gives these a meaning; as a pod's label it would match nobody.
			dialect.NotYet(fmt.Sprintf("of Cilium's own labels only %s, %s and %s... are, and %s with Exists",
				identity.NamespaceLabel, identity.ServiceAccountLabel, namespaceLabels, clusterLabel))(at)
			return
		default:
			r.Attribute, r.Key = authz.PodLabel, key
		}
		if isLabel := r.Attribute == authz.PodLabel || r.Attribute == authz.NamespaceLabel; !isLabel || at.LabelKey(r.Key) {
			s = append(s, r)
		}
	})
	return s, named
}

// Cilium's labels for the namespace's labels, and for the cluster.
const (
	namespaceLabels = "io.cilium.k8s.namespace.labels."
	clusterLabel    = "io.cilium.k8s.policy.cluster"
)

// namespaces checks a requirement of the namespace's name.
func (p *parser) namespaces(at *dialect.Value, r authz.Requirement, subject bool) bool {
	for _, name := range r.Values {
		if !at.IsNamespace(name) {
			return false
		}
	}
	own := slices.Contains(r.Values, p.namespace)
	switch {
	case !subject, r.Operator == authz.In && own, r.Operator == authz.NotIn && !own, r.Operator == authz.Exists:
		return true
	}
	at.Refuse("a policy selects workloads of its own namespace, %s: remove the label, or give the policy another namespace", p.namespace)
	return false
}

// sourceless returns a label's key without its source; at is where it stands.
func sourceless(full string, at *dialect.Value) (string, bool) {
	source, key, found := strings.Cut(full, ":")
	switch {
	case !found:
		return full, true
	case source == "reserved":
		dialect.NotYet("reserved identities; select workloads by their labels")(at)
		return "", false
	case source != "k8s" && source != "any":
		at.Refuse("unknown source of a label: want k8s: or any:, or none")
		return "", false
	}
	return key, true
}

func toPorts(v *dialect.Value) (out []authz.PortRange) {
	v.Object(with(dialect.Fields{
		"ports": func(f *dialect.Value) {
			f.List(func(_ int, port *dialect.Value) { out = append(out, parsePort(port)...) })
			if f.Len() == 0 {
				f.Refuse("want one port or more; for every port leave out toPorts")
			}
		},
	}, notYet.toPorts))
	v.Require("ports")
	return out
}

var portNumber = regexp.MustCompile(`^[1-9][0-9]{0,4}$`)

var protocols = map[string][]uint8{
	"TCP": {authz.ProtoTCP}, "UDP": {authz.ProtoUDP}, "SCTP": {authz.ProtoSCTP},
	"ANY": anyProtocol, "": anyProtocol,
}

var anyProtocol = []uint8{authz.ProtoTCP, authz.ProtoUDP, authz.ProtoSCTP}

func parsePort(v *dialect.Value) (out []authz.PortRange) {
	port, name, end, protos := 0, "", (*dialect.Value)(nil), anyProtocol
	v.Object(dialect.Fields{
		"port": func(f *dialect.Value) {
			s, ok := f.Text()
			switch {
			case !ok:
			case s == "0":
				dialect.NotYet("every port of a protocol; leave out toPorts for every port, or name ports")(f)
			case portNumber.MatchString(s):
				if port, _ = strconv.Atoi(s); port > 65535 {
					f.Refuse("want a port from 1 to 65535")
				}
			default:
				// Cilium compares names without regard to case.
				if name = strings.ToLower(s); !dialect.IsPortName(name) {
					f.Refuse("want a number from 1 to 65535 in decimal, or the name of a container port (letters, digits and -, at most 15, one of them a letter)")
				}
			}
		},
		"endPort": func(f *dialect.Value) { end = f },
		"protocol": func(f *dialect.Value) {
			s, ok := f.Text()
			if !ok {
				return
			}
			if protos, ok = protocols[s]; !ok {
				dialect.NotYet("use TCP, UDP, SCTP or ANY, in capitals")(f)
			}
		},
	})
	v.Require("port")
	last := port
	if end != nil {
		switch n, ok := end.Number(); {
		case !ok || n == 0: // 0: no range
		case n > 65535:
			end.Refuse("want a port from 1 to 65535")
		case name != "":
			end.Refuse("a range begins with a number: write port as one, or remove endPort")
		case n < port:
			end.Refuse("the range ends before port, where it begins")
		default:
			last = n
		}
	}
	for _, proto := range protos {
		if name != "" {
			out = append(out, authz.PortNamed(proto, name))
			continue
		}
		out = append(out, authz.PortRange{Proto: proto, First: uint16(port), Last: uint16(last)})
	}
	return out
}
