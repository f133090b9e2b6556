package proxy

import (
	"bytes"
	"fmt"
	"io"
	"net"
	"net/http"
	"slices"
	"strings"
	"testing"
	"time"
)

func TestRequestsAreJudged(t *testing.T) {
	b := newBackend(t, nil)
	r := newRig(t, b.addr, landing, Options{})
	w := r.dial()
	for range 3 { // on one connection
		if res, body := w.send("POST /v1/request-landing HTTP/1.1\r\nHost: a\r\nContent-Length: 2\r\n\r\nhi").answer("POST"); res.StatusCode != 200 || body != "Ship landed\n" {
			t.Fatalf("%v %q", res, body)
		}
		rec := r.record()
		if rec.Verdict != Forwarded || rec.Rule != "landing" || rec.HTTP.Status != 200 || rec.HTTP.Path != "/v1/request-landing" || rec.HTTP.Latency <= 0 {
			t.Fatalf("%+v %+v", rec, rec.HTTP)
		}
		if res, body := w.send("PUT /v1/exhaust-port?a=b HTTP/1.1\r\nHost: a\r\nContent-Length: 2\r\n\r\nhi").answer("PUT"); res.StatusCode != 403 || body != "Access denied\n" {
			t.Fatalf("%v %q", res, body)
		}
		if rec := r.record(); rec.Verdict != Denied || rec.HTTP.Status != 403 || rec.HTTP.Path != "/v1/exhaust-port" {
			t.Fatalf("%+v %+v", rec, rec.HTTP)
		}
	}
	if want := slices.Repeat([]string{"POST /v1/request-landing a hi"}, 3); !slices.Equal(b.asked(), want) {
		t.Errorf("the server saw %q", b.asked())
	}
}

// The answer to a refused request, to the byte.
func TestDeniedAnswer(t *testing.T) {
	b := newBackend(t, nil)
	r := newRig(t, b.addr, landing, Options{})
	w := r.dial().send("GET / HTTP/1.1\r\nHost: a\r\n\r\nHEAD / HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n")
	got, err := w.rest()
	const head = "HTTP/1.1 403 Forbidden\r\nContent-Type: text/plain; charset=utf-8\r\nX-Content-Type-Options: nosniff\r\nContent-Length: 14\r\n"
	if want := head + "\r\nAccess denied\n" + head + "Connection: close\r\n\r\n"; got != want || err != nil {
		t.Errorf("%v\n%q\n%q", err, got, want)
	}
	if len(b.asked()) != 0 {
		t.Errorf("the server saw %q", b.asked())
	}
}

func TestPipelinedRequests(t *testing.T) {
	b := newBackend(t, nil)
	r := newRig(t, b.addr, landing, Options{})
	var in strings.Builder
	for i := range 40 {
		fmt.Fprintf(&in, "POST /v1/request-landing HTTP/1.1\r\nHost: a%d\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n0\r\nX-T: 1\r\n\r\n", i)
		fmt.Fprintf(&in, "PUT /%d HTTP/1.1\r\nHost: a\r\nContent-Length: 3\r\n\r\nabc", i)
	}
	w := r.dial().send(in.String())
	for i := range 40 {
		if res, _ := w.answer("POST"); res.StatusCode != 200 {
			t.Fatalf("%d: %v", i, res)
		}
		if res, _ := w.answer("PUT"); res.StatusCode != 403 {
			t.Fatalf("%d: %v", i, res)
		}
	}
	if got := b.asked(); len(got) != 40 || got[39] != "POST /v1/request-landing a39 abc" {
		t.Errorf("the server saw %q", got)
	}
}

