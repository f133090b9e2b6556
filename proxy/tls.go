package proxy

import (
	"errors"
	"os"
	"time"

	"portcullis/authz/l7"
)

// The TLS alert "unrecognized name", fatal.
const nameAlert = "\x15\x03\x03\x00\x02\x02\x70"

// serveTLS judges the name that the client asks for, and lets every byte pass
// if it is allowed.
func (p *pair) serveTLS(d Decision) {
	name, err := p.hello()
	p.s.stats.requests.Add(1)
	if err != nil {
		p.s.stats.malformed.Add(1)
		p.record(Malformed, err.Error())
		p.abort(err.Error())
		return
	}
	// The hello may have taken its time.
	if d, err = p.decide(); err != nil {
		p.record(Failed, p.why())
		return
	}
	rule, allowed := l7.JudgeServerName(d.Rules, name)
	allowed = allowed || d.Everything
	r := p.newRecord(Forwarded, "")
	r.Parser, r.ServerName, r.Rule = l7.ParserTLS, name, rule
	if allowed {
		p.s.recorder.Record(r)
		p.pass(func(d Decision) bool {
			_, ok := l7.JudgeServerName(d.Rules, name)
			return ok || d.Everything
		})
		return
	}
	p.s.stats.denied.Add(1)
	if r.Verdict, r.Reason = Denied, "no rule allows the server's name"; name == "" {
		r.Reason = "the client names no server"
	}
	p.s.recorder.Record(r)
	if _, err := p.client.Write([]byte(nameAlert)); err != nil {
		p.abort("write: " + err.Error())
		return
	}
	p.linger()
}

// hello waits for the whole hello, which stays unread.
func (p *pair) hello() (name string, err error) {
	timed, h := false, hello{}
	for {
		if data := p.in.data(); len(data) > 0 {
			if name, err = h.read(data); err != errMore {
				break
			}
			if !timed {
				timed = true
				p.client.SetReadDeadline(time.Now().Add(p.s.opts.HeaderTimeout)) // an error comes with the next read
			}
		}
		switch err := p.in.fill(maxHello); {
		case errors.Is(err, errFull):
			return "", malformed("a TLS hello that is too long")
		case errors.Is(err, os.ErrDeadlineExceeded):
			return "", malformed("a TLS hello that takes too long")
		case err != nil && len(p.in.data()) > 0:
			return "", errMore
		case err != nil:
			return "", malformed("the client ended before its hello")
		}
		p.touch()
	}
	if timed {
		p.client.SetReadDeadline(time.Time{})
	}
	return name, err
}
