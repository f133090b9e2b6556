package proxy

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"sync"
	"sync/atomic"
	"time"

	"portcullis/bpf/abi"
)

// Listener is where steered connections of one direction come in. Of an
// accepted connection the remote address is the client's and the local address
// the one that the client called, as with a transparent socket.
type Listener struct {
	net.Listener
	Direction abi.Direction
}

// Dialer connects to the server of a flow, from the client's address and port.
type Dialer func(ctx context.Context, c Conn) (net.Conn, error)

// Server serves steered connections.
type Server struct {
	judge    Judge
	dial     Dialer
	recorder Recorder
	opts     Options

	tick  atomic.Int64 // looks at all connections so far
	wg    sync.WaitGroup
	stats counters

	mu       sync.Mutex
	pairs    map[*pair]struct{} // guarded by mu
	clients  map[netip.Addr]int // guarded by mu: their connections
	draining bool               // guarded by mu
}

type counters struct{ accepted, refused, full, requests, denied, malformed atomic.Uint64 }

// Stats are counts since the start, and connections now.
type Stats struct {
	Connections                 int
	Accepted, Refused           uint64 // connections; refused: beyond the limit, or the server did not answer
	Requests, Denied, Malformed uint64
	Full                        uint64 // of those refused: beyond a limit
}

// New returns a server. All arguments but the options are required.
func New(judge Judge, dial Dialer, recorder Recorder, opts Options) *Server {
	return &Server{judge: judge, dial: dial, recorder: recorder, opts: opts.withDefaults(), pairs: map[*pair]struct{}{}, clients: map[netip.Addr]int{}}
}

// Stats returns the counts. It is safe for concurrent use.
func (s *Server) Stats() Stats {
	s.mu.Lock()
	defer s.mu.Unlock()
	return Stats{
		Connections: len(s.pairs), Accepted: s.stats.accepted.Load(), Refused: s.stats.refused.Load(),
		Requests: s.stats.requests.Load(), Denied: s.stats.denied.Load(), Malformed: s.stats.malformed.Load(),
		Full: s.stats.full.Load(),
	}
}

// Run serves the listeners until the context ends or a listener fails. Then it
// closes them, lets what is under way come to its end, for DrainTimeout at
// most, and returns when no connection is left.
func (s *Server) Run(ctx context.Context, listeners ...Listener) error {
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	for _, l := range listeners {
		s.wg.Go(func() { cancel(s.accept(ctx, l)) })
	}
	watched := make(chan struct{})
	stop := make(chan struct{})
	go func() { // ends below, at stop
		defer close(watched)
		s.watch(stop)
	}()

	<-ctx.Done()
	for _, l := range listeners {
		l.Close()
	}
	limit := time.AfterFunc(s.opts.DrainTimeout, func() { s.each(func(p *pair) { p.abort(ending) }) })
	s.drain()
	s.wg.Wait()
	limit.Stop()
	close(stop)
	<-watched
	if err := context.Cause(ctx); !errors.Is(err, context.Canceled) && !errors.Is(err, context.DeadlineExceeded) {
		return err
	}
	return nil
}

func (s *Server) drain() {
	s.mu.Lock()
	s.draining = true
	s.mu.Unlock()
	s.each((*pair).retire)
}

func (s *Server) each(do func(*pair)) {
	s.mu.Lock()
	all := make([]*pair, 0, len(s.pairs))
	for p := range s.pairs {
		all = append(all, p)
	}
	s.mu.Unlock()
	for _, p := range all {
		do(p)
	}
}

// accept takes connections until the listener is closed. What passes, like too
// many open files, is waited for.
func (s *Server) accept(ctx context.Context, l Listener) error {
	wait := time.Duration(0)
	for {
		c, err := l.Accept()
		if err == nil {
			wait = 0
			s.take(ctx, l.Direction, c)
			continue
		}
		if ctx.Err() != nil {
			return nil
		}
		if errors.Is(err, net.ErrClosed) || wait > time.Second {
			return fmt.Errorf("accept steered connections (%v): %w", l.Direction, err)
		}
		wait = max(5*time.Millisecond, 2*wait)
		select {
		case <-ctx.Done():
			return nil
		case <-time.After(wait):
		}
	}
}

// take starts to serve a connection, or resets it.
func (s *Server) take(ctx context.Context, d abi.Direction, c net.Conn) {
	s.stats.accepted.Add(1)
	p := &pair{s: s, client: c, conn: Conn{Direction: d, Protocol: 6, Client: addrPort(c.RemoteAddr()), Server: addrPort(c.LocalAddr())}}
	p.init()
	if reason := s.add(p); reason != "" {
		s.turnAway(p, reason, reason != ending)
		return
	}
	s.wg.Go(func() {
		defer s.remove(p)
		p.serve(ctx)
	})
}

// ending is why a proxy that drains takes nothing more.
const ending = "the proxy ends"

// Refuse resets a connection for which its listener has no room, and records why.
// It is safe for concurrent use.
func (s *Server) Refuse(d abi.Direction, c net.Conn, reason string) {
	s.stats.accepted.Add(1)
	s.turnAway(&pair{s: s, client: c, conn: Conn{Direction: d, Protocol: 6, Client: addrPort(c.RemoteAddr()), Server: addrPort(c.LocalAddr())}}, reason, true)
}

func (s *Server) turnAway(p *pair, reason string, full bool) {
	s.stats.refused.Add(1)
	if full {
		s.stats.full.Add(1)
	}
	reset(p.client)
	p.record(Failed, reason)
}

// add counts the pair in, or says why it may not be served. No client can take
// every place.
func (s *Server) add(p *pair) (reason string) {
	client := p.conn.Client.Addr()
	s.mu.Lock()
	defer s.mu.Unlock()
	switch {
	case s.draining:
		return ending
	case len(s.pairs) >= s.opts.Connections:
		return "too many connections"
	case s.clients[client] >= s.opts.PerClient:
		return "too many connections of this client"
	}
	s.pairs[p] = struct{}{}
	s.clients[client]++
	return ""
}

func (s *Server) remove(p *pair) {
	client := p.conn.Client.Addr()
	s.mu.Lock()
	defer s.mu.Unlock()
	delete(s.pairs, p)
	if s.clients[client]--; s.clients[client] == 0 {
		delete(s.clients, client)
	}
}

// watch looks at every connection at intervals.
func (s *Server) watch(stop <-chan struct{}) {
	t := time.NewTicker(s.opts.Recheck)
	defer t.Stop()
	idle := int64(max(1, s.opts.Idle/s.opts.Recheck))
	for {
		select {
		case <-stop:
			return
		case <-t.C:
		}
		now := s.tick.Add(1)
		s.each(func(p *pair) { p.look(now, idle) })
	}
}

func addrPort(a net.Addr) netip.AddrPort {
	t, ok := a.(*net.TCPAddr)
	if !ok {
		return netip.AddrPort{} // not of TCP: no flow that a judge knows
	}
	ap := t.AddrPort()
	return netip.AddrPortFrom(ap.Addr().Unmap(), ap.Port())
}

// reset ends a connection so that the other side sees an abort, and what is
// not sent yet is thrown away.
func reset(c net.Conn) {
	if t, ok := c.(interface{ SetLinger(int) error }); ok {
		t.SetLinger(0) // fails only on what is closed
	}
	c.Close()
}
