package proxy

import "strings"

type bodyKind uint8

const (
	bodyNone bodyKind = iota
	bodyLength
	bodyChunked
	bodyUntilClose
)

// body finds the end of a message's body in what arrives.
type body struct {
	kind    bodyKind
	left    int64 // bodyLength: bytes to come; bodyChunked: of the chunk
	lenient bool  // chunk extensions pass

	state   chunkState
	digits  int
	line    []byte // of the trailer, as far as it is there
	trailer int    // bytes of the trailer so far
	// refuse says what is wrong with a line of the trailer; nil takes all.
	refuse func(name string) error
}

// size -> [extension ->] sizeLF -> data -> dataCR -> dataLF -> size ...
//
//	sizeLF -> trailer -> done    (size 0)
type chunkState uint8

const (
	chunkSize chunkState = iota
	chunkExtension
	chunkSizeLF
	chunkData
	chunkDataCR
	chunkDataLF
	chunkTrailer
	chunkDone
)

const (
	maxTrailer   = 16 << 10 // bytes
	maxExtension = 256      // bytes, with the size
)

// take returns how many bytes of b belong to the body, and whether it ends
// with them.
func (x *body) take(b []byte) (n int, done bool, err error) {
	switch x.kind {
	case bodyNone:
		return 0, true, nil
	case bodyUntilClose:
		return len(b), false, nil
	case bodyLength:
		n = int(min(x.left, int64(len(b))))
		x.left -= int64(n)
		return n, x.left == 0, nil
	}
	for n < len(b) && x.state != chunkDone {
		if x.state == chunkData {
			k := min(x.left, int64(len(b)-n))
			n += int(k)
			if x.left -= k; x.left == 0 {
				x.state = chunkDataCR
			}
			continue
		}
		if err := x.chunkByte(b[n]); err != nil {
			return n, false, err
		}
		n++
	}
	return n, x.state == chunkDone, nil
}

func (x *body) chunkByte(c byte) error {
	switch x.state {
	case chunkSize:
		switch {
		case isHex(c) && x.digits < 15:
			x.left = x.left<<4 | int64(unhex(c))
			x.digits++
		case c == '\r' && x.digits > 0:
			x.state = chunkSizeLF
		case c == ';' && x.digits > 0 && x.lenient:
			x.state = chunkExtension
		default:
			return malformed("a chunk without a proper size")
		}
	case chunkExtension:
		if x.digits++; c == '\r' {
			x.state = chunkSizeLF
		} else if !valueByte[c] || x.digits > maxExtension {
			return malformed("a chunk with an improper extension")
		}
	case chunkSizeLF:
		if c != '\n' {
			return malformed("a chunk's size that does not end with CR LF")
		}
		x.digits = 0
		if x.state = chunkData; x.left == 0 {
			x.state = chunkTrailer
		}
	case chunkDataCR:
		if c != '\r' {
			return malformed("a chunk that is longer than its size")
		}
		x.state = chunkDataLF
	case chunkDataLF:
		if c != '\n' {
			return malformed("a chunk that does not end with CR LF")
		}
		x.state = chunkSize
	case chunkTrailer:
		return x.trailerByte(c)
	}
	return nil
}

func (x *body) trailerByte(c byte) error {
	if x.trailer++; x.trailer > maxTrailer {
		return malformed("a trailer that is too long")
	}
	if c != '\n' {
		x.line = append(x.line, c)
		return nil
	}
	line, ok := strings.CutSuffix(string(x.line), "\r")
	if x.line = x.line[:0]; !ok {
		return malformed("a line of the trailer that does not end with CR LF")
	}
	if line == "" {
		x.state = chunkDone
		return nil
	}
	f, err := parseField(line)
	if err != nil || x.refuse == nil {
		return err
	}
	return x.refuse(f.Name)
}

// refuseTrailer refuses names that must stand in a request's header: what
// frames and routes it, and what a server might let the rules' headers be
// replaced by.
func refuseTrailer(judged func(name string) bool) func(string) error {
	return func(name string) error {
		switch strings.ToLower(name) {
		case "content-length", "transfer-encoding", "host", "connection", "upgrade", "te", "trailer", "expect", "keep-alive",
			"authorization", "cookie", "content-encoding", "content-type", "content-range", "proxy-connection", "max-forwards", "cache-control":
			return malformed("a trailer that must stand in the header: " + strings.ToLower(name))
		}
		if judged != nil && judged(name) {
			return malformed("a trailer that rules look for in the header")
		}
		return nil
	}
}
