package proxy

import (
	"bufio"
	"bytes"
	"fmt"
	"io"
	"net/http"
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
	f.Fuzz(func(t *testing.T, data []byte) {
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
	})
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
