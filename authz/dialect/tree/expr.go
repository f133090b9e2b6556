package tree

import (
	"fmt"
	"regexp"
	"strconv"
	"strings"

	"portcullis/authz/dialect"
	"portcullis/authz/l7"
)

// expression parses an element of l7-rules, in the route language of its time:
//
//	or     = and { "||" and }
//	and    = not { "&&" not }
//	not    = "!" not | "(" or ")" | match
//	match  = NAME "(" string { "," string } ")"
//	string = as in Go: "..." or `...`
//
// It returns nil for one that is refused.
func expression(v *dialect.Value) *l7.Expr {
	s, ok := v.Text()
	if !ok {
		return nil
	}
	if len(s) > maxExpression {
		v.Refuse("the expression has %d characters; at most %d are accepted", len(s), maxExpression)
		return nil
	}
	p := expr{text: s, rest: s, value: v}
	e := p.or(0)
	if p.skip(); p.wrong == "" && p.rest != "" {
		p.want("&&, || or the end")
	}
	if p.wrong != "" {
		v.Refuse("%s", p.wrong)
		return nil
	}
	return &e
}

const (
	maxExpression = 4096 // characters
	maxNesting    = 64   // of parentheses and !
)

// matcher is a function of the language: what is asked of each of its strings,
// and what it means.
type matcher struct {
	checks []func(*dialect.Value, string) string
	means  func(s []string) l7.Expr
}

// matchers are the functions of the language. Those with Regexp find the
// expression anywhere; the others mean the whole, in which a placeholder stands
// for a part. Paths are compared without the query, and hosts without the port.
var matchers = map[string]matcher{
	"Method":       {checks{method}, func(s []string) l7.Expr { return l7.Expr{Method: whole(s[0], `.+`)} }},
	"MethodRegexp": {checks{pattern}, func(s []string) l7.Expr { return l7.Expr{Method: l7.Contains(s[0])} }},
	"Path":         {checks{path}, func(s []string) l7.Expr { return l7.Expr{Path: whole(s[0], `[^/]+`)} }},
	"PathRegexp":   {checks{pattern}, func(s []string) l7.Expr { return l7.Expr{Path: l7.Contains(s[0])} }},
	"Host":         {checks{host}, func(s []string) l7.Expr { return l7.Expr{Host: l7.AnyPort(whole(s[0], `[^.:]+`))} }},
	"HostRegexp":   {checks{pattern}, func(s []string) l7.Expr { return l7.Expr{Host: l7.AnyPort(l7.Contains(s[0]))} }},
	"Header":       {checks{token, anything}, func(s []string) l7.Expr { return header(s[0], whole(s[1], `[^/]+`)) }},
	"HeaderRegexp": {checks{token, pattern}, func(s []string) l7.Expr { return header(s[0], l7.Contains(s[1])) }},
}

type checks []func(*dialect.Value, string) string

func header(name, pattern string) l7.Expr {
	return l7.Expr{Header: &l7.Header{Name: name, Pattern: "(?:" + pattern + ")"}}
}

// whole returns the regular expression of a text in which placeholders stand
// for what part matches.
func whole(s, part string) string {
	texts := placeholder.Split(s, -1)
	for i := range texts {
		texts[i] = l7.Exact(texts[i])
	}
	return strings.Join(texts, part)
}

// expr is an expression that is being read. After the first thing that is
// wrong it reads on without effect.
type expr struct {
	text, rest string
	value      *dialect.Value
	wrong      string
}

func (p *expr) fail(format string, args ...any) {
	if p.wrong == "" {
		p.wrong = fmt.Sprintf("at character %d: ", len(p.text)-len(p.rest)+1) + fmt.Sprintf(format, args...)
	}
	p.rest = ""
}

func (p *expr) want(what string) { p.fail("want %s", what) }

func (p *expr) skip() { p.rest = strings.TrimLeft(p.rest, " \t\r\n") }

