package cilium

import (
	"fmt"

	"portcullis/authz"
	"portcullis/authz/dialect"
	"portcullis/bpf/abi"
	"portcullis/identity"
)

// The kinds of objects that this package parses.
const (
	Kind            = "CiliumNetworkPolicy"
	ClusterwideKind = "CiliumClusterwideNetworkPolicy"
	GroupKind       = "CiliumCIDRGroup"
)

// Dialects returns this package's, for dialect.ParseFile.
func Dialects() []dialect.Dialect {
	return []dialect.Dialect{
		{APIVersion: "cilium.io/v2", Kind: Kind, Parse: Parse},
		{APIVersion: "cilium.io/v2", Kind: ClusterwideKind, Parse: ParseClusterwide},
		{APIVersion: "cilium.io/v2", Kind: GroupKind, Parse: ParseGroup},
		{APIVersion: "cilium.io/v2alpha1", Kind: GroupKind, Parse: ParseGroup},
	}
}

// Parse parses one CiliumNetworkPolicy. It returns the policy or every problem.
func Parse(doc *dialect.Document) (dialect.Result, []authz.Problem) {
	return result(doc, doc.Policy(Kind, specs(doc)))
}

// ParseClusterwide parses one CiliumClusterwideNetworkPolicy.
func ParseClusterwide(doc *dialect.Document) (dialect.Result, []authz.Problem) {
	return result(doc, doc.ClusterPolicy(ClusterwideKind, specs(doc)))
}

func result(doc *dialect.Document, p *authz.Policy) (dialect.Result, []authz.Problem) {
	if bad := doc.Problems(); len(bad) > 0 {
		return dialect.Result{}, bad
	}
	return dialect.Result{Policies: []*authz.Policy{p}}, nil
}

// specs are the fields of both kinds of policies.
func specs(doc *dialect.Document) func(*authz.Policy) dialect.Fields {
	return func(p *authz.Policy) dialect.Fields {
		if !doc.Root().Has("specs") {
			doc.Root().Require("spec")
		}
		one := func(v *dialect.Value) {
			s := parser{namespace: p.Namespace, path: v.RulePath()}
			s.parse(v)
			p.Specs = append(p.Specs, s.Spec)
		}
		return dialect.Fields{
			"description": func(v *dialect.Value) { v.Text() }, // as in examples of Cilium's; it belongs into spec
			"spec":        one,
			"specs": func(v *dialect.Value) {
				v.List(func(_ int, v *dialect.Value) { one(v) })
				if v.IsList() && v.Len() == 0 && !doc.Root().Has("spec") {
					v.Refuse("it says nothing: want one spec or more")
				}
			},
		}
	}
}

// parser parses one spec.
type parser struct {
	authz.Spec
	namespace string // of the policy; empty: it is clusterwide
	path      string // of the spec
}

func (p *parser) parse(spec *dialect.Value) {
	if p.namespace != "" {
		p.Subject = authz.Selector{authz.InNamespace(p.namespace)}
	}
	p.Nodes = spec.Has("nodeSelector")
	rules := 0
	section := func(dir abi.Direction, action authz.Action, field string) func(*dialect.Value) {
		return func(v *dialect.Value) {
			v.List(func(i int, r *dialect.Value) {
				p.rule(dir, action, fmt.Sprintf("%s.%s[%d]", p.path, field, i), r)
			})
			if v.Len() == 0 {
				return
			}
			rules += v.Len()
			// One rule or more, were it empty or a denial, puts the subject
			// under policy.
			p.setDeny(dir, true)
		}
	}
	fields := dialect.Fields{
		"description":       func(v *dialect.Value) { v.Text() },
		"labels":            labels,
		"log":               func(v *dialect.Value) { v.Object(dialect.Fields{"value": func(v *dialect.Value) { v.Text() }}) },
		"endpointSelector":  p.subject,
		"nodeSelector":      p.nodes,
		"ingress":           section(abi.DirIngress, authz.Allow, "ingress"),
		"egress":            section(abi.DirEgress, authz.Allow, "egress"),
		"ingressDeny":       section(abi.DirIngress, authz.Deny, "ingressDeny"),
		"egressDeny":        section(abi.DirEgress, authz.Deny, "egressDeny"),
		"enableDefaultDeny": dialect.Accept, // below, when the rules are known
	}
	if !spec.Object(fields) {
		return
	}
	if d := spec.Field("enableDefaultDeny"); d != nil {
		d.Object(dialect.Fields{
			"ingress": func(v *dialect.Value) { p.defaultDeny(abi.DirIngress, v) },
			"egress":  func(v *dialect.Value) { p.defaultDeny(abi.DirEgress, v) },
		})
	}
	switch endpoints := spec.Has("endpointSelector"); {
	case endpoints && p.Nodes:
		spec.Field("nodeSelector").Refuse("it is there beside endpointSelector: write a policy for each")
	case !endpoints && !p.Nodes && p.namespace != "":
		spec.Require("endpointSelector")
	case !endpoints && !p.Nodes:
		spec.Refuse("want endpointSelector or nodeSelector; for every workload write endpointSelector: {}")
	}
	if rules == 0 {
		spec.Refuse("it has no rule, so it says nothing: want ingress, egress, ingressDeny or egressDeny; to deny everything write a rule that is {}")
	}
}

