package main

import (
	"context"
	"crypto/tls"
	"fmt"
	"io"
	"net"
	"net/http"
	"strings"
	"time"
)

// tlsClients say the name of a server in their hello.
func tlsClients(w *world) []check {
	curl := func(what, out, name string, args []string, want ...string) check {
		return w.command("curl (TLS)", "curl", what, out, append([]string{"curl", "-ksS", "--max-time", "30", "--resolve", name + ":8443:{addr}", "https://" + name + ":8443/public/proto"}, args...), want...)
	}
	openssl := func(what, out string, args []string, want ...string) check {
		return w.command("openssl s_client", "openssl", what, out, append([]string{"openssl", "s_client", "-brief", "-connect", "{tls}"}, args...), want...)
	}
	gnutls := func(what, out, name string, want ...string) check {
		return w.command("gnutls-cli", "gnutls-bin", what, out, []string{"gnutls-cli", "--insecure", "--sni-hostname", name, "-p", "8443", "{addr}"}, want...)
	}
	var long []string
	for i := range 200 {
		long = append(long, fmt.Sprintf("protocol-%04d", i))
	}
	const alert = "unrecognized name"
	return []check{
		curl("a name that is allowed, HTTP/2 and HTTP/1.1", "as without", "a.example", nil, "=HTTP/2.0"),
		curl("TLS 1.2, HTTP/1.1", "as without", "a.example", []string{"--tls-max", "1.2", "--http1.1"}, "=HTTP/1.1"),
		curl("a name in capitals", "as without", "A.EXAMPLE", nil, "=HTTP/2.0"),
		curl("a name that is not", "alert `unrecognized_name`", "b.example", nil, alert, "exit 35"),
		w.command("curl (TLS)", "curl", "an address, so no name", "alert", []string{"curl", "-ksS", "https://{tls}/public/proto"}, alert, "exit 35"),
		openssl("a name that is allowed, TLS 1.3 and 1.2", "as without", []string{"-servername", "a.example"}, "CONNECTION ESTABLISHED", "TLSv1.3"),
		openssl("`-tls1_2`", "as without", []string{"-tls1_2", "-servername", "a.example"}, "CONNECTION ESTABLISHED", "TLSv1.2"),
		openssl("a hello of 3 kB in records of 512 bytes", "as without", []string{"-servername", "a.example", "-max_send_frag", "512", "-alpn", strings.Join(append(long, "http/1.1"), ",")}, "CONNECTION ESTABLISHED"),
		openssl("the same with a name that is not allowed", "alert", []string{"-servername", "b.example", "-max_send_frag", "512", "-alpn", strings.Join(append(long, "http/1.1"), ",")}, alert, "!ESTABLISHED", "exit *"),
		openssl("no name", "alert", []string{"-noservername"}, alert, "exit *"),
		openssl("a name that is not allowed", "alert", []string{"-servername", "a.example.org"}, alert, "exit *"),
		gnutls("a name that is allowed", "as without", "a.example", "Handshake was completed"),
		gnutls("a name that is not", "alert", "b.example", "!Handshake was completed", "exit *"),
		{client: "Go crypto/tls", pack: "go", what: "a hello with X25519MLKEM768; sessions taken up again; a hello that comes byte by byte; names that are not allowed", out: "as without; alert", run: w.goTLS},
	}
}

// byByte writes its first bytes one by one.
type byByte struct {
	net.Conn
	left int
}

func (c *byByte) Write(b []byte) (n int, err error) {
	for ; c.left > 0 && n < len(b); c.left-- {
		if _, err := c.Conn.Write(b[n : n+1]); err != nil {
			return n, err
		}
		n++
	}
	m, err := c.Conn.Write(b[n:])
	return n + m, err
}

func (w *world) goTLS(ctx context.Context, p place) error {
	sessions := tls.NewLRUClientSessionCache(8)
	one := func(name string, slow int) (resumed bool, err error) {
		conn, err := w.dial(ctx, p, p.at(tlsPort))
		if err != nil {
			return false, err
		}
		defer conn.Close()
		if err := conn.SetDeadline(time.Now().Add(20 * time.Second)); err != nil {
			return false, err
		}
		c := tls.Client(&byByte{conn, slow}, &tls.Config{ServerName: name, RootCAs: w.certificate.pool, ClientSessionCache: sessions})
		tr := &http.Transport{DialTLSContext: func(context.Context, string, string) (net.Conn, error) { return c, c.HandshakeContext(ctx) }, DisableKeepAlives: true}
		a, err := (&http.Client{Transport: tr}).Get("https://" + name + "/public/hello")
		if err != nil {
			return false, err
		}
		defer a.Body.Close()
		b, err := io.ReadAll(a.Body)
		if err == nil && string(b) != "hello\n" {
			err = fmt.Errorf("%s: %q", a.Status, b)
		}
		return c.ConnectionState().DidResume, err
	}
	for i, slow := range []int{0, 0, 2000} {
		resumed, err := one("a.example", slow)
		if err != nil || resumed != (i > 0) {
			return fmt.Errorf("connection %d: resumed %v: %w", i, resumed, err)
		}
	}
	for _, slow := range []int{0, 2000} {
		if _, err := one("b.example", slow); err == nil || !strings.Contains(err.Error(), "unrecognized name") {
			return fmt.Errorf("a name that is not allowed: %w", err)
		}
	}
	return nil
}
