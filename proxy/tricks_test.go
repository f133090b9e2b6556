package proxy

import (
	"flag"
	"fmt"
	"net/http"
	"os"
	"strings"
	"testing"
	"time"

	"golang.org/x/net/http2"
)

var update = flag.Bool("update", false, "write docs/l7-tricks.md")

// trick is an attempt to get a request past the rules, or to wear the proxy out.
type trick struct {
	name string
	want Verdict
	send func(*rig)
	opts Options
}

// The rules that the tricks are tried on. What they try to reach is /v1/exhaust-port.
const trickRules = `{"parser":"http","rule":"r","http":[{"method":"POST","path":"/v1/request-landing"},{"method":"GET","path":"/public/.*"}]}`

func raw(format string, args ...any) func(*rig) {
	return func(r *rig) { r.dial().send(fmt.Sprintf(format, args...)) }
}

// get asks for a target, with further lines of the header.
func get(target string, lines ...string) func(*rig) {
	return raw("%s", "GET "+target+" HTTP/1.1\r\nHost: a\r\n"+strings.Join(append(lines, ""), "\r\n")+"\r\n")
}

// post sends a body after lines of the header.
func post(body string, lines ...string) func(*rig) {
	return raw("%s", "POST /v1/request-landing HTTP/1.1\r\nHost: a\r\n"+strings.Join(append(lines, ""), "\r\n")+"\r\n"+body)
}

const (
	chunked  = "Transfer-Encoding: chunked"
	smuggled = "0\r\n\r\nPUT /v1/exhaust-port HTTP/1.1\r\nHost: a\r\n\r\n"
)

