package main

import (
	"context"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"strconv"
	"strings"
	"syscall"
	"time"
)

// denied is what a client sees of a refused request.
const denied = "Access denied"

func curls(w *world) []check {
	big := w.file("big", strings.Repeat("0123456789abcdef", 3*megabyte/16))
	echo := func(proto, method string, n int) string {
		return fmt.Sprintf("%s %s %d bytes, <nil>", proto, method, n)
	}
	curl := func(what, out string, args []string, want ...string) check {
		return w.command("curl", "curl", what, out, append([]string{"curl", "-sS", "--max-time", "30"}, args...), want...)
	}
	const h1, h2 = "HTTP/1.1", "HTTP/2.0"
	return []check{
		curl("`POST` that is allowed", "200", []string{"-X", "POST", "{web}/v1/request-landing"}, "=Ship landed"),
		curl("`PUT` that is not", "403, `Access denied`", []string{"-X", "PUT", "-w", "%{http_code} %{content_type}", "{web}/v1/exhaust-port"}, "="+denied+"\n403 text/plain; charset=utf-8"),
		curl("allowed, refused and allowed in turn", "one connection", []string{"-w", "%{http_code} %{num_connects},", "-o", "/dev/null", "{web}/public/hello",
			"-o", "/dev/null", "{web}/v1/secret", "-o", "/dev/null", "{web}/public/hello", "-o", "/dev/null", "{web}/v1/secret"}, "=200 1,403 0,200 0,403 0,"),
		curl("whom the server sees", "the client's address", []string{"{web}/public/who"}, "={me}"),
		curl("`HEAD`, allowed and refused", "200 and 403 without content, one connection", []string{"-I", "-w", "%{http_code} %{num_connects} %{size_download},", "-o", "/dev/null", "{web}/public/big", "-o", "/dev/null", "{web}/v1/secret", "-o", "/dev/null", "{web}/public/hello"},
			"=200 1 0,403 0 0,200 0 0,"),
		curl("3 MiB with `Expect: 100-continue`", "goes through", []string{"-H", "Expect: 100-continue", "--data-binary", "@" + big, "{web}/v1/echo"}, "="+echo(h1, "POST", 3*megabyte)),
		curl("the same, refused", "403 before the content, which is not sent", []string{"-H", "Expect: 100-continue", "--data-binary", "@" + big, "-w", "%{http_code} %{size_upload}", "{web}/v1/secret"}, "="+denied+"\n403 0"),
		curl("3 MiB without `Expect`, refused", "403, the connection ends", []string{"-H", "Expect:", "--data-binary", "@" + big, "-w", "%{http_code}", "{web}/v1/secret"}, denied, "403"),
		curl("chunked upload of 3 MiB, `PUT`", "goes through", []string{"-H", "Transfer-Encoding: chunked", "-T", big, "{web}/v1/echo"}, "="+echo(h1, "PUT", 3*megabyte)),
		curl("chunked upload, small and refused, then an allowed request", "403 and 200 on one connection", []string{"-H", "Transfer-Encoding: chunked", "-H", "Expect:", "-d", "hello", "-w", "%{http_code} %{num_connects},", "-o", "/dev/null", "{web}/v1/secret",
			"--next", "-sS", "-w", "%{http_code} %{num_connects},", "-o", "/dev/null", "{web}/public/hello"}, "=403 1,200 0,"),
		curl("8 MiB, a range of it, chunks, the end of the connection", "all bytes", []string{"-w", "%{size_download} ", "-o", "/dev/null", "{web}/public/big", "-o", "/dev/null", "{web}/public/chunks", "-o", "/dev/null", "{web}/public/close",
			"--next", "-sS", "-r", "100-299", "-w", "%{http_code} %{size_download}", "-o", "/dev/null", "{web}/public/big"}, "=8388608 5000 6 206 200"),
		curl("form with a file", "goes through", []string{"-F", "a=b", "-F", "file=@" + big, "{web}/v1/echo"}, h1+" POST 3146", "<nil>"),
		curl("compression, cookies, authorization, a header of 8 kB", "go through", []string{"--compressed", "-b", "a=b; c=d", "-u", "me:secret", "-H", "X-Long: " + strings.Repeat("y", 8000), "{web}/public/hello"}, "=hello"),
		curl("a redirect from an allowed to a refused path, followed", "403", []string{"-L", "{web}/public/redirect"}, "="+denied),
		curl("HTTP/1.0", "200 and 403", []string{"--http1.0", "-w", "%{http_code},", "{web}/public/hello", "{web}/v1/secret"}, "200,", denied, "403,"),
		curl("dot segments as they are", "400", []string{"--path-as-is", "-w", "%{http_code}", "{web}/public/../v1/secret"}, "400"),
		curl("`--http2` (offers h2c)", "200 by HTTP/1.1: the offer is taken out", []string{"--http2", "-w", "%{http_version}", "{web}/public/proto"}, "=HTTP/1.1\n1.1"),
		curl("the same with content", "goes through", []string{"--http2", "--data-binary", "@" + big, "{web}/v1/echo"}, "="+echo(h1, "POST", 3*megabyte)),
		curl("`--http2-prior-knowledge`", "200 by HTTP/2", []string{"--http2-prior-knowledge", "-w", "%{http_version}", "{web}/public/proto"}, "=HTTP/2.0\n2"),
		curl("the same, refused", "403, `Access denied`", []string{"--http2-prior-knowledge", "-X", "PUT", "{web}/v1/exhaust-port"}, "="+denied),
		curl("refused with 5 bytes of content in HTTP/2", "403", []string{"--http2-prior-knowledge", "-d", "hello", "-w", "%{http_code}", "{web}/v1/secret"}, "="+denied+"\n403"),
		curl("refused with 60 kB", "403", []string{"--http2-prior-knowledge", "-H", "Expect:", "--data-binary", "@" + w.file("some", strings.Repeat("x", 60_000)), "-w", "%{http_code}", "{web}/v1/secret"}, "="+denied+"\n403"),
		curl("refused with 3 MiB", "an error, as of servers that do not read it (this version takes no answer before the end of its content)", []string{"--http2-prior-knowledge", "-o", "/dev/null", "--data-binary", "@" + big, "{web}/v1/secret"}, "exit 92"),
		curl("3 MiB up in HTTP/2", "all bytes", []string{"--http2-prior-knowledge", "--data-binary", "@" + big, "{web}/v1/echo"}, echo(h2, "POST", 3*megabyte)),
		curl("8 MiB down", "all bytes", []string{"--http2-prior-knowledge", "-o", "/dev/null", "-w", "%{size_download}", "{web}/public/big"}, "=8388608"),
		curl("20 at once in HTTP/1.1 (`-Z`)", "all", []string{"-Z", "{web}/public/hello?[1-20]"}, strings.TrimSpace(strings.Repeat("hello\n", 20))),
		curl("a method that no rule names", "403", []string{"--http2-prior-knowledge", "-X", "PROPFIND", "-w", "%{http_code}", "{web}/public/hello"}, "403"),
	}
}

