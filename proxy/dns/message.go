package dns

import (
	"encoding/binary"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"time"

	"github.com/miekg/dns"
)

const (
	headerLen = 12
	maxUDP    = 65535 // bytes of what may come in a datagram
	// maxAnswer bounds what goes to a client in one, whatever it could take: the
	// datapath lets no fragments of this proxy's by, and packets of this size need
	// none anywhere (bytes; the least MTU of IPv6 without the heads).
	maxAnswer = 1232
	// maxAddresses bounds what one answer may say.
	maxAddresses = 1024
	// maxChain bounds the aliases that an answer is followed through.
	maxChain = 16
)

// The bits of a header's third and fourth byte.
const (
	bitQR     = 0x80
	bitTC     = 0x02
	maskOp    = 0x78
	bitRD     = 0x01
	bitRA     = 0x80 // of the fourth
	maskRcode = 0x0f
)

// errSilent is of a message that gets no answer: it is no query.
var errSilent = errors.New("not a query")

// badQuery is of a query that is answered with a code, and not relayed.
type badQuery struct {
	rcode int
	why   string
}

func (e badQuery) Error() string { return e.why }

// query is a message that is relayed as it is.
type query struct {
	bytes    []byte // the message
	id       uint16
	name     string // lower case, with a final dot; other bytes than those of names as \DDD
	qtype    uint16
	class    uint16
	question []byte // as it was sent
	edns     bool
	do       bool
}

// parseQuery reads a query strictly: what is judged here is what any server
// reads. The name is in the question itself, without pointers, and nothing but
// EDNS and TSIG comes with it. On a badQuery, what was read of it is returned.
func parseQuery(b []byte) (q query, err error) {
	if len(b) < headerLen || b[2]&bitQR != 0 {
		return q, errSilent
	}
	q.bytes, q.id = b, binary.BigEndian.Uint16(b)
	count := func(i int) int { return int(binary.BigEndian.Uint16(b[4+2*i:])) }
	switch {
	case b[2]&maskOp != 0:
		return q, badQuery{dns.RcodeNotImplemented, "it is not a plain query"}
	case count(0) > 1:
		return q, badQuery{dns.RcodeRefused, "it has more than one question"}
	case count(0) == 0 || count(1) != 0 || count(2) != 0:
		return q, badQuery{dns.RcodeFormatError, "it has no question, or answers"}
	}
	at, err := q.readQuestion()
	if err != nil {
		return q, err
	}
	if q.qtype == dns.TypeAXFR || q.qtype == dns.TypeIXFR {
		return q, badQuery{dns.RcodeRefused, "it asks for a zone"}
	}
	for range count(3) {
		if at, err = q.readExtra(at); err != nil {
			return q, err
		}
	}
	if at != len(b) {
		return q, badQuery{dns.RcodeFormatError, "something comes behind it"}
	}
	return q, nil
}

func (q *query) readQuestion() (at int, err error) {
	b := q.bytes
	short := badQuery{dns.RcodeFormatError, "its question cannot be read"}
	var name strings.Builder
	at = headerLen
	for {
		if at >= len(b) {
			return at, short
		}
		n := int(b[at])
		at++
		if n == 0 {
			break
		}
		// At most 255 bytes, with the final 0; a pointer has the two high bits.
		if n > 63 || at+n > len(b) || at+n-headerLen > 254 {
			return at, short
		}
		for _, c := range b[at : at+n] {
			switch {
			case 'A' <= c && c <= 'Z':
				name.WriteByte(c + 'a' - 'A')
			case 'a' <= c && c <= 'z', '0' <= c && c <= '9', c == '-', c == '_':
				name.WriteByte(c)
			default:
				fmt.Fprintf(&name, `\%03d`, c)
			}
		}
		name.WriteByte('.')
		at += n
	}
	if at+4 > len(b) {
		return at, short
	}
	if q.name = name.String(); q.name == "" {
		q.name = "."
	}
	q.qtype, q.class = binary.BigEndian.Uint16(b[at:]), binary.BigEndian.Uint16(b[at+2:])
	at += 4
	q.question = b[headerLen:at]
	return at, nil
}

// readExtra reads a record behind the question: EDNS or TSIG.
func (q *query) readExtra(at int) (int, error) {
	b := q.bytes
	bad := badQuery{dns.RcodeFormatError, "something comes with the question that is neither EDNS nor TSIG"}
	owner := at
	for at < len(b) && b[at] != 0 {
		if b[at] > 63 {
			return at, bad
		}
		at += 1 + int(b[at])
	}
	if at++; at+10 > len(b) {
		return at, bad
	}
	kind, size := binary.BigEndian.Uint16(b[at:]), int(binary.BigEndian.Uint16(b[at+8:]))
	switch {
	case kind == dns.TypeOPT && !q.edns && at == owner+1:
		q.edns, q.do = true, b[at+6]&0x80 != 0
	case kind == dns.TypeTSIG && at+10+size == len(b): // the last one
	default:
		return at, bad
	}
	if at += 10 + size; at > len(b) {
		return at, bad
	}
	return at, nil
}

