package k8s

import (
	"fmt"
	"slices"

	"portcullis/authz"
	"portcullis/authz/dialect"
	"portcullis/bpf/abi"
)

// Kind is the kind of the policies that this package makes.
const Kind = "NetworkPolicy"

// Dialect is this package's, for dialect.ParseFile.
var Dialect = dialect.Dialect{APIVersion: "networking.k8s.io/v1", Kind: Kind, Parse: Parse}

// Parse parses one NetworkPolicy. It returns the policy or every problem.
func Parse(doc *dialect.Document) (dialect.Result, []authz.Problem) {
	p := doc.Policy(Kind, func(p *authz.Policy) dialect.Fields {
		doc.Root().Require("spec")
		return dialect.Fields{"spec": func(v *dialect.Value) {
			parser := parser{namespace: p.Namespace}
			parser.spec(v)
			p.Specs = []authz.Spec{parser.Spec}
		}}
	})
	if bad := doc.Problems(); len(bad) > 0 {
		return dialect.Result{}, bad
	}
	return dialect.Result{Policies: []*authz.Policy{p}}, nil
}

type parser struct {
	authz.Spec
	namespace string
}

func (p *parser) spec(spec *dialect.Value) {
	p.Subject = authz.Selector{authz.InNamespace(p.namespace)}
	var types []abi.Direction
	rules := func(dir abi.Direction, field, peers string) func(*dialect.Value) {
		return func(v *dialect.Value) {
			v.List(func(i int, r *dialect.Value) {
				p.Rules = append(p.Rules, p.rule(dir, fmt.Sprintf("spec.%s[%d]", field, i), peers, r))
			})
		}
	}
	spec.Object(dialect.Fields{
		"podSelector": func(v *dialect.Value) { p.Subject = append(p.Subject, labels(v, authz.PodLabel)...) },
		"policyTypes": func(v *dialect.Value) { types = policyTypes(v) },
		"ingress":     rules(abi.DirIngress, "ingress", "from"),
		"egress":      rules(abi.DirEgress, "egress", "to"),
	})
	speaksOf := func(dir abi.Direction) bool {
		return slices.ContainsFunc(p.Rules, func(r authz.Rule) bool { return r.Direction == dir })
	}
	if len(types) == 0 { // empty is as if it were not there
		p.DenyIngress, p.DenyEgress = true, speaksOf(abi.DirEgress)
		return
	}
	p.DenyIngress, p.DenyEgress = slices.Contains(types, abi.DirIngress), slices.Contains(types, abi.DirEgress)
	// Rules of a direction that is not among the types say nothing.
	p.Rules = slices.DeleteFunc(p.Rules, func(r authz.Rule) bool { return !slices.Contains(types, r.Direction) })
}

func policyTypes(v *dialect.Value) (types []abi.Direction) {
	v.List(func(_ int, t *dialect.Value) {
		switch s, ok := t.Text(); {
		case !ok:
		case s == "Ingress":
			types = append(types, abi.DirIngress)
		case s == "Egress":
			types = append(types, abi.DirEgress)
		default:
			t.Refuse("want Ingress or Egress")
		}
	})
	return types
}

// rule parses an element of ingress or egress, whose peers are in the field
// from or to.
func (p *parser) rule(dir abi.Direction, path, peers string, v *dialect.Value) authz.Rule {
	r := authz.Rule{Direction: dir, Action: authz.Allow, AnyPeer: true, AnyPort: true, Path: path}
	v.Object(dialect.Fields{
		peers: func(f *dialect.Value) {
			f.List(func(_ int, peer *dialect.Value) {
				// One peer or more: those, not everybody.
				r.AnyPeer = false
				r.Peers = append(r.Peers, p.peer(peer, peers))
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

// peer parses one element of from or to: pods of the policy's own namespace,
// or of the namespaces that are selected; or a block of addresses.
func (p *parser) peer(v *dialect.Value, field string) authz.PeerSelector {
	s := authz.Selector{authz.InNamespace(p.namespace)}
	if v.Has("namespaceSelector") {
		s = authz.Selector{}
	}
	var block authz.Block
	v.Object(dialect.Fields{
		"podSelector":       func(f *dialect.Value) { s = append(s, labels(f, authz.PodLabel)...) },
		"namespaceSelector": func(f *dialect.Value) { s = append(s, labels(f, authz.NamespaceLabel)...) },
		"ipBlock": func(f *dialect.Value) {
			block = ipBlock(f)
			if v.Has("podSelector") || v.Has("namespaceSelector") {
				f.Refuse("it stands alone: write the selectors as an element of %s of their own", field)
			}
		},
	})
	if v.IsObject() && v.Len() == 0 {
		v.Refuse("want a podSelector, a namespaceSelector or both, or an ipBlock; for every peer leave out %s", field)
	}
	if v.Has("ipBlock") {
		return block
	}
	return s
}

// labels parses a label selector into requirements.
func labels(v *dialect.Value, of authz.Attribute) (s authz.Selector) {
	v.LabelSelector(func(at *dialect.Value, r authz.Requirement) {
		if at.LabelKey(r.Key) {
			r.Attribute = of
			s = append(s, r)
		}
	})
	return s
}

var protocols = map[string]uint8{"TCP": authz.ProtoTCP, "UDP": authz.ProtoUDP, "SCTP": authz.ProtoSCTP}

func parsePort(v *dialect.Value) authz.PortRange {
	proto, port, name, end := uint8(authz.ProtoTCP), 0, "", (*dialect.Value)(nil)
	v.Object(dialect.Fields{
		"protocol": func(f *dialect.Value) {
			s, ok := f.Text()
			if !ok {
				return
			}
			if proto, ok = protocols[s]; !ok {
				f.Refuse("want TCP, UDP or SCTP, in capitals")
			}
		},
		"port": func(f *dialect.Value) {
			if f.IsText() {
				if name, _ = f.Text(); !dialect.IsPortName(name) {
					f.Refuse("want the name of a container port (small letters, digits and -, at most 15, one of them a letter), or a number without quotes")
				}
				return
			}
			port = portNumber(f)
		},
		"endPort": func(f *dialect.Value) { end = f },
	})
	switch {
	case name != "":
		if end != nil {
			end.Refuse("a range begins with a number: write port as one, or remove endPort")
		}
		return authz.PortNamed(proto, name)
	case end != nil && !v.Has("port"):
		end.Refuse("port, where the range begins, is missing")
	case end != nil:
		last := portNumber(end)
		if last > 0 && last < port {
			end.Refuse("the range ends before port, where it begins")
		}
		return authz.PortRange{Proto: proto, First: uint16(port), Last: uint16(max(port, last))}
	case v.Has("port"):
		return authz.Port(proto, uint16(port))
	}
	return authz.AllPorts(proto)
}

// portNumber returns 0 for what it refuses.
func portNumber(v *dialect.Value) int {
	n, ok := v.Number()
	if ok && (n < 1 || n > 65535) {
		v.Refuse("want a port from 1 to 65535")
		return 0
	}
	return n
}
