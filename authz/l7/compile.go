package l7

import (
	"fmt"
	"regexp"
	"strings"
)

// The bounds of one Rules. The policy compiler refuses earlier; they hold
// against a table that came by another way.
const (
	maxRules    = 4096    // of a Rules
	maxPatterns = 1 << 20 // bytes of regular expressions of a Rules
	maxNesting  = 128     // of an Expr
)

// Compile prepares the rules for judging, and reports what is wrong with them.
// Rules that were not compiled, or whose compilation failed, allow nothing.
func (r *Rules) Compile() error {
	c := compiler{left: maxPatterns}
	r.compiled = false
	if err := c.rules(r); err != nil {
		return fmt.Errorf("rules of %s: %w", r.Rule, err)
	}
	r.compiled = true
	return nil
}

type compiler struct{ left int }

func (c *compiler) rules(r *Rules) error {
	set := map[Parser]int{ParserHTTP: len(r.HTTP), ParserDNS: len(r.DNS), ParserTLS: len(r.ServerNames)}
	if _, ok := set[r.Parser]; !ok {
		return fmt.Errorf("no parser")
	}
	for p, n := range set {
		if n > 0 && p != r.Parser {
			return fmt.Errorf("there are rules of %v under the parser %v", p, r.Parser)
		}
		if n > maxRules {
			return fmt.Errorf("%d rules of %v; at most %d are taken", n, p, maxRules)
		}
	}
	for i := range r.HTTP {
		if err := c.http(&r.HTTP[i]); err != nil {
			return fmt.Errorf("http[%d]: %w", i, err)
		}
	}
	for i, n := range r.DNS {
		if err := n.Validate(); err != nil {
			return fmt.Errorf("dns[%d]: %w", i, err)
		}
	}
	for i, s := range r.ServerNames {
		if err := (Name{Pattern: s}).Validate(); err != nil {
			return fmt.Errorf("serverNames[%d]: %w", i, err)
		}
	}
	return nil
}

func (c *compiler) http(h *HTTP) (err error) {
	if h.method, err = c.pattern(h.Method, ""); err != nil {
		return fmt.Errorf("method: %w", err)
	}
	if h.path, err = c.pattern(h.Path, ""); err != nil {
		return fmt.Errorf("path: %w", err)
	}
	if h.host, err = c.pattern(h.Host, "i"); err != nil {
		return fmt.Errorf("host: %w", err)
	}
	for i := range h.Headers {
		if err = c.header(&h.Headers[i]); err != nil {
			return fmt.Errorf("headers[%d]: %w", i, err)
		}
	}
	if h.Expr != nil {
		err = c.expr(h.Expr, 0)
	}
	return err
}

func (c *compiler) header(h *Header) (err error) {
	switch {
	case !isToken(h.Name):
		return fmt.Errorf("%q cannot be the name of a header", h.Name)
	case !isValue(h.Value):
		return fmt.Errorf("%s: %q cannot be the value of a header", h.Name, h.Value)
	case h.Pattern != "" && (h.Value != "" || h.Mismatch != MismatchRefuse):
		return fmt.Errorf("%s: a pattern takes neither value nor mismatch action", h.Name)
	}
	switch h.Mismatch {
	case MismatchRefuse, MismatchLog, MismatchDelete:
	case MismatchAdd, MismatchReplace:
		if fixed(h.Name) {
			return fmt.Errorf("%s says how the request is read, and cannot be changed", h.Name)
		}
	default:
		return fmt.Errorf("%s: unknown mismatch action %q", h.Name, h.Mismatch)
	}
	if h.Mismatch == MismatchDelete && fixed(h.Name) {
		return fmt.Errorf("%s says how the request is read, and cannot be deleted", h.Name)
	}
	h.pattern, err = c.pattern(h.Pattern, "")
	return err
}

// fixed tells headers that say where a request ends and what the connection
// does: a rule may ask for them, and never change them.
func fixed(name string) bool {
	switch strings.ToLower(name) {
	case "content-length", "transfer-encoding", "host", "connection", "upgrade", "te", "trailer", "expect", "keep-alive", "proxy-connection":
		return true
	}
	return false
}

