package probe

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/miekg/dns"
)

// namesTTL is how long an answer of Names is valid.
const namesTTL = 60 // seconds

// Zone holds the addresses of names, in lower case and with a final dot.
type Zone map[string][]netip.Addr

// ParseZone parses NAME=ADDRESS, several of a name with commas in between.
func ParseZone(items []string) (Zone, error) {
	z := Zone{}
	for _, item := range items {
		name, list, ok := strings.Cut(item, "=")
		if _, valid := dns.IsDomainName(name); !ok || !valid || name == "" {
			return nil, fmt.Errorf("%q is not NAME=ADDRESS[,ADDRESS...]", item)
		}
		name = dns.CanonicalName(name)
		for s := range strings.SplitSeq(list, ",") {
			ip, err := netip.ParseAddr(s)
			if err != nil || ip.Zone() != "" {
				return nil, fmt.Errorf("%s: %q is not an address", name, s)
			}
			z[name] = append(z[name], ip.Unmap())
		}
	}
	return z, nil
}

// answer returns the answer to a query: addresses of names of the zone, and of
// any other name that it does not exist.
func (z Zone) answer(q *dns.Msg) *dns.Msg {
	m := new(dns.Msg).SetReply(q)
	if len(q.Question) != 1 {
		return m.SetRcode(q, dns.RcodeFormatError)
	}
	m.Authoritative = true
	asked := q.Question[0]
	ips, known := z[dns.CanonicalName(asked.Name)]
	if !known {
		return m.SetRcode(q, dns.RcodeNameError)
	}
	h := dns.RR_Header{Name: asked.Name, Rrtype: asked.Qtype, Class: dns.ClassINET, Ttl: namesTTL}
	for _, ip := range ips {
		switch {
		case asked.Qtype == dns.TypeA && ip.Is4():
			m.Answer = append(m.Answer, &dns.A{Hdr: h, A: ip.AsSlice()})
		case asked.Qtype == dns.TypeAAAA && ip.Is6():
			m.Answer = append(m.Answer, &dns.AAAA{Hdr: h, AAAA: ip.AsSlice()})
		}
	}
	return m
}

// Names serves the zone by DNS on addr, UDP and TCP, until ctx ends. What does
// not fit into a datagram is truncated.
func Names(ctx context.Context, addr string, z Zone) error {
	var lc net.ListenConfig
	lc.SetMultipathTCP(false)
	pc, err := lc.ListenPacket(ctx, "udp", addr)
	if err != nil {
		return err
	}
	ln, err := lc.Listen(ctx, "tcp", addr)
	if err != nil {
		return errors.Join(err, pc.Close())
	}
	handler := dns.HandlerFunc(func(w dns.ResponseWriter, q *dns.Msg) {
		m := z.answer(q)
		size := dns.MaxMsgSize
		if _, datagrams := w.LocalAddr().(*net.UDPAddr); datagrams {
			size = dns.MinMsgSize
			if o := q.IsEdns0(); o != nil {
				size = max(size, int(o.UDPSize()))
			}
		}
		if o := q.IsEdns0(); o != nil {
			m.SetEdns0(dns.DefaultMsgSize, o.Do())
		}
		m.Truncate(size)
		w.WriteMsg(m) // an error is the network's: the client asks again
	})
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	stop := context.AfterFunc(ctx, func() { pc.Close(); ln.Close() })
	defer stop()
	errs := make([]error, 2)
	var wg sync.WaitGroup
	for i, srv := range []*dns.Server{{PacketConn: pc, Handler: handler}, {Listener: ln, Handler: handler}} {
		wg.Go(func() {
			defer cancel()
			if err := srv.ActivateAndServe(); err != nil && ctx.Err() == nil {
				errs[i] = err
			}
		})
	}
	wg.Wait()
	return errors.Join(errs...)
}

// Lookup asks a DNS server for a name's addresses of one family, and returns the
// code of the answer: "NOERROR", "REFUSED", ...
func Lookup(ctx context.Context, server netip.AddrPort, name string, v6 bool, timeout time.Duration) (ips []netip.Addr, code string, err error) {
	q := new(dns.Msg).SetQuestion(dns.CanonicalName(name), dns.TypeA)
	if v6 {
		q.Question[0].Qtype = dns.TypeAAAA
	}
	c := dns.Client{Timeout: timeout}
	m, _, err := c.ExchangeContext(ctx, q, server.String())
	if err != nil {
		return nil, "", err
	}
	for _, rr := range m.Answer {
		var ip netip.Addr
		switch rr := rr.(type) {
		case *dns.A:
			ip, _ = netip.AddrFromSlice(rr.A.To4())
		case *dns.AAAA:
			ip, _ = netip.AddrFromSlice(rr.AAAA)
		}
		if ip.IsValid() && !slices.Contains(ips, ip) {
			ips = append(ips, ip)
		}
	}
	return ips, dns.RcodeToString[m.Rcode], nil
}