var h1Tricks = []trick{
	{name: "Content-Length and Transfer-Encoding (CL.TE)", want: Malformed, send: post(smuggled, "Content-Length: 50", chunked)},
	{name: "Transfer-Encoding and Content-Length (TE.CL)", want: Malformed, send: post(smuggled, chunked, "Content-Length: 5")},
	{name: "two Content-Length lines that differ", want: Malformed, send: post(smuggled, "Content-Length: 5", "Content-Length: 50")},
	{name: "two equal Content-Length lines", want: Malformed, send: post("hello", "Content-Length: 5", "Content-Length: 5")},
	{name: "`Content-Length: 5, 5`", want: Malformed, send: post("hello", "Content-Length: 5, 5")},
	{name: "`Content-Length: +5`", want: Malformed, send: post("hello", "Content-Length: +5")},
	{name: "`Content-Length: 0x5`", want: Malformed, send: post("hello", "Content-Length: 0x5")},
	{name: "`Content-Length: -1`", want: Malformed, send: post("hello", "Content-Length: -1")},
	{name: "a Content-Length beyond 64 bits", want: Malformed, send: post("hello", "Content-Length: 18446744073709551621")},
	{name: "`Transfer-Encoding: xchunked`", want: Malformed, send: post(smuggled, "Transfer-Encoding: xchunked")},
	{name: "`Transfer-Encoding: chunked, identity`", want: Malformed, send: post(smuggled, "Transfer-Encoding: chunked, identity")},
	{name: "`Transfer-Encoding: gzip, chunked`", want: Malformed, send: post(smuggled, "Transfer-Encoding: gzip, chunked")},
	{name: "two Transfer-Encoding lines", want: Malformed, send: post(smuggled, chunked, "Transfer-Encoding: identity")},
	{name: "a vertical tab before `chunked`", want: Malformed, send: post(smuggled, "Transfer-Encoding: \x0bchunked")},
	{name: "`Transfer-Encoding : chunked`", want: Malformed, send: post(smuggled, "Transfer-Encoding : chunked")},
	{name: "Transfer-Encoding in a folded line", want: Malformed, send: post(smuggled, "X: y", " "+chunked)},
	{name: "Transfer-Encoding in HTTP/1.0", want: Malformed, send: raw("POST /v1/request-landing HTTP/1.0\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n")},
	{name: "a chunk size `0x5`", want: Malformed, send: post("0x5\r\nhello\r\n0\r\n\r\n", chunked)},
	{name: "a chunk size `-5`", want: Malformed, send: post("-5\r\nhello\r\n0\r\n\r\n", chunked)},
	{name: "a chunk size with a space", want: Malformed, send: post("5 \r\nhello\r\n0\r\n\r\n", chunked)},
	{name: "a chunk size beyond 64 bits", want: Malformed, send: post("10000000000000005\r\nhello\r\n0\r\n\r\n", chunked)},
	{name: "a chunk extension", want: Malformed, send: post("5;a=b\r\nhello\r\n0\r\n\r\n", chunked)},
	{name: "a chunk size that ends with LF alone", want: Malformed, send: post("5\nhello\r\n0\r\n\r\n", chunked)},
	{name: "a chunk that is longer than its size", want: Malformed, send: post("4\r\nhello\r\n0\r\n\r\n", chunked)},
	{name: "a trailer with Content-Length", want: Malformed, send: post("0\r\nContent-Length: 5\r\n\r\n", chunked)},
	{name: "a trailer with a folded line", want: Malformed, send: post("0\r\nA: b\r\n c\r\n\r\n", chunked)},
	{name: "a promise of Host in the trailer", want: Malformed, send: post("0\r\n\r\n", chunked, "Trailer: Host")},
	{name: "a request as the body of another", want: Forwarded, send: post(smuggled, fmt.Sprintf("Content-Length: %d", len(smuggled)))},
	{name: "a folded line", want: Malformed, send: get("/public/", "X: a", "\tb")},
	{name: "lines that end with LF alone", want: Malformed, send: raw("GET /public/ HTTP/1.1\nHost: a\n\n")},
	{name: "CR within a value", want: Malformed, send: get("/public/", "X: a\rContent-Length: 5")},
	{name: "NUL within a value", want: Malformed, send: get("/public/", "X: a\x00b")},
	{name: "NUL within the target", want: Malformed, send: get("/public/\x00")},
	{name: "a line without a colon", want: Malformed, send: get("/public/", "Content-Length")},
	{name: "a name with a space", want: Malformed, send: get("/public/", "Content Length: 5")},
	{name: "an empty name", want: Malformed, send: get("/public/", ": 5")},
	{name: "an empty line before the request", want: Malformed, send: raw("\r\nGET /public/ HTTP/1.1\r\nHost: a\r\n\r\n")},
	{name: "two spaces in the request line", want: Malformed, send: raw("GET  /public/ HTTP/1.1\r\nHost: a\r\n\r\n")},
	{name: "a tab in the request line", want: Malformed, send: raw("GET\t/public/ HTTP/1.1\r\nHost: a\r\n\r\n")},
	{name: "`Connection: x-forwarded-for` (the server would take the line out)", want: Malformed, send: get("/public/", "Connection: close, x-forwarded-for")},
	{name: "`Expect: something`", want: Malformed, send: post("hello", "Content-Length: 5", "Expect: something")},
	{name: "Upgrade with a body", want: Malformed, send: post("hello", "Content-Length: 5", "Connection: upgrade", "Upgrade: websocket")},
	{name: "`Upgrade: h2c` (the next requests would not be seen)", want: Forwarded, send: get("/public/", "Connection: upgrade, http2-settings", "Upgrade: h2c", "HTTP2-Settings: AAA")},
	{name: "`X-HTTP-Method-Override: PUT`", want: Forwarded, send: get("/public/", "X-HTTP-Method-Override: PUT")},
	{name: "`X-Original-URL: /v1/exhaust-port`", want: Forwarded, send: get("/public/", "X-Original-URL: /v1/exhaust-port")},
	{name: "a method in lower case", want: Denied, send: raw("get /public/ HTTP/1.1\r\nHost: a\r\n\r\n")},

	{name: "`/public/../v1/exhaust-port`", want: Malformed, send: get("/public/../v1/exhaust-port")},
	{name: "`/public/./x`", want: Malformed, send: get("/public/./x")},
	{name: "`/public/..`", want: Malformed, send: get("/public/..")},
	{name: "`/public/%2e%2e/v1/exhaust-port`", want: Malformed, send: get("/public/%2e%2e/v1/exhaust-port")},
	{name: "`/public/.%2E/v1/exhaust-port`", want: Malformed, send: get("/public/.%2E/v1/exhaust-port")},
	{name: "`/public/..%2fv1/exhaust-port`", want: Malformed, send: get("/public/..%2fv1/exhaust-port")},
	{name: "`/public/..;/v1/exhaust-port`", want: Malformed, send: get("/public/..;/v1/exhaust-port")},
	{name: "`/public/..%3b/v1/exhaust-port`", want: Malformed, send: get("/public/..%3b/v1/exhaust-port")},
	{name: "`/public/..\\v1`", want: Malformed, send: get(`/public/..\v1`)},
	{name: "`/public/..%5cv1`", want: Malformed, send: get("/public/..%5cv1")},
	{name: "`/public/%252e%252e/v1`", want: Malformed, send: get("/public/%252e%252e/v1")},
	{name: "`/public/%c0%ae%c0%ae/v1`", want: Malformed, send: get("/public/%c0%ae%c0%ae/v1")},
	{name: "`/public/%u002e%u002e/v1`", want: Malformed, send: get("/public/%u002e%u002e/v1")},
	{name: "`/public/%zz`", want: Malformed, send: get("/public/%zz")},
	{name: "`/public/%0d%0aX:y`", want: Malformed, send: get("/public/%0d%0aX:y")},
	{name: "`/public/%70rivate`", want: Malformed, send: get("/public/%70rivate")},
	{name: "`/public/a#/../v1`", want: Malformed, send: get("/public/a#/../v1")},
	{name: "a space in the target", want: Malformed, send: get("/public/a b")},
	{name: "a byte above 127 in the target", want: Malformed, send: get("/public/\xc3\xa4")},
	{name: "`//public/x`", want: Malformed, send: get("//public/x")},
	{name: "`/public//x` (rules see both slashes)", want: Forwarded, send: get("/public//x")},
	{name: "`/public/?x=../%2e%2e%2f` (a query)", want: Forwarded, send: get("/public/?x=../%2e%2e%2f")},
	{name: "`/v1/exhaust-port?/public/`", want: Denied, send: get("/v1/exhaust-port?/public/")},
	{name: "an absolute target", want: Malformed, send: get("http://a/public/")},
	{name: "an absolute target with another host", want: Malformed, send: get("http://b/v1/exhaust-port")},
	{name: "`CONNECT a:80`", want: Malformed, send: raw("CONNECT a:80 HTTP/1.1\r\nHost: a:80\r\n\r\n")},
	{name: "`GET *`", want: Malformed, send: get("*")},
	{name: "`GET public/x`", want: Malformed, send: get("public/x")},

	{name: "no Host", want: Malformed, send: raw("GET /public/ HTTP/1.1\r\n\r\n")},
	{name: "two Host lines", want: Malformed, send: get("/public/", "Host: b")},
	{name: "an empty Host", want: Malformed, send: raw("GET /public/ HTTP/1.1\r\nHost:\r\n\r\n")},
	{name: "`Host: a, b`", want: Malformed, send: raw("GET /public/ HTTP/1.1\r\nHost: a, b\r\n\r\n")},
	{name: "`Host: a@b`", want: Malformed, send: raw("GET /public/ HTTP/1.1\r\nHost: a@b\r\n\r\n")},
	{name: "`Host: a/public`", want: Malformed, send: raw("GET /public/ HTTP/1.1\r\nHost: a/public\r\n\r\n")},
	{name: "`Host: a:80x`", want: Malformed, send: raw("GET /public/ HTTP/1.1\r\nHost: a:80x\r\n\r\n")},

	{name: "a head of more than 64 KiB", want: Malformed, send: get("/public/", "X: "+strings.Repeat("a", 70000))},
	{name: "a target of more than 64 KiB", want: Malformed, send: get("/public/" + strings.Repeat("a", 70000))},
	{name: "300 lines in the header", want: Malformed, send: get("/public/", strings.Split(strings.Repeat("X: y|", 299)+"X: y", "|")...)},
	{name: "a head that never ends (slowloris)", want: Malformed, send: raw("GET /public/ HTTP/1.1\r\nHost: a\r\nX: "), opts: Options{HeaderTimeout: 50 * time.Millisecond}},
	{name: "a TLS hello", want: Malformed, send: raw("\x16\x03\x01\x00\x05hello")},
	{name: "an SSH banner", want: Malformed, send: raw("SSH-2.0-OpenSSH_9.9\r\n")},
	{name: "`GET /public/` of HTTP/0.9", want: Malformed, send: raw("GET /public/\r\n")},
	{name: "HTTP/1.2", want: Malformed, send: raw("GET /public/ HTTP/1.2\r\nHost: a\r\n\r\n")},
	{name: "HTTP/2.0 without its preface", want: Malformed, send: raw("GET /public/ HTTP/2.0\r\nHost: a\r\n\r\n")},
}

