package tools

import (
	"fmt"
	"strings"

	"portcullis/authz"
	"portcullis/authz/l7"
	"portcullis/bpf/abi"
	"portcullis/identity"
)

// Request is what goes on inside a flow: a request of HTTP, a query of DNS or a
// hello of TLS. The zero Request asks for nothing.
type Request struct {
	Method, Path, Host string      // of HTTP; one of them makes it a request
	Header             [][2]string // name and value
	Name               string      // that DNS is asked for
	ServerName         string      // that TLS asks for
}

// IsZero reports whether it asks for nothing.
func (r Request) IsZero() bool {
	return r.Method+r.Path+r.Host+r.Name+r.ServerName == "" && r.Header == nil
}

// Check reports a request that is of several protocols, or of none.
func (r Request) Check() error {
	kinds := 0
	for _, there := range []bool{r.Method+r.Path+r.Host != "" || r.Header != nil, r.Name != "", r.ServerName != ""} {
		if there {
			kinds++
		}
	}
	if kinds > 1 {
		return fmt.Errorf("a request of HTTP, a name of DNS or a server name of TLS: one of them")
	}
	return nil
}

// String returns the request in words.
func (r Request) String() string {
	switch {
	case r.Name != "":
		return "the name " + r.Name
	case r.ServerName != "":
		return "the server name " + r.ServerName
	}
	h := r.http()
	return h.Method + " " + h.Target
}

func (r Request) http() *l7.Request {
	out := &l7.Request{Method: r.Method, Target: r.Path, Host: r.Host}
	if out.Method == "" {
		out.Method = "GET"
	}
	if out.Target == "" {
		out.Target = "/"
	}
	for _, h := range r.Header {
		out.Fields = append(out.Fields, l7.Field{Name: h[0], Value: h[1]})
	}
	return out
}

// allowed judges the request by rules inside a protocol; any of them allows.
func (r Request) allowed(rules []*l7.Rules) (rule string, ok bool) {
	switch {
	case r.Name != "":
		name, valid := l7.NormalName(r.Name)
		if !valid {
			return "", false
		}
		return l7.JudgeName(rules, name)
	case r.ServerName != "":
		return l7.JudgeServerName(rules, strings.ToLower(strings.TrimSuffix(r.ServerName, ".")))
	}
	v := l7.JudgeHTTP(rules, r.http())
	return v.Rule, v.Allowed
}

// inside returns how far a flow that passes with L7 may go.
func (j *Judge) inside(s *subject, dir abi.Direction, n identity.Numeric, proto uint8, port uint16) authz.Allowed {
	if s.inside == nil {
		s.inside, s.insideOf = s.set.Inside(), map[identity.Numeric]bool{}
		if err := s.inside.Ready(); err != nil {
			// The parsers have compiled every rule: it cannot be. Then nothing
			// is allowed.
			s.inside = &authz.Inside{}
		}
	}
	if !s.insideOf[n] {
		s.insideOf[n] = true
		of, host := s.set.InsideOf(n)
		if err := s.inside.Put(n, of, host); err != nil {
			return authz.Allowed{}
		}
	}
	allowed, _ := s.inside.Judge(dir, n, proto, port)
	return allowed
}

// describe says what rules inside a protocol allow.
func describe(rules []*l7.Rules) string {
	var all []string
	for _, r := range rules {
		for _, h := range r.HTTP {
			all = append(all, describeHTTP(h))
		}
		for _, n := range r.DNS {
			all = append(all, "DNS name "+n.Name+n.Pattern)
		}
		for _, n := range r.ServerNames {
			all = append(all, "TLS server name "+n)
		}
	}
	if len(all) == 0 {
		return "nothing"
	}
	return strings.Join(all, "; or ")
}

func describeHTTP(h l7.HTTP) string {
	words := []string{"HTTP"}
	add := func(what, s string) {
		if s != "" {
			words = append(words, what+s)
		}
	}
	add("", h.Method)
	add("", h.Path)
	add("host ", h.Host)
	for _, x := range h.Headers {
		words = append(words, describeHeader(x))
	}
	if h.Expr != nil {
		words = append(words, describeExpr(h.Expr))
	}
	if len(words) == 1 {
		words = append(words, "anything")
	}
	return strings.Join(words, " ")
}

func describeHeader(x l7.Header) string {
	s := "header " + x.Name
	if x.Value+x.Pattern != "" {
		s += ": " + x.Value + x.Pattern
	}
	if x.Mismatch != l7.MismatchRefuse {
		s += " (else " + string(x.Mismatch) + ")"
	}
	return s
}

func describeExpr(e *l7.Expr) string {
	list := func(all []l7.Expr, word string) string {
		var out []string
		for i := range all {
			out = append(out, describeExpr(&all[i]))
		}
		return "(" + strings.Join(out, word) + ")"
	}
	switch {
	case len(e.Any) > 0:
		return list(e.Any, " or ")
	case len(e.All) > 0:
		return list(e.All, " and ")
	case e.Not != nil:
		return "not " + describeExpr(e.Not)
	case e.Header != nil:
		return describeHeader(*e.Header)
	case e.Method != "":
		return "method " + e.Method
	case e.Path != "":
		return "path " + e.Path
	}
	return "host " + e.Host
}
