package proxy

import "strings"

// checkTarget looks for what servers read in different ways. What passes is
// judged and forwarded as it stands: servers may decode it, but find no other
// path in it.
func checkTarget(method, target string) error {
	if target == "*" && method == "OPTIONS" {
		return nil
	}
	if method == "CONNECT" {
		return malformed("CONNECT")
	}
	if target == "" || target[0] != '/' {
		return malformed("a target that is not a path")
	}
	if strings.HasPrefix(target, "//") {
		return malformed("a path that begins with //")
	}
	path, query, _ := strings.Cut(target, "?")
	if err := checkPath(path); err != nil {
		return err
	}
	for i := 0; i < len(query); i++ {
		switch c := query[i]; {
		case c <= ' ' || c >= 0x7f || c == '#':
			return malformed("a character in the query that must be escaped")
		case c == '%' && !escape(query[i:]):
			return malformed("an invalid escape in the query")
		}
	}
	return nil
}

func checkPath(path string) error {
	for i := 0; i < len(path); i++ {
		switch c := path[i]; {
		case c <= ' ' || c >= 0x7f || c == '#':
			return malformed("a character in the path that must be escaped")
		case c == '\\':
			return malformed("a backslash in the path")
		case c == '%':
			if !escape(path[i:]) {
				return malformed("an invalid escape in the path")
			}
			if err := checkEscaped(unhex(path[i+1])<<4|unhex(path[i+2]), path[i+3:]); err != nil {
				return err
			}
		}
	}
	for segment := range strings.SplitSeq(path[1:], "/") {
		// Some servers cut parameters off before they look at dots.
		if i := strings.IndexAny(segment, ";%"); i >= 0 && (segment[i] == ';' || strings.EqualFold(segment[i:i+3], "%3b")) {
			segment = segment[:i]
		}
		if segment == "." || segment == ".." {
			return malformed("a dot segment in the path")
		}
	}
	return nil
}

// checkEscaped looks at what an escape in a path stands for; rest follows it.
func checkEscaped(c byte, rest string) error {
	switch {
	case c == '/':
		return malformed("an escaped slash in the path")
	case c == '\\':
		return malformed("an escaped backslash in the path")
	case c == 0xc0 || c == 0xc1:
		return malformed("an overlong character in the path")
	case c < ' ' || c == 0x7f:
		return malformed("an escaped control character in the path")
	case c == '%' && escape("%"+rest):
		return malformed("a doubly escaped character in the path")
	case c == '.' || c == '-' || c == '_' || '0' <= c && c <= '9' || 'a' <= c|0x20 && c|0x20 <= 'z':
		// A dot segment among them. Nobody needs to escape these, and rules would
		// see another path than the server.
		return malformed("an escaped letter, digit or dot in the path")
	}
	return nil
}

func escape(s string) bool {
	return len(s) >= 3 && isHex(s[1]) && isHex(s[2])
}

func isHex(c byte) bool {
	return '0' <= c && c <= '9' || 'a' <= c|0x20 && c|0x20 <= 'f'
}

func unhex(c byte) byte {
	if c <= '9' {
		return c - '0'
	}
	return c | 0x20 - 'a' + 10
}

// checkHost looks at a Host line or an :authority: a name, an IPv4 address or
// an IPv6 address in brackets, and perhaps a port.
func checkHost(host string) error {
	name, port := host, ""
	if rest, ok := strings.CutPrefix(host, "["); ok {
		address, more, ok := strings.Cut(rest, "]")
		if !ok || address == "" || strings.Trim(strings.ToLower(address), "0123456789abcdef:.") != "" {
			return malformed("a Host that is none")
		}
		if more == "" {
			return nil
		}
		if more[0] != ':' {
			return malformed("a Host that is none")
		}
		name, port = "v6", more[1:]
	} else if i := strings.IndexByte(host, ':'); i >= 0 {
		name, port = host[:i], host[i+1:]
	}
	if name == "" {
		return malformed("no Host")
	}
	for i := range len(name) {
		if c := name[i]; !(c == '.' || c == '-' || c == '_' || '0' <= c && c <= '9' || 'a' <= c|0x20 && c|0x20 <= 'z') {
			return malformed("a Host that is none")
		}
	}
	if len(port) > 5 || strings.Trim(port, "0123456789") != "" || len(host) != len(strings.TrimRight(host, ":")) {
		return malformed("a Host with a port that is none")
	}
	return nil
}
