package proxy

import (
	"bytes"
	"errors"
	"io"
	"os"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/net/http2/hpack"

	"portcullis/authz/l7"
)

// h2 is a pair that speaks HTTP/2. Frames pass one to one, with their streams,
// windows, settings and pings, so both sides keep each other's limits. But:
//
//   - the header of a request is decoded, judged, and encoded anew, since the
//     server must not miss what a refused one would have put into the tables;
//   - a refused request is answered here, and the server never hears of it;
//   - data of a stream that is no more is thrown away, and given back to the
//     sender's window;
//   - this proxy's own answers are debt: they take of the client's window, and
//     the server learns of the client's next grants only what is beyond.
type h2 struct {
	p        *pair
	toClient *frameWriter
	toServer *frameWriter

	requestFields *hpack.Decoder // of the client's goroutine, as is what follows
	enc           *hpack.Encoder
	block         bytes.Buffer // of enc
	control       bucket
	resets        bucket
	settled       bool // the client's first SETTINGS are there
	// refused are streams that were answered here while the client has more to
	// send: so many bytes of each are read away, then it is reset.
	refused map[uint32]int64

	last        atomic.Uint32 // the client's latest stream
	serverTable atomic.Int64  // the server's new table size; -1: none

	mu      sync.Mutex
	changed sync.Cond // of window, open and ended
	streams map[uint32]*h2stream
	window  int64 // that the client has left
	debt    int64 // of it, that the server does not know to be gone
	initial int64 // of the client's streams
	open    bool  // the server's first SETTINGS have gone to the client
	ended   bool  // one side is at its end
	going   bool  // no further stream is taken
}

// h2stream is an allowed request that is under way; guarded by h2.mu, but rules,
// which is the client's goroutine's.
type h2stream struct {
	rec                    *Record // nil: given away
	begin                  time.Time
	left                   int64 // of the content; -1: not told
	clientDone, serverDone bool
	rules                  []*l7.Rules
}

// newH2 takes the pair over; nothing has gone to the server yet.
func newH2(p *pair) *h2 {
	h := &h2{p: p, toClient: newFrameWriter(p.client, errClientSide), toServer: newFrameWriter(p.server, errServerSide), streams: map[uint32]*h2stream{}, refused: map[uint32]int64{}, window: 65535, initial: 65535}
	h.changed.L = &h.mu
	h.serverTable.Store(-1)
	h.requestFields = hpack.NewDecoder(4096, nil)
	h.requestFields.SetAllowedMaxDynamicTableSize(maxTable)
	h.requestFields.SetMaxStringLength(p.s.opts.HeaderBytes)
	h.enc = hpack.NewEncoder(&h.block)
	now := time.Now()
	h.control = bucket{rate: 10 * float64(p.s.opts.controlPerSec), level: 100 * float64(p.s.opts.controlPerSec), at: now}
	h.resets = bucket{rate: float64(p.s.opts.resetsPerSec), level: 10 * float64(p.s.opts.resetsPerSec), at: now}
	return h
}

// bucket bounds a rate; ten seconds' worth may come at once.
type bucket struct {
	rate, level float64
	at          time.Time
}

func (b *bucket) take(n float64) bool {
	now := time.Now()
	b.level = min(b.level+now.Sub(b.at).Seconds()*b.rate, 10*b.rate) - n
	b.at = now
	return b.level >= 0
}

// requests reads the client until its end. The preface is unread.
func (h *h2) requests() {
	p := h.p
	defer h.end()
	p.in.skip(len(preface))
	err := h.toServer.write([]byte(preface))
	p.client.SetReadDeadline(time.Now().Add(p.s.opts.HeaderTimeout)) // for the first SETTINGS; an error comes with the read
	var f frame
	for err == nil {
		if err = h.readFrame(p.in, &f); err == nil {
			err = h.fromClient(&f)
		}
		if err == nil && !buffered(p.in, &f) {
			err = errors.Join(h.toServer.flush(), h.toClient.flush())
		}
	}
	var wrong *h2Error
	switch {
	case errors.As(err, &wrong):
		p.s.stats.malformed.Add(1)
		p.record(Malformed, wrong.reason)
		h.goAway(wrong.code)
		p.linger()
	case errors.Is(err, io.EOF), errors.Is(err, errServerSide):
		// What the server has said still goes to the client.
		closeWrite(p.server)
	case p.isClosing():
	case errors.Is(err, os.ErrDeadlineExceeded):
		p.s.stats.malformed.Add(1)
		p.record(Malformed, "a head that takes too long")
		h.goAway(codeCalm)
		p.linger()
	default:
		p.abort("HTTP/2: " + err.Error())
	}
}

// goAway tells the client the end.
func (h *h2) goAway(code uint32) {
	h.own(appendFrame(nil, frameGoAway, 0, 0, append(word(h.last.Load()), word(code)...)...)) // the end comes anyhow
	h.toClient.flush()
}

// end wakes whoever waits for a window.
func (h *h2) end() {
	h.mu.Lock()
	h.ended = true
	h.changed.Broadcast()
	h.mu.Unlock()
}

// retire lets the connection end with the last stream under way.
func (h *h2) retire() {
	h.mu.Lock()
	h.going = true
	idle := len(h.streams) == 0
	h.mu.Unlock()
	if idle {
		h.p.close()
		return
	}
	h.goAway(codeNone)
}

// closed takes a stream out when both sides are done with it. The caller holds
// mu. It reports whether the connection has nothing more to do.
func (h *h2) closed(id uint32, s *h2stream) (over bool) {
	if s.clientDone && s.serverDone {
		delete(h.streams, id)
		return h.going && len(h.streams) == 0
	}
	return false
}

// failStreams records that the requests under way get no answer.
func (h *h2) failStreams(reason string) {
	h.mu.Lock()
	left := h.streams
	h.streams = map[uint32]*h2stream{}
	h.mu.Unlock()
	for _, s := range left {
		h.fail(s.rec, Failed, reason)
	}
}

func (h *h2) fail(r *Record, v Verdict, reason string) {
	if r != nil {
		r.Verdict, r.Reason = v, reason
		h.p.s.recorder.Record(r)
	}
}