func TestRealClient(t *testing.T) {
	big := bytes.Repeat([]byte("0123456789abcdef"), 1<<16) // 1 MiB
	b := newBackend(t, func(w http.ResponseWriter, q *http.Request) {
		switch q.URL.Path {
		case "/echo":
			http.NewResponseController(w).EnableFullDuplex()
			io.Copy(w, q.Body)
		case "/big":
			w.Header().Set("Content-Length", fmt.Sprint(len(big)))
			w.Write(big)
		case "/nothing":
			w.WriteHeader(204)
		case "/same":
			w.WriteHeader(304)
		case "/hints":
			w.WriteHeader(103)
			w.WriteHeader(200)
		case "/trailer":
			w.Header().Set("Trailer", "X-Sum")
			w.(http.Flusher).Flush()
			io.WriteString(w, "x")
			w.Header().Set("X-Sum", "1")
		case "/until-close":
			w.Header().Set("Connection", "close")
			io.WriteString(w, "the end")
		}
	})
	r := newRig(t, b.addr, anything, Options{})
	client := &http.Client{Transport: &http.Transport{ExpectContinueTimeout: patience}, Timeout: patience}
	defer client.CloseIdleConnections()
	get := func(method, path string, body io.Reader, header ...string) (*http.Response, []byte) {
		t.Helper()
		q, err := http.NewRequest(method, "http://"+r.addr+path, body)
		if err != nil {
			t.Fatal(err)
		}
		for i := 0; i < len(header); i += 2 {
			q.Header.Set(header[i], header[i+1])
		}
		res, err := client.Do(q)
		if err != nil {
			t.Fatalf("%s %s: %v", method, path, err)
		}
		defer res.Body.Close()
		got, err := io.ReadAll(res.Body)
		if err != nil {
			t.Fatalf("%s %s: %v", method, path, err)
		}
		return res, got
	}
	for range 2 {
		if _, got := get("GET", "/big", nil); !bytes.Equal(got, big) {
			t.Error("a big answer changed")
		}
		if _, got := get("POST", "/echo", bytes.NewReader(big)); !bytes.Equal(got, big) {
			t.Error("a big body changed")
		}
		if _, got := get("POST", "/echo", io.MultiReader(bytes.NewReader(big))); !bytes.Equal(got, big) {
			t.Error("a big chunked body changed")
		}
		if _, got := get("POST", "/echo", strings.NewReader("hi"), "Expect", "100-continue"); string(got) != "hi" {
			t.Errorf("Expect: %q", got)
		}
		if res, got := get("HEAD", "/big", nil); len(got) != 0 || res.ContentLength != int64(len(big)) {
			t.Errorf("HEAD: %v %q", res, got)
		}
		for path, status := range map[string]int{"/nothing": 204, "/same": 304, "/hints": 200} {
			if res, _ := get("GET", path, nil); res.StatusCode != status {
				t.Errorf("%s: %v", path, res.Status)
			}
		}
		if res, _ := get("GET", "/trailer", nil); res.Trailer.Get("X-Sum") != "1" {
			t.Errorf("trailer: %v", res.Trailer)
		}
		if _, got := get("GET", "/until-close", nil); string(got) != "the end" {
			t.Errorf("until close: %q", got)
		}
	}
}

// rawServer is a server that answers by a function of the connection.
func rawServer(t testing.TB, serve func(*wire)) string {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	done := make(chan struct{})
	go func() {
		defer close(done)
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			serve(newWire(t, c))
			c.Close()
		}
	}()
	t.Cleanup(func() { l.Close(); <-done })
	return l.Addr().String()
}

func TestUpgradeBecomesATunnel(t *testing.T) {
	addr := rawServer(t, func(w *wire) {
		if q, err := http.ReadRequest(w.r); err != nil || q.Header.Get("Upgrade") != "websocket" {
			w.send("HTTP/1.1 400 Bad Request\r\nContent-Length: 0\r\n\r\n")
			return
		}
		w.send("HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n\r\nhello")
		io.Copy(w, w.r)
	})
	r := newRig(t, addr, `{"parser":"http","http":[{"path":"/chat"}]}`, Options{Recheck: 10 * time.Millisecond})
	const ask = " HTTP/1.1\r\nHost: a\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\n"
	if res, _ := r.dial().send("GET /other" + ask).answer("GET"); res.StatusCode != 403 {
		t.Errorf("%v", res.Status)
	}
	w := r.dial().send("GET /chat" + ask)
	if res, err := http.ReadResponse(w.r, nil); err != nil || res.StatusCode != 101 {
		t.Fatal(res, err)
	}
	w.send("\x00\xff GET /other HTTP/1.1")
	want := "hello\x00\xff GET /other HTTP/1.1"
	got := make([]byte, len(want))
	if _, err := io.ReadFull(w.r, got); err != nil || string(got) != want {
		t.Fatalf("%q %v", got, err)
	}
	// The tunnel stands while the policy allows the request that made it.
	r.allow(`{"parser":"http","http":[{"path":"/chat"},{"path":"/more"}]}`)
	w.send("x")
	if c, err := w.r.ReadByte(); c != 'x' || err != nil {
		t.Fatal(c, err)
	}
	r.allow(`{"parser":"http","http":[{"path":"/more"}]}`)
	if _, err := w.rest(); err == nil {
		t.Error("the tunnel ended in peace when its request was allowed no longer")
	}
}

