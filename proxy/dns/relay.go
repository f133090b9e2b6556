package dns

import (
	"context"
	"crypto/rand"
	"encoding/binary"
	"errors"
	"net"
	"net/netip"
	"sync"
	"sync/atomic"
	"time"

	"github.com/miekg/dns"

	"portcullis/authz/l7"
	"portcullis/proxy"
)

// Relay judges and relays. Make it with New. Run may be called once.
type Relay struct {
	cfg   Config
	stats Stats

	mu      sync.Mutex
	clients map[netip.Addr]load // what is under way; none of them zero
	total   load
	flows   map[proxy.Conn]*udpFlow // with queries outstanding
	conns   map[net.Conn]struct{}
	closed  bool

	wg sync.WaitGroup
}

// load is what is under way for somebody.
type load struct{ queries, conns int }

// Stats counts since the start. Safe for concurrent use.
type Stats struct {
	Queries    atomic.Uint64 // that could be read
	Silent     atomic.Uint64 // messages that were no queries, and got no answer
	Overloaded atomic.Uint64 // queries and connections beyond a bound, without an answer
	Stray      atomic.Uint64 // messages of servers that answer nothing that was asked
}

// New returns a relay, or what is wrong with its configuration.
func New(cfg Config) (*Relay, error) {
	if err := cfg.defaults(); err != nil {
		return nil, err
	}
	return &Relay{cfg: cfg, clients: map[netip.Addr]load{}, flows: map[proxy.Conn]*udpFlow{}, conns: map[net.Conn]struct{}{}}, nil
}

// Stats returns the relay's counters.
func (r *Relay) Stats() *Stats { return &r.stats }

// Run serves queries from packets and connections from listeners until ctx ends
// or one of them fails, closes all of them, and waits for what is under way. A
// connection's local address is the server that its client meant.
func (r *Relay) Run(ctx context.Context, packets []Packets, listeners []net.Listener) error {
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	for _, p := range packets {
		r.wg.Go(func() { cancel(r.servePackets(ctx, p)) })
	}
	for _, l := range listeners {
		r.wg.Go(func() { cancel(r.serveConns(ctx, l)) })
	}
	<-ctx.Done()
	for _, p := range packets {
		p.Close()
	}
	for _, l := range listeners {
		l.Close()
	}
	r.mu.Lock()
	r.closed = true
	for c := range r.conns {
		c.Close()
	}
	r.mu.Unlock()
	r.wg.Wait()
	if err := context.Cause(ctx); !errors.Is(err, context.Canceled) {
		return err
	}
	return nil
}

// enter counts something under way for a client, unless it is too much.
func (r *Relay) enter(client netip.Addr, more load) bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	l := r.clients[client]
	if l.queries+more.queries > r.cfg.PerClient || r.total.queries+more.queries > r.cfg.Outstanding ||
		l.conns+more.conns > r.cfg.PerClientTCP || r.total.conns+more.conns > r.cfg.Connections {
		r.stats.Overloaded.Add(1)
		return false
	}
	r.clients[client] = load{l.queries + more.queries, l.conns + more.conns}
	r.total = load{r.total.queries + more.queries, r.total.conns + more.conns}
	return true
}

// leave is the opposite of enter.
func (r *Relay) leave(client netip.Addr, less load) {
	r.mu.Lock()
	defer r.mu.Unlock()
	l := r.clients[client]
	if l = (load{l.queries - less.queries, l.conns - less.conns}); l == (load{}) {
		delete(r.clients, client)
	} else {
		r.clients[client] = l
	}
	r.total = load{r.total.queries - less.queries, r.total.conns - less.conns}
}

// asker asks a flow's server.
type asker interface {
	// ask sends a query and returns the message that answers it.
	ask(ctx context.Context, q *query) ([]byte, error)
}

