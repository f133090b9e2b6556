package feed

import (
	"context"
	"errors"
	"fmt"
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

// Status is the server's.
type Status struct {
	Connected bool
	Serving   bool      // its sockets are in their places
	Heard     time.Time // when it said something last; it says something every 5 s
	Sets      int       // in force with rules inside protocols
	Stats     Stats
}

// helloTimeout is for the first message of who connects.
const helloTimeout = 10 * time.Second

// Server is the agent's end. Put, PutPeer and Drop are called by one goroutine
// and do not block; Status is safe for concurrent use.
type Server struct {
	handler Handler
	kept    int
	log     *zap.Logger

	mu    sync.Mutex
	sets  map[uint32]*authz.Inside // guarded by mu; in force
	said  uint64                   // guarded by mu; the number of the last message
	told  bool                     // guarded by mu; somebody was connected once
	conn  *serving                 // guarded by mu; nil: nobody is connected
	other string                   // guarded by mu
	stats Stats                    // guarded by mu
	whole bool                     // guarded by mu; see Whole
	hear  int                      // guarded by mu: how many hear records
	asked uint64                   // guarded by mu: the number of the message that said so last
}

// serving is one connection. The server's mu guards what changes.
type serving struct {
	conn    net.Conn
	queue   chan []byte
	acked   uint64        // 0: not even all that was in force at its begin
	acks    chan struct{} // closed when acked has changed
	gone    chan struct{} // closed when it has ended
	serving bool
	heard   time.Time
}

// NewServer returns a server without any set. A proxy takes what it is told for all
// that there is from Whole on.
//
// While nobody asks for Records the Handler is told of what was refused, and of kept
// requests a second that were forwarded; 0: of nothing.
func NewServer(h Handler, kept int, log *zap.Logger) *Server {
	return &Server{handler: h, kept: kept, log: log, said: 1, sets: map[uint32]*authz.Inside{}}
}

// Put says what a policy set says inside protocols. It must be said before the
// kernel names the set. An error: no proxy can judge it, and nothing was said.
// The server keeps what it is given.
func (s *Server) Put(set uint32, in *authz.Inside) error {
	if err := in.Ready(); err != nil {
		return err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	b, err := encode(told{Seq: s.said + 1, Set: set, Inside: in})
	if err != nil {
		return err
	}
	if len(b) > maxTold {
		return fmt.Errorf("a policy set of %d bytes; at most %d can be told", len(b), maxTold)
	}
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
	b, err := encode(told{Seq: s.said + 1, Set: set, Peer: &peer{Number: n, Of: of, Host: host}})
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
	if b, err := encode(told{Seq: s.said + 1, Set: set, Drop: true}); err == nil {
		s.say(b)
	}
}

// Knows reports whether a set was Put.
func (s *Server) Knows(set uint32) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.sets[set] != nil
}

// Whole says that every set in force was Put. Until then a proxy goes on by those
// of an earlier agent too, for the kernel may still name them.
func (s *Server) Whole() {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.whole {
		return
	}
	s.whole = true
	if b, err := encode(told{Seq: s.said + 1, Synced: true}); err == nil {
		s.say(b)
	}
}

// Records has the proxy tell the Handler of every request until stop is called. It
// waits until the proxy has heard that, is not connected, or ctx ends.
func (s *Server) Records(ctx context.Context) (stop func()) {
	s.hearers(1)
	for {
		s.mu.Lock()
		me := s.conn
		if me == nil || me.acked >= s.asked {
			s.mu.Unlock()
			break
		}
		acks := me.acks
		s.mu.Unlock()
		select {
		case <-acks:
			continue
		case <-me.gone: // another one knows from its begin on
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
	s.asked = s.said + 1
	if b, err := encode(told{Seq: s.asked, Records: s.wanted()}); err == nil {
		s.say(b)
	}
}

// wanted is called under mu.
func (s *Server) wanted() *records { return &records{Wanted: s.hear > 0, Kept: s.kept} }

// Said returns the number of the last message, for Heard.
func (s *Server) Said() uint64 {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.said
}

// Heard reports whether no proxy that this server has told anything judges any
// more by what was before a message. alive is asked, while none is connected,
// whether one lives: it would go on by what it was told last.
func (s *Server) Heard(message uint64, alive func() bool) bool {
	s.mu.Lock()
	told, conn := s.told, s.conn
	heard := conn != nil && conn.acked >= message
	s.mu.Unlock()
	return heard || !told || conn == nil && !alive()
}

// Status returns the server's.
func (s *Server) Status() Status {
	s.mu.Lock()
	defer s.mu.Unlock()
	out := Status{Sets: len(s.sets), Stats: s.stats}
	if s.conn != nil {
		out.Connected, out.Serving, out.Heard = true, s.conn.serving, s.conn.heard
	}
	return out
}

// Other returns, once, why one that called was sent away: it is of another
// version, and does not end by itself if it is older than versions are. Empty:
// there was none since it was asked last.
func (s *Server) Other() string {
	s.mu.Lock()
	defer s.mu.Unlock()
	why := s.other
	s.other = ""
	return why
}

// say queues the next message. A proxy that has not read so many begins anew.
func (s *Server) say(b []byte) {
	s.said++
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

// Run serves the listener until ctx ends. The last who connects and is of this
// version is the proxy: one that was before it, of an agent's earlier attempt, is
// disconnected.
func (s *Server) Run(ctx context.Context, l net.Listener, v Version) error {
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
			if err := s.serve(ctx, conn, v); err != nil && ctx.Err() == nil {
				s.log.Info("the proxy's connection ended", zap.Error(err))
			}
		})
	}
}

// greet exchanges versions.
func (s *Server) greet(conn net.Conn, in *lines, v Version) error {
	if err := put(conn, told{Hello: v.hello()}); err != nil {
		return err
	}
	if err := conn.SetReadDeadline(time.Now().Add(helloTimeout)); err != nil {
		return err
	}
	var first report
	if err := in.next(&first); err != nil {
		return err
	}
	err := v.same(first.Hello)
	if err != nil {
		s.mu.Lock()
		s.other = err.Error()
		s.mu.Unlock()
		return err
	}
	return conn.SetReadDeadline(time.Time{})
}

func (s *Server) serve(ctx context.Context, conn net.Conn, v Version) error {
	defer conn.Close()
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	stop := context.AfterFunc(ctx, func() { conn.Close() })
	defer stop()
	in := newLines(conn, maxReport)
	if err := s.greet(conn, in, v); err != nil {
		return err
	}
	me := &serving{conn: conn, queue: make(chan []byte, toldQueue), heard: time.Now(), acks: make(chan struct{}), gone: make(chan struct{})}
	all, err := s.begin(me)
	if err != nil {
		return err
	}
	defer s.end(me)
	var wg sync.WaitGroup
	defer wg.Wait()
	wg.Go(func() { cancel(write(ctx, conn, all, me.queue)) })
	err = s.read(ctx, me, in)
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
	last := []told{{Records: s.wanted()}}
	if s.whole {
		last = append(last, told{Seq: s.said, Synced: true})
	}
	for _, m := range last {
		b, err := encode(m)
		if err != nil {
			return nil, err
		}
		all = append(all, b)
	}
	if s.conn != nil {
		s.conn.conn.Close()
	}
	s.conn, s.told = me, true
	return all, nil
}

func (s *Server) end(me *serving) {
	s.mu.Lock()
	defer s.mu.Unlock()
	close(me.gone)
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

func (s *Server) read(ctx context.Context, me *serving, in *lines) error {
	var wg sync.WaitGroup
	defer wg.Wait()
	room := make(chan struct{}, maxAsked)
	for {
		var r report
		if err := in.next(&r); err != nil {
			return err
		}
		s.mu.Lock()
		me.heard, me.serving = time.Now(), me.serving || r.Serving
		if r.Ack > me.acked {
			me.acked = r.Ack
			close(me.acks)
			me.acks = make(chan struct{})
		}
		if r.Stats != nil {
			s.stats = *r.Stats
		}
		s.mu.Unlock()
		if r.Record != nil {
			s.handler.Record(r.Record)
		}
		if r.Lost > 0 {
			s.handler.Lost(r.Lost)
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
