package tree

import (
	"strings"

	"portcullis/authz"
	"portcullis/authz/dialect"
	"portcullis/authz/l7"
	"portcullis/bpf/abi"
)

// l4 parses the ports that the subjects are limited to.
func (t *tree) l4(s *authz.Spec, v *dialect.Value, _ string) {
	const nothing = "it names no port: in 2017 that limited nothing; name one or more, or remove it"
	v.List(func(_ int, e *dialect.Value) {
		ports := func(dir abi.Direction) func(*dialect.Value) {
			return func(v *dialect.Value) {
				var plain []authz.PortRange
				var inside []authz.Rule
				limit := authz.Rule{Direction: dir, Action: authz.Limit, AnyPeer: true, Path: v.RulePath()}
				v.List(func(_ int, p *dialect.Value) {
					ports, rules := port(p)
					if rules == nil {
						plain = append(plain, ports...)
						return
					}
					r := limit
					r.Ports, r.L7, r.Path = ports, rules, p.RulePath()
					inside = append(inside, r)
				})
				if plain != nil {
					limit.Ports = plain
					s.Rules = append(s.Rules, limit)
				}
				s.Rules = append(s.Rules, inside...)
				if v.IsList() && v.Len() == 0 {
					v.Refuse(nothing)
				}
			}
		}
		if e.Object(dialect.Fields{"in-ports": ports(abi.DirIngress), "out-ports": ports(abi.DirEgress)}) && e.Len() == 0 {
			e.Refuse(nothing)
		}
	})
	if v.IsList() && v.Len() == 0 {
		v.Refuse(nothing)
	}
}

// protocols are those that l4 limits, by their names in small letters.
var protocols = map[string][]uint8{
	"": {authz.ProtoTCP, authz.ProtoUDP}, "any": {authz.ProtoTCP, authz.ProtoUDP}, "all": {authz.ProtoTCP, authz.ProtoUDP},
	"tcp": {authz.ProtoTCP}, "udp": {authz.ProtoUDP},
}

// port parses one element of in-ports or out-ports. inside: these rules inside
// the protocol decide further.
func port(v *dialect.Value) (out []authz.PortRange, inside *l7.Rules) {
	var requests []l7.HTTP
	number, protos := 0, protocols[""]
	var parser string
	instead := func(write string) func(*dialect.Value) {
		return func(v *dialect.Value) { v.Refuse("this was written so in 2016: write %s", write) }
	}
	v.Object(dialect.Fields{
		"port": func(f *dialect.Value) {
			n, ok := f.Number()
			if ok && (n < 1 || n > 65535) {
				f.Refuse("want a port from 1 to 65535")
				return
			}
			number = n
		},
		"protocol": func(f *dialect.Value) {
			s, ok := f.Text()
			if !ok {
				return
			}
			if protos, ok = protocols[strings.ToLower(s)]; !ok {
				f.Refuse("want tcp, udp or any: l4 limits nothing else")
			}
		},
		"l7-parser": func(f *dialect.Value) {
			s, ok := f.Text()
			if parser = s; ok && s != "" && s != "http" {
				f.Refuse("want http: there is no other parser")
			}
		},
		"l7-rules": func(rules *dialect.Value) {
			rules.List(func(_ int, r *dialect.Value) {
				parse := func(f *dialect.Value) {
					if e := expression(f); e != nil {
						requests = append(requests, l7.HTTP{Expr: e})
					}
				}
				if r.Object(dialect.Fields{"expr": parse}) {
					r.Require("expr")
				}
			})
		},
		"redirect": instead("l7-parser"),
		"rules":    instead("l7-rules"),
	})
	v.Require("port")
	for _, p := range protos {
		out = append(out, authz.Port(p, uint16(number)))
	}
	rules := v.Field("l7-rules")
	switch {
	case parser != "":
		if len(protos) != 1 || protos[0] != authz.ProtoTCP {
			v.Refuse("a parser wants protocol tcp")
		}
		v.Field("l7-parser").NeedsProxy("remove l7-parser and l7-rules to allow the whole port, or remove the port")
		inside = &l7.Rules{Parser: l7.ParserHTTP, HTTP: requests}
		if err := inside.Compile(); err != nil && v.Fine() {
			v.Refuse("no proxy takes its rules: %v", err)
		}
		return out, inside
	case rules != nil && rules.Len() > 0:
		rules.Refuse("l7-parser is missing: write http")
	}
	return out, nil
}
