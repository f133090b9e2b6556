package proxy

import (
	"bufio"
	"context"
	"fmt"
	"io"
	"net"
	"net/http"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"portcullis/bpf/abi"
)

// tiny answers every request of keep-alive connections with a few bytes, at
// the least cost that Go has: what is measured is what lies before it.
func tiny(b *testing.B) string {
	b.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		b.Fatal(err)
	}
	b.Cleanup(func() { l.Close() })
	go func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			go func() {
				defer c.Close()
				r := bufio.NewReader(c)
				for {
					for {
						line, err := r.ReadSlice('\n')
						if err != nil {
							return
						}
						if len(line) == 2 {
							break
						}
					}
					if _, err := io.WriteString(c, "HTTP/1.1 200 OK\r\nContent-Type: text/plain\r\nContent-Length: 12\r\n\r\nShip landed\n"); err != nil {
						return
					}
				}
			}()
		}
	}()
	return l.Addr().String()
}

type silent struct{}

func (silent) Record(*Record) {}

// BenchmarkRequests compares requests on 32 kept connections: direct, and
// through the proxy with one rule. Compare the two of one run.
func BenchmarkRequests(b *testing.B) {
	addr := tiny(b)
	r := &rig{t: b}
	r.allow(`{"parser":"http","rule":"r","http":[{"method":"GET","path":"/v1/.*"}]}`)
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		b.Fatal(err)
	}
	var d net.Dialer
	s := New(r, func(ctx context.Context, _ Conn) (net.Conn, error) { return d.DialContext(ctx, "tcp", addr) }, silent{}, Options{})
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- s.Run(ctx, Listener{l, abi.DirIngress}) }()
	defer func() { cancel(); <-done }()
	b.Run("direct", func(b *testing.B) { requests(b, addr) })
	b.Run("proxied", func(b *testing.B) { requests(b, l.Addr().String()) })
	b.Run("connections-direct", func(b *testing.B) { connections(b, addr) })
	b.Run("connections-proxied", func(b *testing.B) { connections(b, l.Addr().String()) })
}

// processor returns the processor time of this process.
func processor() time.Duration {
	var u syscall.Rusage
	if syscall.Getrusage(syscall.RUSAGE_SELF, &u) != nil {
		return 0
	}
	return time.Duration(u.Utime.Nano() + u.Stime.Nano())
}

const benchRequest = "GET /v1/ HTTP/1.1\r\nHost: deathstar.default.svc\r\nUser-Agent: curl/8.14\r\nAccept: */*\r\n\r\n"

func requests(b *testing.B, addr string) {
	var left atomic.Int64
	left.Store(int64(b.N))
	var wg sync.WaitGroup
	for range 32 {
		c, err := net.Dial("tcp", addr)
		if err != nil {
			b.Fatal(err)
		}
		defer c.Close()
		wg.Go(func() {
			buf := make([]byte, 4096)
			for left.Add(-1) >= 0 {
				if _, err := io.WriteString(c, benchRequest); err != nil {
					b.Error(err)
					return
				}
				if n, err := c.Read(buf); err != nil || string(buf[:12]) != "HTTP/1.1 200" {
					b.Errorf("%v %q", err, buf[:n])
					return
				}
			}
		})
	}
	b.ResetTimer()
	before := processor()
	wg.Wait()
	b.ReportMetric(float64(b.N)/b.Elapsed().Seconds(), "req/s")
	// Clients, proxy and server are all here: on a machine that they fill, req/s
	// goes with it; on one that others use as well, it tells more than req/s.
	b.ReportMetric(float64(processor()-before)/float64(b.N), "cpu-ns/req")
}

// connections makes a connection for every request.
func connections(b *testing.B, addr string) {
	var left atomic.Int64
	left.Store(int64(b.N))
	var wg sync.WaitGroup
	for range 8 {
		wg.Go(func() {
			for left.Add(-1) >= 0 {
				if err := once(addr); err != nil {
					b.Error(err)
					return
				}
			}
		})
	}
	wg.Wait()
	b.ReportMetric(float64(b.N)/b.Elapsed().Seconds(), "conn/s")
}

func once(addr string) error {
	c, err := net.Dial("tcp", addr)
	if err != nil {
		return err
	}
	defer c.Close()
	if _, err := io.WriteString(c, benchRequest); err != nil {
		return err
	}
	res, err := http.ReadResponse(bufio.NewReader(c), nil)
	if err != nil {
		return err
	}
	if res.StatusCode != 200 {
		return fmt.Errorf("%s", res.Status)
	}
	_, err = io.Copy(io.Discard, res.Body)
	return err
}
