package probe

import (
	"context"
	"errors"
	"net"
	"net/http"
	"net/netip"
	"os"
	"strings"
	"testing"
	"time"
)

// freePort returns an address that nobody listens on.
func freePort(t *testing.T) netip.AddrPort {
	t.Helper()
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer ln.Close()
	return netip.MustParseAddrPort(ln.Addr().String())
}

// serve runs a server until the test ends, and waits until it answers.
func serve(t *testing.T, f func(ctx context.Context, addr string) error) (netip.AddrPort, <-chan error) {
	t.Helper()
	addr := freePort(t)
	ctx, cancel := context.WithCancel(context.Background())
	done, ended := make(chan error, 1), make(chan struct{})
	go func() { defer close(ended); done <- f(ctx, addr.String()) }()
	t.Cleanup(func() { cancel(); <-ended })
	for deadline := time.Now().Add(10 * time.Second); ; {
		if TCPConnect(addr, 0, time.Second).OK {
			return addr, done
		}
		if time.Now().After(deadline) {
			t.Fatal("the server does not come up")
		}
		time.Sleep(time.Millisecond) // polling, with the deadline above
	}
}

func TestDeathstar(t *testing.T) {
	addr, done := serve(t, Deathstar)
	ask := func(method, path string) HTTPResult {
		return HTTP(t.Context(), method, "http://"+addr.String()+path, nil, 5*time.Second)
	}
	if r := ask(http.MethodPost, "/v1/request-landing"); !r.OK || r.Status != 200 || r.Body != "Ship landed\n" {
		t.Errorf("landing: %+v", r)
	}
	if r := ask(http.MethodGet, "/v1/"); !r.OK || r.Status != 200 || !strings.Contains(r.Body, `"name": "Death Star"`) ||
		!strings.Contains(r.Body, "/v1/exhaust-port") || r.ConnectUS <= 0 || r.TotalUS < r.ConnectUS {
		t.Errorf("catalogue: %+v", r)
	}
	if r := ask(http.MethodGet, "/v1/request-landing"); r.Status != http.StatusMethodNotAllowed {
		t.Errorf("landing by GET: %+v", r)
	}
	if r := ask(http.MethodPut, "/v1/exhaust-port"); r.Status != 503 || !strings.HasPrefix(r.Body, "Panic: deathstar exploded\n\ngoroutine ") {
		t.Errorf("exhaust port: %+v", r)
	}
	if err := <-done; !errors.Is(err, ErrExploded) {
		t.Errorf("the server ended with %v", err)
	}
	if r := ask(http.MethodGet, "/v1/"); r.OK || r.Error == "" {
		t.Errorf("it still answers: %+v", r)
	}
}

func TestHelloworld(t *testing.T) {
	addr, _ := serve(t, func(ctx context.Context, addr string) error { return Helloworld(ctx, addr, "v1", "pod-7") })
	const line = "Hello version: v1, instance: pod-7"
	if r := HTTP(t.Context(), http.MethodGet, "http://"+addr.String()+"/hello", nil, 5*time.Second); r.Status != 200 || r.Body != line+"\n" {
		t.Errorf("hello: %+v", r)
	}
	r := UDP(t.Context(), addr, UDPOptions{Count: 2, Timeout: 5 * time.Second})
	if !r.OK || r.Sent != 2 || r.Received != 2 || r.Lines[0] != line || r.FirstUS <= 0 {
		t.Errorf("udp: %+v", r)
	}
	port := netip.MustParseAddrPort(r.Local).Port()
	// One datagram asks for several answers, on the port that it came from.
	r = UDP(t.Context(), addr, UDPOptions{SourcePort: port, Count: 1, Payload: "repeat=3 interval=1ms", Timeout: 300 * time.Millisecond, WaitAll: true})
	if r.Sent != 1 || r.Received != 3 || netip.MustParseAddrPort(r.Local).Port() != port {
		t.Errorf("repeated: %+v", r)
	}
	if r := UDP(t.Context(), freePort(t), UDPOptions{Count: 1, Timeout: 50 * time.Millisecond}); r.OK || r.Error == "" {
		t.Errorf("udp to nobody: %+v", r)
	}
}

func TestTCPConnect(t *testing.T) {
	addr, _ := serve(t, Deathstar)
	if r := TCPConnect(addr, 0, time.Second); !r.OK || r.ConnectUS <= 0 || r.TotalRetr != 0 || r.Local == "" || r.Error != "" {
		t.Errorf("connect: %+v", r)
	}
	if r := TCPConnect(freePort(t), 0, time.Second); r.OK || r.Error == "" {
		t.Errorf("connect to nobody: %+v", r)
	}
}

func TestPing(t *testing.T) {
	for _, ip := range []netip.Addr{netip.MustParseAddr("127.0.0.1"), netip.IPv6Loopback()} {
		r := Ping(t.Context(), ip, 2, 5*time.Second)
		if strings.Contains(r.Error, "needs root") {
			if os.Getenv("CI") == "true" {
				t.Fatal(r.Error)
			}
			t.Skip(r.Error)
		}
		if !r.OK || r.Sent != 2 || r.Received != 2 || len(r.RTTUS) != 2 {
			t.Errorf("ping %v: %+v", ip, r)
		}
	}
}

func TestParseRepeat(t *testing.T) {
	for in, want := range map[string]int{"hello": 1, "repeat=5": 5, "repeat=-1": 1, "repeat=x": 1, "repeat=999999999": maxRepeats} {
		if n, every := parseRepeat(in); n != want || every <= 0 {
			t.Errorf("%q: %d answers, %v apart", in, n, every)
		}
	}
}