// handle does all for one message of a client and returns what the client gets;
// nil: nothing. upstream is called for queries that are let through. ended: the
// flow is not judged, so its connection ends.
func (r *Relay) handle(ctx context.Context, f proxy.Conn, b []byte, upstream func() (asker, func(), error)) (answer []byte, ended bool) {
	q, err := parseQuery(b)
	if errors.Is(err, errSilent) {
		r.stats.Silent.Add(1)
		return nil, false
	}
	r.stats.Queries.Add(1)
	rec := &proxy.Record{Time: time.Now(), Conn: f, Parser: l7.ParserDNS, DNS: &proxy.DNSRecord{Name: q.name, Type: q.qtype}}
	finish := func(o Outcome, rcode int, err error) []byte {
		rec.Verdict, rec.DNS.Code, rec.DNS.Latency = o.verdict(), rcode, time.Since(rec.Time)
		if o != Answered {
			rec.Reason = string(o)
		}
		if err != nil {
			rec.Reason += ": " + err.Error()
		}
		if rcode >= 0 && answer == nil {
			answer = q.reply(rcode)
		}
		r.cfg.Recorder.Record(rec)
		return answer
	}
	var bad badQuery
	if errors.As(err, &bad) {
		return finish(Malformed, bad.rcode, err), false
	}
	d, err := r.judge(ctx, f, upstream)
	if err != nil { // nobody says that it may pass
		return finish(NotJudged, dns.RcodeRefused, err), true
	}
	rec.Subject, rec.Peer, rec.Epoch = d.Subject, d.Peer, d.Epoch
	allowed := d.Everything
	if !allowed {
		rec.Rule, allowed = l7.JudgeName(d.Rules, q.name)
	}
	if !allowed {
		return finish(Denied, r.cfg.refusal(), nil), false
	}
	up, done, err := upstream()
	if err != nil {
		return finish(NoServer, dns.RcodeServerFailure, err), false
	}
	defer done()
	got, outcome, err := r.exchange(ctx, up, &q, d, rec)
	if err != nil {
		if outcome == Ended {
			return finish(Ended, -1, err), false
		}
		return finish(outcome, dns.RcodeServerFailure, err), false
	}
	if answer = got; f.Protocol == UDP && len(got) > maxAnswer {
		answer = q.truncated(got)
	}
	return finish(Answered, int(answer[3]&maskRcode), nil), false
}

// knocker is an asker that can send its server something that says nothing.
type knocker interface{ knock() error }

// Times of judge.
const (
	knockTimeout = time.Second // in which the datapath has judged a first packet, or lets it not by
	lookLeast    = 100 * time.Microsecond
	lookMost     = 10 * time.Millisecond
)

// judge judges the flow of a query. One that the datapath has not judged, since it
// leads to a service, is made to be: an empty datagram is sent on its way, which
// servers take no notice of. What the client asks goes nowhere before.
func (r *Relay) judge(ctx context.Context, f proxy.Conn, upstream func() (asker, func(), error)) (proxy.Decision, error) {
	d, err := r.cfg.Judge.Judge(f)
	if !errors.Is(err, proxy.ErrNotJudged) {
		return d, err
	}
	up, done, dialErr := upstream()
	if dialErr != nil {
		return d, errors.Join(err, dialErr)
	}
	defer done()
	k, ok := up.(knocker)
	if !ok {
		return d, err
	}
	if failed := k.knock(); failed != nil {
		return d, errors.Join(err, failed)
	}
	ctx, cancel := context.WithTimeout(ctx, knockTimeout)
	defer cancel()
	for wait := lookLeast; errors.Is(err, proxy.ErrNotJudged); wait = min(2*wait, lookMost) {
		select {
		case <-ctx.Done():
			return d, err
		case <-time.After(wait):
		}
		d, err = r.cfg.Judge.Judge(f)
	}
	return d, err
}

