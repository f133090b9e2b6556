package feed

import (
	"context"
	"errors"
	"fmt"
	"math"
	"net"
	"os"
	"path/filepath"
	"sync"
	"time"

	"go.uber.org/zap"

	"portcullis/authz"
	"portcullis/identity"
	"portcullis/proxy"
)

// toldQueue is how many messages may wait for a proxy that does not read.
const toldQueue = 65536

// maxAsked bounds the questions of a connection that are being answered.
const maxAsked = 1024

// Handler hears what the proxy says. Record must not block; Learn may, until its
// context ends. Both are called from several goroutines.
type Handler interface {
	Record(*proxy.Record)
	// Lost says that the proxy had no room for so many records.
	Lost(n uint64)
	// Learn admits what an answer says for the workload of a policy set, and
	// returns nil once it is admitted.
	Learn(ctx context.Context, c proxy.Conn, set uint32, a Answer) error
}

// Status is the server's, for people.
type Status struct {
	Connected bool
	Since     time.Time // of the connection
	Sets      int       // in force with rules inside protocols
	Stats     Stats
}

// Server is the agent's end. Put, PutPeer and Drop are called by one goroutine
// and do not block; Status is safe for concurrent use.
type Server struct {
	handler Handler
	kept    int
	log     *zap.Logger

	mu    sync.Mutex
	sets  map[uint32]*authz.Inside // guarded by mu; in force
	conn  *serving                 // guarded by mu; nil: nobody is connected
	stats Stats                    // guarded by mu
	hear  int                      // guarded by mu: how many hear records
	said  uint64                   // guarded by mu: the latest number of told.Records; from 1
}

// serving is one connection.
type serving struct {
	conn    net.Conn
	queue   chan []byte
	since   time.Time
	heard   uint64        // guarded by the Server's mu: of told.Records
	hearing chan struct{} // guarded by the Server's mu; closed when heard has changed
}

// NewServer returns a server without any set.
//
// While nobody asks for Records the Handler is told of what was refused, and of kept
// requests a second that were forwarded; 0: of nothing.
func NewServer(h Handler, kept int, log *zap.Logger) *Server {
	return &Server{handler: h, kept: kept, log: log, sets: map[uint32]*authz.Inside{}, said: 1}
}

// Put says what a policy set says inside protocols. It must be said before the
// kernel names the set. An error: no proxy can judge it, and nothing was said.
// The server keeps what it is given.
func (s *Server) Put(set uint32, in *authz.Inside) error {
	if err := in.Ready(); err != nil {
		return err
	}
	b, err := encode(told{Set: set, Inside: in})
	if err != nil {
		return err
	}
	if len(b) > maxTold {
		return fmt.Errorf("a policy set of %d bytes; at most %d can be told", len(b), maxTold)
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.sets[set] = in
	s.say(b)
	return nil
}

// PutPeer says what a set says of a peer beside all others; nothing: of is empty
// and host false. Of a set that was not Put nothing is said.
func (s *Server) PutPeer(set uint32, n identity.Numeric, of []authz.Within, host bool) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	in := s.sets[set]
	if in == nil {
		return nil
	}
	if len(of) == 0 && !host {
		in.Remove(n)
	} else if err := in.Put(n, of, host); err != nil {
		return err
	}
	b, err := encode(told{Set: set, Peer: &peer{Number: n, Of: of, Host: host}})
	if err != nil {
		return err
	}
	s.say(b)
	return nil
}

// Drop says that the kernel names a set no more.
func (s *Server) Drop(set uint32) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.sets[set] == nil {
		return
	}
	delete(s.sets, set)
	if b, err := encode(told{Set: set, Drop: true}); err == nil {
		s.say(b)
	}
}

// Knows reports whether a set was Put.
func (s *Server) Knows(set uint32) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.sets[set] != nil
}

// Records has the proxy tell the Handler of every request until stop is called. It
// waits until the proxy has heard that, is not connected, or ctx ends.
func (s *Server) Records(ctx context.Context) (stop func()) {
	s.hearers(1)
	for {
		s.mu.Lock()
		me, said := s.conn, s.said
		var changed <-chan struct{}
		if me != nil && me.heard < said {
			changed = me.hearing
		}
		s.mu.Unlock()
		if changed == nil {
			break
		}
		select {
		case <-changed:
			continue
		case <-ctx.Done():
		}
		break
	}
	return sync.OnceFunc(func() { s.hearers(-1) })
}

func (s *Server) hearers(more int) {
	s.mu.Lock()
	defer s.mu.Unlock()
	before := s.hear > 0
	if s.hear += more; s.hear > 0 == before {
		return
	}
	s.said++
	if b, err := encode(s.wanted()); err == nil {
		s.say(b)
	}
}

// wanted is called under mu.
func (s *Server) wanted() told {
	return told{Records: &records{Number: s.said, Wanted: s.hear > 0, Kept: s.kept}}
}

// hears takes up that the proxy goes by a number, or is gone.
func (s *Server) hears(me *serving, number uint64) {
	s.mu.Lock()
	defer s.mu.Unlock()
	me.heard = max(me.heard, number)
	close(me.hearing)
	me.hearing = make(chan struct{})
}