const pythonRequests = `
import requests, sys
web = sys.argv[1]
s = requests.Session()
assert s.post(web + "/v1/request-landing").text == "Ship landed\n"
r = s.put(web + "/v1/exhaust-port", data="x")
assert (r.status_code, r.text) == (403, "Access denied\n"), r.text
def parts():
    for i in range(100): yield b"y" * 1000
assert "100000 bytes" in s.post(web + "/v1/echo", data=parts()).text
assert s.post(web + "/v1/secret", data=parts()).status_code in (403,)
assert len(s.get(web + "/public/big").content) == 8 << 20
assert s.get(web + "/public/hello", params={"q": "a b/c?&ü"}).text == "hello\n"
assert s.request("PATCH", web + "/public/hello").status_code == 403
with s.get(web + "/public/chunks", stream=True) as r:
    assert sum(len(x) for x in r.iter_content(7)) == 5000
print("ok")
`

// requesters are other clients of HTTP/1.1.
func requesters(w *world) []check {
	get := func(what, out string, args []string, want ...string) check {
		return w.command("wget", "wget", what, out, append([]string{"wget", "-q", "--tries=1", "--timeout=30", "-O", "-"}, args...), want...)
	}
	return []check{
		get("pages and a post, one connection", "200", []string{"{web}/public/hello", "{web}/public/proto", "{web}/public/chunks"}, "hello\nHTTP/1.1"),
		get("a refused page", "403, exit status 8", []string{"--content-on-error", "{web}/v1/secret"}, "="+denied, "exit 8"),
		get("`HEAD`", "200", []string{"--spider", "{web}/public/hello"}, "="),
		w.command("Python requests", "python3-requests", "keep-alive, generators as content, streams, queries, refusals", "as without a proxy; 403", []string{"/usr/bin/python3", w.file("r.py", pythonRequests), "{web}"}, "=ok"),
		{client: "Go net/http", pack: "go", what: "kept connection, refusals in between; HTTP/2 without TLS; content that is refused", out: "one connection; 403", run: w.goHTTP},
	}
}