// A server that goes on in HTTP/2 would hide the next requests.
func TestUpgradeToHTTP2IsTakenOut(t *testing.T) {
	b := newBackend(t, func(w http.ResponseWriter, q *http.Request) {
		fmt.Fprint(w, q.Header["Upgrade"], q.Header["Http2-Settings"], q.Header["Connection"], q.Header["X-Kept"])
	})
	r := newRig(t, b.addr, anything, Options{})
	_, body := r.dial().send("GET / HTTP/1.1\r\nHost: a\r\nConnection: Upgrade, HTTP2-Settings, keep-alive\r\nUpgrade: h2c\r\nHTTP2-Settings: AAA\r\nX-Kept: 1\r\n\r\n").answer("GET")
	if body != "[] [] [keep-alive] [1]" {
		t.Errorf("the server saw %s", body)
	}
}

func TestMismatchActionsChangeTheRequest(t *testing.T) {
	b := newBackend(t, func(w http.ResponseWriter, q *http.Request) { fmt.Fprint(w, q.Header["X-A"], q.Header["X-B"]) })
	for action, want := range map[string]string{"LOG": "[2] [3]", "ADD": "[2 1] [3]", "DELETE": "[] [3]", "REPLACE": "[1] [3]"} {
		r := newRig(t, b.addr, `{"parser":"http","http":[{"headers":[{"name":"X-A","value":"1","mismatch":"`+action+`"}]}]}`, Options{Headers: []string{"x-a"}})
		if _, body := r.dial().send("GET / HTTP/1.1\r\nHost: a\r\nx-a: 2\r\nX-B: 3\r\n\r\n").answer("GET"); body != want {
			t.Errorf("%s: the server saw %s, want %s", action, body, want)
		}
		if rec := r.record(); !slices.Equal(rec.HTTP.Mismatched, []string{"X-A"}) || len(rec.HTTP.Header) != 1 {
			t.Errorf("%s: %+v", action, rec.HTTP)
		}
	}
}

func TestChangedRulesJudgeTheNextRequest(t *testing.T) {
	b := newBackend(t, nil)
	r := newRig(t, b.addr, landing, Options{})
	w := r.dial()
	const get = "GET / HTTP/1.1\r\nHost: a\r\n\r\n"
	if res, _ := w.send(get).answer("GET"); res.StatusCode != 403 {
		t.Fatal(res.Status)
	}
	r.allow(anything)
	if res, _ := w.send(get).answer("GET"); res.StatusCode != 200 {
		t.Fatal(res.Status)
	}
	r.allow(landing)
	if res, _ := w.send(get).answer("GET"); res.StatusCode != 403 {
		t.Fatal(res.Status)
	}
	r.revoke()
	w.send(get)
	if got, err := w.rest(); err == nil || got != "" {
		t.Errorf("a revoked flow was answered %q, and ended in peace", got)
	}
}

// A flow that lost its ground ends, though nobody sends on it.
func TestIdleConnectionsAreLookedAt(t *testing.T) {
	b := newBackend(t, nil)
	r := newRig(t, b.addr, anything, Options{Recheck: 10 * time.Millisecond})
	w := r.dial().send("GET / HTTP/1.1\r\nHost: a\r\n\r\n")
	w.answer("GET")
	r.revoke()
	if _, err := w.rest(); err == nil {
		t.Error("it ended in peace")
	}
}

func TestServerThatIsNotThere(t *testing.T) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	l.Close()
	r := newRig(t, l.Addr().String(), anything, Options{})
	if c, err := net.Dial("tcp", r.addr); err == nil { // the reset may come before
		if _, err := newWire(t, c).rest(); err == nil {
			t.Error("the client was not reset")
		}
		c.Close()
	}
	if rec := r.record(); rec.Verdict != Failed || !strings.Contains(rec.Reason, "refused") {
		t.Errorf("%+v", rec)
	}
}

