package proxy

import (
	"errors"
	"io"
	"strings"
	"time"
)

// answers forwards what the server sends.
func (p *pair) answers() {
	defer func() { p.failWaiting(p.why()) }()
	if err := p.out.fill(p.s.opts.HeaderBytes); err != nil {
		p.serverGone(err)
		return
	}
	// A server may send its first frame of HTTP/2, which begins with 0, at once.
	if h := p.http2(p.out.data()[0] == 0); h != nil {
		h.answers()
		return
	}
	var rs response
	for {
		n, err := p.head(p.out)
		if err != nil {
			p.serverGone(err)
			return
		}
		ex := p.next()
		if ex == nil {
			p.abort("the server spoke before it was asked")
			p.record(Failed, p.why())
			return
		}
		head := string(p.out.data()[:n])
		if err := parseResponse(head, p.s.opts.Fields, ex.method, &rs); err != nil {
			p.abort(err.Error())
			return
		}
		if rs.status == 101 {
			p.switchTo(ex, &rs, n)
			return
		}
		if rs.status < 200 {
			if !p.send(n) {
				return
			}
			continue
		}
		if more := p.answer(ex, &rs, n); !more {
			return
		}
	}
}

// answer forwards one final answer, of which n bytes are the head. It reports
// whether others may follow.
func (p *pair) answer(ex *exchange, rs *response, n int) (more bool) {
	p.answerRecord(ex, rs.status)
	k, done, err := rs.body.take(p.out.data()[n:])
	if err != nil {
		p.abort(err.Error())
		return false
	}
	if !p.send(n+k) || !done && !p.relay(&rs.body, p.out, p.client) {
		return false
	}
	if last := p.answeredTo(answered); last || !rs.persist {
		p.finish()
		return false
	}
	return true
}

// send forwards the first n bytes that are held.
func (p *pair) send(n int) bool {
	if err := p.toClient.write(p.out.data()[:n]); err != nil {
		p.abort("write: " + err.Error())
		return false
	}
	p.out.skip(n)
	return true
}

func (p *pair) answerRecord(ex *exchange, status int) {
	r := ex.rec
	ex.rec = nil // given away
	r.HTTP.Status, r.HTTP.Latency = status, time.Since(ex.begin)
	p.s.recorder.Record(r)
}

// switchTo makes a tunnel of the connection, if the client offered that.
func (p *pair) switchTo(ex *exchange, rs *response, n int) {
	offered := false
	for o := range strings.SplitSeq(ex.upgrade, ",") {
		offered = offered || rs.upgrade != "" && strings.EqualFold(strings.Trim(o, " \t"), rs.upgrade)
	}
	if !offered {
		p.abort("the server switches to a protocol that was not offered")
		return
	}
	p.answerRecord(ex, rs.status)
	if !p.send(n) {
		return
	}
	p.tunnel.Store(true)
	p.answeredTo(switched)
	p.copy(p.client, p.server, p.out)
}

// serverGone ends the pair after the server's connection. An orderly end is
// passed on as such.
func (p *pair) serverGone(err error) {
	switch {
	case p.isClosing():
	case errors.Is(err, io.EOF) && len(p.out.data()) == 0:
		p.failWaiting("the server ended the connection without an answer")
		p.finish()
	case errors.Is(err, errFull):
		p.abort("the server's answer has a head that is too long")
	default:
		p.abort("the server: " + err.Error())
	}
}
