package proxy

import (
	"bytes"
	"strings"

	"golang.org/x/net/http2/hpack"

	"portcullis/authz/l7"
)

// fields takes what a decoder emits, within bounds.
type fields struct {
	list  []hpack.HeaderField
	bytes int
	over  bool // more than the bounds; the list is not whole
}

func (h *h2) collect(f *fields) func(hpack.HeaderField) {
	return func(x hpack.HeaderField) {
		f.bytes += len(x.Name) + len(x.Value) + 32
		if f.bytes > h.p.s.opts.HeaderBytes || len(f.list) >= h.p.s.opts.Fields {
			f.over = true
			return
		}
		f.list = append(f.list, x)
	}
}

// h2Request reads the fields of a request (RFC 9113, 8.3).
func h2Request(list []hpack.HeaderField, end bool) (r l7.Request, length int64, err error) {
	pseudo := map[string]string{}
	length = -1
	var x framing
	for i, f := range list {
		if f.IsPseudo() {
			if i > len(pseudo) {
				return r, 0, malformed("a pseudo-header behind others")
			}
			if _, twice := pseudo[f.Name]; twice {
				return r, 0, malformed("a pseudo-header twice")
			}
			pseudo[f.Name] = f.Value
			continue
		}
		if err := h2Field(f, &x); err != nil {
			return r, 0, err
		}
		if f.Name == "host" {
			if x.hosts++; x.hosts > 1 {
				return r, 0, malformed("several Host lines")
			}
			r.Host = f.Value
		}
		r.Fields = append(r.Fields, l7.Field{Name: f.Name, Value: f.Value})
	}
	if x.lengths > 0 {
		length = x.length
	}
	if end && length > 0 {
		return r, 0, malformed("a Content-Length without its content")
	}
	return r, length, h2Pseudo(pseudo, x.hosts > 0, &r)
}

func h2Pseudo(pseudo map[string]string, hosted bool, r *l7.Request) error {
	for name := range pseudo {
		switch name {
		case ":method", ":scheme", ":path", ":authority":
		default:
			return malformed("an unknown pseudo-header")
		}
	}
	r.Method, r.Target = pseudo[":method"], pseudo[":path"]
	if !token(r.Method) || len(r.Method) > 64 {
		return malformed("not a method")
	}
	if s := pseudo[":scheme"]; s != "http" && s != "https" {
		return malformed("a :scheme that is not http")
	}
	if err := checkTarget(r.Method, r.Target); err != nil {
		return err
	}
	if a, there := pseudo[":authority"]; there {
		if hosted && r.Host != a {
			return malformed("an :authority that is not the Host")
		}
		r.Host = a
	}
	return checkHost(r.Host)
}

// h2Field checks one field that is no pseudo-header.
func h2Field(f hpack.HeaderField, x *framing) error {
	if !token(f.Name) || strings.ToLower(f.Name) != f.Name {
		return malformed("a name in the header that is none, or not in lower case")
	}
	if !fieldValue(f.Value) || strings.Trim(f.Value, " \t") != f.Value {
		return malformed("a value in the header with control characters, or spaces around it")
	}
	switch f.Name {
	case "connection", "keep-alive", "proxy-connection", "transfer-encoding", "upgrade", "http2-settings":
		return malformed("a header of the connection")
	case "te":
		if f.Value != "trailers" {
			return malformed("a TE that is not trailers")
		}
	case "content-length":
		return x.contentLength(f.Value)
	}
	return nil
}

// encode writes the header of an allowed request for the server.
func (h *h2) encode(stream uint32, end bool, list []hpack.HeaderField, changes []l7.Change) []byte {
	if v := h.serverTable.Swap(-1); v >= 0 {
		h.enc.SetMaxDynamicTableSizeLimit(uint32(v))
	}
	h.block.Reset()
	put := func(f hpack.HeaderField) { h.enc.WriteField(f) } // into memory: cannot fail
	for _, f := range list {
		removed := false
		for _, c := range changes {
			removed = removed || c.Remove && strings.EqualFold(c.Name, f.Name)
		}
		if !removed {
			put(f)
		}
	}
	for _, c := range changes {
		if c.Add {
			put(hpack.HeaderField{Name: strings.ToLower(c.Name), Value: c.Value})
		}
	}
	return headerFrames(stream, end, &h.block)
}

// headerFrames splits a compressed header into frames.
func headerFrames(stream uint32, end bool, block *bytes.Buffer) (out []byte) {
	kind, flags := byte(frameHeaders), byte(0)
	if end {
		flags = flagEndStream
	}
	for {
		part := block.Next(maxFrame)
		if block.Len() == 0 {
			return appendFrame(out, kind, flags|flagEndHeaders, stream, part...)
		}
		out = appendFrame(out, kind, flags, stream, part...)
		kind, flags = frameContinuation, 0
	}
}

// literals compresses fields without the tables, so that an answer of this
// proxy changes nothing between client and server. All are shorter than 127.
func literals(fields ...string) (out []byte) {
	for i := 0; i < len(fields); i += 2 {
		out = append(append(out, 0, byte(len(fields[i]))), fields[i]...)
		out = append(append(out, byte(len(fields[i+1]))), fields[i+1]...)
	}
	return out
}
