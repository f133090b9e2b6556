package proxy

import (
	"bytes"
	"strings"

	"portcullis/authz/l7"
)

// malformed says why a message is refused: it could be read in two ways, or is
// no message at all.
type malformed string

func (m malformed) Error() string { return string(m) }

// request is one request of HTTP/1, as it stands.
type request struct {
	l7.Request
	minor   int // of HTTP/1
	body    body
	expect  bool // asks before it sends the body
	close   bool // the last of its connection
	upgrade string
	// h2c: the client offers to go on in HTTP/2 after this request, which would
	// hide the next ones. The offer is taken out before the request goes on.
	h2c bool
}

// headEnd returns how long the head is that b begins with, 0 if its end is not
// there yet. Lines must end with CR LF, so that nobody sees another end.
// Scanning begins at from, a position returned before.
func headEnd(b []byte, from int) (end, next int, err error) {
	for {
		i := bytes.IndexByte(b[from:], '\n')
		if i < 0 {
			return 0, from, nil
		}
		i += from
		if i == 0 || b[i-1] != '\r' {
			return 0, from, malformed("a line that does not end with CR LF")
		}
		if i == from+1 {
			if from == 0 {
				return 0, from, malformed("an empty line before the message")
			}
			return i + 1, i + 1, nil
		}
		from = i + 1
	}
}

// nextLine cuts the first line off a head that headEnd has found.
func nextLine(s string) (line, rest string) {
	i := strings.IndexByte(s, '\n')
	return s[:i-1], s[i+1:]
}

// parseRequest reads the head of a request. The strings of r are parts of head.
func parseRequest(head string, maxFields int, r *request) error {
	*r = request{Request: l7.Request{Fields: r.Fields[:0]}}
	line, rest := nextLine(head)
	if err := r.requestLine(line); err != nil {
		return err
	}
	f := framing{}
	for rest != "\r\n" {
		line, rest = nextLine(rest)
		field, err := parseField(line)
		if err != nil {
			return err
		}
		if len(r.Fields) == maxFields {
			return malformed("too many lines in the header")
		}
		r.Fields = append(r.Fields, field)
		if err := r.special(field, &f); err != nil {
			return err
		}
	}
	return r.finish(&f)
}

func (r *request) requestLine(line string) error {
	method, more, ok := strings.Cut(line, " ")
	target, version, ok2 := strings.Cut(more, " ")
	if !ok || !ok2 {
		return malformed("not HTTP")
	}
	switch version {
	case "HTTP/1.1":
		r.minor = 1
	case "HTTP/1.0":
	default:
		return malformed("not HTTP/1.1 or 1.0")
	}
	if !token(method) || len(method) > 64 {
		return malformed("not a method")
	}
	r.Method, r.Target = method, target
	return checkTarget(method, target)
}

// parseField reads one line of a header.
func parseField(line string) (f l7.Field, err error) {
	if line != "" && (line[0] == ' ' || line[0] == '\t') {
		return f, malformed("a folded line in the header")
	}
	name, value, ok := strings.Cut(line, ":")
	if !ok || !token(name) {
		if strings.TrimRight(name, " \t") != name {
			return f, malformed("a space before the colon")
		}
		return f, malformed("a line in the header that is no field")
	}
	value = strings.Trim(value, " \t")
	if !fieldValue(value) {
		return f, malformed("a control character in the header")
	}
	return l7.Field{Name: name, Value: value}, nil
}

// framing collects what says where a message ends.
type framing struct {
	hosts, lengths, codings int
	length                  int64
	connection              bool // asks for an upgrade
}

func (r *request) special(f l7.Field, x *framing) error {
	switch len(f.Name) {
	case len("host"):
		if strings.EqualFold(f.Name, "host") {
			if x.hosts++; x.hosts > 1 {
				return malformed("several Host lines")
			}
			r.Host = f.Value
			return checkHost(f.Value)
		}
	case len("expect"):
		if strings.EqualFold(f.Name, "expect") {
			if !strings.EqualFold(f.Value, "100-continue") {
				return malformed("an Expect that is not 100-continue")
			}
			r.expect = true
		}
	case len("upgrade"): // and of trailer
		if strings.EqualFold(f.Name, "upgrade") {
			if r.upgrade != "" || f.Value == "" {
				return malformed("several or empty Upgrade lines")
			}
			r.upgrade = f.Value
		}
		if strings.EqualFold(f.Name, "trailer") {
			return checkTrailer(f.Value)
		}
	case len("connection"):
		if strings.EqualFold(f.Name, "connection") {
			return r.options(f.Value, x)
		}
	case len("content-length"):
		if strings.EqualFold(f.Name, "content-length") {
			return x.contentLength(f.Value)
		}
	case len("transfer-encoding"):
		if strings.EqualFold(f.Name, "transfer-encoding") {
			return x.transferEncoding(f.Value)
		}
	}
	return nil
}

// checkTrailer looks at the names that a request promises in its trailer.
func checkTrailer(value string) error {
	for name := range strings.SplitSeq(value, ",") {
		if name = strings.Trim(name, " \t"); name != "" {
			if err := refuseTrailer(nil)(name); err != nil {
				return err
			}
		}
	}
	return nil
}

// options reads a Connection line. It may name no header but those of the
// connection: a server that takes the named ones out would see another request.
func (r *request) options(value string, x *framing) error {
	for o := range strings.SplitSeq(value, ",") {
		switch strings.ToLower(strings.Trim(o, " \t")) {
		case "close":
			r.close = true
		case "upgrade":
			x.connection = true
		case "keep-alive", "te", "http2-settings":
		default:
			return malformed("a Connection that names other headers")
		}
	}
	return nil
}