// reply returns an answer of our own to a query.
func (q *query) reply(rcode int) []byte {
	out := make([]byte, headerLen, headerLen+len(q.question)+11)
	binary.BigEndian.PutUint16(out, q.id)
	out[2] = bitQR | q.bytes[2]&(maskOp|bitRD)
	out[3] = bitRA | byte(rcode)&maskRcode
	if q.question != nil {
		out[5] = 1
		out = append(out, q.question...)
	}
	if q.edns {
		out[11] = 1
		opt := [11]byte{2: byte(dns.TypeOPT), 3: 1232 >> 8, 4: 1232 & 0xff}
		if q.do {
			opt[7] = 0x80
		}
		out = append(out, opt[:]...)
	}
	return out
}

// truncated returns what tells the client to ask again by TCP, for the answer is
// too long for a packet.
func (q *query) truncated(answer []byte) []byte {
	b := q.reply(int(answer[3] & maskRcode))
	b[2], b[3] = answer[2]|bitTC, answer[3]
	return b
}

// answers reports whether a message answers the query: it says so, and has its
// question. That the id fits and who sent it, others have seen to.
func (q *query) answers(b []byte) bool {
	if len(b) < headerLen || b[2]&bitQR == 0 || b[2]&maskOp != 0 {
		return false
	}
	switch binary.BigEndian.Uint16(b[4:]) {
	case 0: // of a server that did not understand the query
		return b[3]&maskRcode != 0 && len(b) == headerLen
	case 1:
		end := headerLen + len(q.question)
		if len(b) < end {
			return false
		}
		name := len(q.question) - 4
		return slices.EqualFunc(b[headerLen:headerLen+name], q.question[:name], equalFold) && slices.Equal(b[headerLen+name:end], q.question[name:])
	}
	return false
}

// equalFold compares bytes of names. Lengths of labels, below 64, are no letters.
func equalFold(a, b byte) bool {
	lower := func(c byte) byte {
		if 'A' <= c && c <= 'Z' {
			return c + 'a' - 'A'
		}
		return c
	}
	return a == b || lower(a) == lower(b) && a >= 'A' && b >= 'A'
}

// learn returns what an answer to the query says of addresses: those of the name
// that was asked for, through aliases that begin there. What the server says of
// other names beside that is not learnt, for it may not be its to say. On an
// error the client must not see the answer.
func (q *query) learn(b []byte) (out []Address, err error) {
	var m dns.Msg
	if err := m.Unpack(b); err != nil {
		return nil, fmt.Errorf("it cannot be read: %w", err)
	}
	if m.Rcode != dns.RcodeSuccess || q.class != dns.ClassINET || len(m.Question) != 1 {
		return nil, nil
	}
	name, ttl := dns.CanonicalName(m.Question[0].Name), uint32(1<<31-1)
	for range maxChain {
		i := slices.IndexFunc(m.Answer, func(r dns.RR) bool {
			_, alias := r.(*dns.CNAME)
			return alias && r.Header().Class == dns.ClassINET && dns.CanonicalName(r.Header().Name) == name
		})
		if i < 0 {
			break
		}
		name, ttl = dns.CanonicalName(m.Answer[i].(*dns.CNAME).Target), min(ttl, m.Answer[i].Header().Ttl)
	}
	for _, r := range m.Answer {
		if h := r.Header(); h.Class != dns.ClassINET || dns.CanonicalName(h.Name) != name {
			continue
		}
		var ip netip.Addr
		switch r := r.(type) {
		case *dns.A:
			ip, _ = netip.AddrFromSlice(r.A.To4())
		case *dns.AAAA:
			// An IPv4 address in IPv6's clothes is not one that goes over the wire.
			if ip, _ = netip.AddrFromSlice(r.AAAA.To16()); ip.Is4In6() {
				continue
			}
		}
		if !ip.IsValid() || slices.ContainsFunc(out, func(a Address) bool { return a.IP == ip }) {
			continue
		}
		if len(out) == maxAddresses {
			return nil, fmt.Errorf("it has more than %d addresses", maxAddresses)
		}
		out = append(out, Address{IP: ip, TTL: time.Duration(min(ttl, r.Header().Ttl)) * time.Second})
	}
	return out, nil
}
