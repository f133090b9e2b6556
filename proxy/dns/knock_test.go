package dns

import (
	"context"
	"net"
	"sync/atomic"
	"testing"

	"github.com/miekg/dns"

	"portcullis/authz/l7"
	"portcullis/proxy"
)

// heard is a socket that tells of what is sent by it.
type heard struct {
	net.Conn
	sent func([]byte)
}

func (h heard) Write(b []byte) (int, error) {
	h.sent(b)
	return h.Conn.Write(b)
}

// behindService runs a relay whose flows are judged when their first packet has
// passed, by whoever then turns out to take it.
func behindService(t *testing.T, then proxy.Judge) (g *rig, packets func() (empty, queries int)) {
	server := serve(t, zone(t, "one.test. 60 IN A 192.0.2.1"))
	var passed atomic.Bool
	var empty, queries atomic.Int64
	g = start(t, server, func(c *Config) {
		c.Judge = judgeFunc(func(f proxy.Conn) (proxy.Decision, error) {
			if !passed.Load() {
				return proxy.Decision{}, proxy.ErrNotJudged
			}
			return then.Judge(f)
		})
		dial := c.Dial
		c.Dial = func(ctx context.Context, f proxy.Conn) (net.Conn, error) {
			conn, err := dial(ctx, f)
			if err != nil {
				return nil, err
			}
			if f.Protocol == TCP {
				passed.Store(true)
			}
			return heard{conn, func(b []byte) {
				passed.Store(true)
				if len(b) == 0 {
					empty.Add(1)
				} else {
					queries.Add(1)
				}
			}}, nil
		}
	})
	return g, func() (int, int) { return int(empty.Load()), int(queries.Load()) }
}

// What is asked of a service goes nowhere before it is known who takes it.
func TestServiceIsJudgedBeforeAnythingIsAsked(t *testing.T) {
	for _, network := range []string{"udp", "tcp"} {
		g, packets := behindService(t, allows(t, l7.Name{Name: "one.test"}))
		c := dns.Client{Net: network}
		m, _, err := c.Exchange(new(dns.Msg).SetQuestion("one.test.", dns.TypeA), g.addr.String())
		if err != nil || len(m.Answer) != 1 {
			t.Errorf("%s: %v, %v", network, m, err)
		}
		if empty, queries := packets(); empty != map[string]int{"udp": 1}[network] || queries != 1 {
			t.Errorf("%s: %d empty datagrams and %d queries went to the service, want a query, and of UDP a datagram before it", network, empty, queries)
		}

		g, packets = behindService(t, allows(t, l7.Name{Name: "one.test"}))
		m, _, err = c.Exchange(new(dns.Msg).SetQuestion("two.test.", dns.TypeA), g.addr.String())
		if err != nil || m.Rcode != dns.RcodeRefused {
			t.Errorf("%s, a name that no rule allows: %v, %v", network, m, err)
		}
		if _, queries := packets(); queries != 0 {
			t.Errorf("%s: %d queries of a name that no rule allows went to the service", network, queries)
		}
	}
}

// Of a service whose server nobody may call, nothing is ever judged.
func TestServiceThatIsNeverJudged(t *testing.T) {
	g, packets := behindService(t, judgeFunc(func(proxy.Conn) (proxy.Decision, error) { return proxy.Decision{}, proxy.ErrNotJudged }))
	m, _, err := new(dns.Client).Exchange(new(dns.Msg).SetQuestion("one.test.", dns.TypeA), g.addr.String())
	if err != nil || m.Rcode != dns.RcodeRefused {
		t.Errorf("%v, %v", m, err)
	}
	if how := g.how(t, "one.test."); how != NotJudged {
		t.Errorf("it is recorded as %s", how)
	}
	if empty, queries := packets(); empty != 1 || queries != 0 {
		t.Errorf("%d empty datagrams and %d queries went on", empty, queries)
	}
}