// goHTTP makes requests that are allowed and refused, in HTTP/1.1 and HTTP/2.
func (w *world) goHTTP(ctx context.Context, p place) error {
	for _, two := range []bool{false, true} {
		dials := 0
		var protocols http.Protocols
		protocols.SetHTTP1(!two)
		protocols.SetUnencryptedHTTP2(two)
		tr := &http.Transport{Protocols: &protocols, DialContext: func(ctx context.Context, _, to string) (net.Conn, error) {
			dials++
			return w.dial(ctx, p, to)
		}}
		defer tr.CloseIdleConnections()
		for i := range 20 {
			method, path, want := "POST", "/v1/echo", 200
			if i%3 == 1 {
				path, want = "/v1/secret", 403
			}
			r, err := http.NewRequestWithContext(ctx, method, "http://"+p.at(webPort)+path, io.LimitReader(zeros{}, 20_000))
			if err != nil {
				return err
			}
			a, err := tr.RoundTrip(r)
			if err != nil {
				return fmt.Errorf("request %d: %w", i, err)
			}
			b, err := io.ReadAll(a.Body)
			a.Body.Close()
			if err != nil || a.StatusCode != want || want == 403 && string(b) != denied+"\n" {
				return fmt.Errorf("request %d: %s %q %v", i, a.Status, b, err)
			}
		}
		if dials != 1 {
			return fmt.Errorf("HTTP/2 %v: %d connections", two, dials)
		}
	}
	return nil
}

type zeros struct{}

func (zeros) Read(b []byte) (int, error) { return len(b), nil }

// loads are programs that make many requests.
func loads(w *world) []check {
	return []check{
		w.command("ab", "apache2-utils", "1,000 requests, 8 at a time; `-k`", "none fails", []string{"ab", "-q", "-n", "1000", "-c", "8", "-k", "{web}/public/hello"}, "Failed requests:        0", "Complete requests:      1000", "!Non-2xx"),
		w.command("ab", "apache2-utils", "a connection each; HTTP/1.0", "none fails", []string{"ab", "-q", "-n", "200", "-c", "8", "{web}/public/hello"}, "Failed requests:        0", "Complete requests:      200", "!Non-2xx"),
		w.command("ab", "apache2-utils", "refused, `-k`", "403, all of them", []string{"ab", "-q", "-n", "200", "-c", "8", "-k", "{web}/v1/secret"}, "Failed requests:        0", "Non-2xx responses:      200"),
		w.command("wrk", "wrk", "a second, 16 connections", "no error", []string{"wrk", "-d", "1s", "-c", "16", "-t", "2", "{web}/public/hello"}, "requests in", "!Socket errors", "!Non-2xx"),
		w.command("hey", "hey", "1,000 requests, 10 at a time", "all 200", []string{"hey", "-n", "1000", "-c", "10", "{web}/public/hello"}, "[200]\t1000 responses", "!Error"),
		w.command("h2load", "nghttp2-client", "HTTP/2: 2,000 requests on 4 connections, 100 at a time each", "all 200", []string{"h2load", "--connect-to={host}:8080", "-n", "2000", "-c", "4", "-m", "100", "http://server:8080/public/hello"}, "2000 succeeded, 0 failed", "2000 2xx"),
		w.command("h2load", "nghttp2-client", "the same, refused", "all 403", []string{"h2load", "--connect-to={host}:8080", "-n", "2000", "-c", "4", "-m", "100", "http://server:8080/v1/secret"}, "2000 done, 0 succeeded, 2000 failed, 0 errored", "2000 4xx"),
		w.command("h2load", "nghttp2-client", "HTTP/1.1 (`--h1`)", "all 200", []string{"h2load", "--connect-to={host}:8080", "--h1", "-n", "1000", "-c", "4", "http://server:8080/public/hello"}, "1000 succeeded, 0 failed", "1000 2xx"),
		w.command("nghttp", "nghttp2-client", "priorities on streams that are not open, three pages, a trailer", "200", []string{"nghttp", "-s", "-n", "--trailer", "x-t: y", "{web}/public/hello", "{web}/public/big", "{web}/public/chunks"}, " 200 ", "/public/big"),
		w.command("nghttp", "nghttp2-client", "`-u` (h2c by HTTP/1.1)", "refused by the client: the server does not switch", []string{"nghttp", "-u", "{web}/public/hello"}, "HTTP Upgrade failed"),
	}
}

