package proxy

import (
	"encoding/binary"
	"strconv"
	"strings"
	"time"

	"golang.org/x/net/http2/hpack"

	"portcullis/authz/l7"
)

// fromClient takes one frame of the client.
func (h *h2) fromClient(f *frame) error {
	if !h.settled {
		if f.kind != frameSettings || f.has(flagAck) {
			return h2Errorf(codeProtocol, "no SETTINGS behind the preface")
		}
		h.settled = true
		if err := h.p.client.SetReadDeadline(time.Time{}); err != nil {
			return err
		}
		return h.clientSettings(f, true)
	}
	if cost := controlCost(f); cost > 0 && !h.control.take(cost) {
		return h2Errorf(codeCalm, "too many frames that carry nothing")
	}
	switch f.kind {
	case frameData:
		return h.clientData(f)
	case frameHeaders:
		return h.clientHeaders(f)
	case frameRST:
		return h.clientReset(f)
	case frameSettings:
		return h.clientSettings(f, false)
	case framePing:
		if f.stream != 0 || len(f.payload) != 8 {
			return h2Errorf(codeProtocol, "an improper PING")
		}
		return h.toServer.write(f.all)
	case frameGoAway:
		if f.stream != 0 || len(f.payload) < 8 {
			return h2Errorf(codeProtocol, "an improper GOAWAY")
		}
		return h.toServer.write(f.all)
	case frameWindow:
		return h.clientWindow(f)
	case framePush, frameContinuation:
		return h2Errorf(codeProtocol, "a frame that has no place here")
	}
	return nil // priorities, and what nobody knows: they need not be followed
}

// controlCost is what a frame takes of the bound on frames that carry nothing.
func controlCost(f *frame) float64 {
	switch f.kind {
	case frameHeaders, frameRST: // these have bounds of their own
		return 0
	case frameWindow:
		return 1
	case frameData:
		if len(f.payload) > 0 || f.has(flagEndStream) {
			return 0
		}
	}
	return 10
}

func (h *h2) clientSettings(f *frame, first bool) error {
	out, err := rewriteSettings(f, uint32(h.p.s.opts.Streams), func(id uint16, v uint32) {
		if id == settingWindow {
			h.mu.Lock()
			h.initial = int64(v)
			h.mu.Unlock()
		}
	})
	if err != nil || f.has(flagAck) {
		if err == nil {
			err = h.toServer.write(out)
		}
		return err
	}
	if first {
		// A pushed answer would be one to a request that nobody judged.
		out = append(out, 0, settingPush, 0, 0, 0, 0)
	}
	return h.toServer.write(appendFrame(nil, frameSettings, 0, 0, out...))
}

func (h *h2) clientWindow(f *frame) error {
	if len(f.payload) != 4 {
		return h2Errorf(codeFrameSize, "an improper WINDOW_UPDATE")
	}
	n := int64(binary.BigEndian.Uint32(f.payload) &^ (1 << 31))
	if n == 0 {
		return h2Errorf(codeProtocol, "a WINDOW_UPDATE by nothing")
	}
	h.mu.Lock()
	if f.stream != 0 {
		s := h.streams[f.stream]
		h.mu.Unlock()
		if s == nil {
			return nil
		}
		return h.toServer.write(f.all)
	}
	if h.window += n; h.window > 1<<31-1 {
		h.mu.Unlock()
		return h2Errorf(codeFlow, "a window that is too large")
	}
	pay := min(n, h.debt)
	h.debt -= pay
	h.changed.Broadcast()
	h.mu.Unlock()
	if n -= pay; n == 0 {
		return nil
	}
	return h.toServer.write(appendFrame(nil, frameWindow, 0, 0, word(uint32(n))...))
}

func (h *h2) clientReset(f *frame) error {
	if f.stream == 0 || f.stream > h.last.Load() || len(f.payload) != 4 {
		return h2Errorf(codeProtocol, "an improper RST_STREAM")
	}
	if _, ok := h.refused[f.stream]; ok { // it has its answer, and gives up the rest
		delete(h.refused, f.stream)
		return nil
	}
	if !h.resets.take(1) {
		return h2Errorf(codeCalm, "streams that are opened and reset too fast")
	}
	if !h.drop(f.stream, Failed, "the client gave it up") {
		return nil
	}
	return h.toServer.write(f.all)
}

