package proxy

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"io"
	"net"
	"net/http"
	"strings"
	"sync"
	"testing"
	"time"

	"portcullis/authz/l7"
	"portcullis/bpf/abi"
)

// patience is how long a test waits for what must happen.
const patience = 60 * time.Second

// rig is a proxy before a server, over loopback.
type rig struct {
	t       testing.TB
	addr    string // of the proxy
	records chan *Record
	server  *Server
	stop    context.CancelFunc
	done    chan error // what Run returned

	mu       sync.Mutex
	decision Decision // guarded by mu
	err      error    // guarded by mu
}

func (r *rig) Judge(Conn) (Decision, error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.decision, r.err
}

func (r *rig) Record(rec *Record) {
	select {
	case r.records <- rec:
	default:
	}
}

// allow changes the rules.
func (r *rig) allow(src string) {
	rs := &l7.Rules{}
	if err := json.Unmarshal([]byte(src), rs); err != nil {
		r.t.Fatal(err)
	}
	if err := rs.Compile(); err != nil {
		r.t.Fatal(err)
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	r.decision = Decision{Rules: []*l7.Rules{rs}, Epoch: r.decision.Epoch + 1}
}

func (r *rig) revoke() {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.err = errors.New("the binding is revoked")
}

// newRig starts a proxy before the server at the address.
func newRig(t testing.TB, backend, rules string, opts Options) *rig {
	t.Helper()
	r := &rig{t: t, records: make(chan *Record, 1024)}
	r.allow(rules)
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	r.addr = l.Addr().String()
	var d net.Dialer
	r.server = New(r, func(ctx context.Context, _ Conn) (net.Conn, error) { return d.DialContext(ctx, "tcp", backend) }, r, opts)
	ctx, cancel := context.WithCancel(context.Background())
	r.stop, r.done = cancel, make(chan error, 1)
	go func() {
		r.done <- r.server.Run(ctx, Listener{l, abi.DirIngress})
		close(r.done)
	}()
	t.Cleanup(func() {
		cancel()
		if err := <-r.done; err != nil {
			t.Error(err)
		}
	})
	return r
}

// record waits for the next record.
func (r *rig) record() *Record {
	r.t.Helper()
	select {
	case rec := <-r.records:
		return rec
	case <-time.After(patience):
		r.t.Fatal("no record")
		return nil
	}
}

func (r *rig) dial() *wire {
	r.t.Helper()
	c, err := net.Dial("tcp", r.addr)
	if err != nil {
		r.t.Fatal(err)
	}
	r.t.Cleanup(func() { c.Close() })
	return newWire(r.t, c)
}

func newWire(t testing.TB, c net.Conn) *wire {
	c.SetDeadline(time.Now().Add(patience))
	return &wire{t, c, bufio.NewReader(c)}
}

// wire is a client that writes bytes.
type wire struct {
	t testing.TB
	net.Conn
	r *bufio.Reader
}

func (w *wire) send(s string) *wire {
	w.t.Helper()
	if _, err := io.WriteString(w.Conn, s); err != nil {
		w.t.Error(err)
	}
	return w
}

// answer reads an answer to a request with the method.
func (w *wire) answer(method string) (*http.Response, string) {
	w.t.Helper()
	res, err := http.ReadResponse(w.r, &http.Request{Method: method})
	if err != nil {
		w.t.Fatal(err)
	}
	body, err := io.ReadAll(res.Body)
	if err != nil {
		w.t.Fatal(err)
	}
	return res, string(body)
}

// rest reads until the end, which err tells.
func (w *wire) rest() (string, error) {
	b, err := io.ReadAll(w.r)
	if errors.Is(err, net.ErrClosed) {
		w.t.Fatal(err)
	}
	return string(b), err
}

// backend is a web server that remembers what it was asked.
type backend struct {
	addr string
	mu   sync.Mutex
	seen []string // guarded by mu: method, target, host, body
}

func newBackend(t testing.TB, h http.HandlerFunc) *backend {
	t.Helper()
	b := &backend{}
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	b.addr = l.Addr().String()
	s := &http.Server{Handler: http.HandlerFunc(func(w http.ResponseWriter, q *http.Request) {
		if h != nil {
			h(w, q)
			return
		}
		body, err := io.ReadAll(q.Body)
		if err != nil {
			return // not a whole request
		}
		b.mu.Lock()
		b.seen = append(b.seen, strings.Join([]string{q.Method, q.RequestURI, q.Host, string(body)}, " "))
		b.mu.Unlock()
		io.WriteString(w, "Ship landed\n")
	})}
	var p http.Protocols
	p.SetHTTP1(true)
	p.SetUnencryptedHTTP2(true)
	s.Protocols = &p
	done := make(chan struct{})
	go func() { defer close(done); s.Serve(l) }()
	t.Cleanup(func() { s.Close(); <-done })
	return b
}

func (b *backend) asked() []string {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.seen
}

const (
	landing  = `{"parser":"http","rule":"landing","http":[{"method":"POST","path":"/v1/request-landing"}]}`
	anything = `{"parser":"http","rule":"anything","http":[{}]}`
)
