package main

import (
	"context"
	"fmt"
	"net"
	"strings"

	"github.com/miekg/dns"
)

// zone is what the server answers, but for alias and big.
var zone = map[string][]string{
	"www.example.com.":   {"www.example.com. 60 IN A 203.0.113.10", "www.example.com. 60 IN AAAA 2001:db8::10"},
	"four.example.com.":  {"four.example.com. 60 IN A 203.0.113.10"},
	"alias.example.com.": {"alias.example.com. 60 IN CNAME www.example.com.", "www.example.com. 60 IN A 203.0.113.10", "www.example.com. 60 IN AAAA 2001:db8::10"},
	"_http.example.com.": {"_http.example.com. 60 IN SRV 1 1 80 www.example.com."},
	"big.example.com.":   texts("big.example.com. 60 IN TXT ", 13),
	"huge.example.com.":  texts("huge.example.com. 60 IN TXT ", 60),
	"many.example.com.":  nil, // made below
}

func texts(head string, n int) (out []string) {
	for i := range n {
		out = append(out, fmt.Sprintf("%s%03d%s", head, i, strings.Repeat("t", 200)))
	}
	return out
}

func init() {
	for i := range 60 {
		zone["many.example.com."] = append(zone["many.example.com."], fmt.Sprintf("many.example.com. 60 IN A 203.0.113.%d", 100+i))
	}
}

// names answers for the zone. What it is asked and should not be is noted.
func (w *world) names(rw dns.ResponseWriter, q *dns.Msg) {
	m := new(dns.Msg).SetReply(q)
	m.RecursionAvailable = true
	asked := q.Question[0]
	name := dns.CanonicalName(asked.Name)
	if !strings.HasSuffix(name, ".example.com.") || strings.Count(name, ".") != 3 {
		w.came("DNS " + name)
	}
	records, known := zone[name]
	if !known {
		m.Rcode = dns.RcodeNameError
	}
	for _, s := range records {
		rr, err := dns.NewRR(s)
		if err != nil {
			panic(err) // the zone is wrong
		}
		if t := rr.Header().Rrtype; t == asked.Qtype || t == dns.TypeCNAME || asked.Qtype == dns.TypeANY {
			if rr.Header().Name == name {
				rr.Header().Name = asked.Name // as it was asked, letter by letter
			}
			m.Answer = append(m.Answer, rr)
		}
	}
	size := dns.MaxMsgSize
	if _, datagrams := rw.LocalAddr().(*net.UDPAddr); datagrams {
		if size = dns.MinMsgSize; q.IsEdns0() != nil {
			size = max(size, int(q.IsEdns0().UDPSize()))
		}
	}
	if o := q.IsEdns0(); o != nil {
		m.SetEdns0(4096, o.Do())
	}
	m.Truncate(size)
	_ = rw.WriteMsg(m) // who asked asks again
}

// serveNames answers by UDP and TCP, at the server's own addresses: a socket of any
// address would answer from any.
func (w *world) serveNames() error {
	for _, ip := range w.server.IPs {
		at := net.JoinHostPort(ip.String(), fmt.Sprint(dnsPort))
		var pc net.PacketConn
		var l net.Listener
		err := w.InWorkload(w.server.Spec.FullName(), func() (err error) {
			var lc net.ListenConfig
			lc.SetMultipathTCP(false)
			if pc, err = lc.ListenPacket(context.Background(), "udp", at); err == nil {
				l, err = lc.Listen(context.Background(), "tcp", at)
			}
			return err
		})
		if err != nil {
			return err
		}
		for _, srv := range []*dns.Server{{PacketConn: pc, Handler: dns.HandlerFunc(w.names)}, {Listener: l, Handler: dns.HandlerFunc(w.names)}} {
			done := make(chan struct{})
			go func() { defer close(done); _ = srv.ActivateAndServe() }() // until close
			w.onClose(func() { pc.Close(); l.Close(); <-done })
		}
	}
	return nil
}

