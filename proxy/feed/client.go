package feed

import (
	"context"
	"errors"
	"fmt"
	"net"
	"sync"
	"sync/atomic"
	"time"

	"go.uber.org/zap"

	"portcullis/proxy"
)

// Sizes and times of the proxy's side.
const (
	recordQueue   = 16384 // records that wait to be sent; further ones are counted
	askQueue      = 1024  // questions that wait to be sent
	statsInterval = 5 * time.Second
	sendBytes     = 64 << 10               // that are sent together, about
	redial        = 100 * time.Millisecond // a call of the kernel's each
	writeTimeout  = 10 * time.Second
)

// ErrAway is returned to who asks the agent while it is not there.
var ErrAway = errors.New("the agent does not answer")

// Client is the proxy's end. Record and Learn are safe for concurrent use, before
// Run and after it too.
type Client struct {
	path    string
	version Version
	tables  *Tables
	stats   func() Stats
	log     *zap.Logger

	applied atomic.Uint64 // the last message taken up on this connection
	serving atomic.Bool
	news    chan struct{} // one of them has changed
	once    sync.Once
	synced  chan struct{} // closed when an agent has told everything once

	records chan *proxy.Record
	asks    chan *question
	lost    atomic.Uint64
	wanted  atomic.Pointer[records] // nil: the agent has said nothing, so all are told
	second  atomic.Int64            // that sent is of
	sent    atomic.Int64            // records of forwarded requests

	mu      sync.Mutex
	next    uint64                 // guarded by mu
	waiting map[uint64]chan string // guarded by mu: who waits for an answer
}

// NewClient returns the client of the agent at a unix socket, which keeps the
// tables. stats may be nil.
func NewClient(path string, v Version, tables *Tables, stats func() Stats, log *zap.Logger) *Client {
	return &Client{path: path, version: v, tables: tables, stats: stats, log: log, records: make(chan *proxy.Record, recordQueue),
		asks: make(chan *question, askQueue), waiting: map[uint64]chan string{}, news: make(chan struct{}, 1), synced: make(chan struct{})}
}

// Synced is closed when an agent has told all that is in force once.
func (c *Client) Synced() <-chan struct{} { return c.synced }

// Serve has the agent know that flows are served.
func (c *Client) Serve() {
	c.serving.Store(true)
	c.notify()
}

func (c *Client) notify() {
	select {
	case c.news <- struct{}{}:
	default: // it will be seen with what waits
	}
}

// Record implements proxy.Recorder.
func (c *Client) Record(r *proxy.Record) {
	if !c.wants(r) {
		return
	}
	select {
	case c.records <- r:
	default:
		c.lost.Add(1)
	}
}

// wants reports whether a record is to be told. Of those that are merely kept, what
// is beyond the rate is lost, and counted; what was refused is not.
func (c *Client) wants(r *proxy.Record) bool {
	w := c.wanted.Load()
	if w == nil || w.Wanted {
		return true
	}
	if w.Kept == 0 || r.Verdict != proxy.Forwarded {
		return w.Kept > 0
	}
	if now := r.Time.Unix(); c.second.Swap(now) != now {
		c.sent.Store(0)
	}
	if c.sent.Add(1) <= int64(w.Kept) {
		return true
	}
	c.lost.Add(1)
	return false
}

// Learn has the agent admit what an answer says, and returns nil once it is
// admitted.
func (c *Client) Learn(ctx context.Context, conn proxy.Conn, d proxy.Decision, a Answer) error {
	reply := make(chan string, 1)
	c.mu.Lock()
	c.next++
	q := &question{ID: c.next, Conn: conn, Epoch: d.Epoch, Answer: a}
	c.waiting[q.ID] = reply
	c.mu.Unlock()
	defer func() {
		c.mu.Lock()
		delete(c.waiting, q.ID)
		c.mu.Unlock()
	}()
	select {
	case c.asks <- q:
	default:
		return ErrAway
	}
	select {
	case refused := <-reply:
		if refused != "" {
			return errors.New(refused)
		}
		return nil
	case <-ctx.Done():
		return fmt.Errorf("%w: %w", ErrAway, ctx.Err())
	}
}

// Run keeps the tables as the agent says until ctx ends, connecting again as
// often as it takes. The tables stand while there is no connection: nothing that
// they speak of means anything else until this proxy has acknowledged that it was
// told, or has ended (Server.Heard). The error is ErrVersion: the agent is of
// another version, and starts a proxy of its own.
func (c *Client) Run(ctx context.Context) error {
	said := false
	for {
		connected, err := c.connect(ctx)
		if ctx.Err() != nil {
			return nil
		}
		if errors.Is(err, ErrVersion) {
			return err
		}
		if connected || !said {
			c.log.Info("no connection to the agent; the proxy goes on with what it was told", zap.Error(err))
			said = true
		}
		select {
		case <-ctx.Done():
			return nil
		case <-time.After(redial):
		}
	}
}