const nginxConfig = `
daemon off; pid DIR/nginx.pid; error_log stderr error; worker_processes 1;
events { worker_connections 256; }
http {
  access_log off;
  client_body_temp_path DIR/body; proxy_temp_path DIR/proxy; fastcgi_temp_path DIR/f; uwsgi_temp_path DIR/u; scgi_temp_path DIR/s;
  upstream web { server SERVER; keepalive 8; }
  server { listen 127.0.0.1:7001; client_max_body_size 100m;
    location / { proxy_pass http://SERVER; } }
  server { listen 127.0.0.1:7002; client_max_body_size 100m; proxy_request_buffering off;
    location / { proxy_pass http://web; proxy_http_version 1.1; proxy_set_header Connection ""; }
    location /public/ws { proxy_pass http://web; proxy_http_version 1.1; proxy_set_header Upgrade $http_upgrade; proxy_set_header Connection "upgrade"; } }
}
`

const haproxyConfig = `
global
  maxconn 256
defaults
  mode http
  timeout connect 5s
  timeout client 30s
  timeout server 30s
  http-reuse always
frontend web
  bind 127.0.0.1:7001
  default_backend web
backend web
  option httpchk
  server s SERVER check inter 200ms
frontend two
  bind 127.0.0.1:7002
  default_backend two
backend two
  server s SERVER proto h2
`

// middles are reverse proxies that are clients themselves.
func middles(w *world) []check {
	var out []check
	for _, x := range []struct{ name, config, version, what, other string }{
		{"nginx", nginxConfig, "1.22", "`proxy_pass` as it is (HTTP/1.0), and with kept connections of HTTP/1.1: pages, content, refusals, WebSocket", "as without; 403"},
		{"haproxy", haproxyConfig, "2.6", "HTTP/1.1, HTTP/2 to the server, `option httpchk` (HTTP/1.0 without `Host`)", "as without; 403"},
	} {
		out = append(out, check{client: x.name, pack: x.name, what: x.what, out: x.other, run: func(ctx context.Context, p place) error { return w.through(ctx, p, x.name, x.config) }})
	}
	return out
}

// through starts a reverse proxy at a place, and asks it.
func (w *world) through(ctx context.Context, p place, name, config string) error {
	at, err := exec.LookPath(name)
	if err != nil {
		if at, err = exec.LookPath("/usr/sbin/" + name); err != nil {
			return fmt.Errorf("%s: %w", name, errMissing)
		}
	}
	dir := w.dir + "/" + name + strconv.Itoa(p.index)
	if err := os.MkdirAll(dir, 0o777); err != nil {
		return err
	}
	file := w.file(name+strconv.Itoa(p.index)+".conf", strings.NewReplacer("DIR", dir, "SERVER", p.at(webPort)).Replace(config))
	args := []string{"-c", file, "-p", dir}
	if name == "haproxy" {
		args = []string{"-f", file, "-db"}
	}
	var said strings.Builder
	cmd := exec.Command(at, args...)
	cmd.Stdout, cmd.Stderr = io.Discard, &said
	cmd.WaitDelay = 10 * time.Second
	if err := w.InWorkload(p.from.Spec.FullName(), cmd.Start); err != nil {
		return err
	}
	defer func() {
		_ = cmd.Process.Signal(syscall.SIGTERM) // its children go with it
		_ = cmd.Wait()                          // it was told to
	}()
	for deadline := time.Now().Add(20 * time.Second); ; time.Sleep(50 * time.Millisecond) {
		c, err := w.dial(ctx, p, "127.0.0.1:7001")
		if err == nil {
			c.Close()
			break
		}
		if time.Now().After(deadline) {
			return fmt.Errorf("%s does not listen: %w %s", name, err, said.String())
		}
	}
	time.Sleep(time.Second) // some checks of health
	for _, port := range []string{"7001", "7002"} {
		to := "http://127.0.0.1:" + port
		for range 3 {
			if err := w.expect(ctx, p, []string{"curl", "-sS", "-w", "%{http_code},", "-o", "-", to + "/public/hello", "-o", "-", to + "/v1/secret", "-o", "/dev/null", to + "/public/big"}, "=hello\n200,"+denied+"\n403,200,"); err != nil {
				return fmt.Errorf("port %s: %w %s", port, err, said.String())
			}
		}
		if err := w.expect(ctx, p, []string{"curl", "-sS", "--data-binary", "@{dir}/big", to + "/v1/echo"}, "3145728 bytes, <nil>"); err != nil {
			return fmt.Errorf("port %s: %w %s", port, err, said.String())
		}
	}
	if name == "nginx" {
		return w.expect(ctx, p, []string{"/usr/bin/python3", w.file("ws.py", pythonWebSocket), "ws://127.0.0.1:7002/public/ws"}, "=ok")
	}
	return nil
}
