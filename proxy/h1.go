package proxy

import (
	"bytes"
	"errors"
	"io"
	"net"
	"os"
	"slices"
	"strings"
	"time"

	"portcullis/authz/l7"
)

// serveHTTP serves a connection that must speak HTTP. This goroutine reads the
// client, another one the server.
func (p *pair) serveHTTP() {
	done := make(chan struct{})
	go func() { // ends with the server's connection, awaited below
		defer close(done)
		defer p.out.release()
		p.answers()
	}()
	if h := p.begin(); h != nil {
		h.requests()
	} else {
		p.requests()
	}
	<-done
	if p.isClosing() {
		p.linger()
	}
}

// begin waits for the first bytes. If they are those of HTTP/2, the pair speaks
// it from now on.
func (p *pair) begin() (h *h2) {
	if p.hasPreface() {
		h = newH2(p)
	}
	p.mu.Lock()
	p.begun, p.h2 = true, h
	p.changed.Broadcast()
	p.mu.Unlock()
	return h
}

func (p *pair) hasPreface() bool {
	for timed := false; p.in.fill(len(preface)) == nil; {
		data := p.in.data()
		n := min(len(data), len(preface))
		same := string(data[:n]) == preface[:n]
		if same && n < len(preface) {
			if !timed {
				timed = true
				p.client.SetReadDeadline(time.Now().Add(p.s.opts.HeaderTimeout)) // an error comes with the next read
			}
			continue
		}
		if timed {
			p.client.SetReadDeadline(time.Time{})
		}
		return same
	}
	return false // what is wrong comes again
}

// http2 returns what the pair speaks: nil if HTTP/1. With wait, it waits for
// the client's first bytes.
func (p *pair) http2(wait bool) *h2 {
	p.mu.Lock()
	defer p.mu.Unlock()
	for wait && !p.begun && !p.over() {
		p.changed.Wait()
	}
	return p.h2
}

// requests judges and forwards what the client sends.
func (p *pair) requests() {
	var rq request
	for more := true; more; {
		n, err := p.head(p.in)
		switch {
		case err == nil:
			more = p.request(&rq, n)
		case errors.Is(err, io.EOF) && len(p.in.data()) == 0:
			p.clientDone()
			return
		default:
			p.unread(err)
			more = false
		}
	}
}

// head waits for a whole head, and returns how long it is.
func (p *pair) head(x *reader) (n int, err error) {
	timed := false
	for next := 0; ; {
		if data := x.data(); len(data) > 0 {
			first := next == 0
			if n, next, err = headEnd(data, next); first && !speaksHTTP(data, next) {
				return 0, malformed("not HTTP")
			}
			if err != nil || n > 0 {
				break
			}
			if !timed {
				timed = true
				x.conn.SetReadDeadline(time.Now().Add(p.s.opts.HeaderTimeout)) // an error comes with the next read
			}
		}
		if err = x.fill(p.s.opts.HeaderBytes); err != nil {
			return 0, err
		}
		p.touch()
	}
	if timed {
		x.conn.SetReadDeadline(time.Time{})
	}
	return n, err
}

// speaksHTTP reports whether data can begin a message of HTTP; lines of it, if
// there are any whole ones, are so many bytes.
func speaksHTTP(data []byte, lines int) bool {
	if data[0] == '\r' || data[0] == '\n' {
		return true // wrong in another way
	}
	if i := bytes.IndexByte(data[:lines], '\n'); i >= 0 {
		data = data[:i]
		return tokenByte[data[0]] && bytes.Contains(data, []byte("HTTP/"))
	}
	return tokenByte[data[0]]
}

// request judges one request and forwards it. It reports whether others may
// follow.
func (p *pair) request(rq *request, n int) (more bool) {
	p.s.stats.requests.Add(1)
	begin := time.Now()
	if err := parseRequest(string(p.in.data()[:n]), p.s.opts.Fields, rq); err != nil {
		p.bad("400 Bad Request", err, rq)
		return false
	}
	d, err := p.decide()
	if err != nil {
		p.s.recorder.Record(p.requestRecord(rq, nil, begin, Failed, p.why()))
		return false
	}
	v := l7.Verdict{Allowed: d.Everything}
	if !d.Everything {
		v = l7.JudgeHTTP(d.Rules, &rq.Request)
	}
	if !v.Allowed {
		return p.deny(rq, n, begin)
	}
	if rq.body.kind == bodyChunked {
		rq.body.refuse = refuseTrailer(func(name string) bool { return l7.LooksAt(d.Rules, name) })
	}
	ex := &exchange{method: rq.Method, upgrade: rq.upgrade, begin: begin, rec: p.requestRecord(rq, &v, begin, Forwarded, "")}
	return p.forward(rq, n, &v, ex)
}

