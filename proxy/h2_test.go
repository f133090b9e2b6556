package proxy

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"slices"
	"strings"
	"sync"
	"testing"

	"golang.org/x/net/http2"
	"golang.org/x/net/http2/hpack"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/health"
	"google.golang.org/grpc/health/grpc_health_v1"
	"google.golang.org/grpc/status"
)

func http2Client(t testing.TB) *http.Client {
	var only http.Protocols
	only.SetUnencryptedHTTP2(true)
	tr := &http.Transport{Protocols: &only}
	t.Cleanup(tr.CloseIdleConnections)
	return &http.Client{Transport: tr, Timeout: patience}
}

func TestHTTP2RequestsAreJudged(t *testing.T) {
	big := bytes.Repeat([]byte("0123456789abcdef"), 1<<15) // 512 KiB: more than the windows at the start
	b := newBackend(t, func(w http.ResponseWriter, q *http.Request) {
		w.Header().Set("Trailer", "X-Sum")
		io.Copy(w, q.Body)
		w.Header().Set("X-Sum", q.Header.Get("X-A")+q.Trailer.Get("X-T"))
	})
	r := newRig(t, b.addr, `{"parser":"http","rule":"h2","http":[{"path":"/ok","headers":[{"name":"X-A","value":"1","mismatch":"REPLACE"}]}]}`, Options{})
	client := http2Client(t)
	var wg sync.WaitGroup
	for i := range 40 {
		wg.Go(func() {
			path, want := "/ok", big[:len(big)-i]
			if i%4 == 0 {
				path, want = "/no", []byte(deniedBody)
			}
			q, err := http.NewRequest("POST", "http://"+r.addr+path, bytes.NewReader(big[:len(big)-i]))
			if err != nil {
				t.Error(err)
				return
			}
			q.Header.Set("X-A", "2")
			q.Trailer = http.Header{"X-T": {"3"}}
			res, err := client.Do(q)
			if err != nil {
				t.Error(path, err)
				return
			}
			defer res.Body.Close()
			got, err := io.ReadAll(res.Body)
			if err != nil || !bytes.Equal(got, want) {
				t.Errorf("%s: %v, %d bytes, want %d", path, err, len(got), len(want))
			}
			if path == "/ok" && (res.StatusCode != 200 || res.Trailer.Get("X-Sum") != "13") || path == "/no" && res.StatusCode != 403 {
				t.Errorf("%s: %v %v", path, res.Status, res.Trailer)
			}
		})
	}
	wg.Wait()
	seen := map[Verdict]int{}
	for range 40 {
		rec := r.record()
		if seen[rec.Verdict]++; rec.HTTP.Version != "2" || rec.HTTP.Status == 0 {
			t.Errorf("%+v %+v", rec, rec.HTTP)
		}
	}
	if seen[Forwarded] != 30 || seen[Denied] != 10 {
		t.Error(seen)
	}
}

func TestGRPC(t *testing.T) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	s := grpc.NewServer()
	grpc_health_v1.RegisterHealthServer(s, health.NewServer())
	done := make(chan struct{})
	go func() { defer close(done); s.Serve(l) }()
	defer func() { s.Stop(); <-done }()
	r := newRig(t, l.Addr().String(), `{"parser":"http","http":[{"method":"POST","path":"/grpc.health.v1.Health/.*"}]}`, Options{})
	c, err := grpc.NewClient(r.addr, grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	client := grpc_health_v1.NewHealthClient(c)
	for range 20 {
		if res, err := client.Check(ctx, &grpc_health_v1.HealthCheckRequest{}); err != nil || res.Status != grpc_health_v1.HealthCheckResponse_SERVING {
			t.Fatal(res, err)
		}
		if _, err := client.Check(ctx, &grpc_health_v1.HealthCheckRequest{Service: "none"}); status.Code(err) != codes.NotFound {
			t.Fatal(err) // it comes in the trailer
		}
	}
	watch, err := client.Watch(ctx, &grpc_health_v1.HealthCheckRequest{})
	if err != nil {
		t.Fatal(err)
	}
	if m, err := watch.Recv(); err != nil || m.Status != grpc_health_v1.HealthCheckResponse_SERVING {
		t.Fatal(m, err)
	}
	// A stream that stands stays; the next call is judged anew.
	r.allow(`{"parser":"http","http":[{"path":"/grpc.health.v1.Health/Watch"}]}`)
	if _, err := client.Check(ctx, &grpc_health_v1.HealthCheckRequest{}); status.Code(err) != codes.PermissionDenied {
		t.Fatal(err)
	}
	r.revoke()
	if _, err := client.Check(ctx, &grpc_health_v1.HealthCheckRequest{}); status.Code(err) != codes.Unavailable {
		t.Fatal(err)
	}
	if _, err := watch.Recv(); err == nil {
		t.Error("a stream outlived its flow")
	}
}

// h2wire is a client that writes frames.
type h2wire struct {
	*wire
	*http2.Framer
	enc *hpack.Encoder
	buf bytes.Buffer
}

func (r *rig) dialH2() *h2wire {
	w := &h2wire{wire: r.dial()}
	w.wire.send(preface)
	w.Framer = http2.NewFramer(w.wire, w.wire.r)
	w.Framer.AllowIllegalWrites = true
	w.Framer.ReadMetaHeaders = hpack.NewDecoder(4096, nil)
	w.enc = hpack.NewEncoder(&w.buf)
	w.WriteSettings()
	return w
}

