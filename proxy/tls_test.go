package proxy

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"errors"
	"io"
	"math/big"
	"net"
	"strings"
	"testing"
	"time"
)

// clientHello returns what crypto/tls sends first.
func clientHello(t testing.TB, name string) []byte {
	t.Helper()
	ours, theirs := net.Pipe()
	done := make(chan struct{})
	go func() {
		defer close(done)
		tls.Client(theirs, &tls.Config{ServerName: name, InsecureSkipVerify: name == ""}).Handshake()
	}()
	head := make([]byte, 5)
	if _, err := io.ReadFull(ours, head); err != nil {
		t.Fatal(err)
	}
	rest := make([]byte, int(head[3])<<8|int(head[4]))
	if _, err := io.ReadFull(ours, rest); err != nil {
		t.Fatal(err)
	}
	ours.Close()
	<-done
	return append(head, rest...)
}

func serverName(b []byte) (string, error) { return new(hello).read(b) }

// records spreads the message of one record over records of a size.
func records(hello []byte, size int) (out []byte) {
	for body := hello[5:]; len(body) > 0; {
		n := min(size, len(body))
		out = append(append(out, hello[0], hello[1], hello[2], byte(n>>8), byte(n)), body[:n]...)
		body = body[n:]
	}
	return out
}

func TestServerName(t *testing.T) {
	for _, want := range []string{"a.example", "", strings.Repeat("a", 60) + ".example"} {
		first := clientHello(t, want)
		for _, size := range []int{1, 2, 3, 7, 100, 1 << 14} {
			b := records(first, size)
			if name, err := serverName(b); name != want || err != nil {
				t.Errorf("records of %d bytes: %q %v, want %q", size, name, err, want)
			}
			bits := hello{}
			for n := range b {
				if name, err := bits.read(b[:n]); err != errMore {
					t.Fatalf("%d of %d bytes: %q %v", n, len(b), name, err)
				}
			}
			if name, err := bits.read(b); name != want || err != nil {
				t.Errorf("records of %d bytes, bit by bit: %q %v, want %q", size, name, err, want)
			}
		}
	}
	if name, err := serverName(append(clientHello(t, "A.Example"), "more"...)); name != "a.example" || err != nil {
		t.Errorf("%q %v", name, err)
	}
	for what, b := range map[string][]byte{
		"an HTTP request":  []byte("GET / HTTP/1.1\r\n\r\n"),
		"an alert":         []byte("\x15\x03\x03\x00\x02\x02\x70"),
		"an empty record":  []byte("\x16\x03\x01\x00\x00"),
		"a long record":    []byte("\x16\x03\x01\x40\x01"),
		"a server's hello": []byte("\x16\x03\x01\x00\x04\x02\x00\x00\x00"),
		"a long hello":     []byte("\x16\x03\x01\x00\x04\x01\x02\x00\x00"),
		"a cut name":       bytes.Replace(clientHello(t, "a.example"), []byte("\x00\x00\x09a.example"), []byte("\x00\x00\x0aa.example"), 1),
		"a NUL in a name":  bytes.Replace(clientHello(t, "a.example"), []byte("a.example"), []byte("a.exam\x00le"), 1),
		"a final dot":      bytes.Replace(clientHello(t, "a.example"), []byte("a.example"), []byte("a.exampl."), 1),
	} {
		if name, err := serverName(b); err == nil || err == errMore {
			t.Errorf("%s: %q %v", what, name, err)
		}
	}
}

// FuzzServerName holds the reader against that of crypto/tls: a hello that both
// take has one name.
func FuzzServerName(f *testing.F) {
	f.Add(clientHello(f, "a.example"))
	f.Add(records(clientHello(f, "b.example"), 50))
	f.Add(clientHello(f, ""))
	f.Fuzz(func(t *testing.T, data []byte) {
		name, err := serverName(data)
		if err != nil {
			return
		}
		theirs, seen := "", false
		ours, far := net.Pipe()
		go func() {
			ours.Write(data)
			ours.Close()
		}()
		found := errors.New("found")
		tls.Server(readOnly{far}, &tls.Config{GetConfigForClient: func(h *tls.ClientHelloInfo) (*tls.Config, error) {
			theirs, seen = h.ServerName, true
			return nil, found
		}}).Handshake()
		far.Close()
		if seen && !strings.EqualFold(name, theirs) {
			t.Errorf("we read %q, crypto/tls %q", name, theirs)
		}
	})
}

// readOnly swallows what is written.
type readOnly struct{ net.Conn }

func (readOnly) Write(b []byte) (int, error) { return len(b), nil }

func TestTLSPassesByName(t *testing.T) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	template := &x509.Certificate{SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "x"}, NotAfter: time.Now().Add(time.Hour), DNSNames: []string{"a.example", "b.example"}}
	der, err := x509.CreateCertificate(rand.Reader, template, template, &key.PublicKey, key)
	if err != nil {
		t.Fatal(err)
	}
	cert, err := x509.ParseCertificate(der)
	if err != nil {
		t.Fatal(err)
	}
	roots := x509.NewCertPool()
	roots.AddCert(cert)
	addr := rawServer(t, func(w *wire) {
		c := tls.Server(w.Conn, &tls.Config{Certificates: []tls.Certificate{{Certificate: [][]byte{der}, PrivateKey: key}}})
		io.Copy(c, c)
	})
	r := newRig(t, addr, `{"parser":"tls","rule":"names","serverNames":["a.example"]}`, Options{Recheck: 10 * time.Millisecond})
	dial := func(name string) (*tls.Conn, error) {
		return tls.DialWithDialer(&net.Dialer{Timeout: patience}, "tcp", r.addr, &tls.Config{ServerName: name, RootCAs: roots})
	}
	if _, err := dial("b.example"); err == nil || !strings.Contains(err.Error(), "unrecognized name") {
		t.Errorf("b.example: %v", err)
	}
	if rec := r.record(); rec.Verdict != Denied || rec.ServerName != "b.example" {
		t.Errorf("%+v", rec)
	}
	c, err := dial("a.example")
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	if rec := r.record(); rec.Verdict != Forwarded || rec.ServerName != "a.example" || rec.Rule != "names" {
		t.Errorf("%+v", rec)
	}
	c.SetDeadline(time.Now().Add(patience))
	buf := make([]byte, 5)
	if _, err := c.Write([]byte("hello")); err != nil {
		t.Fatal(err)
	}
	if _, err := io.ReadFull(c, buf); err != nil || string(buf) != "hello" {
		t.Fatal(string(buf), err)
	}
	r.allow(`{"parser":"tls","serverNames":["b.example"]}`)
	if _, err := c.Read(buf); err == nil {
		t.Error("the connection stands though its name is allowed no longer")
	}
	w := r.dial().send("GET / HTTP/1.1\r\n\r\n")
	if got, err := w.rest(); err == nil || got != "" {
		t.Errorf("what is not TLS was answered %q and ended in peace", got)
	}
}