// drop forgets a stream that one side, or this proxy, has reset. It reports
// whether the stream was there.
func (h *h2) drop(id uint32, v Verdict, reason string) bool {
	h.mu.Lock()
	s := h.streams[id]
	over := false
	var rec *Record
	if s != nil {
		rec, s.rec = s.rec, nil
		s.clientDone, s.serverDone = true, true
		over = h.closed(id, s)
	}
	h.mu.Unlock()
	h.fail(rec, v, reason)
	if over {
		h.p.finish()
	}
	return s != nil
}

// clientData forwards data, if its stream is there.
func (h *h2) clientData(f *frame) error {
	b, ok := f.content()
	if !ok || f.stream == 0 || f.stream > h.last.Load() {
		return h2Errorf(codeProtocol, "improper DATA")
	}
	h.mu.Lock()
	s := h.streams[f.stream]
	var late, over, wrong bool
	if s != nil {
		if late = s.clientDone; s.left >= 0 {
			s.left -= int64(len(b))
			wrong = s.left < 0 || f.has(flagEndStream) && s.left != 0
		}
		if f.has(flagEndStream) && !wrong && !late {
			s.clientDone = true
			over = h.closed(f.stream, s)
		}
	}
	h.mu.Unlock()
	switch {
	case s == nil: // refused, or reset by the server
		return h.refusedData(f)
	case late:
		return h2Errorf(codeProtocol, "DATA behind a stream's end")
	case wrong:
		return h.malformedStream(f.stream, len(f.payload), "content that is not as long as its Content-Length")
	}
	if err := h.toServer.write(f.all); err != nil || !over {
		return err
	}
	h.p.finish()
	return nil
}

// refusedData reads data away that nobody wants. Clients take an answer badly that
// is followed by a reset, so what is little may come to its end.
func (h *h2) refusedData(f *frame) error {
	n := len(f.payload)
	left, ok := h.refused[f.stream]
	if err := h.giveBack(n); err != nil || !ok {
		return err
	}
	left -= int64(n)
	switch {
	case f.has(flagEndStream):
		delete(h.refused, f.stream)
		return nil
	case left < 0:
		delete(h.refused, f.stream)
		return h.own(appendFrame(nil, frameRST, 0, f.stream, word(codeNone)...)) // it need not send the rest
	}
	if h.refused[f.stream] = left; n == 0 {
		return nil
	}
	return h.own(appendFrame(nil, frameWindow, 0, f.stream, word(uint32(n))...))
}

// giveBack grants n bytes again to a client whose data goes nowhere.
func (h *h2) giveBack(n int) error {
	if n == 0 {
		return nil
	}
	return h.own(appendFrame(nil, frameWindow, 0, 0, word(uint32(n))...))
}

// malformedStream resets a stream on both sides; n bytes of it went nowhere.
func (h *h2) malformedStream(id uint32, n int, reason string) error {
	h.p.s.stats.malformed.Add(1)
	h.drop(id, Malformed, reason)
	rst := appendFrame(nil, frameRST, 0, id, word(codeProtocol)...)
	if err := h.giveBack(n); err != nil {
		return err
	}
	if err := h.own(rst); err != nil {
		return err
	}
	return h.toServer.write(rst)
}

// clientHeaders reads the header of a request, or its trailer.
func (h *h2) clientHeaders(f *frame) error {
	id, end := f.stream, f.has(flagEndStream)
	block, err := h.readBlock(h.p.in, f, nil)
	if err != nil {
		return err
	}
	var got fields
	h.requestFields.SetEmitFunc(h.collect(&got))
	if _, err := h.requestFields.Write(block); err != nil {
		return h2Errorf(codeHPACK, "a header that does not decompress")
	}
	if err := h.requestFields.Close(); err != nil {
		return h2Errorf(codeHPACK, "a header that does not decompress")
	}
	if id%2 == 0 {
		return h2Errorf(codeProtocol, "a stream that is not a client's")
	}
	if id <= h.last.Load() {
		return h.clientTrailer(id, end, &got)
	}
	h.last.Store(id)
	h.p.s.stats.requests.Add(1)
	h.mu.Lock()
	full := h.going || len(h.streams)+len(h.refused) >= h.p.s.opts.Streams
	h.mu.Unlock()
	if full {
		return h.own(appendFrame(nil, frameRST, 0, id, word(codeRefused)...))
	}
	return h.judge(id, end, &got)
}

