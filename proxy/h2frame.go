package proxy

import (
	"bufio"
	"encoding/binary"
	"errors"
	"fmt"
	"net"
	"sync"
	"time"
)

// What an HTTP/2 client with prior knowledge sends first.
const preface = "PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"

// Frames, flags, settings and errors of RFC 9113.
const (
	frameData         = 0
	frameHeaders      = 1
	framePriority     = 2
	frameRST          = 3
	frameSettings     = 4
	framePush         = 5
	framePing         = 6
	frameGoAway       = 7
	frameWindow       = 8
	frameContinuation = 9

	flagEndStream  = 0x1 // of data and headers
	flagAck        = 0x1 // of settings and pings
	flagEndHeaders = 0x4
	flagPadded     = 0x8
	flagPriority   = 0x20

	settingTable     = 1
	settingPush      = 2
	settingStreams   = 3
	settingWindow    = 4
	settingFrame     = 5
	settingHeaders   = 6
	maxTable         = 64 << 10
	maxFrame         = 16 << 10 // both sides are told so; every side must take it
	maxContinuations = 32       // frames of one header

	codeNone      = 0
	codeProtocol  = 1
	codeFlow      = 3
	codeFrameSize = 6
	codeRefused   = 7
	codeHPACK     = 9
	codeCalm      = 11
)

// frame is one frame; all is the whole of it, with its head, and is valid until
// the next is read.
type frame struct {
	kind, flags byte
	stream      uint32
	payload     []byte
	all         []byte
}

func (f *frame) has(flag byte) bool { return f.flags&flag != 0 }

// content returns a frame of data or headers without padding and priority.
func (f *frame) content() (b []byte, ok bool) {
	b = f.payload
	if f.has(flagPadded) {
		if len(b) == 0 || int(b[0]) >= len(b) {
			return nil, false
		}
		b = b[1 : len(b)-int(b[0])]
	}
	if f.kind == frameHeaders && f.has(flagPriority) {
		if len(b) < 5 {
			return nil, false
		}
		b = b[5:]
	}
	return b, true
}

func appendFrame(b []byte, kind, flags byte, stream uint32, payload ...byte) []byte {
	n := len(payload)
	b = append(b, byte(n>>16), byte(n>>8), byte(n), kind, flags)
	b = binary.BigEndian.AppendUint32(b, stream)
	return append(b, payload...)
}

func word(v uint32) []byte { return binary.BigEndian.AppendUint32(nil, v) }

// h2Error ends the connection: the side that is to blame gets a GOAWAY.
type h2Error struct {
	code   uint32
	reason string
}

func (e *h2Error) Error() string { return e.reason }

func h2Errorf(code uint32, format string, args ...any) error {
	return &h2Error{code, fmt.Sprintf(format, args...)}
}

// frameWriter writes frames to one side. Both goroutines of a pair do; what one
// call writes stays together.
type frameWriter struct {
	side error // that a failure is told as
	mu   sync.Mutex
	w    *bufio.Writer // guarded by mu
}

var (
	errClientSide = errors.New("write to the client")
	errServerSide = errors.New("write to the server")
)

func newFrameWriter(c net.Conn, side error) *frameWriter {
	return &frameWriter{side: side, w: bufio.NewWriterSize(c, 4<<10)}
}

func (w *frameWriter) failed(err error) error {
	if err == nil {
		return nil
	}
	return fmt.Errorf("%w: %w", w.side, err)
}

// own writes what this proxy says by itself to the client, which the
// server's first SETTINGS must have reached.
func (h *h2) own(b []byte) error {
	h.mu.Lock()
	if !h.open && !h.ended {
		h.mu.Unlock()
		if err := h.toServer.flush(); err != nil {
			return err
		}
		h.mu.Lock()
	}
	for !h.open && !h.ended {
		h.changed.Wait()
	}
	h.mu.Unlock()
	return h.toClient.write(b)
}

func (w *frameWriter) write(b []byte) error {
	w.mu.Lock()
	defer w.mu.Unlock()
	_, err := w.w.Write(b)
	return w.failed(err)
}