func (c *compiler) expr(e *Expr, depth int) (err error) {
	if depth > maxNesting {
		return fmt.Errorf("expr: nested more than %d deep", maxNesting)
	}
	set := 0
	for _, there := range []bool{len(e.Any) > 0, len(e.All) > 0, e.Not != nil, e.Method != "", e.Path != "", e.Host != "", e.Header != nil} {
		if there {
			set++
		}
	}
	if set != 1 {
		return fmt.Errorf("expr: want exactly one of its parts, not %d", set)
	}
	for _, list := range [][]Expr{e.Any, e.All} {
		for i := range list {
			if err = c.expr(&list[i], depth+1); err != nil {
				return err
			}
		}
	}
	switch {
	case e.Not != nil:
		return c.expr(e.Not, depth+1)
	case e.Header != nil:
		if e.Header.Mismatch != MismatchRefuse {
			return fmt.Errorf("expr: header %s: a mismatch action has no place here", e.Header.Name)
		}
		return c.header(e.Header)
	case e.Host != "":
		e.match, err = c.pattern(e.Host, "i")
	default:
		e.match, err = c.pattern(e.Method+e.Path, "")
	}
	return err
}

// matcher is a compiled pattern. The zero matcher was not compiled and matches
// nothing.
type matcher struct {
	kind matcherKind
	text string // of literal and prefix
	expr *regexp.Regexp
}

type matcherKind uint8

const (
	matchNothing matcherKind = iota
	matchAnything
	matchLiteral
	matchPrefix // the text, and then anything but a line's end
	matchExpr
)

func (c *compiler) pattern(p, flags string) (matcher, error) {
	if c.left -= len(p); c.left < 0 {
		return matcher{}, fmt.Errorf("more than %d bytes of regular expressions", maxPatterns)
	}
	if p == "" {
		return matcher{kind: matchAnything}, nil
	}
	// Compiled alone first: a stray parenthesis must not escape the anchors.
	if _, err := regexp.Compile(p); err != nil {
		return matcher{}, err
	}
	if flags == "" {
		if regexp.QuoteMeta(p) == p {
			return matcher{kind: matchLiteral, text: p}, nil
		}
		if head, ok := strings.CutSuffix(p, ".*"); ok && regexp.QuoteMeta(head) == head {
			return matcher{kind: matchPrefix, text: head}, nil
		}
	}
	e, err := regexp.Compile(`(?` + flags + `:\A(?:` + p + `)\z)`)
	return matcher{kind: matchExpr, expr: e}, err
}

func (m *matcher) matches(s string) bool {
	switch m.kind {
	case matchAnything:
		return true
	case matchLiteral:
		return s == m.text
	case matchPrefix:
		return strings.HasPrefix(s, m.text) && !strings.Contains(s[len(m.text):], "\n")
	case matchExpr:
		return m.expr.MatchString(s)
	}
	return false
}

// Exact returns the pattern of one text.
func Exact(s string) string { return regexp.QuoteMeta(s) }

// Contains returns the pattern of texts in which pattern matches somewhere.
func Contains(pattern string) string { return `(?s:.*)(?:` + pattern + `)(?s:.*)` }

// AnyPort returns the pattern of hosts that pattern matches, with or without a
// port behind them.
func AnyPort(pattern string) string { return `(?:` + pattern + `)(?::[0-9]*)?` }

// isToken reports whether s can be the name of a header or a method (RFC 9110).
func isToken(s string) bool {
	for i := range len(s) {
		if !tokenByte[s[i]] {
			return false
		}
	}
	return s != ""
}

var tokenByte = func() (t [256]bool) {
	for c := byte('!'); c < 0x7f; c++ {
		t[c] = !strings.ContainsRune(`"(),/:;<=>?@[\]{}`, rune(c))
	}
	return t
}()

// isValue reports whether s can be a header's value: no control characters but
// tabs, no space around it.
func isValue(s string) bool {
	for i := range len(s) {
		if s[i] < ' ' && s[i] != '\t' || s[i] == 0x7f {
			return false
		}
	}
	return strings.Trim(s, " \t") == s
}
