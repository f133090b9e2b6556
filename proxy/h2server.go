package proxy

import (
	"errors"
	"io"
	"strconv"
	"time"

	"golang.org/x/net/http2/hpack"
)

// answers forwards the server's frames until its end. Its headers pass as they
// are: every one of them, since the client's tables follow the server's.
func (h *h2) answers() {
	p := h.p
	defer func() { h.end(); h.failStreams(p.why()) }()
	answerFields := hpack.NewDecoder(4096, nil)
	answerFields.SetAllowedMaxDynamicTableSize(maxTable)
	var f frame
	err := h.readFrame(p.out, &f)
	if err == nil && (f.kind != frameSettings || f.has(flagAck)) {
		err = errors.New("the server does not speak HTTP/2")
	}
	for err == nil {
		if err = h.fromServer(&f, answerFields); err != nil {
			break
		}
		if !buffered(p.out, &f) {
			if err = errors.Join(h.toClient.flush(), h.toServer.flush()); err != nil {
				break
			}
		}
		err = h.readFrame(p.out, &f)
	}
	if errors.Is(err, io.EOF) {
		h.toClient.flush()
		h.failStreams("the server ended the connection without an answer")
		p.finish()
		return
	}
	if !p.isClosing() {
		p.abort("HTTP/2 server: " + err.Error())
	}
}

// fromServer takes one frame of the server.
func (h *h2) fromServer(f *frame, answerFields *hpack.Decoder) error {
	switch f.kind {
	case frameData:
		return h.serverData(f)
	case frameHeaders:
		return h.serverHeaders(f, answerFields)
	case frameRST:
		h.drop(f.stream, Failed, "the server reset it")
		return h.toClient.write(f.all)
	case frameSettings:
		return h.serverSettings(f)
	case framePing, frameGoAway, frameWindow:
		return h.toClient.write(f.all)
	case framePush, frameContinuation:
		return errors.New("a frame that has no place here")
	}
	return nil
}

func (h *h2) serverSettings(f *frame) error {
	out, err := rewriteSettings(f, uint32(h.p.s.opts.Streams), func(id uint16, v uint32) {
		if id == settingTable {
			h.serverTable.Store(int64(v))
		}
	})
	if err != nil {
		return err
	}
	if !f.has(flagAck) {
		out = appendFrame(nil, frameSettings, 0, 0, out...)
	}
	err = h.toClient.write(out)
	h.mu.Lock()
	h.open = true
	h.changed.Broadcast()
	h.mu.Unlock()
	return err
}

// serverData forwards data when the client has room for it: it may have less
// than the server knows, by this proxy's own answers.
func (h *h2) serverData(f *frame) error {
	n := int64(len(f.payload))
	h.mu.Lock()
	if h.window < n && !h.ended {
		h.mu.Unlock()
		// What the client waits for must not lie here meanwhile.
		if err := h.toClient.flush(); err != nil {
			return err
		}
		h.mu.Lock()
	}
	for h.window < n && !h.ended {
		h.changed.Wait()
	}
	h.window -= n
	h.mu.Unlock()
	if err := h.toClient.write(f.all); err != nil {
		return err
	}
	if f.has(flagEndStream) {
		return h.serverDone(f.stream)
	}
	return nil
}

// serverDone notes the end of an answer.
func (h *h2) serverDone(id uint32) error {
	h.mu.Lock()
	over := false
	if s := h.streams[id]; s != nil {
		s.serverDone = true
		over = h.closed(id, s)
	}
	h.mu.Unlock()
	if over {
		if err := h.toClient.flush(); err != nil {
			return err
		}
		h.p.finish()
	}
	return nil
}

func (h *h2) serverHeaders(f *frame, answerFields *hpack.Decoder) error {
	id, end := f.stream, f.has(flagEndStream)
	var raw []byte
	block, err := h.readBlock(h.p.out, f, &raw)
	if err != nil {
		return err
	}
	status := 0
	answerFields.SetEmitFunc(func(x hpack.HeaderField) {
		if x.Name == ":status" {
			status, _ = strconv.Atoi(x.Value) // 0 is no final answer
		}
	})
	if _, err := answerFields.Write(block); err != nil {
		return err
	}
	if err := answerFields.Close(); err != nil {
		return err
	}
	var rec *Record
	h.mu.Lock()
	if s := h.streams[id]; s != nil && status >= 200 && s.rec != nil {
		rec, s.rec = s.rec, nil
		rec.HTTP.Latency = time.Since(s.begin)
	}
	h.mu.Unlock()
	if rec != nil {
		rec.HTTP.Status = status
		h.p.s.recorder.Record(rec)
	}
	if err := h.toClient.write(raw); err != nil {
		return err
	}
	if end {
		return h.serverDone(id)
	}
	return nil
}
