package l7

import (
	"slices"
	"strings"
)

// Request is what is judged: exactly what the server will read.
type Request struct {
	Method string
	Target string // path and query
	Host   string // with the port, if one was sent
	Fields []Field
}

// Field is one line of a request's header. The name is in any case.
type Field struct{ Name, Value string }

// Verdict is the answer about one request.
type Verdict struct {
	Allowed bool
	Rule    string // of the Rules that allow
	// Changes are what must happen to the header before the request goes on.
	Changes []Change
	// Mismatched names headers that a mismatch action was needed for.
	Mismatched []string
}

// Change changes the header of a request: every line of the name is removed if
// Remove is set, and then a line with Value is added if Add is set.
type Change struct {
	Name, Value string
	Remove, Add bool
}

// JudgeHTTP judges a request. Rules of other parsers allow nothing. If several
// rules allow, one that wants no mismatch action wins, then the first.
func JudgeHTTP(rules []*Rules, r *Request) Verdict {
	var second *HTTP
	var where string
	for _, rs := range rules {
		if rs.Parser != ParserHTTP || !rs.compiled {
			continue
		}
		for i := range rs.HTTP {
			switch h := &rs.HTTP[i]; h.judge(r) {
			case asItStands:
				return Verdict{Allowed: true, Rule: rs.Rule}
			case withActions:
				if second == nil {
					second, where = h, rs.Rule
				}
			}
		}
	}
	if second == nil {
		return Verdict{}
	}
	v := Verdict{Allowed: true, Rule: where}
	for i := range second.Headers {
		second.Headers[i].act(r, &v)
	}
	return v
}

type allows uint8

const (
	notAtAll allows = iota
	asItStands
	withActions
)

func (h *HTTP) judge(r *Request) allows {
	if !h.method.matches(r.Method) || !h.path.matches(r.Target) || !h.host.matches(r.Host) {
		return notAtAll
	}
	if h.Expr != nil && !h.Expr.holds(r, r.asSent()) {
		return notAtAll
	}
	all := asItStands
	for i := range h.Headers {
		switch x := &h.Headers[i]; {
		case x.holds(r):
		case x.Mismatch == MismatchRefuse:
			return notAtAll
		default:
			all = withActions
		}
	}
	return all
}

func (h *Header) holds(r *Request) bool {
	value, there := r.field(h.Name)
	return there && h.matches(value)
}

// holdsByLine reports whether one line alone does.
func (h *Header) holdsByLine(r *Request) bool {
	return slices.ContainsFunc(r.Fields, func(f Field) bool { return strings.EqualFold(f.Name, h.Name) && h.matches(f.Value) })
}

func (h *Header) matches(value string) bool {
	if h.Pattern != "" {
		return h.pattern.matches(value)
	}
	return h.Value == "" || value == h.Value
}

// act adds to the verdict what the mismatch action asks for.
func (h *Header) act(r *Request, v *Verdict) {
	if h.holds(r) {
		return
	}
	v.Mismatched = append(v.Mismatched, h.Name)
	switch h.Mismatch {
	case MismatchAdd:
		v.Changes = append(v.Changes, Change{Name: h.Name, Value: h.Value, Add: true})
	case MismatchDelete:
		v.Changes = append(v.Changes, Change{Name: h.Name, Remove: true})
	case MismatchReplace:
		v.Changes = append(v.Changes, Change{Name: h.Name, Value: h.Value, Remove: true, Add: true})
	}
}

// holds reports whether the expression does in one reading. What it excludes
// must not be there in any.
func (e *Expr) holds(r *Request, as reading) bool {
	switch {
	case len(e.Any) > 0:
		for i := range e.Any {
			if e.Any[i].holds(r, as) {
				return true
			}
		}
		return false
	case len(e.All) > 0:
		for i := range e.All {
			if !e.All[i].holds(r, as) {
				return false
			}
		}
		return true
	case e.Not != nil && as.excluding:
		return !e.Not.holds(r, as)
	case e.Not != nil:
		for other := range r.readings() {
			if e.Not.holds(r, other) {
				return false
			}
		}
		return true
	case e.Method != "":
		return e.match.matches(r.Method)
	case e.Path != "":
		return e.match.matches(as.path)
	case e.Host != "":
		return e.match.matches(r.Host)
	case e.Header != nil && as.eachLine:
		return e.Header.holdsByLine(r)
	case e.Header != nil:
		return e.Header.holds(r)
	}
	return false
}

// field returns the values of a header, joined by commas, and whether it is
// there.
func (r *Request) field(name string) (value string, there bool) {
	for i := range r.Fields {
		if f := &r.Fields[i]; len(f.Name) == len(name) && strings.EqualFold(f.Name, name) {
			if !there {
				value, there = f.Value, true
			} else {
				value += "," + f.Value
			}
		}
	}
	return value, there
}

// JudgeServerName judges the name that a TLS client asks for, in lower case and
// without a final dot; "" if it asks for none, which nothing allows. It returns
// the Rules that allow.
func JudgeServerName(rules []*Rules, name string) (rule string, allowed bool) {
	for _, rs := range rules {
		if rs.Parser != ParserTLS || !rs.compiled {
			continue
		}
		for _, s := range rs.ServerNames {
			if (Name{Pattern: s}).Matches(name) {
				return rs.Rule, true
			}
		}
	}
	return "", false
}

// LooksAt reports whether any of the rules asks for the header.
func LooksAt(rules []*Rules, name string) bool {
	for _, rs := range rules {
		for i := range rs.HTTP {
			for j := range rs.HTTP[i].Headers {
				if strings.EqualFold(rs.HTTP[i].Headers[j].Name, name) {
					return true
				}
			}
			if rs.HTTP[i].Expr.looksAt(name) {
				return true
			}
		}
	}
	return false
}

func (e *Expr) looksAt(name string) bool {
	if e == nil {
		return false
	}
	looks := func(e Expr) bool { return e.looksAt(name) }
	return e.Header != nil && strings.EqualFold(e.Header.Name, name) || e.Not.looksAt(name) ||
		slices.ContainsFunc(e.Any, looks) || slices.ContainsFunc(e.All, looks)
}