// exchange asks the server, and has the answer learnt.
func (r *Relay) exchange(ctx context.Context, up asker, q *query, d proxy.Decision, rec *proxy.Record) ([]byte, Outcome, error) {
	asked, cancel := context.WithTimeout(ctx, r.cfg.Timeout)
	defer cancel()
	b, err := up.ask(asked, q)
	switch {
	case ctx.Err() != nil:
		return nil, Ended, ctx.Err()
	case asked.Err() != nil:
		return nil, Timeout, asked.Err()
	case err != nil:
		return nil, NoServer, err
	}
	found, err := q.learn(b)
	if err != nil {
		return nil, BadAnswer, err
	}
	for i, a := range found {
		rec.DNS.Addresses = append(rec.DNS.Addresses, a.IP)
		if rec.DNS.TTL = min(rec.DNS.TTL, a.TTL); i == 0 {
			rec.DNS.TTL = a.TTL
		}
	}
	// Whom no rule lets in by names, nobody has to admit before it hears.
	if len(found) > 0 && !d.NoNames {
		if err := r.learn(ctx, rec.Conn, q, d, found); err != nil {
			return nil, NotLearnt, err
		}
	}
	binary.BigEndian.PutUint16(b, q.id)
	return b, Answered, nil
}

// learn returns nil only if the learner said so in time. The address may be
// admitted all the same: that is the safe side of an answer that is not given.
func (r *Relay) learn(ctx context.Context, f proxy.Conn, q *query, d proxy.Decision, found []Address) error {
	name, ok := l7.NormalName(q.name)
	if !ok {
		return nil // no rule means it: there is nothing to admit
	}
	ctx, cancel := context.WithTimeout(ctx, r.cfg.LearnTimeout)
	defer cancel()
	if err := r.cfg.Learner.Learn(ctx, f, d, Answer{Name: name, Addresses: found}); err != nil {
		return err
	}
	return ctx.Err() // it came too late, whatever it says
}

// waiting are the queries that a server was asked in one connection, by the
// ids under which it was asked.
type waiting struct {
	mu   sync.Mutex
	by   map[uint16]*outstanding
	dead error // no answer will come
}

type outstanding struct {
	*query
	answer chan []byte // of one
	failed chan struct{}
}

var errNoID = errors.New("the server owes too many answers")

// add gives a query an id that nobody guesses.
func (w *waiting) add(q *query) (uint16, *outstanding, error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.dead != nil {
		return 0, nil, w.dead
	}
	if w.by == nil {
		w.by = map[uint16]*outstanding{}
	}
	for range 64 {
		var id [2]byte
		rand.Read(id[:]) // never fails
		n := binary.BigEndian.Uint16(id[:])
		if _, taken := w.by[n]; !taken {
			o := &outstanding{query: q, answer: make(chan []byte, 1), failed: make(chan struct{})}
			w.by[n] = o
			return n, o, nil
		}
	}
	return 0, nil, errNoID
}

func (w *waiting) remove(id uint16) {
	w.mu.Lock()
	defer w.mu.Unlock()
	delete(w.by, id)
}

// deliver hands a message to the query that it answers; false: it answers none.
func (w *waiting) deliver(b []byte) bool {
	if len(b) < headerLen {
		return false
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	id := binary.BigEndian.Uint16(b)
	o := w.by[id]
	if o == nil || !o.answers(b) {
		return false
	}
	delete(w.by, id)
	o.answer <- b
	return true
}

// fail says that no answer will come to what is outstanding; last: nor to what
// comes.
func (w *waiting) fail(why error, last bool) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if last {
		w.dead = why
	}
	for id, o := range w.by {
		close(o.failed)
		delete(w.by, id)
	}
}

var errNoAnswer = errors.New("the server closed, or cannot be reached")

// ask sends a query by write, under an id of its own, and waits.
func (w *waiting) ask(ctx context.Context, q *query, write func([]byte) error) ([]byte, error) {
	id, o, err := w.add(q)
	if err != nil {
		return nil, err
	}
	defer w.remove(id)
	b := append([]byte(nil), q.bytes...)
	binary.BigEndian.PutUint16(b, id)
	if err := write(b); err != nil {
		return nil, err
	}
	select {
	case b := <-o.answer:
		return b, nil
	case <-o.failed:
		return nil, errNoAnswer
	case <-ctx.Done():
		return nil, ctx.Err()
	}
}
