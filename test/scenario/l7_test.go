package scenario

import (
	"bufio"
	"bytes"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"portcullis/agent/api"
)

const webPort = 8088

// onlyRequests lets clients make such requests of the server, and no others.
func onlyRequests(method, path string) *api.PolicyFile {
	return &api.PolicyFile{Name: "server.yaml", Content: fmt.Appendf(nil, `
apiVersion: cilium.io/v2
kind: CiliumNetworkPolicy
metadata: {name: server}
spec:
  endpointSelector: {matchLabels: {app: server}}
  ingress:
  - fromEndpoints: [{matchLabels: {app: client}}]
    toPorts: [{ports: [{port: "%d", protocol: TCP}], rules: {http: [{method: %s, path: %s}]}}]
`, webPort, method, path)}
}

// jedi is a tree of 2017: whoever has the force may call the exhaust port.
const jedi = `{"name": "root", "rules": [
  {"coverage": ["app=server"], "allow": ["app=client"]},
  {"coverage": ["app=server"], "l4": [{"in-ports": [{"port": %d, "protocol": "tcp", "l7-parser": "http", "l7-rules": [
    {"expr": "Method(\"POST\") && Path(\"/v1/request-landing\")"},
    {"expr": "Method(\"PUT\") && Path(\"/v1/exhaust-port\") && Header(\"X-Has-Force\", \"true\")"}]}]}]}]}`

// web is an HTTP server on the server workload.
type web struct {
	w     *world
	conns atomic.Int64 // connections that have come
	asked atomic.Int64 // requests that have come
	puts  atomic.Int64 // of them, those with PUT
}

// serveWeb answers each request with who asks, as the server sees it.
func (w *world) serveWeb() *web {
	w.t.Helper()
	x := &web{w: w}
	var ln net.Listener
	w.must(w.InWorkload("server", func() (err error) {
		ln, err = net.Listen("tcp", fmt.Sprintf(":%d", webPort))
		return err
	}))
	srv := &http.Server{Handler: http.HandlerFunc(func(rw http.ResponseWriter, r *http.Request) {
		x.asked.Add(1)
		if r.Method == http.MethodPut {
			x.puts.Add(1)
		}
		io.WriteString(rw, r.RemoteAddr)
	}), ConnState: func(_ net.Conn, s http.ConnState) {
		if s == http.StateNew {
			x.conns.Add(1)
		}
	}}
	done := make(chan struct{})
	go func() { defer close(done); srv.Serve(ln) }()
	w.t.Cleanup(func() { srv.Close(); <-done })
	return x
}

// caller is one connection of the client's.
type caller struct {
	w *world
	c net.Conn
	r *bufio.Reader
}

func (x *web) call() (*caller, error) { return x.callAt(x.w.server.IP4()) }

// callAt calls one of the server's addresses.
func (x *web) callAt(ip netip.Addr) (*caller, error) {
	c, err := x.w.dialTo(x.w.client, netip.AddrPortFrom(ip, webPort), patience)
	if err != nil {
		return nil, err
	}
	x.w.t.Cleanup(func() { c.Close() })
	return &caller{x.w, c, bufio.NewReader(c)}, nil
}

// ask makes one request on the connection, with fields of a header.
func (c *caller) ask(method, path string, patience time.Duration, header ...string) (code int, body string, err error) {
	if err := c.c.SetDeadline(time.Now().Add(patience)); err != nil {
		return 0, "", err
	}
	if _, err := fmt.Fprintf(c.c, "%s %s HTTP/1.1\r\n%s\r\n\r\n", method, path, strings.Join(append(header, "Host: server", "Content-Length: 0"), "\r\n")); err != nil {
		return 0, "", err
	}
	r, err := http.ReadResponse(c.r, nil)
	if err != nil {
		return 0, "", err
	}
	defer r.Body.Close()
	b, err := io.ReadAll(r.Body)
	return r.StatusCode, string(b), err
}

// says checks what a request is answered with.
func (c *caller) says(when, method, path string, code int, header ...string) {
	c.w.t.Helper()
	got, body, err := c.ask(method, path, patience, header...)
	want := c.c.LocalAddr().String()
	if code == http.StatusForbidden {
		want = "Access denied"
	}
	if err != nil || got != code || !strings.HasPrefix(body, want) {
		c.w.t.Errorf("%s: %s %s: %d %q, %v; want %d %q", when, method, path, got, body, err, code, want)
	}
}

