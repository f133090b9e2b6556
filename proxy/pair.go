package proxy

import (
	"context"
	"errors"
	"io"
	"net"
	"sync"
	"sync/atomic"
	"time"

	"portcullis/authz/l7"
)

// pair is a client's connection and the one to its server.
type pair struct {
	s      *Server
	conn   Conn
	judge  Followed // the Server's, of conn
	client net.Conn
	server net.Conn // nil until serve has dialled

	in  *reader // the client's bytes; of the goroutine of serve
	out *reader // the server's; of the goroutine of answers

	toServer *writer // of the goroutine of serve
	toClient *writer // of the goroutine of answers

	active atomic.Int64 // the tick of the last byte
	tunnel atomic.Bool  // bytes pass unlooked at: TCP alone tells whether they still do

	mu      sync.Mutex
	changed sync.Cond                     // of the fields below, which mu guards
	waiting []*exchange                   // requests without an answer, in order
	last    Decision                      // the latest
	again   func(Decision) (allowed bool) // judges what the whole connection was allowed for; nil: nothing
	half    bool                          // the client sends nothing more
	closing bool                          // the client gets nothing more
	retired bool                          // ends when nothing waits
	begun   bool                          // the client has sent its first bytes, or nothing
	h2      *h2                           // nil: HTTP/1
	ended   bool
	reason  string // why it ended, if not in peace
}

// exchange is a request that waits for its answer.
type exchange struct {
	method  string
	upgrade string
	begin   time.Time
	rec     *Record
	state   exchangeState // guarded by the pair's mu
}

type exchangeState uint8

const (
	unanswered exchangeState = iota
	answered
	switched // the connection is a tunnel now
)

func (p *pair) init() {
	p.changed.L = &p.mu
	p.active.Store(p.s.tick.Load())
	if f, ok := p.s.judge.(Follower); ok {
		p.judge = f.Follow(p.conn)
	} else {
		p.judge = asked{p.s.judge, p.conn}
	}
}

// asked is a Judge that follows nothing.
type asked struct {
	judge Judge
	conn  Conn
}

// Judge implements Followed.
func (a asked) Judge() (Decision, error) { return a.judge.Judge(a.conn) }

// Peek implements Followed. It waits as long as the Judge does.
func (a asked) Peek() (d Decision, wait bool, err error) {
	d, err = a.judge.Judge(a.conn)
	return d, false, err
}

// serve serves the pair until its end.
func (p *pair) serve(ctx context.Context) {
	defer p.close()
	dial, cancel := context.WithTimeout(ctx, p.s.opts.DialTimeout)
	server, err := p.s.dial(dial, p.conn)
	cancel()
	if err != nil {
		p.s.stats.refused.Add(1)
		p.abort("the server does not answer: " + err.Error())
		p.record(Failed, p.why())
		return
	}
	p.mu.Lock()
	p.server = server
	ended := p.ended
	p.mu.Unlock()
	if ended {
		reset(server)
		return
	}
	p.in, p.out = newReader(p.client), newReader(server)
	p.toClient, p.toServer = newWriter(p.client), newWriter(server)
	defer p.in.release()
	d, err := p.decide()
	if err != nil {
		p.record(Failed, p.why())
		return
	}
	switch parser, _ := parserOf(d); {
	case d.Everything:
		p.pass(func(d Decision) bool { return d.Everything })
	case parser == l7.ParserTLS:
		p.serveTLS(d)
	case parser == l7.ParserHTTP:
		p.serveHTTP()
	default:
		p.abort("no rules for a TCP connection")
		p.record(Failed, p.why())
	}
}

// parserOf returns the one parser of the rules.
func parserOf(d Decision) (l7.Parser, error) {
	var parser l7.Parser
	for _, r := range d.Rules {
		if parser != l7.ParserNone && r.Parser != parser {
			return 0, errors.New("rules of different parsers")
		}
		parser = r.Parser
	}
	return parser, nil
}