func TestEndsArePassedOn(t *testing.T) {
	asked := make(chan struct{}, 1)
	addr := rawServer(t, func(w *wire) {
		for {
			q, err := http.ReadRequest(w.r)
			if err != nil {
				return
			}
			io.Copy(io.Discard, q.Body)
			asked <- struct{}{}
			if q.URL.Path == "/half" {
				io.Copy(io.Discard, w.r) // until the client is done
			}
			w.send("HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok")
			if q.URL.Path == "/end" {
				return
			}
		}
	})
	r := newRig(t, addr, anything, Options{})
	// The server ends an idle connection: the client sees it.
	w := r.dial().send("GET /end HTTP/1.1\r\nHost: a\r\n\r\n")
	if got, err := w.rest(); err != nil || !strings.HasSuffix(got, "ok") {
		t.Errorf("%q %v", got, err)
	}
	<-asked
	// The client sends nothing more, and still gets its answer.
	w = r.dial().send("GET /half HTTP/1.1\r\nHost: a\r\n\r\n")
	<-asked
	w.Conn.(*net.TCPConn).CloseWrite()
	if got, err := w.rest(); err != nil || !strings.HasSuffix(got, "ok") {
		t.Errorf("%q %v", got, err)
	}
}

// A server that answers before it has the whole body, and takes no more of it.
func TestEarlyAnswer(t *testing.T) {
	addr := rawServer(t, func(w *wire) {
		if _, err := http.ReadRequest(w.r); err != nil {
			return
		}
		w.send("HTTP/1.1 413 Content Too Large\r\nConnection: close\r\nContent-Length: 3\r\n\r\nno\n")
		w.Conn.(*net.TCPConn).CloseWrite()
		io.Copy(io.Discard, w.r)
	})
	r := newRig(t, addr, anything, Options{})
	for range 10 {
		w := r.dial().send("POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 10000000\r\n\r\n")
		sent := make(chan struct{})
		go func() {
			defer close(sent)
			w.Conn.Write(make([]byte, 10000000)) // it need not get through
		}()
		if res, body := w.answer("POST"); res.StatusCode != 413 || body != "no\n" {
			t.Errorf("%v %q", res.Status, body)
		}
		w.Conn.Close()
		<-sent
	}
}

// A client whose content comes in pieces keeps its connection, where the content
// is short; else it is told that it does not.
func TestRefusedChunks(t *testing.T) {
	b := newBackend(t, nil)
	r := newRig(t, b.addr, landing, Options{chunkedWait: patience})
	w := r.dial()
	const head, next = "POST /no HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n", "POST /v1/request-landing HTTP/1.1\r\nHost: a\r\n\r\n"
	for range 3 {
		for _, piece := range []string{head, "3\r\nabc\r\n", "0\r\n", "\r\n"} {
			w.send(piece)
		}
		if res, body := w.answer("POST"); res.StatusCode != 403 || body != deniedBody || res.Close {
			t.Fatal(res.Status, body, res.Close)
		}
	}
	if res, _ := w.send(next).answer("POST"); res.StatusCode != 200 {
		t.Fatal(res.Status)
	}
	w.send(head + "20000\r\n" + strings.Repeat("x", 0x20000) + "\r\n")
	if res, body := w.answer("POST"); res.StatusCode != 403 || body != deniedBody || !res.Close {
		t.Fatal(res.Status, body, res.Close)
	}
	if seen := b.asked(); len(seen) != 1 {
		t.Error(seen)
	}
}

// One that waits for an answer before it goes on gets it.
func TestRefusedChunksThatDoNotEnd(t *testing.T) {
	r := newRig(t, newBackend(t, nil).addr, landing, Options{chunkedWait: time.Millisecond})
	w := r.dial().send("POST /no HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n")
	if res, body := w.answer("POST"); res.StatusCode != 403 || body != deniedBody || !res.Close {
		t.Fatal(res.Status, body, res.Close)
	}
}

// As checks of health do that are older than Host.
func TestHTTP10WithoutHost(t *testing.T) {
	b := newBackend(t, nil)
	r := newRig(t, b.addr, `{"parser":"http","http":[{"method":"OPTIONS","path":"/"},{"path":"/a","host":"a.example"}]}`, Options{})
	if res, _ := r.dial().send("OPTIONS / HTTP/1.0\r\n\r\n").answer("OPTIONS"); res.StatusCode != 200 {
		t.Error(res.Status)
	}
	if res, _ := r.dial().send("GET /a HTTP/1.0\r\n\r\n").answer("GET"); res.StatusCode != 403 {
		t.Error("where a rule names a host:", res.Status)
	}
	if res, _ := r.dial().send("OPTIONS / HTTP/1.1\r\n\r\n").answer("OPTIONS"); res.StatusCode != 400 {
		t.Error("in HTTP/1.1:", res.Status)
	}
}