// forward sends an allowed request of which n bytes are the head.
func (p *pair) forward(rq *request, n int, v *l7.Verdict, ex *exchange) (more bool) {
	data := p.in.data()
	k, done, err := rq.body.take(data[n:])
	if err != nil {
		// Nothing of it has reached the server yet.
		p.bad("400 Bad Request", err, rq)
		return false
	}
	if !p.enqueue(ex) {
		p.quiet()
		p.linger()
		return false
	}
	out := data[:n+k]
	if len(v.Changes) > 0 || rq.h2c {
		out = append(rebuild(rq, v.Changes), data[n:n+k]...)
	}
	if err := p.toServer.write(out); err != nil {
		return false // its side of the pair knows why, and may have an answer still
	}
	p.in.skip(n + k)
	if !done && !p.relay(&rq.body, p.in, p.server) {
		return false
	}
	if rq.upgrade != "" && p.await(ex) == switched {
		p.allowedFor(rq)
		p.copy(p.server, p.client, p.in)
		return false
	}
	if rq.close {
		p.mu.Lock()
		p.half = true
		p.mu.Unlock()
		return false
	}
	return true
}

// allowedFor keeps the request by which the connection became a tunnel: a
// changed policy judges it again.
func (p *pair) allowedFor(rq *request) {
	r := rq.Request
	r.Fields = slices.Clone(r.Fields)
	p.mu.Lock()
	p.again = func(d Decision) bool { return d.Everything || l7.JudgeHTTP(d.Rules, &r).Allowed }
	p.mu.Unlock()
}

// relay forwards the rest of a body.
func (p *pair) relay(b *body, from *reader, to net.Conn) bool {
	from.big = true
	defer func() { from.big = false }()
	for done := false; !done; {
		if len(from.data()) == 0 {
			if b.kind == bodyLength && b.left >= largeBuffer && from.raw != nil {
				// Without a detour through this process's memory.
				n, err := io.CopyN(to, from.conn, min(b.left, 1<<20))
				b.left -= n
				if p.touch(); err != nil {
					p.cut(from, err)
					return false
				}
				done = b.left == 0
				continue
			}
			if err := from.fill(largeBuffer); err != nil {
				if b.kind == bodyUntilClose && errors.Is(err, io.EOF) {
					return true
				}
				p.abort("within a body: " + err.Error())
				return false
			}
			p.touch()
		}
		var n int
		var err error
		if n, done, err = b.take(from.data()); err != nil {
			// The other side has a part of it: only a reset says that it is not whole.
			p.abort(err.Error())
			return false
		}
		if _, err := to.Write(from.data()[:n]); err != nil {
			p.cut(from, err)
			return false
		}
		from.skip(n)
	}
	return true
}

// cut ends what a body was being sent to. A server that takes no more of it may
// have answered already: its answer still goes to the client, by the other
// goroutine, which also learns if it has not.
func (p *pair) cut(from *reader, err error) {
	if from == p.in && !errors.Is(err, io.EOF) {
		closeWrite(p.server)
		return
	}
	p.abort("within a body: " + err.Error())
}

// rebuild writes the head of a request with changes.
func rebuild(rq *request, changes []l7.Change) []byte {
	b := make([]byte, 0, 1024)
	line := func(name, value string) {
		b = append(append(append(append(b, name...), ": "...), value...), "\r\n"...)
	}
	b = append(append(append(append(b, rq.Method...), ' '), rq.Target...), " HTTP/1."...)
	b = append(b, byte('0'+rq.minor), '\r', '\n')
	for _, f := range rq.Fields {
		removed := rq.h2c && (strings.EqualFold(f.Name, "upgrade") || strings.EqualFold(f.Name, "http2-settings"))
		for _, c := range changes {
			removed = removed || c.Remove && strings.EqualFold(c.Name, f.Name)
		}
		if rq.h2c && strings.EqualFold(f.Name, "connection") {
			f.Value = withoutOptions(f.Value, "upgrade", "http2-settings")
			removed = removed || f.Value == ""
		}
		if !removed {
			line(f.Name, f.Value)
		}
	}
	for _, c := range changes {
		if c.Add {
			line(c.Name, c.Value)
		}
	}
	return append(b, '\r', '\n')
}

