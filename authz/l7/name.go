package l7

import (
	"fmt"
	"strings"
)

const maxName = 255 // characters of a name or a pattern

func (n Name) check() error {
	s := n.Name + n.Pattern
	switch {
	case (n.Name == "") == (n.Pattern == ""):
		return fmt.Errorf("want a DNS name or a pattern of names, one of them")
	case len(s) > maxName:
		return fmt.Errorf("a DNS name has at most %d characters", maxName)
	case s != strings.ToLower(s) || strings.HasSuffix(s, "."):
		return fmt.Errorf("want the DNS name %q in lower case and without a final dot", s)
	}
	return nil
}

// Matches reports whether a name, in lower case and without a final dot, is
// meant.
func (n Name) Matches(name string) bool {
	if n.Name != "" {
		return n.Name == name
	}
	if n.Pattern == "" || name == "" {
		return false
	}
	if rest, deep := strings.CutPrefix(n.Pattern, "**."); deep {
		// A * does not cross a dot, so rest has as many labels as it shows.
		for range strings.Count(name, ".") - strings.Count(rest, ".") {
			var label string
			if label, name, _ = strings.Cut(name, "."); label == "" {
				return false
			}
			if matchPattern(rest, name) {
				return true
			}
		}
		return false
	}
	return n.Pattern == "*" || matchPattern(n.Pattern, name)
}

// matchPattern matches * with any run of characters but dots, by
// backtracking to the last *: linear times the number of stars at worst.
func matchPattern(pattern, name string) bool {
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
