package metrics

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/http"
	"net/http/pprof"
	"sync"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/collectors"
	"github.com/prometheus/client_golang/prometheus/promhttp"
	"go.uber.org/zap"
)

// Emit takes one sample: the values of the labels in the order of the family.
type Emit func(name string, value float64, labels ...string)

// Source gives what is counted elsewhere, at the moment of a scrape.
type Source interface {
	// Collect calls emit for every sample. It returns when ctx ends, at the
	// latest, with what it has by then. It is called at most once at a time.
	Collect(ctx context.Context, emit Emit)
	// Alive tells that the agent works at all; an error says what does not.
	Alive(ctx context.Context) error
	// Ready tells that it has what it cannot work without.
	Ready(ctx context.Context) error
}

// Times of a scrape.
const (
	sourceTimeout = 5 * time.Second
	sourceEvery   = time.Second // the Source is asked no oftener
	maxScrapes    = 4           // at a time
)

// Server serves /metrics, /healthz and /readyz; with Profiles /debug/pprof/ too.
type Server struct {
	Source      Source
	Instruments *Instruments
	Log         *zap.Logger
	Profiles    bool
}

// Run serves a listener, which it closes, until ctx ends.
func (s *Server) Run(ctx context.Context, listener net.Listener) error {
	c := &collector{source: s.Source, instruments: s.Instruments, log: s.Log}
	defer c.close()
	server := &http.Server{Handler: s.handler(c), ReadHeaderTimeout: 5 * time.Second, ReadTimeout: 10 * time.Second,
		IdleTimeout: time.Minute, MaxHeaderBytes: 16 << 10, ErrorLog: zap.NewStdLog(s.Log)}
	if !s.Profiles { // which run as long as they are asked to
		server.WriteTimeout = 30 * time.Second
	}
	stop := context.AfterFunc(ctx, func() { server.Close() })
	defer stop()
	err := server.Serve(listener)
	if errors.Is(err, http.ErrServerClosed) && ctx.Err() != nil {
		return nil
	}
	return fmt.Errorf("serve metrics: %w", err)
}

// handler answers the requests.
func (s *Server) handler(c *collector) http.Handler {
	registry := prometheus.NewPedanticRegistry()
	registry.MustRegister(collectors.NewGoCollector(), collectors.NewProcessCollector(collectors.ProcessCollectorOpts{}))
	registry.MustRegister(s.Instruments.histograms...)
	registry.MustRegister(c)
	mux := http.NewServeMux()
	mux.Handle("GET /metrics", promhttp.HandlerFor(registry, promhttp.HandlerOpts{MaxRequestsInFlight: maxScrapes, Timeout: 2 * sourceTimeout,
		ErrorLog: zap.NewStdLog(s.Log), ErrorHandling: promhttp.HTTPErrorOnError}))
	mux.HandleFunc("GET /healthz", probe(s.Source.Alive))
	mux.HandleFunc("GET /readyz", probe(s.Source.Ready))
	if s.Profiles {
		mux.HandleFunc("GET /debug/pprof/", pprof.Index)
		mux.HandleFunc("GET /debug/pprof/cmdline", pprof.Cmdline)
		mux.HandleFunc("GET /debug/pprof/profile", pprof.Profile)
		mux.HandleFunc("GET /debug/pprof/symbol", pprof.Symbol)
		mux.HandleFunc("GET /debug/pprof/trace", pprof.Trace)
	}
	return mux
}

// probe answers 200 and "ok", or 503 and what is wrong.
func probe(ask func(context.Context) error) http.HandlerFunc {
	return func(w http.ResponseWriter, r *http.Request) {
		ctx, cancel := context.WithTimeout(r.Context(), sourceTimeout)
		defer cancel()
		w.Header().Set("Content-Type", "text/plain; charset=utf-8")
		w.Header().Set("X-Content-Type-Options", "nosniff")
		if err := ask(ctx); err != nil {
			w.WriteHeader(http.StatusServiceUnavailable)
			fmt.Fprintln(w, err)
			return
		}
		fmt.Fprintln(w, "ok")
	}
}

// collector turns samples into Prometheus' own.
type collector struct {
	source      Source
	instruments *Instruments
	log         *zap.Logger

	mu     sync.Mutex          // guards what follows
	at     time.Time           // of last
	last   []prometheus.Metric // nil: none yet
	descs  map[string]*prometheus.Desc
	closed bool
}

// close waits for a scrape under way. The Source is not asked after it: what it
// reads may be gone then.
func (c *collector) close() {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.closed = true
}

// Describe implements prometheus.Collector.
func (c *collector) Describe(out chan<- *prometheus.Desc) {
	c.mu.Lock()
	defer c.mu.Unlock()
	for _, f := range Families {
		if f.Kind != Histogram {
			out <- c.desc(f)
		}
	}
}

// desc is called with mu held.
func (c *collector) desc(f Family) *prometheus.Desc {
	if d := c.descs[f.Name]; d != nil {
		return d
	}
	var labels []string
	for _, l := range f.Labels {
		labels = append(labels, l.Name)
	}
	if c.descs == nil {
		c.descs = map[string]*prometheus.Desc{}
	}
	c.descs[f.Name] = prometheus.NewDesc(f.Name, f.Help, labels, nil)
	return c.descs[f.Name]
}

// Collect implements prometheus.Collector. Scrapes within a second share what the
// first one read: however many scrape, the agent is asked once.
func (c *collector) Collect(out chan<- prometheus.Metric) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if !c.closed && (c.last == nil || time.Since(c.at) >= sourceEvery) {
		c.last = nil
		ctx, cancel := context.WithTimeout(context.Background(), sourceTimeout)
		c.source.Collect(ctx, c.emit)
		cancel()
		c.instruments.collect(c.emit)
		c.at = time.Now()
	}
	for _, m := range c.last {
		out <- m
	}
}

// emit is called with mu held. What is not in the list is not served, and said.
func (c *collector) emit(name string, value float64, labels ...string) {
	f, err := check(name, labels)
	if err != nil {
		c.log.Error("a metric is left out", zap.Error(err))
		return
	}
	kind := prometheus.GaugeValue
	if f.Kind == Counter {
		kind = prometheus.CounterValue
	}
	m, err := prometheus.NewConstMetric(c.desc(f), kind, value, labels...)
	if err != nil {
		c.log.Error("a metric is left out", zap.Error(err))
		return
	}
	c.last = append(c.last, m)
}
