package cilium

import (
	"strings"

	"portcullis/authz/dialect"
	"portcullis/bpf/abi"
)

// rules parses the rules inside a protocol of an element of toPorts. It
// reports whether there are any.
func (p *ports) rules(v *dialect.Value, parsed []port) (any bool) {
	dropped := refuse("Cilium has dropped it; remove it, to allow the whole port")
	v.Object(dialect.Fields{
		"http": func(v *dialect.Value) {
			any = true
			v.List(func(_ int, v *dialect.Value) { httpRule(v) })
			for _, one := range parsed {
				if one.protocol != "TCP" {
					one.at.Refuse("rules.http are for protocol TCP: write it, and other protocols into an element of their own")
				}
			}
			p.inside(v)
			v.NotEnforced("there is no proxy that would judge requests; remove rules to allow the whole port, or remove the port")
		},
		"dns": func(v *dialect.Value) {
			any = true
			v.List(func(_ int, v *dialect.Value) { parseDNSName(v) })
			if p.dir == abi.DirIngress {
				v.Refuse("rules.dns are for egress: write them where workloads ask")
			}
			for _, one := range parsed {
				switch {
				case one.several:
					one.at.Refuse("rules.dns take no range of ports: write the ports")
				case portless[one.protocol] != 0:
					one.at.Refuse("rules.dns are for TCP and UDP")
				}
			}
			if p.dir == abi.DirEgress {
				v.NotEnforced("there is no proxy that would judge queries; remove rules to allow the whole port, or remove the port")
			}
		},
		"kafka": dropped, "l7proto": dropped, "l7": dropped,
	})
	if !any {
		return false
	}
	if v.Has("http") && v.Has("dns") {
		v.Refuse("it has both http and dns: write an element of toPorts for each")
	}
	for _, one := range parsed {
		if one.zero && portless[one.protocol] == 0 {
			one.at.Refuse("rules want ports by number or name, not every port")
		}
	}
	return true
}

// inside refuses rules inside a protocol where the subjects are nodes.
func (p *ports) inside(v *dialect.Value) {
	if p.nodes {
		v.Refuse("a policy for nodes cannot have it: remove it")
	}
}

func httpRule(v *dialect.Value) {
	expression := func(v *dialect.Value) { v.Pattern() }
	v.Object(dialect.Fields{
		"method": expression, "path": expression, "host": expression,
		"headers": func(v *dialect.Value) {
			v.List(func(_ int, v *dialect.Value) {
				s, ok := v.Text()
				// "Name", "Name value" or "Name: value".
				name, _, _ := strings.Cut(s, " ")
				if ok && !isToken(strings.TrimSuffix(name, ":")) {
					v.Refuse("want a header as \"Name\" or \"Name: value\"")
				}
			})
		},
		"headerMatches": func(v *dialect.Value) {
			v.List(func(_ int, v *dialect.Value) { headerMatch(v) })
		},
	})
}

func headerMatch(v *dialect.Value) {
	text := func(v *dialect.Value) { v.Text() }
	v.Object(dialect.Fields{
		"name": func(v *dialect.Value) {
			if s, ok := v.Text(); ok && !isToken(s) {
				v.Refuse("not the name of a header")
			}
		},
		"value": text,
		"secret": func(v *dialect.Value) {
			v.Object(dialect.Fields{"name": text, "namespace": text})
			v.Require("name")
		},
		"mismatch": func(v *dialect.Value) {
			switch s, ok := v.Text(); {
			case !ok, s == "LOG", s == "ADD", s == "DELETE", s == "REPLACE":
			default:
				v.Refuse("want LOG, ADD, DELETE or REPLACE")
			}
		},
	})
	v.Require("name")
}

// isToken reports whether s can be the name of a header.
func isToken(s string) bool {
	for _, c := range s {
		if c <= ' ' || c >= 0x7f || strings.ContainsRune(`"(),/:;<=>?@[\]{}`, c) {
			return false
		}
	}
	return s != ""
}

// serverNames parses the names that TLS must ask for.
func (p *ports) serverNames(v *dialect.Value, parsed []port) {
	seen := map[string]bool{}
	v.List(func(_ int, v *dialect.Value) {
		s, ok := v.Text()
		switch {
		case !ok:
		case !isDNSName(s, "*"):
			v.Refuse("want the name of a server: letters, digits, -, _ and *, and single dots between them, at most 255")
		case seen[s]:
			v.Refuse("it is there twice: remove one")
		}
		seen[s] = true
	})
	if v.IsList() && v.Len() == 0 {
		v.Refuse("want one name or more; remove it, to allow the whole port")
	}
	for _, one := range parsed {
		if one.protocol != "TCP" {
			one.at.Refuse("serverNames are for protocol TCP: write it, and other protocols into an element of their own")
		}
	}
	p.inside(v)
	v.NotEnforced("there is no proxy that would look at TLS; remove it to allow the whole port, or remove the port")
}