// block compresses "name: value" pairs.
func (w *h2wire) block(fields ...string) []byte {
	w.buf.Reset()
	for _, f := range fields {
		i := strings.Index(f[1:], ": ") + 1
		w.enc.WriteField(hpack.HeaderField{Name: f[:i], Value: f[i+2:]})
	}
	return slices.Clone(w.buf.Bytes())
}

func (w *h2wire) request(id uint32, end bool, fields ...string) {
	w.WriteHeaders(http2.HeadersFrameParam{StreamID: id, EndStream: end, EndHeaders: true, BlockFragment: w.block(fields...)})
}

// outcome reads until something is said of a stream, or of the connection.
func (w *h2wire) outcome(id uint32) string {
	w.t.Helper()
	for {
		f, err := w.ReadFrame()
		var limit net.Error
		if errors.As(err, &limit) && limit.Timeout() {
			w.t.Fatal(err)
		}
		if err != nil {
			return "the connection ended"
		}
		switch f := f.(type) {
		case *http2.MetaHeadersFrame:
			if f.StreamID == id {
				return f.PseudoValue("status")
			}
		case *http2.RSTStreamFrame:
			if f.StreamID == id {
				return "reset, " + f.ErrCode.String()
			}
		case *http2.GoAwayFrame:
			return "GOAWAY, " + f.ErrCode.String()
		}
	}
}

var plain = []string{":method: GET", ":scheme: http", ":path: /", ":authority: a"}

// The windows hold though this proxy answers by itself, and takes of them.
func TestRefusedRequestsAndWindows(t *testing.T) {
	const length = 200000
	b := newBackend(t, func(w http.ResponseWriter, q *http.Request) { w.Write(make([]byte, length)) })
	r := newRig(t, b.addr, `{"parser":"http","http":[{"path":"/"}]}`, Options{})
	w := r.dialH2()
	for i := range 100 {
		w.request(uint32(2*i+1), true, ":method: GET", ":scheme: http", ":path: /no", ":authority: a", fmt.Sprintf("x-%d: %d", i, i))
		if got := w.outcome(uint32(2*i + 1)); got != "403" {
			t.Fatal(got)
		}
	}
	w.request(301, true, plain...)
	window, got := 65535-100*len(deniedBody), 0
	for got < length {
		f, err := w.ReadFrame()
		if err != nil {
			t.Fatal(err)
		}
		d, ok := f.(*http2.DataFrame)
		if !ok {
			continue
		}
		if d.StreamID != 301 {
			continue // an answer of the proxy
		}
		got += len(d.Data())
		if window -= len(d.Data()); window < 0 {
			t.Fatal("more data than the connection's window holds")
		}
		if window == 0 || got == 65535-100*len(deniedBody) {
			w.WriteWindowUpdate(0, 100000)
			w.WriteWindowUpdate(301, 200000)
			window += 100000
		}
		if window > 0 && window < 20000 {
			w.WriteWindowUpdate(0, 100000)
			w.WriteWindowUpdate(301, 200000)
			window += 100000
		}
	}
}

// A refused request may come to its end: clients take a reset behind an answer
// badly. One that is long is stopped.
func TestRefusedContentInHTTP2(t *testing.T) {
	b := newBackend(t, nil)
	r := newRig(t, b.addr, landing, Options{DrainBytes: 1000, Streams: 4})
	w := r.dialH2()
	no := []string{":method: POST", ":scheme: http", ":path: /no", ":authority: a"}
	for i := range 10 {
		id := uint32(4*i + 1)
		w.request(id, false, no...)
		if got := w.outcome(id); got != "403" {
			t.Fatal(got)
		}
		switch i % 3 {
		case 0:
			w.WriteData(id, false, make([]byte, 500))
			w.WriteData(id, true, nil)
		case 1:
			w.request(id, true, "x-t: 1")
		case 2:
			w.WriteRSTStream(id, http2.ErrCodeCancel)
		}
		// The next one finds room, and nothing was said of the one before.
		w.request(id+2, true, ":method: POST", ":scheme: http", ":path: /v1/request-landing", ":authority: a")
		for {
			f, err := w.ReadFrame()
			if err != nil {
				t.Fatal(err)
			}
			if f, ok := f.(*http2.RSTStreamFrame); ok {
				t.Fatal(f)
			}
			if f, ok := f.(*http2.MetaHeadersFrame); ok && f.StreamID == id+2 {
				if f.PseudoValue("status") != "200" {
					t.Fatal(f)
				}
				break
			}
		}
	}
	for i, length := range []string{"", "content-length: 2000"} {
		id := uint32(101 + 2*i)
		w.request(id, false, append(no, length)[:len(no)+min(len(length), 1)]...)
		if got := w.outcome(id); got != "403" {
			t.Fatal(got)
		}
		if length == "" {
			w.WriteData(id, false, make([]byte, 1001))
		}
		if got := w.outcome(id); got != "reset, NO_ERROR" {
			t.Error(got)
		}
	}
	if n := len(b.asked()); n != 10 {
		t.Errorf("the server saw %d requests", n)
	}
}
