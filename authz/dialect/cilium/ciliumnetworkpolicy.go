package cilium

import (
	"fmt"
	"regexp"
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
			"spec":  func(v *dialect.Value) { (&parser{p}).spec(v) },
			"specs": dialect.NotYet("write a policy with one spec for each"),
		}
	})
	if bad := doc.Problems(); len(bad) > 0 {
		return nil, bad
	}
	return []*authz.Policy{p}, nil
}

type parser struct{ *authz.Policy }

// notYet lists the fields that Cilium has and we do not obey yet, with what to
// do instead, by the object that they are in.
var notYet = struct{ spec, rule, toPorts, port map[string]string }{
	spec: map[string]string{
		"nodeSelector":      "policies for nodes are not enforced: use endpointSelector, or remove the policy",
		"ingressDeny":       "write as ingress what is allowed; all else is denied",
		"egress":            "egress is not enforced: remove it, and write what must be limited as ingress of the other side",
		"egressDeny":        "egress is not enforced: remove it, and write what must be limited as ingress of the other side",
		"enableDefaultDeny": "remove it: a policy with ingress rules denies what no rule allows",
		"labels":            "remove it: the policy is known by its name",
		"log":               "remove it",
	},
	rule: map[string]string{
		"fromRequires":   "add the labels to each selector in fromEndpoints",
		"fromCIDR":       "select peers by fromEndpoints",
		"fromCIDRSet":    "select peers by fromEndpoints",
		"fromEntities":   "select peers by fromEndpoints; for everybody leave the peers out and name toPorts",
		"fromGroups":     "select peers by fromEndpoints",
		"fromNodes":      "select peers by fromEndpoints",
		"icmps":          "write a rule without toPorts to allow ICMP with all else from its peers",
		"authentication": "remove it: peers are known by the agent's --evidence for all rules alike",
	},
	toPorts: map[string]string{
		"rules":          "rules inside a protocol (L7) are not enforced; remove them to allow the whole port, or remove the port",
		"listener":       "remove it, to allow the whole port",
		"serverNames":    "remove it, to allow the whole port",
		"terminatingTLS": "remove it",
		"originatingTLS": "remove it",
	},
	port: map[string]string{
		"endPort": "write an element for each port",
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
	p.Subject = authz.Selector{authz.InNamespace(p.Namespace)}
	if !spec.Has("nodeSelector") {
		spec.Require("endpointSelector")
	}
	spec.Object(with(dialect.Fields{
		"description": func(v *dialect.Value) { v.Text() },
		"endpointSelector": func(v *dialect.Value) {
			s, _ := p.selector(v, true)
			p.Subject = append(p.Subject, s...)
		},
		"ingress": func(v *dialect.Value) {
			v.List(func(i int, r *dialect.Value) { p.ingress(i, r) })
			// One rule or more, were it empty, puts the subject under policy.
			p.DenyIngress = v.Len() > 0
		},
	}, notYet.spec))
}

func (p *parser) ingress(i int, v *dialect.Value) {
	r := authz.Rule{
		Direction: abi.DirIngress, Action: authz.Allow, AnyPort: true,
		Path: fmt.Sprintf("spec.ingress[%d]", i),
	}
	v.Object(with(dialect.Fields{
		"fromEndpoints": func(f *dialect.Value) {
			f.List(func(_ int, peer *dialect.Value) { r.Peers = append(r.Peers, p.peer(peer)) })
		},
		"toPorts": func(f *dialect.Value) {
			f.List(func(_ int, ports *dialect.Value) {
				r.AnyPort = false
				r.Ports = append(r.Ports, toPorts(ports)...)
			})
		},
	}, notYet.rule))
	// Ports without peers: everybody, there. Neither: nobody.
	r.AnyPeer = !v.Has("fromEndpoints") && !r.AnyPort
	p.Rules = append(p.Rules, r)
}

// peer parses an element of fromEndpoints: without a word on namespaces, it
// means the policy's own.
func (p *parser) peer(v *dialect.Value) authz.Selector {
	s, named := p.selector(v, false)
	if !named {
		s = append(s, authz.InNamespace(p.Namespace))
	}
	return s
}

// selector parses an endpoint selector. named tells that it names a namespace.
func (p *parser) selector(v *dialect.Value, subject bool) (s authz.Selector, named bool) {
	v.LabelSelector(func(full string, f *dialect.Value) {
		key, ok := p.key(full, f)
		if !ok {
			return
		}
		switch key {
		case identity.NamespaceLabel:
			named = true
			ns, ok := f.Namespace()
			if ok && subject && ns != p.Namespace {
				f.Refuse("a policy selects workloads of its own namespace, %s: remove the label, or put the policy into %s", p.Namespace, ns)
			}
			if ok {
				s = append(s, authz.InNamespace(ns))
			}
		case identity.ServiceAccountLabel:
			if sa, ok := f.LabelValue(); ok {
				s = append(s, authz.HasServiceAccount(sa))
			}
		default:
			if value, ok := f.LabelValue(); ok && f.LabelKey(key) {
				s = append(s, authz.Label(key, value))
			}
		}
	})
	return s, named
}

// key returns a label's key without its source; v is the label's value.
func (p *parser) key(full string, v *dialect.Value) (string, bool) {
	source, key, found := strings.Cut(full, ":")
	if !found {
		source, key = "any", full
	}
	switch {
	case source == "reserved":
		dialect.NotYet("reserved identities; select workloads by their labels")(v)
		return "", false
	case source != "k8s" && source != "any":
		v.Refuse("unknown source of a label: want k8s: or any:, or none")
		return "", false
	case key == identity.NamespaceLabel || key == identity.ServiceAccountLabel:
		return key, true
	case strings.HasPrefix(key, "io.cilium."), strings.HasPrefix(key, "io.kubernetes.pod."):
		// Cilium gives these a meaning; as a pod's label it would match nobody.
		dialect.NotYet("of Cilium's own labels only " + identity.NamespaceLabel + " and " + identity.ServiceAccountLabel + " are")(v)
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

func parsePort(v *dialect.Value) []authz.PortRange {
	port := 0
	protos := []uint8{authz.ProtoTCP, authz.ProtoUDP, authz.ProtoSCTP}
	v.Object(with(dialect.Fields{
		"port": func(f *dialect.Value) {
			s, ok := f.Text()
			if !ok {
				return
			}
			if s == "0" {
				dialect.NotYet("every port of a protocol; leave out toPorts for every port, or name ports")(f)
				return
			}
			if portNumber.MatchString(s) {
				port, _ = strconv.Atoi(s)
			}
			switch {
			case port > 65535:
				f.Refuse("want a port from 1 to 65535")
			case port == 0:
				dialect.NotYet("ports by name; write the number, in decimal")(f)
			}
		},
		"protocol": func(f *dialect.Value) {
			switch s, ok := f.Text(); {
			case !ok:
			case s == "TCP":
				protos = []uint8{authz.ProtoTCP}
			case s == "UDP":
				protos = []uint8{authz.ProtoUDP}
			case s == "ANY", s == "":
			default:
				dialect.NotYet("use TCP, UDP or ANY, in capitals")(f)
			}
		},
	}, notYet.port))
	v.Require("port")
	var out []authz.PortRange
	for _, proto := range protos {
		out = append(out, authz.Port(proto, uint16(port)))
	}
	return out
}