// askers are programs that ask what they are told to.
func askers(w *world) []check {
	var out []check
	ask := func(client, pack, what, outcome string, argv []string, want ...string) {
		c := w.command(client, pack, what, outcome, argv, want...)
		c.egress = true
		out = append(out, c)
	}
	dig := func(what, outcome string, args []string, want ...string) {
		ask("dig", "bind9-dnsutils", what, outcome, append([]string{"dig", "@{addr}", "+tries=1", "+timeout=5"}, args...), want...)
	}
	const ok, no = "status: NOERROR", "status: REFUSED"
	dig("`A` and `AAAA`", "answered", []string{"+short", "www.example.com", "A", "www.example.com", "AAAA"}, "=203.0.113.10\n2001:db8::10")
	dig("a cookie, `+dnssec +cd +nsid`", "answered", []string{"+dnssec", "+cd", "+nsid", "www.example.com"}, ok, "flags: do", "203.0.113.10")
	dig("`+noedns`, `+subnet=198.51.100.0/24`", "answered", []string{"www.example.com", "+noedns", "www.example.com", "+subnet=198.51.100.0/24"}, ok, "203.0.113.10")
	dig("`+tcp`, three queries by `+keepopen`", "answered", []string{"+tcp", "+keepopen", "+short", "www.example.com", "four.example.com", "alias.example.com"}, "=203.0.113.10\n203.0.113.10\nwww.example.com.\n203.0.113.10")
	dig("`ANY`", "answered", []string{"www.example.com", "ANY", "+notcp"}, ok, "203.0.113.10", "2001:db8::10")
	dig("`CNAME`, `SRV`, `HTTPS`, a name in mixed case", "answered", []string{"alias.example.com", "_http.example.com", "SRV", "www.example.com", "HTTPS", "wWw.eXample.COM"}, "CNAME", "SRV", "wWw.eXample.COM.", "!REFUSED")
	dig("a name that does not exist", "`NXDOMAIN` of the server", []string{"none.example.com"}, "status: NXDOMAIN")
	dig("a name that is refused, by UDP and TCP", "`REFUSED`", []string{"secret.example.net", "+tcp", "secret.example.net"}, no, "!NOERROR", "!NXDOMAIN")
	dig("`-x` (no rule names it)", "`REFUSED`", []string{"-x", "203.0.113.10"}, no)
	dig("2.6 kB of `TXT`, `+bufsize=1232`", "by TCP, after a truncated answer", []string{"+bufsize=1232", "big.example.com", "TXT"}, ok, "Truncated, retrying in TCP", "012ttt")
	dig("2.6 kB of `TXT`, `+bufsize=4096`: more than a packet takes", "by TCP, after a truncated answer", []string{"+bufsize=4096", "big.example.com", "TXT"}, ok, "Truncated, retrying in TCP", "012ttt")
	dig("the same with `+ignore`", "truncated, without what does not fit", []string{"+bufsize=4096", "+ignore", "big.example.com", "TXT"}, ok, "flags: qr tc rd ra")
	dig("12 kB of `TXT`", "by TCP", []string{"huge.example.com", "TXT"}, ok, "059ttt")
	dig("60 addresses, `+noedns`", "by TCP", []string{"+noedns", "many.example.com"}, ok, "203.0.113.159")
	dig("`AXFR`, `+opcode=notify`", "`REFUSED`, `NOTIMP`", []string{"www.example.com", "AXFR", "www.example.com", "+opcode=notify"}, "NOTIMP", "Transfer failed")
	kdig := func(what, outcome string, args []string, want ...string) {
		ask("kdig", "knot-dnsutils", what, outcome, append([]string{"kdig", "@{addr}", "+retry=0", "+time=5"}, args...), want...)
	}
	kdig("`+dnssec +padding`; `+tcp +keepopen`, two queries", "answered", []string{"+dnssec", "+padding=64", "+tcp", "+keepopen", "www.example.com", "alias.example.com"}, ok, "203.0.113.10", "CNAME", "!;; ERROR")
	kdig("2.6 kB, `+bufsize=4096`; a refused name", "by TCP; `REFUSED`", []string{"+bufsize=4096", "big.example.com", "TXT", "secret.example.net"}, "012ttt", no)
	ask("drill", "ldnsutils", "`-D` (DNSSEC), `-t` (TCP), a refused name", "answered, `REFUSED`", []string{"sh", "-c", "drill -D www.example.com @{addr} && drill -t www.example.com @{addr}; drill secret.example.net @{addr}"}, "rcode: NOERROR", "rcode: REFUSED", "203.0.113.10")
	return out
}