func (x *framing) contentLength(value string) error {
	if x.lengths++; x.lengths > 1 {
		return malformed("several Content-Length lines")
	}
	if value == "" || len(value) > 18 || strings.Trim(value, "0123456789") != "" {
		return malformed("a Content-Length that is no number")
	}
	for _, c := range []byte(value) {
		x.length = x.length*10 + int64(c-'0')
	}
	return nil
}

func (x *framing) transferEncoding(value string) error {
	if x.codings++; x.codings > 1 {
		return malformed("several Transfer-Encoding lines")
	}
	if !strings.EqualFold(value, "chunked") {
		return malformed("a Transfer-Encoding that is not chunked")
	}
	return nil
}

// finish looks at what only the whole header tells.
func (r *request) finish(x *framing) error {
	switch {
	case x.hosts == 0 && r.minor > 0:
		return malformed("no Host") // in HTTP/1.0 nobody has to say it: rules see none
	case x.lengths > 0 && x.codings > 0:
		return malformed("both Content-Length and Transfer-Encoding")
	case x.codings > 0 && r.minor == 0:
		return malformed("Transfer-Encoding in HTTP/1.0")
	case x.codings > 0:
		r.body = body{kind: bodyChunked}
	case x.length > 0:
		r.body = body{kind: bodyLength, left: x.length}
	}
	if r.expect && r.body.kind == bodyNone {
		return malformed("Expect without a body")
	}
	if r.upgrade == "" {
		return nil
	}
	if !x.connection || r.minor == 0 {
		return malformed("Upgrade without Connection: upgrade, or in HTTP/1.0")
	}
	for p := range strings.SplitSeq(r.upgrade, ",") {
		p = strings.ToLower(strings.Trim(p, " \t"))
		if p == "h2c" || p == "h2" || strings.HasPrefix(p, "http") {
			r.h2c = true
		}
	}
	if r.body.kind != bodyNone && !r.h2c {
		return malformed("Upgrade with a body")
	}
	if r.h2c {
		r.upgrade = ""
	}
	return nil
}

// response is the head of an answer of HTTP/1.
type response struct {
	status  int
	minor   int
	body    body
	persist bool // the connection goes on after it, as far as the server is concerned
	upgrade string
}

// parseResponse reads the head of an answer to a request with the method.
func parseResponse(head string, maxFields int, method string, r *response) error {
	*r = response{}
	line, rest := nextLine(head)
	if len(line) < len("HTTP/1.1 200") || line[:7] != "HTTP/1." || line[7] != '0' && line[7] != '1' || line[8] != ' ' || len(line) > 12 && line[12] != ' ' {
		return malformed("the server's answer is not HTTP/1.1 or 1.0")
	}
	r.minor = int(line[7] - '0')
	for _, c := range []byte(line[9:12]) {
		if c < '0' || c > '9' {
			return malformed("the server's status is no number")
		}
		r.status = r.status*10 + int(c-'0')
	}
	f := framing{}
	closes, keeps := false, false
	for n := 0; rest != "\r\n"; n++ {
		if n == maxFields {
			return malformed("too many lines in the answer's header")
		}
		line, rest = nextLine(rest)
		field, err := parseField(line)
		if err == nil {
			switch len(field.Name) {
			case len("upgrade"):
				if strings.EqualFold(field.Name, "upgrade") {
					r.upgrade = field.Value
				}
			case len("connection"):
				if strings.EqualFold(field.Name, "connection") {
					v := strings.ToLower(field.Value)
					closes = closes || strings.Contains(v, "close")
					keeps = keeps || strings.Contains(v, "keep-alive")
				}
			case len("content-length"):
				if strings.EqualFold(field.Name, "content-length") {
					err = f.contentLength(field.Value)
				}
			case len("transfer-encoding"):
				if strings.EqualFold(field.Name, "transfer-encoding") {
					err = f.transferEncoding(field.Value)
				}
			}
		}
		if err != nil {
			return malformed("the server's answer has " + err.Error())
		}
	}
	r.persist = !closes && (r.minor == 1 || keeps)
	return r.framed(&f, method)
}

func (r *response) framed(f *framing, method string) error {
	switch {
	case r.status < 100:
		return malformed("the server's status is below 100")
	case r.status < 200, method == "HEAD", r.status == 204, r.status == 304:
		// These have no body, whatever they say of its length.
	case f.codings > 0 && (f.lengths > 0 || r.minor == 0):
		return malformed("the server's answer has two lengths")
	case f.codings > 0:
		r.body = body{kind: bodyChunked, lenient: true}
	case f.lengths > 0:
		if f.length > 0 {
			r.body = body{kind: bodyLength, left: f.length}
		}
	default:
		r.body, r.persist = body{kind: bodyUntilClose}, false
	}
	return nil
}

var tokenByte, valueByte [256]bool

func init() {
	for c := range 256 {
		tokenByte[c] = c > ' ' && c < 0x7f && !strings.ContainsRune(`"(),/:;<=>?@[\]{}`, rune(c))
		valueByte[c] = c >= ' ' && c != 0x7f || c == '\t'
	}
}

func token(s string) bool {
	for i := range len(s) {
		if !tokenByte[s[i]] {
			return false
		}
	}
	return s != ""
}

func fieldValue(s string) bool {
	for i := range len(s) {
		if !valueByte[s[i]] {
			return false
		}
	}
	return true
}