// once makes a request on a connection of its own.
func (x *web) once(method, path string) (code int, err error) {
	c, err := x.call()
	if err != nil {
		return 0, err
	}
	defer c.c.Close()
	code, _, err = c.ask(method, path, patience)
	return code, err
}

// proxyOf returns the process of a node's proxy; 0: there is none.
func (w *world) proxyOf(node string) int {
	all, err := filepath.Glob("/proc/[0-9]*/cmdline")
	w.must(err)
	for _, at := range all {
		b, err := os.ReadFile(at)
		if err != nil {
			continue // it has ended
		}
		args := bytes.Split(b, []byte{0})
		if len(args) > 3 && string(args[1]) == "proxy" && string(args[3]) == w.PinDir(node) {
			pid, _ := strconv.Atoi(filepath.Base(filepath.Dir(at)))
			return pid
		}
	}
	return 0
}

// Requests are let by and refused one by one, on one connection, and the server
// sees the client; a changed policy judges the next; a proxy that is killed lets
// nothing by and is there again; and a binding that is revoked ends the connection.
func TestRequests(t *testing.T) {
	w := newWorld(t)
	x := w.serveWeb()
	const landing, port = "/v1/request-landing", "/v1/exhaust-port"
	w.must(w.ImportPoliciesAt(t.Context(), verifier, onlyRequests("POST", landing)))
	w.eventually("the proxy serves", func() error {
		code, err := x.once("POST", landing)
		if err == nil && code != http.StatusOK {
			err = fmt.Errorf("it answers %d", code)
		}
		return err
	})
	c, err := x.call()
	w.must(err)
	c.says("at first", "POST", landing, http.StatusOK)
	c.says("at first", "PUT", port, http.StatusForbidden)
	c.says("after a refusal", "POST", landing, http.StatusOK)
	if x.puts.Load() > 0 {
		t.Error("a request that was refused has come to the server")
	}
	if err := w.reachTo(w.stranger, w.at(webPort)); err == nil {
		t.Error("a stranger gets in")
	}

	w.must(w.ImportPoliciesAt(t.Context(), verifier, onlyRequests("PUT", port)))
	c.says("under another policy", "POST", landing, http.StatusForbidden)
	c.says("under another policy", "PUT", port, http.StatusOK)
	w.must(w.ImportPoliciesAt(t.Context(), verifier, onlyRequests("POST", landing)))
	c.says("under the first again", "PUT", port, http.StatusForbidden)
	w.must(w.ImportPoliciesAt(t.Context(), verifier, &api.PolicyFile{Name: "tree.json", Content: fmt.Appendf(nil, jedi, webPort)}))
	c.says("under the tree", "POST", landing, http.StatusOK)
	c.says("without the force", "PUT", port, http.StatusForbidden)
	c.says("with too little of it", "PUT", port, http.StatusForbidden, "X-Has-Force: false")
	c.says("with the force", "PUT", port, http.StatusOK, "X-Has-Force: true")
	x.puts.Store(0)

	pid := w.proxyOf(verifier)
	if pid == 0 {
		t.Fatal("no process of the proxy is found")
	}
	w.must(unix.Kill(pid, unix.SIGKILL))
	if code, _, err := c.ask("POST", landing, patience); err == nil {
		t.Errorf("a connection outlives its proxy, and answers %d", code)
	}
	w.eventually("another proxy serves", func() error {
		if code, err := x.once("PUT", port); err == nil && code != http.StatusForbidden {
			t.Errorf("what is refused is answered %d meanwhile", code)
		}
		code, err := x.once("POST", landing)
		if err == nil && code != http.StatusOK {
			err = fmt.Errorf("it answers %d", code)
		}
		return err
	})
	if again := w.proxyOf(verifier); again == pid || again == 0 {
		t.Errorf("the proxy is process %d", again)
	}

	c, err = x.call()
	w.must(err)
	c.says("before the end", "POST", landing, http.StatusOK)
	stamp := w.binding(w.client).GetStamp()
	w.relabel(w.client, "other", patience)
	w.eventually("the revocation arrives", func() error {
		if w.binding(w.client).GetStamp() == stamp {
			return errors.New("it is believed in still")
		}
		return nil
	})
	if code, _, err := c.ask("POST", landing, 2*time.Second); err == nil {
		t.Errorf("the connection outlives the binding, and answers %d", code)
	}
	if x.puts.Load() > 0 {
		t.Error("a request that is refused has come to the server")
	}
}