// take reads a mark if it is there.
func (p *expr) take(mark string) (ok bool) {
	p.skip()
	p.rest, ok = strings.CutPrefix(p.rest, mark)
	return ok
}

func (p *expr) or(depth int) l7.Expr {
	any := []l7.Expr{p.and(depth)}
	for p.take("||") {
		any = append(any, p.and(depth))
	}
	if len(any) == 1 {
		return any[0]
	}
	return l7.Expr{Any: any}
}

func (p *expr) and(depth int) l7.Expr {
	all := []l7.Expr{p.not(depth)}
	for p.take("&&") {
		all = append(all, p.not(depth))
	}
	if len(all) == 1 {
		return all[0]
	}
	return l7.Expr{All: all}
}

func (p *expr) not(depth int) (e l7.Expr) {
	switch {
	case depth > maxNesting:
		p.fail("nested more than %d deep", maxNesting)
	case p.take("!"):
		not := p.not(depth + 1)
		return l7.Expr{Not: &not}
	case p.take("("):
		if e = p.or(depth + 1); !p.take(")") {
			p.want(")")
		}
		return e
	default:
		return p.match()
	}
	return e
}

var name = regexp.MustCompile(`^[A-Za-z][A-Za-z0-9]*`)

func (p *expr) match() (e l7.Expr) {
	n := name.FindString(p.rest)
	m, known := matchers[n]
	if !known {
		p.want("Method, Path, Host, Header, one of these with Regexp behind it, ! or (")
		return e
	}
	checks, said := m.checks, make([]string, 0, len(m.checks))
	p.rest = p.rest[len(n):]
	if !p.take("(") {
		p.want("( behind " + n)
		return e
	}
	for i, check := range checks {
		if i > 0 && !p.take(",") {
			p.want(fmt.Sprintf("a comma: %s takes %d strings", n, len(checks)))
			return e
		}
		p.skip()
		quoted, err := strconv.QuotedPrefix(p.rest)
		if err != nil || quoted[0] == '\'' {
			p.want("a string in double quotes")
			return e
		}
		s, err := strconv.Unquote(quoted)
		if err != nil {
			p.want("a string in double quotes")
			return e
		}
		if wrong := check(p.value, s); wrong != "" {
			p.fail("%s: %s", n, wrong)
			return e
		}
		p.rest = p.rest[len(quoted):]
		said = append(said, s)
	}
	if !p.take(")") {
		p.want(fmt.Sprintf(") behind the strings of %s, which takes %d", n, len(checks)))
		return e
	}
	return m.means(said)
}

// The checks return what is wrong, or "".

// tokens are the characters of methods and names of headers (RFC 9110).
var tokens = regexp.MustCompile("^[!#$%&'*+.^_`|~0-9A-Za-z-]+$")

func token(_ *dialect.Value, s string) string {
	if !tokens.MatchString(s) {
		return "want the name of a header"
	}
	return ""
}

// placeholder is a part of a path, host or method that can be anything.
var placeholder = regexp.MustCompile(`<[A-Za-z0-9_:]+>`)

func method(_ *dialect.Value, s string) string {
	if !tokens.MatchString(placeholder.ReplaceAllString(s, "x")) {
		return "want a method, as in GET"
	}
	return ""
}

func path(_ *dialect.Value, s string) string {
	if !strings.HasPrefix(s, "/") && !strings.HasPrefix(s, "<") {
		return "want a path that begins with /"
	}
	return anything(nil, s)
}

func host(_ *dialect.Value, s string) string {
	if s = placeholder.ReplaceAllString(s, "x"); s == "" || strings.ContainsAny(s, "/ <>") {
		return "want the name of a host"
	}
	return anything(nil, s)
}

func anything(_ *dialect.Value, s string) string {
	if strings.ContainsFunc(s, func(r rune) bool { return r < ' ' || r == 0x7f }) {
		return "there is a control character in it"
	}
	return ""
}

func pattern(v *dialect.Value, s string) string { return v.CheckPattern(s) }
