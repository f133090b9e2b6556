package proxy

import (
	"encoding/binary"
	"strings"
)

// maxHello bounds what is read of a TLS client before its hello is whole:
// bytes, with the heads of records. Records hold at least one byte each.
const maxHello = 64 << 10

// errMore: the hello is not whole yet.
const errMore = malformed("a TLS hello that is cut off")

// hello reads a TLS client's hello, which may be spread over records, out of
// bytes that come bit by bit: every byte is looked at once.
type hello struct {
	used    int    // bytes of whole records that were read
	message []byte // what they hold
}

// read reads the name that the client asks for: in lower case, "" if it names
// none. data are all bytes since the first.
func (h *hello) read(data []byte) (name string, err error) {
	for {
		b := data[h.used:]
		if len(b) > 0 && b[0] != 22 || len(b) > 1 && b[1] != 3 {
			return "", malformed("not TLS")
		}
		if len(b) < 5 {
			return "", errMore
		}
		n := int(binary.BigEndian.Uint16(b[3:]))
		if n == 0 || n > 1<<14 {
			return "", malformed("a TLS record that is empty or too long")
		}
		if len(b) < 5+n {
			return "", errMore
		}
		h.used += 5 + n
		h.message = append(h.message, b[5:5+n]...)
		if h.message[0] != 1 {
			return "", malformed("TLS that does not begin with a hello")
		}
		if len(h.message) < 4 {
			continue
		}
		length := int(h.message[1])<<16 | int(h.message[2])<<8 | int(h.message[3])
		if length > maxHello {
			return "", malformed("a TLS hello that is too long")
		}
		if len(h.message) >= 4+length {
			return helloName(h.message[4 : 4+length])
		}
	}
}

const badHello = malformed("a TLS hello that contradicts itself")

// helloName reads the body of a ClientHello (RFC 8446, 4.1.2).
func helloName(b []byte) (string, error) {
	s := cursor{b: b}
	s.skip(2 + 32) // version, random
	s.vector(1)    // session
	s.vector(2)    // ciphers
	s.vector(1)    // compressions
	if s.bad {
		return "", badHello
	}
	if len(s.b) == 0 {
		return "", nil // no extensions
	}
	e := cursor{b: s.vector(2)}
	if s.bad || len(s.b) != 0 {
		return "", badHello
	}
	name, seen := "", false
	for len(e.b) > 0 {
		kind, body := e.uint16(), e.vector(2)
		if e.bad {
			return "", badHello
		}
		if kind != 0 {
			continue
		}
		if seen {
			return "", malformed("a TLS hello with several server names")
		}
		var err error
		if name, err = nameOf(body); err != nil {
			return "", err
		}
		seen = true
	}
	return name, nil
}

// nameOf reads the extension server_name (RFC 6066): a list, in which one name
// of a host may stand.
func nameOf(body []byte) (string, error) {
	s := cursor{b: body}
	list := cursor{b: s.vector(2)}
	kind := list.skip(1)
	name := string(list.vector(2))
	switch {
	case s.bad || list.bad || len(s.b) != 0:
		return "", badHello
	case len(list.b) != 0:
		return "", malformed("a TLS hello with several server names")
	case len(kind) != 1 || kind[0] != 0:
		return "", malformed("a TLS hello whose server name is none")
	}
	name = strings.ToLower(name)
	if len(name) > 255 || checkHost(name) != nil || strings.ContainsAny(name, ":[]") || strings.HasSuffix(name, ".") {
		return "", malformed("a TLS hello whose server name is none")
	}
	return name, nil
}

// cursor reads from the front of b. After the first thing that is not there it
// is bad, and reads nothing.
type cursor struct {
	b   []byte
	bad bool
}

func (s *cursor) skip(n int) []byte {
	if s.bad || len(s.b) < n {
		s.bad, s.b = true, nil
		return nil
	}
	x := s.b[:n]
	s.b = s.b[n:]
	return x
}

func (s *cursor) uint16() uint16 {
	if x := s.skip(2); x != nil {
		return binary.BigEndian.Uint16(x)
	}
	return 0
}

// vector reads bytes behind a length of one or two bytes.
func (s *cursor) vector(size int) []byte {
	n := 0
	for _, c := range s.skip(size) {
		n = n<<8 | int(c)
	}
	return s.skip(n)
}
