package probe

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"runtime/debug"
	"strconv"
	"strings"
	"sync"
	"time"
)

// ErrExploded is what Deathstar returns after PUT /v1/exhaust-port: the
// server is gone, as its caller asked for.
var ErrExploded = errors.New("deathstar exploded")

// catalogue is what GET /v1/ shows.
const catalogue = `{
  "name": "Death Star",
  "model": "DS-1 Orbital Battle Station",
  "manufacturer": "Imperial Department of Military Research, Sienar Fleet Systems",
  "cost_in_credits": "1000000000000",
  "length": "120000",
  "crew": "342953",
  "passengers": "843342",
  "cargo_capacity": "1000000000000",
  "hyperdrive_rating": "4.0",
  "starship_class": "Deep Space Mobile Battlestation",
  "api": [
    "GET   /v1",
    "GET   /v1/healthz",
    "POST  /v1/request-landing",
    "PUT   /v1/cargobay",
    "GET   /v1/hyper-matter-reactor/status",
    "PUT   /v1/exhaust-port"
  ]
}
`

// Deathstar serves the battle station's API on addr until ctx ends or a
// request explodes it; then it returns ErrExploded.
func Deathstar(ctx context.Context, addr string) error {
	exploded := make(chan struct{})
	explode := sync.OnceFunc(func() { close(exploded) })

	mux := http.NewServeMux()
	plain := func(body string) http.HandlerFunc {
		return func(w http.ResponseWriter, _ *http.Request) {
			w.Header().Set("Content-Type", "text/plain")
			io.WriteString(w, body)
		}
	}
	list := func(w http.ResponseWriter, _ *http.Request) {
		w.Header().Set("Content-Type", "application/json")
		io.WriteString(w, catalogue)
	}
	mux.HandleFunc("GET /v1", list)
	mux.HandleFunc("GET /v1/{$}", list)
	mux.HandleFunc("GET /v1/healthz", plain("OK\n"))
	mux.HandleFunc("POST /v1/request-landing", plain("Ship landed\n"))
	mux.HandleFunc("PUT /v1/cargobay", plain("Cargo stored\n"))
	mux.HandleFunc("GET /v1/hyper-matter-reactor/status", plain("Reactor stable\n"))
	mux.HandleFunc("PUT /v1/exhaust-port", func(w http.ResponseWriter, _ *http.Request) {
		w.Header().Set("Content-Type", "text/plain")
		w.WriteHeader(http.StatusServiceUnavailable)
		fmt.Fprintf(w, "Panic: deathstar exploded\n\n%s", debug.Stack())
		explode()
	})

	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	go func() { // ends with ctx, which this function cancels
		select {
		case <-exploded:
			cancel()
		case <-ctx.Done():
		}
	}()
	err := serveHTTP(ctx, addr, mux)
	select {
	case <-exploded:
		return ErrExploded
	default:
		return err
	}
}

// Helloworld serves GET /hello on TCP, and the same line on UDP, both on addr,
// until ctx ends.
//
// A datagram "repeat=N interval=D" is answered N times, D apart: a server that
// goes on talking on a flow after its client has died.
func Helloworld(ctx context.Context, addr, version, instance string) error {
	line := fmt.Sprintf("Hello version: %s, instance: %s\n", version, instance)
	mux := http.NewServeMux()
	mux.HandleFunc("GET /hello", func(w http.ResponseWriter, _ *http.Request) {
		w.Header().Set("Content-Type", "text/plain; charset=utf-8")
		io.WriteString(w, line)
	})

	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	errs := make(chan error, 2)
	go func() { defer cancel(); errs <- serveHTTP(ctx, addr, mux) }()
	go func() { defer cancel(); errs <- serveUDP(ctx, addr, line) }()
	return errors.Join(<-errs, <-errs)
}

// Sleep idles until ctx ends: a client waiting to be used.
func Sleep(ctx context.Context) { <-ctx.Done() }

func serveHTTP(ctx context.Context, addr string, h http.Handler) error {
	var lc net.ListenConfig
	lc.SetMultipathTCP(false) // plain TCP, so that TCP_INFO and captures mean what they say
	ln, err := lc.Listen(ctx, "tcp", addr)
	if err != nil {
		return err
	}
	srv := &http.Server{Handler: h, ReadHeaderTimeout: 10 * time.Second}
	done := make(chan struct{})
	go func() {
		defer close(done)
		<-ctx.Done()
		// Answers on their way are finished, idle connections are closed.
		sctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), time.Second)
		defer cancel()
		if srv.Shutdown(sctx) != nil {
			srv.Close()
		}
	}()
	err = srv.Serve(ln)
	if !errors.Is(err, http.ErrServerClosed) {
		return err // the goroutine above ends with the caller's ctx
	}
	<-done
	return nil
}

// maxRepeats bounds what one datagram can ask for, and maxTalkers how many
// flows are talked on at a time.
const (
	maxRepeats = 100_000
	maxTalkers = 64
)

func serveUDP(ctx context.Context, addr, line string) error {
	var lc net.ListenConfig
	pc, err := lc.ListenPacket(ctx, "udp", addr)
	if err != nil {
		return err
	}
	var talkers sync.WaitGroup
	defer talkers.Wait()
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	stop := context.AfterFunc(ctx, func() { pc.Close() })
	defer stop()

	slots := make(chan struct{}, maxTalkers)
	buf := make([]byte, 2048)
	for {
		n, from, err := pc.ReadFrom(buf)
		if err != nil {
			if ctx.Err() != nil {
				return nil
			}
			if errors.Is(err, net.ErrClosed) {
				return err
			}
			continue // an ICMP error of an earlier answer
		}
		count, every := parseRepeat(string(buf[:n]))
		pc.WriteTo([]byte(line), from)
		if count <= 1 {
			continue
		}
		select {
		case slots <- struct{}{}:
		default:
			continue // bounded: the first answer has to do
		}
		talkers.Go(func() {
			defer func() { <-slots }()
			tick := time.NewTicker(every)
			defer tick.Stop()
			for range count - 1 {
				select {
				case <-ctx.Done():
					return
				case <-tick.C:
				}
				// Errors are the network's (the client is gone): go on.
				pc.WriteTo([]byte(line), from)
			}
		})
	}
}

// parseRepeat reads "repeat=N interval=D"; anything else means one answer.
func parseRepeat(s string) (count int, every time.Duration) {
	count, every = 1, 100*time.Millisecond
	for f := range strings.FieldsSeq(s) {
		k, v, _ := strings.Cut(f, "=")
		switch k {
		case "repeat":
			if n, err := strconv.Atoi(v); err == nil && n > 0 {
				count = min(n, maxRepeats)
			}
		case "interval":
			if d, err := time.ParseDuration(v); err == nil && d > 0 {
				every = d
			}
		}
	}
	return count, every
}
