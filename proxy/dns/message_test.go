package dns

import (
	"bytes"
	"encoding/binary"
	"errors"
	"net/netip"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/miekg/dns"
)

func packed(t testing.TB, m *dns.Msg) []byte {
	t.Helper()
	b, err := m.Pack()
	if err != nil {
		t.Fatal(err)
	}
	return b
}

func ask(name string, qtype uint16) *dns.Msg { return new(dns.Msg).SetQuestion(name, qtype) }

func TestParseQuery(t *testing.T) {
	plain := packed(t, ask("WWW.Example.com.", dns.TypeA))
	with := func(change func(b []byte) []byte) []byte { return change(bytes.Clone(plain)) }
	count := func(at int) []byte { return with(func(b []byte) []byte { b[at]++; return b }) }
	opt := ask("a.", dns.TypeA).SetEdns0(4096, true)
	signed := ask("a.", dns.TypeA)
	signed.SetTsig("k.", dns.HmacSHA256, 300, 1)
	both := ask("a.", dns.TypeA)
	both.Question = append(both.Question, both.Question[0])
	extra := ask("a.", dns.TypeA)
	extra.Extra = append(extra.Extra, &dns.TXT{Hdr: dns.RR_Header{Name: "a.", Rrtype: dns.TypeTXT, Class: 1}, Txt: []string{"smuggled"}})
	two := opt.Copy()
	two.Extra = append(two.Extra, two.Extra[0])
	update := new(dns.Msg).SetUpdate("a.")

	for name, c := range map[string]struct {
		b     []byte
		rcode int // -1: none is due; -2: relayed
		asks  string
	}{
		"plain":             {plain, -2, "www.example.com."},
		"edns":              {packed(t, opt), -2, "a."},
		"root":              {packed(t, ask(".", dns.TypeNS)), -2, "."},
		"dot in a label":    {packed(t, ask(`a\.b.c.`, dns.TypeA)), -2, `a\046b.c.`},
		"zero in a label":   {packed(t, ask(`a\000b.c.`, dns.TypeA)), -2, `a\000b.c.`},
		"longest":           {packed(t, ask(strings.Repeat("a.", 127), dns.TypeA)), -2, strings.Repeat("a.", 127)},
		"nothing":           {nil, -1, ""},
		"short":             {plain[:11], -1, ""},
		"an answer":         {with(func(b []byte) []byte { b[2] |= bitQR; return b }), -1, ""},
		"an update":         {packed(t, update), dns.RcodeNotImplemented, ""},
		"two questions":     {packed(t, both), dns.RcodeRefused, ""},
		"no question":       {with(func(b []byte) []byte { b[5] = 0; return b[:12] }), dns.RcodeFormatError, ""},
		"an answer in it":   {count(7), dns.RcodeFormatError, ""},
		"an authority":      {count(9), dns.RcodeFormatError, ""},
		"a record too few":  {count(11), dns.RcodeFormatError, "www.example.com."},
		"cut in the name":   {plain[:20], dns.RcodeFormatError, ""},
		"cut in the type":   {plain[:len(plain)-1], dns.RcodeFormatError, ""},
		"trailing bytes":    {append(bytes.Clone(plain), 0), dns.RcodeFormatError, "www.example.com."},
		"pointer":           {with(func(b []byte) []byte { return append(b[:12], 0xc0, 0x0c, 0, 1, 0, 1) }), dns.RcodeFormatError, ""},
		"pointer in a name": {with(func(b []byte) []byte { return append(b[:12], 1, 'a', 0xc0, 0x0c, 0, 1, 0, 1) }), dns.RcodeFormatError, ""},
		"reserved label":    {with(func(b []byte) []byte { b[12] = 0x43; return b }), dns.RcodeFormatError, ""},
		"too long": {with(func(b []byte) []byte {
			return append(append(b[:12], bytes.Repeat([]byte{1, 'a'}, 128)...), 0, 0, 1, 0, 1)
		}), dns.RcodeFormatError, ""},
		"a record with it": {packed(t, extra), dns.RcodeFormatError, "a."},
		"edns twice":       {packed(t, two), dns.RcodeFormatError, "a."},
		"a zone":           {packed(t, ask("a.", dns.TypeAXFR)), dns.RcodeRefused, "a."},
		"part of a zone":   {packed(t, ask("a.", dns.TypeIXFR)), dns.RcodeRefused, "a."},
	} {
		q, err := parseQuery(c.b)
		var bad badQuery
		switch {
		case c.rcode == -1:
			if !errors.Is(err, errSilent) {
				t.Errorf("%s: %v, want silence", name, err)
			}
			continue
		case c.rcode == -2:
			if err != nil {
				t.Errorf("%s: %v", name, err)
			}
		case !errors.As(err, &bad) || bad.rcode != c.rcode:
			t.Errorf("%s: %v, want code %d", name, err, c.rcode)
		}
		if q.name != c.asks && c.asks != "" {
			t.Errorf("%s: asks for %q, want %q", name, q.name, c.asks)
		}
		var m dns.Msg
		if err := m.Unpack(q.reply(dns.RcodeRefused)); err != nil || !m.Response || m.Rcode != dns.RcodeRefused || m.Id != binary.BigEndian.Uint16(c.b) {
			t.Errorf("%s: the reply is %v, %v", name, &m, err)
		}
		if q.edns && (m.IsEdns0() == nil || !m.IsEdns0().Do()) {
			t.Errorf("%s: the reply lacks EDNS", name)
		}
	}
	if b, _, err := dns.TsigGenerate(signed, "c2VjcmV0", "", false); err != nil {
		t.Fatal(err)
	} else if _, err := parseQuery(b); err != nil {
		t.Errorf("signed: %v", err)
	}
}

