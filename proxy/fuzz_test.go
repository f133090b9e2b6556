package proxy

import (
	"bufio"
	"bytes"
	"fmt"
	"io"
	"math/rand/v2"
	"net/http"
	"strings"
	"testing"
)

// framed reads requests as the proxy frames them, until one is refused or cut
// short. used is how many bytes the server would get.
func framed(data []byte) (seen []string, used int) {
	var rq request
	for used < len(data) {
		if !tokenByte[data[used]] {
			break
		}
		n, _, err := headEnd(data[used:], 0)
		if err != nil || n == 0 || parseRequest(string(data[used:used+n]), 64, &rq) != nil || rq.h2c {
			break
		}
		rq.body.refuse = refuseTrailer(nil)
		k, done, err := rq.body.take(data[used+n:])
		if err != nil || !done {
			break
		}
		seen = append(seen, fmt.Sprint(rq.Method, rq.Target, rq.Host, rq.minor, len(rq.Fields), data[used+n:used+n+k], rq.close))
		if used += n + k; rq.close {
			break
		}
	}
	return seen, used
}

// FuzzRequests holds the proxy's reading of requests against that of net/http:
// what goes on is read in the same way there.
func FuzzRequests(f *testing.F) {
	for _, s := range []string{
		"GET / HTTP/1.1\r\nHost: a\r\n\r\n",
		"POST /v1/x?y HTTP/1.1\r\nHost: a:80\r\nContent-Length: 3\r\n\r\nabcGET /z HTTP/1.0\r\nHost: [::1]:1\r\n\r\n",
		"POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n00\r\nX-A: b\r\n\r\nOPTIONS * HTTP/1.1\r\nhost:b\r\nConnection: close\r\n\r\n",
		"POST / HTTP/1.1\r\nHost: a\r\nExpect: 100-continue\r\nContent-Length: 00002\r\n\r\nabGET /a%20b;c HTTP/1.1\r\nHost: a\r\n\r\n",
		"GET / HTTP/1.1\r\nHost: a\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\n",
		"GET / HTTP/1.1\r\nHost: a\r\nContent-Length: 1\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
	} {
		f.Add([]byte(s))
	}
	f.Fuzz(agree)
}

func agree(t *testing.T, data []byte) {
	seen, used := framed(data)
	theirs := bufio.NewReader(bytes.NewReader(data[:used]))
	for i, want := range seen {
		q, err := http.ReadRequest(theirs)
		if err != nil {
			t.Fatalf("request %d, %s: net/http refuses it: %v", i, want, err)
		}
		ours, rest := lengthOf(data)
		body, err := io.ReadAll(q.Body)
		if err != nil {
			t.Fatalf("request %d: net/http refuses its body: %v", i, err)
		}
		if q.Method != ours.Method || q.RequestURI != ours.Target || q.Host != ours.Host || q.ProtoMinor != ours.minor || string(body) != ours.body {
			t.Fatalf("request %d: we read %+v, net/http %s %s %s 1.%d %q", i, ours, q.Method, q.RequestURI, q.Host, q.ProtoMinor, body)
		}
		data = rest
	}
	if n, _ := io.Copy(io.Discard, theirs); n != 0 {
		t.Fatalf("net/http has %d bytes left after %d requests", n, len(seen))
	}
}

