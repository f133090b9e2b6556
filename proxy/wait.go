package proxy

import (
	"io"
	"strconv"
	"strings"
	"time"

	"portcullis/authz/l7"
)

func itoa(n int) string { return strconv.Itoa(n) }

// enqueue puts a request into the line for answers, before it is sent. It
// reports whether the request may go.
func (p *pair) enqueue(ex *exchange) bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	for len(p.waiting) >= p.s.opts.pipelined && !p.over() {
		p.changed.Wait()
	}
	if p.over() || p.retired {
		return false
	}
	p.waiting = append(p.waiting, ex)
	return true
}

func (p *pair) over() bool { return p.ended || p.closing }

// quiet waits until every request before has its answer, so that this side may
// write to the client. It reports false if nothing may be written any more.
func (p *pair) quiet() bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	for len(p.waiting) > 0 && !p.over() {
		p.changed.Wait()
	}
	return !p.over()
}

// await waits for the answer to a request.
func (p *pair) await(ex *exchange) exchangeState {
	p.mu.Lock()
	defer p.mu.Unlock()
	for ex.state == unanswered && !p.over() {
		p.changed.Wait()
	}
	return ex.state
}

// next returns the request that the server's next answer is for; nil if none.
func (p *pair) next() *exchange {
	p.mu.Lock()
	defer p.mu.Unlock()
	if len(p.waiting) == 0 {
		return nil
	}
	return p.waiting[0]
}

// answeredTo takes the first request out of the line. It reports whether the
// connection ends with it.
func (p *pair) answeredTo(state exchangeState) (last bool) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.waiting[0].state = state
	copy(p.waiting, p.waiting[1:])
	p.waiting[len(p.waiting)-1] = nil
	p.waiting = p.waiting[:len(p.waiting)-1]
	p.changed.Broadcast()
	return len(p.waiting) == 0 && (p.half || p.retired)
}

// clientDone is called when the client sends nothing more. As without the
// proxy, the server learns it at once.
func (p *pair) clientDone() {
	p.mu.Lock()
	p.half = true
	idle := len(p.waiting) == 0
	p.mu.Unlock()
	if idle {
		p.close()
		return
	}
	closeWrite(p.server)
}

func (p *pair) isClosing() bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.closing
}

// finish is called when the client gets nothing more: it learns it at once, and
// the request's side reads away what it still sends, lest the kernel answer
// with a reset that outruns the last answer.
func (p *pair) finish() {
	p.mu.Lock()
	p.closing = true
	p.changed.Broadcast()
	p.mu.Unlock()
	closeWrite(p.client)
	p.client.SetReadDeadline(time.Now().Add(lingering)) // fails only on what is closed
	p.server.Close()
}

const lingering = 2 * time.Second

// linger ends the connection in peace; it is called by the request's side.
func (p *pair) linger() {
	closeWrite(p.client)
	p.in.release()
	p.client.SetReadDeadline(time.Now().Add(lingering)) // fails only on what is closed
	io.CopyN(io.Discard, p.client, 1<<20)               // any end will do
	p.close()
}

// failWaiting records that the requests under way get no answer.
func (p *pair) failWaiting(reason string) {
	p.mu.Lock()
	left := p.waiting
	p.waiting = nil
	p.changed.Broadcast()
	p.mu.Unlock()
	for _, ex := range left {
		if ex.rec != nil {
			ex.rec.Verdict, ex.rec.Reason = Failed, reason
			p.s.recorder.Record(ex.rec)
		}
	}
}

func (p *pair) requestRecord(rq *request, v *l7.Verdict, begin time.Time, verdict Verdict, reason string) *Record {
	r := p.newRecord(verdict, reason)
	r.Time, r.Parser = begin, l7.ParserHTTP
	r.HTTP = p.s.httpRecord(&rq.Request)
	if r.HTTP.Version = "1.1"; rq.minor == 0 {
		r.HTTP.Version = "1.0"
	}
	if v != nil {
		r.Rule, r.HTTP.Mismatched = v.Rule, v.Mismatched
	}
	return r
}

func (s *Server) httpRecord(rq *l7.Request) *HTTPRecord {
	h := &HTTPRecord{Method: rq.Method, Path: rq.Target, Host: rq.Host}
	if !s.opts.Queries {
		h.Path, _, _ = strings.Cut(h.Path, "?")
	}
	for _, name := range s.opts.Headers {
		for _, f := range rq.Fields {
			if strings.EqualFold(name, f.Name) {
				h.Header = append(h.Header, [2]string{f.Name, f.Value})
			}
		}
	}
	return h
}
