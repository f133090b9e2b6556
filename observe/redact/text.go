package redact

import (
	"encoding/base64"
	"strings"
)

// lines is what must be known of the lines before one. The zero value is the
// begin of a text.
type lines struct {
	removed int
	key     bool // within a private key
	valueOf bool // the line before named a secret, whose value this one may hold
	// below is how far the name of a secret is indented whose value stands on the
	// lines below it, further to the right; -1 and less: none. Shifted by one, so
	// that 0 is none.
	below int
}

// line returns the line without secrets, and whether anything is left of it.
// It has no newline.
func (l *lines) line(s string) (string, bool) {
	if l.below > 0 {
		if strings.TrimSpace(s) == "" || indent(s) >= l.below {
			l.removed++
			l.keys(s) // one may begin here and go on further to the left
			return "", false
		}
		l.below = 0
	}
	if l.key {
		if at := pemEnd.FindStringIndex(s); at != nil {
			l.key = false
			return l.line(s[at[1]:])
		}
		if base64ish.MatchString(s) || base64Run.MatchString(s) || pemHeader.MatchString(s) {
			return "", false
		}
		l.key = false // it was cut off
	}
	s = l.keys(s)
	if m := scalar.FindStringSubmatch(s); m != nil && secretName(m[2]) {
		l.below = indent(m[1]) + 1
		return s, true
	}
	if m := value.FindStringSubmatch(s); l.valueOf && m != nil && !plainValue("", m[2]) {
		s = m[1] + Removed
		l.removed++
	}
	m := named.FindStringSubmatch(s)
	l.valueOf = m != nil && secretName(m[1])
	return l.words(s), true
}

// indent is the column of the first letter; the dash of a list counts as blank.
func indent(s string) int {
	t := strings.TrimLeft(s, " \t")
	for strings.HasPrefix(t, "- ") {
		t = strings.TrimLeft(t[1:], " \t")
	}
	return len(s) - len(t)
}

// keys removes private keys in PEM, and remembers one that goes on below.
func (l *lines) keys(s string) string {
	for from := 0; ; {
		at := pemBegin.FindStringIndex(s[from:])
		if at == nil {
			return s
		}
		begin, rest := from+at[0], s[from+at[1]:]
		l.removed++
		end := pemEnd.FindStringIndex(rest)
		if end == nil {
			l.key = true
			return s[:begin] + Removed
		}
		s = s[:begin] + Removed + rest[end[1]:]
		from = begin + len(Removed)
	}
}

// words removes what stands within one line.
func (l *lines) words(s string) string {
	for _, f := range forms {
		s = l.form(s, f)
	}
	if m := leading.FindStringSubmatch(s); m != nil && secretName(m[2]) {
		if plainValue(m[2], m[4]) || !wholeLine(m[4]) {
			return l.pairs(s)
		}
		l.removed++
		return m[1] + m[2] + m[3] + Removed + m[5]
	}
	return l.pairs(s)
}

// wholeLine reports whether the rest of a line is one value: not the begin of
// something with pairs of its own.
func wholeLine(v string) bool { return !strings.HasPrefix(v, "{") && !strings.HasPrefix(v, "[") }

func (l *lines) form(s string, f form) string {
	if !strings.Contains(s, f.has) || !f.of.MatchString(s) {
		return s
	}
	return f.of.ReplaceAllStringFunc(s, func(found string) string {
		with := Removed
		switch {
		case f.with != "":
			with = f.of.ReplaceAllString(found, f.with)
		case certificate(found):
			return found
		}
		if with != found { // else it was removed before
			l.removed++
		}
		return with
	})
}

// certificate reports whether base64 is PEM of certificates, or of public keys,
// and of nothing else.
func certificate(s string) bool {
	b, err := base64.StdEncoding.DecodeString(s)
	if err != nil {
		return false
	}
	text := string(b)
	return strings.HasPrefix(text, "-----BEGIN ") && !strings.Contains(text, "PRIVATE") && !strings.Contains(text, "SECRET") &&
		(strings.Contains(text, "-----BEGIN CERTIFICATE-----") || strings.Contains(text, "-----BEGIN PUBLIC KEY-----"))
}

// pairs removes the values of names of secrets.
func (l *lines) pairs(s string) string {
	if !hint.MatchString(s) {
		return s
	}
	s = l.replace(s, func(m []string) string {
		return m[1] + m[2] + inQuotes(m[3])
	})
	if !strings.Contains(s, "-") {
		return s
	}
	return flagged.ReplaceAllStringFunc(s, func(found string) string {
		m := flagged.FindStringSubmatch(found)
		if !secretName(m[1]) || plainValue(m[1], m[3]) {
			return found
		}
		l.removed++
		return m[1] + m[2] + inQuotes(m[3])
	})
}

// inQuotes is Removed in the quotes that a value has, if any.
func inQuotes(v string) string {
	quote := ""
	switch {
	case strings.HasPrefix(v, `\"`):
		quote = `\"`
	case v[0] == '"' || v[0] == '\'':
		quote = v[:1]
	}
	return quote + Removed + quote
}

// replace looks for pairs one after the other: where one is kept, the next may
// begin within its value.
func (l *lines) replace(s string, with func(m []string) string) string {
	var out strings.Builder
	for {
		at := pair.FindStringSubmatchIndex(s)
		if at == nil {
			out.WriteString(s)
			return out.String()
		}
		m := make([]string, 4)
		for i := range m {
			m[i] = s[at[2*i]:at[2*i+1]]
		}
		if !secretName(m[1]) || plainValue(m[1], m[3]) {
			out.WriteString(s[:at[6]])
			s = s[at[6]:]
			continue
		}
		l.removed++
		out.WriteString(s[:at[0]] + with(m))
		s = s[at[1]:]
	}
}

// Text removes secrets from a text of several lines, and tells how many.
func Text(s string) (string, int) {
	var l lines
	var out strings.Builder
	for line := range strings.Lines(s) {
		body, newline := strings.CutSuffix(line, "\n")
		if rest, some := l.line(body); some {
			out.WriteString(rest)
			if newline {
				out.WriteByte('\n')
			}
		}
	}
	return out.String(), l.removed
}

// Args removes secrets from a command line, and tells how many.
func Args(args []string) (out []string, removed int) {
	for i, a := range args {
		if i > 0 && secretArg(args[i-1], a) {
			out, removed = append(out, Removed), removed+1
			continue
		}
		kept, n := Text(a)
		out, removed = append(out, kept), removed+n
	}
	return out, removed
}

// secretArg reports whether an argument is the value of a secret, which the one
// before it names: --token x.
func secretArg(before, a string) bool {
	return strings.HasPrefix(before, "-") && !strings.Contains(before, "=") && secretName(before) && !strings.HasPrefix(a, "--") && !plainValue(before, a)
}