// TestFramingAgrees does the same with requests made of what is likely to be
// read in two ways; fuzzing seldom makes a whole request.
func TestFramingAgrees(t *testing.T) {
	pick := rand.New(rand.NewPCG(1, 2))
	one := func(of ...string) string { return of[pick.IntN(len(of))] }
	passed := 0
	for range 20000 {
		var b strings.Builder
		for range 1 + pick.IntN(3) {
			b.WriteString(one("GET", "POST", "HEAD", "OPTIONS", "PRI", "x", "G\tT", "PUT") + one(" ", " ", " ", "  ") +
				one("/", "/a?b", "*", "/[", "/a:b", "/;=", "/%7e", "/|^`{}\"<>", "//a", "/a//b?%41#", "/?%zz", "/:x", "/?http://b/", "/a%2525", "x:/") + one(" ", " ", " ", "\t") +
				one("HTTP/1.1", "HTTP/1.1", "HTTP/1.1", "HTTP/1.0", "HTTP/1.10", "HTTP/2.0") + one("\r\n", "\r\n", "\r\n", "\r\n", "\n", " \r\n"))
			b.WriteString(one("Host: a", "Host: a", "host:a:80", "Host: [::1]", "HOST:\t[fe80::1]:1 ", "Host: a_b", "Host: ", "X: y") + "\r\n")
			for range pick.IntN(4) {
				b.WriteString(one("Content-Length: 3", "Content-Length:003 ", "content-length: 0", "Content-Length: +3", "Transfer-Encoding: chunked", "transfer-encoding:\tCHUNKED\t",
					"Transfer-Encoding: identity", "Transfer-Encoding:", "Connection: close", "Connection: keep-alive", "Connection: upgrade", "Upgrade: websocket", "Upgrade: h2c",
					"Expect: 100-continue", "X-A: b", "X-B:\xff\xfe", "X-C: ", "X-D: \t a \t", "Trailer: X-T", "Trailer: a,,b", "Trailer: Content-Length", "TE: trailers", "X_Y: z",
					"Content_Length: 9", "X!#$%&'*+-.^_`|~: y", "X: a\rb", "X:\x0b", "Keep-Alive: 5", "Proxy-Connection: close", "Content-Type: multipart/form-data") + one("\r\n", "\r\n", "\r\n", "\r\n", "\r\n", "\r\n", "\n", "\r\n ", "\r\r\n"))
			}
			b.WriteString("\r\n")
			b.WriteString(one("", "", "abc", "3\r\nabc\r\n0\r\n\r\n", "0\r\n\r\n", "0003\r\nabc\r\n00\r\nX-T: 1\r\n\r\n", "A\r\n0123456789\r\na\r\n0123456789\r\n0\r\nX: y\r\nX: z\r\n\r\n",
				"3;a\r\nabc\r\n0\r\n\r\n", "0\r\nX-T : 1\r\n\r\n", "0\r\n X: y\r\n\r\n", "000000000000003\r\nabc\r\n0\r\n\r\n", "3\r\nabc0\r\n\r\n"))
		}
		data := []byte(b.String())
		if seen, _ := framed(data); len(seen) > 0 {
			passed++
		}
		if agree(t, data); t.Failed() {
			t.Fatalf("%q", data)
		}
	}
	if passed < 100 {
		t.Errorf("only %d of the requests passed: the test looks at nothing", passed)
	}
	t.Logf("%d passed", passed)
}

type read struct {
	Method, Target, Host string
	minor                int
	body                 string // without chunks
}

// lengthOf reads the first request of data, which framed has passed.
func lengthOf(data []byte) (r read, rest []byte) {
	var rq request
	n, _, _ := headEnd(data, 0)
	parseRequest(string(data[:n]), 64, &rq)
	r = read{rq.Method, rq.Target, rq.Host, rq.minor, ""}
	b := data[n:]
	for {
		before, left := rq.body.state, rq.body.left
		if rq.body.kind != bodyChunked {
			k, _, _ := rq.body.take(b)
			r.body = string(b[:k])
			return r, b[k:]
		}
		_, done, _ := rq.body.take(b[:1])
		if before == chunkData && left > 0 {
			r.body += string(b[:1])
		}
		if b = b[1:]; done {
			return r, b
		}
	}
}

// FuzzPieces holds that a body ends at the same byte however it arrives.
func FuzzPieces(f *testing.F) {
	f.Add([]byte("3\r\nabc\r\n0\r\n\r\nrest"), uint8(1))
	f.Add([]byte("a;x=y\r\n0123456789\r\n0\r\nX: y\r\n\r\n"), uint8(3))
	f.Fuzz(func(t *testing.T, data []byte, piece uint8) {
		whole := body{kind: bodyChunked, lenient: true}
		n, done, err := whole.take(data)
		pieces, m := body{kind: bodyChunked, lenient: true}, 0
		var done2 bool
		var err2 error
		for size := int(piece)%7 + 1; m < len(data) && !done2 && err2 == nil; {
			var k int
			k, done2, err2 = pieces.take(data[m:min(m+size, len(data))])
			m += k
		}
		if len(data) > 0 && (n != m || done != done2 || (err == nil) != (err2 == nil)) {
			t.Errorf("at once %d %v %v, in pieces %d %v %v", n, done, err, m, done2, err2)
		}
	})
}