func TestTricks(t *testing.T) {
	var doc strings.Builder
	doc.WriteString(tricksHead)
	for _, part := range []struct {
		title  string
		rules  string
		tricks []trick
	}{
		{"HTTP/1", trickRules, h1Tricks},
		{"HTTP/2", trickRules, h2Tricks},
		{"TLS, where the rules allow the name a.example", `{"parser":"tls","rule":"r","serverNames":["a.example"]}`, tlsTricks(t)},
	} {
		fmt.Fprintf(&doc, "\n## %s\n\n| trick | outcome |\n|---|---|\n", part.title)
		for _, x := range part.tricks {
			t.Run(part.title[:4]+" "+x.name, func(t *testing.T) {
				fmt.Fprintf(&doc, "| %s | %s |\n", x.name, x.outcome(t, part.title, part.rules))
			})
		}
	}
	const path = "../docs/l7-tricks.md"
	if *update {
		if err := os.WriteFile(path, []byte(doc.String()), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	if old, err := os.ReadFile(path); (err != nil || string(old) != doc.String()) && !t.Failed() {
		t.Errorf("docs/l7-tricks.md is not what happens (%v): go test ./proxy -run TestTricks -update", err)
	}
}

const tricksHead = `# Tricks tried on the L7 proxy, and what came of them

Written by the test that plays them (` + "`TestTricks`" + ` of package proxy), which fails when an outcome
changes. The server behind the proxy is Go's; the rules allow
` + "`POST /v1/request-landing` and `GET /public/.*`" + `. Of what was refused the server saw nothing, or no
whole request where content came short.

*refused* is an answer with the reason and the end of the connection, and in HTTP/2 of the stream or
the connection; *denied* is the answer 403 of a request that no rule allows; *closed* is an end
without an answer.
`

// outcome plays the trick, and says what came of it.
func (x *trick) outcome(t *testing.T, title, rules string) string {
	b := newBackend(t, nil)
	if x.opts.HeaderTimeout == 0 {
		x.opts.HeaderTimeout = patience
	}
	r := newRig(t, b.addr, rules, x.opts)
	x.send(r)
	rec := r.record()
	for x.opts.resetsPerSec > 0 && rec.Verdict == Denied {
		rec = r.record() // of a flood whose requests are denied
	}
	if rec.Verdict != x.want {
		t.Errorf("%+v %+v, want %s", rec, rec.HTTP, x.want)
	}
	if seen := b.asked(); len(seen) > 0 && rec.Verdict != Forwarded {
		t.Errorf("the server saw %q", seen)
	}
	status := 0
	if rec.HTTP != nil {
		status = rec.HTTP.Status
	}
	switch {
	case rec.Verdict == Forwarded:
		return "passes, as the rules say of it"
	case rec.Verdict == Denied && rec.HTTP != nil:
		return "denied, 403"
	case rec.Verdict == Denied:
		return "denied: " + rec.Reason
	case status != 0:
		return fmt.Sprintf("refused, %d %s: %s", status, http.StatusText(status), rec.Reason)
	case title == "HTTP/2":
		return "refused: " + rec.Reason
	}
	return "closed: " + rec.Reason
}

// request2 sends one request of HTTP/2 with these fields.
func request2(fields ...string) func(*rig) {
	return func(r *rig) {
		w := r.dialH2()
		w.request(1, true, fields...)
		w.outcome(1)
	}
}

func public(fields ...string) []string {
	return append([]string{":method: GET", ":scheme: http", ":path: /public/", ":authority: a"}, fields...)
}

// frames sends frames of HTTP/2 by hand, until the proxy has had enough.
func frames(send func(w *h2wire, i uint32) error, n int) func(*rig) {
	return func(r *rig) {
		w := r.dialH2()
		for i := range uint32(n) {
			if send(w, i) != nil {
				break // the proxy has ended it
			}
		}
		w.outcome(1<<31 - 1)
	}
}

var few = Options{controlPerSec: 10, resetsPerSec: 10}

var h2Tricks = []trick{
	{name: "a name in upper case", want: Malformed, send: request2(public("X-A: b")...)},
	{name: "a name with a space", want: Malformed, send: request2(public("x a: b")...)},
	{name: "CR LF within a value", want: Malformed, send: request2(public("x: a\r\nhost: b")...)},
	{name: "a pseudo-header behind others", want: Malformed, send: request2(":method: GET", ":scheme: http", ":authority: a", "x: y", ":path: /public/")},
	{name: "two `:path`", want: Malformed, send: request2(":method: GET", ":scheme: http", ":path: /public/", ":path: /v1/exhaust-port", ":authority: a")},
	{name: "two `:method`", want: Malformed, send: request2(":method: GET", ":method: PUT", ":scheme: http", ":path: /public/", ":authority: a")},
	{name: "an unknown pseudo-header", want: Malformed, send: request2(":method: GET", ":scheme: http", ":path: /public/", ":authority: a", ":status: 200")},
	{name: "no `:path`", want: Malformed, send: request2(":method: GET", ":scheme: http", ":authority: a")},
	{name: "an empty `:path`", want: Malformed, send: request2(":method: GET", ":scheme: http", ":path: ", ":authority: a")},
	{name: "a `:path` that does not begin with /", want: Malformed, send: request2(":method: GET", ":scheme: http", ":path: http://a/public/", ":authority: a")},
	{name: "a `:path` with a space and a version", want: Malformed, send: request2(":method: GET", ":scheme: http", ":path: /public/ HTTP/1.1", ":authority: a")},
	{name: "a `:path` with dot segments", want: Malformed, send: request2(":method: GET", ":scheme: http", ":path: /public/../v1", ":authority: a")},
	{name: "a `:method` with a space", want: Malformed, send: request2(":method: GET /public/ HTTP/1.1", ":scheme: http", ":path: /", ":authority: a")},
	{name: "a `:scheme` of file", want: Malformed, send: request2(":method: GET", ":scheme: file", ":path: /public/", ":authority: a")},
	{name: "`:authority` and another host", want: Malformed, send: request2(public("host: b")...)},
	{name: "neither `:authority` nor host", want: Malformed, send: request2(":method: GET", ":scheme: http", ":path: /public/")},
	{name: "`:authority` with a user", want: Malformed, send: request2(":method: GET", ":scheme: http", ":path: /public/", ":authority: a@b")},
	{name: "connection", want: Malformed, send: request2(public("connection: close")...)},
	{name: "transfer-encoding", want: Malformed, send: request2(public("transfer-encoding: chunked")...)},
	{name: "`te: gzip`", want: Malformed, send: request2(public("te: gzip")...)},
	{name: "content-length without content", want: Malformed, send: request2(public("content-length: 5")...)},
	{name: "two content-length", want: Malformed, send: request2(public("content-length: 0", "content-length: 0")...)},
	{name: "CONNECT", want: Malformed, send: request2(":method: CONNECT", ":authority: a:80")},
	{name: "extended CONNECT (WebSocket)", want: Malformed, send: request2(":method: CONNECT", ":protocol: websocket", ":scheme: http", ":path: /public/", ":authority: a")},
	{name: "another path than the rules'", want: Denied, send: request2(":method: PUT", ":scheme: http", ":path: /v1/exhaust-port", ":authority: a")},
	{name: "300 fields", want: Malformed, send: request2(public(strings.Split(strings.Repeat("x: y|", 299)+"x: y", "|")...)...)},
	{name: "less content than content-length", want: Malformed, send: func(r *rig) {
		w := r.dialH2()
		w.request(1, false, ":method: POST", ":scheme: http", ":path: /v1/request-landing", ":authority: a", "content-length: 5")
		w.WriteData(1, true, []byte("hi"))
		w.outcome(1)
	}},
	{name: "more content than content-length", want: Malformed, send: func(r *rig) {
		w := r.dialH2()
		w.request(1, false, ":method: POST", ":scheme: http", ":path: /v1/request-landing", ":authority: a", "content-length: 1")
		w.WriteData(1, false, []byte("hi"))
		w.outcome(1)
	}},
	{name: "a trailer with a pseudo-header", want: Malformed, send: func(r *rig) {
		w := r.dialH2()
		w.request(1, false, ":method: POST", ":scheme: http", ":path: /v1/request-landing", ":authority: a")
		w.request(1, true, ":path: /v1/exhaust-port")
		w.outcome(1)
	}},
	{name: "a bomb of compressed fields", want: Malformed, send: func(r *rig) {
		w := r.dialH2()
		fields := append(public(), "x: "+strings.Repeat("a", 3000))
		for range 2000 {
			fields = append(fields, fields[4])
		}
		w.request(1, true, fields...)
		w.outcome(1)
	}},
	{name: "a header that does not decompress", want: Malformed, send: frames(func(w *h2wire, i uint32) error {
		return w.WriteHeaders(http2.HeadersFrameParam{StreamID: 2*i + 1, EndHeaders: true, BlockFragment: []byte{0xff, 0xff, 0xff, 0xff, 0xff}})
	}, 1)},
	{name: "a header that never ends", want: Malformed, opts: Options{HeaderTimeout: 50 * time.Millisecond}, send: frames(func(w *h2wire, i uint32) error {
		return w.WriteHeaders(http2.HeadersFrameParam{StreamID: 1, BlockFragment: w.block(public()...)})
	}, 1)},
	{name: "a flood of CONTINUATION", want: Malformed, send: frames(func(w *h2wire, i uint32) error {
		if i == 0 {
			return w.WriteHeaders(http2.HeadersFrameParam{StreamID: 1, BlockFragment: w.block(public()...)})
		}
		return w.WriteContinuation(1, false, nil)
	}, 1000)},
	{name: "a header that another frame interrupts", want: Malformed, send: frames(func(w *h2wire, i uint32) error {
		if i == 0 {
			return w.WriteHeaders(http2.HeadersFrameParam{StreamID: 1, BlockFragment: w.block(public()...)})
		}
		return w.WritePing(false, [8]byte{})
	}, 2)},
	{name: "rapid reset", want: Malformed, opts: few, send: frames(func(w *h2wire, i uint32) error {
		w.request(2*i+1, true, ":method: PUT", ":scheme: http", ":path: /v1/exhaust-port", ":authority: a")
		return w.WriteRSTStream(2*i+1, http2.ErrCodeCancel)
	}, 5000)},
	{name: "a flood of PING", want: Malformed, opts: few, send: frames(func(w *h2wire, i uint32) error { return w.WritePing(false, [8]byte{}) }, 5000)},
	{name: "a flood of SETTINGS", want: Malformed, opts: few, send: frames(func(w *h2wire, i uint32) error { return w.WriteSettings() }, 5000)},
	{name: "a flood of PRIORITY", want: Malformed, opts: few, send: frames(func(w *h2wire, i uint32) error { return w.WritePriority(1, http2.PriorityParam{StreamDep: 3}) }, 5000)},
	{name: "DATA of a stream that is not there", want: Malformed, send: frames(func(w *h2wire, i uint32) error { return w.WriteData(1, true, []byte("x")) }, 1)},
	{name: "a stream of the server's", want: Malformed, send: frames(func(w *h2wire, i uint32) error { w.request(2, true, public()...); return nil }, 1)},
	{name: "PUSH_PROMISE of a client", want: Malformed, send: frames(func(w *h2wire, i uint32) error {
		return w.WritePushPromise(http2.PushPromiseParam{StreamID: 1, PromiseID: 2, EndHeaders: true, BlockFragment: w.block(public()...)})
	}, 1)},
	{name: "a window of more than 2^31", want: Malformed, send: frames(func(w *h2wire, i uint32) error { return w.WriteWindowUpdate(0, 1<<31-1) }, 2)},
	{name: "a frame of more than 16 KiB", want: Malformed, send: frames(func(w *h2wire, i uint32) error { return w.WriteRawFrame(frameData, 0, 1, make([]byte, maxFrame+1)) }, 1)},
	{name: "no SETTINGS behind the preface", want: Malformed, send: func(r *rig) {
		w := r.dial().send(preface)
		http2.NewFramer(w, nil).WritePing(false, [8]byte{})
		w.rest()
	}},
}

func tlsTricks(t testing.TB) []trick {
	hello := func(name string) string { return string(clientHello(t, name)) }
	return []trick{
		{name: "another name", want: Denied, send: raw("%s", hello("b.example"))},
		{name: "no name", want: Denied, send: raw("%s", hello(""))},
		{name: "an allowed name in a part of another", want: Denied, send: raw("%s", hello("a.example.b.example"))},
		{name: "a hello in records of one byte", want: Denied, send: raw("%s", records([]byte(hello("b.example")), 1))},
		{name: "NUL within the name", want: Malformed, send: raw("%s", strings.Replace(hello("a.example0b"), "a.example0b", "a.example\x00b", 1))},
		{name: "a name that is longer than its list", want: Malformed, send: raw("%s", strings.Replace(hello("a.example"), "\x00\x00\x09a.example", "\x00\x00\x0aa.example", 1))},
		{name: "a hello of more than 64 KiB", want: Malformed, send: raw("\x16\x03\x01\x00\x04\x01\x02\x00\x00")},
		{name: "a hello that never ends", want: Malformed, send: raw("\x16\x03\x01\x00\x04\x01\x00\x01"), opts: Options{HeaderTimeout: 50 * time.Millisecond}},
		{name: "an empty record", want: Malformed, send: raw("\x16\x03\x01\x00\x00")},
		{name: "an alert first", want: Malformed, send: raw("\x15\x03\x03\x00\x02\x02\x70")},
		{name: "an HTTP request", want: Malformed, send: raw("GET / HTTP/1.1\r\nHost: a.example\r\n\r\n")},
	}
}