func withoutOptions(value string, options ...string) string {
	var left []string
next:
	for o := range strings.SplitSeq(value, ",") {
		o = strings.Trim(o, " \t")
		for _, x := range options {
			if strings.EqualFold(o, x) {
				continue next
			}
		}
		left = append(left, o)
	}
	return strings.Join(left, ", ")
}

// The answer to a refused request. HTTP/1.0 has no other way to go on than a
// new connection.
const (
	deniedBody = "Access denied\n"
	deniedHead = "HTTP/1.1 403 Forbidden\r\nContent-Type: text/plain; charset=utf-8\r\nX-Content-Type-Options: nosniff\r\nContent-Length: 14\r\n"
)

// deny answers a request that no rule allows, and keeps the connection if the
// rest of the request can be read away.
func (p *pair) deny(rq *request, n int, begin time.Time) (more bool) {
	p.s.stats.denied.Add(1)
	r := p.requestRecord(rq, nil, begin, Denied, "no rule allows it")
	r.HTTP.Status = 403
	p.s.recorder.Record(r)
	// Whoever waits for a 100 may or may not send the body after a 403.
	last := rq.close || rq.minor == 0 || rq.expect || rq.upgrade != "" || rq.body.left > p.s.opts.DrainBytes
	if !p.quiet() {
		return false
	}
	p.in.skip(n)
	if !last && rq.body.kind == bodyChunked {
		// Nobody knows how much it is. What comes soon is read before the answer,
		// so that this can say whether the connection stays.
		last = !p.discard(&rq.body, p.s.opts.chunkedWait)
		rq.body = body{}
	}
	answer := deniedHead
	if last {
		answer += "Connection: close\r\n"
	}
	if answer += "\r\n"; rq.Method != "HEAD" {
		answer += deniedBody
	}
	if _, err := io.WriteString(p.client, answer); err != nil {
		p.abort("write: " + err.Error())
		return false
	}
	if last || !p.discard(&rq.body, p.s.opts.DrainTimeout) {
		p.linger()
		return false
	}
	return true
}

// discard reads the body of a refused request away, within the bounds.
func (p *pair) discard(b *body, limit time.Duration) bool {
	if b.kind == bodyNone {
		return true
	}
	p.client.SetReadDeadline(time.Now().Add(limit)) // an error comes with the read
	for budget := p.s.opts.DrainBytes; budget >= 0; {
		n, done, err := b.take(p.in.data())
		p.in.skip(n)
		if budget -= int64(n); err != nil {
			return false
		}
		if done {
			return p.client.SetReadDeadline(time.Time{}) == nil
		}
		if p.in.fill(largeBuffer) != nil {
			return false
		}
		p.touch()
	}
	return false
}

// bad answers what could be read in two ways, and ends the connection.
func (p *pair) bad(status string, err error, rq *request) {
	p.s.stats.malformed.Add(1)
	r := p.requestRecord(rq, nil, time.Now(), Malformed, err.Error())
	r.HTTP.Status = int(status[0]-'0')*100 + int(status[1]-'0')*10 + int(status[2]-'0')
	p.s.recorder.Record(r)
	if !p.quiet() {
		return
	}
	text := "Refused: " + err.Error() + "\n"
	if _, err := io.WriteString(p.client, "HTTP/1.1 "+status+"\r\nContent-Type: text/plain; charset=utf-8\r\nX-Content-Type-Options: nosniff\r\nConnection: close\r\nContent-Length: "+
		itoa(len(text))+"\r\n\r\n"+text); err != nil {
		p.abort("write: " + err.Error())
		return
	}
	p.linger()
}

// unread ends the connection after a head that did not come whole.
func (p *pair) unread(err error) {
	var m malformed
	switch {
	case p.isClosing():
	case errors.As(err, &m) && m == "not HTTP":
		p.s.stats.malformed.Add(1)
		p.record(Malformed, "not HTTP")
		p.close()
	case errors.As(err, &m):
		p.bad("400 Bad Request", m, &request{})
	case errors.Is(err, errFull):
		p.bad("431 Request Header Fields Too Large", malformed("a head that is too long"), &request{})
	case errors.Is(err, os.ErrDeadlineExceeded):
		p.bad("408 Request Timeout", malformed("a head that takes too long"), &request{})
	default:
		p.abort("the client: " + err.Error())
	}
}
