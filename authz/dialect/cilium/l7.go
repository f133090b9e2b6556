package cilium

import (
	"strings"

	"portcullis/authz/dialect"
	"portcullis/authz/l7"
	"portcullis/bpf/abi"
)

// rules parses the rules inside a protocol of an element of toPorts, and
// returns nil if there are none.
func (p *ports) rules(v *dialect.Value, parsed []port) (out *l7.Rules) {
	dropped := refuse("Cilium has dropped it; remove it, to allow the whole port")
	v.Object(dialect.Fields{
		"http": func(v *dialect.Value) {
			out = &l7.Rules{Parser: l7.ParserHTTP}
			v.List(func(_ int, v *dialect.Value) { out.HTTP = append(out.HTTP, httpRule(v)) })
			notEmpty(v, "[{}] to allow every request")
			for _, one := range parsed {
				if one.protocol != "TCP" {
					one.at.Refuse("rules.http are for protocol TCP: write it, and other protocols into an element of their own")
				}
			}
			p.inside(v)
			v.NeedsProxy("remove rules to allow the whole port, or remove the port")
		},
		"dns": func(v *dialect.Value) {
			out = &l7.Rules{Parser: l7.ParserDNS}
			v.List(func(_ int, v *dialect.Value) {
				if n, ok := parseDNSName(v); ok {
					out.DNS = append(out.DNS, l7.Name{Name: n.Name, Pattern: n.Pattern})
				}
			})
			notEmpty(v, "[{matchPattern: \"*\"}] to allow every name")
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
				v.NeedsProxy("remove rules to allow the whole port, or remove the port")
			}
		},
		"kafka": dropped, "l7proto": dropped, "l7": dropped,
	})
	if out == nil {
		return nil
	}
	if v.Has("http") && v.Has("dns") {
		v.Refuse("it has both http and dns: write an element of toPorts for each")
	}
	for _, one := range parsed {
		if one.zero && portless[one.protocol] == 0 {
			one.at.Refuse("rules want ports by number or name, not every port")
		}
	}
	p.compile(v, out)
	return out
}

// notEmpty refuses an empty list of rules. It says nothing to Cilium, so that the
// whole port is open; who reads it may well think that it allows nothing.
func notEmpty(v *dialect.Value, all string) {
	if v.IsList() && v.Len() == 0 {
		v.Refuse("an empty list would be no rule at all, as Cilium reads it, so that the whole port were allowed: write %s, or remove it", all)
	}
}

// compile refuses rules that no proxy takes.
func (p *ports) compile(v *dialect.Value, rules *l7.Rules) {
	if err := rules.Compile(); err != nil && v.Fine() {
		v.Refuse("no proxy takes it: %v", err)
	}
}

// inside refuses rules inside a protocol where the subjects are nodes.
func (p *ports) inside(v *dialect.Value) {
	if p.nodes {
		v.Refuse("a policy for nodes cannot have it: remove it")
	}
}

func httpRule(v *dialect.Value) (out l7.HTTP) {
	expression := func(to *string) func(v *dialect.Value) {
		return func(v *dialect.Value) { *to, _ = v.Pattern() }
	}
	v.Object(dialect.Fields{
		"method": expression(&out.Method), "path": expression(&out.Path), "host": expression(&out.Host),
		"headers": func(v *dialect.Value) {
			v.List(func(_ int, v *dialect.Value) {
				s, ok := v.Text()
				// "Name", "Name value" or "Name: value".
				name, value, several := strings.Cut(s, " ")
				if several {
					name = strings.TrimSuffix(name, ":")
				}
				if ok && (!isToken(name) || !isHeaderValue(value)) {
					v.Refuse("want a header as \"Name\" or \"Name: value\"")
				}
				out.Headers = append(out.Headers, l7.Header{Name: name, Value: value})
			})
		},
		"headerMatches": func(v *dialect.Value) {
			v.List(func(_ int, v *dialect.Value) { out.Headers = append(out.Headers, headerMatch(v)) })
		},
	})
	return out
}

func headerMatch(v *dialect.Value) (out l7.Header) {
	v.Object(dialect.Fields{
		"name": func(v *dialect.Value) {
			s, ok := v.Text()
			if ok && !isToken(s) {
				v.Refuse("not the name of a header")
			}
			out.Name = s
		},
		"value": func(v *dialect.Value) {
			s, ok := v.Text()
			if ok && !isHeaderValue(s) {
				v.Refuse("not the value of a header: there is a control character in it, or a space around it")
			}
			out.Value = s
		},
		"secret": refuse("secrets are not read; write the value itself, if it may stand in a policy, or remove the header"),
		"mismatch": func(v *dialect.Value) {
			s, ok := v.Text()
			switch out.Mismatch = l7.Mismatch(s); out.Mismatch {
			case l7.MismatchLog, l7.MismatchAdd, l7.MismatchDelete, l7.MismatchReplace:
			default:
				if ok {
					v.Refuse("want LOG, ADD, DELETE or REPLACE")
				}
			}
		},
	})
	v.Require("name")
	return out
}

// isHeaderValue reports whether s can be the value of a header.
func isHeaderValue(s string) bool {
	return s == strings.TrimSpace(s) && !strings.ContainsFunc(s, func(r rune) bool { return r < ' ' && r != '\t' || r == 0x7f })
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
func (p *ports) serverNames(v *dialect.Value, parsed []port) *l7.Rules {
	out := &l7.Rules{Parser: l7.ParserTLS}
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
		out.ServerNames = append(out.ServerNames, strings.ToLower(strings.TrimSuffix(s, ".")))
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
	v.NeedsProxy("remove it to allow the whole port, or remove the port")
	p.compile(v, out)
	return out
}
