package l7

import (
	"fmt"
	"strings"
)

// MaxName is the length of the longest DNS name as it is written, without the
// final dot: 255 octets on the wire.
const MaxName = 253

// NormalName returns a DNS name in lower case and without the final dot; the
// root is "". It is false for what no rule means: empty labels, labels of more
// than 63 characters, names that are too long, and characters other than
// letters, digits, - and _. A name as package miekg/dns writes it has a
// backslash where a label holds anything else, a dot for one, so such a name is
// never taken for another.
func NormalName(s string) (string, bool) {
	if s == "." {
		return "", true
	}
	s = strings.TrimSuffix(s, ".")
	if s == "" || len(s) > MaxName {
		return "", false
	}
	label := 0
	for i := range len(s) {
		if s[i] == '.' {
			if label == 0 {
				return "", false
			}
			label = 0
			continue
		}
		if label++; label > 63 || !isNameByte(s[i]) {
			return "", false
		}
	}
	return strings.ToLower(s), label > 0
}

func isNameByte(c byte) bool {
	return 'a' <= c && c <= 'z' || 'A' <= c && c <= 'Z' || '0' <= c && c <= '9' || c == '-' || c == '_'
}

// Validate reports a Name that does not say one thing: one of both fields, in
// lower case and without a final dot, of letters, digits, -, _ and dots between
// them, and * in a pattern.
func (n Name) Validate() error {
	s := n.Name + n.Pattern
	if (n.Name == "") == (n.Pattern == "") {
		return fmt.Errorf("want a DNS name or a pattern of names, one of them")
	}
	// A star stands for no character too, so a pattern is as good as a name
	// with a character in each star's place.
	if normal, ok := NormalName(n.Name + strings.ReplaceAll(n.Pattern, "*", "x")); !ok || normal == "" {
		return fmt.Errorf("%q is not a DNS name or pattern", s)
	}
	if s != strings.ToLower(s) || strings.HasSuffix(s, ".") {
		return fmt.Errorf("want the DNS name %q in lower case and without a final dot", s)
	}
	return nil
}

// Matches reports whether a DNS name is meant, as Cilium documents it for
// matchName and matchPattern. Neither case nor a final dot makes a difference.
//
//	name          that name
//	*             in a pattern: any run of characters of one label, none too
//	**.           in front of a pattern: one label or more
//	*             alone: every name, the root too
//
// Elsewhere ** is *. A name with other characters than NormalName takes is
// never meant. The time that it takes is at most the product of both lengths.
func (n Name) Matches(name string) bool {
	name, ok := NormalName(name)
	if !ok {
		return false
	}
	if n.Name != "" {
		want, ok := NormalName(n.Name)
		return ok && want == name
	}
	if n.Pattern == "*" || n.Pattern == "*." {
		return true
	}
	if n.Pattern == "" || name == "" {
		return false
	}
	pattern := strings.ToLower(strings.TrimSuffix(n.Pattern, "."))
	if rest, deep := strings.CutPrefix(pattern, "**."); deep {
		// A star does not cross a dot, so the rest has as many labels as it
		// shows; in front of them is one more at least.
		drop := strings.Count(name, ".") - strings.Count(rest, ".")
		if drop < 1 {
			return false
		}
		for range drop {
			_, name, _ = strings.Cut(name, ".")
		}
		pattern = rest
	}
	return matchStars(pattern, name)
}

// MatchNames reports whether one of the names is meant.
func MatchNames(names []Name, name string) bool {
	for _, n := range names {
		if n.Matches(name) {
			return true
		}
	}
	return false
}

// matchStars matches * with any run of characters but dots. It goes back to the
// last star only: what an earlier one could take beyond that, the last one can
// take too, unless a dot is between them, and that no star takes.
func matchStars(pattern, name string) bool {
	p, n, star, from := 0, 0, -1, 0
	for n < len(name) {
		switch {
		case p < len(pattern) && pattern[p] == '*':
			star, from = p, n
			p++
		case p < len(pattern) && pattern[p] == name[n]:
			p++
			n++
		case star >= 0 && name[from] != '.':
			from++
			p, n = star+1, from
		default:
			return false
		}
	}
	return strings.Trim(pattern[p:], "*") == ""
}

// JudgeName judges a DNS name that is asked for, in any spelling. It returns what
// rule allows it. Rules of another parser, or that were not compiled, allow
// nothing.
func JudgeName(rules []*Rules, name string) (rule string, allowed bool) {
	for _, r := range rules {
		if r.compiled && r.Parser == ParserDNS && MatchNames(r.DNS, name) {
			return r.Rule, true
		}
	}
	return "", false
}
