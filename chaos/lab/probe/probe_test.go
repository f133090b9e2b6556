package probe

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/http"
	"net/netip"
	"os"
	"strings"
	"testing"
	"time"

	"github.com/miekg/dns"
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

// The names of a zone are told by UDP and TCP, what is long is truncated, and a
// request asks for its host there.
func TestNames(t *testing.T) {
	zone, err := ParseZone([]string{"api.Example.com=192.0.2.1,2001:db8::1", "local.test.=127.0.0.1", "long.test=" + strings.TrimSuffix(strings.Repeat("192.0.2.7,", 60), ",")})
	if err != nil {
		t.Fatal(err)
	}
	addr, _ := serve(t, func(ctx context.Context, addr string) error { return Names(ctx, addr, zone) })
	for _, x := range []struct {
		name string
		v6   bool
		want string
		code string
	}{
		{"api.example.com", false, "[192.0.2.1]", "NOERROR"},
		{"API.example.com.", true, "[2001:db8::1]", "NOERROR"},
		{"local.test", true, "[]", "NOERROR"},
		{"other.test", false, "[]", "NXDOMAIN"},
	} {
		ips, code, err := Lookup(t.Context(), addr, x.name, x.v6, 10*time.Second)
		if err != nil || fmt.Sprint(ips) != x.want || code != x.code {
			t.Errorf("%s: %v %s, %v; want %s %s", x.name, ips, code, err, x.want, x.code)
		}
	}
	q := new(dns.Msg).SetQuestion("long.test.", dns.TypeA)
	short, _, err := (&dns.Client{Timeout: 10 * time.Second}).Exchange(q, addr.String())
	if err != nil || !short.Truncated {
		t.Errorf("a long answer by UDP: %v, %v", short, err)
	}
	long, _, err := (&dns.Client{Net: "tcp", Timeout: 10 * time.Second}).Exchange(q, addr.String())
	if err != nil || long.Truncated || len(long.Answer) != 60 {
		t.Errorf("a long answer by TCP: %v, %v", long, err)
	}

	web, _ := serve(t, Deathstar)
	get := func(host string) HTTPResult {
		return Request(t.Context(), http.MethodGet, fmt.Sprintf("http://%s:%d/v1/healthz", host, web.Port()), HTTPOptions{Timeout: 10 * time.Second, DNS: addr})
	}
	if r := get("local.test"); !r.OK || r.Body != "OK\n" || r.Code != "NOERROR" || r.Remote != web.String() {
		t.Errorf("by a name: %+v", r)
	}
	if r := get("other.test"); r.OK || r.Code != "NXDOMAIN" {
		t.Errorf("by a name that does not exist: %+v", r)
	}
	for _, bad := range []string{"api.example.com", "=192.0.2.1", "a=b", "a=fe80::1%eth0"} {
		if _, err := ParseZone([]string{bad}); err == nil {
			t.Errorf("%q is a zone", bad)
		}
	}
}
