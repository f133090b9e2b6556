package k8s

import (
	"fmt"

	"portcullis/authz"
	"portcullis/authz/dialect"
	"portcullis/bpf/abi"
)

// Kind is the kind of the policies that this package makes.
const Kind = "NetworkPolicy"

// Dialect is this package's, for dialect.ParseFile.
var Dialect = dialect.Dialect{APIVersion: "networking.k8s.io/v1", Kind: Kind, Parse: Parse}

// Parse parses one NetworkPolicy. It returns the policy or every problem.
func Parse(doc *dialect.Document) ([]*authz.Policy, []authz.Problem) {
	p := doc.Policy(Kind, func(p *authz.Policy) dialect.Fields {
		doc.Root().Require("spec")
		return dialect.Fields{"spec": func(v *dialect.Value) { (&parser{p}).spec(v) }}
	})
	if bad := doc.Problems(); len(bad) > 0 {
		return nil, bad
	}
	return []*authz.Policy{p}, nil
}

type parser struct{ *authz.Policy }

// noEgress says what to do about anything that speaks of egress.
var noEgress = dialect.NotYet("egress is not enforced: remove it, and write what must be limited as ingress of the other side")

func (p *parser) spec(spec *dialect.Value) {
	p.Subject = authz.Selector{authz.InNamespace(p.Namespace)}
	// Default of policyTypes: Ingress, and Egress if there are egress rules.
	p.DenyIngress = true
	spec.Object(dialect.Fields{
		"podSelector": func(v *dialect.Value) { p.Subject = append(p.Subject, labels(v, authz.Label)...) },
		"policyTypes": p.policyTypes,
		"ingress": func(v *dialect.Value) {
			v.List(func(i int, r *dialect.Value) { p.Rules = append(p.Rules, p.ingress(i, r)) })
		},
		"egress": func(v *dialect.Value) {
			if !v.List(func(int, *dialect.Value) {}) || v.Len() > 0 {
				noEgress(v)
			}
		},
	})
}

func (p *parser) policyTypes(v *dialect.Value) {
	ingress := v.Len() == 0 // empty is as if it were not there
	v.List(func(_ int, t *dialect.Value) {
		switch s, ok := t.Text(); {
		case !ok:
		case s == "Ingress":
			ingress = true
		case s == "Egress":
			noEgress(t)
		default:
			t.Refuse("want Ingress or Egress")
		}
	})
	p.DenyIngress = ingress
}

func (p *parser) ingress(i int, v *dialect.Value) authz.Rule {
	r := authz.Rule{
		Direction: abi.DirIngress, Action: authz.Allow, AnyPeer: true, AnyPort: true,
		Path: fmt.Sprintf("spec.ingress[%d]", i),
	}
	v.Object(dialect.Fields{
		"from": func(from *dialect.Value) {
			from.List(func(_ int, peer *dialect.Value) {
				// One peer or more: those, not everybody.
				r.AnyPeer = false
				r.Peers = append(r.Peers, p.peer(peer))
			})
		},
		"ports": func(ports *dialect.Value) {
			ports.List(func(_ int, port *dialect.Value) {
				r.AnyPort = false
				r.Ports = append(r.Ports, parsePort(port))
			})
		},
	})
	return r
}

// peer parses one element of from: pods of the policy's own namespace, or of
// the namespaces that are selected.
func (p *parser) peer(v *dialect.Value) authz.Selector {
	s := authz.Selector{authz.InNamespace(p.Namespace)}
	if v.Has("namespaceSelector") {
		s = authz.Selector{}
	}
	v.Object(dialect.Fields{
		"podSelector":       func(f *dialect.Value) { s = append(s, labels(f, authz.Label)...) },
		"namespaceSelector": func(f *dialect.Value) { s = append(s, labels(f, authz.NamespaceHasLabel)...) },
		"ipBlock":           dialect.NotYet("select peers by podSelector and namespaceSelector"),
	})
	if v.Len() == 0 {
		v.Refuse("want a podSelector, a namespaceSelector or both; for every peer leave out from")
	}
	return s
}

// labels parses a label selector into requirements.
func labels(v *dialect.Value, require func(key, value string) authz.Requirement) authz.Selector {
	var s authz.Selector
	v.LabelSelector(func(key string, f *dialect.Value) {
		if value, ok := f.LabelValue(); ok && f.LabelKey(key) {
			s = append(s, require(key, value))
		}
	})
	return s
}

func parsePort(v *dialect.Value) authz.PortRange {
	pr := authz.AllPorts(authz.ProtoTCP)
	v.Object(dialect.Fields{
		"protocol": func(f *dialect.Value) {
			switch s, ok := f.Text(); {
			case !ok:
			case s == "TCP":
				pr.Proto = authz.ProtoTCP
			case s == "UDP":
				pr.Proto = authz.ProtoUDP
			case s == "SCTP":
				dialect.NotYet("use TCP or UDP")(f)
			default:
				f.Refuse("want TCP or UDP, in capitals")
			}
		},
		"port": func(f *dialect.Value) {
			if f.IsText() {
				dialect.NotYet("ports by name; write the number, without quotes")(f)
				return
			}
			n, ok := f.Number()
			if ok && (n < 1 || n > 65535) {
				f.Refuse("want a port from 1 to 65535")
			}
			pr.First, pr.Last = uint16(n), uint16(n)
		},
		"endPort": dialect.NotYet("write an element for each port"),
	})
	return pr
}
