package proxy

import (
	"bytes"
	"errors"
	"io"
	"net"
	"strings"
	"testing"
	"time"

	"golang.org/x/net/http2"
	"golang.org/x/net/http2/hpack"
)

// memory is a connection whose other side has sent everything already.
type memory struct {
	net.Conn
	in  *bytes.Reader
	out bytes.Buffer
}

func (m *memory) Read(b []byte) (int, error)      { return m.in.Read(b) }
func (m *memory) Write(b []byte) (int, error)     { return m.out.Write(b) }
func (m *memory) SetReadDeadline(time.Time) error { return nil }
func (m *memory) Close() error                    { return nil }

// FuzzHTTP2 feeds frames of a client, and holds what the server gets against
// x/net's reading of it: proper frames, and no request that the rules refuse.
func FuzzHTTP2(f *testing.F) {
	record := func(do func(*http2.Framer, func(...string) []byte)) {
		var out bytes.Buffer
		w := &h2wire{}
		w.enc = hpack.NewEncoder(&w.buf)
		fr := http2.NewFramer(&out, nil)
		fr.AllowIllegalWrites = true
		fr.WriteSettings(http2.Setting{ID: http2.SettingInitialWindowSize, Val: 1 << 20})
		do(fr, w.block)
		f.Add(out.Bytes())
	}
	headers := func(fr *http2.Framer, id uint32, end bool, block []byte) {
		fr.WriteHeaders(http2.HeadersFrameParam{StreamID: id, EndStream: end, EndHeaders: true, BlockFragment: block})
	}
	record(func(fr *http2.Framer, block func(...string) []byte) {
		headers(fr, 1, true, block(public()...))
		headers(fr, 3, false, block(":method: POST", ":scheme: http", ":path: /v1/request-landing", ":authority: a", "content-length: 2"))
		fr.WriteDataPadded(3, true, []byte("hi"), []byte{0, 0})
		headers(fr, 5, true, block(":method: PUT", ":scheme: http", ":path: /v1/exhaust-port", ":authority: a", "x: y"))
		headers(fr, 7, true, block(public("x: y")...))
	})
	record(func(fr *http2.Framer, block func(...string) []byte) {
		b := block(public("x: y")...)
		fr.WriteHeaders(http2.HeadersFrameParam{StreamID: 1, BlockFragment: b[:3], Priority: http2.PriorityParam{StreamDep: 5}, PadLength: 3})
		fr.WriteContinuation(1, true, b[3:])
		headers(fr, 1, true, block("x-t: 1"))
		fr.WritePing(false, [8]byte{1})
		fr.WriteWindowUpdate(0, 5)
		fr.WriteWindowUpdate(1, 5)
		fr.WriteRSTStream(1, http2.ErrCodeCancel)
		fr.WriteGoAway(0, http2.ErrCodeNo, nil)
	})
	f.Fuzz(func(t *testing.T, data []byte) {
		r := &rig{t: t, records: make(chan *Record, 4)}
		r.allow(trickRules)
		client, server := &memory{in: bytes.NewReader(append([]byte(preface), data...))}, &memory{in: bytes.NewReader(nil)}
		p := &pair{s: New(r, nil, r, Options{}), client: client, server: server}
		p.init()
		p.in, p.out = newReader(client), newReader(server)
		if p.begin() == nil {
			t.Fatal("no HTTP/2")
		}
		p.h2.open = true
		p.h2.requests()
		p.in.release()
		if p.h2.toServer.flush() != nil {
			t.Fatal("memory cannot fail")
		}
		b, ok := strings.CutPrefix(server.out.String(), preface)
		if !ok && server.out.Len() > 0 {
			t.Fatal("no preface")
		}
		theirs := http2.NewFramer(io.Discard, strings.NewReader(b))
		theirs.ReadMetaHeaders = hpack.NewDecoder(4096, nil)
		trailers := map[uint32]bool{}
		for {
			fr, err := theirs.ReadFrame()
			if errors.Is(err, io.EOF) {
				return
			}
			if err != nil {
				t.Fatalf("x/net refuses what goes on: %v", err)
			}
			m, ok := fr.(*http2.MetaHeadersFrame)
			if !ok {
				continue
			}
			if trailers[m.StreamID] {
				continue
			}
			trailers[m.StreamID] = true
			method, path := m.PseudoValue("method"), m.PseudoValue("path")
			if !(method == "GET" && strings.HasPrefix(path, "/public/")) && !(method == "POST" && path == "/v1/request-landing") {
				t.Fatalf("%s %s went on", method, path)
			}
		}
	})
}