// Status returns the server's.
func (s *Server) Status() Status {
	s.mu.Lock()
	defer s.mu.Unlock()
	out := Status{Sets: len(s.sets), Stats: s.stats}
	if s.conn != nil {
		out.Connected, out.Since = true, s.conn.since
	}
	return out
}

// say queues a message. A proxy that has not read so many begins anew.
func (s *Server) say(b []byte) {
	if s.conn == nil {
		return
	}
	select {
	case s.conn.queue <- b:
	default:
		s.log.Warn("the proxy does not read what it is told: it has to connect again")
		s.conn.conn.Close()
		s.conn = nil
	}
}

// Listen opens the server's unix socket, which only root may use.
func Listen(path string) (net.Listener, error) {
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		return nil, err
	}
	// The agent's lock on its journal says that nobody else listens here.
	if err := os.Remove(path); err != nil && !errors.Is(err, os.ErrNotExist) {
		return nil, err
	}
	l, err := net.Listen("unix", path)
	if err != nil {
		return nil, err
	}
	if err := os.Chmod(path, 0o600); err != nil {
		return nil, errors.Join(err, l.Close())
	}
	return l, nil
}

// Run serves the listener until ctx ends. The last who connects is the proxy: one
// that was before it, of an agent's earlier attempt, is disconnected.
func (s *Server) Run(ctx context.Context, l net.Listener) error {
	var wg sync.WaitGroup
	defer wg.Wait()
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	stop := context.AfterFunc(ctx, func() { l.Close() })
	defer stop()
	for {
		conn, err := l.Accept()
		if ctx.Err() != nil {
			return nil
		}
		if err != nil {
			return err
		}
		wg.Go(func() {
			if err := s.serve(ctx, conn); err != nil && ctx.Err() == nil {
				s.log.Info("the proxy's connection ended", zap.Error(err))
			}
		})
	}
}

func (s *Server) serve(ctx context.Context, conn net.Conn) error {
	defer conn.Close()
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	stop := context.AfterFunc(ctx, func() { conn.Close() })
	defer stop()
	me := &serving{conn: conn, queue: make(chan []byte, toldQueue), since: time.Now(), hearing: make(chan struct{})}
	all, err := s.begin(me)
	if err != nil {
		return err
	}
	defer s.end(me)
	var wg sync.WaitGroup
	defer wg.Wait()
	wg.Go(func() { cancel(write(ctx, conn, all, me.queue)) })
	err = s.read(ctx, me)
	cancel(err)
	return context.Cause(ctx)
}

// begin takes a connection's place, and returns all that is in force.
func (s *Server) begin(me *serving) (all [][]byte, err error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for n, in := range s.sets {
		b, err := encode(told{Set: n, Inside: in})
		if err != nil {
			return nil, err
		}
		all = append(all, b)
	}
	for _, m := range []told{s.wanted(), {Synced: true}} {
		b, err := encode(m)
		if err != nil {
			return nil, err
		}
		all = append(all, b)
	}
	if s.conn != nil {
		s.conn.conn.Close()
	}
	s.conn = me
	return all, nil
}

func (s *Server) end(me *serving) {
	defer s.hears(me, math.MaxUint64) // nobody waits for who is gone
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.conn == me {
		s.conn = nil
	}
}

func write(ctx context.Context, conn net.Conn, all [][]byte, queue <-chan []byte) error {
	for {
		var b []byte
		if len(all) > 0 {
			b, all = all[0], all[1:]
		} else {
			select {
			case b = <-queue:
			case <-ctx.Done():
				return ctx.Err()
			}
		}
		if err := conn.SetWriteDeadline(time.Now().Add(writeTimeout)); err != nil {
			return err
		}
		if _, err := conn.Write(b); err != nil {
			return err
		}
	}
}

func (s *Server) read(ctx context.Context, me *serving) error {
	var wg sync.WaitGroup
	defer wg.Wait()
	room := make(chan struct{}, maxAsked)
	in := newLines(me.conn, maxReport)
	for {
		var r report
		if err := in.next(&r); err != nil {
			return err
		}
		if r.Record != nil {
			s.handler.Record(r.Record)
		}
		if r.Heard > 0 {
			s.hears(me, r.Heard)
		}
		if r.Lost > 0 {
			s.handler.Lost(r.Lost)
		}
		if r.Stats != nil {
			s.mu.Lock()
			s.stats = *r.Stats
			s.mu.Unlock()
		}
		if q := r.Ask; q != nil {
			select {
			case room <- struct{}{}: // else who asks waits
			case <-ctx.Done():
				return ctx.Err()
			}
			wg.Go(func() {
				defer func() { <-room }()
				s.learn(ctx, me, q)
			})
		}
	}
}

func (s *Server) learn(ctx context.Context, me *serving, q *question) {
	a := answer{ID: q.ID}
	if err := s.handler.Learn(ctx, q.Conn, q.Epoch, q.Answer); err != nil {
		a.Error = err.Error()
	}
	b, err := encode(told{Answer: &a})
	if err != nil {
		return // who asked hears nothing, and refuses
	}
	select {
	case me.queue <- b:
	case <-ctx.Done():
	}
}