// judge judges a request and sends it on.
func (h *h2) judge(id uint32, end bool, got *fields) error {
	p := h.p
	begin := time.Now()
	rq, length, err := h2Request(got.list, end)
	if got.over {
		err = malformed("a head that is too long")
	}
	if err != nil {
		p.s.stats.malformed.Add(1)
		r := h.record(&rq, begin, Malformed, err.Error())
		r.HTTP.Status = 400
		p.s.recorder.Record(r)
		return h.answer(id, end, true, rq.Method, 400, "Refused: "+err.Error()+"\n")
	}
	d, err := p.decide()
	if err != nil {
		p.s.recorder.Record(h.record(&rq, begin, Failed, p.why()))
		return err
	}
	v := l7.Verdict{Allowed: d.Everything}
	if !d.Everything {
		v = l7.JudgeHTTP(d.Rules, &rq)
	}
	if !v.Allowed {
		p.s.stats.denied.Add(1)
		r := h.record(&rq, begin, Denied, "no rule allows it")
		r.HTTP.Status = 403
		p.s.recorder.Record(r)
		if !end && length <= p.s.opts.DrainBytes {
			h.refused[id] = p.s.opts.DrainBytes
		}
		return h.answer(id, end, length > p.s.opts.DrainBytes, rq.Method, 403, deniedBody)
	}
	r := h.record(&rq, begin, Forwarded, "")
	r.Rule, r.HTTP.Mismatched = v.Rule, v.Mismatched
	h.mu.Lock()
	h.streams[id] = &h2stream{rec: r, begin: begin, left: length, clientDone: end, rules: d.Rules}
	h.mu.Unlock()
	return h.toServer.write(h.encode(id, end, got.list, v.Changes))
}

func (h *h2) record(rq *l7.Request, begin time.Time, v Verdict, reason string) *Record {
	r := h.p.newRecord(v, reason)
	r.Time, r.Parser, r.HTTP = begin, l7.ParserHTTP, h.p.s.httpRecord(rq)
	r.HTTP.Version = "2"
	return r
}

// answer answers a request that goes nowhere. Unless the client is at its end, it
// may be told that it need not send the rest.
func (h *h2) answer(id uint32, end, stop bool, method string, status int, text string) error {
	h.mu.Lock()
	n := int64(len(text))
	if method == "HEAD" || h.window < n || h.initial < n {
		n = 0 // the client has no room for it
	}
	h.window -= n
	h.debt += n
	h.mu.Unlock()
	flags := byte(flagEndHeaders)
	if n == 0 {
		flags |= flagEndStream
	}
	out := appendFrame(nil, frameHeaders, flags, id, literals(":status", strconv.Itoa(status), "content-type", "text/plain; charset=utf-8",
		"x-content-type-options", "nosniff", "content-length", strconv.Itoa(len(text)))...)
	if n > 0 {
		out = appendFrame(out, frameData, flagEndStream, id, []byte(text)...)
	}
	if !end && stop {
		out = appendFrame(out, frameRST, 0, id, word(codeNone)...)
	}
	return h.own(out)
}

// clientTrailer sends a trailer on.
func (h *h2) clientTrailer(id uint32, end bool, got *fields) error {
	h.mu.Lock()
	s := h.streams[id]
	var late, over bool
	if s != nil {
		late = s.clientDone
	}
	h.mu.Unlock()
	switch {
	case s == nil:
		delete(h.refused, id)
		return nil // of a stream that was refused or reset; its fields are in the tables
	case late || !end:
		return h2Errorf(codeProtocol, "a header behind a stream's end, or in its midst")
	}
	if reason := trailerWrong(s, got); reason != nil {
		return h.malformedStream(id, 0, reason.Error())
	}
	h.mu.Lock()
	s.clientDone = true
	over = h.closed(id, s)
	h.mu.Unlock()
	err := h.toServer.write(h.encode(id, true, got.list, nil))
	if err == nil && over {
		h.p.finish()
	}
	return err
}

func trailerWrong(s *h2stream, got *fields) error {
	refuse := refuseTrailer(func(name string) bool { return l7.LooksAt(s.rules, name) })
	if got.over {
		return malformed("a trailer that is too long")
	}
	if s.left > 0 {
		return malformed("content that is not as long as its Content-Length")
	}
	for _, f := range got.list {
		var x framing
		if err := h2Field(hpack.HeaderField{Name: strings.TrimPrefix(f.Name, ":"), Value: f.Value}, &x); err != nil || f.IsPseudo() {
			return malformed("a trailer with an improper field")
		}
		if err := refuse(f.Name); err != nil {
			return err
		}
	}
	return nil
}