// FuzzQuery holds what is judged of a query against what another parser reads.
func FuzzQuery(f *testing.F) {
	f.Add(packed(f, ask("www.example.com.", dns.TypeA)))
	f.Add(packed(f, ask("a.b.", dns.TypeAAAA).SetEdns0(1232, true)))
	f.Add([]byte{0, 1, 1, 0, 0, 1, 0, 0, 0, 0, 0, 0, 1, 'a', 0xc0, 12, 0, 1, 0, 1})
	f.Fuzz(func(t *testing.T, b []byte) {
		q, err := parseQuery(b)
		if errors.Is(err, errSilent) {
			return
		}
		var own dns.Msg
		if e := own.Unpack(q.reply(dns.RcodeRefused)); e != nil {
			t.Fatalf("the reply to %x cannot be read: %v", b, e)
		}
		if err != nil {
			return
		}
		var m dns.Msg
		if m.Unpack(b) != nil {
			return // the rest of it is the server's to refuse
		}
		var back [256]byte
		n, e := dns.PackDomainName(m.Question[0].Name, back[:], 0, nil, false)
		if e != nil || !bytes.Equal(back[:n], q.question[:len(q.question)-4]) || m.Question[0].Qtype != q.qtype {
			t.Fatalf("judged %q, but %q is asked for", q.name, m.Question[0].Name)
		}
		q.learn(b)
	})
}

func records(t testing.TB, lines ...string) (out []dns.RR) {
	t.Helper()
	for _, l := range lines {
		r, err := dns.NewRR(l)
		if err != nil {
			t.Fatal(err)
		}
		out = append(out, r)
	}
	return out
}