// connect serves one connection until it ends.
func (c *Client) connect(ctx context.Context) (connected bool, err error) {
	var dialer net.Dialer
	conn, err := dialer.DialContext(ctx, "unix", c.path)
	if err != nil {
		return false, err
	}
	c.applied.Store(0)
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	stop := context.AfterFunc(ctx, func() { conn.Close() })
	defer stop()
	// Before anything is read: an agent of another version must hear of this one,
	// though it ends when it hears of the agent's.
	if err := put(conn, report{Hello: c.version.hello()}); err != nil {
		conn.Close()
		return false, err
	}
	var wg sync.WaitGroup
	wg.Go(func() { cancel(c.send(ctx, conn)) })
	err = c.read(conn)
	cancel(err)
	conn.Close()
	wg.Wait()
	if errors.Is(err, ErrVersion) {
		return true, err // whatever ended the writer
	}
	return true, context.Cause(ctx)
}

// read takes up what the agent says. A set that this proxy cannot judge ends the
// connection's use of that set only.
func (c *Client) read(conn net.Conn) error {
	in := newLines(conn, maxTold)
	var first told
	if err := in.next(&first); err != nil {
		return err
	}
	if err := c.version.same(first.Hello); err != nil {
		return err
	}
	heard := map[uint32]bool{} // nil: everything was told
	for {
		var m told
		if err := in.next(&m); err != nil {
			return err
		}
		if heard != nil && m.Inside != nil {
			heard[m.Set] = true
		}
		switch {
		case m.Answer != nil:
			c.answer(m.Answer)
		case m.Records != nil:
			c.wanted.Store(m.Records)
		case m.Synced:
			if heard != nil {
				c.tables.keep(heard)
			}
			heard = nil
			c.once.Do(func() { close(c.synced) })
		default:
			if err := c.tables.tell(&m); err != nil {
				// Its flows are refused: they are of a set that is not known.
				c.log.Error("rules that this proxy cannot judge", zap.Error(err))
			}
		}
		if m.Seq != 0 {
			c.applied.Store(m.Seq)
			c.notify()
		}
	}
}

func (c *Client) answer(a *answer) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if reply := c.waiting[a.ID]; reply != nil {
		delete(c.waiting, a.ID)
		reply <- a.Error // it has room
	}
}

// send reports until ctx ends. What is there is sent together: else each record
// costs a system call here and one there.
func (c *Client) send(ctx context.Context, conn net.Conn) error {
	tick := time.NewTicker(statsInterval)
	defer tick.Stop()
	c.notify() // of what another agent was told already
	var buf []byte
	for {
		out, err := c.toSay(ctx, tick.C)
		if err != nil {
			return err
		}
		buf = buf[:0]
		var lost uint64 // if this is not sent
		for there := true; there; out, there = c.more(len(buf)) {
			b, err := encode(out)
			if err != nil {
				return err
			}
			if lost += out.Lost; out.Record != nil {
				lost++
			}
			buf = append(buf, b...)
		}
		if err = conn.SetWriteDeadline(time.Now().Add(writeTimeout)); err == nil {
			_, err = conn.Write(buf)
		}
		if err != nil {
			c.lost.Add(lost)
			return err
		}
	}
}

// toSay waits for what is to be reported.
func (c *Client) toSay(ctx context.Context, tick <-chan time.Time) (out report, err error) {
	select {
	case <-ctx.Done():
		return out, ctx.Err()
	case out.Record = <-c.records:
	case out.Ask = <-c.asks:
	case <-c.news:
		out.Ack, out.Serving = c.applied.Load(), c.serving.Load()
	case <-tick:
		if out.Lost = c.lost.Swap(0); c.stats != nil {
			stats := c.stats()
			out.Stats = &stats
		}
	}
	return out, nil
}

// more returns what else is there to be reported, beside so many bytes.
func (c *Client) more(have int) (out report, there bool) {
	if have >= sendBytes {
		return out, false
	}
	select {
	case out.Record = <-c.records:
	case out.Ask = <-c.asks:
	default:
		return out, false
	}
	return out, true
}

// put writes a message, or gives up with who does not read.
func put(conn net.Conn, message any) error {
	b, err := encode(message)
	if err != nil {
		return err
	}
	if err := conn.SetWriteDeadline(time.Now().Add(writeTimeout)); err != nil {
		return err
	}
	_, err = conn.Write(b)
	return err
}