// decide asks the judge. An error ends the pair: without a judgement nothing
// passes.
func (p *pair) decide() (Decision, error) {
	d, err := p.judge.Judge()
	if err != nil {
		p.abort("not judged: " + err.Error())
		return d, err
	}
	if _, err = parserOf(d); err != nil && !d.Everything {
		p.abort(err.Error())
		return d, err
	}
	p.mu.Lock()
	p.last = d
	p.mu.Unlock()
	return d, nil
}

// look is called at every tick: it ends what is idle, or has lost its ground.
func (p *pair) look(now, idle int64) {
	if !p.tunnel.Load() && now-p.active.Load() > idle {
		p.abort("idle")
		return
	}
	p.mu.Lock()
	ready, again, epoch := p.server != nil && !p.ended, p.again, p.last.Epoch
	p.mu.Unlock()
	if !ready {
		return
	}
	d, wait, err := p.judge.Peek()
	switch {
	case wait: // one look for all connections: none waits for another's tables
	case err != nil:
		p.abort("not judged: " + err.Error())
	case again != nil && d.Epoch != epoch:
		if !again(d) {
			p.abort("the policy allows it no longer")
		}
		p.mu.Lock()
		p.last = d
		p.mu.Unlock()
	}
}

func (p *pair) touch() { p.active.Store(p.s.tick.Load()) }

// abort ends both connections at once, as a reset.
func (p *pair) abort(reason string) { p.end(reason, reset) }

// close ends both connections. What was sent still arrives.
func (p *pair) close() { p.end("", func(c net.Conn) { c.Close() }) }

func (p *pair) end(reason string, by func(net.Conn)) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.ended {
		return
	}
	p.ended, p.reason = true, reason
	by(p.client)
	if p.server != nil {
		by(p.server)
	}
	p.changed.Broadcast()
}

// why returns the reason of an end that was not in peace.
func (p *pair) why() string {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.reason == "" {
		return "the connection ended"
	}
	return p.reason
}

// retire lets the pair end with the last answer that is under way.
func (p *pair) retire() {
	p.mu.Lock()
	p.retired = true
	idle, h := len(p.waiting) == 0 && p.server != nil, p.h2
	p.changed.Broadcast()
	p.mu.Unlock()
	if h != nil {
		h.retire()
		return
	}
	if idle || p.tunnel.Load() {
		p.close()
	}
}

// pass lets every byte pass, both ways, until both sides are done. What the
// readers hold goes first.
func (p *pair) pass(again func(Decision) bool) {
	p.tunnel.Store(true)
	p.mu.Lock()
	p.again = again
	p.mu.Unlock()
	done := make(chan struct{})
	go func() { // ends with the connections, awaited below
		defer close(done)
		defer p.out.release()
		p.copy(p.client, p.server, p.out)
	}()
	p.copy(p.server, p.client, p.in)
	<-done
}

// copy copies one direction of a tunnel. An orderly end is passed on alone;
// any other ends both.
func (p *pair) copy(to, from net.Conn, held *reader) {
	if _, err := to.Write(held.data()); err != nil {
		p.abort("write: " + err.Error())
		return
	}
	held.release()
	if _, err := io.Copy(to, from); err != nil {
		p.abort("forward: " + err.Error())
		return
	}
	closeWrite(to)
}

func closeWrite(c net.Conn) {
	if t, ok := c.(interface{ CloseWrite() error }); ok {
		t.CloseWrite() // fails only on what is closed
	}
}

// record records an end of the connection itself.
func (p *pair) record(v Verdict, reason string) {
	r := p.newRecord(v, reason)
	p.s.recorder.Record(r)
}

func (p *pair) newRecord(v Verdict, reason string) *Record {
	p.mu.Lock()
	d := p.last
	p.mu.Unlock()
	r := &Record{Time: time.Now(), Conn: p.conn, Subject: d.Subject, Peer: d.Peer, Epoch: d.Epoch, Verdict: v, Reason: reason}
	r.Parser, _ = parserOf(d)
	return r
}