func (p *parser) defaultDeny(dir abi.Direction, v *dialect.Value) {
	if on, ok := v.Boolean(); ok {
		p.setDeny(dir, on)
	}
}

func (p *parser) setDeny(dir abi.Direction, on bool) {
	if dir == abi.DirIngress {
		p.DenyIngress = on
		return
	}
	p.DenyEgress = on
}

// labels checks the labels of a policy, by which nothing is selected.
func labels(v *dialect.Value) {
	text := func(v *dialect.Value) { v.Text() }
	v.List(func(_ int, l *dialect.Value) {
		l.Object(dialect.Fields{"key": text, "value": text, "source": text})
		l.Require("key")
	})
}

// rule parses an element of ingress, egress, ingressDeny or egressDeny. It
// becomes one rule, and one more for each element of toPorts with rules inside
// a protocol.
func (p *parser) rule(dir abi.Direction, action authz.Action, path string, v *dialect.Value) {
	peers := peers{parser: p, dir: dir, action: action}
	fields := peers.fields()
	r := authz.Rule{Direction: dir, Action: action, Path: path}
	ports := ports{dir: dir, action: action, nodes: p.Nodes}
	fields["toPorts"] = ports.parse
	fields["icmps"] = ports.icmps
	if action == authz.Allow {
		fields["authentication"] = func(v *dialect.Value) { r.Evidence = authentication(v) }
	} else {
		for _, k := range []string{"authentication", "toFQDNs"} {
			fields[k] = refuse("a rule that denies cannot have it: remove it")
		}
	}
	if !v.Object(fields) {
		return
	}
	if v.Has("toPorts") && v.Has("icmps") && v.Field("toPorts").Len() > 0 && v.Field("icmps").Len() > 0 {
		v.Field("icmps").Refuse("it cannot be combined with toPorts in one rule: write a rule for each")
	}
	r.Peers, r.AnyPeer = peers.result(ports.some)
	if !ports.some {
		r.AnyPort = true
		p.Rules = append(p.Rules, r)
		return
	}
	if len(ports.plain) > 0 {
		r.Ports = ports.plain
		p.Rules = append(p.Rules, r)
	}
	for _, l7 := range ports.l7 {
		r.L7, r.Ports, r.Path = l7.rules, l7.ports, fmt.Sprintf("%s.toPorts[%d]", path, l7.index)
		p.Rules = append(p.Rules, r)
	}
}

func authentication(v *dialect.Value) (least identity.Evidence) {
	v.Object(dialect.Fields{"mode": func(v *dialect.Value) {
		switch s, ok := v.Text(); {
		case !ok, s == "disabled":
		case s == "required":
			least = identity.EvidenceSVID
		case s == "test-always-fail":
			v.NotEnforced("it is for tests of Cilium itself; to let nothing pass remove the rule, to ask for proof write required")
		default:
			v.Refuse("want required or disabled")
		}
	}})
	v.Require("mode")
	return least
}

// refuse refuses a field of Cilium's, saying what to do instead.
func refuse(instead string) func(*dialect.Value) {
	return func(v *dialect.Value) { v.Refuse("not supported: %s", instead) }
}
