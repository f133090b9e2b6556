package proxy

import (
	"io"
	"net"
	"net/http"
	"runtime"
	"strings"
	"testing"
	"time"
)

// What is under way when the proxy ends gets its answer; what is idle ends.
func TestEndIsOrderly(t *testing.T) {
	asked, answer := make(chan struct{}, 2), make(chan struct{})
	b := newBackend(t, func(w http.ResponseWriter, q *http.Request) {
		if q.URL.Path == "/slow" {
			asked <- struct{}{}
			<-answer
		}
		io.WriteString(w, "ok")
	})
	r := newRig(t, b.addr, anything, Options{DrainTimeout: patience})
	idle := r.dial().send("GET / HTTP/1.1\r\nHost: a\r\n\r\n")
	idle.answer("GET")
	slow := r.dial().send("GET /slow HTTP/1.1\r\nHost: a\r\n\r\n")
	slow2 := r.dialH2()
	slow2.request(1, true, ":method: GET", ":scheme: http", ":path: /slow", ":authority: a")
	<-asked
	<-asked
	r.stop()
	if got, err := idle.rest(); got != "" || err != nil {
		t.Errorf("the idle connection: %q %v", got, err)
	}
	if got := slow2.outcome(3); got != "GOAWAY, NO_ERROR" {
		t.Errorf("HTTP/2: %s", got)
	}
	if c, err := net.Dial("tcp", r.addr); err == nil {
		t.Error("a further connection was taken")
		c.Close()
	}
	close(answer)
	if got, err := slow.rest(); !strings.HasSuffix(got, "ok") || err != nil {
		t.Errorf("the one under way: %q %v", got, err)
	}
	if got := slow2.outcome(1); got != "200" {
		t.Errorf("HTTP/2: %s", got)
	}
	select {
	case err := <-r.done:
		if err != nil {
			t.Error(err)
		}
	case <-time.After(patience):
		t.Fatal("Run does not return")
	}
}

func TestConnectionsAreBounded(t *testing.T) {
	b := newBackend(t, nil)
	for reason, opts := range map[string]Options{
		"too many connections":                {Connections: 2, PerClient: 3},
		"too many connections of this client": {PerClient: 2},
	} {
		r := newRig(t, b.addr, anything, opts)
		for range 2 {
			r.dial().send("GET / HTTP/1.1\r\nHost: a\r\n\r\n").answer("GET")
			r.record()
		}
		if c, err := net.Dial("tcp", r.addr); err == nil { // the reset may come before
			if _, err := newWire(t, c).rest(); err == nil {
				t.Error("the third connection ended in peace")
			}
			c.Close()
		}
		if rec := r.record(); rec.Reason != reason {
			t.Errorf("%+v, want %s", rec, reason)
		}
	}
}

// A connection without traffic holds no buffer. BenchmarkIdle says what it
// costs; both ends of every connection and the server's are of this process.
func BenchmarkIdle(b *testing.B) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		b.Fatal(err)
	}
	defer l.Close()
	held := make(chan net.Conn, 100000)
	go func() {
		for {
			c, err := l.Accept()
			if err != nil {
				close(held)
				return
			}
			held <- c
		}
	}()
	r := newRig(b, l.Addr().String(), anything, Options{})
	memory := func() uint64 {
		runtime.GC()
		var m runtime.MemStats
		runtime.ReadMemStats(&m)
		return m.HeapInuse + m.StackInuse
	}
	before := memory()
	var all []net.Conn
	for range b.N {
		c, err := net.Dial("tcp", r.addr)
		if err != nil {
			b.Fatal(err)
		}
		all = append(all, c)
	}
	for range b.N {
		defer (<-held).Close()
	}
	b.ReportMetric(float64(memory()-before)/float64(b.N), "B/conn")
	for _, c := range all {
		c.Close()
	}
}
