package tree

import (
	"fmt"
	"regexp"
	"strconv"
	"strings"

	"portcullis/authz/dialect"
)

// expression checks an element of l7-rules, in the route language of its time:
//
//	or     = and { "||" and }
//	and    = not { "&&" not }
//	not    = "!" not | "(" or ")" | match
//	match  = NAME "(" string { "," string } ")"
//	string = as in Go: "..." or `...`
//
// Nobody evaluates it yet, so it is checked and not kept.
func expression(v *dialect.Value) {
	s, ok := v.Text()
	if !ok {
		return
	}
	if len(s) > maxExpression {
		v.Refuse("the expression has %d characters; at most %d are accepted", len(s), maxExpression)
		return
	}
	p := expr{text: s, rest: s, value: v}
	p.or(0)
	if p.skip(); p.wrong == "" && p.rest != "" {
		p.want("&&, || or the end")
	}
	if p.wrong != "" {
		v.Refuse("%s", p.wrong)
	}
}

const (
	maxExpression = 4096 // characters
	maxNesting    = 64   // of parentheses and !
)

// matchers are the functions of the language: how many strings each takes, and
// what is asked of them.
var matchers = map[string][]func(*dialect.Value, string) string{
	"Method":       {method},
	"MethodRegexp": {pattern},
	"Path":         {path},
	"PathRegexp":   {pattern},
	"Host":         {host},
	"HostRegexp":   {pattern},
	"Header":       {token, anything},
	"HeaderRegexp": {token, pattern},
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

func (p *expr) or(depth int) {
	for p.and(depth); p.take("||"); {
		p.and(depth)
	}
}

func (p *expr) and(depth int) {
	for p.not(depth); p.take("&&"); {
		p.not(depth)
	}
}

func (p *expr) not(depth int) {
	switch {
	case depth > maxNesting:
		p.fail("nested more than %d deep", maxNesting)
	case p.take("!"):
		p.not(depth + 1)
	case p.take("("):
		if p.or(depth + 1); !p.take(")") {
			p.want(")")
		}
	default:
		p.match()
	}
}

var name = regexp.MustCompile(`^[A-Za-z][A-Za-z0-9]*`)

func (p *expr) match() {
	n := name.FindString(p.rest)
	checks := matchers[n]
	if checks == nil {
		p.want("Method, Path, Host, Header, one of these with Regexp behind it, ! or (")
		return
	}
	p.rest = p.rest[len(n):]
	if !p.take("(") {
		p.want("( behind " + n)
		return
	}
	for i, check := range checks {
		if i > 0 && !p.take(",") {
			p.want(fmt.Sprintf("a comma: %s takes %d strings", n, len(checks)))
			return
		}
		p.skip()
		quoted, err := strconv.QuotedPrefix(p.rest)
		if err != nil || quoted[0] == '\'' {
			p.want("a string in double quotes")
			return
		}
		s, err := strconv.Unquote(quoted)
		if err != nil {
			p.want("a string in double quotes")
			return
		}
		if wrong := check(p.value, s); wrong != "" {
			p.fail("%s: %s", n, wrong)
			return
		}
		p.rest = p.rest[len(quoted):]
	}
	if !p.take(")") {
		p.want(fmt.Sprintf(") behind the strings of %s, which takes %d", n, len(checks)))
	}
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