func TestLearn(t *testing.T) {
	at := func(ip string, ttl int) Address {
		return Address{IP: netip.MustParseAddr(ip), TTL: time.Duration(ttl) * time.Second}
	}
	for name, c := range map[string]struct {
		answer []string
		extra  []string
		rcode  int
		want   []Address
	}{
		"plain":         {[]string{"w.x. 60 A 192.0.2.1", "W.X. 30 A 192.0.2.2", "w.x. 5 AAAA 2001:db8::1"}, nil, 0, []Address{at("192.0.2.1", 60), at("192.0.2.2", 30), at("2001:db8::1", 5)}},
		"twice":         {[]string{"w.x. 60 A 192.0.2.1", "w.x. 60 A 192.0.2.1"}, nil, 0, []Address{at("192.0.2.1", 60)}},
		"chain":         {[]string{"c.y. 60 A 192.0.2.1", "b.y. 20 CNAME c.y.", "w.x. 30 CNAME b.Y."}, nil, 0, []Address{at("192.0.2.1", 20)}},
		"another's":     {[]string{"other.x. 60 A 192.0.2.1", "w.x. 30 CNAME b.y.", "c.y. 60 A 192.0.2.2"}, nil, 0, nil},
		"beside":        {[]string{"w.x. 30 CNAME b.y.", "w.x. 60 A 192.0.2.1", "b.y. 9 A 192.0.2.2"}, nil, 0, []Address{at("192.0.2.2", 9)}},
		"additional":    {nil, []string{"w.x. 60 A 192.0.2.1"}, 0, nil},
		"loop":          {[]string{"w.x. 30 CNAME b.y.", "b.y. 30 CNAME w.x.", "w.x. 60 A 192.0.2.1"}, nil, 0, []Address{at("192.0.2.1", 30)}},
		"no such name":  {[]string{"w.x. 60 A 192.0.2.1"}, nil, dns.RcodeNameError, nil},
		"chaos":         {[]string{"w.x. 60 CH A 192.0.2.1"}, nil, 0, nil},
		"mapped":        {[]string{"w.x. 60 AAAA ::ffff:192.0.2.1"}, nil, 0, nil},
		"negative time": {[]string{"w.x. 0 A 192.0.2.1"}, nil, 0, []Address{at("192.0.2.1", 0)}},
	} {
		m := ask("W.x.", dns.TypeA)
		q, err := parseQuery(packed(t, m))
		if err != nil {
			t.Fatal(err)
		}
		m.Response, m.Rcode = true, c.rcode
		m.Answer, m.Extra = records(t, c.answer...), records(t, c.extra...)
		got, err := q.learn(packed(t, m))
		if err != nil || !slices.Equal(got, c.want) {
			t.Errorf("%s: learns %v, %v; want %v", name, got, err, c.want)
		}
	}
	m := ask("w.x.", dns.TypeA)
	q, _ := parseQuery(packed(t, m))
	m.Response = true
	b := packed(t, m)
	b[7] = 1
	if _, err := q.learn(append(b, 0, 0, 1)); err == nil { // half a record
		t.Error("an answer that cannot be read is passed on")
	}
}

func TestAnswers(t *testing.T) {
	m := ask("W.x.", dns.TypeA)
	q, _ := parseQuery(packed(t, m))
	m.Response = true
	for name, c := range map[string]struct {
		m    *dns.Msg
		want bool
	}{
		"its own":        {m, true},
		"in lower case":  {ask("w.x.", dns.TypeA), true},
		"another name":   {ask("v.x.", dns.TypeA), false},
		"a longer name":  {ask("w.x.y.", dns.TypeA), false},
		"another type":   {ask("W.x.", dns.TypeAAAA), false},
		"another letter": {ask("7.x.", dns.TypeA), false},
	} {
		c.m.Response = true
		if got := q.answers(packed(t, c.m)); got != c.want {
			t.Errorf("%s: %v", name, got)
		}
	}
	if q.answers(packed(t, ask("W.x.", dns.TypeA))) {
		t.Error("a query answers")
	}
	bare := packed(t, &dns.Msg{MsgHdr: dns.MsgHdr{Response: true, Rcode: dns.RcodeFormatError}})
	if !q.answers(bare) {
		t.Error("a bare error answers nothing")
	}
	if bare[3] &^= maskRcode; q.answers(bare) {
		t.Error("a bare success answers")
	}
}