func (w *frameWriter) flush() error {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.failed(w.w.Flush())
}

// readFrame reads the next frame. The one before is read away by it.
func (h *h2) readFrame(x *reader, f *frame) error {
	x.skip(len(f.all))
	*f = frame{}
	for timed := false; ; {
		b := x.data()
		if len(b) >= 9 {
			n := int(b[0])<<16 | int(b[1])<<8 | int(b[2])
			if n > maxFrame {
				return h2Errorf(codeFrameSize, "a frame that is too long")
			}
			if len(b) >= 9+n {
				if timed {
					x.conn.SetReadDeadline(time.Time{})
				}
				*f = frame{b[3], b[4], binary.BigEndian.Uint32(b[5:]) &^ (1 << 31), b[9 : 9+n], b[:9+n]}
				return nil
			}
		}
		if len(b) > 0 && !timed {
			timed = true
			x.conn.SetReadDeadline(time.Now().Add(h.p.s.opts.HeaderTimeout)) // an error comes with the next read
		}
		if err := x.fill(2 * largeBuffer); err != nil {
			return err
		}
		h.p.touch()
	}
}

// buffered reports whether another frame is held whole.
func buffered(x *reader, f *frame) bool {
	b := x.data()[len(f.all):]
	return len(b) >= 9 && len(b) >= 9+int(b[0])<<16|int(b[1])<<8|int(b[2])
}

// readBlock reads what belongs to a header that begins with f: it appends the
// compressed fields to block and, if raw is wanted, the frames as they are.
func (h *h2) readBlock(x *reader, f *frame, raw *[]byte) (block []byte, err error) {
	b, ok := f.content()
	if !ok {
		return nil, h2Errorf(codeProtocol, "padding that is longer than its frame")
	}
	stream := f.stream
	if !f.has(flagEndHeaders) {
		x.conn.SetReadDeadline(time.Now().Add(h.p.s.opts.HeaderTimeout)) // an error comes with the next read
		defer x.conn.SetReadDeadline(time.Time{})
	}
	for n := 0; ; n++ {
		if block = append(block, b...); raw != nil {
			*raw = append(*raw, f.all...)
		}
		if f.has(flagEndHeaders) {
			return block, nil
		}
		if n >= maxContinuations || len(block) > h.p.s.opts.HeaderBytes {
			return nil, h2Errorf(codeCalm, "a header in too many pieces")
		}
		if err := h.readFrame(x, f); err != nil {
			return nil, err
		}
		if f.kind != frameContinuation || f.stream != stream {
			return nil, h2Errorf(codeProtocol, "a header that is interrupted")
		}
		b = f.payload
	}
}

// settings rewrites a SETTINGS frame: what this proxy cannot follow is bounded
// or left out. see gets every setting as it goes on.
func rewriteSettings(f *frame, streams uint32, see func(id uint16, v uint32)) ([]byte, error) {
	if f.stream != 0 || len(f.payload)%6 != 0 || f.has(flagAck) && len(f.payload) > 0 {
		return nil, h2Errorf(codeProtocol, "improper SETTINGS")
	}
	if f.has(flagAck) {
		return f.all, nil
	}
	var out []byte
	for b := f.payload; len(b) > 0; b = b[6:] {
		id, v := binary.BigEndian.Uint16(b), binary.BigEndian.Uint32(b[2:])
		switch id {
		case settingTable:
			v = min(v, maxTable)
		case settingStreams:
			v = min(v, streams)
		case settingWindow:
			if v > 1<<31-1 {
				return nil, h2Errorf(codeFlow, "a window that is too large")
			}
		case settingFrame:
			if v < maxFrame || v > 1<<24-1 {
				return nil, h2Errorf(codeProtocol, "improper SETTINGS")
			}
			v = maxFrame
		case settingHeaders:
		default:
			continue // pushes, extended CONNECT, and what nobody knows
		}
		see(id, v)
		out = binary.BigEndian.AppendUint32(binary.BigEndian.AppendUint16(out, id), v)
	}
	return out, nil
}
