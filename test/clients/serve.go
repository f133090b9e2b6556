package main

import (
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"fmt"
	"io"
	"log"
	"math/big"
	"net"
	"net/http"
	"net/netip"
	"strings"
	"time"

	"golang.org/x/net/websocket"
)

const megabyte = 1 << 20

// handler serves what is allowed, and notes all else.
func (w *world) handler() http.Handler {
	mux := http.NewServeMux()
	text := func(s string) http.HandlerFunc {
		return func(rw http.ResponseWriter, r *http.Request) {
			rw.Header().Set("Content-Type", "text/plain")
			io.WriteString(rw, s)
		}
	}
	mux.HandleFunc("POST /v1/request-landing", text("Ship landed\n"))
	mux.HandleFunc("/v1/echo", func(rw http.ResponseWriter, r *http.Request) {
		n, err := io.Copy(io.Discard, r.Body)
		fmt.Fprintf(rw, "%s %s %d bytes, %v\n", r.Proto, r.Method, n, err)
	})
	mux.HandleFunc("GET /public/hello", text("hello\n"))
	mux.HandleFunc("GET /public/proto", func(rw http.ResponseWriter, r *http.Request) { fmt.Fprintln(rw, r.Proto) })
	mux.HandleFunc("GET /public/who", func(rw http.ResponseWriter, r *http.Request) {
		ap, _ := netip.ParseAddrPort(r.RemoteAddr)
		fmt.Fprintln(rw, ap.Addr())
	})
	mux.HandleFunc("GET /public/big", func(rw http.ResponseWriter, r *http.Request) {
		http.ServeContent(rw, r, "big.bin", time.Time{}, bytes.NewReader(make([]byte, 8*megabyte)))
	})
	mux.HandleFunc("GET /public/chunks", func(rw http.ResponseWriter, r *http.Request) {
		for range 50 {
			io.WriteString(rw, strings.Repeat("x", 100))
			rw.(http.Flusher).Flush()
		}
	})
	mux.HandleFunc("GET /public/close", func(rw http.ResponseWriter, r *http.Request) {
		rw.Header().Set("Connection", "close")
		io.WriteString(rw, "hello\n")
	})
	mux.HandleFunc("GET /public/redirect", func(rw http.ResponseWriter, r *http.Request) {
		http.Redirect(rw, r, "/v1/exhaust-port", http.StatusFound)
	})
	mux.HandleFunc("OPTIONS /{$}", text(""))
	mux.Handle("/public/ws", websocket.Server{Handler: func(c *websocket.Conn) {
		for {
			var b []byte
			if websocket.Message.Receive(c, &b) != nil || websocket.Message.Send(c, string(b)) != nil {
				return
			}
		}
	}})
	mux.HandleFunc("/", func(rw http.ResponseWriter, r *http.Request) {
		w.came(r.Method + " " + r.RequestURI)
		http.NotFound(rw, r)
	})
	return mux
}

// serveOn serves HTTP until the world ends.
func (w *world) serveOn(l net.Listener, tc *tls.Config) {
	var p http.Protocols
	p.SetHTTP1(true)
	p.SetUnencryptedHTTP2(true)
	p.SetHTTP2(tc != nil)
	srv := &http.Server{Handler: w.handler(), Protocols: &p, TLSConfig: tc, ErrorLog: log.New(io.Discard, "", 0)}
	done := make(chan struct{})
	go func() {
		defer close(done)
		if tc != nil {
			_ = srv.ServeTLS(l, "", "") // until close
			return
		}
		_ = srv.Serve(l) // until close
	}()
	w.onClose(func() { srv.Close(); <-done })
}

func (w *world) serveWeb() error {
	l, err := w.listen("tcp", webPort)
	if err != nil {
		return err
	}
	w.serveOn(l, nil)
	// The world serves the same, at the addresses of names.
	return w.InNode("two", func() error {
		for _, ip := range worlds {
			l, err := (&net.ListenConfig{}).Listen(context.Background(), "tcp", netip.AddrPortFrom(ip, webPort).String())
			if err != nil {
				return err
			}
			w.serveOn(l, nil)
		}
		return nil
	})
}

// landed makes an allowed request from a place.
func (w *world) landed(ctx context.Context, p place) error {
	c := w.httpClient(p)
	defer c.CloseIdleConnections()
	r, err := http.NewRequestWithContext(ctx, "POST", "http://"+p.at(webPort)+"/v1/request-landing", nil)
	if err != nil {
		return err
	}
	a, err := c.Do(r)
	if err != nil {
		return err
	}
	defer a.Body.Close()
	if a.StatusCode != 200 {
		return fmt.Errorf("it answers %s", a.Status)
	}
	return nil
}

func (w *world) httpClient(p place) *http.Client {
	return &http.Client{Timeout: 10 * time.Second, Transport: &http.Transport{DialContext: func(ctx context.Context, _, to string) (net.Conn, error) { return w.dial(ctx, p, to) }}}
}

type serverCertificate struct {
	tls.Certificate
	pool *x509.CertPool
}

func (w *world) serveTLS() error {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return err
	}
	t := &x509.Certificate{SerialNumber: big.NewInt(1), DNSNames: []string{"a.example", "b.example"}, NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(24 * time.Hour),
		IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageDigitalSignature | x509.KeyUsageCertSign}
	der, err := x509.CreateCertificate(rand.Reader, t, t, &key.PublicKey, key)
	if err != nil {
		return err
	}
	cert, err := x509.ParseCertificate(der)
	if err != nil {
		return err
	}
	w.certificate = serverCertificate{tls.Certificate{Certificate: [][]byte{der}, PrivateKey: key}, x509.NewCertPool()}
	w.certificate.pool.AddCert(cert)
	l, err := w.listen("tcp", tlsPort)
	if err != nil {
		return err
	}
	w.serveOn(l, &tls.Config{Certificates: []tls.Certificate{w.certificate.Certificate}, GetConfigForClient: func(h *tls.ClientHelloInfo) (*tls.Config, error) {
		if h.ServerName != "a.example" {
			w.came("TLS " + h.ServerName)
		}
		return nil, nil
	}})
	return nil
}
